"""ResNet (He et al. 2016) and ResNeXt (Xie et al. 2017) that return C2..C5. B images, C channels, (H, W) canvas.

R regions, P cells along a side of a region.
Batch independence: masked norms leave zeros in the padding, so that a 3x3 convolution reads beyond a picture what it
reads beyond the canvas, at any dilation.  res5 on regions normalizes each region by itself, which has no padding.
Stochastic depth draws by the image's key.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.modeling.conv_norm import ConvFactory, ConvNorm, choose_ways, conv_factory, initialize
from gndet.modeling.image_model import Backbone, Rectified
from gndet.modeling.norms.valid_area import ValidArea, ValidAreas, below_all, clear_padding
from gndet.modeling.pooling import Window, average_pool
from gndet.modeling.recompute import recomputed, tower
from gndet.ops.matching import kept_by_key
from gndet.ops.noise import Stream

WIDTH = 64  # channels of the stem and of C2's 3x3 convolutions; doubled stage by stage
STRIDES = (4, 8, 16, 32)  # of C2..C5
REGION = 7  # cells along a side of a region in res5
HALVES = Window((2, 2), (2, 2), (0, 0))
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Residual(nn.Module):
    """A residual block: convolutions that are added to a shortcut.

    Stochastic depth (Huang et al. 2016): in training, a `skipped` share of the images, drawn by their keys and the
    block's `number`, get the shortcut alone; the convolutions of the others are divided by 1 - skipped.  So evaluation
    needs no factor, for which the paper multiplies there.  A skipped block is computed as well: shapes stay the same.
    """

    skipped, number = 0.0, 0
    shortcut: ConvNorm | None
    averages: bool

    def add(
        self, layers: list[ConvNorm], x: Tensor, areas: list[ValidArea | None], area_in: ValidArea | None,
        keys: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Run the layers on x (B, C, H, W), add the shortcut and activate; areas: of the layers' results."""
        shortcut = _run_shortcut(self, x, area_in, areas[-1])
        if keys is None or not (self.skipped and self.training):
            return tower(layers, x, areas, shortcut)
        number = torch.full((1,), self.number, device=keys.device)
        kept = kept_by_key(keys, Stream.DEPTH, number, self.skipped)[..., None, None]  # (B, 1, 1, 1)
        y = torch.where(kept, tower(layers, x, areas) / (1 - self.skipped), 0.0)
        return layers[-1].activate(shortcut + y, areas[-1])


class BasicBlock(Residual):
    """Two 3x3 convolutions with a shortcut, for ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, conv: ConvFactory, averages: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride)
        self.conv2 = conv(channels, channels, 3, relu=False, adds=True)
        self.averages = averages and stride > 1
        self.shortcut = _shortcut(in_channels, channels, 1 if averages else stride, conv)

    @property
    def last(self) -> ConvNorm:
        """Return the ConvNorm whose norm may start with gamma 0."""
        return self.conv2

    def forward(
        self, x: Tensor, area_in: ValidArea | None, area: ValidArea | None, keys: Tensor | None = None
    ) -> Tensor:
        """Map x (B, C, H, W) to (B, channels, H/stride, W/stride); area_in, area: of x and of the result."""
        return self.add([self.conv1, self.conv2], x, [area, area], area_in, keys)


class Bottleneck(Residual):
    """1x1, 3x3, 1x1 with a shortcut; the stride is in the 3x3, as in every GN recipe, or in the first 1x1 (MSRA)."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, conv: ConvFactory, stride_in_1x1: bool = False,
        cardinality: int = 1, group_width: int = 64, dilation: int = 1, averages: bool = False,
    ) -> None:  # fmt: skip
        """cardinality, group_width: groups of the 3x3, and their width where channels are 64 (ResNeXt 32x4d: 32, 4).

        dilation: of the 3x3.
        """
        super().__init__()
        self.stride_in_1x1 = stride_in_1x1
        width = channels * group_width // 64 * cardinality
        self.conv1 = conv(in_channels, width, 1, stride=stride if stride_in_1x1 else 1)
        stride_in_3x3 = 1 if stride_in_1x1 else stride
        self.conv2 = conv(width, width, 3, stride=stride_in_3x3, groups=cardinality, dilation=dilation)
        self.conv3 = conv(width, channels * 4, 1, relu=False, adds=True)
        self.averages = averages and stride > 1
        self.shortcut = _shortcut(in_channels, channels * 4, 1 if averages else stride, conv)

    @property
    def last(self) -> ConvNorm:
        """Return the ConvNorm whose norm may start with gamma 0."""
        return self.conv3

    def forward(
        self, x: Tensor, area_in: ValidArea | None, area: ValidArea | None, keys: Tensor | None = None
    ) -> Tensor:
        """Map x (B, C, H, W) to (B, 4 * channels, H/stride, W/stride); area_in, area: of x and of the result."""
        first = area if self.stride_in_1x1 else area_in
        return self.add([self.conv1, self.conv2, self.conv3], x, [first, area, area], area_in, keys)


