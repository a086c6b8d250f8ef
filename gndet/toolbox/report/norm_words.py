"""What is unusual about a run's norm layers, and what to try: norms.jsonl in plain words, the most serious first."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

Layer = dict[str, Any]  # of an entry of norms.jsonl

FEW = 16  # numbers: the standard deviation of so few is off by a fifth, 1 / sqrt(2 n)
SOME = 0.05  # of a layer's groups or channels
MOST = 0.5
GAP = 0.25, 1.0  # worth a warning, bad: of means, in stored standard deviations
GAP_STD = 0.25, 0.7  # of standard deviations, |log ratio|: by a quarter, by half
PADDING = 0.1  # of the training batches
SIMILAR = 0.9  # |correlation| of channels in a group: they are nearly one channel
FAR = 1.0  # drift: as far as the layer's gamma is long
BATCH_KINDS = ("bn", "sync_bn", "brn")


class NormFinding(NamedTuple):
    """Something unusual; kind: "bad", "warn" or "good"."""

    kind: str
    words: str


def norm_findings(entries: Sequence[dict[str, Any]]) -> list[NormFinding]:
    """Judge the last entry of norms.jsonl, the most serious finding first; a "good" one where nothing is unusual.

    entries: one or more, of `read_norms`.
    """
    last = entries[-1]
    layers, update = last["layers"], last["update"]
    found = [
        *_broken(layers), *_few_numbers(layers), *_below_eps(layers), *_gamma(layers, update),
        *_batch_statistics(layers, update), *_frozen(layers), *_padding(layers, last.get("padding")),
        *_similar(layers), *_drift(layers, update),
    ]  # fmt: skip
    if not found:
        found = [NormFinding("good", f"nothing unusual in {len(layers)} norm layers after update {update}")]
    return sorted(found, key=lambda finding: finding.kind != "bad")  # stable


def _worst_first(layers: Iterable[Layer], key: Callable[[Layer], float]) -> list[Layer]:
    return sorted(layers, key=key, reverse=True)


def _named(layers: Sequence[Layer]) -> str:
    """Name the first layer and the number of others."""
    return layers[0]["name"] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _more(layer: Layer) -> str:
    """Say what gives a layer more numbers for its statistics."""
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
            f"cell: the result is beta whatever the picture. {_more(alone[0])}, or kind: none there",
        )
    few = [layer for layer in layers if layer not in alone and layer["elements"] and layer["elements"] < FEW]
    if few := _worst_first(few, lambda layer: -layer["elements"]):
        maps = "on maps of one cell" if any(layer["one_cell"] for layer in few) else "on small maps"
        yield NormFinding(
            "warn",
            f"{_named(few)}: statistics over as few as {few[0]['elements']} numbers, {maps}, are mostly noise. "
            f"{_more(few[0])}",
        )


def _below_eps(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    low = [layer for layer in layers if (layer["eps_dominated"] or 0) >= SOME and not layer["one_element"]]
    if low := _worst_first(low, lambda layer: layer["eps_dominated"]):
        worst = low[0]
        yield NormFinding(
            "bad" if worst["eps_dominated"] >= MOST else "warn",
            f"{_named(low)}: {_percent(worst['eps_dominated'])} of its {'groups' if worst['groups'] else 'channels'} "
            f"have a variance below eps ({worst['eps']:g}): they are not brought to unit variance but stay near beta. "
            "Their convolution gives nearly nothing: look at its initial weights, lower train.optimizer.weight_decay, "
            "or a smaller model.norm.eps",
        )


def _gamma(layers: Sequence[Layer], update: int) -> Iterator[NormFinding]:
    if large := _worst_first((layer for layer in layers if layer["exploding"]), _largest):
        yield NormFinding(
            "bad",
            f"{_named(large)}: gamma has grown to {_largest(large[0]):.3g}, more than ten times what it was: a few "
            "channels drown the others. Lower train.optimizer.lr, set train.optimizer.clip_grad_norm, or give gamma a "
            "train.optimizer.norm_weight_decay",
        )
    # at the start a whole layer of zeros is model.backbone.zero_init_last_gamma
    dead = [layer for layer in layers if (layer["dead"] or 0) >= SOME and not (update == 0 and layer["dead"] == 1)]
    if dead := _worst_first(dead, lambda layer: layer["dead"]):
        yield NormFinding(
            "bad" if dead[0]["dead"] >= MOST else "warn",
            f"{_named(dead)}: gamma of {_percent(dead[0]['dead'])} of its channels is practically 0: they give beta "
            "and nothing of the picture. train.optimizer.norm_weight_decay should be 0; channels that died early "
            "point to too high a learning rate or too short a warmup",
        )


def _largest(layer: Layer) -> float:
    """Return the largest |gamma|; infinite if any is not finite."""
    return max((math.inf if value is None else abs(value) for value in layer["gamma"]), default=0.0)


def _gap(layer: Layer, which: str) -> int:
    """Return how far the "gap" or "spread" of a layer's statistics is over its limits: 0 not, 1 a warning, 2 bad."""
    pair = [layer.get(f"{which}_mean"), layer.get(f"{which}_std")]
    values = [(value[0] if isinstance(value, list) else value) or 0.0 for value in pair]
    return max(sum(value > limit for limit in limits) for value, limits in zip(values, (GAP, GAP_STD), strict=True))


