"""Skip an update whose losses or gradient are not finite, or end the run, and record it so that it can be reproduced.

A rank writes nonfinite/update-0000012-process1/ into the run folder: report.json with the update, the losses, the
images' ids and keys and, per image, the first module whose output is not finite; and batch-0.safetensors, batch-1...
with the model's inputs.  If the run ends, its last checkpoint holds the weights that the update started from.
Letters: B images.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gndet.data.batches.batch import split
from gndet.data.batches.stream import Loaded
from gndet.distributed.collectives import all_gather
from gndet.errors import TrainingError
from gndet.files import create, folder_written_whole
from gndet.modeling.recompute import keeping_all
from gndet.structures import Batch
from gndet.training.log import Log
from gndet.training.run import Progress, Run
from gndet.training.run_folder import NONFINITE
from gndet.training.update import Nonfinite, UpdateState, breakable, to_device

ADVICE = (
    "A lower train.optimizer.lr, a longer train.schedule.warmup or train.optimizer.clip_grad_norm=10 usually helps; "
    "train.on_nonfinite=skip:N skips up to N such updates"
)


def describe(run: Run, update: int, taken: list[Loaded], bad: Nonfinite) -> str:
    """Find where an update became non-finite, and write a report.  Returns a text about all ranks.

    update: number of updates before it.  taken: the batches of this rank.  Every rank must call it.  It changes the
    model's running statistics, which the caller must restore.
    """
    alone = run.cfg.model.batch_coupling() is None
    finite = "each image alone is finite" if alone else "each batch is finite when it is computed again"
    images = examine(run, taken) if (examined := breakable(run.cfg, run.proc)) else []
    finite = finite if examined else "images not examined, because ranks wait for each other in SyncBN"
    found = [f"image {image['image_id']}: {image['first']}" for image in images if image["first"]]
    culprits = "; ".join(found[:3]) or finite
    shown = ", ".join(f"{name} {value:.4g}" for name, value in bad.losses.items())
    report = {
        "update": update, "process": run.proc.rank, "processes": run.proc.world,
        "losses": {name: _json_number(value) for name, value in bad.losses.items()},
        "gradient_norm_of_all_processes": _json_number(bad.norm), "images": images,
        "config": run.cfg.model_dump(mode="json"),
    }  # fmt: skip
    where = _write(run.out / NONFINITE / f"update-{update + 1:07d}-process{run.proc.rank}", report, taken)
    lines = all_gather([f"  rank {run.proc.rank}: {shown}; {culprits}; {where}"], run.proc)
    what = f"a loss or the gradient (norm {bad.norm:.4g}) is not finite"
    return "\n".join([f"{what} at update {update + 1}, which was not applied:", *itertools.chain(*lines)])


def refuse(run: Run, text: str, num_skipped: int) -> None:
    """Raise TrainingError, on all ranks, if train.on_nonfinite does not allow another skipped update."""
    allowed = int(run.cfg.train.on_nonfinite.removeprefix("skip:").replace("stop", "0"))
    if num_skipped > allowed:
        before = f" ({num_skipped - 1} have been skipped before)" if num_skipped > 1 else ""
        raise TrainingError(f"{run.out}: {text}\n  {ADVICE}{before}")


def examine(run: Run, taken: list[Loaded]) -> list[dict[str, Any]]:
    """Recompute a rank's images, one by one if they do not depend on each other, and look at every module.

    Returns a dict per image (per batch, with all its ids, for a norm that mixes images): image_id, key, losses, and
    first: a text that names what was not finite first, empty if all is finite.  Gradients are cleared afterwards.
    """
    data, alone = run.cfg.data, run.cfg.model.batch_coupling() is None
    found = []
    for loaded in taken:
        size = 1 if alone else len(loaded.batch.images)
        parts = split(loaded.batch, size, data.canvas_multiple, data.exact_canvas, data.canvases)
        ids = [[image] for image in loaded.image_ids] if alone else [list(loaded.image_ids)]
        for part, image_ids in zip(parts, ids, strict=True):
            run.model.zero_grad()
            losses, first = _first_nonfinite(run, to_device(part, run.proc.device))
            found.append({
                "image_id": image_ids[0] if alone else image_ids, "key": [int(key) for key in part.keys],
                "losses": {name: _json_number(value) for name, value in losses.items()}, "first": first,
            })  # fmt: skip
    run.model.zero_grad()
    return found


def _first_nonfinite(run: Run, batch: Batch) -> tuple[dict[str, float], str]:
    """Return the losses of a batch, and what is not finite first in its forward and backward pass."""
    first: list[str] = []
    with keeping_all(run.model), _hooks(run.model, first.append):
        with run.autocast():
            losses = run.model(batch)  # {name: (B,)}
        means = {name: float(loss.detach().mean()) for name, loss in losses.items()}
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong:
            first.append(", ".join(wrong))
        if not first:
            sum(loss.sum() for loss in losses.values()).backward()
    named = run.model.named_parameters()
    bad = [name for name, parameter in named if parameter.grad is not None and not parameter.grad.isfinite().all()]
    if bad:
        first.append(f"the gradient of {bad[-1]}")
    return means, f"{first[0]} is not finite" if first else ""


@contextmanager
def _hooks(model: nn.Module, note: Callable[[str], None]) -> Iterator[None]:
    """Note each module whose output, or the gradient of it, is not finite, in the order of computation."""

    def check(what: str, tensor: Tensor) -> None:
        if not tensor.isfinite().all():
            note(what)

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                check(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(check, f"the gradient of the output of {name}"))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(partial(look, name or "the model")))
        yield


def _write(folder: Path, report: dict[str, Any], taken: list[Loaded]) -> str:
    """Write a report whole or not at all.  Returns a text that says where it is, or why it could not be written."""
    try:
        if folder.parent.is_symlink():  # it would lead out of the run folder
            folder.parent.unlink()
        folder.parent.mkdir(exist_ok=True)
        with folder_written_whole(folder) as temporary:
            for number, loaded in enumerate(taken):
                tensors = loaded.batch._asdict() | {
                    f"gt.{name}": field for name, field in loaded.batch.gt._asdict().items()
                }
                given = {name: value for name, value in tensors.items() if name != "gt" and value is not None}
                content = {name: torch.as_tensor(value).contiguous() for name, value in given.items()}
                with create(temporary / f"batch-{number}.safetensors") as file:
                    file.write(safetensors.torch.save(content))
            with create(temporary / "report.json") as file:
                file.write(json.dumps(report, indent=1).encode())
    except OSError as error:
        return f"not written to {folder}: {error.strerror}"
    return f"written to {folder}"


def _json_number(value: float) -> float | str:
    """Return a number for JSON; "nan", "inf" and "-inf" become text."""
    return value if math.isfinite(value) else str(value)


def pass_over(run: Run, progress: Progress, state: UpdateState, taken: list[Loaded], bad: Nonfinite, log: Log) -> None:
    """Skip an update whose losses or gradient are not finite, if train.on_nonfinite allows it.

    taken: the batches of this rank.  Raises TrainingError, on all ranks, if it does not.
    """
    text = describe(run, progress.update, taken, bad)
    state.undo()
    refuse(run, text, progress.nonfinite + 1)
    log.message(f"{text}\n  skipped: {progress.nonfinite + 1} so far, {run.cfg.train.on_nonfinite}")
    progress.nonfinite += 1
    progress.update, progress.evaluation_due = progress.update + 1, bad.evaluation_due
    state.end()
