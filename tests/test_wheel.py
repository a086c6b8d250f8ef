"""What is installed: the wheel holds the library and its configs, and works without the checkout."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from packaging.requirements import Requirement

from gndet.config.loading import config_to_yaml, load_config

pytest.importorskip("hatchling", reason="the build backend, part of the extra `test`")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NAME = f"gndet-{PROJECT['version']}"


def test_pre_commit_runs_the_ruff_that_the_tests_install() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (ruff,) = [repo for repo in hooks["repos"] if repo["repo"].endswith("/ruff-pre-commit")]
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    required = {parsed.name: parsed for parsed in map(Requirement, PROJECT["optional-dependencies"]["test"])}
    assert required["ruff"].specifier.contains(ruff["rev"].removeprefix("v"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and an sdist, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=REPOSITORY, check=True)
    return folder


def tree(folder: str) -> set[str]:
    paths = [path for path in (REPOSITORY / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(REPOSITORY)) for path in paths}


def test_the_wheel_holds_the_library_and_the_configs_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    metadata = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - metadata == tree("gndet") | {f"gndet/{name}" for name in tree("configs")}
    assert f"{NAME}.dist-info/licenses/LICENSE" in metadata
    assert {"gndet/py.typed", "gndet/toolbox/report/page.css", "gndet/configs/quickstart.yaml"} <= names


def test_the_sdist_holds_what_builds_and_tests_it(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        names = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    folders = ("gndet", "configs", "tests", "benchmarks", "tools", "docker", "docs")
    assert set.union(*map(tree, folders)) | {"pyproject.toml", "README.md", "LICENSE", ".ci/run"} <= names
    assert not [name for name in names if name.startswith(("runs/", "datasets/", ".git/"))]


def test_an_unpacked_wheel_reads_its_own_configs_in_an_empty_folder(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    for name in ("quickstart", "mask_rcnn_r50_fpn_gn_2x"):
        done = subprocess.run(
            [sys.executable, "-m", "gndet.cli", "config", name], capture_output=True, text=True,
            cwd=tmp_path / "empty", env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        )  # fmt: skip
        assert done.stdout == config_to_yaml(load_config(REPOSITORY / "configs" / f"{name}.yaml")), done.stderr
    wrong = subprocess.run(
        [sys.executable, "-m", "gndet.cli", "config", "configs/quickstart.yaml"], capture_output=True, text=True,
        cwd=tmp_path / "empty", env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert str(tmp_path / "site" / "gndet" / "configs" / "quickstart.yaml") in wrong.stderr
