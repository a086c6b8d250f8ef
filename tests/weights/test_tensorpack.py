"""tensorpack's .npz files: written here from its own names, read into the same network; damaged ones are refused."""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import NUM_CLASSES, named, weights
from torch import Tensor

from gndet.config.cascade import CASCADE
from gndet.config.model import ModelConfig
from gndet.config.training import SourceConfig
from gndet.errors import CheckpointError
from gndet.modeling.build import build_model
from gndet.weights.foreign.files import read_weights
from gndet.weights.read import Source, read_source

CLASSES = ("ant", "bee", "cow")
NORM = {"weight": "gamma", "bias": "beta", "running_mean": "mean/EMA", "running_var": "variance/EMA"}
AXES = {4: (2, 3, 1, 0), 2: (1, 0)}  # of detectron2's weights in tensorpack's, by their number
LAYERS = (  # detectron2's name, tensorpack's
    (r"(?:backbone\.bottom_up|backbone|roi_heads)\.res(\d)\.(\d+)\.(?:conv(\d)|shortcut)", None),
    (r"backbone\.(?:bottom_up\.)?stem\.conv1", "conv0"),
    (r"backbone\.fpn_lateral(\d)", r"fpn/lateral_1x1_c\1"),
    (r"backbone\.fpn_output(\d)", r"fpn/posthoc_3x3_p\1"),
    (r"proposal_generator\.rpn_head\.conv", "rpn/conv0"),
    (r"proposal_generator\.rpn_head\.objectness_logits", "rpn/class"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn/box"),
    (r"roi_heads\.mask_head\.deconv", "maskrcnn/deconv"),
    (r"roi_heads\.mask_head\.predictor", "maskrcnn/conv"),
)


def layer_of(name: str, kind: str) -> str:
    """Return tensorpack's name of detectron2's layer; kind: fpn, 4conv1fc, c4 or cascade."""
    for pattern, theirs in LAYERS:
        if match := re.fullmatch(pattern, name):
            if theirs is not None:
                return match.expand(theirs)
            conv = f"conv{match[3]}" if match[3] else "convshortcut"
            return f"group{int(match[1]) - 2}/block{match[2]}/{conv}"
    if match := re.fullmatch(r"roi_heads\.mask_head\.mask_fcn(\d)", name):
        return f"maskrcnn/fcn{int(match[1]) - 1}"
    match = re.fullmatch(r"roi_heads\.box_(head|predictor)\.(?:(\d)\.)?(conv|fc|cls_score|bbox_pred)(\d?)", name)
    assert match, name
    stage = f"cascade_rcnn_stage{int(match[2]) + 1}" if match[2] else "fastrcnn"
    if match[1] == "head":
        inside = f"{stage}/head" if match[2] else stage
        number = int(match[4])
        if match[3] == "conv":
            return f"{inside}/conv{number - 1}"
        return f"{inside}/fc" if kind == "4conv1fc" else f"{inside}/fc{number + 5}"
    outputs = stage if kind == "c4" else f"{stage}/outputs"
    return f"{outputs}/{ {'cls_score': 'class', 'bbox_pred': 'box'}[match[3]] }"


def as_tensorpack(file: dict[str, Tensor], kind: str) -> dict[str, np.ndarray]:
    """Return a file of detectron2 with tensorpack's names, axes and rows."""
    result = {"global_step": np.asarray(7)}
    for key, tensor in file.items():
        layer, _, parameter = key.rpartition(".")
        value = tensor.numpy()
        if layer.endswith("predictor.cls_score") or re.search(r"predictor\.\d\.cls_score", layer):
            value = np.concatenate([value[-1:], value[:-1]])
        if layer.endswith("bbox_pred") and len(value) > 4:
            value = np.concatenate([value[:4], value])  # a box of the background
        if value.ndim > 1:
            value = value.transpose(AXES[value.ndim])
        if layer.endswith(".norm"):
            norm = "bn" if f"{layer}.running_var" in file else "gn"
            name = f"{layer_of(layer.removesuffix('.norm'), kind)}/{norm}/{NORM[parameter]}"
        else:
            name = f"{layer_of(layer, kind)}/{ {'weight': 'W', 'bias': 'b'}[parameter] }"
        result[name] = value
    return result


def model_of(kind: str, norm: str) -> ModelConfig:
    tree = {
        "norm": {"kind": "none"}, "backbone": {"norm": {"kind": norm}}, "fpn": {"channels": 32},
        "box_head": {"kind": "2fc", "conv_channels": 32, "fc_channels": 48}, "mask_head": {"channels": 32},
    }  # fmt: skip
    if kind == "c4":
        tree |= {"neck": "c4"}
    if kind == "cascade":
        tree |= {"detector": "cascade_rcnn"}
        tree["box_head"] |= CASCADE.defaults["box_head"]
    if kind == "4conv1fc":
        tree["box_head"]["kind"] = kind
    return ModelConfig.model_validate(tree)


def read(
    path: Path, arrays: dict[str, np.ndarray], cfg: SourceConfig | None = None, compressed: bool = False
) -> Source:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    source = read_source(str(path), cfg or SourceConfig(classes=CLASSES))
    path.unlink()
    return source


@pytest.mark.parametrize(
    ("kind", "norm", "compressed"),
    [
        ("fpn", "frozen_bn", True),
        ("4conv1fc", "frozen_bn", False),
        ("c4", "gn", False),
        ("cascade", "frozen_bn", False),
    ],
)
def test_every_tensor_of_a_detector_comes_over(tmp_path: Path, kind: str, norm: str, compressed: bool) -> None:
    cfg = model_of(kind, norm)
    state = weights(cfg)
    rules = "detectron2_c4" if kind == "c4" else "detectron2"
    file = as_tensorpack(named(state, rules, "gn", cfg.box_head.kind), kind)
    assert file["conv0/W"].shape == (7, 7, 3, 64) and len(file["rpn/class/b"]) == (15 if kind == "c4" else 3)
    source = read(tmp_path / "model.npz", file, compressed=compressed)
    assert (source.num_classes, source.classes, source.unused) == (NUM_CLASSES, CLASSES, ["global_step"])
    assert source.state.keys() == state.keys()
    assert all(torch.equal(source.state[key], value) for key, value in state.items())
    model = source.model
    assert (model.compat, model.neck) == ("gndet", "c4" if kind == "c4" else "fpn")
    assert (model.pixel_mean, model.pixel_std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert model.detector == ("cascade_rcnn" if kind == "cascade" else "mask_rcnn") and not model.backbone.stride_in_1x1
    assert "read as tensorpack file" in source.notes[0] and "BGR, converted to RGB" in source.notes[0]
    build_model(model, NUM_CLASSES).load_state_dict(source.state, strict=True)


@pytest.mark.parametrize("norm", ["gn", "frozen_bn"])
def test_a_classifier_gives_its_backbone(tmp_path: Path, norm: str) -> None:
    cfg = model_of("fpn", norm)
    state = {key: value for key, value in weights(cfg).items() if key.startswith("backbone.")}
    file = as_tensorpack(named(state, "detectron2", "gn", "2fc"), "fpn")
    source = read(tmp_path / "ImageNet-R50.npz", file | {"linear/W": np.zeros((2048, 10), np.float32)}, SourceConfig())
    assert (source.parts, source.model.backbone.norm.kind) == (("backbone",), norm)
    assert all(torch.equal(source.state[key], value) for key, value in state.items())


def test_of_a_gn_detector_only_the_backbone_is_read(tmp_path: Path) -> None:
    cfg = model_of("fpn", "gn")
    state = weights(cfg)
    file = as_tensorpack(named(state, "detectron2", "gn", "2fc"), "fpn") | {"fpn/gn_c2/gamma": np.ones(32, np.float32)}
    with pytest.raises(
        CheckpointError, match=r"fpn/gn_c2/gamma: .*a bias before GN.* train\.source\.parts=\[backbone\]"
    ):
        read(tmp_path / "model.npz", file)
    source = read(tmp_path / "model.npz", file, SourceConfig(parts=("backbone",)))
    assert source.parts == ("backbone",) and source.model.part_norms()["backbone"].kind == "gn"
    assert torch.equal(source.state["backbone.stem.conv.weight"], state["backbone.stem.conv.weight"])


def npz(path: Path, name: str, content: bytes, **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr(name, content)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_hostile_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    ones = npy(np.ones(4, np.float32))
    cases = {
        "far more than the file's": (npy(np.zeros(1_000_000, np.float32)), {"compression": zipfile.ZIP_DEFLATED}),
        "damaged or truncated: ValueError": (ones.replace(b"(4,)", b"(9,)"), {}),
        "damaged or truncated": (ones[:20], {}),
        "a.npz": (npy(np.array([print], dtype=object)), {}),  # a pickle
        "NaN or infinite values": (npy(np.array([np.nan], np.float32)), {}),
    }
    for words, (content, options) in cases.items():
        with pytest.raises(CheckpointError, match=words):
            read_weights(npz(path, "conv0/W.npy", content, **options))
    found = read_weights(npz(path, "conv0/b.npy", npy(np.arange(6, dtype=">f8").reshape(2, 3, order="F"))))
    assert torch.equal(found.tensors["conv0/b"], torch.arange(6.0).view(3, 2).t())


def test_a_scalar_in_place_of_a_layer_is_refused(tmp_path: Path) -> None:
    state = {key: value for key, value in weights(model_of("fpn", "gn")).items() if key.startswith("backbone.")}
    file = as_tensorpack(named(state, "detectron2", "gn", "2fc"), "fpn")
    for key in ("fastrcnn/outputs/class/W", "fastrcnn/outputs/box/b", "group0/block0/conv1/W"):
        with pytest.raises(CheckpointError, match=r"model\.npz"):
            read(tmp_path / "model.npz", file | {key: np.asarray(1.0, np.float32), "rpn/conv0/b": np.ones(4)})
