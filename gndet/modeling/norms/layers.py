"""The normalization layers, and the one place that turns a config's `norm` into layers.

All but FRN, EvoNorm-S0 and none compute y = gamma (x - mu) / sqrt(var + eps) + beta with gamma and beta per channel.
They differ in the set over which mu and var are taken (Wu & He 2018, section 3).  FRN and EvoNorm-S0 subtract no mean.
x is (B, C, H, W), or a video's (B, C, T, H, W); G groups.

The images of a batch share a canvas.  A *masked* layer takes its statistics over each picture alone and leaves zeros in
the padding, so that an image's features do not depend on its batch; `area=None` means that nothing is padded, as must
be so for videos.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from gndet.config.norm import NormConfig
from gndet.errors import ConfigError
from gndet.modeling.norms.activating import Affine, EvoNormS0, FilterResponseNorm, ThresholdLinear
from gndet.modeling.norms.group_norm import Normalize
from gndet.modeling.norms.triton_kernels import usable
from gndet.modeling.norms.valid_area import ValidArea, along, checked, clear_padding

ONE_VALUE = {  # what BN says of a map with one value per channel, by whether it trains
    True: "train.images_per_gpu: 1 with such a small picture leaves BN one value per channel, which has no variance; "
    "compute more images at once, use larger pictures (data.shortest_edge, data.crop.size), or model.norm.kind: gn",
    False: "evaluation.images_per_gpu: 1 with such a small picture leaves BN one value per channel, which has no "
    "variance; compute more images at once, or leave out evaluation.batch_statistics",
}


class GroupNorm(nn.Module):
    """GN: statistics per sample, over (H, W) and the C/G channels of a group (Wu & He 2018, eq. 7).

    groups = 1 is LN (over C, H, W), groups = C is IN (over H, W of one channel).

    After a conversion from BN, `eps` may differ from layer to layer (weights/convert.py); if it is not the config's,
    the state dict holds it as the tensor "eps".
    """

    def __init__(self, channels: int, groups: int, eps: float, masked: bool) -> None:
        super().__init__()
        self.groups, self.eps, self.config_eps, self.masked = groups, eps, eps, masked
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        """Normalize x (B, C, H, W); area: of the pictures, or None.  Same shape and type; statistics in float32."""
        area = checked(area, x) if self.masked else None
        with torch.autocast(x.device.type, enabled=False):
            if area is None and not usable(x):
                wide = x.to(self.weight.dtype)
                # F.group_norm would refuse a group of one value, although only in a batch of one
                return torch.group_norm(wide, self.groups, self.weight, self.bias, self.eps).to(x.dtype)
            fields = (None, None) if area is None else area
            return Normalize.apply(x, *fields, self.weight, self.bias, self.groups, self.eps)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.eps != self.config_eps:
            # on the weights' device: a process group that has only NCCL cannot broadcast a CPU tensor
            destination[prefix + "eps"] = torch.tensor(self.eps, dtype=torch.float64, device=self.weight.device)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        eps = state.pop(prefix + "eps", None)  # torch passes a copy of the dict
        self.eps = self.config_eps if eps is None else float(eps)
        super()._load_from_state_dict(state, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{self.groups} groups, {len(self.weight)} channels, eps={self.eps}, masked={self.masked}"


class BatchNorm(nn.BatchNorm2d):
    """BN: statistics over (B, H, W) of one channel; running averages at test time (Ioffe & Szegedy 2015).

    Raises ConfigError for one value per channel where it takes the batch's statistics: one value has no variance.
    """

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        if (self.training or self.running_mean is None) and x[:, 0].numel() == 1:
            raise ConfigError(ONE_VALUE[self.training])
        return super().forward(x)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in (4, 5):
            raise ValueError(f"expected maps (B, C, H, W) or (B, C, T, H, W), got {x.dim()} dimensions")


class SyncBatchNorm(BatchNorm):
    """SyncBN: BN's statistics over (B, H, W) of all ranks; plain BN in a single process.

    Uses torch.distributed's differentiable all-reduce, so that it runs with gloo on CPUs as well as with NCCL on GPUs.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        wide = x.to(self.running_mean.dtype)
        dims = (0, *range(2, x.dim()))
        total = all_reduce(torch.cat([wide.sum(dims), wide.new_full((1,), x[:, 0].numel())]))
        n = total[-1]
        mean = total[:-1] / n  # (C,)
        centered = wide - along(mean, x)
        var = all_reduce(centered.square().sum(dims)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1).clamp(min=1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * along(scale, x) + along(self.bias, x)).to(x.dtype)


