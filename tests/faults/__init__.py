"""Faults that a training run must survive, injected into real runs of a tiny detector.

Run them with `pytest -m "faults and not soak"`.
"""
