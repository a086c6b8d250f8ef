"""`gndet convert-data SOURCE OUT --to coco|yolo [--image-folder FOLDER] [key=value ...]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, file_name, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("convert-data", help="write a checked copy of a data set in another format")
    verb.add_argument(
        "source", type=file_name, help="data folder, annotation file, or config (its data.train and data.val)"
    )
    verb.add_argument("out", type=path, help="new or empty folder for the copy, pictures included")
    verb.add_argument("--to", choices=("coco", "yolo"), required=True, help="format of the copy")
    verb.add_argument(
        "--image-folder", type=path, metavar="FOLDER", help="pictures of an annotation file (default: search near it)"
    )
    add_overrides(verb)


def run(options: Options) -> int:
    """Write the copy."""
    from gndet.files import removed_if_empty
    from gndet.toolbox.convert_data import convert_data

    with removed_if_empty(options.out):
        convert_data(options.source, options.out, options.to, options.overrides, say, options.image_folder)
    return 0
