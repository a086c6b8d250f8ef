"""ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2) with a choice of norms: the test network of the conversion.

The parameters have the names of akamaster/pytorch_resnet_cifar10, so that its public BN weights load unchanged.
B images, (H, W) = (32, 32); 3 stages of 3 blocks of 16, 32 and 64 channels; shortcuts have no parameters.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from gndet.modeling.norms.layers import FrozenBatchNorm, GroupNorm
from gndet.weights.convert import convert_batch_norm

BN_EPS = 1e-5  # torch's default, with which these weights were trained
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training pictures of these weights
MakeNorm = Callable[[int], nn.Module]  # channels -> norm


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that strides and pads its channels with zeros (option A of the paper)."""

    def __init__(self, in_channels: int, channels: int, norm: MakeNorm) -> None:
        super().__init__()
        self.stride, self.more = channels // in_channels, (channels - in_channels) // 2
        self.conv1, self.bn1 = conv3x3(in_channels, channels, self.stride), norm(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    def __init__(self, norm: MakeNorm, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 16), norm(16)
        stages = [
            [Block(first, channels, norm), Block(channels, channels, norm), Block(channels, channels, norm)]
            for first, channels in ((16, 16), (16, 32), (32, 64))
        ]
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*blocks) for blocks in stages)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, 32, 32), normalized.  Returns logits (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 64, 8, 8)
        return self.linear(x.mean((2, 3)))


def norm_layers(net: ResNet20) -> dict[str, nn.Module]:
    """Return the norms by name, in forward order."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, FrozenBatchNorm | GroupNorm)}


def group_norm(groups: int = 0, channels_per_group: int = 16) -> MakeNorm:
    """Return a factory of GN with `groups` groups, or else with `channels_per_group` channels per group."""
    return lambda channels: GroupNorm(channels, groups or channels // channels_per_group, 1e-5, masked=True)


def pretrained(folder: Path) -> ResNet20:
    """Return the public network with frozen BN."""
    net = ResNet20(lambda channels: FrozenBatchNorm(channels, BN_EPS, masked=True))
    net.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"))
    return net.eval()


def by_name(source: ResNet20, norm: MakeNorm) -> ResNet20:
    """Return the same network with GN; every tensor goes to the one of the same name."""
    net = ResNet20(norm)
    own = net.state_dict()
    net.load_state_dict({name: tensor for name, tensor in source.state_dict().items() if name in own})
    return net.eval()


def converted(source: ResNet20, norm: MakeNorm, damp: float) -> ResNet20:
    """Return the same network with GN converted from the frozen BN."""
    net = by_name(source, norm)
    for name, layer in norm_layers(net).items():
        bn = source.get_submodule(name)
        new = convert_batch_norm(
            *(bn.weight, bn.bias, bn.running_mean, bn.running_var),
            bn_eps=bn.eps, groups=layer.groups, eps=layer.eps, damp=damp,
        )  # fmt: skip
        layer.weight.data, layer.bias.data, layer.eps = new.gamma, new.beta, new.eps
    return net


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the test pictures (1500, 3, 32, 32), normalized, and their labels (1500,)."""
    with np.load(folder / "cifar10_test_1500.npz") as arrays:
        pixels, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    images = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return images, labels


@torch.no_grad()
def predict(net: nn.Module, images: Tensor) -> Tensor:
    """Return the most probable class of each image (N,)."""
    return torch.cat([net(part).argmax(1) for part in images.split(250)])
