"""A stranger's checkpoint chooses no folder to write to and no memory; weights that are not finite are said by all."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from PIL import Image
from torch import Tensor

import gndet
from gndet.checkpoint import MAX_FILES, MAX_META, Checkpoint, load_checkpoint, save_checkpoint
from gndet.cli.main import main
from gndet.config.data import DatasetConfig
from gndet.data.datasets.coco import to_coco
from gndet.data.datasets.shapes import read_shapes
from gndet.errors import CheckpointError
from gndet.modeling.build import build_model
from gndet.modeling.trained import build_trained, read_trained

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run, whose checkpoint a test changes."""
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with pictures in COCO's format, as a set that a cache keeps."""
    dataset = read_shapes(DatasetConfig(kind="shapes", count=2, size=64, seed=3))
    (tmp_path / "data" / "images").mkdir(parents=True)
    for record in dataset.records:
        Image.fromarray(record.load()).save(tmp_path / "data" / "images" / f"{record.image_id}.png")
    records = [record._replace(file_name=f"{record.image_id}.png") for record in dataset.records]
    (tmp_path / "data" / "a.json").write_text(json.dumps(to_coco(dataset._replace(records=records))))
    return tmp_path / "data"


def change(run: Path, edit: Callable[[Checkpoint], Any]) -> Path:
    """Change the best checkpoint of a run, and describe it in a valid manifest.  Returns its folder."""
    saved = load_checkpoint((run / "best").resolve())
    edit(saved)
    save_checkpoint(saved.path, saved.groups, saved.meta)
    return saved.path


def option(section: str, **values: Any) -> Callable[[Checkpoint], Any]:
    """Return an edit of a section of the config."""

    def edit(saved: Checkpoint) -> None:
        part = saved.meta["config"]
        for name in section.split("."):
            part = part[name]
        part.update(values)

    return edit


def reads(data: Path) -> list[str]:
    return [f"data.root={data}", "data.val.kind=coco", "data.val.annotations=a.json", "data.val.images=images"]


# --- where to write


