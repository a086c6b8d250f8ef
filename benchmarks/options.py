"""The options of `python -m benchmarks NAME`, without torch, so that --help answers at once.

`common` gives every benchmark --rounds and --threads; what else one needs stands in the function of its name.
"""

import argparse
from pathlib import Path

from gndet.cli.arguments import height_and_width, one_or_more


def common(parser: argparse.ArgumentParser) -> None:
    """What all benchmarks have."""
    parser.add_argument("--rounds", type=one_or_more, default=5, help="turns of each that count (5)")
    parser.add_argument("--threads", type=one_or_more, default=1, help="threads that each may use (1)")


def step(parser: argparse.ArgumentParser) -> None:
    """The training step: gndet and torchvision's Mask R-CNN, of one architecture and one load of regions."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of gndet's config, like train.memory=lean")
    parser.add_argument("--size", type=height_and_width, default=(480, 640), metavar="480x640", help="of the pictures")
    parser.add_argument("--batch", type=one_or_more, default=2, help="images at once (2)")
    parser.add_argument("--norm", choices=("gn", "frozen_bn"), default="gn", help="of the whole network (gn)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of both (float32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the step is computed (cpu)")
    parser.add_argument(
        "--vary", type=key_and_values, metavar="KEY:V,V", help="gndet once for each value, like train.memory:fast,lean"
    )
    parser.add_argument("--tuned", action="store_true", help="torchvision once more, with glibc told to keep memory")
    parser.add_argument("--memory", action="store_true", help="instead: the memory of each part of gndet's step")


def norm(parser: argparse.ArgumentParser) -> None:
    """Group normalization with ReLU, forward and backward, beside torch's and beside a copy."""
    parser.add_argument("--batch", type=one_or_more, default=1, help="images at once (1)")


def loader(parser: argparse.ArgumentParser) -> None:
    """The input pipeline, pictures to training samples: gndet and torchvision's v2 transforms."""
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO's format; without it pictures are drawn")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="of that file")
    parser.add_argument("--num", type=one_or_more, default=40, help="of pictures that are drawn (40)")
    parser.add_argument("--edge", type=one_or_more, default=800, help="pixels of the shorter edge (800)")
    parser.add_argument("--max-edge", type=one_or_more, default=1333, help="pixels of the longer edge at most (1333)")


def start(parser: argparse.ArgumentParser) -> None:
    """Opening an annotation file of COCO's size, for the first time and again: gndet, pycocotools and hotcoco."""
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="a file of COCO's format; else one is made up")
    parser.add_argument("--images", type=one_or_more, default=118_000, help="of the made-up file (118000)")
    parser.add_argument("--objects", type=one_or_more, default=860_000, help="of the made-up file (860000)")


def evaluation(parser: argparse.ArgumentParser) -> None:
    """COCO metrics of boxes and masks: gndet, hotcoco and pycocotools, from detections in memory."""
    parser.add_argument("--num", type=one_or_more, default=500, help="of pictures (500); COCO's val2017 has 5000")
    parser.add_argument("--detections", type=one_or_more, default=100, help="in each (100)")


def key_and_values(text: str) -> tuple[str, list[str]]:
    """A config key and values for it, like train.memory:fast,lean."""
    key, colon, values = text.partition(":")
    if not (key and colon and all(values.split(","))):
        raise argparse.ArgumentTypeError(f"{text}: expected KEY:VALUE,VALUE, like train.memory:fast,lean")
    return key, values.split(",")


NAMES = {"step": step, "norm": norm, "loader": loader, "start": start, "eval": evaluation}


def add_all(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Give the command a parser for each NAME.  Returns them."""
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    made = []
    for name, add_options in NAMES.items():
        one = names.add_parser(name, help=add_options.__doc__, description=add_options.__doc__)
        common(one)
        add_options(one)
        made.append(one)
    return made
