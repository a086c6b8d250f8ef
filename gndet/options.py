"""The verbs of the command line and their arguments.  Without torch, so that --help answers at once."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from gndet import __version__
from gndet.benchmark import options as benchmarks
from gndet.benchmark.options import height_and_width

OVERRIDES = "dotted config keys, like train.global_batch=8 or model.norm.kind=bn"
Verbs = argparse._SubParsersAction


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `key=value` overrides may stand anywhere (a picture of such a name is ./key=value)."""
    is_override = [re.match(r"[a-z_][a-z0-9_.]*=", word) is not None for word in arguments]
    top = parser()
    options = top.parse_args([w for w, o in zip(arguments, is_override, strict=True) if not o])
    if getattr(options, "overrides", None):
        top.error(f"{' '.join(options.overrides)}: expected key=value, like train.global_batch=8")
    options.overrides = [w for w, o in zip(arguments, is_override, strict=True) if o]
    return options


def parser() -> argparse.ArgumentParser:
    """The verbs and their arguments."""
    top = argparse.ArgumentParser(prog="gndet", description="Object-detection training around Group Normalization.")
    top.add_argument("--version", action="version", version=__version__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_learn_and_use, _understand, _examine, _try_out):
        add(verbs)
    return top


def _learn_and_use(verbs: Verbs) -> None:
    """Train a detector, evaluate it, use it."""
    verb = verbs.add_parser("train", help="train a detector, or go on with an unfinished run")
    verb.add_argument("config", help="YAML file, like configs/quickstart.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    verb.add_argument("--fresh", action="store_true", help="move a run that is in the folder aside and start anew")

    verb = verbs.add_parser("evaluate", help="COCO metrics of a checkpoint")
    verb.add_argument("checkpoint", type=Path, help="run folder (its best checkpoint) or checkpoint folder")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    verb.add_argument("--out", type=Path, help="write the detections here, JSON in COCO's results format")

    verb = verbs.add_parser("predict", help="draw detections on pictures and videos")
    verb.add_argument("checkpoint", type=Path, help="run folder (its best checkpoint) or checkpoint folder")
    verb.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="pictures, folders, patterns like 'a/**/*.jpg', videos"
    )
    verb.add_argument("--out", type=Path, required=True, help="folder for the pictures and predictions.json")
    verb.add_argument("--threshold", type=_fraction, default=0.5, help="score from which one is drawn (0.5)")
    verb.add_argument("--classes", type=_names, help="these classes only, by name: --classes cat,dog")
    verb.add_argument("--save-crops", action="store_true", help="a picture of each object drawn, in OUT/crops/CLASS")
    verb.add_argument("--sheet", action="store_true", help="the first pictures together, in OUT/sheet.png")
    verb.add_argument("--every", type=_one_or_more, default=1, metavar="N", help="of a video, each Nth frame (1)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    verb = verbs.add_parser("export", help="a detector as an ONNX file, compared with torch on a picture")
    verb.add_argument("checkpoint", type=Path, help="run folder (its best checkpoint) or checkpoint folder")
    verb.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="file to write")
    verb.add_argument(
        "--size", type=height_and_width, metavar="480x640", help="height and width for ever; any size without it"
    )
    verb.add_argument("--no-masks", action="store_true", help="boxes only, of a detector with masks")
    verb.add_argument("--opset", type=_one_or_more, default=17, help="of ONNX, 17 to 20 (17)")
    verb.add_argument("--picture", type=Path, help="picture to compare on (one of data.val)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _understand(verbs: Verbs) -> None:
    """See what a run, a norm or a machine does."""
    verb = verbs.add_parser("report", help="a page of what a run saw, learned and gets wrong; several runs compared")
    verb.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or the folder of a norm study")
    verb.add_argument("--out", type=Path, help="file to write (RUN/report.html)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="like data.root=PATH where the data has moved")

    verb = verbs.add_parser("analyze", help="what a detector gets wrong, and what mending each kind would give")
    verb.add_argument("source", type=Path, help="run folder, or detections of any toolkit in COCO's results format")
    verb.add_argument("--data", metavar="FILE", help="of a results file: COCO annotations, or a config with data.val")
    verb.add_argument("--kind", choices=("box", "mask"), help="what is compared (masks where there are any)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write all of it here")
    verb.add_argument("--csv", type=Path, metavar="FOLDER", help="write the tables here, a file each")
    verb.add_argument("--images", type=_one_or_more, default=50, metavar="N", help="worst images that are listed (50)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    verb = verbs.add_parser("norm-study", help="AP against images per GPU, for several norms, on your data")
    verb.add_argument("config", help="YAML file, like configs/quickstart.yaml")
    verb.add_argument(
        "--norms", type=_names, default=("gn", "bn"), help="kinds to compare: gn,bn,frozen_bn,... (gn,bn)"
    )
    verb.add_argument("--groups", type=_names, help="group counts of gn instead: 1,2,4,8,16,32,channels (LN to IN)")
    verb.add_argument("--images-per-gpu", type=_numbers, default=(1, 2, 4, 8), metavar="1,2,4,8", help="(1,2,4,8)")
    verb.add_argument("--seeds", type=_one_or_more, default=3, help="runs of each cell (3)")
    verb.add_argument(
        "--budget", type=_duration, metavar="2h", help="shorten the schedule so that all ends in this time"
    )
    verb.add_argument(
        "--batch", choices=("scaled", "fixed"), default="scaled",
        help="images an update: images per GPU x processes, as in the paper, or the config's in every cell",
    )  # fmt: skip
    verb.add_argument("--jobs", type=_one_or_more, help="runs at once (one a GPU; on a CPU one)")
    verb.add_argument("--out", type=Path, help="folder of the study (runs/norm-study-CONFIG); given again, it goes on")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    verb = verbs.add_parser("doctor", help="versions, devices, kernels, loader speed, disk: to paste into an issue")
    verb.add_argument("--config", help="YAML file: measure with its data, check its run folder's disk")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write it here too")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _examine(verbs: Verbs) -> None:
    """Examine images, weights, norms and data."""
    verb = verbs.add_parser("invariance", help="show that an image trains the same whatever stands beside it")
    verb.add_argument("config", help="YAML file: its training images, its model")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    verb.add_argument("--images", type=int, default=4, help="how many training images are compared, 4 to 16 (4)")
    verb.add_argument("--out", type=Path, help="write the report here, JSON")

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
    verb.add_argument("--channels-per-group", type=_one_or_more, default=16, help="of the GN layers (16)")
    verb.add_argument("--damp", type=_zero_or_more, default=1.0, help="train.norm_damp (1)")
    verb.add_argument("--images", type=Path, nargs="+", default=[], help="pictures or folders to fit and measure on")
    verb.add_argument("--count", type=_one_or_more, default=32, help="how many of the pictures calibrate fits on (32)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="train.source.* or model.*, as in a config")

    verb = verbs.add_parser("norms", help="the norm layers of a config or checkpoint, and what is wrong with them")
    verb.add_argument("config", help="YAML file, or a run or checkpoint folder")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    verb = verbs.add_parser("check", help="what is wrong with a data set, before it is trained on")
    verb.add_argument("source", help="YAML file: its data.train and data.val; or an annotation file, COCO's JSON")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    verb.add_argument("--images", action="store_true", help="decode every picture too")
    verb.add_argument("--image-folder", type=Path, help="pictures of a JSON file (looked for beside it)")
    verb.add_argument("--sheet", type=Path, help="draw images with boxes and masks into this file (.png)")
    verb.add_argument("--json", type=Path, help="write the report here, JSON")


def _try_out(verbs: Verbs) -> None:
    """Try the promises and the speed, print a config."""
    verb = verbs.add_parser("selftest", help="break a tiny run in every way it must survive: signals, kills, full disk")
    verb.add_argument("numbers", nargs="*", metavar="T8", help="scenarios to run (a selection of 2 minutes)")
    verb.add_argument("--all", action="store_true", help="run all of them, which takes eight minutes")
    verb.add_argument("--keep", type=Path, metavar="FOLDER", help="work here, and leave everything there")

    verb = verbs.add_parser("benchmark", help="speed and memory beside other libraries, on the same work in turn")
    benchmarks.add_all(verb)

    verb = verbs.add_parser("config", help="print the resolved config")
    verb.add_argument("config", help="YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def _one_or_more(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more")
    return int(text)


def _zero_or_more(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more")
    return float(text)


def _fraction(text: str) -> float:
    value = _zero_or_more(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names with commas between them, like cat,dog")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_one_or_more(number) for number in text.split(","))


def _duration(text: str) -> float:
    """Seconds of 90s, 30m, 2h or 1.5h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a time like 90s, 30m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
