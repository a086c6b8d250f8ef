"""VGG-16 (Simonyan & Zisserman 2015), with a norm after each convolution (Wu & He 2018, 4.1) and C2..C5 as results.

B images, C channels, (H, W) canvas.  Where a map has an odd side, pooling rounds up, as in a ResNet: torchvision rounds
down, which differs only for pictures whose sides 32 does not divide.
Batch independence: masked norms leave zeros in the padding, which do not change a maximum after a ReLU; after other
activations, pooling excludes the padding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.modeling.conv_norm import ConvNorm, choose_ways, conv_factory, initialize
from gndet.modeling.image_model import Backbone, Rectified
from gndet.modeling.norms.valid_area import ValidAreas, below_all, clear_padding
from gndet.modeling.recompute import tower

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels: configuration D
STRIDES = (1, 2, 4, 8, 16)  # of the maps in a stage; its pooling doubles it


class VGG(Backbone):
    """The backbone; `channels` holds the channel counts of C2..C5, at strides 4, 8, 16, 32."""

    channels = tuple(stage[-1] for stage in STAGES[1:])

    def __init__(self, cfg: BackboneConfig, norm: NormConfig) -> None:
        super().__init__()
        self.masked, self.clamps = norm.masked, not norm.replaces_relu
        conv, before = conv_factory(norm), 64
        self.stem = conv(3, before, 3)
        for number, widths in enumerate(STAGES, start=1):
            layers = []
            for width in widths[1:] if number == 1 else widths:  # the first of all is the stem
                layers.append(conv(before, width, 3))
                before = width
            self.add_module(f"stage{number}", nn.ModuleList(layers))
        initialize(self)
        self.freeze(cfg.freeze_at)

    def stages(self) -> list[nn.ModuleList]:
        """Return the five stages; the stem belongs to the first."""
        return [getattr(self, f"stage{number}") for number in range(1, 6)]

    def rectified(self) -> Rectified:
        """Return all layers, in the order they run."""
        return Rectified([part for part in self.modules() if isinstance(part, ConvNorm)], [])

    def choose_convolutions(self, shortest_edge: int) -> None:
        """Choose the fastest way of each convolution on a CPU, for pictures with that shortest edge in pixels."""
        for stage, stride in zip(self.stages(), STRIDES, strict=True):
            choose_ways(stage, shortest_edge / stride)

    def freeze(self, freeze_at: int) -> None:
        """Stop training the stem and the first stage (freeze_at 1), and the stages up to the one of that number."""
        self.stop_training([self.stem, *self.stages()][: freeze_at + 1 if freeze_at else 0])

    def forward(self, x: Tensor, areas: ValidAreas, keys: Tensor | None = None) -> list[Tensor]:
        """Map x (B, 3, H, W) to C2..C5, as `Backbone.forward`; keys have no effect."""
        x = self.stem(x, areas[1])
        features = []
        for stage, stride in zip(self.stages(), STRIDES, strict=True):
            x = tower(stage, x, [areas[stride]] * len(stage))
            x = below_all(x, areas[stride]) if self.masked and not self.clamps else x
            x = F.max_pool2d(x, 2, ceil_mode=True)
            x = clear_padding(x, areas[2 * stride]) if self.masked else x
            features.append(x)
        return features[1:]
