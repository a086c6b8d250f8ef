"""Say in plain words what is unusual about a run's norm layers (norms.jsonl) and what to try."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Layer = dict[str, Any]  # one layer of an entry of norms.jsonl

FEW = 16  # numbers: a standard deviation over so few is off by a fifth, 1 / sqrt(2 n)
SOME = 0.05  # share of a layer's groups or channels: a warning
MOST = 0.5  # the same: bad
GAP = 0.25, 1.0  # distance of means in stored standard deviations: a warning, bad
GAP_STD = 0.25, 0.7  # |log ratio| of standard deviations: a quarter off, off by a factor of 2
PADDING = 0.1  # share of the training batches
SIMILAR = 0.9  # |correlation| of channels in a group, from which they are nearly one channel
FAR = 1.0  # drift in units of the length of the layer's initial gamma
BATCH_KINDS = ("bn", "sync_bn", "brn")


def norm_findings(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Judge an entry of norms.jsonl; return findings (kind, words), the most serious first.

    kind: "bad" or "warn"; a single "good" finding if nothing is unusual.
    """
    layers, update = entry["layers"], entry["update"]
    found = [
        *_judge_inputs(layers), *_judge_parameters(layers, update), *_judge_statistics(layers, update),
        *_judge_padding(layers, entry.get("padding")),
    ]  # fmt: skip
    if not found:
        return [("good", f"nothing unusual in {len(layers)} norm layers after update {update}")]
    return sorted(found, key=lambda finding: finding[0] != "bad")  # a stable sort


def _worst_first(layers: Iterable[Layer], value: Callable[[Layer], float | None], least: float) -> list[Layer]:
    """Return the layers whose value is known and at least `least`, the highest value first."""
    over = [layer for layer in layers if (value(layer) or 0) >= least]
    return sorted(over, key=lambda layer: value(layer) or 0, reverse=True)


def _names(layers: Sequence[Layer]) -> str:
    """Return the name of the first layer and how many more there are."""
    return layers[0]["name"] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _advice(layer: Layer) -> str:
    """Say how the layer's statistics could be taken over more numbers."""
    if layer["kind"] in BATCH_KINDS:
        return "Try larger pictures (data.shortest_edge) or more train.images_per_gpu"
    what = "fewer groups" if layer["kind"] in ("gn", "evonorm_s0") else "kind: gn with few groups"
    return f"Try {what} in model.{layer['name'].partition('.')[0]}.norm or larger pictures (data.shortest_edge)"


