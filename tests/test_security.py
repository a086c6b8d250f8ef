"""Nothing in a stranger's weights, configs, checkpoints or data is ever executed (T21).

Each hostile file would create the canary if its content were executed or unpacked.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY

from gndet.checkpoint import MANIFEST, META
from gndet.cli.main import main
from gndet.config.loading import MAX_CONFIG_BYTES, config_from_dict, load_config, with_overrides
from gndet.errors import ConfigError

pytestmark = pytest.mark.faults
CONFIG = """
model: {backbone: {depth: 18}, masks: false}
data:
  train: {kind: shapes, count: 2, size: 64}
  val: {kind: shapes, count: 2, size: 64}
  workers: 0
train: {global_batch: 1, images_per_gpu: 1, schedule: {updates: 1}}
"""


@pytest.fixture(autouse=True)
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that would appear if something were executed or unpacked; it must not."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


class Evil:
    """An object that calls a function when it is unpickled carelessly."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def evil_objects(canary: Path) -> list[Any]:
    touch = f"open({str(canary)!r}, 'w')"
    return [
        Evil(os.system, f"touch {canary}"),
        Evil(eval, touch),
        Evil(exec, touch),
        Evil(open, str(canary), "w"),
        {"model": {"weight": torch.zeros(1), "x": Evil(os.system, f"touch {canary}")}},
        {"state_dict": Evil(os.mkdir, str(canary)), "model": {"weight": torch.zeros(1)}},
    ]


def evil_files(folder: Path, canary: Path) -> list[Path]:
    """Write every hostile object in each file format that read_weights distinguishes."""
    files = []
    for number, hostile in enumerate(evil_objects(canary)):
        names = {kind: folder / f"{kind}{number}.pth" for kind in ("zip", "legacy", "plain")}
        torch.save(hostile, names["zip"])
        torch.save(hostile, names["legacy"], _use_new_zipfile_serialization=False)
        names["plain"].write_bytes(pickle.dumps(hostile))
        files += names.values()
    return files


