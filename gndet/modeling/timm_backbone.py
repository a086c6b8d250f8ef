"""Any convolutional network of timm (https://github.com/huggingface/pytorch-image-models) as a backbone.

B images, C channels, (H, W) canvas.  timm is imported only if a config asks for it.

Batch independence: `traced.py` rewrites the network so that padding does not enter, and `check` shows, before a run
starts, that a picture's maps are the same alone and in a batch; a network that cannot do that is refused.
"""

import copy
import importlib
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.errors import ConfigError
from gndet.modeling.image_model import Backbone, Rectified
from gndet.modeling.norms.layers import make_norm
from gndet.modeling.norms.valid_area import ValidAreas, picture_areas
from gndet.modeling.recompute import recomputed
from gndet.modeling.traced import NormAct, Tracer, rewrite

NAME = re.compile(r"[a-z]\w*(\.\w+)?")  # regnety_016.tv2_in1k: an architecture, and which weights
REPLACED = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.SyncBatchNorm)  # with timm's subclasses
STRIDES = (4, 8, 16, 32)  # of C2..C5
CHECKED = ((70, 52), (45, 90))  # heights and widths of the pictures of the check [pixels]
CANVAS = 96  # side of the canvas that they share [pixels]
TOLERANCE = 1e-8  # relative (L2); rounding in float64 stays below 1e-12


def timm_network(name: str) -> nn.Module:
    """Build a network of timm by its name, with random weights; nothing is downloaded.

    Raises ConfigError if timm is missing or has no such network.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ConfigError("kind: timm needs timm: pip install timm") from None
    if not NAME.fullmatch(name) or not timm.is_model(name):
        near = timm.list_models(f"{name.partition('_')[0]}*")[:6] if NAME.fullmatch(name) else []
        raise ConfigError(f"name: timm has no network {name!r}{'; near it: ' * bool(near)}{', '.join(near)}")
    try:
        network: nn.Module = timm.create_model(name, pretrained=False)
    except RuntimeError as error:  # no such weights: what follows the dot of the name
        raise ConfigError(f"name: timm has no network {name!r}: {error}") from None
    return network


@cache
def norm_of(name: str) -> NormConfig | None:
    """Return the norm of a network of timm that gndet replaces; None if it has none (ConvNeXt).  Raises as above."""
    with torch.device("meta"):
        network = timm_network(name)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            return NormConfig(kind="gn", groups=module.num_groups, eps=module.eps, padding="plain")
        if isinstance(module, REPLACED):
            return NormConfig(kind="bn", eps=module.eps, padding="plain")
    return None


class TimmBackbone(Backbone):
    """The backbone; `channels` holds the channel counts of C2..C5, at strides 4, 8, 16, 32.

    `net` is timm's network without what C5 does not need; its parameters have timm's names, except that each norm is
    the `norm` of a NormAct.
    """

    def __init__(self, cfg: BackboneConfig, norm: NormConfig) -> None:
        """Build the network with the norms of the config instead of its BN and GN; its LayerNorms stay.

        Raises ConfigError if timm is missing, if it has no such network, if the norm does not fit its channels, or if
        the network does not give maps at strides 4 to 32.
        """
        super().__init__()
        self.name, self.masked, self.memory = cfg.name, norm.masked, "fast"
        self.net = timm_network(cfg.name)
        _replace_norms(self.net, norm, keep_gamma=cfg.zero_init_last_gamma)
        for module in self.net.modules():  # what a segment takes must still be there when it is recomputed
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
        layers = importlib.import_module("timm.layers")
        tracer = Tracer(layers.is_notrace_module, layers.get_notrace_functions())
        try:
            program = rewrite(self.net, tracer, _features(self.net), self.masked)
        except Exception as error:  # what torch.fx raises for a network that computes by values
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"name: {cfg.name} does not give maps at strides 4, 8, 16 and 32 that gndet can use ({reason[0]}); "
                "choose a convolutional network, like regnety_016, resnext50_32x4d or efficientnet_b0"
            ) from None
        self.segments, self.layers, self._rectified = program.segments, program.layers, program.rectified
        self.channels = program.channels
        _prune(self.net, set(self.layers), "")
        self.freeze(cfg.freeze_at)

    def forward(self, x: Tensor, areas: ValidAreas, keys: Tensor | None = None) -> list[Tensor]:
        """Map x (B, 3, H, W) to C2..C5, as `Backbone.forward`; keys have no effect."""
        features: list[Tensor] = []
        for segment in self.segments:
            x, *found = self._run(segment, x, areas)
            features += found
        return features

    def _run(self, segment: Callable[..., Any], x: Tensor, areas: ValidAreas) -> Any:
        """Run a segment; keep its convolutions' results (balanced) or nothing (lean) for the backward pass."""
        function = partial(segment, self.net)
        return recomputed(self, function, x, areas, keep=torch.ops.aten.convolution.default)

    def timm_names(self) -> dict[str, str]:
        """Return timm's names of the entries of `state_dict`, by gndet's."""
        norms = {f"net.{name}.norm" for name, module in self.net.named_modules() if isinstance(module, NormAct)}
        names = {}
        for key in self.state_dict():
            layer, _, parameter = key.rpartition(".")
            own = layer.removesuffix(".norm") if layer in norms else layer
            names[key] = f"{own}.{parameter}".removeprefix("net.")
        return names

    def rectified(self) -> Rectified:
        """Return the modules that end with a ReLU, in the order they run."""
        return Rectified([self.net.get_submodule(name) for name in self._rectified], [])

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Leave the convolutions to torch."""

    def freeze(self, freeze_at: int) -> None:
        """Stop training the layers before stride 4 (freeze_at 1) and those up to C{freeze_at} (2 to 5)."""
        names = [name for name, level in self.layers.items() if level <= freeze_at]
        modules, parameters = dict(self.net.named_modules()), dict(self.net.named_parameters(remove_duplicate=False))
        for name in names:
            if name in parameters:  # not a buffer, like the filters of resnetblur50
                parameters[name].requires_grad_(False)
        self.stop_training([modules[name] for name in names if name in modules])

    def check(self) -> None:
        """Show on two small pictures that a picture's maps are a function of that picture alone.

        The parameters of a copy are drawn at random, in float64, because an initial gamma of 0 would hide a layer.
        Raises ConfigError that names the network and the first map that depends on the batch.
        """
        if not self.masked:
            return
        for level, difference in enumerate(self.differences(), start=2):
            if not difference < TOLERANCE:  # NaN is no pass
                self._refuse(f"C{level} of a picture differs by {difference:.1e} when others are in its batch")

    @torch.no_grad()
    def differences(self) -> list[float]:
        """Return by how much C2..C5 of a picture depend on its batch: the largest relative difference (L2) of two."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            probe = copy.deepcopy(self).to("cpu", torch.float64)
            for parameter in probe.parameters():
                if parameter.numel() == max(parameter.shape, default=1):  # gamma, beta, the scale of a layer
                    parameter.uniform_(0.5, 1.5)
            pictures = [torch.randn(1, 3, *size, dtype=torch.float64) for size in CHECKED]
        canvas = torch.zeros(len(CHECKED), 3, CANVAS, CANVAS, dtype=torch.float64)
        for row, picture in zip(canvas, pictures, strict=True):
            row[:, : picture.shape[2], : picture.shape[3]] = picture[0]
        largest = [0.0] * len(STRIDES)
        try:
            together = probe(canvas, picture_areas(torch.tensor(CHECKED), CANVAS, CANVAS, True))
            for i, picture in enumerate(pictures):
                alone = probe(picture, picture_areas(torch.tensor(CHECKED[i : i + 1]), *CHECKED[i], False))
                for level, (small, large) in enumerate(zip(alone, together, strict=True)):
                    whole = torch.zeros_like(large[i])  # the padding must be zero
                    whole[:, : small.shape[2], : small.shape[3]] = small[0]
                    largest[level] = max(largest[level], float((large[i] - whole).norm() / small.norm()))
        except (RuntimeError, TypeError) as error:
            self._refuse(
                f"it cannot compute pictures of {' and '.join('x'.join(map(str, s)) for s in CHECKED)} ({error})"
            )
        return largest

    def _refuse(self, why: str) -> None:
        raise ConfigError(
            f"model.backbone.name: {self.name}: an image's features would depend on its batch or on padding: {why}; "
            "choose another network, or accept this with model.backbone.norm={..., padding: plain}"
        )


