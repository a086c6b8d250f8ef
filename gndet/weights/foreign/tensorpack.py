"""tensorpack's files (examples/FasterRCNN, ImageNetModels), an .npz of TensorFlow's variables, as detectron2's.

The two compute the same with the same weights, as its own convert_d2 shows: only names and axes differ, and the row of
the background, which is the first.  Its GN detectors have no counterpart beyond the backbone: their heads normalize
after the ReLU, and the convolutions before GN have a bias.
"""

import re

from torch import Tensor

from gndet.errors import CheckpointError
from gndet.weights.foreign.files import WeightFile

MARK = "conv0/W"  # every file has a stem
AUTHOR = "tensorpack"
_HEADS = r"(?:fastrcnn|cascade_rcnn_stage(?P<stage>\d)/head)"
_OUTPUTS = r"(?:fastrcnn|fastrcnn/outputs|cascade_rcnn_stage(?P<stage>\d)/outputs)"
RULES = (  # a layer of tensorpack, and detectron2's name with {placeholders}
    (r"conv0", "{maps}stem.conv1"),
    (r"group(?P<group>\d)/block(?P<block>\d+)/conv(?P<conv>\d)", "{prefix}res{level}.{block}.conv{conv}"),
    (r"group(?P<group>\d)/block(?P<block>\d+)/convshortcut", "{prefix}res{level}.{block}.shortcut"),
    (r"fpn/lateral_1x1_c(?P<conv>\d)", "backbone.fpn_lateral{conv}"),
    (r"fpn/posthoc_3x3_p(?P<conv>\d)", "backbone.fpn_output{conv}"),
    (r"rpn/conv0", "proposal_generator.rpn_head.conv"),
    (r"rpn/class", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn/box", "proposal_generator.rpn_head.anchor_deltas"),
    (_HEADS + r"/conv(?P<index>\d)", "roi_heads.box_head.{stage}conv{number}"),
    (_HEADS + r"/fc(?P<fc>\d?)", "roi_heads.box_head.{stage}fc{fc}"),
    (_OUTPUTS + r"/class", "roi_heads.box_predictor.{stage}cls_score"),
    (_OUTPUTS + r"/box", "roi_heads.box_predictor.{stage}bbox_pred"),
    (r"maskrcnn/fcn(?P<index>\d)", "roi_heads.mask_head.mask_fcn{number}"),
    (r"maskrcnn/deconv", "roi_heads.mask_head.deconv"),
    (r"maskrcnn/conv", "roi_heads.mask_head.predictor"),
)
PARAMETERS = {
    "W": "weight", "b": "bias", "bn/gamma": "norm.weight", "bn/beta": "norm.bias", "gn/gamma": "norm.weight",
    "gn/beta": "norm.bias", "bn/mean/EMA": "norm.running_mean", "bn/variance/EMA": "norm.running_var",
}  # fmt: skip


def translated(file: WeightFile, parts: tuple[str, ...] | None) -> WeightFile:
    """Return a file of tensorpack with detectron2's names, axes and rows; a file of another toolkit as it is.

    parts: train.source.parts.  Raises CheckpointError for a GN detector of which more than the backbone is wanted.
    """
    tensors = file.tensors
    if MARK not in tensors:
        return file
    if parts == ("backbone",):
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(("conv0/", "group"))}
    if normed := [key for key in tensors if re.match(r"(fpn|fastrcnn|cascade_rcnn_stage\d/head|maskrcnn)/gn", key)]:
        raise CheckpointError(
            f"{file.path}: {normed[0]}: tensorpack's pyramid and heads with GN compute something that gndet does not: "
            "a bias before GN, and GN after the ReLU; its backbone can be read: train.source.parts=[backbone]"
        )
    has_rpn, has_pyramid = (any(key.startswith(f"{part}/") for key in tensors) for part in ("rpn", "fpn"))
    maps = "" if not has_rpn else "backbone.bottom_up." if has_pyramid else "backbone."
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, parameter = _split(key)
        name = _named(layer, maps, on_regions=has_rpn and not has_pyramid)
        if name is None or parameter not in PARAMETERS or not tensor.ndim:
            result[key] = tensor
            continue
        value = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.t() if tensor.ndim == 2 else tensor
        if name.endswith("cls_score"):
            value = value.roll(-1, 0)  # the background's row is first in tensorpack
        if name.endswith("bbox_pred") and len(value) > 4:
            value = value[4:]  # the background has a box, too
        result[f"{name}.{PARAMETERS[parameter]}"] = value.contiguous()
    return WeightFile(file.path, result, {**file.extras, "__author__": AUTHOR})


def _split(key: str) -> tuple[str, str]:
    """Split the name of a variable into its layer and its parameter, a key of PARAMETERS."""
    match = re.fullmatch(r"(.+?)/((?:[bg]n/)?[^/]+(?:/EMA)?)", key)
    return (match[1], match[2]) if match else (key, "")


def _named(layer: str, maps: str, *, on_regions: bool) -> str | None:
    """Return detectron2's name of a layer; None if it has none.  on_regions: res5 belongs to the heads (C4)."""
    for pattern, name in RULES:
        if match := re.fullmatch(pattern, layer):
            found = match.groupdict("")
            level = int(found.get("group") or 0) + 2
            values = {
                "maps": maps, "prefix": "roi_heads." if on_regions and level == 5 else maps, "level": level,
                "block": found.get("block"), "number": int(found.get("index") or 0) + 1,
                "stage": f"{int(found['stage']) - 1}." if found.get("stage") else "",
                "fc": int(found.get("fc") or 6) - 5,
                "conv": found.get("conv"),
            }  # fmt: skip
            return name.format(**values)
    return None
