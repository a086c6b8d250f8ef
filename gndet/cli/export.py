"""`gndet export CHECKPOINT --onnx FILE [--size HxW] [--no-masks] [--opset N] [--picture FILE]`."""

from gndet.cli.arguments import CHECKPOINT, Options, Verbs, add_overrides, height_and_width, one_or_more, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("export", help="export a detector or a classifier to ONNX, and compare it with torch")
    verb.add_argument("checkpoint", type=path, help=CHECKPOINT)
    verb.add_argument("--onnx", type=path, required=True, metavar="FILE", help="ONNX file to write")
    verb.add_argument(
        "--size", type=height_and_width, metavar="480x640", help="fix the input size, e.g. 480x640 (default: dynamic)"
    )
    verb.add_argument("--no-masks", action="store_true", help="export only the boxes of a detector with masks")
    verb.add_argument("--opset", type=one_or_more, default=17, help="ONNX opset, 17 to 20 (default: 17)")
    verb.add_argument("--picture", type=path, metavar="FILE", help="picture to compare on (default: one of data.val)")
    add_overrides(verb)


def run(options: Options) -> int:
    """Export a detector or a classifier.  Returns 1 if the ONNX file and torch differ."""
    from gndet.errors import ConfigError
    from gndet.modeling.trained import is_classifier
    from gndet.toolbox.onnx.classifier import export_classifier
    from gndet.toolbox.onnx.export import export

    if is_classifier(options.checkpoint):
        if options.size:
            raise ConfigError(f"--size: {options.checkpoint} is a classifier, whose pictures data.crop.size limits")
        if options.no_masks:
            raise ConfigError(f"--no-masks: {options.checkpoint} is a classifier, which has no masks; leave it out")
        equal = export_classifier(
            options.checkpoint, options.onnx, options.overrides, say, opset=options.opset, picture=options.picture
        )
        return 0 if equal else 1
    equal = export(
        options.checkpoint, options.onnx, options.overrides, say, size=options.size,
        masks=not options.no_masks, opset=options.opset, picture=options.picture,
    )  # fmt: skip
    return 0 if equal else 1