def _batch_statistics(layers: Sequence[Layer], update: int) -> Iterator[NormFinding]:
    batch = [layer for layer in layers if layer["kind"] in BATCH_KINDS]
    away = [layer for layer in batch if _gap(layer, "gap")] if update else []  # at the start they mean nothing yet
    if away := _worst_first(away, lambda layer: (_gap(layer, "gap"), layer["gap_mean"][0])):
        worst = away[0]
        yield NormFinding(
            "bad" if _gap(worst, "gap") > 1 else "warn",
            f"{_named(away)} of {len(batch)}: {worst['kind']}'s running statistics are not those of its batches: means "
            f"lie {worst['gap_mean'][0]:.2g} standard deviations away, standard deviations differ by a factor of "
            f"{math.exp(worst['gap_std'][0]):.2g} (medians over channels). Evaluation runs another network than the "
            "one that was trained. kind: gn has no running statistics; else more train.images_per_gpu, sync_bn over "
            "several processes, or a smaller model.norm.momentum",
        )
    noisy = [layer for layer in batch if _gap(layer, "spread")]
    if noisy := _worst_first(noisy, lambda layer: layer["spread_mean"] or 0):
        yield NormFinding(
            "warn",
            f"{_named(noisy)} of {len(batch)}: from one batch of train.images_per_gpu to the next the mean of a "
            f"channel moves by {noisy[0]['spread_mean']:.2g} of its standard deviation: small batches are noise to BN "
            "(Wu & He 2018, figure 1). kind: gn does not see them; else more images at once, or sync_bn",
        )


def _frozen(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    frozen = [layer for layer in layers if layer["kind"] == "frozen_bn"]
    away = [layer for layer in frozen if _gap(layer, "gap") > 1]
    if away := _worst_first(away, lambda layer: layer["gap_mean"][0]):
        worst = away[0]
        yield NormFinding(
            "warn",
            f"{_named(away)} of {len(frozen)}: the statistics that frozen_bn keeps are not those of this data: means "
            f"lie {worst['gap_mean'][0]:.2g} stored standard deviations away, standard deviations differ by a factor "
            f"of {math.exp(worst['gap_std'][0]):.2g}. From the first layer on: the weights were trained with another "
            "pixel_mean, pixel_std or order of colours (train.source); in deep layers: the data differs from theirs; "
            "gn adapts (train.norm_policy: calibrate)",
        )


def _padding(layers: Sequence[Layer], padding: float | None) -> Iterator[NormFinding]:
    plain = [layer for layer in layers if not layer["masked"] and not layer["name"].startswith(("box_", "mask_"))]
    if padding is not None and padding >= PADDING and plain:
        yield NormFinding(
            "warn",
            f"{_percent(padding)} of the training batches is padding, and {len(plain)} plain layers include it in "
            "their statistics: an image's features depend on the images beside it. model.norm.padding: masked (gn, "
            "ln, in), train.images_per_gpu: 1, or pictures of one size",
        )


def _similar(layers: Sequence[Layer]) -> Iterator[NormFinding]:
    similar = [layer for layer in layers if (layer["similar"][0] or 0) >= SIMILAR]
    if similar := _worst_first(similar, lambda layer: layer["similar"][0]):
        yield NormFinding(
            "warn",
            f"{_named(similar)}: channels of one group are nearly copies of each other (mean |correlation| "
            f"{similar[0]['similar'][0]:.2g}): the layer is wider than what it carries, or has collapsed",
        )


def _drift(layers: Sequence[Layer], update: int) -> Iterator[NormFinding]:
    known = [layer for layer in layers if layer["trained"] and layer["drift"] and None not in layer["drift"]]
    if update and (still := [layer for layer in known if max(layer["drift"]) == 0]):
        yield NormFinding(
            "warn",
            f"{_named(still)}: gamma and beta are trained but have not moved since the start: no gradient reaches "
            "them, or every update was skipped",
        )
    far = [layer for layer in known if max(layer["drift"]) > FAR]
    if far := _worst_first(far, lambda layer: max(layer["drift"])):
        yield NormFinding(
            "warn",
            f"{_named(far)}: gamma and beta have moved by {max(far[0]['drift']):.2g} times the length gamma had at the "
            "start. Right for a layer with random initial weights; of pretrained weights little is left: a lower "
            "learning rate",
        )
