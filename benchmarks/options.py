"""The options of `python -m benchmarks NAME`, defined without torch so that --help answers at once.

`common` gives every benchmark --rounds and --threads; each benchmark's other options are in the function of its name.
"""

import argparse
from pathlib import Path

from gndet.cli.arguments import height_and_width, one_or_more

DETECTORS = ("mask_rcnn", "c4", "dc5", "cascade", "fcos", "atss", "retinanet", "resnext", "timm")


def common(parser: argparse.ArgumentParser) -> None:
    """Add the options that all benchmarks share."""
    parser.add_argument("--rounds", type=one_or_more, default=5, help="counted turns per subject (5)")
    parser.add_argument("--threads", type=one_or_more, default=1, help="threads per subject (1)")


def step(parser: argparse.ArgumentParser) -> None:
    """Time the training step of gndet and of torchvision's Mask R-CNN, with the same architecture and regions."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="gndet config, e.g. train.memory=lean")
    parser.add_argument(
        "--size", type=height_and_width, default=(480, 640), metavar="480x640", help="picture size (480x640)"
    )
    parser.add_argument("--batch", type=one_or_more, default=2, help="images at once (2)")
    parser.add_argument("--norm", choices=("gn", "frozen_bn"), default="gn", help="norm of the whole network (gn)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of both (float32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute the step (cpu)")
    parser.add_argument(
        "--vary", type=key_and_values, metavar="KEY:V,V", help="run gndet per value, e.g. train.memory:fast,lean"
    )
    parser.add_argument(
        "--tuned", action="store_true", help="also run torchvision keeping freed memory; on a GPU channels last"
    )
    parser.add_argument("--memory", action="store_true", help="instead, show the memory of each part of gndet's step")


def norm(parser: argparse.ArgumentParser) -> None:
    """Time group normalization with ReLU, forward and backward, against torch's and against a copy."""
    parser.add_argument("--batch", type=one_or_more, default=1, help="images at once (1)")


def loader(parser: argparse.ArgumentParser) -> None:
    """Time the input pipeline, from pictures to training samples: gndet and torchvision's v2 transforms."""
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO file (default: draw pictures)")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="pictures of that file")
    parser.add_argument("--num", type=one_or_more, default=40, help="number of drawn pictures (40)")
    parser.add_argument("--edge", type=one_or_more, default=800, help="shorter edge in pixels (800)")
    parser.add_argument("--max-edge", type=one_or_more, default=1333, help="limit of the longer edge in pixels (1333)")


def start(parser: argparse.ArgumentParser) -> None:
    """Time opening an annotation file of COCO's size, first and again: gndet, pycocotools and hotcoco."""
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO file (default: write a synthetic one)")
    parser.add_argument("--images", type=one_or_more, default=118_000, help="in the synthetic file (118000)")
    parser.add_argument("--objects", type=one_or_more, default=860_000, help="in the synthetic file (860000)")


def evaluation(parser: argparse.ArgumentParser) -> None:
    """Time COCO metrics of boxes and masks, stage by stage, from files: gndet, hotcoco and pycocotools."""
    parser.add_argument("--num", type=one_or_more, default=500, help="number of pictures (500); val2017 has 5000")
    parser.add_argument("--detections", type=one_or_more, default=100, help="per picture (100)")
    without = ("hotcoco", "pycocotools")
    parser.add_argument("--without", nargs="+", choices=without, default=(), help="leave out; pycocotools is slow")


def predict(parser: argparse.ArgumentParser) -> None:
    """Time prediction and evaluation against torchvision's model in a plain loop, with the same weights."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="gndet config, e.g. data.workers=0")
    parser.add_argument(
        "--network", choices=("r50", "quickstart"), default="r50", help="R50-FPN at 800/1333 or the quickstart's (r50)"
    )
    parser.add_argument("--boxes", action="store_true", help="without masks")
    parser.add_argument("--num", type=one_or_more, default=4, help="pictures per turn (4)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of both (float32)")


def commands(parser: argparse.ArgumentParser) -> None:
    """Time gndet's commands from their start: --help, train to its first update, predict, analyze."""
    parser.add_argument("--only", nargs="+", choices=("help", "train", "predict", "analyze"), help="some of them")
    parser.add_argument("--num", type=one_or_more, default=5000, help="pictures to analyze, of 100 detections (5000)")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout of gndet, to compare with")


def detectors(parser: argparse.ArgumentParser) -> None:
    """Time a training step and a detection of each kind of detector, beside torchvision's model of the same layers."""
    parser.add_argument(
        "--size", type=height_and_width, default=(480, 640), metavar="480x640", help="picture size (480x640)"
    )
    parser.add_argument("--batch", type=one_or_more, default=2, help="images at once (2)")
    parser.add_argument("--only", nargs="+", choices=DETECTORS, help="some of them")


def key_and_values(text: str) -> tuple[str, list[str]]:
    """Parse a config key and its values, e.g. train.memory:fast,lean."""
    key, colon, values = text.partition(":")
    if not (key and colon and all(values.split(","))):
        raise argparse.ArgumentTypeError(f"{text}: expected KEY:VALUE,VALUE, e.g. train.memory:fast,lean")
    return key, values.split(",")


NAMES = {
    "step": step, "norm": norm, "loader": loader, "start": start, "eval": evaluation, "predict": predict,
    "commands": commands, "detectors": detectors,
}  # fmt: skip


def add_all(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add a parser for each NAME to the command; return these parsers."""
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    parsers = []
    for name, add_options in NAMES.items():
        benchmark = names.add_parser(name, help=add_options.__doc__, description=add_options.__doc__)
        common(benchmark)
        add_options(benchmark)
        parsers.append(benchmark)
    return parsers
