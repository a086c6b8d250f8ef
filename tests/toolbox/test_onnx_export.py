"""An exported ONNX file detects what the detector detects, at any size, or it is not written."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faults.tiny import CONFIG, write_config
from PIL import Image

from gndet.checkpoint import save_checkpoint
from gndet.cli.main import main
from gndet.config.loading import config_from_dict, load_config, with_overrides
from gndet.distributed.process import process
from gndet.errors import CheckpointError, DataError, OutputError
from gndet.evaluation.detector import load_detector
from gndet.modeling.build import build_model
from gndet.toolbox.onnx import export as onnx_export
from gndet.toolbox.onnx.export import (
    Found,
    by_onnxruntime,
    by_torch,
    compare_with_torch,
    detection_difference,
    export,
    run_onnx,
    session,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("thin")
CLASSES = ("disc", "box", "triangle", "star")


def detector(folder: Path, *overrides: str, seed: int = 0) -> Path:
    """Save a checkpoint of random weights that finds a lot; its norms have random statistics and gammas."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    cfg = load_config(folder / "tiny.yaml", [f"out={folder / 'run'}", "model.box_head.score_threshold=0.2", *overrides])
    torch.manual_seed(seed)
    model = build_model(cfg.model, len(CLASSES))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm." in name and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
        if cfg.model.is_dense:
            model.dense.cls_logits.weight.mul_(30)
            model.dense.cls_logits.bias.zero_()
            model.dense.boxes.bias.fill_(2)
        else:
            for head in getattr(model.box_head, "stages", [model.box_head]):
                head.cls_score.weight.mul_(30)
                head.bbox_pred.weight.mul_(300)
            model.rpn.objectness.weight.mul_(10)
    where = folder / f"checkpoint-{seed}"
    meta = {"config": cfg.model_dump(mode="json"), "classes": list(CLASSES), "category_ids": [1, 2, 3, 4]}
    save_checkpoint(where, {"model": model.state_dict()}, meta)
    return where


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((120, 90), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    """A folder with the exported file of `detector`, for any size, with masks."""
    folder = tmp_path_factory.mktemp("exported")
    Image.fromarray(noise((64, 80))).save(folder / "picture.png")
    assert export(detector(folder), folder / "d.onnx", [], str, picture=folder / "picture.png")
    return folder


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


VARIANTS = {
    "gn": (),
    "gn, plain, 2fc, no masks": ("model.norm.padding=plain", "model.box_head.kind=2fc", "model.masks=false"),
    "bn": ("model.norm.kind=bn", "train.global_batch=2"),
    "gn, C4": ("model.neck=c4",),
    "gn, DC5": ("model.neck=dc5", "model.backbone.depth=50"),
    "gn, timm": (
        "model.backbone.kind=timm", "model.backbone.name=regnety_002", "model.backbone.depth=50",
        "model.norm.channels_per_group=8", "model.masks=false",
    ),
    "frozen_bn, torchvision's conventions": ("model.norm.kind=frozen_bn", "model.compat=torchvision"),
    "gn, weight standardization, adaptive samples": (
        "model.norm.weight_standardization=true", "model.box_head.sampling_ratio=0", "model.mask_head.sampling_ratio=0",
    ),
    "cascade": (
        "model.detector=cascade_rcnn", "model.cascade.mask_stages=each", "model.cascade.average=logits",
        "model.box_head.score_threshold=0.3",
    ),
    "fcos": ("model.detector=fcos", "model.masks=false", "model.dense.score_threshold=0.2"),
    "retinanet": ("model.detector=retinanet", "model.masks=false", "model.dense.score_threshold=0.2"),
}  # fmt: skip
SLOW = ("bn", "gn, C4", "gn, DC5", "gn, timm", "retinanet", "frozen_bn, torchvision's conventions")


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(value, id=key, marks=[pytest.mark.slow] * (key in SLOW)) for key, value in VARIANTS.items()],
)
def test_the_file_detects_what_the_detector_does(tmp_path: Path, picture: Path, overrides: tuple[str, ...]) -> None:
    if "model.backbone.kind=timm" in overrides:
        pytest.importorskip("timm")
    checkpoint, file, said = detector(tmp_path, *overrides), tmp_path / "out" / "d.onnx", []
    assert export(checkpoint, file, [], said.append, picture=picture)
    assert sum(line.startswith("equal on") for line in said) == 2  # at two sizes
    with process("cpu") as proc:
        loaded = load_detector(checkpoint, [], proc)
    model, masks, running = loaded.model, loaded.config.model.masks, session(file)
    counts = []
    for seed, size in enumerate(((64, 64), (70, 101), (33, 180))):
        image = torch.from_numpy(noise(size, seed))
        expected, found = by_torch(model, image, masks=masks), by_onnxruntime(running, image.numpy())
        apart = detection_difference(expected, found, 0.2)
        assert not apart.wrong and (found.masks is not None) == masks, apart.words
        counts.append(apart.count)
    assert max(counts) > 3


