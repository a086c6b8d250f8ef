"""Fixtures that all tests share."""

import os
import random
import signal
import site
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for this process and all that tests start
os.environ["OMP_WAIT_POLICY"] = "passive"  # two threads of a test do not spin on the cores of other tests

import numpy as np
import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU; read where they are defined
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; child processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from faults.launch import spawn
from faults.tiny import CONFIG, THIN

from gndet.config.loading import load_config
from gndet.modeling import resnet
from gndet.train import train

REPOSITORY = Path(__file__).resolve().parent.parent
WORKERS = 2  # processes that share the suite, for a machine with two cores


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of worker processes for `-n auto`, the default: 0 if only files or tests are named.

    Breakpoints then work, and a single test need not wait until two workers have imported torch.
    """
    named = [path.partition("::")[0].endswith(".py") for path in config.args]
    return 0 if all(named) or sys.gettrace() is not None else WORKERS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that tries every case of the fault tests that usually take a sample."""
    parser.addoption("--all-faults", action="store_true", help="no samples: every file operation, 500 damaged runs")


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module
def pytest_runtest_setup() -> None:
    """Seed the global random number generators: the numbers of a test do not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Pin threads: results of a reduction depend on how it is split."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def thin() -> Iterator[None]:
    """Give ResNets a quarter of their channels in a module: updates take half the time, checkpoints 8 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "WIDTH", THIN)
        yield


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Fork the ranks that a module spawns, by faults.launch.spawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.multiprocessing, "spawn", spawn)
        yield


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a separate home folder, so that the tests do not write to the developer's cache (data.cache)."""
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())  # keep its packages importable
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real test data; a test that needs it is skipped if it is missing."""
    root = Path(os.environ.get("GNDET_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (root / "coco-tiny").is_dir():
        pytest.skip(f"no real data at {root} (set GNDET_TEST_DATA)")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """The folder of a run of two updates of a tiny detector."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    train(load_config(folder / "tiny.yaml", [f"out={folder / 'out'}", "train.schedule.updates=2"]))
    return folder / "out"
