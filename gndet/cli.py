"""`gndet VERB ...`: the command line.

torch is imported inside the verb that needs it, so that --help answers at once.
"""

import argparse
import functools
import io
import os
import select
import sys
from collections.abc import Sequence

from gndet.errors import GndetError, Preempted
from gndet.files import make_room_for
from gndet.options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.  Returns its exit status, or 2 after a mistake of the user's, told without a traceback."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in data may hold what no terminal can show
    try:
        status = VERBS[options.verb](options)
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


def train(options: argparse.Namespace) -> int:
    """gndet train CONFIG [key=value ...] [--fresh]"""
    from gndet.config.loading import load_config

    cfg = load_config(options.config, options.overrides)
    from rich.console import Console

    from gndet import train as training

    training.train(cfg, fresh=options.fresh, console=Console())
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """gndet evaluate RUN_OR_CHECKPOINT [key=value ...] [--out FILE]"""
    from gndet.distributed.process import process
    from gndet.evaluation.detector import evaluate_checkpoint, load_detector
    from gndet.evaluation.evaluate import table
    from gndet.evaluation.results import save_results

    device = next((o.split("=", 1)[1] for o in options.overrides if o.startswith("device=")), "auto")
    if options.out:
        make_room_for(options.out, "--out")
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
    """gndet predict CHECKPOINT SOURCE ... --out FOLDER [--threshold T] [--classes a,b] [--save-crops] [--sheet]"""
    from gndet.distributed.process import process
    from gndet.evaluation.detector import load_detector
    from gndet.toolbox.predict import predict as prediction

    device = next((o.split("=", 1)[1] for o in options.overrides if o.startswith("device=")), "auto")
    with process(device) as proc:
        detector = load_detector(options.checkpoint, options.overrides, proc)
        prediction.predict(
            detector, options.sources, options.out, proc.device, functools.partial(print, flush=True),
            threshold=options.threshold, classes=options.classes, crops=options.save_crops, sheet=options.sheet,
            every=options.every,
        )  # fmt: skip
    return 0


def export(options: argparse.Namespace) -> int:
    """gndet export CHECKPOINT --onnx FILE [--size HxW] [--no-masks] [--opset N] [--picture FILE]; 1 on a mismatch"""
    from gndet.toolbox.onnx.export import export as run

    equal = run(
        options.checkpoint, options.onnx, options.overrides, functools.partial(print, flush=True), size=options.size,
        masks=not options.no_masks, opset=options.opset, picture=options.picture,
    )  # fmt: skip
    return 0 if equal else 1


def report(options: argparse.Namespace) -> int:
    """gndet report RUN ... [--out FILE] [key=value ...]"""
    from gndet.toolbox.report.report import report as run

    run(options.runs, options.out, options.overrides, functools.partial(print, flush=True))
    return 0


def analyze(options: argparse.Namespace) -> int:
    """gndet analyze RUN_OR_JSON [--data FILE] [--kind box|mask] [--json FILE] [--csv FOLDER] [--images N]"""
    from gndet.toolbox.analysis.analyze import analyze as run

    run(
        options.source, options.overrides, print, data=options.data, kind=options.kind, json_file=options.json,
        csv_folder=options.csv, images=options.images,
    )  # fmt: skip
    return 0


def norm_study(options: argparse.Namespace) -> int:
    """gndet norm-study CONFIG [--norms ...] [--images-per-gpu ...] [--seeds N] [--budget T]; 1 where a cell failed"""
    from gndet.toolbox.norm_study.study import study

    passed = study(
        options.config, options.overrides, functools.partial(print, flush=True), norms=options.norms,
        groups=options.groups, images_per_gpu=options.images_per_gpu, seeds=options.seeds, budget=options.budget,
        batch=options.batch, jobs=options.jobs, out=options.out,
    )  # fmt: skip
    return 0 if passed else 1


def doctor(options: argparse.Namespace) -> int:
    """gndet doctor [--config FILE] [--json FILE] [key=value ...]; 1 where something will not work"""
    from gndet.toolbox.doctor.doctor import doctor as run

    healthy = run(functools.partial(print, flush=True), options.config, options.overrides, options.json)
    return 0 if healthy else 1


def invariance(options: argparse.Namespace) -> int:
    """gndet invariance CONFIG [key=value ...] [--images N] [--out FILE]; 1 where images do depend on each other"""
    from gndet.config.loading import load_config

    cfg = load_config(options.config, options.overrides)
    from gndet.distributed.process import process
    from gndet.toolbox.invariance.invariance import check_invariance, to_json

    if options.out:
        make_room_for(options.out, "--out")
    with process(cfg.device) as proc:
        report = check_invariance(cfg, options.images, proc, functools.partial(print, flush=True))
    if options.out:
        options.out.write_text(to_json(report), encoding="utf-8")
    return 0 if report.passed else 1


def convert(options: argparse.Namespace) -> int:
    """gndet convert SOURCE OUT [--to gn|TOOLKIT] [--policy P] [--images ...] [key=value ...]"""
    from gndet.toolbox.convert import convert as run

    run(
        options.source, options.out, options.overrides, print, to=options.to, policy=options.policy,
        channels_per_group=options.channels_per_group, damp=options.damp, pictures=options.images, count=options.count,
    )  # fmt: skip
    return 0


def norms(options: argparse.Namespace) -> int:
    """gndet norms CONFIG_OR_CHECKPOINT [key=value ...]; 1 where the norms cannot work"""
    from gndet.toolbox.norms import audit_path

    return 0 if audit_path(options.config, options.overrides, print) else 1


def check(options: argparse.Namespace) -> int:
    """gndet check CONFIG_OR_JSON [key=value ...] [--images] [--sheet FILE] [--json FILE]; 1 where data is refused"""
    from rich.console import Console

    from gndet.toolbox.check.check import check as run

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
    from gndet.config.loading import config_to_yaml, load_config

    print(config_to_yaml(load_config(options.config, options.overrides)), end="")
    return 0


VERBS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "report": report,
    "analyze": analyze,
    "norm-study": norm_study,
    "doctor": doctor,
    "invariance": invariance,
    "convert": convert,
    "norms": norms,
    "check": check,
    "selftest": selftest,
    "benchmark": benchmark,
    "config": config,
}


if __name__ == "__main__":
    raise SystemExit(main())
