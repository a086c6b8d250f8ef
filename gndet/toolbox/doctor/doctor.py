"""`gndet doctor`: whether gndet works on a machine, as a text to paste into an issue.

What needs torch runs in a process of its own (`inside`): a package that cannot be imported, or that ends the process,
is told as what it is.  No name of an account and no home folder is shown.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any, BinaryIO

import gndet
from gndet.config.loading import load_config
from gndet.errors import OutputError
from gndet.files import write_whole
from gndet.toolbox.doctor import machine
from gndet.toolbox.doctor.facts import Fact, health_verdict, line, without_names

# without this folder in the path, whose files may have the names of packages; with that of gndet, installed or not
START = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module('gndet.toolbox.doctor.inside', run_name='__main__')"
)
PATIENCE = 180.0  # seconds without a word until what is being tried counts as hanging

Show = Callable[[str], None]


def doctor(show: Show, config: str | None, overrides: Sequence[str], json_file: Path | None) -> bool:
    """Say what this machine has, try what gndet stands on, and end with a verdict in a line.

    config: YAML file whose data is loaded and whose run folder is looked at; None: drawn pictures, and this folder.
    json_file: for the same, as JSON.  Returns whether all works; a warning does not count.
    Raises ConfigError and OutputError before anything is tried.
    """
    cfg = load_config(config, overrides) if config else None
    if json_file is not None:
        refuse_output(json_file)
    sections: list[dict[str, Any]] = []
    facts: list[Fact] = []
    for found in examine(None if cfg is None else [str(config), *overrides]):
        if isinstance(found, str):
            sections.append({"title": found, "facts": []})
            show(found if len(sections) == 1 else f"\n{found}")
            continue
        fact = found._replace(text=without_names(found.text))
        facts.append(fact)
        sections[-1]["facts"].append(fact._asdict())
        show(line(fact))
    healthy, words = all(fact.mark != "wrong" for fact in facts), health_verdict(facts)
    if json_file is not None:
        report = {"healthy": healthy, "verdict": words, "sections": sections}
        write_whole(json_file, json.dumps(report, indent=1) + "\n")
    show(f"\n{words}")
    return healthy


def examine(arguments: Sequence[str] | None) -> Iterator[str | Fact]:
    """Yield the titles of sections and the facts.  arguments: config file and overrides."""
    yield "gndet doctor"
    yield from (fact for fact in machine.facts(None) if isinstance(fact, Fact))
    with tempfile.TemporaryFile() as told:
        command = [sys.executable, "-P", "-c", START, str(Path(gndet.__file__).parent.parent), *(arguments or ())]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told) as process:
            try:
                yield from follow(process, told)
            finally:
                process.kill()


def follow(process: subprocess.Popen, told: BinaryIO) -> Iterator[str | Fact]:
    """Yield what the process says, then how it ended if that is not how it should.  told: its stderr."""
    title = trying = "starting Python"
    hanging: list[bool] = []

    def give_up() -> None:
        hanging.append(True)
        process.kill()

    while True:
        timer = Timer(PATIENCE, give_up)
        timer.start()
        text = process.stdout.readline()
        timer.cancel()
        if not text:
            break
        try:
            said = json.loads(text)
        except ValueError:  # what a library prints by itself
            continue
        if "title" in said:
            title = trying = said["title"]
            yield title
        elif "trying" in said:
            trying = said["trying"]
        else:
            yield Fact(**said)
    status = process.wait()
    if hanging:
        yield Fact(title, f"{trying}: nothing came of it in {PATIENCE:.0f} s", "wrong")
    elif status:
        told.seek(0)
        lines = told.read().decode(errors="replace").strip().splitlines()
        words = f": {lines[-1]}" if lines and status > 0 else ""
        how = f"status {status}" if status > 0 else f"signal {-status} ({signal.strsignal(-status)})"
        yield Fact(title, f"{trying} ended the process with {how}{words}; what follows was not tried", "wrong")


def refuse_output(file: Path) -> None:
    """Raise OutputError where the report cannot be written, or is not to be: over another file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and not _is_report(file):
            raise OutputError(
                f"{file}: is there and is no report of gndet doctor; it is not written over, choose another"
            )
    except OSError as error:
        raise OutputError(f"--json {file}: cannot write there: {error.strerror}") from None
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise OutputError(f"--json {file}: cannot be written, expected the name of a file in a folder that can")


def _is_report(file: Path) -> bool:
    """Whether a file begins as `doctor` writes it, or is empty."""
    with file.open("rb") as opened:
        head = opened.read(20)
    return not head or head.startswith(b'{\n "healthy"')
