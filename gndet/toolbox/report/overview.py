"""The report's first section: the state of the run, its main numbers, and what to do about them."""

import math
from collections import Counter
from collections.abc import Iterator

from gndet.text import named_briefly
from gndet.toolbox.analysis.bootstrap import Interval
from gndet.toolbox.analysis.errors import TITLES
from gndet.toolbox.report import blocks
from gndet.toolbox.report.blocks import Section
from gndet.toolbox.report.mistakes import advice
from gndet.toolbox.report.record import RunRecord, training_time
from gndet.training.norms import SMALL_BATCH

WAITING = 0.2  # share of time spent waiting for data; above it a run is called data-bound
FALL = 0.01  # change of AP that is worth a sentence
FEW = 20  # objects of a class in data.val; with fewer, its AP says little
SUSPECTS = {
    "missing_annotation": "confident detections lie where nothing is annotated, possibly on forgotten objects",
    "wrong_label": "objects are confidently detected as a class that differs from their annotation",
}
SIGNS = {"finished": "good", "failed": "bad", "stopped": "warn", "unfinished": "warn"}


def section(run: RunRecord) -> Section:
    """Return the section with the numbers and the verdict."""
    ended, why = run.ending
    words = [blocks.notice(SIGNS[ended], why[:1].upper() + why[1:])]
    words += [blocks.notice(kind, line) for kind, line in run_verdict(run)]
    words += [blocks.notice("plain", f"Missing here: {line}") for line in run.missing]
    return blocks.section("summary", "Summary", blocks.headline(headline_numbers(run)), *words)


def headline_numbers(run: RunRecord) -> list[tuple[str, str]]:
    """Return the numbers that readers look for first, as pairs of name and value."""
    scores = {f"{part} {key}, %": run.last(f"{part}/{key}") for part in ("box", "mask") for key in ("AP", "AP50")}
    scores |= {"top-1 error, %": run.last("error"), "top-5 accuracy, %": run.last("top5")}
    pairs = [(name, f"{100 * value:.1f}") for name, value in scores.items() if value is not None]
    if run.analysis is not None:
        pairs.append((f"{run.analysis.kind} AP, 95 %", interval(run.analysis.intervals.ap)))
    pairs += [
        ("updates", f"{run.done:,}" if run.done == run.total else f"{run.done:,} of {run.total:,}"),
        ("images per update", f"{run.cfg.train.global_batch}"),
        ("norm", run.cfg.model.norm.kind),
    ]
    if run.speed:
        pairs += [("images/s", f"{run.speed:.3g}"), ("training time", training_time(run))]
    if run.memory:
        pairs.append(("peak memory", f"{run.memory:.1f} GiB"))
    return pairs


def interval(ends: Interval) -> str:
    """Return an interval in percent."""
    return "-" if math.isnan(ends.low) else f"{100 * ends.low:.1f} – {100 * ends.high:.1f}"


def run_verdict(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield sentences about the run, each with its sign."""
    yield from _learning(run)
    if run.analysis is not None:
        delta = run.analysis.errors.delta_ap
        kind = max(TITLES, key=lambda kind: 0.0 if math.isnan(delta[kind]) else delta[kind])
        if delta[kind] > FALL:
            lost = f"The costliest kind of mistake is {TITLES[kind]}: {100 * delta[kind]:.1f} points of AP50"
            yield "plain", f"{lost}. {advice(kind, run.cfg.model)}"
        contradicted = Counter(suspect.kind for suspect in run.analysis.suspects)
        for kind, words in SUSPECTS.items():
            if count := contradicted[kind]:
                yield "warn", f"{count} {words}; the most confident are listed under Mistakes."
        if few := [row["name"] for row in run.analysis.metrics.per_class if row["num_objects"] < FEW]:
            yield (
                "warn",
                f"Classes with fewer than {FEW} objects in data.val, so their AP says little: {named_briefly(few)}.",
            )
    waits = [entry["data_wait"] for entry in run.train[1:] if entry.get("data_wait") is not None]
    if waits and (share := sum(waits) / len(waits)) > WAITING:
        yield "warn", f"Data-bound: waiting for data took {100 * share:.0f} % of the time; raise data.workers."
    if skipped := run.meta.get("nonfinite"):
        yield "warn", f"{skipped} update(s) were skipped because losses or gradients were not finite; see nonfinite/."
    if run.meta.get("unreadable"):
        yield "warn", f"{len(run.meta['unreadable'])} training picture(s) could not be read and were left out."
    norms = run.cfg.model.part_norms()
    for kind in sorted({norms[part].kind for part in run.cfg.model.normed_parts if norms[part].mixes_images}):
        count = (run.images_at_once or 0) * (run.meta.get("processes", 1) if kind == "sync_bn" else 1)
        if not 0 < count < SMALL_BATCH:
            continue
        over = f"{kind} takes its statistics over {count} image(s) at once"
        why = f"with fewer than {SMALL_BATCH} they are noisy (Wu & He 2018, figure 1); gn does not depend on the batch"
        yield "warn", f"{over}; {why}."


def _learning(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield a sentence on how AP, or a classifier's accuracy, developed."""
    key = next((key for key in ("mask/AP", "box/AP", "top1") if run.last(key) is not None), "box/AP")
    scores = [(entry["update"], entry[key]) for entry in run.evaluations if entry.get(key) is not None]
    if not scores:
        return
    best_at, best = max(scores, key=lambda score: score[1])
    last_at, last = scores[-1]
    name = "top-1 accuracy" if key == "top1" else key.replace("/", " ")
    if last == 0 and key != "top1":
        yield "bad", f"{name} is 0: nothing is found yet. Train longer, or check the training batches and the labels."
    elif best - last > FALL and best_at < last_at:
        fell = f"{name} was best after {best_at:,} updates ({100 * best:.1f}) and has fallen to {100 * last:.1f}"
        why = "the schedule is too long for this data or the learning rate too high; `best` is the better checkpoint"
        yield "warn", f"{fell}: {why}."
    elif len(scores) > 1 and last - scores[-2][1] > FALL:
        rose = f"{name} was still rising at the end, from {100 * scores[-2][1]:.1f} to {100 * last:.1f}"
        yield "plain", f"{rose} over the last {last_at - scores[-2][0]:,} updates: try a longer schedule."
    elif len(scores) > 1:
        yield "good", f"{name} has leveled off at {100 * last:.1f}."
