"""A command is killed before each of its file operations, or one of them fails; then the same command is given again.

The folder must then hold what it holds after an unbroken command, bit for bit, and nothing else.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from faults.host import host
from faults.launch import PATIENCE, next_log
from faults.operations import COUNT, FULL, GROWING, KILL
from faults.tiny import CONFIG, SPEEDS, check
from gndet.training.run_folder import BOARD

Words = tuple[str, ...]
TRAIN = (
    "train", "tiny.yaml", "out=run", "train.schedule.updates=2", "train.eval_every=1", "train.checkpoint_every=1",
    "train.keep_last=1", "train.vis_images=1",
)  # fmt: skip
COCO = (
    "data.root=data", "data.train.kind=coco", "data.train.annotations=a.json", "data.train.images=img",
    "data.val.kind=coco", "data.val.annotations=a.json", "data.val.images=img", "data.cache=cache",
)  # fmt: skip
BOARD_EVERY = 25  # of the operations on TensorBoard's file, every 25th is tried
FINISHED = "this run is finished"
TIMES = {"seconds", "speed", "date", "budget"}  # keys of study.json that differ from time to time
FLAKY = re.compile(  # what shows speeds and times in a page: numbers, charts, and a notice
    r'\d+([.,:]\d+)*|<svg.*?</svg>|\n?<p class="notice warn">Data-bound:.*?</p>', re.DOTALL
)


class Command(NamedTuple):
    """A command and the commands that make the folder it starts in."""

    name: str
    words: Words
    before: tuple[Words, ...] = ()
    stopped_at: str = ""  # the last command of `before` is killed before the first operation with this text
    done: str = ""  # what the command may say, with status 2, when it has nothing left to do
    only: str = ""  # consider only the operations that match this pattern
    after: str = ""  # consider only those after the last operation with this text


COMMANDS = (
    Command("a new run", TRAIN, done=FINISHED),
    Command("--fresh", (*TRAIN, "--fresh"), before=((*TRAIN, "seed=7"),)),
    Command("a resumed run", TRAIN, before=(TRAIN,), stopped_at="rename run/checkpoints/update-0000002", done=FINISHED),
    Command("a run with its report", (*TRAIN, "train.report=true"), done=FINISHED, after="write run/norms.jsonl"),
    Command("report", ("report", "run"), before=(TRAIN,)),
    Command("check with the cache", ("check", "tiny.yaml", "--images", *COCO)),
    Command("train with the cache", (*TRAIN, *COCO), done=FINISHED, only="cache"),
    Command("convert", ("convert", "run", "out"), before=(TRAIN,), done="exists"),
    Command("convert to a file", ("convert", "run", "out.pth", "--to", "torchvision"), before=(TRAIN,), done="exists"),
    Command("convert-data", ("convert-data", "data/a.json", "out", "--to", "yolo"), done="is not an empty folder"),
    Command("evaluate", ("evaluate", "run", "--out", "found.json"), before=(TRAIN,)),
    Command("predict", ("predict", "run", "data/img", "--out", "found", "--threshold", "0"), before=(TRAIN,)),
    Command(
        "norm-study",
        ("norm-study", "tiny.yaml", "--norms", "gn", "--images-per-gpu", "1", "--seeds", "1", "--out", "study",
         "train.schedule.updates=2"),
    ),
)  # fmt: skip


class Walk:
    """A command that is stopped at its operations, one after the other, in copies of one folder."""

    def __init__(self, command: Command, home: Path) -> None:
        """Make the folder that the command starts in, and an unbroken one; count the operations."""
        self.command, self.home = command, home
        self.start, self.case = home / "start", home / "case"
        make_start(self.start)
        for number, words in enumerate(command.before, 1):
            last = number == len(command.before) and command.stopped_at
            if not last:
                self._call(words, folder=self.start)
                continue
            shutil.copytree(self.start, self.case, symlinks=True)
            made = operations(self._call(words, COUNT)[1])
            shutil.rmtree(self.case)
            shutil.copytree(self.start, self.case, symlinks=True)
            self._call(words, KILL, next(i for i, what in enumerate(made, 1) if command.stopped_at in what))
            shutil.rmtree(self.start)
            self.case.rename(self.start)
        status, text = self._again(COUNT)
        check(status == 0, f"{command.name}: ended with {status}: {text}")
        self.made = operations(text)
        self.unbroken = content(self.case)

    def numbers(self, how: str, most: int | None) -> list[int]:
        """Return the operations to stop at: a random sample of `most`, or all; few of TensorBoard's."""
        first = max(
            (i for i, what in enumerate(self.made, 1) if self.command.after and self.command.after in what), default=1
        )
        wanted = [i for i in range(first, len(self.made) + 1) if re.search(self.command.only, self.made[i - 1])]
        board = [i for i in wanted if f"/{BOARD}/" in self.made[i - 1]]
        wanted = sorted({*wanted} - {*board} | {*board[::BOARD_EVERY]})
        if how == FULL:
            wanted = [i for i in wanted if self.made[i - 1].partition(" ")[0] in GROWING]
        draw = random.Random(f"{how} {self.command.name}")
        return wanted if most is None else sorted(draw.sample(wanted, min(len(wanted), most)))

    def broken(self, how: str, number: int) -> Iterator[str]:
        """Stop the command at an operation and give it again.  Yields each promise that is broken."""
        status, text = self._again(how, number)
        reached = re.search(rf"operation {number}: (.*)", text)
        what = f"{how} at {number}{f' ({reached[1]})' if reached else ''}"
        right = (-signal.SIGKILL if reached else 0,) if how == KILL else (0, 1, 2)
        yield from (f"{what}: {line}" for line in wrong(status, text, right))
        not_saved, said = "cannot save the checkpoint" in text, "these files are incomplete: " in text
        status, text = self._call(self.command.words)
        right = (0, 2) if self.command.done and self.command.done in text else (0,)
        yield from (f"{what}, then the same command: {line}" for line in wrong(status, text, right))
        lines = different(self.unbroken, content(self.case))
        if self.command.name == "--fresh":  # given twice, it moves two runs aside
            lines = [line for line in lines if not re.match("run-old-[2-9]", line)]
        if not_saved and how != KILL:  # as it said: the first checkpoint is missing, so the second is the best
            first = r"run/(best|checkpoints/update-0000001|checkpoints/update-0000002/(meta|manifest)\.json differs)"
            lines = [line for line in lines if not re.match(first, line)]
        if said:  # as it said: its last lines and pictures could not be written
            lines = [line for line in lines if not re.match(r"run/(FAILED|\w+\.(jsonl|json|png|safetensors))", line)]
        if lines:
            yield f"{what}: then {'; '.join(lines[:6])}{f'; and {len(lines) - 6} more' if lines[6:] else ''}"

    def _again(self, how: str = "", number: int = 0) -> tuple[int | None, str]:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.start, self.case, symlinks=True)
        return self._call(self.command.words, how, number)

    def _call(self, words: Words, how: str = "", number: int = 0, folder: Path | None = None) -> tuple[int | None, str]:
        return run(words, folder or self.case, self.home, how, number)


