"""What is unusual about a run's norm layers, and what to try: norms.jsonl in plain words, the most serious first."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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


def norm_findings(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Judge an entry of norms.jsonl: (kind, words), the most serious first; a "good" one where nothing is unusual.

    kind: "bad", "warn" or "good".
    """
    layers, update = entry["layers"], entry["update"]
    found = [
        *_of_inputs(layers), *_of_parameters(layers, update), *_of_batches(layers, update),
        *_of_data(layers, entry.get("padding")),
    ]  # fmt: skip
    if not found:
        return [("good", f"nothing unusual in {len(layers)} norm layers after update {update}")]
    return sorted(found, key=lambda finding: finding[0] != "bad")  # stable


def _worst_first(layers: Iterable[Layer], value: Callable[[Layer], float | None], least: float) -> list[Layer]:
    """Return the layers whose value is known and at least `least`, the highest first."""
    over = [layer for layer in layers if (value(layer) or 0) >= least]
    return sorted(over, key=lambda layer: value(layer) or 0, reverse=True)


def _named(layers: Sequence[Layer]) -> str:
    return layers[0]["name"] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _more(layer: Layer) -> str:
    if layer["groups"] is None:
        return "Larger pictures (data.shortest_edge), or more train.images_per_gpu"
    return f"Fewer groups in model.{layer['name'].partition('.')[0]}.norm, or larger pictures (data.shortest_edge)"


