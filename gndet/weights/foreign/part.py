"""What a part of a model states about itself for the files of other toolkits, and how it looks layers up in a file."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from gndet.config.model import ModelConfig
from gndet.config.training import SourceConfig
from gndet.weights.foreign.names import ConvNames, Names, file_key, of_norm, toolkit_of

BACKGROUND_FIRST = ("torchvision", "detectron", "maskrcnn-benchmark")  # toolkits; in the others, and here, it is last
GROUPS = 32  # of GN in the toolkits, unless code chooses another number

Layer = tuple[str, str, str, dict[str, object]]  # config section, gndet's name, name in Names, values of placeholders
Parts = tuple[str, ...]  # sections of the config
State = dict[str, Tensor]  # by gndet's names
Tree = dict[str, Any]  # a model config, with the kinds of norms as norms


class Facts(NamedTuple):
    """What the files of a format assume without stating it."""

    title: str
    bgr: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    msra: bool  # BN backbones have the stride in the 1x1; GN backbones only if gn_msra
    compat: str
    frozen_eps: float = 1e-5
    gn_msra: bool = False
    groups: int = GROUPS
    channels_per_group: int | None = None
    standardized: bool = False  # weight standardization in backbone, pyramid and heads
    standardization: str = "qiao"  # its variant


class Reader(NamedTuple):
    """Look up layers in a file by the names of its format; a layer that the format or the file lacks is None."""

    path: str
    format: str
    names: Names
    tensors: dict[str, Tensor]
    facts: Facts
    stated: SourceConfig  # by the user

    def weight(self, layer: str, **numbers: Any) -> Tensor | None:
        """Return the weight of a layer, or of a convolution with or without a norm."""
        name = self.names.get(layer)
        for template in (name.conv, name.bare) if isinstance(name, ConvNames) else (name,):
            key = file_key(self.format, template.format(**numbers), "weight") if template else ""
            if key in self.tensors:
                return self.tensors[key]
        return None

    def norm(self, layer: str, **numbers: Any) -> str:
        """Return the kind of the norm after a convolution: gn, bn, frozen_bn or none."""
        names = self.names[layer]
        assert isinstance(names, ConvNames)
        for kind in ("bn", "gn"):
            name = names.norm.format(**of_norm(kind), **numbers)
            keys = ("weight", "num_batches_tracked", "running_var")
            weight, counter, var = (file_key(self.format, name, key) in self.tensors for key in keys)
            if weight and counter:
                return "bn"
            if weight:
                return "frozen_bn" if var or (toolkit_of(self.format) == "detectron" and kind == "bn") else "gn"
        return "none"


def _nothing(*arguments: object) -> tuple[()]:
    return ()


class Part(NamedTuple):
    """What gndet knows of a part of a model in the files of other toolkits; what it leaves out, it does not need.

    Parts are the sections that a file or a model holds; a str argument is a format or a toolkit.
    """

    names: dict[str, Names]  # by format, which lists only the layers that its files can hold
    layers: Callable[[ModelConfig], Iterable[Layer]] = _nothing  # in model order
    infer: Callable[[Reader, Tree], Tree] = lambda reader, tree: {}  # adds to the config of the parts before it
    from_file: Callable[[State, ModelConfig, str], object] = _nothing  # puts rows in gndet's order, in place
    to_file: Callable[[State, ModelConfig, str], object] = _nothing  # puts them in the toolkit's order
    describe: Callable[[ModelConfig, Parts], Iterable[str]] = _nothing  # what reading a file assumes
    refusals: Callable[[ModelConfig, Parts, str], Iterable[str]] = _nothing  # why the toolkit cannot build it
    settings: Callable[[ModelConfig, int, str], Iterable[str]] = _nothing  # to make in the toolkit, for K classes
    # sections with options in which a new model of the toolkit differs from the defaults of its model.compat
    defaults: Callable[[ModelConfig, str], Tree] = lambda cfg, toolkit: {}


def new_model(cfg: ModelConfig, toolkit: str, sections: Tree) -> ModelConfig:
    """Return the config of a new model of the toolkit, of the same kind as cfg's; sections: where compat differs."""
    kind = {"neck": cfg.neck, "detector": cfg.detector, "masks": cfg.masks}
    return ModelConfig.model_validate({"compat": toolkit, **kind, **sections})
