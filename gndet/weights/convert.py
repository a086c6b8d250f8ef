"""Replace a trained BN by GN without training: in closed form, then by calibration on a few images.

BN divides by running statistics, GN by the statistics of a sample's groups.  If the two agree, gamma and beta can make
up for every other difference.  The convolutions stay as they are.  B images, C channels, G groups of K = C/G channels.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gndet.config.schema import Config
from gndet.data.batches.batch import sample_batch
from gndet.data.records import Dataset
from gndet.errors import CheckpointError, ConfigError
from gndet.modeling.image_model import ImageModel
from gndet.modeling.norms.valid_area import ValidArea
from gndet.structures import Batch

MEAN_SPREAD = 1 / 3  # of a channel's mean over images, in its sigmas; ResNet-20 on CIFAR-10: 0.28 to 0.36 for K <= 32
VARIANCE_SPREAD = (
    1 / 3
)  # of a group's variance over images, relative; same network: 0.41 for K = 2, 0.31 for 8, 0.22 for 32
MIN_VARIANCE = 1e-6  # of a normalized channel; a slope fitted to less would be noise
MIN_GAMMA = 1e-6  # a smaller gamma means that the channel is switched off, and it stays off
FAR_APART = 0.8  # the report warns if the relative error of a level's features is larger
MEASURED_IMAGES = 4  # to compare a conversion with its original on
CALIBRATION_EDGE = 256  # pixels, upper limit of the shorter edge, because all images run in one batch


class Fate(NamedTuple):
    """What became of a norm layer."""

    what: str  # "as in the file", "converted from bn, damp 1" ...
    expected_error: float | None = None  # of the layer alone, estimated from the file
    measured_error: float | None = None  # on images, including the errors of all layers before it


class Converted(NamedTuple):
    """The parameters of a GN layer that replaces a BN layer."""

    gamma: Tensor  # (C,) float32
    beta: Tensor  # (C,) float32
    eps: float  # of the GN layer, damping included
    expected_error: float  # estimate of ||GN - BN|| / ||BN - its channel means||, given the same input


def convert_batch_norm(
    gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, *, bn_eps: float, groups: int, eps: float, damp: float
) -> Converted:
    """Compute the GN that replaces a BN with stored statistics, from these numbers alone.

    gamma, beta, mean, var (C,): BN's affine map and running statistics; bn_eps: BN's eps, which may be 0;
    groups, eps: GN's; damp: adds damp times the mean variance of the groups to GN's eps, so that GN's divisor changes
    less from sample to sample (0: plain GN).  Computed in float64; a gamma of 0 stays 0.
    The two agree exactly on a sample whose groups have the mean and the variance that the running statistics imply.
    Method: ours; apply the law of total variance to a group's channels and solve for gamma and beta.

    Raises CheckpointError if a number is not finite, a variance is negative, or a variance and bn_eps are both 0 and
    gamma is not.
    """
    gamma, beta, mean, var = (values.detach().double() for values in (gamma, beta, mean, var))
    _check(gamma, beta, mean, var, bn_eps)
    slope = torch.where(gamma == 0, 0.0, gamma * (var + bn_eps).rsqrt())  # (C,)
    group_mean, group_var = group_statistics(mean, var, groups)  # (C,), (C,)
    damped = eps + damp * group_var.mean().item()
    return Converted(
        (slope * (group_var + damped).sqrt()).float(),
        (beta + slope * (group_mean - mean)).float(),
        damped,
        _expected_error(slope, mean, var, groups, damped),
    )


def group_statistics(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean (C,) and variance (C,) of each channel's group, from the mean and variance (C,) of each channel.

    By the law of total variance, a group's variance is the mean of the variances plus the variance of the means.
    """
    means = mean.unflatten(0, (groups, -1))  # (G, K)
    group_mean = means.mean(1, keepdim=True)  # (G, 1)
    group_var = (var.unflatten(0, (groups, -1)) + (means - group_mean).square()).mean(1, keepdim=True)  # (G, 1)
    return group_mean.expand_as(means).flatten(), group_var.expand_as(means).flatten()


def _check(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, bn_eps: float) -> None:
    for name, values in (("gamma", gamma), ("beta", beta), ("running mean", mean), ("running variance", var)):
        if values.shape != gamma.shape:
            raise CheckpointError(f"{name} has shape {list(values.shape)}, expected {list(gamma.shape)} like gamma")
        wrong = ~values.isfinite() | (values < 0) if values is var else ~values.isfinite()  # (C,)
        if wrong.any():
            channel = int(wrong.nonzero()[0])
            expected = "a finite number, 0 or more" if values is var else "a finite number"
            raise CheckpointError(f"{name} of channel {channel} is {values[channel].item()}, expected {expected}")
    undefined = (var + bn_eps == 0) & (gamma != 0)  # (C,)
    if undefined.any():
        channel = int(undefined.nonzero()[0])
        raise CheckpointError(
            f"running variance of channel {channel} is 0 and so is BN's eps, but gamma is {gamma[channel].item()}; "
            "expected a variance or an eps above 0"
        )


