"""Types and help texts that several verbs share.  This file does not import torch, so --help answers at once."""

import argparse
import functools
import os
import re
from pathlib import Path

from gndet.files import path_fault

Options = argparse.Namespace
Verbs = argparse._SubParsersAction

CHECKPOINT = "run folder (its best checkpoint) or checkpoint folder"
CONFIG = "YAML file, or the name of a packaged config, e.g. quickstart"
OVERRIDES = "config overrides, e.g. train.global_batch=8 model.norm.kind=bn"

say = functools.partial(print, flush=True)  # a pipe or a log file shows each line at once


def add_overrides(verb: argparse.ArgumentParser, text: str = OVERRIDES) -> None:
    """Add the argument `overrides`: words of the form key=value."""
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def device_of(overrides: list[str]) -> str:
    """Return the device that the overrides ask for: auto, cpu or cuda."""
    return next((word.split("=", 1)[1] for word in overrides if word.startswith("device=")), "auto")


def path(text: str) -> Path:
    """Parse a path; expand ~ where the shell does not (--out=~/found)."""
    return Path(os.path.expanduser(file_name(text)))


def file_name(text: str) -> str:
    """Parse a name that may be that of a file."""
    if fault := path_fault(text):
        raise argparse.ArgumentTypeError(f"{text[:200]!r}: {fault}")
    return text


def one_or_more(text: str) -> int:
    """Parse a whole number of at most nine digits, 1 or more."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more, of at most nine digits")
    return int(text)


def zero_or_more(text: str) -> float:
    """Parse a number, 0 or more."""
    if not re.fullmatch(r"\d{1,9}(\.\d*)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more, of at most nine digits")
    return float(text)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    value = zero_or_more(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return value


def names(text: str) -> tuple[str, ...]:
    """Parse names separated by commas."""
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names with commas between them, like cat,dog")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Parse whole numbers, 1 or more, separated by commas."""
    return tuple(one_or_more(number) for number in text.split(","))


def duration(text: str) -> float:
    """Parse a time like 90s, 30m, 2h or 1.5h.  Returns seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a time like 90s, 30m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def height_and_width(text: str) -> tuple[int, int]:
    """Parse the size of a picture, like 480x640, each 64 or more.  Returns (height, width) in pixels."""
    found = re.fullmatch(r"(\d{2,5})x(\d{2,5})", text)
    if not found or min(map(int, found.groups())) < 64:
        raise argparse.ArgumentTypeError(f"{text}: expected HEIGHTxWIDTH in pixels, 64 to 99999 each")
    return int(found[1]), int(found[2])
