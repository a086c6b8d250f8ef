"""Presets of `model.compat`: conventions in which detection toolkits differ but which their weights do not record.

A preset provides defaults; options that a config sets itself take precedence. Sources: torchvision 0.29
models/detection (anchor_utils, rpn, roi_heads); detectron2 config/defaults and modeling/poolers; mmdetection
configs/_base_/models; Detectron core/config, modeling/generate_anchors and utils/boxes. A Detectron box ends at the
index of its last pixel; a gndet box ends at that pixel's far edge, one further, and Detectron's pooling leaves this
pixel out. All of them assign a box to level floor(4 + log2(side / 224)).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gndet.config.section import MAX_EDGE

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


class Convention(NamedTuple):
    """Defaults that a choice brings; options that a config sets itself take precedence."""

    chosen: dict[str, str]  # options of the section `model`, and the values that they must all have
    defaults: dict[str, dict[str, Any]]  # by section of `model`

    def applies(self, model: Mapping[str, Any]) -> bool:
        """Return whether the section `model` of a config, as in its file, makes the choice."""
        return all(model.get(option) == value for option, value in self.chosen.items())


TOOLKITS = tuple(Convention({"compat": toolkit}, defaults) for toolkit, defaults in PRESETS.items())

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


def without(conventions: Iterable[Convention], model: dict[str, Any]) -> dict[str, Any]:
    """Return the section `model` of a resolved config without the options of conventions, so that others can apply."""
    result = dict(model)
    for convention in conventions:
        for part, options in convention.defaults.items():
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
