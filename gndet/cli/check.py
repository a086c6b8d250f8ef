"""`gndet check CONFIG_OR_JSON [key=value ...] [--images] [--sheet FILE] [--json FILE]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, file_name, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("check", help="check a data set for errors before training on it")
    verb.add_argument(
        "source", type=file_name, help="config (its data.train and data.val), data folder, or annotation file"
    )
    add_overrides(verb)
    verb.add_argument("--images", action="store_true", help="also decode every picture")
    verb.add_argument(
        "--image-folder", type=path, metavar="FOLDER", help="pictures of an annotation file (default: search near it)"
    )
    verb.add_argument("--sheet", type=path, metavar="FILE", help="draw images with boxes and masks into this PNG file")
    verb.add_argument("--json", type=path, metavar="FILE", help="write the report here as JSON")


def run(options: Options) -> int:
    """Check a data set.  Returns 1 if it is refused."""
    from gndet.cli.console import EscapingConsole
    from gndet.toolbox.check.check import check

    passed = check(
        options.source, options.overrides, say, image_folder=options.image_folder,
        images=options.images, sheet=options.sheet, out=options.json, console=EscapingConsole(),
    )  # fmt: skip
    return 0 if passed else 1
