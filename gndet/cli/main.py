"""`gndet VERB ...`: the command line.

Each verb is a file in this folder: `add` defines its arguments, `run` runs it.  torch is imported only inside the verbs
that need it, so --help answers at once.
"""

import argparse
import os
import re
import select
import sys
from collections.abc import Callable, Sequence

from gndet import __version__
from gndet.cli import analyze, check, config, convert, convert_data, doctor, evaluate, export

# isort: split
from gndet.cli import invariance, norm_study, norms, predict, report, train
from gndet.cli.terminal import escaped_output
from gndet.distributed.children import safe_children
from gndet.errors import GndetError, Preempted

FILES = (
    train, evaluate, predict, export, report, analyze, norm_study, doctor, invariance, convert, norms, check,
    convert_data, config,
)  # fmt: skip
VERBS = {file.__name__.rpartition(".")[2].replace("_", "-"): file for file in FILES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.  Returns its exit status; a user error prints its message without a traceback and returns 2."""
    with escaped_output(), safe_children():
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return exit_status(f"gndet {options.verb}", lambda: VERBS[options.verb].run(options))


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs and their arguments."""
    top = argparse.ArgumentParser(prog="gndet", description="Object-detection training around Group Normalization.")
    top.add_argument("--version", action="version", version=__version__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS.values():
        verb.add(verbs)
    return top


def parse(arguments: Sequence[str], top: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse a command line; `key=value` overrides may appear anywhere (write ./key=value for a file of that name).

    top: the parser (default: the parser of all verbs).
    """
    top = top or parser()
    overrides = [word for word in arguments if re.match(r"[a-z_][a-z0-9_.]*=", word)]
    options = top.parse_args([word for word in arguments if word not in overrides])
    if getattr(options, "overrides", None):
        top.error(f"{' '.join(options.overrides)}: expected key=value, like train.global_batch=8")
    options.overrides = overrides
    return options


def exit_status(command: str, run: Callable[[], int]) -> int:
    """Run a command.  Returns its exit status; a user error prints its message without a traceback and returns 2."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _is_reader_gone():
            raise  # a pipe other than stdout
        return 141  # what a shell reports: 128 + SIGPIPE
    except Preempted as end:
        if str(end):  # only rank 0 has a message
            print(f"{command}: {end}", file=sys.stderr)
        return end.status
    except GndetError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130


def _is_reader_gone() -> bool:
    """Return whether the reader of stdout has gone, as `| head -1` does; if so, discard further output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports errors without being asked
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it exits
    return True