def _features(net: nn.Module) -> list[str]:
    """Return the names of the modules that give C2..C5, as timm states them."""
    info: Any = net.feature_info
    stages = {stage["reduction"]: stage["module"] for stage in (info if isinstance(info, list) else info.info)}
    return [stages[stride] for stride in STRIDES]


def _replace_norms(net: nn.Module, norm: NormConfig, *, keep_gamma: bool) -> None:
    """Put the config's norm, with the old activation, in the place of each BN, GN and IN."""
    for name, old in list(net.named_modules()):
        if isinstance(old, REPLACED):
            channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
            new = make_norm(norm, channels)
            gamma = getattr(new, "weight", None)
            if keep_gamma and isinstance(gamma, nn.Parameter) and old.weight is not None:
                gamma.data.copy_(old.weight.data)
            dropped = getattr(old, "drop", nn.Identity())
            act = getattr(old, "act", nn.Identity())
            net.set_submodule(
                name, NormAct(new, act if isinstance(dropped, nn.Identity) else nn.Sequential(dropped, act))
            )


def _prune(module: nn.Module, used: set[str], prefix: str) -> None:
    """Delete the children and parameters of a module that are not used."""
    for name, child in list(module.named_children()):
        path = prefix + name
        if path not in used:
            if any(each.startswith(f"{path}.") for each in used):
                _prune(child, used, f"{path}.")
            else:
                delattr(module, name)
    for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if prefix + name not in used:
            delattr(module, name)
