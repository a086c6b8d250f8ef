"""`gndet VERB ...`: the command line.

Each verb is a file in this folder: `add` defines its arguments, `run` runs it.  torch is imported only inside the verbs
that need it, so --help answers at once.
"""

import argparse
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from gndet import __version__
from gndet.cli import analyze, check, config, convert, convert_data, doctor, evaluate, export

# isort: split
from gndet.cli import invariance, norm_study, norms, predict, report, train
from gndet.cli.limits import limit_reached
from gndet.cli.terminal import escaped_output
from gndet.distributed.children import safe_children
from gndet.errors import GndetError, OutputError, Preempted

FILES = (
    train, evaluate, predict, export, report, analyze, norm_study, doctor, invariance, convert, norms, check,
    convert_data, config,
)  # fmt: skip
VERBS = {file.__name__.rpartition(".")[2].replace("_", "-"): file for file in FILES}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.  Returns its exit status; a user error prints its message without a traceback and returns 2."""
    open_closed_streams()
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
    words = ""
    try:
        _require_current_folder()
        status = run()
        sys.stdout.flush()
    except Preempted as end:
        status, words = end.status, str(end)  # only rank 0 has a message
    except GndetError as error:
        status, words = 2, str(error)
    except KeyboardInterrupt:
        status, words = 130, "interrupted"
    except Exception as error:
        status, words = _machine_error(command.rpartition(" ")[2], error)
    if words:
        with suppress(OSError):
            print(f"{command}: {words}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # Python flushes them when it exits, and would change the status
        with suppress(ValueError):
            if _is_unwritable(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def open_closed_streams() -> None:
    """Open standard streams that the caller closed, as `>&-` does: otherwise a file of gndet would get their numbers.

    What a library writes to number 2 would go into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w", closefd=False)))


def _require_current_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise OutputError("the current folder was removed; change to one that exists") from None


def _machine_error(verb: str, error: Exception) -> tuple[int, str]:
    """Return the exit status and the message of an error for which no part of gndet has better words.

    Raises the error if neither a user, a disk nor a limit of the machine can cause it.
    """
    if words := limit_reached(verb, error):
        return 2, words
    if not isinstance(error, OSError | RecursionError):
        raise error
    if isinstance(error, BrokenPipeError) and _is_reader_gone():
        return 141, ""  # what a shell reports: 128 + SIGPIPE
    if isinstance(error, OSError) and error.filename is None and _is_unwritable(sys.stdout, "\n"):
        return 2, f"cannot write to the standard output: {error.strerror or error}; give it another place"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if "gndet" in Path(frame.filename).parts), frames[-1])
    where = f"(in {place.name}, {Path(place.filename).name}:{place.lineno})"
    if isinstance(error, OSError):
        if error.filename is not None:
            return 2, f"{error.filename}: {error.strerror}; mend this file or folder, or choose another {where}"
        return 2, f"{error.strerror or error}; gndet doctor checks this machine {where}"
    return 2, f"a file is nested too deeply {where}"


def _is_unwritable(stream: TextIO, text: str = "") -> bool:
    """Return whether a stream cannot take a text and what was printed to it before."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        return True
    return False


def _is_reader_gone() -> bool:
    """Return whether the reader of stdout has gone, as `| head -1` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports errors without being asked
    return bool(poll.poll(0))
