"""`gndet convert SOURCE OUT [--to gn|TOOLKIT] [--policy P] [--images ...] [key=value ...]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, file_name, one_or_more, path, zero_or_more


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser(
        "convert", help="convert weights from another toolkit, from BN to GN, or to another toolkit"
    )
    verb.add_argument(
        "source",
        type=file_name,
        help="gndet run or checkpoint, a weights file (.pth, .pkl, .safetensors, .npz), or a name",
    )
    verb.add_argument("out", type=path, help="checkpoint folder to write; with --to TOOLKIT, a .pth file")
    verb.add_argument(
        "--to", choices=("gn", "detectron2", "torchvision", "mmdetection"), help="gn (replace BN), or a toolkit"
    )
    verb.add_argument(
        "--policy", default="convert", choices=("hybrid", "convert", "calibrate", "affine", "reinit"),
        help="how BN becomes GN (default: convert, a closed form)",
    )  # fmt: skip
    verb.add_argument("--channels-per-group", type=one_or_more, default=16, help="of the GN layers (default: 16)")
    verb.add_argument("--damp", type=zero_or_more, default=1.0, help="same as train.norm_damp (default: 1)")
    verb.add_argument("--images", type=path, nargs="+", default=[], help="pictures or folders to calibrate and test on")
    verb.add_argument(
        "--count", type=one_or_more, default=32, help="pictures that --policy calibrate uses (default: 32)"
    )
    add_overrides(verb, "overrides of train.source.* or model.*")


def run(options: Options) -> int:
    """Convert weights."""
    from gndet.toolbox.convert import convert

    convert(
        options.source, options.out, options.overrides, print, to=options.to, policy=options.policy,
        channels_per_group=options.channels_per_group, damp=options.damp, pictures=options.images, count=options.count,
    )  # fmt: skip
    return 0