def run(
    words: Words, folder: Path, home: Path, how: str = "", number: int = 0, limit: float = PATIENCE
) -> tuple[int | None, str]:
    """Run a command in a folder as `operations.main` does; home: the user's.

    Returns its status, None if it was killed after `limit` seconds, and its output.
    """
    log = next_log(home)
    pid = host().fork(folder, log, {"HOME": str(home)}, "faults.operations:main", how, number, str(folder), list(words))
    deadline = time.monotonic() + limit
    while (status := host().status(pid)) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if status is None:
        os.kill(pid, signal.SIGKILL)
    text = log.read_text(encoding="utf-8", errors="surrogateescape")
    log.unlink()
    return status, text


def make_start(folder: Path) -> None:
    """Make a folder with a config and a data set of four pictures."""
    (folder / "data" / "img").mkdir(parents=True)
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number in range(1, 5):
        name = f"{number}.png"
        Image.new("RGB", (64, 64), (number * 50, 80, 0)).save(folder / "data" / "img" / name)
        tree["images"].append({"id": number, "file_name": name, "width": 64, "height": 64})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 30, 20], "area": 600, "iscrowd": 0}
        tree["annotations"].append(box | {"segmentation": [[8, 8, 38, 8, 38, 28, 8, 28]]})
    (folder / "data" / "a.json").write_text(json.dumps(tree))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config()))