def test_a_fixed_size_and_no_masks(tmp_path: Path, picture: Path) -> None:
    file = tmp_path / "d.onnx"
    assert export(detector(tmp_path), file, [], str, picture=picture, size=(64, 96), masks=False)
    running = session(file)
    assert [output.name for output in running.get_outputs()] == ["boxes", "scores", "labels"]
    assert running.get_inputs()[0].shape == [64, 96, 3]
    found = run_onnx(file, np.asarray(Image.open(picture)))
    assert len(found.boxes) and found.boxes[:, 2].max() <= 120 and found.boxes[:, 3].max() <= 90


def test_boxes_are_in_the_pixels_of_the_picture_that_was_given(exported: Path, picture: Path) -> None:
    file = exported / "d.onnx"
    small = np.asarray(Image.open(picture))
    about = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(CLASSES) and json.loads(about["shortest_edge"]) == 64
    assert config_from_dict(yaml.safe_load(about["config"]), "metadata").model.norm.kind == "gn"
    with process("cpu") as proc:
        model = load_detector(exported / "checkpoint-0", [], proc).model
    image = onnx_export.resize_picture(small, (64, 85), True)
    expected = by_torch(model, image, masks=True)
    boxes = expected.boxes * np.tile([120 / 85, 90 / 64], 2)
    assert not detection_difference(expected._replace(boxes=boxes), run_onnx(file, small), 0.2).wrong


def test_a_picture_in_which_nothing_is_found(tmp_path: Path, picture: Path) -> None:
    file = tmp_path / "d.onnx"
    said: list[str] = []
    assert export(detector(tmp_path, "model.box_head.score_threshold=0.9999"), file, [], said.append, picture=picture)
    assert any("nothing was found" in line and "was compared" in line for line in said)  # not taken for equality
    found = run_onnx(file, np.asarray(Image.open(picture)))
    assert found.boxes.shape == (0, 4) and found.masks.shape == (0, 28, 28)


