"""Presets of `model.compat`: conventions in which detection toolkits differ but which their weights do not record.

A preset provides defaults; options that a config sets itself take precedence. Sources: torchvision 0.29
models/detection (anchor_utils, rpn, roi_heads); detectron2 config/defaults and modeling/poolers; mmdetection
configs/_base_/models; Detectron core/config, modeling/generate_anchors and utils/boxes. A Detectron box ends at the
index of its last pixel; a gndet box ends at that pixel's far edge, one further, and Detectron's pooling leaves this
pixel out. All of them assign a box to level floor(4 + log2(side / 224)).
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "torchvision": {
        "rpn": {
            "anchors": "rounded", "anchor_stride": "canvas", "anchors_in_padding": True, "min_size": 1e-3,
            "post_nms_train": 2000, "loss_beta": 1 / 9,
        },
        "box_head": {"roi_align": "unaligned", "sampling_ratio": 2, "min_size": 1e-2, "loss_beta": 1 / 9},
        "mask_head": {"roi_align": "unaligned", "sampling_ratio": 2, "targets": "soft", "paste": "rounded"},
    },
    "detectron2": {
        "rpn": {"anchors_in_padding": True},
        "box_head": {"sampling_ratio": 0},
        "mask_head": {"sampling_ratio": 0},
    },
    "mmdetection": {
        "rpn": {"anchors_in_padding": True},
        "box_head": {"sampling_ratio": 0},
        "mask_head": {"sampling_ratio": 0},
    },
    "detectron": {
        "rpn": {
            "anchors": "detectron", "anchors_in_padding": True, "straddling_anchors": False, "clip": "pixels",
            "post_nms_train": 2000, "loss_beta": 1 / 9,
        },
        "box_head": {"roi_align": "detectron", "sampling_ratio": 2, "clip": "pixels", "loss_beta": 1.0},
        "mask_head": {"roi_align": "detectron", "sampling_ratio": 2, "paste": "detectron"},
    },
}  # fmt: skip

_ONE_LEVEL = {"pre_nms_train": 12000, "pre_nms_test": 6000, "post_nms_train": 2000}
NECKS: dict[str, dict[str, Any]] = {  # by model.neck: detectron2's Base-RCNN-C4.yaml and Base-RCNN-DilatedC5.yaml
    "c4": {"rpn": _ONE_LEVEL, "box_head": {"kind": "res5", "pool_size": 14}, "mask_head": {"num_convs": 0}},
    "dc5": {"rpn": _ONE_LEVEL, "box_head": {"kind": "2fc"}},
}

DATA: dict[str, dict[str, Any]] = {  # options of the section `data` in checkpoints that `gndet convert` writes
    "torchvision": {"antialias": False, "exact_canvas": False},
    "detectron2": {"exact_canvas": False},
    "mmdetection": {"antialias": False, "exact_canvas": False},
    "detectron": {"antialias": False, "exact_canvas": False},
}


def without_conventions(model: dict[str, Any], presets: dict[str, dict[str, Any]] = PRESETS) -> dict[str, Any]:
    """Return the section `model` of a resolved config without the options of any preset, so another one can apply."""
    result = dict(model)
    for preset in presets.values():
        for part, options in preset.items():
            result[part] = {key: value for key, value in result.get(part, {}).items() if key not in options}
    return result


def beneath(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults that values lacks, section by section.  Returns a new dict."""
    merged = dict(values)
    for key, default in defaults.items():
        value = values.get(key, {} if isinstance(default, dict) else default)
        if isinstance(default, dict) and hasattr(value, "model_dump"):
            value = value.model_dump(exclude_unset=True)
        merged[key] = beneath(default, value) if isinstance(default, dict) and isinstance(value, dict) else value
    return merged
