"""Run folders in which a random file, link or folder is damaged or replaced: each verb works, or refuses in words."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.killing import TRAIN, content, make_start, operations, run, wrong
from faults.operations import COUNT, KILL

LIMIT = 60.0  # seconds for a command
VERBS = {
    "evaluate": ("evaluate", "run", "--out", "found.json"),
    "predict": ("predict", "run", "data/img", "--out", "found", "--threshold", "0.01"),
    "report": ("report", "run"),
    "train": TRAIN,
}
FOREIGN: tuple[Any, ...] = (
    None, 3, "text", [], {}, [[]], {"update": 2}, {"format": 1, "files": {}}, [{"image_id": "x"}],
    {"a": {"b": [1e999]}},
)  # fmt: skip


class Mutations:
    """Two runs to mutate, one finished and one that was killed, and what must not change beside them."""

    def __init__(self, home: Path, seed: int = 0) -> None:
        """Make the runs."""
        self.home, self.seed, self.outcomes = home, seed, Counter[tuple[str, str]]()
        outside = home / "outside"
        outside.mkdir()
        (outside / "precious").write_text("of the user\n")
        make_start(home / "finished")
        shutil.copytree(home / "finished", home / "killed")
        status, text = run((*TRAIN, "train.report=true"), home / "finished", home)
        assert status == 0, text
        made = operations(run(TRAIN, home / "killed", home, COUNT)[1])
        shutil.rmtree(home / "killed" / "run")
        number = next(i for i, what in enumerate(made, 1) if "rename run/checkpoints/update-0000002" in what)
        run(TRAIN, home / "killed", home, KILL, number)
        self.weights = (home / "finished" / "run" / "last" / "model.safetensors").read_bytes()

    def try_one(self, number: int) -> Iterator[str]:
        """Mutate a copy of one of the runs and give each command.  Yields each promise that is broken."""
        draw = random.Random(f"{self.seed} {number}")
        case, base = self.home / "case", draw.choice(("finished", "killed"))
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.home / base, case, symlinks=True)
        what = f"{number}, {base}: {' and '.join(mutate(case / 'run', draw) for _ in range(draw.choice((1, 1, 1, 2))))}"
        before = self._around(case)
        for verb, words in VERBS.items():
            status, text = run(words, case, self.home, limit=LIMIT)
            self.outcomes[verb, str(status)] += 1
            yield from (f"{what}: {verb}: {line}" for line in wrong(status, text, (0, 2)))
            if status == 2 and f"gndet {verb}: " not in text:
                yield f"{what}: {verb}: no reason: {text[-300:]}"
        weights = case / "run" / "checkpoints" / "update-0000002" / "model.safetensors"  # `last` may be a file
        if status == 0 and not (weights.is_file() and weights.read_bytes() == self.weights):
            yield f"{what}: train: other weights than an unbroken run"
        if self._around(case) != before:
            yield f"{what}: a file outside the run was changed"

    def table(self) -> str:
        """Return the number of outcomes by verb."""
        statuses = sorted({status for _, status in self.outcomes})
        rows = [f"{verb}: " + ", ".join(f"status {s}: {self.outcomes[verb, s]}" for s in statuses) for verb in VERBS]
        return "\n".join(rows)

    def _around(self, case: Path) -> dict[str, Any]:
        return content(case / "data") | content(self.home / "outside")


def mutate(run: Path, draw: random.Random) -> str:
    """Damage or replace a random path of a run folder.  Returns what was done."""
    path = draw.choice(sorted(path for path in run.rglob("*")))
    is_folder = path.is_dir() and not path.is_symlink()
    kinds = FOLDER_KINDS if is_folder else LINK_KINDS if path.is_symlink() else FILE_KINDS
    name = draw.choice(sorted(kinds))
    kinds[name](path, draw)
    return f"{path.relative_to(run)} {name}"


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size or 1))


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 8, 100))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def replaced(make: Callable[[Path, random.Random], object]) -> Callable[[Path, random.Random], None]:
    """Return a mutation that removes a path and makes something in its place."""

    def mutation(path: Path, draw: random.Random) -> None:
        remove(path)
        make(path, draw)

    return mutation


def outside(path: Path) -> Path:
    return path.parents[len(path.parents) - 1 - path.parts.index("case")].parent / "outside"


REPLACED = {
    "removed": lambda path, draw: None,
    "a folder": lambda path, draw: path.mkdir(),
    "a folder with a file": lambda path, draw: (path.mkdir(), (path / "x").write_text("x")),
    "an empty file": lambda path, draw: path.touch(),
    "a dangling link": lambda path, draw: path.symlink_to("/not/there"),
    "a link to itself": lambda path, draw: path.symlink_to(path.name),
    "a link to a file": lambda path, draw: path.symlink_to(outside(path) / "precious"),
    "a link to a folder": lambda path, draw: path.symlink_to(outside(path)),
    "a link to its parent": lambda path, draw: path.symlink_to(".."),
    "a pipe": lambda path, draw: os.mkfifo(path),
    "foreign JSON": lambda path, draw: path.write_text(json.dumps(draw.choice(FOREIGN))),
    "noise": lambda path, draw: path.write_bytes(draw.randbytes(draw.choice((1, 64, 5000)))),
}
LINK_KINDS = {name: replaced(make) for name, make in REPLACED.items()}
FOLDER_KINDS = LINK_KINDS
FILE_KINDS = LINK_KINDS | {"cut": cut, "flipped": flip, "cut again": cut, "flipped again": flip}
