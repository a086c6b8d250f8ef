"""`gndet predict CHECKPOINT SOURCE ... --out FOLDER [--threshold T] [--classes a,b] [--save-crops] [--sheet]`.

`gndet predict CLASSIFIER SOURCE ... --out FOLDER [--top N] [--sheet]`.
"""

from gndet.cli.arguments import CHECKPOINT, Options, Verbs, add_overrides

# isort: split
from gndet.cli.arguments import device_of, file_name, fraction, names, one_or_more, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("predict", help="detect objects in pictures and videos and draw them, or classify them")
    verb.add_argument("checkpoint", type=path, help=CHECKPOINT)
    verb.add_argument(
        "sources", type=file_name, nargs="+", metavar="SOURCE",
        help="pictures, videos, folders, or patterns like 'a/**/*.jpg'",
    )  # fmt: skip
    verb.add_argument(
        "--out", type=path, required=True, metavar="FOLDER", help="folder for the pictures and predictions.json"
    )
    verb.add_argument("--threshold", type=fraction, metavar="T", help="lowest score of a drawn object (default: 0.5)")
    verb.add_argument("--classes", type=names, help="only these classes, e.g. cat,dog")
    verb.add_argument("--save-crops", action="store_true", help="save each drawn object to OUT/crops/CLASS")
    verb.add_argument("--sheet", action="store_true", help="draw the first pictures together in OUT/sheet.png")
    verb.add_argument("--top", type=one_or_more, metavar="N", help="classifier: classes per picture (default: 5)")
    verb.add_argument("--every", type=one_or_more, default=1, metavar="N", help="use every Nth frame (default: 1)")
    add_overrides(verb)


def run(options: Options) -> int:
    """Detect objects and draw them, or classify pictures."""
    from gndet.distributed.process import process
    from gndet.errors import ConfigError
    from gndet.evaluation.detector import load_detector
    from gndet.evaluation.picture_classifier import TOP, load_picture_classifier
    from gndet.files import removed_if_empty
    from gndet.modeling.trained import is_classifier
    from gndet.toolbox.predict.classes import predict_classes
    from gndet.toolbox.predict.predict import predict

    classifies = is_classifier(options.checkpoint)
    objects = {
        "--threshold": options.threshold,
        "--classes": options.classes,
        "--save-crops": options.save_crops or None,
    }
    chosen = objects if classifies else {"--top": options.top}
    if given := [name for name, value in chosen.items() if value is not None]:
        what = (
            "classifier, which finds no objects; --top N sets how many classes"
            if classifies
            else "detector, which finds objects; --threshold sets which of them"
        )
        raise ConfigError(f"{given[0]}: {options.checkpoint} is a {what} it shows")
    with removed_if_empty(options.out), process(device_of(options.overrides)) as proc:
        if classifies:
            classifier = load_picture_classifier(options.checkpoint, options.overrides, proc, say)
            predict_classes(
                classifier, options.sources, options.out, say, top=options.top or TOP, sheet=options.sheet,
                every=options.every,
            )  # fmt: skip
            return 0
        detector = load_detector(options.checkpoint, options.overrides, proc, say)
        predict(
            detector, options.sources, options.out, proc.device, say,
            threshold=0.5 if options.threshold is None else options.threshold,
            classes=options.classes, crops=options.save_crops, sheet=options.sheet, every=options.every,
        )  # fmt: skip
    return 0
