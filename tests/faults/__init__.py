"""Faults that a training run must survive, injected into real runs of a tiny detector: `pytest -m "faults and not soak"`."""
