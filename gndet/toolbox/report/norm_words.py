"""What is unusual about a run's norm layers, and what to try: norms.jsonl in plain words, the gravest first."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Layer = dict[str, Any]  # of a line of norms.jsonl

FEW = 16  # numbers: the standard deviation of so few is wrong by a fifth, 1 / sqrt(2 n)
SOME = 0.05  # of a layer's groups or channels
MOST = 0.5
GAP = 0.25, 1.0  # worth a word, grave: of means, in stored standard deviations
GAP_STD = 0.25, 0.7  # of standard deviations, |log ratio|: by a quarter, by half
PADDING = 0.1  # of the training batches
ALIKE = 0.9  # |correlation| of channels in one group: they are nearly one channel
FAR = 1.0  # drift: as far as the layer's gamma is long
BATCH_KINDS = ("bn", "sync_bn", "brn")


class NormFinding(NamedTuple):
    """Something unusual; kind: "bad", "warn" or "good"."""

    kind: str
    words: str


def norm_findings(entries: Sequence[dict[str, Any]]) -> list[NormFinding]:
    """Judge the last line of norms.jsonl, the gravest finding first; one that is "good" where there is nothing to say.

    entries: of `read_norms`, one at the least.
    """
    last = entries[-1]
    layers, update = last["layers"], last["update"]
    found = [
        *_broken(layers), *_few_numbers(layers), *_below_eps(layers), *_gamma(layers, update),
        *_batch_statistics(layers, update), *_frozen(layers), *_padding(layers, last.get("padding")), *_alike(layers),
        *_drift(layers, update),
    ]  # fmt: skip
    if not found:
        found = [NormFinding("good", f"nothing unusual in {len(layers)} norm layers after update {update}")]
    return sorted(found, key=lambda finding: finding.kind != "bad")  # the order above stays within a kind


def _named(layers: Sequence[Layer], key: Callable[[Layer], float] | None = None) -> str:
    """Name the layers: the one where `key` is largest, or the first, and how many others."""
    first = max(layers, key=key) if key else layers[0]
    return first["name"] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _more(layer: Layer) -> str:
    """What gives a layer more numbers for its statistics."""
    if layer["groups"] is None:
        return "Larger pictures (data.shortest_edge), or more train.images_per_gpu"
    return f"Fewer groups in model.{layer['name'].partition('.')[0]}.norm, or larger pictures (data.shortest_edge)"


def _broken(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    if broken := [layer for layer in layers if layer["nonfinite"]]:
        yield NormFinding(
            "bad",
            f"{_named(broken)} of {len(layers)}: its input is not finite, and nothing behind it is. Look at nonfinite/ "
            "in the run's folder; a lower train.optimizer.lr, a longer warmup or train.optimizer.clip_grad_norm keep "
            "a run from it",
        )


def _few_numbers(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    if alone := [layer for layer in layers if layer["one_element"]]:
        yield NormFinding(
            "bad",
            f"{_named(alone)}: {'groups' if alone[0]['groups'] else 'batches'} of one number, a channel's map of one "
            f"cell: the result is beta whatever is in the picture. {_more(alone[0])}, or kind: none there",
        )
    few = [layer for layer in layers if layer not in alone and layer["elements"] and layer["elements"] < FEW]
    if few:
        least = min(few, key=lambda layer: layer["elements"])
        cell = "on maps of one cell" if any(layer["one_cell"] for layer in few) else "on small maps"
        yield NormFinding(
            "warn",
            f"{_named(few, lambda layer: -layer['elements'])}: statistics over {least['elements']} numbers at the "
            f"least, {cell}, are mostly noise. {_more(least)}",
        )


def _below_eps(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    low = [layer for layer in layers if (layer["eps_dominated"] or 0) >= SOME and not layer["one_element"]]
    if not low:
        return
    worst = max(low, key=lambda layer: layer["eps_dominated"])
    what = "groups" if worst["groups"] else "channels"
    yield NormFinding(
        "bad" if worst["eps_dominated"] >= MOST else "warn",
        f"{_named(low, lambda layer: layer['eps_dominated'])}: {_percent(worst['eps_dominated'])} of its {what} have a "
        f"variance below eps ({worst['eps']:g}): they are not brought to unit variance but stay near beta. Their "
        "convolution gives nearly nothing: look at what it starts from, lower train.optimizer.weight_decay, or a "
        "smaller model.norm.eps",
    )


def _gamma(layers: Sequence[Layer], update: int) -> Iterator[NormFinding]:
    large = [layer for layer in layers if layer["exploding"]]
    if large:
        worst = max(large, key=_largest)
        yield NormFinding(
            "bad",
            f"{_named(large, _largest)}: gamma has grown to {_largest(worst):.3g}, more than ten times what it was: a "
            "few channels drown the others. Lower train.optimizer.lr, set train.optimizer.clip_grad_norm, or give "
            "gamma a train.optimizer.norm_weight_decay",
        )
    dead = [layer for layer in layers if (layer["dead"] or 0) >= SOME and not (update == 0 and layer["dead"] == 1)]
    if dead:  # at the start a whole layer of zeros is model.backbone.zero_init_last_gamma
        worst = max(dead, key=lambda layer: layer["dead"])
        yield NormFinding(
            "bad" if worst["dead"] >= MOST else "warn",
            f"{_named(dead, lambda layer: layer['dead'])}: gamma of {_percent(worst['dead'])} of its channels is as "
            "good as 0: they give beta and nothing of the picture. train.optimizer.norm_weight_decay should be 0; "
            "channels that died early come of a learning rate or a warmup that is too bold",
        )


def _largest(layer: Layer) -> float:
    """The largest |gamma|; infinite where one is not finite."""
    return max((float("inf") if value is None else abs(value) for value in layer["gamma"]), default=0.0)


def _over(layer: Layer, which: str, limits: tuple[tuple[float, float], tuple[float, float]]) -> int:
    """How far a pair of numbers is over its limits: 0 not, 1 worth a word, 2 grave."""
    pair = [layer.get(f"{which}_mean"), layer.get(f"{which}_std")]
    values = [(value[0] if isinstance(value, list) else value) or 0.0 for value in pair]
    return max(sum(value > limit for limit in two) for value, two in zip(values, limits, strict=True))


def _batch_statistics(layers: Sequence[Layer], update: int) -> Iterator[NormFinding]:
    batch = [layer for layer in layers if layer["kind"] in BATCH_KINDS]
    away = [layer for layer in batch if _over(layer, "gap", (GAP, GAP_STD))]
    if away and update:  # before the first update they say nothing yet
        worst = max(away, key=lambda layer: (_over(layer, "gap", (GAP, GAP_STD)), layer["gap_mean"][0]))
        yield NormFinding(
            "bad" if _over(worst, "gap", (GAP, GAP_STD)) > 1 else "warn",
            f"{worst['name']}" + (f" and {len(away) - 1} more" if len(away) > 1 else "") + f" of {len(batch)}: "
            f"{worst['kind']}'s running statistics are not those of its batches: means lie "
            f"{worst['gap_mean'][0]:.2g} standard deviations away, standard deviations differ by a factor of "
            f"{_factor(worst['gap_std'][0])} (medians over channels). What is evaluated is another network than what "
            "was trained. kind: gn has no running statistics; else more train.images_per_gpu, sync_bn over several "
            "processes, or a smaller model.norm.momentum",
        )
    noisy = [layer for layer in batch if _over(layer, "spread", (GAP, GAP_STD))]
    if noisy:
        worst = max(noisy, key=lambda layer: layer["spread_mean"] or 0)
        yield NormFinding(
            "warn",
            f"{_named(noisy, lambda layer: layer['spread_mean'] or 0)} of {len(batch)}: from one batch of "
            f"train.images_per_gpu to the next the mean of a channel moves by {worst['spread_mean']:.2g} of its "
            "standard deviation: small batches are noise to BN (Wu & He 2018, figure 1). kind: gn does not see them; "
            "else more images at once, or sync_bn",
        )


def _factor(log_ratio: float) -> str:
    return f"{2.718281828**log_ratio:.2g}"


def _frozen(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    frozen = [layer for layer in layers if layer["kind"] == "frozen_bn"]
    away = [layer for layer in frozen if _over(layer, "gap", (GAP, GAP_STD)) > 1]
    if away:
        worst = max(away, key=lambda layer: layer["gap_mean"][0])
        yield NormFinding(
            "warn",
            f"{_named(away, lambda layer: layer['gap_mean'][0])} of {len(frozen)}: the statistics that frozen_bn keeps "
            f"are not those of this data: means lie {worst['gap_mean'][0]:.2g} stored standard deviations away, "
            f"standard deviations differ by a factor of {_factor(worst['gap_std'][0])}. From the first layer on: "
            "pixel_mean, pixel_std or the colours' order are not what the weights were trained with (train.source); "
            "in deep layers: the data is far from theirs; gn adapts (train.norm_policy: calibrate)",
        )


def _padding(layers: Sequence[Layer], padding: float | None) -> Iterator[NormFinding]:
    plain = [layer for layer in layers if not layer["masked"] and not layer["name"].startswith(("box_", "mask_"))]
    if padding is not None and padding >= PADDING and plain:
        yield NormFinding(
            "warn",
            f"{_percent(padding)} of the training batches is padding, and {len(plain)} plain layers take it into their "
            "statistics: an image's features hang on those beside it. model.norm.padding: masked (gn, ln, in), "
            "train.images_per_gpu: 1, or pictures of one size",
        )


def _alike(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    alike = [layer for layer in layers if (layer["similar"][0] or 0) >= ALIKE]
    if alike:
        yield NormFinding(
            "warn",
            f"{_named(alike, lambda layer: layer['similar'][0])}: channels of one group are nearly copies of each "
            f"other (mean |correlation| {max(layer['similar'][0] for layer in alike):.2g}): the layer is wider than "
            "what it carries, or has collapsed",
        )


def _drift(layers: Sequence[Layer], update: int) -> Iterator[NormFinding]:
    known = [layer for layer in layers if layer["trained"] and layer["drift"] and None not in layer["drift"]]
    if update and known and (still := [layer for layer in known if max(layer["drift"]) == 0]):
        yield NormFinding(
            "warn",
            f"{_named(still)}: gamma and beta are trained, and are where they were at the start: no gradient comes "
            "through, or every update was left out",
        )
    far = [layer for layer in known if max(layer["drift"]) > FAR]
    if far:
        yield NormFinding(
            "warn",
            f"{_named(far, lambda layer: max(layer['drift']))}: gamma and beta have moved by "
            f"{max(max(layer['drift']) for layer in far):.2g} times the length gamma had at the start. Right for a "
            "layer that began at random; of pretrained weights little is left: a lower learning rate",
        )