@pytest.mark.faults
def test_no_verb_writes_where_a_checkpoint_or_a_run_says(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    theirs = tmp_path / "theirs"
    sets = {"kind": "coco", "annotations": "a.json", "images": "images"}

    def edit(saved: Checkpoint) -> None:
        for name in ("config", "asked"):
            saved.meta[name]["out"] = str(theirs / "out")
            saved.meta[name]["data"].update(root=str(data), cache=str(theirs / ".ssh"))
            for which in ("train", "val"):
                saved.meta[name]["data"][which].update(sets)

    change(run, edit)
    tree = yaml.safe_load((run / "config.yaml").read_text()) | {"out": str(theirs / "out")}
    tree["data"] |= {"root": str(data), "cache": str(theirs / ".ssh"), "train": sets, "val": sets}
    head = "".join(line for line in (run / "config.yaml").open() if line.startswith("#"))
    (run / "config.yaml").write_text(head + yaml.safe_dump(tree))
    for words in (
        ["evaluate", run], ["predict", run, data / "images", "--out", tmp_path / "found"], ["norms", run],
        ["report", run], ["convert", run, tmp_path / "converted"],
    ):  # fmt: skip
        assert main([str(word) for word in words]) == 0
    gndet.load(run).evaluate()
    assert not theirs.exists()
    assert list((tmp_path / "home" / ".cache" / "gndet").glob("a-*"))  # the user's own
    for verb in ("evaluate", "report"):
        cache = tmp_path / f"asked_{verb}"
        assert main([verb, str(run), f"data.cache={cache}"]) == 0 and list(cache.glob("a-*"))


def test_a_run_that_kept_nothing_is_evaluated_without_keeping(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    change(run, option("data", cache=""))
    assert main(["evaluate", str(run), *reads(data)]) == 0
    assert not (tmp_path / "home").exists()


# --- sizes


SIZES = {
    "wider than its weights": option("model.fpn", channels=8192),
    "longer heads": option("model.box_head", num_convs=32),
    "deeper": option("model.backbone", depth=152),
    "other pooling": option("model.box_head", pool_size=64, fc_channels=65_536),
    "many classes": lambda saved: saved.meta.update(
        classes=[f"c{i}" for i in range(20_000)], category_ids=list(range(20_000))
    ),
    "no masks": option("model", masks=False),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_are_not_those_of_the_weights_are_refused_before_they_take_memory(
    run: Path, tmp_path: Path, case: str
) -> None:
    folder = change(run, SIZES[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"tensors do not fit this model\n  \w+\.\S+: (absent|\[)") as refused:
        gndet.load(folder)
    assert str(folder) in str(refused.value) and len(str(refused.value)) < 1500
    for verb in ("evaluate", "norms", "convert"):
        out = [str(tmp_path / "out")] if verb == "convert" else []
        assert main([verb, str(folder), *out]) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


ABSURD = {
    "model.fpn": {"channels": 30_000}, "model.rpn": {"num_convs": 10**9}, "model.box_head": {"pool_size": 10**6},
    "model.mask_head": {"sampling_ratio": 10**6}, "evaluation": {"max_detections": 10**12},
    "data": {"canvases": [[10**6, 10**6]]}, "data.val": {"size": 10**6},
}  # fmt: skip
ABSURD_TOO = [
    ("model.rpn", {"anchor_sizes": [32, 64, 128, 256, 1e9]}), ("model.rpn", {"pre_nms_test": 10**12}),
    ("model.box_head", {"detections_per_image": 10**12}), ("data", {"workers": 10**5}), ("model", {"compat": {}}),
    ("data", {"shortest_edge_test": 10**6}), ("data", {"max_edge": 10**6}), ("data", {"canvas_multiple": 10**6}),
]  # fmt: skip


@pytest.mark.parametrize(("section", "values"), [*ABSURD.items(), *ABSURD_TOO])
def test_absurd_options_of_a_checkpoint_are_named(run: Path, section: str, values: dict[str, Any]) -> None:
    change(run, option(section, **values))
    assert any(f"{section}.{name}" in refusal(run) for name in values)


@pytest.mark.parametrize("number", [2**63, 2**70, -1])
def test_category_ids_that_no_data_set_has_are_refused(run: Path, number: int) -> None:
    def edit(saved: Checkpoint) -> None:
        saved.meta["category_ids"][-1] = number

    change(run, edit)
    assert f"meta.json: category_ids: got {number}, expected" in refusal(run)


def refusal(run: Path) -> str:
    with pytest.raises(gndet.errors.GndetError) as refused:
        gndet.load(run)
    return str(refused.value)


def test_a_built_model_is_bit_for_bit_that_of_an_initialized_one(run: Path) -> None:
    trained = read_trained(run)
    expected = build_model(trained.config.model, len(trained.classes))
    expected.load_state_dict(trained.state)
    found = build_trained(trained, trained.config.model)
    for one, other in ((found.parameters, expected.parameters), (found.buffers, expected.buffers)):
        for a, b in zip(one(), other(), strict=True):
            assert torch.equal(a, b) and (a.dtype, a.stride(), a.requires_grad) == (
                b.dtype,
                b.stride(),
                b.requires_grad,
            )
            assert a.data_ptr() % 64 == b.data_ptr() % 64 == 0  # kernels may round otherwise on other addresses


def test_descriptions_that_are_too_large_are_not_read(run: Path) -> None:
    folder = (run / "best").resolve()
    with pytest.raises(CheckpointError, match=f"bytes, expected at most {MAX_META}"):
        change(run, lambda saved: saved.meta.update(huge=["x" * MAX_META]))
    assert load_checkpoint(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "meta.json").write_bytes(b"[" * (MAX_META + 1))
    manifest["files"]["meta.json"]["bytes"] = MAX_META + 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert f"expected at most {MAX_META}" in refusal(run)
    manifest["files"] |= {f"{i}.safetensors": manifest["files"]["meta.json"] for i in range(MAX_FILES)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json: damaged: Dictionary should have at most 32 items" in refusal(run)


def test_what_a_checkpoint_says_about_its_run_may_be_anything(run: Path, capsys: pytest.CaptureFixture) -> None:
    change(run, lambda saved: saved.meta.update(norms=[1], processes="many", update=None, versions=3))
    assert main(["norms", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()


# --- values


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors["backbone.stem.conv.weight"][0, 0, 0, :2] = float("nan")


@pytest.fixture
def spoiled(run: Path) -> Path:
    """The run, whose best checkpoint has two NaN in one tensor."""
    change(run, lambda saved: [spoil(saved.groups[name]) for name in ("model", "ema")])
    return run


@pytest.mark.faults
@pytest.mark.parametrize("words", [["evaluate"], ["predict"], ["export"], ["norms"], ["report"], ["convert"]])
def test_every_verb_says_that_weights_are_not_finite(
    spoiled: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rest = {
        "predict": [tmp_path / "a.png", "--out", tmp_path / "found"], "convert": [tmp_path / "converted"],
        "export": ["--onnx", tmp_path / "a.onnx", "--picture", tmp_path / "a.png", "--size", "64x64"],
    }  # fmt: skip
    status = main([*words, str(spoiled), *map(str, rest.get(words[0], []))])
    said = "".join(capsys.readouterr())
    lines = [line for line in said.splitlines() if "NaN or infinite values in" in line]
    assert 1 <= len(lines) <= 2  # a report names the averaged weights, too
    assert all("backbone.stem.conv.weight (2 of " in line for line in lines)
    assert (status == 2) == (words == ["convert"])  # there is nothing to start from


def test_python_training_and_resuming_say_that_weights_are_not_finite(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.warns(UserWarning, match=r"NaN or infinite values in backbone\.stem\.conv\.weight \(2 of"):
        gndet.load(spoiled)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    config = [str(tmp_path / "tiny.yaml"), f"out={tmp_path / 'new'}"]
    assert main(["train", *config, f"train.weights={spoiled}"]) == 2
    assert main(["invariance", *config, f"train.weights={spoiled}"]) == 2
    assert capsys.readouterr().err.count("NaN or infinite values in backbone.stem.conv.weight (2 of") == 2
    change(spoiled, lambda saved: saved.meta.update(evaluation_due=True))
    again = [str(spoiled.with_name("tiny.yaml")), f"out={spoiled}", "train.schedule.updates=2"]
    assert main(["train", *again]) == 2
    said = capsys.readouterr().err
    assert "NaN or infinite values in model: backbone.stem.conv.weight (2 of" in said and "remove this folder" in said


def test_running_statistics_and_averages_count(run: Path) -> None:
    def edit(saved: Checkpoint) -> None:
        saved.groups["ema"] = {key: tensor.clone() for key, tensor in saved.groups["model"].items()}
        for key in list(saved.groups["ema"])[:7]:
            saved.groups["ema"][key].view(-1)[0] = float("-inf")

    folder = change(run, edit)
    words = read_trained(folder).nonfinite
    assert words.count("(1 of ") == 5 and words.startswith("7 tensors: ")


def test_finite_weights_are_not_spoken_of(run: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert read_trained(run).nonfinite == ""
    gndet.load(run)
    assert not [str(warning.message) for warning in recwarn if "NaN" in str(warning.message)]
