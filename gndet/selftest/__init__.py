"""The faults that a training run must survive, injected into real runs of a tiny detector: `gndet selftest`."""
