"""Evaluate a classifier during training: on all ranks, interrupted by a request to stop, as `validation` does."""

from functools import partial
from typing import cast

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
from gndet.training.validation import on_all_ranks


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
