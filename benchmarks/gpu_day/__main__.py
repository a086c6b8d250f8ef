"""The command line of `python -m benchmarks.gpu_day`.  It needs only Python's library, whatever is missing yet."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_day.day import PARTS, run_day
from benchmarks.gpu_day.notes import DATA, OUT, SECONDS, run_part
from benchmarks.gpu_day.prepare import prepare


def parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    top = argparse.ArgumentParser(prog="benchmarks.gpu_day", description="Measure what gndet claims about a GPU.")
    commands = top.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("prepare", help="fetch wheels and pack data sets for a machine without a network")
    packing.add_argument("--bccd", type=Path, metavar="FOLDER", help="data set of configs/bccd_r18_gn_scratch.yaml")
    packing.add_argument("--nuclei", type=Path, metavar="FOLDER", help="data set of configs/nuclei_r18_gn_scratch.yaml")
    packing.add_argument("--to", type=Path, default=DATA, metavar="FOLDER", help="default: .gpu in the checkout")
    packing.add_argument("--python", default="3.12", help="of the machine with the GPU (3.12)")
    day = commands.add_parser("run", help="run all parts, or those that are named")
    day.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}")
    day.add_argument(
        "--out", type=Path, default=OUT, help="folder for gpu_day.json and gpu_day.txt ($OUT or runs/gpu_day)"
    )
    day.add_argument("--data", type=Path, default=DATA, help="what `prepare` has made (.gpu)")
    day.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together ($DAY_S or 480)")
    part = commands.add_parser("part", help="run one part in this process, as `run` does")
    part.add_argument("function", help="MODULE:FUNCTION")
    part.add_argument("file", type=Path, help="where its findings go, as JSON")
    part.add_argument("seconds", type=float, help="its limit")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.  Returns 1 if a part of the day failed, else 0."""
    began = time.monotonic()
    options = parser().parse_args(arguments)
    if options.command == "prepare":
        sets = {"bccd": options.bccd, "nuclei": options.nuclei}
        return prepare(options.to, {name: folder for name, folder in sets.items() if folder}, options.python)
    if options.command == "part":
        return run_part(options.function, options.file, began + options.seconds)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return run_day(options.parts, options.out.resolve(), options.data.resolve(), options.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
