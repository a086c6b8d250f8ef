"""How toolkits name layers and tensors."""

from functools import partial
from typing import NamedTuple

SUFFIXES = {"weight": "_w", "bias": "_b"}  # of Detectron's convolutions and fully connected layers
NORM_SUFFIXES = {"weight": "_s", "bias": "_b", "running_mean": "_rm", "running_var": "_riv"}  # of its norms


class ConvNames(NamedTuple):
    """The names of a convolution, of its norm, and of the convolution if it has no norm and another name then."""

    conv: str
    norm: str
    bare: str | None = None


def with_endings(conv: str, norm: str, name: str, bare: str | None = None) -> ConvNames:
    """Build the names of a convolution and its norm from a common name and two endings."""
    return ConvNames(name + conv, name + norm, bare)


nested = partial(with_endings, "", ".norm")  # detectron2: the norm is a part of the convolution
sequence = partial(with_endings, ".0", ".1")  # torchvision: a sequence of convolution and norm
module = partial(with_endings, ".conv", ".{norm}")  # mmcv's ConvModule
caffe2 = partial(with_endings, "", "_{norm}")

Names = dict[str, ConvNames | str]  # by layer, with placeholders: {norm} is bn or gn, each part states the others


def toolkit_of(format: str) -> str:
    """Return the toolkit of a format, which may have several of them, like detectron2_c4."""
    return format.partition("_")[0]


def file_key(format: str, layer: str, parameter: str) -> str:
    """Return the key of a layer's parameter ("weight", "bias", "running_mean" ...) in a file of the format."""
    if toolkit_of(format) != "detectron":
        return f"{layer}.{parameter}"
    suffixes = NORM_SUFFIXES if layer.endswith(("_bn", "_gn")) else SUFFIXES
    return layer + suffixes.get(parameter, f"_{parameter}")


def of_norm(kind: str) -> dict[str, str]:
    """Return the values of the placeholders in the names of norms of a kind, bn or gn."""
    return {"norm": kind, "conv1": "res_conv1" if kind == "bn" else "conv1"}
