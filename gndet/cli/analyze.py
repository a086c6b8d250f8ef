"""`gndet analyze RUN_OR_JSON [--data FILE] [--kind box|mask] [--json FILE] [--csv FOLDER] [--images N]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, file_name, one_or_more, path


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("analyze", help="list a detector's errors by kind, and what fixing each would gain")
    verb.add_argument("source", type=path, help="run folder, or a JSON file of COCO results from any toolkit")
    verb.add_argument(
        "--data", type=file_name, metavar="FILE", help="for a results file: COCO annotations, or a config with data.val"
    )
    verb.add_argument("--kind", choices=("box", "mask"), help="what to compare (default: masks if there are any)")
    verb.add_argument("--json", type=path, metavar="FILE", help="write the whole analysis here")
    verb.add_argument("--csv", type=path, metavar="FOLDER", help="write each table to a file in this folder")
    verb.add_argument("--images", type=one_or_more, default=50, metavar="N", help="worst images to list (default: 50)")
    add_overrides(verb)


def run(options: Options) -> int:
    """Print the analysis."""
    from gndet.toolbox.analysis.analyze import analyze

    analyze(
        options.source, options.overrides, print, data=options.data, kind=options.kind, json_file=options.json,
        csv_folder=options.csv, images=options.images,
    )  # fmt: skip
    return 0
