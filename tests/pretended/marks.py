"""Marks of the tests on a pretended GPU: where they run, and for which detectors."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from faults.tiny import CONFIG

from gndet.config.loading import config_from_dict
from gndet.errors import ConfigError
from gndet.modeling.build import DETECTORS
from gndet.ops.nms_kernels import triton


def version(module: Any) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


needs_no_gpu = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/training/test_gpu.py uses the real GPU"),
    pytest.mark.skipif(triton is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),  # copy.deepcopy does
]
runs_kernels = pytest.mark.skipif(
    triton is not None and version(triton) < (3, 7) and version(np) >= (2, 4),
    reason="the interpreter of Triton 3.6 and before needs NumPy < 2.4",
)


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the options of each detector, with masks and without, as far as its config allows them.

    And of Mask R-CNN on one level.
    """
    for name, masks in product(DETECTORS, (True, False)):
        model = {"detector": name, "masks": masks, "dense": {"positives": 20}}
        try:
            config_from_dict(CONFIG | {"model": CONFIG["model"] | model}, "test")
        except ConfigError:
            continue
        yield f"{name}{'' if masks else '-boxes'}", model
    for neck in ("c4", "dc5"):
        yield f"mask_rcnn-{neck}", {"neck": neck, "backbone": {"depth": 50}}


def each_detector(*, slowly: bool = False) -> pytest.MarkDecorator:
    """Run a test for the options of each detector as `model`; slowly: all but the first are slow; retinanet always is.

    RetinaNet runs the code of fcos.
    """
    names = [name for name, _ in variants()]
    marks = [[pytest.mark.slow] if (slowly and i) or "retinanet" in name else [] for i, name in enumerate(names)]
    return pytest.mark.parametrize(
        "model",
        [pytest.param(model, id=name, marks=mark) for (name, model), mark in zip(variants(), marks, strict=True)],
    )
