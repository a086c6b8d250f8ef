"""The definition of a task: how to read its data, build its model and evaluate it.

The loop, accumulation, resuming, faults, logs and studies do not depend on the task.  A new task needs a row in TASKS
and its evaluation.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

from gndet.config.schema import Config
from gndet.data.datasets.comparing import between
from gndet.data.datasets.faults import NOTED, refuse_all, share
from gndet.data.datasets.packed import count_objects
from gndet.data.datasets.plausible import limit_notes
from gndet.data.datasets.reading import inspect_both
from gndet.data.records import Dataset
from gndet.distributed.signals import StopSignals
from gndet.evaluation.classification import (
    classification_table,
    classify_share,
    join_rankings,
    save_classification,
)
from gndet.files import CLASSIFIED
from gndet.modeling.classifier import Classifier
from gndet.training.log import Log
from gndet.training.run import Run
from gndet.training.validation import evaluate_run, on_all_ranks
from gndet.weights.load import InitialModel, initial_model


def read_both(cfg: Config) -> tuple[Dataset, Dataset, list[str]]:
    """Read and check data.train and data.val.  Returns both, and lines about their content and findings.

    Raises DataError that lists everything refused in either of them and between them.
    """
    sets = dict(zip(("train", "val"), inspect_both(cfg.data, masks=cfg.model.masks), strict=True))
    findings = {f"data.{which}: {data.name}": data.findings for which, data in sets.items()}
    findings["data.train and data.val"] = between(*sets.values())
    refuse_all(findings)
    notes = [
        f"{which}: {len(data.records)} images, {count_objects(data.records).objects.sum()} objects, "
        f"{len(data.classes)} classes from {data.name}"
        + "".join(f"; {count} {what}" for what, count in data.fixes.items())
        for which, data in sets.items()
    ]
    notes += [f"{which}: {note}" for which, data in sets.items() for note in data.notes]
    notes += limit_notes(sets["train"], sets["val"], cfg)
    for source, found in findings.items():
        noted = (finding for finding in found if finding.severity == NOTED)
        notes += [f"{source}: noted: {finding.code} ({share(finding)}): {finding.what}" for finding in noted]
    return sets["train"], sets["val"], notes


def evaluate_classifier(run: Run, done: int, log: Log, stop: StopSignals) -> dict[str, float]:
    """Evaluate on the validation set; log the errors, and write the class of each picture to classified.json.

    Returns the metrics, {"top1": ..., "top5": ..., "error": ...}.  Raises, on all ranks, what `on_all_ranks` raises;
    pictures that cannot be read count as errors.
    """
    model = cast(Classifier, run.detector)
    work = partial(classify_share, model, run.val_set, run.cfg, run.proc, autocast=run.autocast)
    found = join_rankings(on_all_ranks(run, done, log, stop, work, "errors"), run.val_set, run.proc)
    values = found.scalars()
    if run.proc.first:
        log.evaluation(done, values, classification_table(found, run.val_set.classes))
        log.attempt(CLASSIFIED, partial(save_classification, run.out / CLASSIFIED, found, run.val_set))
    return values


class Task(NamedTuple):
    """The three functions of a task."""

    read: Callable[[Config], tuple[Dataset, Dataset, list[str]]]  # data.train, data.val, and lines about them
    build: Callable[..., InitialModel]  # (cfg, classes, load, images, measure): the model as training starts with it
    evaluate: Callable[[Run, int, Log, StopSignals], dict[str, float]]  # (run, updates made, log, stop): the metrics


TASKS = {  # by Config.task
    "detection": Task(read_both, initial_model, evaluate_run),
    "classification": Task(read_both, initial_model, evaluate_classifier),
}