def tiny_config() -> dict[str, Any]:
    """Return a config for the CPU and a network of operations.WIDTH."""
    config = json.loads(json.dumps(CONFIG | {"device": "cpu"}))
    config["model"]["norm"]["channels_per_group"] = 4
    config["data"]["val"]["count"] = 1
    return config


def operations(text: str) -> list[str]:
    """Return the operations that a counted command printed."""
    return re.findall(r"(?m)^operation: (.*)$", text)


def content(folder: Path) -> dict[str, Any]:
    """Return what each path below a folder holds, without times and speeds, by relative path."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif not path.is_file():
            found[name] = "folder" if path.is_dir() else "pipe"
        elif path.parent.name == BOARD and path.name.startswith("events.out.tfevents."):
            continue  # one more for each time that a run is continued; its name holds the time
        else:
            found[name] = lasting(path)
    return found


def lasting(path: Path) -> Any:
    """Return what a file holds that does not differ from time to time."""
    data = path.read_bytes()
    match path.name:
        case _ if path.name.endswith(".lock"):
            return "lock"
        case _ if path.parent.name == "logs":
            return "log"
        case "metrics.jsonl":
            return [record(line) for line in data.splitlines()]
        case "study.json":
            return without(json.loads(data), TIMES)
        case "study.csv":
            return re.sub(rb",done,[\d.]+,", b",done,", data)
        case "study.png":
            return "curve"
        case "facts.json" | "pictures.json":
            return without(json.loads(data.partition(b"\n")[2]), {"trusted", "inputs", "date"})
        case "report.html":
            return FLAKY.sub("", data.decode())
    return data


def record(line: bytes) -> Any:
    """Return a line of metrics.jsonl without speeds; as it is if a kill cut it, in a run that --fresh moved aside."""
    try:
        return without(json.loads(line), set(SPEEDS))
    except ValueError:
        return line


def without(tree: Any, keys: set[str]) -> Any:
    """Return JSON without some keys."""
    if isinstance(tree, dict):
        return {key: without(value, keys) for key, value in tree.items() if key not in keys}
    return [without(value, keys) for value in tree] if isinstance(tree, list) else tree


def wrong(status: int | None, text: str, right: tuple[int, ...]) -> Iterator[str]:
    """Say what is wrong with the end of a command: a traceback, a status that is not right."""
    if "Traceback" in text:
        frames = re.findall(r'File "\S*/(\S+)", line (\d+)', text)
        error = re.search(r"(?m)^Traceback (?:.*\n)(?:\s.*\n)+(.*)", text)
        where = " ".join(":".join(frame) for frame in frames[-8:])
        yield f"a traceback: {error[1][:300] if error else ''}, from {where}"
    if status not in right:
        yield f"status {status}: {text[-600:]}"


def different(unbroken: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Name what differs between two folders."""
    lines = []
    for name in sorted(unbroken.keys() | found.keys()):
        if name not in found:
            lines.append(f"{name} is missing")
        elif name not in unbroken:
            lines.append(f"{name} is left over")
        elif unbroken[name] != found[name]:
            one, two = (str(tree[name]) for tree in (unbroken, found))
            first = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
            start = max(first - 60, 0)
            lines.append(f"{name} differs: {two[start : start + 300]}, unbroken: {one[start : start + 300]}")
    return lines
