"""`gndet VERB ...`: the command line.

torch is imported inside the verb that needs it, so that --help answers at once.
"""

import argparse
import functools
import io
import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from gndet import __version__
from gndet.benchmark import options as benchmarks
from gndet.errors import GndetError, Preempted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.  Returns its exit status, or 2 after a mistake of the user's, told without a traceback."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in data may hold what no terminal can show
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _is_nobody_reading():
            raise  # another pipe
        return 141  # as a shell tells it: 128 + SIGPIPE
    except Preempted as end:
        if str(end):  # one process of a run tells it
            print(f"gndet {options.verb}: {end}", file=sys.stderr)
        return end.status
    except GndetError as error:
        print(f"gndet {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gndet {options.verb}: interrupted", file=sys.stderr)
        return 130


def _is_nobody_reading() -> bool:
    """Whether what stdout leads to has been closed, as by `| head -1`; the rest is then thrown away."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at its end
    return True


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
    overrides = "dotted config keys, like train.global_batch=8 or model.norm.kind=bn"

    verb = verbs.add_parser("train", help="train a detector, or go on with an unfinished run")
    verb.add_argument("config", help="YAML file, like configs/quickstart.yaml")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.add_argument("--fresh", action="store_true", help="move a run that is in the folder aside and start anew")
    verb.set_defaults(run=train)

    verb = verbs.add_parser("evaluate", help="COCO metrics of a checkpoint")
    verb.add_argument("checkpoint", type=Path, help="run folder (its best checkpoint) or checkpoint folder")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.add_argument("--out", type=Path, help="write the detections here, JSON in COCO's results format")
    verb.set_defaults(run=evaluate)

    verb = verbs.add_parser("predict", help="draw detections on pictures")
    verb.add_argument("checkpoint", type=Path, help="run folder (its best checkpoint) or checkpoint folder")
    verb.add_argument("pictures", type=Path, nargs="+", help="picture files or folders of them")
    verb.add_argument("--out", type=Path, required=True, help="folder for the pictures and predictions.json")
    verb.add_argument("--threshold", type=float, default=0.5, help="score from which one is drawn (0.5)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.set_defaults(run=predict)

    verb = verbs.add_parser("invariance", help="show that an image trains the same whatever stands beside it")
    verb.add_argument("config", help="YAML file: its training images, its model")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.add_argument("--images", type=int, default=4, help="how many training images are compared, 4 to 16 (4)")
    verb.add_argument("--out", type=Path, help="write the report here, JSON")
    verb.set_defaults(run=invariance)

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
    verb.set_defaults(run=convert)

    verb = verbs.add_parser("norms", help="the norm layers of a config or checkpoint, and what is wrong with them")
    verb.add_argument("config", help="YAML file, or a run or checkpoint folder")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.set_defaults(run=norms)

    verb = verbs.add_parser("check", help="what is wrong with a data set, before it is trained on")
    verb.add_argument("source", help="YAML file: its data.train and data.val; or an annotation file, COCO's JSON")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.add_argument("--images", action="store_true", help="decode every picture too")
    verb.add_argument("--image-folder", type=Path, help="pictures of a JSON file (looked for beside it)")
    verb.add_argument("--sheet", type=Path, help="draw images with boxes and masks into this file (.png)")
    verb.add_argument("--json", type=Path, help="write the report here, JSON")
    verb.set_defaults(run=check)

    verb = verbs.add_parser("selftest", help="break a tiny run in every way it must survive: signals, kills, full disk")
    verb.add_argument("numbers", nargs="*", metavar="T8", help="scenarios to run (a selection of 2 minutes)")
    verb.add_argument("--all", action="store_true", help="run all of them, which takes eight minutes")
    verb.add_argument("--keep", type=Path, metavar="FOLDER", help="work here, and leave everything there")
    verb.set_defaults(run=selftest)

    verb = verbs.add_parser("benchmark", help="speed and memory beside other libraries, on the same work in turn")
    for one in benchmarks.add_all(verb):
        one.set_defaults(run=benchmark)

    verb = verbs.add_parser("config", help="print the resolved config")
    verb.add_argument("config", help="YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    verb.set_defaults(run=config)
    return top


def _one_or_more(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more")
    return int(text)


def _zero_or_more(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more")
    return float(text)


def train(options: argparse.Namespace) -> int:
    """gndet train CONFIG [key=value ...] [--fresh]"""
    from gndet.config_file import load_config

    cfg = load_config(options.config, options.overrides)
    from rich.console import Console

    from gndet import train as training

    training.train(cfg, fresh=options.fresh, console=Console())
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """gndet evaluate RUN_OR_CHECKPOINT [key=value ...] [--out FILE]"""
    from gndet.distributed import process
    from gndet.evaluation import table
    from gndet.inference import evaluate_checkpoint, load_detector, make_room_for
    from gndet.results import save_results

    device = next((o.split("=", 1)[1] for o in options.overrides if o.startswith("device=")), "auto")
    if options.out:
        make_room_for(options.out)
    with process(device) as proc:
        detector = load_detector(options.checkpoint, options.overrides, proc)
        dataset, evaluation = evaluate_checkpoint(detector, proc)
        if proc.first:
            print(f"{options.checkpoint} on {dataset.name}: {len(dataset.records)} images")
            print(table(evaluation))
            if options.out:
                save_results(options.out, evaluation.results)
                print(f"{len(evaluation.results)} detections -> {options.out}")
    return 0


def predict(options: argparse.Namespace) -> int:
    """gndet predict CHECKPOINT PICTURE_OR_FOLDER ... --out FOLDER"""
    from gndet import inference
    from gndet.distributed import process

    device = next((o.split("=", 1)[1] for o in options.overrides if o.startswith("device=")), "auto")
    with process(device) as proc:
        detector = inference.load_detector(options.checkpoint, options.overrides, proc)
        inference.predict(detector, options.pictures, options.out, options.threshold, proc.device, print)
    return 0


def invariance(options: argparse.Namespace) -> int:
    """gndet invariance CONFIG [key=value ...] [--images N] [--out FILE]; 1 where images do depend on each other"""
    from gndet.config_file import load_config

    cfg = load_config(options.config, options.overrides)
    from gndet.distributed import process
    from gndet.inference import make_room_for
    from gndet.invariance import check_invariance, to_json

    if options.out:
        make_room_for(options.out)
    with process(cfg.device) as proc:
        report = check_invariance(cfg, options.images, proc, functools.partial(print, flush=True))
    if options.out:
        options.out.write_text(to_json(report), encoding="utf-8")
    return 0 if report.passed else 1


def convert(options: argparse.Namespace) -> int:
    """gndet convert SOURCE OUT [--to gn|TOOLKIT] [--policy P] [--images ...] [key=value ...]"""
    from gndet.conversion import convert as run

    run(
        options.source, options.out, options.overrides, print, to=options.to, policy=options.policy,
        channels_per_group=options.channels_per_group, damp=options.damp, pictures=options.images, count=options.count,
    )  # fmt: skip
    return 0


def norms(options: argparse.Namespace) -> int:
    """gndet norms CONFIG_OR_CHECKPOINT [key=value ...]; 1 where the norms cannot work"""
    from gndet.audit import audit_path

    return 0 if audit_path(options.config, options.overrides, print) else 1


def check(options: argparse.Namespace) -> int:
    """gndet check CONFIG_OR_JSON [key=value ...] [--images] [--sheet FILE] [--json FILE]; 1 where data is refused"""
    from rich.console import Console

    from gndet.check import check as run

    passed = run(
        options.source, options.overrides, functools.partial(print, flush=True), image_folder=options.image_folder,
        images=options.images, sheet=options.sheet, out=options.json, console=Console(),
    )  # fmt: skip
    return 0 if passed else 1


def selftest(options: argparse.Namespace) -> int:
    """gndet selftest [T8 ...] [--all] [--keep FOLDER]; 1 where a promise is not kept"""
    from gndet.selftest.scenarios import chosen, run_scenarios

    scenarios = chosen(options.numbers, options.all)
    return 0 if run_scenarios(scenarios, options.keep, functools.partial(print, flush=True)) else 1


def benchmark(options: argparse.Namespace) -> int:
    """gndet benchmark step|norm|loader|start|eval [--rounds N] [--threads N] [its own options]"""
    if options.benchmark == "step":
        from gndet.benchmark.step import run
    elif options.benchmark == "norm":
        from gndet.benchmark.norm import run
    elif options.benchmark == "loader":
        from gndet.benchmark.loader import run
    elif options.benchmark == "start":
        from gndet.benchmark.start import run
    else:
        from gndet.benchmark.evaluation import run

    run(options, functools.partial(print, flush=True))
    return 0


def config(options: argparse.Namespace) -> int:
    """gndet config CONFIG [key=value ...]"""
    from gndet.config_file import config_to_yaml, load_config

    print(config_to_yaml(load_config(options.config, options.overrides)), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
