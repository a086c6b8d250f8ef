"""`gndet check CONFIG_OR_JSON [key=value ...] [--images] [--sheet FILE] [--json FILE]`."""

from pathlib import Path

from gndet.cli.arguments import Options, Verbs, add_overrides, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("check", help="what is wrong with a data set, before it is trained on")
    verb.add_argument("source", help="config: its data.train and data.val; or an annotation file, COCO's JSON")
    add_overrides(verb)
    verb.add_argument("--images", action="store_true", help="decode every picture too")
    verb.add_argument("--image-folder", type=Path, help="pictures of a JSON file (looked for beside it)")
    verb.add_argument("--sheet", type=Path, help="draw images with boxes and masks into this file (.png)")
    verb.add_argument("--json", type=Path, help="write the report here, JSON")


def run(options: Options) -> int:
    """Check a data set.  Returns 1 where it is refused."""
    from rich.console import Console

    from gndet.toolbox.check.check import check

    passed = check(
        options.source, options.overrides, say, image_folder=options.image_folder,
        images=options.images, sheet=options.sheet, out=options.json, console=Console(),
    )  # fmt: skip
    return 0 if passed else 1
