"""Describe gndet, Python and the system, without importing torch or NumPy, which may be broken."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import gndet
from gndet.toolbox.doctor.facts import Fact

COMPILERS = ("c++", "g++", "clang++")
CONTAINERS = ("/.dockerenv", "/run/.containerenv")  # Docker's and Podman's mark


def facts() -> Iterator[Fact]:
    """Yield the versions of gndet, Python, the system, the C library and the compiler."""
    yield Fact("gndet", gndet.__version__ + commit(Path(gndet.__file__).parent.parent))
    python = f"{platform.python_version()} {platform.python_implementation()}"
    yield Fact("Python", f"{python}, {sys.maxsize.bit_length() + 1} bits")
    yield Fact("system", _system())
    yield Fact("C library", " ".join(platform.libc_ver()).strip() or "not glibc")
    compiler = next(filter(shutil.which, COMPILERS), None)
    yield Fact("C++ compiler", compiler or "none: train.compile on a CPU needs one")


def commit(folder: Path) -> str:
    """Return a checkout's commit, e.g. ", commit 1a2b3c4" or 1a2b3c4-dirty with changes; "" for other folders."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if done.returncode == 0:
            return f", commit {done.stdout.strip()}"
    return ", a checkout whose commit git cannot tell"


def _system() -> str:
    name = platform.system()
    with suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    inside = ", in a container" if any(Path(mark).exists() for mark in CONTAINERS) else ""
    return f"{name}, kernel {platform.release()}, {platform.machine()}{inside}"