class FrozenBatchNorm(nn.Module):
    """Frozen BN: an affine map from stored statistics, gamma and beta, none of which is trained."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float, masked: bool) -> None:
        super().__init__()
        self.eps, self.masked = eps, masked
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        scale, shift = stored_map(self)
        y = torch.addcmul(along(shift, x).to(x.dtype), x, along(scale, x).to(x.dtype))
        return clear_padding(y, checked(area, x)) if self.masked else y


def stored_map(norm: FrozenBatchNorm | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift (C,) of each channel, from a norm's stored statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class BatchRenorm(BatchNorm):
    """BRN: BN's statistics over (B, H, W), corrected toward the running ones by r and d (Ioffe 2017, algorithm 1).

    The limits grow as in section 4.2 of the paper: r_max from 1 to 3 between steps 5,000 and 40,000, d_max from 0 to 5
    between 5,000 and 25,000; before step 5,000 this is BN.  A step is one forward pass in training.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = (0, *range(2, x.dim()))
        var, mean = torch.var_mean(x.to(self.running_mean.dtype), dims, correction=0)  # (C,)
        std = (var + self.eps).sqrt()
        with torch.no_grad():
            running_std = (self.running_var + self.eps).sqrt()
            step = self.num_batches_tracked.float() - 5_000
            r_max = 1 + 2 * (step / 35_000).clamp(0, 1)
            d_max = 5 * (step / 20_000).clamp(0, 1)
            r = (std / running_std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / running_std).clamp(-d_max, d_max)
            n = x[:, 0].numel()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / max(n - 1, 1), self.momentum)
        scale = self.weight * r / std
        shift = self.bias + self.weight * d - mean * scale
        return (x * along(scale, x) + along(shift, x)).to(x.dtype)


class NoNorm(nn.Module):
    """none: no statistics, gamma or beta; the convolution before it has a bias."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        return clear_padding(x, checked(area, x)) if self.masked else x


def _num_groups(cfg: NormConfig, channels: int) -> int:
    """Return the number of groups.  Raises ConfigError if they do not divide the channels."""
    groups = cfg.groups if cfg.channels_per_group is None else max(channels // cfg.channels_per_group, 1)
    if channels % groups or (cfg.channels_per_group and channels % cfg.channels_per_group):
        fitting = [g for g in range(1, channels + 1) if channels % g == 0]
        wanted = (
            f"groups: {groups}" if cfg.channels_per_group is None else f"channels_per_group: {cfg.channels_per_group}"
        )
        raise ConfigError(
            f"norm {wanted} does not divide {channels} channels; these do: {', '.join(map(str, fitting))}"
        )
    return groups


# The norms by name.  To add one, add an entry here and its name to NormConfig.kind in config/norm.py.
NORMS: dict[str, Callable[[NormConfig, int], nn.Module]] = {
    "gn": lambda cfg, channels: GroupNorm(channels, _num_groups(cfg, channels), cfg.eps, cfg.masked),
    "ln": lambda cfg, channels: GroupNorm(channels, 1, cfg.eps, cfg.masked),
    "in": lambda cfg, channels: GroupNorm(channels, channels, cfg.eps, cfg.masked),
    "bn": lambda cfg, channels: BatchNorm(channels, cfg.eps, cfg.momentum),
    "sync_bn": lambda cfg, channels: SyncBatchNorm(channels, cfg.eps, cfg.momentum),
    "frozen_bn": lambda cfg, channels: FrozenBatchNorm(channels, cfg.eps, cfg.masked),
    "brn": lambda cfg, channels: BatchRenorm(channels, cfg.eps, cfg.momentum),
    "frn": lambda cfg, channels: FilterResponseNorm(channels, cfg.eps, cfg.masked),
    "evonorm_s0": lambda cfg, channels: EvoNormS0(channels, _num_groups(cfg, channels), cfg.eps, cfg.masked),
    "none": lambda cfg, channels: NoNorm(cfg.masked),
}


def make_norm(cfg: NormConfig, channels: int) -> nn.Module:
    """Build the norm layer of a config for feature maps with that many channels.

    Call the layer with x (B, C, H, W) and a ValidArea or None.  Raises ConfigError if the groups do not divide the
    channels.
    """
    return NORMS[cfg.kind](cfg, channels)


NormModule = GroupNorm | nn.BatchNorm2d | FrozenBatchNorm | FilterResponseNorm | EvoNormS0
NORM_LAYERS = (GroupNorm, nn.BatchNorm2d, FrozenBatchNorm, FilterResponseNorm, EvoNormS0)  # with gamma and beta
PER_CHANNEL = (*NORM_LAYERS, ThresholdLinear, Affine)  # all of whose parameters are one number per channel
