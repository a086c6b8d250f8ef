"""Weight files of other toolkits, written from descriptions of their formats, without gndet's tables of names.

`detector` and `weights` make a small detector with gndet's names; `named` gives its tensors the names, the class order
and the color order of a toolkit. s stage, L level of the pyramid, i block, k convolution, n layer of a head.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig, BoxHeadConfig, FPNConfig, MaskHeadConfig, RPNConfig
from gndet.config.training import SourceConfig
from gndet.modeling.build import build_model
from gndet.weights.read import Source, read_source

NUM_CLASSES = 3
ROWS = {"box_head.cls_score": 1, "box_head.bbox_pred": 4, "mask_head.logits": 1}  # per class
BACKGROUND_FIRST = ("torchvision", "detectron", "detectron_c4", "maskrcnn-benchmark")
ONE_LEVEL = ("detectron2_c4", "detectron2_dc5", "detectron_c4", "mmdetection_c4")
BLUE_FIRST = ("detectron2", "detectron2_backbone", "detectron", "maskrcnn-benchmark", *ONE_LEVEL)
RPN2 = RPNConfig(num_convs=2)  # torchvision's v2
LAST_BLOCK = {2: 2, 3: 3, 4: 5, 5: 2}  # of a ResNet-50
BN_META = """model = dict(backbone=dict(type='ResNet', depth=50, style='pytorch'), rpn_head=dict(bbox_coder=dict(
    target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0])))
