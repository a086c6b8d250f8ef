"""`gndet predict CHECKPOINT SOURCE ... --out FOLDER [--threshold T] [--classes a,b] [--save-crops] [--sheet]`."""

from gndet.cli.arguments import CHECKPOINT, Options, Verbs, add_overrides

# isort: split
from gndet.cli.arguments import device_of, file_name, fraction, names, one_or_more, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("predict", help="detect objects in pictures and videos, and draw them")
    verb.add_argument("checkpoint", type=path, help=CHECKPOINT)
    verb.add_argument(
        "sources", type=file_name, nargs="+", metavar="SOURCE",
        help="pictures, videos, folders, or patterns like 'a/**/*.jpg'",
    )  # fmt: skip
    verb.add_argument(
        "--out", type=path, required=True, metavar="FOLDER", help="folder for the pictures and predictions.json"
    )
    verb.add_argument(
        "--threshold", type=fraction, default=0.5, metavar="T", help="lowest score of a drawn object (default: 0.5)"
    )
    verb.add_argument("--classes", type=names, help="only these classes, e.g. cat,dog")
    verb.add_argument("--save-crops", action="store_true", help="save each drawn object to OUT/crops/CLASS")
    verb.add_argument("--sheet", action="store_true", help="draw the first pictures together in OUT/sheet.png")
    verb.add_argument("--every", type=one_or_more, default=1, metavar="N", help="use every Nth frame (default: 1)")
    add_overrides(verb)


def run(options: Options) -> int:
    """Detect objects and draw them."""
    from gndet.distributed.process import process
    from gndet.evaluation.detector import load_detector
    from gndet.files import removed_if_empty
    from gndet.toolbox.predict.predict import predict

    with removed_if_empty(options.out), process(device_of(options.overrides)) as proc:
        detector = load_detector(options.checkpoint, options.overrides, proc, say)
        predict(
            detector, options.sources, options.out, proc.device, say, threshold=options.threshold,
            classes=options.classes, crops=options.save_crops, sheet=options.sheet, every=options.every,
        )  # fmt: skip
    return 0