def _expected_error(slope: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float) -> float:
    """Estimate a converted layer's relative error from BN's slope, mean and variance (C,) and GN's groups and eps.

    In one image a channel's mean is off by a sigma_c, independently of the other channels, so the mean of its group is
    off by a sqrt(mean_c sigma_c^2 / K).  The group's variance v_g is off by c v_g, so GN's divisor is off by a factor
    of 1 + c/2 v_g/(v_g + eps).  With the channel's second moment about its group's mean,
        error_c^2 = slope_c^2 (a^2 mean_c sigma_c^2 / K + (c/2 v_g/(v_g + eps))^2 (sigma_c^2 + (mu_c - m_g)^2)),
    summed over the channels and divided by sum slope_c^2 sigma_c^2.  The variances of channels move together (an image
    has high or low contrast; correlation 0.45), so c does not fall as 1/sqrt(K), and c/sqrt(K_eff) predicts worse.

    Measured on all layers of a CIFAR-10 ResNet-20, 1 to 16 groups, damp 0, 1 and 4 (264 cases, errors of 0.04 to 0.55),
    the estimate is within a factor of 1.5 for 74 %, of 2 for 97 %, and 2.45 at worst.  It ranks groupings; it ranks
    layers only roughly.
    """
    group_mean, group_var = group_statistics(mean, var, groups)  # (C,), (C,)
    inside = var.unflatten(0, (groups, -1)).mean(1, keepdim=True).expand(groups, len(var) // groups).flatten()  # (C,)
    shift = MEAN_SPREAD**2 * inside * groups / len(var)
    stretch = (VARIANCE_SPREAD / 2 * group_var / (group_var + eps)).square() * (var + (mean - group_mean).square())
    error, deviation = (slope.square() * (shift + stretch)).sum(), (slope.square() * var).sum()
    return 0.0 if error == 0 else (error / deviation).sqrt().item()


def measure_norms(
    model: ImageModel, references: dict[str, nn.Module], fates: dict[str, Fate], cfg: Config,
    images: Dataset | None, *, pyramid: bool,
) -> tuple[dict[str, Fate], list[str]]:  # fmt: skip
    """Compare the converted norms with the file's own on images and, for `calibrate`, fit them.

    references, fates: of the converted layers, by name; pyramid: report the levels of the pyramid as well.
    Returns the fates with measured errors, and lines for the report; without images the fates are unchanged.
    Raises ConfigError if `calibrate` has no images.
    """
    fit = cfg.train.norm_policy == "calibrate"
    if images is None:
        if fit:
            raise ConfigError("train.norm_policy: calibrate needs training images to fit on")
        return fates, []
    batch = sample_batch(images, cfg.data, cfg.train.calibration_images if fit else MEASURED_IMAGES, CALIBRATION_EDGE)
    (layers, stages), count = compare_with_original(model, references, batch, fit=fit), len(batch.images)
    shown = [f"{name} {error:.2f}" for name, error in stages.items() if pyramid or name.startswith("C")]
    lines = [f"features against the file's own norms, relative error on {count} images: {', '.join(shown)}"]
    if max(stages.values()) > FAR_APART and cfg.train.norm_policy != "affine":
        lines.append(
            "warning: the converted features are far from the file's own on these images; are the images like those it "
            "was trained on, with the same pixel_mean and channel order? Larger groups stay closer to the original"
        )
    fitted = f", fitted on {count} images" if fit else ""
    measured = {
        name: fates[name]._replace(what=fates[name].what + fitted, measured_error=error)
        for name, error in layers.items()
    }
    return fates | measured, lines


def compare_with_original(
    model: ImageModel, references: dict[str, nn.Module], batch: Batch, *, fit: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Run a converted model and its original side by side in one doubled batch, whose first half is the original's.

    references: the original norm of each converted layer.  fit: fit gamma and beta of the converted layers, in forward
    order.  Both models use the regions that the original proposes.
    Returns relative errors ||new - old|| / ||old - mean old||, which include those of all layers before: by norm layer,
    and by stage "C2".."C5", "P2".."P6" or "P3".."P7".
    """
    stages: dict[str, float] = {}

    def note(letter: str, module: nn.Module, arguments: object, maps: list[Tensor]) -> None:
        for level, x in enumerate(maps, start=getattr(module, "finest", 2)):
            old, new = x.chunk(2)
            deviation = old - old.mean((0, 2, 3), keepdim=True)
            stages[f"{letter}{level}"] = float((new - old).norm() / deviation.norm().clamp(min=1e-12))

    def run() -> None:
        images, sizes = torch.cat([batch.images] * 2), torch.cat([batch.sizes] * 2)
        model.probe(images, sizes, batch.padded, copies=2, regions=any(map(model.sees_regions, references)))

    with ExitStack() as hooks:
        for name, letter in (("backbone", "C"), ("fpn", "P")):
            if hasattr(model, name):
                hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(note, letter)))
        layers = run_twins(model, references, run, fit=fit)
    return layers, stages


class Twin(nn.Module):
    """Run two norms that share their convolutions: the reference on the first half of a batch, norm on the second.

    norm: a norm with weight and bias; reference: any module that is called like a norm; fit: set the affine map of
    norm by least squares before the first result.
    """

    def __init__(self, norm: nn.Module, reference: nn.Module, *, fit: bool) -> None:
        super().__init__()
        self.norm, self.reference, self.fit = norm, reference, fit
        self.error = self.deviation = 0.0  # sums of (y - t)^2 and of (t - mean_c t)^2, over all calls

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        """Normalize x (2B, C, H, W): B maps of the reference network, then B of the model.  Returns the same shape."""
        assert len(x) % 2 == 0, f"a batch of {len(x)} maps has no halves; expected every image twice"
        old, new = x.chunk(2)
        areas = (None, None) if area is None else tuple(map(ValidArea, *(tensor.chunk(2) for tensor in area)))
        target = self.reference(old, areas[0])  # (B, C, H, W)
        valid = (
            areas[1].mask
            if areas[1] is not None and self.norm.masked
            else target.new_ones((1, 1, 1, 1), dtype=torch.bool)
        )
        if self.fit and len(target):
            _fit(self.norm, new, areas[1], target, valid)
            self.fit = False
        result = self.norm(new, areas[1])  # (B, C, H, W)
        self.error += _sum_squares(result - target, valid)
        self.deviation += _sum_squares(_centered(target, valid)[0], valid)
        return torch.cat([target, result])  # copies: a ReLU in place may follow

    def relative_error(self) -> float:
        """Return ||y - t|| / ||t - mean_c t|| for results y, t of norm and reference; nan before the first call."""
        error, deviation = torch.tensor([self.error, self.deviation], dtype=torch.float64)
        return (error / deviation).sqrt().item()


def run_twins(
    model: nn.Module, references: dict[str, nn.Module], run: Callable[[], None], *, fit: bool
) -> dict[str, float]:
    """Compare a model's norms with those of the network it was converted from, and fit them if asked, in one pass.

    references: by name in model.named_modules(), the original norm, called as (x, area); its parameters do not change.
    run: passes a batch [x; x] (2B images) through the model once.  It is called without gradients and with the model in
    evaluation mode; the first half of the batch passes through the references, the second through the model's norms.
    fit: set gamma and beta of each norm to the least-squares map from its normalized input u to the reference's output
    t over all valid cells, in forward order, so that all earlier norms are already fitted:
        gamma = cov(u, t) / var(u),  beta = mean(t) - gamma mean(u).
    Both stay unchanged if var(u) < MIN_VARIANCE or |gamma| < MIN_GAMMA.  A norm that is called several times, because
    pyramid levels share it or run passes several batches, is fitted at its first call.
    Returns by name ||y - t|| / ||t - mean_c t|| over the valid cells of all calls, after fitting and including the
    errors of earlier layers; nan for a norm that was not called.  Always restores the model's modules and modes.
    Method: ours.
    """
    twins = {name: Twin(model.get_submodule(name), reference, fit=fit) for name, reference in references.items()}
    by_norm = {twin.norm: twin for twin in twins.values()}
    names = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if module in by_norm]
    modes = [(module, module.training) for part in (model, *references.values()) for module in part.modules()]
    try:
        for name, norm in names:
            model.set_submodule(name, by_norm[norm])
        model.eval()
        with torch.no_grad():
            run()
    finally:
        for name, norm in names:
            model.set_submodule(name, norm)
        for module, training in modes:
            module.training = training
    return {name: twin.relative_error() for name, twin in twins.items()}


def _fit(norm: Any, x: Tensor, area: ValidArea | None, target: Tensor, valid: Tensor) -> None:
    """Set the affine map of a norm by least squares, so that its result for x (B, C, H, W) comes closest to target."""
    plain = {"weight": torch.ones_like(norm.weight), "bias": torch.zeros_like(norm.bias)}
    normal = functional_call(norm, plain, (x.to(norm.weight.dtype), area))  # (B, C, H, W)
    normal, normal_mean = _centered(normal, valid)
    target, target_mean = _centered(target.to(normal.dtype), valid)
    var, covariance = _mean(normal.square(), valid), _mean(normal * target, valid)  # (C,), (C,)
    kept = (var < MIN_VARIANCE) | (norm.weight.abs() < MIN_GAMMA)
    gamma = covariance / var  # (C,)
    norm.weight.copy_(torch.where(kept, norm.weight, gamma))
    norm.bias.copy_(torch.where(kept, norm.bias, target_mean - gamma * normal_mean))


def _sum_squares(x: Tensor, valid: Tensor) -> float:
    return torch.where(valid, x, 0.0).square().sum(dtype=torch.float64).item()


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """Return the means (C,) in float64 of x (B, C, H, W) over the cells where valid (B, 1, H, W) is true."""
    count = valid.expand_as(x[:, :1]).sum()
    return torch.where(valid, x, 0.0).sum((0, 2, 3), dtype=torch.float64) / count


def _centered(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (B, C, H, W) minus its channel means, and these means (C,) in float64."""
    mean = _mean(x, valid)
    return x - mean[:, None, None].to(x.dtype), mean
