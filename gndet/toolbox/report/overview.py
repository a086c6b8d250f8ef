"""The first screen of a report: how the run stands, its numbers, and what is to be done about them, in words."""

import math
from collections import Counter
from collections.abc import Iterator

from gndet.toolbox.analysis.analysis import Analysis
from gndet.toolbox.analysis.bootstrap import Interval
from gndet.toolbox.analysis.errors import KINDS
from gndet.toolbox.report import blocks
from gndet.toolbox.report.labels import FEW, few_objects
from gndet.toolbox.report.mistakes import ADVICE
from gndet.toolbox.report.record import RunRecord, training_time

WAITING = 0.2  # share of the time spent waiting for data from which a run is called data-bound
FALL = 0.01  # AP
SMALL_BATCH = 8  # images at once below which batch statistics are noise: Wu & He 2018, figure 1
SIGNS = {"finished": "good", "failed": "bad", "stopped": "warn", "unfinished": "warn"}


def section(run: RunRecord) -> str:
    """Summary and verdict."""
    words = [blocks.notice(SIGNS[run.ended], run.why[:1].upper() + run.why[1:])]
    words += [blocks.notice(kind, line) for kind, line in run_verdict(run)]
    words += [blocks.notice("plain", f"Missing here: {line}") for line in run.missing]
    return blocks.section("summary", "Summary", blocks.headline(headline_numbers(run)), *words)


def headline_numbers(run: RunRecord) -> list[tuple[str, str]]:
    """The numbers that are looked for first."""
    pairs = []
    for part in ("box", "mask"):
        for key in ("AP", "AP50"):
            if (value := run.last(f"{part}/{key}")) is not None:
                pairs.append((f"{part} {key}, %", f"{100 * value:.1f}"))
    if run.analysis is not None:
        pairs.append((f"{run.analysis.kind} AP, 95 %", interval(run.analysis.intervals.ap)))
    pairs.append(("updates", f"{run.done:,}" if run.done == run.total else f"{run.done:,} of {run.total:,}"))
    pairs.append(("images an update", f"{run.cfg.train.global_batch}"))
    pairs.append(("norm", run.cfg.model.norm.kind))
    speeds = [line["images_per_s"] for line in run.train if line.get("images_per_s")]
    if speeds:
        pairs.append(("images/s", f"{sorted(speeds)[len(speeds) // 2]:.3g}"))
        pairs.append(("training time", training_time(run)))
    if run.train and run.train[-1].get("memory_mib"):
        pairs.append(("peak memory", f"{run.train[-1]['memory_mib'] / 1024:.1f} GiB"))
    return pairs


def interval(ends: Interval) -> str:
    """An interval in percent."""
    return "-" if math.isnan(ends.low) else f"{100 * ends.low:.1f} – {100 * ends.high:.1f}"


def run_verdict(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Sentences about the run, each with its sign."""
    yield from _learning(run)
    if run.analysis is not None:
        delta = run.analysis.errors.delta_ap
        kind = max(KINDS, key=lambda one: 0.0 if math.isnan(delta[one]) else delta[one])
        if delta[kind] > FALL:
            words = KINDS[kind].split(":")[0]
            yield "plain", f"Most AP50 is lost by {words}: {100 * delta[kind]:.1f} points. {ADVICE[kind]}"
        yield from _annotations(run.analysis)
        if few := few_objects(run):
            names = f"{', '.join(few[:8])}{' ...' if len(few) > 8 else ''}"
            yield "warn", f"Fewer than {FEW} objects in data.val, so that AP says little: {names}"
    waits = [line["data_wait"] for line in run.train[1:] if line.get("data_wait") is not None]
    if waits and sum(waits) / len(waits) > WAITING:
        share = 100 * sum(waits) / len(waits)
        yield "warn", f"Data-bound: {share:.0f} % of the time was spent waiting for pictures; raise data.workers."
    if run.meta.get("nonfinite"):
        count = run.meta["nonfinite"]
        yield "warn", f"{count} update(s) whose losses or gradients were not finite were passed over; see nonfinite/."
    if run.meta.get("unreadable"):
        yield "warn", f"{len(run.meta['unreadable'])} training picture(s) could not be read and were left out."
    yield from _norm(run)


def _annotations(found: Analysis) -> Iterator[tuple[str, str]]:
    """What sure detections say of the annotations."""
    kinds = Counter(one.kind for one in found.suspects)
    for kind, words in (
        ("missing_annotation", "sure detections lie where nothing is annotated: objects that were forgotten, perhaps"),
        ("wrong_label", "objects are surely taken for another class than they are annotated as"),
    ):
        if kinds[kind]:
            yield "warn", f"{kinds[kind]} {words}; they are listed under Mistakes, the surest first."


def _learning(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Whether AP still rises, or has fallen."""
    key = "mask/AP" if run.last("mask/AP") is not None else "box/AP"
    scores = [(line["update"], line[key]) for line in run.evaluations if line.get(key) is not None]
    if not scores:
        return
    best_at, best = max(scores, key=lambda one: one[1])
    last_at, last = scores[-1]
    name = key.replace("/", " ")
    if last == 0:
        yield (
            "bad",
            f"{name} is 0: nothing is found yet. Train longer, or look at the training batches and labels below.",
        )
    elif best - last > FALL and best_at < last_at:
        fell = f"{name} was best after {best_at:,} updates ({100 * best:.1f}) and has fallen to {100 * last:.1f}"
        why = "too long a schedule for this data, or too high a learning rate; `best` is the better checkpoint"
        yield "warn", f"{fell}: {why}."
    elif len(scores) > 1 and last - scores[-2][1] > FALL:
        rose = f"{name} still rose at the end, from {100 * scores[-2][1]:.1f} to {100 * last:.1f}"
        yield "plain", f"{rose} over the last {last_at - scores[-2][0]:,} updates: a longer schedule may give more."
    elif len(scores) > 1:
        yield "good", f"{name} has levelled off at {100 * last:.1f}."


def _norm(run: RunRecord) -> Iterator[tuple[str, str]]:
    """What is to be said of norms whose statistics mix images."""
    mixing = sorted({norm.kind for norm in run.cfg.model.part_norms().values() if norm.mixes_images})
    at_once = run.meta.get("images_at_once") or run.cfg.train.images_per_gpu
    if mixing and isinstance(at_once, int) and at_once < SMALL_BATCH:
        over = f"{', '.join(mixing)} takes its statistics over {at_once} image(s) at once"
        why = f"below {SMALL_BATCH} they are noise (Wu & He 2018, figure 1); gn does not depend on that number"
        yield "warn", f"{over}; {why}."
