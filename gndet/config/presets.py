"""Presets of `model.compat`: conventions in which detection toolkits differ but which their weights do not record.

A preset provides defaults; options that a config sets itself take precedence. Sources: torchvision 0.29
models/detection (anchor_utils, rpn, roi_heads); detectron2 config/defaults and modeling/poolers; mmdetection
configs/_base_/models; Detectron core/config, modeling/generate_anchors and utils/boxes. A Detectron box ends at the
index of its last pixel; a gndet box ends at that pixel's far edge, one further, and Detectron's pooling leaves this
pixel out. All of them assign a box to level floor(4 + log2(side / 224)).
"""

from typing import Any

from gndet.config.section import MAX_EDGE

PRESETS: dict[str, dict[str, Any]] = {
    "torchvision": {
        "rpn": {
            "anchors": "rounded", "anchor_stride": "canvas", "anchors_in_padding": True, "min_size": 1e-3,
            "post_nms_train": 2000, "loss_beta": 1 / 9,
        },
        "box_head": {"roi_align": "unaligned", "sampling_ratio": 2, "min_size": 1e-2, "loss_beta": 1 / 9},
        "mask_head": {"roi_align": "unaligned", "sampling_ratio": 2, "targets": "soft", "paste": "rounded"},
        "dense": {
            "anchors": "rounded", "anchor_stride": "canvas", "anchors_in_padding": True, "offset": 0.0,
            "box_weight": 1.0, "weigh_by_centerness": False, "positives": "image",
        },
    },
    "detectron2": {
        "rpn": {"anchors_in_padding": True},
        "box_head": {"sampling_ratio": 0},
        "mask_head": {"sampling_ratio": 0},
        "dense": {
            "anchors_in_padding": True, "box_weight": 1.0, "weigh_by_centerness": False, "nms_boxes": "whole",
        },
    },
    "mmdetection": {
        "rpn": {"anchors_in_padding": True},
        "box_head": {"sampling_ratio": 0},
        "mask_head": {"sampling_ratio": 0},
        "dense": {"anchors_in_padding": True},
    },
    "detectron": {
        "rpn": {
            "anchors": "detectron", "anchors_in_padding": True, "straddling_anchors": False, "clip": "pixels",
            "post_nms_train": 2000, "loss_beta": 1 / 9,
        },
        "box_head": {"roi_align": "detectron", "sampling_ratio": 2, "clip": "pixels", "loss_beta": 1.0},
        "mask_head": {"roi_align": "detectron", "sampling_ratio": 2, "paste": "detectron"},
        "dense": {"anchors_in_padding": True},
    },
}  # fmt: skip

DETECTOR_DEFAULTS: dict[str, dict[str, Any]] = {  # options with other defaults for a model.detector
    "retinanet": {
        "dense": {
            "conv_bias": False, "assign": "iou", "anchor_sizes": (32, 64, 128, 256, 512),
            "scales": (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), "aspect_ratios": (0.5, 1.0, 2.0), "offset": 0.0,
            "quality": "none", "box_loss": "l1", "box_weight": 1.0, "weigh_by_centerness": False, "nms_threshold": 0.5,
        },
    },
}  # fmt: skip
_ONE_LEVEL = {"pre_nms_train": 12000, "pre_nms_test": 6000, "post_nms_train": 2000}
NECKS: dict[str, dict[str, Any]] = {  # by model.neck: detectron2's Base-RCNN-C4.yaml and Base-RCNN-DilatedC5.yaml
    "c4": {"rpn": _ONE_LEVEL, "box_head": {"kind": "res5", "pool_size": 14}, "mask_head": {"num_convs": 0}},
    "dc5": {"rpn": _ONE_LEVEL, "box_head": {"kind": "2fc"}},
}
# added to a preset for neck: c4, because only Detectron's FPN configs state a ratio: e2e_mask_rcnn_R-50-C4_1x has the
# default of core/config, 0. detectron2 and mmdetection have 0 with every neck.
C4_PRESETS: dict[str, dict[str, Any]] = {
    "detectron": {"box_head": {"sampling_ratio": 0}, "mask_head": {"sampling_ratio": 0}},
}
# added to a preset for detector: cascade_rcnn. Sources: detectron2 configs/Misc/cascade_mask_rcnn_R_50_FPN_1x and
# modeling/roi_heads/cascade_rcnn; mmdetection configs/_base_/models/cascade_mask_rcnn_r50_fpn and models/roi_heads
_CASCADE: dict[str, Any] = {"rpn": {"post_nms_train": 2000}, "box_head": {"class_agnostic": True}}
CASCADE_PRESETS: dict[str, dict[str, Any]] = {
    "gndet": _CASCADE,
    "torchvision": _CASCADE,
    "detectron2": _CASCADE,
    "detectron": _CASCADE,
    "mmdetection": {
        "rpn": {"post_nms_train": 2000, "loss_beta": 1 / 9},
        "box_head": {"class_agnostic": True, "loss_beta": 1.0},
        "cascade": {
            "delta_weights": ((10.0, 5.0), (20.0, 10.0), (1 / 0.033, 1 / 0.067)),
            "loss_weights": (1.0, 0.5, 0.25), "scale_gradient": False, "resample": True, "average": "logits",
            "mask_stages": "each",
        },
    },
}  # fmt: skip

DATA: dict[str, dict[str, Any]] = {  # options of the section `data` in checkpoints that `gndet convert` writes
    "torchvision": {"antialias": False, "exact_canvas": False},
    "detectron2": {"exact_canvas": False},
    "mmdetection": {"antialias": False, "exact_canvas": False},
    "detectron": {"antialias": False, "exact_canvas": False},
}


def edges_of(crop: object) -> dict[str, Any]:
    """Return the edges that data.crop, as in a config file, brings for the options that the file does not have."""
    size = crop.get("size", 224) if isinstance(crop, dict) else None
    if not isinstance(crop, dict) or not isinstance(size, int):
        return {}
    tested = crop.get("size_test")
    edge = round((tested if isinstance(tested, int) else size) * 256 / 224)
    return {"shortest_edge": [size], "shortest_edge_test": min(edge, MAX_EDGE), "max_edge": MAX_EDGE}


def without_conventions(model: dict[str, Any], presets: dict[str, dict[str, Any]] = PRESETS) -> dict[str, Any]:
    """Return the section `model` of a resolved config without the options of any preset, so another one can apply."""
    result = dict(model)
    of_cascades = CASCADE_PRESETS.values() if model.get("detector") == "cascade_rcnn" else ()
    for preset in (*presets.values(), *of_cascades):
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
