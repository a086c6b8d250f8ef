"""`gndet doctor`: report whether gndet works on this machine, as text to paste into an issue.

Everything that needs torch runs in a child process (`inside`), so a package that cannot be imported or that crashes
the process is reported like any other fact.  The report shows neither account names nor the home folder.
"""

import itertools
import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gndet.config.loading import load_config, named_paths
from gndet.distributed.children import python_command
from gndet.errors import ConfigError
from gndet.files import refuse_output, report_kind, write_whole
from gndet.toolbox.doctor import machine
from gndet.toolbox.doctor.facts import Fact, health_verdict, line, without_names
from gndet.toolbox.doctor.inside import PATIENCE

Show = Callable[[str], None]


def doctor(show: Show, config: str | None, overrides: Sequence[str], json_file: Path | None) -> bool:
    """Describe this machine, try everything that gndet depends on, and end with a one-line verdict.

    config: YAML file that names the data to load and the run folder to examine; None: drawn pictures and the current
    folder.  json_file: where to write the report as JSON.  Returns whether everything works; warnings do not count.
    Raises ConfigError or OutputError before it tries anything.
    """
    if overrides and config is None:
        raise ConfigError(f"override {overrides[0]!r}: has no effect without --config FILE")
    data = named_paths(load_config(config, overrides).data) if config is not None else []
    if json_file is not None:
        refuse_output(json_file, "--json", report_kind("doctor"), data)
    sections: dict[str, list[Fact]] = {}
    for found in examine([config, *overrides] if config else []):
        if isinstance(found, str):
            show(f"\n{found}" if sections else found)
            section = sections[found] = []
        else:
            section.append(found._replace(text=without_names(found.text)))
            show(line(section[-1]))
    facts = list(itertools.chain.from_iterable(sections.values()))
    healthy, words = all(fact.mark != "wrong" for fact in facts), health_verdict(facts)
    if json_file is not None:
        parts = [{"title": title, "facts": [fact._asdict() for fact in section]} for title, section in sections.items()]
        report = {"gndet": "doctor", "healthy": healthy, "verdict": words, "sections": parts}
        write_whole(json_file, json.dumps(report, indent=1) + "\n")
    show(f"\n{words}")
    return healthy


def examine(arguments: Sequence[str]) -> Iterator[str | Fact]:
    """Yield section titles (str) and facts.  arguments: config file and overrides, if any."""
    yield "gndet doctor"
    yield from machine.facts()
    command = python_command("gndet.toolbox.doctor.inside", *arguments)
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as child:
        try:
            yield from follow(child, stderr)
        finally:
            child.kill()


def follow(process: subprocess.Popen, stderr: BinaryIO) -> Iterator[str | Fact]:
    """Yield the titles and facts that the process prints, then how it failed, if it did.  stderr: its output file."""
    title = trying = "starting Python"
    for text in process.stdout or ():
        try:
            row = json.loads(text)
        except ValueError:  # printed by a library
            continue
        if "title" in row:
            title = trying = row["title"]
            yield title
        elif "trying" in row:
            trying = row["trying"]
        else:
            yield Fact(**row)
    status = process.wait()
    if status == -signal.SIGALRM:
        yield Fact(title, f"{trying} did not finish within {PATIENCE} s", "wrong")
    elif status:
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").strip().splitlines()
        words = f": {lines[-1]}" if lines and status > 0 else ""
        how = f"status {status}" if status > 0 else f"signal {-status} ({signal.strsignal(-status)})"
        yield Fact(title, f"{trying} ended the process with {how}{words}; the rest was not tried", "wrong")