def _shortcut(in_channels: int, out_channels: int, stride: int, conv: ConvFactory) -> ConvNorm | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return conv(in_channels, out_channels, 1, stride=stride, relu=False)


def _run_shortcut(block: Residual, x: Tensor, area_in: ValidArea | None, area: ValidArea | None) -> Tensor:
    """Return what a block adds to its result; a ResNet-D's averages see the cells of the pictures alone."""
    if block.shortcut is None:
        return x
    if block.averages:
        masked = getattr(block.shortcut.norm, "masked", False)
        x = average_pool(x, HALVES, *((area_in, area) if masked else (None, None)))
    return tower([block.shortcut], x, [area])


class DeepStem(nn.Module):
    """Three 3x3 convolutions instead of one 7x7 (He et al. 2019, "Bag of Tricks", section 4)."""

    def __init__(self, width: int, conv: ConvFactory) -> None:
        super().__init__()
        self.conv1 = conv(3, width // 2, 3, stride=2)
        self.conv2 = conv(width // 2, width // 2, 3)
        self.conv3 = conv(width // 2, width, 3)

    def forward(self, x: Tensor, area: ValidArea | None) -> Tensor:
        """Map x (B, 3, H, W) to (B, width, H/2, W/2); area: of the result."""
        return tower([self.conv1, self.conv2, self.conv3], x, [area] * 3)


class ResNet(Backbone):
    """The backbone; `channels` and `strides` are of C2..C5; its stem has stride 4.

    res5: "map": C5 has stride 32.  "dilated": C5 has stride 16, because res5 does not stride but dilates (DC5).
    "regions": `forward` returns C2..C4 only, and res5 runs on regions of C4, in `on_regions` (He et al. 2016, appendix
    A).  res5 has the same tensors in all three.
    """

    def __init__(
        self, cfg: BackboneConfig, norm: NormConfig, res5: Literal["map", "dilated", "regions"] = "map"
    ) -> None:
        super().__init__()
        self.memory = "fast"
        self.masked, self.clamps = norm.masked, not norm.replaces_relu
        bottleneck = partial(
            Bottleneck, stride_in_1x1=cfg.stride_in_1x1, cardinality=cfg.cardinality, group_width=cfg.group_width
        )
        block = partial(BasicBlock if cfg.depth < 50 else bottleneck, averages=cfg.average_shortcuts)
        expansion = BasicBlock.expansion if cfg.depth < 50 else Bottleneck.expansion
        conv = conv_factory(norm)
        in_channels = width = round(WIDTH * cfg.width)
        self.stem = DeepStem(width, conv) if cfg.stem == "deep" else conv(3, width, 7, stride=2)
        channels = [width * 2**i * expansion for i in range(4)]
        self.strides: tuple[int, ...] = STRIDES
        for i, count in enumerate(BLOCKS[cfg.depth]):
            dilated, on_regions = ((res5 == kind and i == 3) for kind in ("dilated", "regions"))
            conv = conv_factory(norm, regions=on_regions)
            blocks = []
            for j in range(count):
                stride = 2 if i and not j and not dilated else 1
                more: dict[str, Any] = {"dilation": 2} if dilated and (j or cfg.dilated_blocks == "all") else {}
                blocks.append(block(in_channels, width * 2**i, stride, conv, **more))
                in_channels = channels[i]
            self.add_module(f"res{i + 2}", nn.ModuleList(blocks))
        if res5 == "dilated":
            self.strides = (*STRIDES[:3], STRIDES[2])
        elif res5 == "regions":
            self.strides = STRIDES[:3]
        self.channels = tuple(channels[: len(self.strides)])
        self.region_channels = channels[3] if res5 == "regions" else 0
        residuals: list[Any] = [block for stage in self.stages() for block in stage]
        for i, residual in enumerate(residuals):  # from 0 to the rate, as in timm; the paper: from rate / L
            residual.number, residual.skipped = i, cfg.stochastic_depth * i / (len(residuals) - 1)
        self._initialize(cfg.zero_init_last_gamma)
        self.freeze(cfg.freeze_at)

    def _initialize(self, zero_init_last_gamma: bool) -> None:
        """Apply MSRA initialization, and set gamma to 0 in each block's last norm if asked for."""
        initialize(self)
        if zero_init_last_gamma:
            for stage in self.stages():
                for block in stage:
                    gamma = getattr(block.last.norm, "weight", None)
                    if isinstance(gamma, nn.Parameter):  # a frozen gamma of 0 would never grow
                        nn.init.zeros_(gamma)

    def stages(self) -> list[nn.ModuleList]:
        """Return res2..res5."""
        return [getattr(self, f"res{i}") for i in (2, 3, 4, 5)]

    def on_maps(self) -> list[nn.ModuleList]:
        """Return the stages that run on whole maps."""
        return self.stages()[: len(self.strides)]

    def after_maps(self) -> list[nn.ModuleList]:
        """Return the stages that run on regions."""
        return self.stages()[len(self.strides) :]

    def rectified(self) -> Rectified:
        """Return the modules on whole maps and on regions that end with a ReLU, in the order they run."""
        return Rectified(_rectified([self.stem, *self.on_maps()]), _rectified(self.after_maps()))

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""
        for stage, stride in zip(self.on_maps(), self.strides, strict=True):
            choose_ways(stage, shortest_edge / stride)
        for stage in self.after_maps():
            choose_ways(stage, REGION)

    def freeze(self, freeze_at: int) -> None:
        """Stop training the stem (freeze_at 1) and the stages up to res{freeze_at} (Detectron's FREEZE_AT)."""
        parts: list[nn.Module] = [self.stem, *self.stages()]
        self.stop_training(parts[:freeze_at])

    def _stem(self, x: Tensor, areas: ValidAreas) -> Tensor:
        x, area = self.stem(x, areas[2]), areas[2]
        if self.masked and not self.clamps:
            x = below_all(x, area)  # after a ReLU, zeros do not change a maximum
        x = F.max_pool2d(x, 3, 2, 1)
        return clear_padding(x, areas[4]) if self.masked else x

    def forward(self, x: Tensor, areas: ValidAreas, keys: Tensor | None = None) -> list[Tensor]:
        """Map x (B, 3, H, W) to C2..C5 at `strides`, as `Backbone.forward`."""
        x = recomputed(self, self._stem, x, areas, cheap=True)
        features = []
        area = areas[4]
        for stage, stride in zip(self.on_maps(), self.strides, strict=True):
            for block in stage:
                if isinstance(block, BasicBlock):
                    x = recomputed(self, block, x, area, areas[stride], keys)
                else:  # not worth recomputing: a bottleneck's tower keeps only a quarter of its input's size
                    x = block(x, area, areas[stride], keys)
                area = areas[stride]
            features.append(x)
        return features

    @property
    def last_stage(self) -> Callable[[Callable[[], Tensor]], Tensor] | None:
        """What runs the stages of `after_maps` on regions, as `Backbone.last_stage`."""
        return self.on_regions if self.after_maps() else None

    def on_regions(self, pool: Callable[[], Tensor]) -> Tensor:
        """Run the stages of `after_maps` on regions (R, C, P, P) that pool returns; the result has sides ceil(P/2)."""
        return recomputed(self, self._pooled, pool)

    def _pooled(self, pool: Callable[[], Tensor]) -> Tensor:
        x = pool()
        for stage in self.after_maps():
            for block in stage:
                x = block(x, None, None)
        return x


def _rectified(parts: Iterable[nn.Module]) -> list[nn.Module]:
    modules = [module for part in parts for module in part.modules()]
    layers = [module for module in modules if isinstance(module, Residual | ConvNorm)]
    return [layer for layer in layers if not isinstance(layer, ConvNorm) or layer.relu]
