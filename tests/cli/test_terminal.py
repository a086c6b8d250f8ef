"""No text from data, checkpoints, files or arguments steers the terminal; rich's own escape sequences still draw."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

from gndet.cli import main as cli
from gndet.cli.console import EscapingConsole
from gndet.cli.terminal import EscapingStream, escaped_output
from gndet.text import escaped

STEERING = [
    *range(9),
    *range(0xB, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0xD800,
    0xDFFF,
]
HOSTILE = "".join(map(chr, STEERING)) + "\x1b[31m\x1b]52;c;cm0gLXJm\x07\x9b31m\x1b]8;;http://a.b\x1b\\"
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what rich draws with


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steers(text: str) -> bool:
    return any(ord(letter) in STEERING or "\ud800" <= letter <= "\udfff" for letter in text)


def test_what_steers_a_terminal_is_escaped_and_all_else_stays() -> None:
    assert not steers(escaped(HOSTILE)) and escaped("\x1b\x9b\u202e\ud83d\r") == r"\x1b\x9b\u202e\ud83d\r"
    codes = [*range(0x10000), *range(0x10000, 0x110000, 257)]
    others = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000 and code not in STEERING)
    assert escaped(others) == others and "\n" in others and "\t" in others


def test_both_streams_escape_while_a_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with escaped_output():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE, "\n"])
        assert sys.stdout.encoding == before[0].encoding and not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == f"{escaped(HOSTILE)}\n" * 2 and err == f"{escaped(HOSTILE)}\n" and not steers(out + err)


def test_streams_that_were_closed_before_the_start_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with escaped_output():
        print("nowhere")
        assert sys.stdout is None and sys.stderr is None


def test_an_error_of_gndets_own_ends_with_status_1_and_an_escaped_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> int:
        raise RuntimeError(HOSTILE)

    monkeypatch.setitem(cli.VERBS, "doctor", SimpleNamespace(run=run, add=cli.VERBS["doctor"].add))
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" in err and escaped(HOSTILE) in err and not steers(err)


@pytest.mark.parametrize("live", [False, True])
def test_a_console_draws_with_escapes_of_its_own_and_shows_those_of_texts(
    live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with escaped_output():
        assert isinstance(sys.stdout, EscapingStream)
        console = EscapingConsole()
        progress = Progress(console=console)
        progress.add_task(HOSTILE, total=2)
        with Live(progress, console=console, auto_refresh=False) if live else progress:
            console.print(HOSTILE, markup=False, highlight=False, soft_wrap=True)
            console.print(Text(HOSTILE))
            print(HOSTILE)
            print(HOSTILE, file=sys.stderr)  # rich shows it above what it draws
    shown = terminal.getvalue()
    assert CODES.search(shown) and r"\x1b" in shown
    left = CODES.sub("", shown).replace("\r", "")
    assert not [letter for letter in left if steers(letter)], ascii(left)


def run(*words: str | bytes, folder: Path) -> str:
    """Run gndet in a process of its own; it must end with a status of its own and show no traceback."""
    command = [sys.executable, "-m", "gndet.cli", *words]
    done = subprocess.run(command, capture_output=True, cwd=folder)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode in (0, 1, 2) and "Traceback" not in text and not steers(text), ascii(text)
    return text


def test_arguments_and_names_in_data_are_shown_escaped(tmp_path: Path) -> None:
    name = "\x1b]52;c;cm0gLXJm\x07\x9b\u202e"
    assert r"\x1b]52" in run(name, folder=tmp_path)
    for words in (
        ["config", name],
        ["config", "quickstart", f"out={name}"],
        ["predict", name, name, "--out", "x", name],
    ):
        run(*words, folder=tmp_path)
    run("config", b"out=\xff", folder=tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    tree = {
        "images": [{"id": 1, "file_name": "1.png", "width": 20, "height": 20}, {"id": 2, "file_name": name}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81, name: 1}],
        "categories": [{"id": 1, "name": name, "supercategory": name}],
    }
    (tmp_path / os.fsdecode(b"\xff.json")).write_text(json.dumps(tree))
    assert r"\x1b]52" in run("check", b"\xff.json", folder=tmp_path)
