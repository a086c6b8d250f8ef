"""`python -m benchmarks NAME [--rounds N] [--threads N] [its own options]`; --help lists the names."""

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence

from benchmarks.options import add_all
from gndet.cli.main import exit_status, parse

MODULES = {
    "step": "step", "norm": "norm", "loader": "loader", "start": "start", "eval": "evaluation", "predict": "predicting",
    "commands": "commands", "detectors": "detectors",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark.  Returns its exit status, or 2 after a user error, which is shown without a traceback."""
    top = argparse.ArgumentParser(
        prog="benchmarks", description="Compare speed and memory with other libraries on the same work."
    )
    add_all(top)
    options = parse(sys.argv[1:] if arguments is None else arguments, top)

    def run() -> int:
        module = importlib.import_module(f"benchmarks.{MODULES[options.benchmark]}")  # torch is imported here
        module.run(options, functools.partial(print, flush=True))
        return 0

    return exit_status(f"benchmarks {options.benchmark}", run)


if __name__ == "__main__":  # the timed processes import this file again
    raise SystemExit(main())