def _of_inputs(layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """Judge what the layers are given: not finite, too few numbers, nearly constant, copies."""
    if broken := [layer for layer in layers if layer["nonfinite"]]:
        yield "bad", (
            f"{_named(broken)} of {len(layers)}: its input is not finite, and nothing behind it is. Look at nonfinite/ "
            "in the run's folder, and try a lower train.optimizer.lr, a longer warmup or train.optimizer.clip_grad_norm"
        )  # fmt: skip
    if alone := [layer for layer in layers if layer["one_element"]]:
        yield "bad", (
            f"{_named(alone)}: {'groups' if alone[0]['groups'] else 'batches'} of one number, a channel's map of one "
            f"cell: the result is beta whatever the picture. {_more(alone[0])}, or kind: none there"
        )  # fmt: skip
    others = [layer for layer in layers if not layer["one_element"]]
    few = [layer for layer in others if layer["elements"] and layer["elements"] < FEW]
    if few := _worst_first(few, lambda layer: 1 / layer["elements"], 0):
        maps = "on maps of one cell" if any(layer["one_cell"] for layer in few) else "on small maps"
        yield "warn", (
            f"{_named(few)}: statistics over as few as {few[0]['elements']} numbers, {maps}, are mostly noise. "
            f"{_more(few[0])}"
        )  # fmt: skip
    if low := _worst_first(others, lambda layer: layer["eps_dominated"], SOME):
        worst = low[0]
        yield "bad" if worst["eps_dominated"] >= MOST else "warn", (
            f"{_named(low)}: {_percent(worst['eps_dominated'])} of its {'groups' if worst['groups'] else 'channels'} "
            f"have a variance below eps ({worst['eps']:g}): they are not brought to unit variance but stay near beta. "
            "Their convolution gives nearly nothing: look at its initial weights, lower train.optimizer.weight_decay, "
            "or a smaller model.norm.eps"
        )  # fmt: skip
    if similar := _worst_first(layers, lambda layer: layer["similar"][0], SIMILAR):
        yield "warn", (
            f"{_named(similar)}: channels of one group are nearly copies of each other (mean |correlation| "
            f"{similar[0]['similar'][0]:.2g}): the layer is wider than what it carries, or has collapsed"
        )  # fmt: skip


def _of_parameters(layers: Sequence[Layer], update: int) -> Iterator[tuple[str, str]]:
    """Judge gamma and beta: exploding, dead, unmoved, far from where they began."""
    if large := _worst_first((layer for layer in layers if layer["exploding"]), _largest, 0):
        yield "bad", (
            f"{_named(large)}: gamma has grown to {_largest(large[0]):.3g}, more than ten times what it was: a few "
            "channels drown the others. Lower train.optimizer.lr, set train.optimizer.clip_grad_norm, or give gamma a "
            "train.optimizer.norm_weight_decay"
        )  # fmt: skip
    # at the start a whole layer of zeros is model.backbone.zero_init_last_gamma
    judged = [layer for layer in layers if update or layer["dead"] != 1]
    if dead := _worst_first(judged, lambda layer: layer["dead"], SOME):
        yield "bad" if dead[0]["dead"] >= MOST else "warn", (
            f"{_named(dead)}: gamma of {_percent(dead[0]['dead'])} of its channels is practically 0: they give beta "
            "and nothing of the picture. train.optimizer.norm_weight_decay should be 0; channels that died early "
            "point to too high a learning rate or too short a warmup"
        )  # fmt: skip
    known = [layer for layer in layers if layer["trained"] and layer["drift"] and None not in layer["drift"]]
    if update and (still := [layer for layer in known if max(layer["drift"]) == 0]):
        yield "warn", (
            f"{_named(still)}: gamma and beta are trained but have not moved since the start: no gradient reaches "
            "them, or every update was skipped"
        )  # fmt: skip
    if far := _worst_first(known, lambda layer: max(layer["drift"]), FAR):
        yield "warn", (
            f"{_named(far)}: gamma and beta have moved by {max(far[0]['drift']):.2g} times the length gamma had at the "
            "start. Right for a layer with random initial weights; of pretrained weights little is left: a lower "
            "learning rate"
        )  # fmt: skip


def _largest(layer: Layer) -> float:
    return max(math.inf if value is None else abs(value) for value in layer["gamma"])


def _gap(layer: Layer, which: str) -> int:
    """Return how far the "gap" or "spread" of a layer's statistics is over its limits: 0 not, 1 a warning, 2 bad."""
    pair = [layer.get(f"{which}_mean"), layer.get(f"{which}_std")]
    values = [(value[0] if isinstance(value, list) else value) or 0.0 for value in pair]
    return max(sum(value > limit for limit in limits) for value, limits in zip(values, (GAP, GAP_STD), strict=True))


def _away(layers: Sequence[Layer], least: int) -> tuple[list[Layer], str]:
    """Return the layers whose stored statistics are not those of batches, the worst first, and how far the worst is."""
    away = [layer for layer in layers if _gap(layer, "gap") >= least]
    away.sort(key=lambda layer: (_gap(layer, "gap"), layer["gap_mean"][0]), reverse=True)
    if not away:
        return [], ""
    means, ratio = away[0]["gap_mean"][0], math.exp(away[0]["gap_std"][0])
    return away, (
        f"means lie {means:.2g} stored standard deviations away, standard deviations differ by a factor of {ratio:.2g} "
        "(medians over channels)"
    )


def _of_batches(layers: Sequence[Layer], update: int) -> Iterator[tuple[str, str]]:
    """Judge how far running or stored statistics are from those of batches, and these from each other."""
    batch = [layer for layer in layers if layer["kind"] in BATCH_KINDS]
    away, distance = _away(batch if update else [], 1)  # at the start running statistics mean nothing yet
    if away:
        yield "bad" if _gap(away[0], "gap") > 1 else "warn", (
            f"{_named(away)} of {len(batch)}: {away[0]['kind']}'s running statistics are not those of its batches: "
            f"{distance}. Evaluation runs another network than the one that was trained. kind: gn has no running "
            "statistics; else more train.images_per_gpu, sync_bn over several processes, or a smaller "
            "model.norm.momentum"
        )  # fmt: skip
    moving = [layer for layer in batch if _gap(layer, "spread")]
    if noisy := _worst_first(moving, lambda layer: layer["spread_mean"] or 0, 0):
        yield "warn", (
            f"{_named(noisy)} of {len(batch)}: from one batch of train.images_per_gpu to the next the mean of a "
            f"channel moves by {noisy[0]['spread_mean']:.2g} of its standard deviation: small batches are noise to BN "
            "(Wu & He 2018, figure 1). kind: gn does not see them; else more images at once, or sync_bn"
        )  # fmt: skip
    frozen = [layer for layer in layers if layer["kind"] == "frozen_bn"]
    away, distance = _away(frozen, 2)
    if away:
        yield "warn", (
            f"{_named(away)} of {len(frozen)}: the statistics that frozen_bn keeps are not those of this data: "
            f"{distance}. From the first layer on: the weights were trained with another pixel_mean, pixel_std or "
            "order of colours (train.source); in deep layers: the data differs from theirs; gn adapts "
            "(train.norm_policy: calibrate)"
        )  # fmt: skip


def _of_data(layers: Sequence[Layer], padding: float | None) -> Iterator[tuple[str, str]]:
    plain = [layer for layer in layers if not layer["masked"] and not layer["name"].startswith(("box_", "mask_"))]
    if plain and padding is not None and padding >= PADDING:
        yield "warn", (
            f"{_percent(padding)} of the training batches is padding, and {len(plain)} plain layers include it in "
            "their statistics: an image's features depend on the images beside it. model.norm.padding: masked (gn, "
            "ln, in), train.images_per_gpu: 1, or pictures of one size"
        )  # fmt: skip
