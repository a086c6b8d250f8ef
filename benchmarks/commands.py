"""`python -m benchmarks commands`: time gndet's commands as a user types them, each in a new process.

help: `gndet train --help`.  train: until the first update of the quickstart on 200 drawn pictures.  predict: one
picture of 640 x 480 pixels, by the quickstart's network.  analyze: detections with masks, in COCO's format, on as many
pictures as COCO's val2017 has, with masks.  With --beside, the same commands of another checkout take turns with these.
"""

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

import gndet
from benchmarks import evaluation
from benchmarks.report import machine, table
from benchmarks.turns import Subject, take_turns
from benchmarks.typed import command_of, subject
from gndet.errors import ConfigError

DETECTIONS = 100  # per picture
HERE = Path(gndet.__file__).parent.parent
SMALL = ["data.train.count=200", "data.val.count=20", "train.log_every=1", "train.schedule.updates=2"]
WITHOUT_MORE = ["train.eval_every=0", "train.norm_images=0", "train.vis_images=0", "train.schedule.warmup=1"]


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Time the commands asked for, one table per command.  Raises ConfigError if --beside is not a checkout."""
    checkouts = {"here": HERE}
    if options.beside is not None:
        if not (options.beside / "gndet" / "cli").is_dir():
            raise ConfigError(f"--beside: {options.beside}: no gndet/cli in it, expected a checkout of gndet")
        checkouts = {"beside": options.beside.resolve(), **checkouts}
    for command in options.only or NAMES:
        with TemporaryDirectory() as folder:
            words = NAMES[command](Path(folder), options)
            subjects = [Subject(name, subject, (checkout, words, folder)) for name, checkout in checkouts.items()]
            turns = take_turns(subjects, options.rounds, threads=options.threads, fresh=True, warmup=1, say=say)
        say(f"\n{command}: gndet {' '.join(words)}\n{table(turns, against='here')}\n")
    say(machine(options.threads))


def asks_for_help(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the words of the shortest command."""
    return ["train", "--help"]


def trains(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the words of a training, whose process is ended after the first update."""
    return ["train", "quickstart", f"out={folder / 'run'}", *SMALL]


def predicts(folder: Path, options: argparse.Namespace) -> list[str]:
    """Draw a picture, train for two updates, and return the words that let this network predict."""
    picture, run = folder / "picture.jpg", folder / "run"
    Image.effect_noise((640, 480), 60).convert("RGB").save(picture)
    words = ["train", "quickstart", f"out={run}", *SMALL, *WITHOUT_MORE]
    command, env = command_of(options.beside or HERE, words)  # an older checkout may not read what a newer one wrote
    subprocess.run(command, env=env, check=True, capture_output=True)
    return ["predict", str(run), str(picture), "--out", str(folder / "predictions")]


def analyzes(folder: Path, options: argparse.Namespace) -> list[str]:
    """Write pictures' objects and detections, and return the words that analyze them."""
    truth, found = evaluation.write(folder, options.num, DETECTIONS)
    return ["analyze", str(found), "--data", str(truth)]


NAMES = {"help": asks_for_help, "train": trains, "predict": predicts, "analyze": analyzes}
