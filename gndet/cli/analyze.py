"""`gndet analyze RUN_OR_JSON [--data FILE] [--kind box|mask] [--json FILE] [--csv FOLDER] [--images N]`."""

from pathlib import Path

from gndet.cli.arguments import Options, Verbs, add_overrides, one_or_more


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("analyze", help="what a detector gets wrong, and what mending each kind would give")
    verb.add_argument("source", type=Path, help="run folder, or detections of any toolkit in COCO's results format")
    verb.add_argument("--data", metavar="FILE", help="of a results file: COCO annotations, or a config with data.val")
    verb.add_argument("--kind", choices=("box", "mask"), help="what is compared (masks where there are any)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write all of it here")
    verb.add_argument("--csv", type=Path, metavar="FOLDER", help="write the tables here, a file each")
    verb.add_argument("--images", type=one_or_more, default=50, metavar="N", help="worst images that are listed (50)")
    add_overrides(verb)


def run(options: Options) -> int:
    """Print the analysis."""
    from gndet.toolbox.analysis.analyze import analyze

    analyze(
        options.source, options.overrides, print, data=options.data, kind=options.kind, json_file=options.json,
        csv_folder=options.csv, images=options.images,
    )  # fmt: skip
    return 0