def test_a_file_that_differs_is_not_written(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "d.onnx"
    right = onnx_export.OnePicture.forward

    def wrong(self: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boxes, *others = right(self, image)
        return boxes + 0.02, *others

    monkeypatch.setattr(onnx_export.OnePicture, "forward", wrong)
    status = main(["export", str(detector(tmp_path)), "--onnx", str(file), "--picture", str(picture)])
    assert status == 1 and list(tmp_path.glob("d.onnx*")) == []
    said = capsys.readouterr().out
    assert "mismatch on" in said and "boxes within 0.02 px" in said and f"{file}: not written" in said


def test_another_detectors_file_is_a_mismatch(exported: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with process("cpu") as proc:
        other = load_detector(detector(tmp_path, seed=1), [], proc)
    assert not compare_with_torch(
        other, exported / "d.onnx", [torch.from_numpy(noise((64, 80)))], "noise", True, said.append
    )
    assert "found by only one of the two" in said[0]


def test_a_damaged_weight_and_a_file_that_does_not_load_are_mismatches(exported: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with process("cpu") as proc:
        mine = load_detector(exported / "checkpoint-0", [], proc)
    damaged = onnx.load(exported / "d.onnx")
    bias = next(tensor for tensor in damaged.graph.initializer if tensor.name.endswith("mask_head.logits.bias"))
    values = np.frombuffer(bias.raw_data, np.float32) + np.float32(0.01)
    bias.raw_data = values.tobytes()
    onnx.save(damaged, tmp_path / "damaged.onnx")
    (tmp_path / "cut.onnx").write_bytes((exported / "d.onnx").read_bytes()[:1_000_000])
    image = torch.from_numpy(noise((64, 80)))
    assert compare_with_torch(mine, exported / "d.onnx", [image], "noise", True, said.append)
    assert not compare_with_torch(mine, tmp_path / "damaged.onnx", [image], "noise", True, said.append)
    assert not compare_with_torch(mine, tmp_path / "cut.onnx", [image], "noise", True, said.append)
    assert "masks 0.0025" in said[1]  # a quarter of the bias, where sigmoid is steepest
    assert "cannot run it" in said[2]


def one(**changes: object) -> Found:
    """Return one detection, a box of 10 x 10 pixels, with these fields changed."""
    found = Found(
        np.array([[0, 0, 10, 10]], np.float32), np.array([0.9], np.float32), np.array([1]),
        np.full((1, 28, 28), 0.5, np.float32),
    )  # fmt: skip
    return found._replace(**changes)


NOTHING = Found(one().boxes[:0], one().scores[:0], one().labels[:0], one().masks[:0])
WRONG = {
    "a box too far": one(boxes=one().boxes + np.float32(0.011)),
    "a score too far": one(scores=one().scores - np.float32(1.1e-4)),
    "another label": one(labels=np.array([2])),
    "a mask too far": one(masks=one().masks + np.float32(1.1e-3)),
    "no masks": one(masks=None),
    "NaN box": one(boxes=one().boxes * np.float32(np.nan)),
    "NaN score": one(scores=one().scores * np.float32(np.nan)),
    "NaN mask": one(masks=one().masks * np.float32(np.nan)),
    "nothing": NOTHING,
    "one too many": Found(*(np.concatenate([a, b]) for a, b in zip(one(), one(boxes=one().boxes + 5), strict=True))),
}


@pytest.mark.parametrize("found", WRONG.values(), ids=WRONG.keys())
def test_more_than_rounding_is_a_mismatch(found: Found) -> None:
    assert detection_difference(one(), found, 0.05).wrong
    assert detection_difference(found, one(), 0.05).wrong or "NaN" in str(found)


def test_rounding_is_no_mismatch_nor_is_a_detection_at_the_threshold() -> None:
    near = one(boxes=one().boxes + np.float32(0.009), scores=one().scores + np.float32(9e-5))
    assert not detection_difference(one(), near, 0.05).wrong
    assert not detection_difference(NOTHING, one(scores=np.array([0.05005], np.float32)), 0.05).wrong
    assert detection_difference(NOTHING, one(scores=np.array([np.nan], np.float32)), 0.05).wrong


def test_a_detector_trained_in_float64_is_exported_in_float32(tmp_path: Path, picture: Path) -> None:
    assert export(detector(tmp_path, "train.precision=float64"), tmp_path / "d.onnx", [], str, picture=picture)


def test_pictures_that_cannot_be_read_are_skipped_and_reported(tmp_path: Path) -> None:
    cfg, said = load_config(write_config(tmp_path), [f"out={tmp_path / 'run'}"]), []
    Image.fromarray(noise((40, 60))).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"no picture")
    images = [{"id": i, "file_name": name, "height": 40, "width": 60} for i, name in enumerate(["a.png", "b.png"], 1)]
    about = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "val.json").write_text(json.dumps(about))
    val = [f"data.root={tmp_path}", "data.val.kind=coco", "data.val.annotations=val.json", "data.val.images=."]
    cfg = with_overrides(cfg, val, "test")
    pictures, name = onnx_export.candidate_pictures(cfg, None, said.append)
    assert [image.shape for image in pictures] == [(40, 60, 3)] and "val.json" in name and said == []
    (tmp_path / "b.png").unlink()
    pictures, name = onnx_export.candidate_pictures(cfg, None, said.append)
    assert len(pictures) == onnx_export.TRIED and name == "drawn shapes" and "b.png" in said[0]


def test_another_models_sort_is_written_as_before(exported: Path) -> None:
    class Sorted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(1, True).values

    x, buffer = torch.rand(1, 5), io.BytesIO()
    torch.onnx.export(Sorted(), (x,), buffer, dynamo=False, opset_version=17)
    running = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = running.run(None, {running.get_inputs()[0].name: x.numpy()})
    assert (found == x.sort(1, True).values.numpy()).all()


def test_another_file_or_array_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"uint8 \(40, 60\), expected uint8 \(height, width, 3\)"):
        run_onnx(exported / "d.onnx", noise((40, 60))[..., 0])
    with pytest.raises(DataError, match="float64"):
        run_onnx(exported / "d.onnx", noise((40, 60)) / 255)
    with pytest.raises(CheckpointError, match=r"nowhere\.onnx: onnxruntime cannot load it"):
        run_onnx(tmp_path / "nowhere.onnx", noise((40, 60)))
    foreign = onnx.load(exported / "d.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="its metadata lack size; `gndet export` did not write it"):
        run_onnx(tmp_path / "foreign.onnx", noise((40, 60)))


def test_impossible_requests_are_refused_before_anything_is_written(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = detector(tmp_path)
    for opset in (11, 21):
        with pytest.raises(OutputError, match=f"--opset {opset}: expected 17 to 20"):
            export(checkpoint, tmp_path / "d.onnx", [], str, opset=opset)
    with pytest.raises(OutputError, match="is a folder"):
        export(checkpoint, tmp_path, [], str)
    monkeypatch.setattr(onnx_export, "onnx", None)
    with pytest.raises(OutputError, match="pip install onnx onnxruntime"):
        export(checkpoint, tmp_path / "d.onnx", [], str)
    assert list(tmp_path.glob("*.onnx*")) == []


def test_the_reason_of_a_failed_export_is_reported(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def cannot(self: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(image.float())  # an operator that ONNX does not have

    monkeypatch.setattr(onnx_export.OnePicture, "forward", cannot)
    status = main(["export", str(detector(tmp_path)), "--onnx", str(tmp_path / "d.onnx"), "--picture", str(picture)])
    said = capsys.readouterr().err
    assert status == 2 and "cannot write this model as ONNX" in said and "bessel_j0" in said
    assert list(tmp_path.glob("d.onnx*")) == []
