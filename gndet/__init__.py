"""gndet: object-detection training for small per-GPU batches, built around Group Normalization.

    import gndet

    detector = gndet.load("runs/cells")
    found = detector.predict("photo.jpg")

`load`, `train`, `Detector` and `Prediction` are imported when they are first used, so that `import gndet` and
`gndet --help` answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gndet.cli.train import train_run as train
    from gndet.evaluation.detector import Detector, load
    from gndet.evaluation.prediction import Prediction

__version__ = "0.1.0"
__all__ = ("Detector", "Prediction", "__version__", "load", "train")


def __getattr__(name: str) -> object:
    """Import what is first used.  `gndet.train` is a module that can be called, see its end."""
    places = {
        "load": "gndet.evaluation.detector", "Detector": "gndet.evaluation.detector",
        "Prediction": "gndet.evaluation.prediction",
    }  # fmt: skip
    if name == "train":
        return import_module("gndet.train")
    if name not in places:
        raise AttributeError(f"module 'gndet' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(places[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
