"""gndet: object-detection training for small per-GPU batches, built around Group Normalization."""

__version__ = "0.1.0"