img_norm_cfg = dict(\n    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"""
Rules = list[tuple[str, Callable[..., str]]]


def detector(backbone: str, heads: str, box: str = "4conv1fc", depth: int = 50, **changes: object) -> ModelConfig:
    """Return the config of a Mask R-CNN with narrow heads; backbone and heads: the kinds of their norms."""
    return ModelConfig(
        norm=NormConfig(kind=heads),
        backbone=BackboneConfig(depth=depth, norm=NormConfig(kind=backbone)),
        fpn=FPNConfig(channels=32),
        box_head=BoxHeadConfig(kind=box, conv_channels=32, fc_channels=48),
        mask_head=MaskHeadConfig(channels=32),
    ).model_copy(update=changes)


def weights(cfg: ModelConfig, num_classes: int = NUM_CLASSES, seed: int = 0) -> dict[str, Tensor]:
    """Return a model's tensors, filled with random numbers as large as trained ones."""
    with torch.device("meta"):
        shapes = build_model(cfg, num_classes).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, like in shapes.items():
        values = torch.randn(like.shape, generator=generator)
        if key.endswith(("norm.weight", "running_var")):
            state[key] = 0.5 + values.abs()
        else:
            state[key] = values * ((2 / like[0].numel()) ** 0.5 if like.ndim > 1 else 0.1)
        if not like.is_floating_point():
            state[key] = torch.tensor(7)  # num_batches_tracked
    return state


def only(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith(parts)}


def _resnet(prefix: str, stem: str = "", norm: str = "bn") -> Rules:
    """Return torchvision's names, which mmdetection and maskrcnn-benchmark also use."""
    layer = f"{prefix}layer"
    return [
        (r"backbone.stem.conv", lambda: f"{prefix}{stem}conv1"),
        (r"backbone.stem.norm", lambda: f"{prefix}{stem}{norm}1"),
        (r"backbone.res(\d).(\d+).conv(\d).conv", lambda s, i, k: f"{layer}{s - 1}.{i}.conv{k}"),
        (r"backbone.res(\d).(\d+).conv(\d).norm", lambda s, i, k: f"{layer}{s - 1}.{i}.{norm}{k}"),
        (r"backbone.res(\d).(\d+).shortcut.conv", lambda s, i: f"{layer}{s - 1}.{i}.downsample.0"),
        (r"backbone.res(\d).(\d+).shortcut.norm", lambda s, i: f"{layer}{s - 1}.{i}.downsample.1"),
    ]


def _torchvision(norm: str, box: str) -> Rules:
    place = {"conv": 0, "norm": 1}
    fc = {"2fc": ("fc6", "fc7"), "4conv1fc": ("5",)}[box]
    rpn, roi = "rpn.head", "roi_heads"
    return [
        *_resnet("backbone.body."),
        (r"fpn.lateral(\d).(conv|norm)", lambda L, what: f"backbone.fpn.inner_blocks.{L - 2}.{place[what]}"),
        (r"fpn.output(\d).(conv|norm)", lambda L, what: f"backbone.fpn.layer_blocks.{L - 2}.{place[what]}"),
        (r"rpn.convs.(\d).conv", lambda n: f"{rpn}.conv.{n}.0"),
        (r"rpn.objectness", lambda: f"{rpn}.cls_logits"),
        (r"rpn.deltas", lambda: f"{rpn}.bbox_pred"),
        (r"box_head.convs.(\d).(conv|norm)", lambda n, what: f"{roi}.box_head.{n}.{place[what]}"),
        (r"box_head.fcs.(\d)", lambda n: f"{roi}.box_head.{fc[n]}"),
        (r"box_head.(cls_score|bbox_pred)", lambda what: f"{roi}.box_predictor.{what}"),
        (r"mask_head.convs.(\d).(conv|norm)", lambda n, what: f"{roi}.mask_head.{n}.{place[what]}"),
        (r"mask_head.deconv", lambda: f"{roi}.mask_predictor.conv5_mask"),
        (r"mask_head.logits", lambda: f"{roi}.mask_predictor.mask_fcn_logits"),
    ]


def _detectron2(norm: str, box: str, prefix: str = "backbone.bottom_up.") -> Rules:
    own = {"conv": "", "norm": ".norm"}
    rpn, roi = "proposal_generator.rpn_head", "roi_heads"
    return [
        (r"backbone.stem.(conv|norm)", lambda what: f"{prefix}stem.conv1{own[what]}"),
        (r"backbone.res(\d).(\d+).conv(\d).(conv|norm)", lambda s, i, k, w: f"{prefix}res{s}.{i}.conv{k}{own[w]}"),
        (r"backbone.res(\d).(\d+).shortcut.(conv|norm)", lambda s, i, what: f"{prefix}res{s}.{i}.shortcut{own[what]}"),
        (r"fpn.(lateral|output)(\d).(conv|norm)", lambda way, L, what: f"backbone.fpn_{way}{L}{own[what]}"),
        (r"rpn.convs.0.conv", lambda: f"{rpn}.conv"),
        (r"rpn.objectness", lambda: f"{rpn}.objectness_logits"),
        (r"rpn.deltas", lambda: f"{rpn}.anchor_deltas"),
        (r"box_head.convs.(\d).(conv|norm)", lambda n, what: f"{roi}.box_head.conv{n + 1}{own[what]}"),
        (r"box_head.fcs.(\d)", lambda n: f"{roi}.box_head.fc{n + 1}"),
        (r"box_head.(cls_score|bbox_pred)", lambda what: f"{roi}.box_predictor.{what}"),
        (r"mask_head.convs.(\d).(conv|norm)", lambda n, what: f"{roi}.mask_head.mask_fcn{n + 1}{own[what]}"),
        (r"mask_head.deconv", lambda: f"{roi}.mask_head.deconv"),
        (r"mask_head.logits", lambda: f"{roi}.mask_head.predictor"),
    ]


def _mmdetection(norm: str, box: str) -> Rules:
    module = {"conv": "conv", "norm": norm}
    roi = "roi_head"
    return [
        *_resnet("backbone.", norm=norm),
        (r"fpn.lateral(\d).(conv|norm)", lambda L, what: f"neck.lateral_convs.{L - 2}.{module[what]}"),
        (r"fpn.output(\d).(conv|norm)", lambda L, what: f"neck.fpn_convs.{L - 2}.{module[what]}"),
        (r"rpn.convs.0.conv", lambda: "rpn_head.rpn_conv"),
        (r"rpn.objectness", lambda: "rpn_head.rpn_cls"),
        (r"rpn.deltas", lambda: "rpn_head.rpn_reg"),
        (r"box_head.convs.(\d).(conv|norm)", lambda n, what: f"{roi}.bbox_head.shared_convs.{n}.{module[what]}"),
        (r"box_head.fcs.(\d)", lambda n: f"{roi}.bbox_head.shared_fcs.{n}"),
        (r"box_head.cls_score", lambda: f"{roi}.bbox_head.fc_cls"),
        (r"box_head.bbox_pred", lambda: f"{roi}.bbox_head.fc_reg"),
        (r"mask_head.convs.(\d).(conv|norm)", lambda n, what: f"{roi}.mask_head.convs.{n}.{module[what]}"),
        (r"mask_head.deconv", lambda: f"{roi}.mask_head.upsample"),
        (r"mask_head.logits", lambda: f"{roi}.mask_head.conv_logits"),
    ]


def _maskrcnn_benchmark(norm: str, box: str) -> Rules:
    sequence = {"conv": ".0", "norm": ".1"} if norm == "gn" else {"conv": ""}  # with GN a layer is a sequence
    extractor, predictor = "roi_heads.{}.feature_extractor".format, "roi_heads.{}.predictor".format
    return [
        *_resnet("backbone.body.", stem="stem."),
        (r"fpn.lateral(\d).(conv|norm)", lambda L, what: f"backbone.fpn.fpn_inner{L - 1}{sequence[what]}"),
        (r"fpn.output(\d).(conv|norm)", lambda L, what: f"backbone.fpn.fpn_layer{L - 1}{sequence[what]}"),
        (r"rpn.convs.0.conv", lambda: "rpn.head.conv"),
        (r"rpn.objectness", lambda: "rpn.head.cls_logits"),
        (r"rpn.deltas", lambda: "rpn.head.bbox_pred"),
        (r"box_head.convs.(\d).conv", lambda n: f"{extractor('box')}.xconvs.{(0, 3, 6, 9)[n]}"),
        (r"box_head.convs.(\d).norm", lambda n: f"{extractor('box')}.xconvs.{(1, 4, 7, 10)[n]}"),
        (r"box_head.fcs.(\d)", lambda n: f"{extractor('box')}.{('fc6', 'fc7')[n]}"),
        (r"box_head.(cls_score|bbox_pred)", lambda what: f"{predictor('box')}.{what}"),
        (r"mask_head.convs.(\d).(conv|norm)", lambda n, what: f"{extractor('mask')}.mask_fcn{n + 1}{sequence[what]}"),
        (r"mask_head.deconv", lambda: f"{predictor('mask')}.conv5_mask"),
        (r"mask_head.logits", lambda: f"{predictor('mask')}.mask_fcn_logits"),
    ]


def _detectron(norm: str, box: str) -> Rules:
    blob = {"conv": "", "norm": f"_{norm}"}
    mask = "_mask_fcn" if norm == "gn" else "_[mask]_fcn"
    return [
        (r"backbone.stem.conv", lambda: "conv1"),
        (r"backbone.stem.norm", lambda: {"bn": "res_conv1_bn", "gn": "conv1_gn"}[norm]),
        (
            r"backbone.res(\d).(\d+).conv(\d).(conv|norm)",
            lambda s, i, k, w: f"res{s}_{i}_branch2{' abc'[k]}{blob[w]}",
        ),
        (r"backbone.res(\d).(\d+).shortcut.(conv|norm)", lambda s, i, what: f"res{s}_{i}_branch1{blob[what]}"),
        (r"fpn.lateral5.(conv|norm)", lambda what: f"fpn_inner_res5_{LAST_BLOCK[5]}_sum{blob[what]}"),
        (r"fpn.lateral([234]).(conv|norm)", lambda L, w: f"fpn_inner_res{L}_{LAST_BLOCK[L]}_sum_lateral{blob[w]}"),
        (r"fpn.output(\d).(conv|norm)", lambda L, what: f"fpn_res{L}_{LAST_BLOCK[L]}_sum{blob[what]}"),
        (r"rpn.convs.0.conv", lambda: "conv_rpn_fpn2"),
        (r"rpn.objectness", lambda: "rpn_cls_logits_fpn2"),
        (r"rpn.deltas", lambda: "rpn_bbox_pred_fpn2"),
        (r"box_head.convs.(\d).(conv|norm)", lambda n, what: f"head_conv{n + 1}{blob[what]}"),
        (r"box_head.fcs.(\d)", lambda n: f"fc{n + 6}"),
        (r"box_head.(cls_score|bbox_pred)", lambda what: what),
        (r"mask_head.convs.(\d).(conv|norm)", lambda n, what: f"{mask}{n + 1}{blob[what]}"),
        (r"mask_head.deconv", lambda: "conv5_mask"),
        (r"mask_head.logits", lambda: "mask_fcn_logits"),
    ]


def _detectron2_c4(norm: str, box: str) -> Rules:
    """res5 belongs to the region heads, and there is neither a pyramid nor a layer before the predictors."""
    own = {"conv": "", "norm": ".norm"}
    return [
        (r"backbone.res5.(\d).(conv\d|shortcut).(conv|norm)", lambda i, k, w: f"roi_heads.res5.{i}.{k}{own[w]}"),
        *((pattern.replace(r"res(\d)", r"res([234])"), name) for pattern, name in _detectron2(norm, box, "backbone.")),
    ]


def _detectron_c4(norm: str, box: str) -> Rules:
    """One RPN without the number of a level; res5 has the names that it has in a backbone."""
    rpn = {"convs.0.conv": "conv_rpn", "objectness": "rpn_cls_logits", "deltas": "rpn_bbox_pred"}
    mine: Rules = [(f"rpn.{layer}", lambda name=name: name) for layer, name in rpn.items()]
    return [*mine, *((pattern, name) for pattern, name in _detectron(norm, box) if not pattern.startswith("rpn"))]


def _mmdetection_c4(norm: str, box: str) -> Rules:
    """The fourth stage is a head that the others share."""
    layer, own = "roi_head.shared_head.layer4", {"conv": 0, "norm": 1}
    return [
        (r"backbone.res5.(\d).conv(\d).conv", lambda i, k: f"{layer}.{i}.conv{k}"),
        (r"backbone.res5.(\d).conv(\d).norm", lambda i, k: f"{layer}.{i}.{norm}{k}"),
        (r"backbone.res5.(\d).shortcut.(conv|norm)", lambda i, what: f"{layer}.{i}.downsample.{own[what]}"),
        *((pattern.replace(r"res(\d)", r"res([234])"), name) for pattern, name in _mmdetection(norm, box)),
    ]


def _staged(rules: Callable[[str, str], Rules], places: list[str]) -> Callable[[str, str], Rules]:
    """Add the names of a cascade's stages, whose number follows one of the places."""

    def staged(norm: str, box: str) -> Rules:
        found = rules(norm, box)
        for part in ("box_head", "mask_head"):
            for pattern, name in [rule for rule in found if rule[0].startswith(part)]:

                def in_stage(i: Any, *words: Any, name: Callable[..., str] = name) -> str:
                    start = next(start for start in places if name(*words).startswith(start))
                    return name(*words).replace(start, f"{start}{i}.", 1)

                found.append((pattern.replace(part, rf"{part}.stages.(\d)", 1), in_stage))
        return found

    return staged


RULES: dict[str, Callable[[str, str], Rules]] = {
    "resnet": lambda norm, box: _resnet(""),
    "torchvision": _torchvision,
    "detectron2": _staged(_detectron2, ["roi_heads.box_head.", "roi_heads.box_predictor."]),
    "detectron2_backbone": lambda norm, box: _detectron2(norm, box, prefix=""),
    "mmdetection": _staged(_mmdetection, ["roi_head.bbox_head.", "roi_head.mask_head."]),
    "maskrcnn-benchmark": _maskrcnn_benchmark,
    "detectron": _detectron,
    "detectron2_dc5": lambda norm, box: _detectron2(norm, box, prefix="backbone."),
    "detectron2_c4": _detectron2_c4,
    "detectron_c4": _detectron_c4,
    "mmdetection_c4": _mmdetection_c4,
}


def named(state: dict[str, Tensor], format: str, norm: str = "bn", box: str = "4conv1fc") -> dict[str, Tensor]:
    """Return the tensors as the toolkit names them; norm: bn or gn, a part of some names."""
    rules, result = RULES[format](norm, box), {}
    if format in BLUE_FIRST:
        state = state | {"backbone.stem.conv.weight": state["backbone.stem.conv.weight"].flip(1)}
    if format in BACKGROUND_FIRST:
        state = _background_first(state)
    for key, tensor in state.items():
        layer, _, parameter = key.rpartition(".")
        found = [(match, name) for pattern, name in rules if (match := re.fullmatch(pattern, layer))]
        assert len(found) == 1, layer
        match, name = found[0]
        theirs = name(*(int(group) if group.isdigit() else group for group in match.groups()))
        is_blob = format.startswith("detectron") and not format.startswith("detectron2")
        result[_blob(theirs, parameter, layer) if is_blob else f"{theirs}.{parameter}"] = tensor
    assert len(result) == len(state)
    return result


def _blob(name: str, parameter: str, layer: str) -> str:
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    return f"{name}_{norm[parameter] if layer.endswith('norm') else parameter[0]}"


def _background_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the background to row 0 of the class scores; add an unused row 0 to boxes and masks."""
    result = dict(state)
    for key in [key for key in state if key.rpartition(".")[0] in ROWS]:
        tensor, layer = state[key], key.rpartition(".")[0]
        result[key] = (
            torch.cat([tensor[-1:], tensor[:-1]])
            if layer == "box_head.cls_score"
            else torch.cat([torch.zeros_like(tensor[: ROWS[layer]]), tensor])
        )
    return result


def saved(path: Path, content: Any) -> Path:
    """Write a file with torch.save, or a pickle if the name ends in .pkl."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path)
    return path


def read(path: Path, content: Any, cfg: SourceConfig | None = None) -> Source:
    """Write a file, read it and remove it, because the files are many and large."""
    source = read_source(str(saved(path, content)), cfg or SourceConfig())
    path.unlink()
    return source
