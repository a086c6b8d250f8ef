"""`gndet convert SOURCE OUT [--to gn|TOOLKIT] [--policy P] [--images ...] [key=value ...]`."""

from pathlib import Path

from gndet.cli.arguments import Options, Verbs, add_overrides, one_or_more, zero_or_more


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("convert", help="weights of other toolkits in, BN into GN, weights for other toolkits out")
    verb.add_argument("source", help="gndet run or checkpoint, a file (.pth, .pkl, .safetensors), or a weight name")
    verb.add_argument("out", type=Path, help="checkpoint folder to write; a .pth file with --to a toolkit")
    verb.add_argument(
        "--to", choices=("gn", "detectron2", "torchvision", "mmdetection"), help="GN for BN, or a toolkit"
    )
    verb.add_argument(
        "--policy", default="convert", choices=("hybrid", "convert", "calibrate", "affine", "reinit"),
        help="how BN becomes GN (convert: in closed form)",
    )  # fmt: skip
    verb.add_argument("--channels-per-group", type=one_or_more, default=16, help="of the GN layers (16)")
    verb.add_argument("--damp", type=zero_or_more, default=1.0, help="train.norm_damp (1)")
    verb.add_argument("--images", type=Path, nargs="+", default=[], help="pictures or folders to fit and measure on")
    verb.add_argument("--count", type=one_or_more, default=32, help="how many of the pictures calibrate fits on (32)")
    add_overrides(verb, "train.source.* or model.*, as in a config")


def run(options: Options) -> int:
    """Convert weights."""
    from gndet.toolbox.convert import convert

    convert(
        options.source, options.out, options.overrides, print, to=options.to, policy=options.policy,
        channels_per_group=options.channels_per_group, damp=options.damp, pictures=options.images, count=options.count,
    )  # fmt: skip
    return 0
