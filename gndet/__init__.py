"""gndet: object-detection training for small per-GPU batches, built around Group Normalization.

    import gndet

    detector = gndet.load("runs/cells")
    found = detector.predict("photo.jpg")

`load`, `load_classifier`, `train` and the classes are imported when they are first used, so that `import gndet` and
`gndet --help` answer at once.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gndet.cli.train import train_run as train
    from gndet.cli.train import train_run as train_run
    from gndet.evaluation.detector import Detector, load
    from gndet.evaluation.picture_classifier import ClassPrediction, PictureClassifier, load_classifier
    from gndet.evaluation.prediction import Prediction

__version__ = "0.1.0"
__all__ = (
    "ClassPrediction", "Detector", "PictureClassifier", "Prediction", "__version__", "load", "load_classifier", "train",
)  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name when it is first used.  `gndet.train` is a module; calling it calls `train_run`."""
    if name == "train":
        import gndet.train as module

        return module
    if name == "train_run":
        from gndet.cli.train import train_run

        return train_run
    if name in ("Detector", "load"):
        from gndet.evaluation import detector

        return getattr(detector, name)
    if name in ("ClassPrediction", "PictureClassifier", "load_classifier"):
        from gndet.evaluation import picture_classifier

        return getattr(picture_classifier, name)
    if name == "Prediction":
        from gndet.evaluation.prediction import Prediction

        return Prediction
    raise AttributeError(f"module 'gndet' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
