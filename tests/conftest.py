"""Fixtures that all tests share."""

import os
import site
from pathlib import Path

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU; read where they are defined

from faults.tiny import CONFIG

from gndet.config.loading import load_config
from gndet.train import train

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Pin threads: results of a reduction depend on how it is split."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A home of the tests' own: what is cached (data.cache) does not go into the developer's."""
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())  # packages installed there stay in reach
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real test data; a test that needs it skips where it is absent."""
    root = Path(os.environ.get("GNDET_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (root / "coco-tiny").is_dir():
        pytest.skip(f"no real data at {root} (set GNDET_TEST_DATA)")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two updates, a tiny detector's."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    train(load_config(folder / "tiny.yaml", [f"out={folder / 'out'}", "train.schedule.updates=2"]))
    return folder / "out"