def _judge_inputs(layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """Judge the layers' inputs: not finite, too few numbers, nearly constant, copies of each other."""
    if broken := [layer for layer in layers if layer["nonfinite"]]:
        yield "bad", (
            f"{_names(broken)} of {len(layers)}: the input is not finite, and neither is anything after it. Look at "
            "nonfinite/ in the run's folder, and try a lower train.optimizer.lr, a longer warmup or "
            "train.optimizer.clip_grad_norm"
        )  # fmt: skip
    layers = [layer for layer in layers if layer["kind"] != "frozen_bn"]  # takes no statistics
    if alone := [layer for layer in layers if layer["one_element"] and layer["kind"] != "frn"]:  # FRN keeps the sign
        yield "bad", (
            f"{_names(alone)}: {'groups' if alone[0]['groups'] else 'batches'} of one number, because a channel's map "
            f"has one cell: the result is beta for every picture. {_advice(alone[0])}, or set kind: none for this part"
        )  # fmt: skip
    others = [layer for layer in layers if not layer["one_element"]]
    few = [layer for layer in others if layer["elements"] and layer["elements"] < FEW]
    if few := _worst_first(few, lambda layer: 1 / layer["elements"], 0):
        maps = "on maps of one cell" if any(layer["one_cell"] for layer in few) else "on small maps"
        yield "warn", (
            f"{_names(few)}: statistics over as few as {few[0]['elements']} numbers, {maps}, are mostly noise. "
            f"{_advice(few[0])}"
        )  # fmt: skip
    centered = [layer for layer in others if layer["kind"] != "frn"]  # FRN does not divide by the variance
    if low := _worst_first(centered, lambda layer: layer["eps_dominated"], SOME):
        worst = low[0]
        yield "bad" if worst["eps_dominated"] >= MOST else "warn", (
            f"{_names(low)}: {_percent(worst['eps_dominated'])} of its {'groups' if worst['groups'] else 'channels'} "
            f"have a variance below eps ({worst['eps']:g}): they do not reach unit variance but stay near beta, "
            "because their convolution outputs almost nothing. Check its initial weights, or try a lower "
            "train.optimizer.weight_decay or a smaller model.norm.eps"
        )  # fmt: skip
    if similar := _worst_first(layers, lambda layer: layer["similar"][0], SIMILAR):
        yield "warn", (
            f"{_names(similar)}: channels of one group are nearly copies of each other (mean |correlation| "
            f"{similar[0]['similar'][0]:.2g}): the layer is wider than it needs to be, or has collapsed"
        )  # fmt: skip


def _judge_parameters(layers: Sequence[Layer], update: int) -> Iterator[tuple[str, str]]:
    """Judge gamma and beta: exploding, dead, unmoved, far from their start."""
    if large := _worst_first((layer for layer in layers if layer["exploding"]), _largest, 0):
        yield "bad", (
            f"{_names(large)}: gamma has grown to {_largest(large[0]):.3g}, more than ten times its initial size, so a "
            "few channels drown the others. Try a lower train.optimizer.lr, train.optimizer.clip_grad_norm, or a "
            "train.optimizer.norm_weight_decay for gamma"
        )  # fmt: skip
    # at the start, a whole layer of zeros comes from model.backbone.zero_init_last_gamma
    judged = [layer for layer in layers if update or layer["dead"] != 1]
    if dead := _worst_first(judged, lambda layer: layer["dead"], SOME):
        yield "bad" if dead[0]["dead"] >= MOST else "warn", (
            f"{_names(dead)}: gamma of {_percent(dead[0]['dead'])} of its channels is practically 0, so these channels "
            "output beta whatever the picture. train.optimizer.norm_weight_decay should be 0; channels that died "
            "early suggest that the learning rate is too high or the warmup too short"
        )  # fmt: skip
    known = [layer for layer in layers if layer["trained"] and layer["drift"] and None not in layer["drift"]]
    if update and (still := [layer for layer in known if max(layer["drift"]) == 0]):
        yield "warn", (
            f"{_names(still)}: gamma and beta are trainable but have not moved since the start: no gradient reaches "
            "them, or every update was skipped"
        )  # fmt: skip
    if far := _worst_first(known, lambda layer: max(layer["drift"]), FAR):
        yield "warn", (
            f"{_names(far)}: gamma and beta have moved by {max(far[0]['drift']):.2g} times the initial length of "
            "gamma. This is fine for random initial weights, but little is left of pretrained weights: for those, try "
            "a lower learning rate"
        )  # fmt: skip


def _largest(layer: Layer) -> float:
    return max(math.inf if value is None else abs(value) for value in layer["gamma"])


def _gap(layer: Layer, which: str) -> int:
    """Return how many limits the "gap" or "spread" of a layer's statistics exceeds: 0 fine, 1 a warning, 2 bad."""
    pair = [layer.get(f"{which}_mean"), layer.get(f"{which}_std")]
    values = [(value[0] if isinstance(value, list) else value) or 0.0 for value in pair]
    return max(sum(value > limit for limit in limits) for value, limits in zip(values, (GAP, GAP_STD), strict=True))


def _shifted(layers: Sequence[Layer], least: int) -> tuple[list[Layer], str]:
    """Return the layers whose stored statistics differ from those of batches, the worst first.

    The text says how far the worst layer's statistics are off.
    """
    shifted = [layer for layer in layers if _gap(layer, "gap") >= least]
    shifted.sort(key=lambda layer: (_gap(layer, "gap"), layer["gap_mean"][0]), reverse=True)
    if not shifted:
        return [], ""
    means, ratio = shifted[0]["gap_mean"][0], math.exp(shifted[0]["gap_std"][0])
    return shifted, (
        f"means lie {means:.2g} stored standard deviations away, standard deviations differ by a factor of {ratio:.2g} "
        "(medians over channels)"
    )


def _judge_statistics(layers: Sequence[Layer], update: int) -> Iterator[tuple[str, str]]:
    """Judge how far running or stored statistics differ from those of batches, and batches from each other."""
    batch = [layer for layer in layers if layer["kind"] in BATCH_KINDS]
    shifted, distance = _shifted(batch if update else [], 1)  # at the start running statistics mean nothing yet
    if shifted:
        yield "bad" if _gap(shifted[0], "gap") > 1 else "warn", (
            f"{_names(shifted)} of {len(batch)}: the running statistics of {shifted[0]['kind']} differ from those of "
            f"its batches: {distance}. Evaluation therefore runs a different network from the one that was trained. "
            "kind: gn has no running statistics; otherwise try more train.images_per_gpu, sync_bn over several GPUs, "
            "or a smaller model.norm.momentum"
        )  # fmt: skip
    moving = [layer for layer in batch if _gap(layer, "spread")]
    if noisy := _worst_first(moving, lambda layer: layer["spread_mean"] or 0, 0):
        yield "warn", (
            f"{_names(noisy)} of {len(batch)}: from one batch of train.images_per_gpu to the next, the mean of a "
            f"channel moves by {noisy[0]['spread_mean']:.2g} of its standard deviation: small batches make BN noisy "
            "(Wu & He 2018, figure 1). kind: gn does not depend on the batch; otherwise try more images per GPU or "
            "sync_bn"
        )  # fmt: skip
    frozen = [layer for layer in layers if layer["kind"] == "frozen_bn"]
    shifted, distance = _shifted(frozen, 2)
    if shifted:
        yield "warn", (
            f"{_names(shifted)} of {len(frozen)}: the statistics that frozen_bn keeps differ from those of this data: "
            f"{distance}. If this starts at the first layer, the weights were trained with another pixel_mean, "
            "pixel_std or color order (train.source). If only deep layers are affected, this data differs from the "
            "pretraining data; gn adapts to it (train.norm_policy: calibrate)"
        )  # fmt: skip


def _judge_padding(layers: Sequence[Layer], padding: float | None) -> Iterator[tuple[str, str]]:
    """Judge whether padding enters the statistics of plain layers."""
    plain = [layer for layer in layers if not layer["masked"] and not layer["name"].startswith(("box_", "mask_"))]
    if plain and padding is not None and padding >= PADDING:
        yield "warn", (
            f"{_percent(padding)} of the training batches is padding, and {len(plain)} plain layers include it in "
            "their statistics, so an image's features depend on the other images of its batch. Set "
            "model.norm.padding: masked (gn, ln, in) or train.images_per_gpu: 1, or use pictures of one size"
        )  # fmt: skip