def test_the_hostile_files_are_hostile(tmp_path: Path, canary: Path) -> None:
    """Guards the tests below: each of these files executes something when it is read carelessly."""
    for file in evil_files(tmp_path, canary):
        if file.name.startswith("plain"):
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        assert canary.exists(), file
        canary.rmdir() if canary.is_dir() else canary.unlink()


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """Run gndet, which must refuse with its own message.  Returns the message."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"gndet {words[0]}: ") and "Traceback" not in text
    return text


# --- weights and checkpoints


def test_t21_hostile_weights_are_refused_and_not_run(
    tmp_path: Path, canary: Path, config: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in evil_files(tmp_path, canary):
        text = refused(capsys, "convert", file, tmp_path / "out")
        assert str(file) in text and ("nothing was run" in text or "damaged" in text)
        text = refused(capsys, "train", config, f"out={tmp_path / 'run'}", f"train.weights={file}")
        assert str(file) in text
    assert not (tmp_path / "out").exists()


def fake_checkpoint(folder: Path, data: bytes, meta: dict[str, Any], name: str = "model.safetensors") -> Path:
    """Write a checkpoint whose manifest matches its hostile content."""
    folder.mkdir(parents=True)
    files = {name: data, META: json.dumps(meta).encode()}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    entries = {key: {"bytes": len(file), "sha256": hashlib.sha256(file).hexdigest()} for key, file in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))
    return folder


def test_t21_a_pickle_in_a_run_folder_is_refused_and_not_run(
    tmp_path: Path, canary: Path, config: Path, capsys: pytest.CaptureFixture
) -> None:
    meta = {"config": yaml.safe_load(CONFIG), "classes": ["a"], "category_ids": [1]}
    for number, file in enumerate(evil_files(tmp_path, canary)):
        run = tmp_path / f"run{number}"
        folder = fake_checkpoint(run / "checkpoints" / "update-0000001", file.read_bytes(), meta)
        for path in (run, folder):
            assert "not a safetensors file" in refused(capsys, "evaluate", path)
            assert "not a safetensors file" in refused(
                capsys, "train", config, f"out={tmp_path / 'new'}", f"train.weights={path}"
            )
        (run / "last.pth").write_bytes(file.read_bytes())
        assert "neither a gndet checkpoint" in refused(capsys, "evaluate", run / "last.pth")


@pytest.mark.parametrize(
    "meta",
    [
        {"classes": 5}, {"classes": "abc"}, {"classes": [["a"]]}, {"category_ids": [1, 2]}, {"category_ids": [True]},
        {"parts": 7}, {"config": [1]}, {"config": {"a" * 10**5: 1}},
        {"config": {"model": {"norm": {"groups": 10**6000}}}},
    ],
)  # fmt: skip
def test_t21_a_checkpoint_s_description_is_not_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture, meta: dict[str, Any]
) -> None:
    sys.set_int_max_str_digits(10_000)
    try:
        whole = {"config": {}, "classes": ["a"], "category_ids": [1]} | meta
        folder = fake_checkpoint(tmp_path / "checkpoint", b"\x02\0\0\0\0\0\0\0{}", whole)
    finally:
        sys.set_int_max_str_digits(4300)
    assert len(refused(capsys, "evaluate", folder)) < 1000


def test_a_weight_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "weights.pth")
    assert "weights.pth: a pipe or a device" in refused(capsys, "convert", tmp_path / "weights.pth", tmp_path / "out")


# --- configs

HOSTILE_TAGS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "{{a: [!!python/object/apply:builtins.open ['{canary}', 'w']]}}",
)


def read_in(folder: Path, where: str, value: str) -> None:
    """Read a config that gets a value from the file itself, from its base, or from an override."""
    config, base = folder / "config.yaml", folder / "base.yaml"
    base.write_text(f"seed: {value}\n" if where == "base" else "seed: 1\n")
    config.write_text("base: base.yaml\n" + (f"seed: {value}\n" if where == "config" else ""))
    load_config(config, [f"seed={value}"] if where == "override" else [])


@pytest.mark.parametrize("where", ["config", "base", "override"])
@pytest.mark.parametrize("tag", HOSTILE_TAGS)
def test_t21_yaml_that_names_python_is_refused_and_not_run(tmp_path: Path, canary: Path, where: str, tag: str) -> None:
    with pytest.raises(ConfigError, match="not valid YAML: could not determine a constructor"):
        read_in(tmp_path, where, tag.format(canary=canary))


def bomb() -> str:
    """Return a flow mapping of aliases that expands to 10**8 values."""
    parts = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    parts += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "{" + ", ".join(parts) + "}"


def merge_bomb() -> str:
    """Return merge keys that expand to 10**8 entries when they are constructed."""
    parts = ["a0: &a0 {x: 1}"]
    parts += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    return "{" + ", ".join(parts) + "}"


SHAPELESS = {
    "alias bomb": (bomb(), "values once its aliases are expanded"),
    "merge bomb": (merge_bomb(), "values once its aliases are expanded"),
    "an alias of itself": ("&a [*a]", "nested more than 20 levels"),
    "deep": ("[" * 50 + "]" * 50, "nested more than 20 levels"),
    "deeper than the stack": ("[" * 5000 + "]" * 5000, "not valid YAML"),
    "many": ("[" + "1," * 30_000 + "]", "more than 20000 values"),
    "twice": ("{a: 1, a: 2}", r"key seed\.a is given twice"),
    "a number of 5000 digits": ("9" * 5000, "not valid YAML"),
    "a number of 100000 bits": ("0b" + "1" * 100_000, "seed: got a value of type int too large to show"),
    "no such day": ("2001-99-99", "not valid YAML"),
    "two documents": ("1\n---\nb: 2", "not valid YAML"),
    "a long word": ("a" * 5000, r"seed: got 'aaa.*\.\.\.; "),
}


@pytest.mark.parametrize("where", ["config", "base", "override"])
@pytest.mark.parametrize("case", SHAPELESS)
def test_t21_oversized_yaml_is_refused_in_a_few_words(tmp_path: Path, where: str, case: str) -> None:
    value, expected = SHAPELESS[case]
    with pytest.raises(ConfigError, match=expected) as error:
        read_in(tmp_path, where, value)
    assert len(str(error.value)) < 1000


def test_a_file_too_large_for_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text(json.dumps({"images": ["a" * MAX_CONFIG_BYTES]}))
    (tmp_path / "config.yaml").write_text("base: annotations.json\n")
    for name in ("annotations.json", "config.yaml"):
        with pytest.raises(ConfigError, match=f"has at most {MAX_CONFIG_BYTES} bytes"):
            load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("loop.yaml", "Too many levels"), (".", "Is a directory"), ("a" * 300, "no file can have this name")],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "config.yaml").write_text(json.dumps({"base": name}))
    for path in (tmp_path / "config.yaml", tmp_path / name):
        with pytest.raises(ConfigError, match=f"cannot read the config: {expected}"):
            load_config(path)


def test_a_thousand_mistakes_are_not_all_listed() -> None:
    with pytest.raises(ConfigError, match="and 980 more mistakes") as error:
        config_from_dict({f"key{i}": i for i in range(1000)}, "meta.json")
    assert len(str(error.value).splitlines()) == 21


def test_an_override_of_a_whole_section_is_named_for_each_key_in_it(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"^override 'model=\{masks: 3\}': model\.masks: got 3"):
        load_config(config, ["model={masks: 3}"])
    with pytest.raises(ConfigError, match=r"key model\.a is given twice"):
        with_overrides(load_config(config), ["model={a: 1, a: 2}"], "x")


# --- archives


def archives(folder: Path) -> list[Path]:
    """Write a zip and tars with members that would be unpacked outside the target folder, or link out of it."""
    file = folder / "slip.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("../canary", "canary", "data.json", str(folder / "canary")):
            archive.writestr(name, "x")
    tars = []
    for kind in ("", "gz"):
        tars.append(folder / f"slip.tar{kind}")
        with tarfile.open(tars[-1], f"w:{kind}") as archive:
            for name in ("../canary", "canary", str(folder / "canary")):
                member = tarfile.TarInfo(name)
                member.size = 1
                archive.addfile(member, io.BytesIO(b"x"))
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, str(folder / "canary")
            archive.addfile(member)
    return [file, *tars]


def test_t21_an_archive_is_refused_wherever_it_is_given_and_not_unpacked(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in archives(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert str(file) in refused(capsys, "convert", file, tmp_path / "out")
        assert str(file) in refused(capsys, "train", config, f"train.weights={file}")
        assert str(file) in refused(capsys, "train", file)
        assert str(file) in refused(capsys, "evaluate", file)
        data = f"data.train={{kind: coco, annotations: {file.name}, images: .}}"
        assert str(file) in refused(capsys, "train", config, f"data.root={tmp_path}", data)
        assert sorted(tmp_path.rglob("*")) == before


# --- the code

BANNED_MODULES = {
    "subprocess": "runs programs", "pty": "runs programs", "runpy": "runs files", "code": "runs text",
    "codeop": "runs text", "marshal": "loads code", "shelve": "unpickles", "dill": "unpickles",
    "cloudpickle": "unpickles", "joblib": "unpickles", "pickle": "unpickles", "_pickle": "unpickles",
    "zipimport": "runs archives", "tarfile": "unpacks", "zipfile": "unpacks", "urllib": "downloads",
    "requests": "downloads", "httpx": "downloads", "http": "downloads", "ftplib": "downloads",
    "huggingface_hub": "downloads", "pip": "installs", "ensurepip": "installs", "importlib": "imports what data names",
}  # fmt: skip
ALLOWED_IMPORTS = {
    ("__init__.py", "importlib"): "the names of gndet, when they are first used",
    ("train.py", "importlib"): "gndet.cli.train, when gndet.train is called",
    ("evaluation/fonts.py", "importlib"): "finds matplotlib's folder without importing it",
    ("ops/torchvision_ops.py", "importlib"): "torchvision's operators without its package, by names in that file",
    ("data/workers.py", "pickle"): "results of gndet's own processes, which come through their pipes",
    ("weights/foreign/unpickling.py", "pickle"): "it looks nothing up: tests/weights/test_weight_files.py",
    ("weights/foreign/files.py", "zipfile"): "reads uncompressed records of a file of torch.save, unpacks none",
    (
        "toolbox/doctor/doctor.py",
        "subprocess",
    ): "starts doctor.inside, which imports packages that may crash the process",
    ("toolbox/doctor/inside.py", "importlib"): "steps of the doctor, by names in that file",
    ("toolbox/doctor/machine.py", "subprocess"): "git, in gndet's own folder, for the commit",
    ("toolbox/doctor/packages.py", "importlib"): "the packages that gndet depends on, by names in that file",
    ("toolbox/norm_study/jobs.py", "subprocess"): "starts gndet train, a process per cell",
    ("toolbox/norm_study/child.py", "runpy"): "gndet.cli, by that name",
    ("toolbox/report/report.py", "importlib"): "reads the style and script that come with gndet",
    ("modeling/timm_backbone.py", "importlib"): "timm, if the config's backbone is timm's",
    ("training/optim.py", "importlib"): "timm, if the config's optimizer is LAMB",
    ("weights/foreign/source.py", "urllib"): "the error of a download that the user asked for by name",
    ("weights/foreign/source.py", "importlib"): "timm, if the user named weights of timm",
}
BANNED_CALLS = (
    {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.posix_spawn", "os.fork", "os.startfile"}
    | {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.export.load", "torch.hub.load"}
    | {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "shutil.unpack_archive"}
)
ALLOWED_CALLS = {
    ("data/workers.py", "pickle.loads"): "results of gndet's own processes, which come through their pipes",
    ("__init__.py", "import_module"): "the names of gndet, when they are first used",
    ("train.py", "import_module"): "gndet.cli.train, when gndet.train is called",
    ("ops/torchvision_ops.py", "importlib.import_module"): "torchvision and parts of it, by names in that file",
    ("toolbox/doctor/inside.py", "importlib.import_module"): "steps of the doctor, by names in that file",
    ("modeling/timm_backbone.py", "importlib.import_module"): "timm and timm.layers",
    ("training/optim.py", "importlib.import_module"): "timm.optim",
    ("modeling/timm_backbone.py", "timm.create_model"): "with random weights: nothing is downloaded",
    (
        "toolbox/doctor/packages.py",
        "importlib.import_module",
    ): "packages of gndet, by names in that file",
}
BANNED_ENDINGS = {"extract", "extractall", "urlopen", "urlretrieve"}  # as methods of any object
DOWNLOADS = {
    "download_url_to_file": ("weights/foreign/source.py", "_torchvision"),
    "load_state_dict_from_url": (),
    "import_module": ("weights/foreign/source.py", "_timm"),
    "create_model": ("weights/foreign/source.py", "_timm"),
    "get_state_dict": (),
}  # each in a function that `read_source` calls only if the name of the weights is not a file


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def offences(path: str, source: str) -> list[str]:
    """Return what a module of gndet does although no module may."""
    found = []
    tree = ast.parse(source)
    within = {id(node): f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in (module.partition(".")[0] for module in modules):
                if module in BANNED_MODULES and (path, module) not in ALLOWED_IMPORTS:
                    found.append(f"imports {module}, which {BANNED_MODULES[module]}")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if (path, name) in ALLOWED_CALLS:
            continue
        options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        last = name.rpartition(".")[2]
        if name in BANNED_CALLS or last in BANNED_ENDINGS or name.startswith(("os.exec", "os.spawn")):
            found.append(f"calls {name}")
        if name == "torch.load" and options.get("weights_only") is not True:
            found.append("calls torch.load without weights_only=True")
        if options.get("allow_pickle") or options.get("shell"):
            found.append(f"calls {name} with allow_pickle or shell")
        if last in DOWNLOADS and (path, within.get(id(node))) != DOWNLOADS[last]:
            found.append(f"calls {name} in {within.get(id(node))}")
    return found


FILES = sorted((REPOSITORY / "gndet").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_t21_no_module_runs_or_downloads_what_a_file_says(path: Path) -> None:
    assert not offences(str(path.relative_to(REPOSITORY / "gndet")), path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess", "import pickle", "from pickle import loads", "from urllib.request import urlopen",
        "def f():\n    import requests", "eval('1')", "os.execv('a', [])", "yaml.load(text)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "archive.extractall(folder)",
        "torch.hub.load_state_dict_from_url(url)", "timm.create_model(name)", "run(text, shell=True)",
    ],
)  # fmt: skip
def test_such_a_module_would_be_found(source: str) -> None:
    assert offences("somewhere.py", source)
