"""Plan a norm study: its variants, the overrides of each cell, cells to refuse, studies to continue, the budget."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from gndet import __version__
from gndet.config.loading import config_from_dict, load_config
from gndet.config.norm import NormConfig
from gndet.config.schema import Config
from gndet.data.workers import usable_cores
from gndet.errors import ConfigError, OutputError
from gndet.modeling.build import build_model
from gndet.toolbox.analysis.study_results import GROUPS, STUDY, CellResult, Speed, Study, is_study, read_study
from gndet.training.run_folder import NEUTRAL, UNSET, flat

KINDS = get_args(NormConfig.model_fields["kind"].annotation)
RULES = {
    "scaled": "each update takes images per GPU x ranks (1) images, as in the paper; every cell sees the same number "
    "of images",
    "fixed": "each update takes the {batch} images of train.global_batch in every cell, images per GPU at a time; only "
    "a norm that mixes images can depend on images per GPU",
}
ROOT = "scales with the square root of"
RATES = {"sgd": "scales linearly with", "adamw": ROOT, "lamb": ROOT}
OWN = {"out": "; use --out", "model.norm.kind": "; use --norms", "train.images_per_gpu": "; use --images-per-gpu"}
SET = ("keep_last", "vis_images", "report", "eval_every", "checkpoint_every", "log_every")  # of train, in each cell


def variants(norms: Sequence[str], groups: Sequence[str] | None) -> list[str]:
    """Return the variants that the command line asks for.  Raises ConfigError for an unknown norm or a wrong count."""
    for name in norms:
        if name not in KINDS:
            raise ConfigError(f"--norms: {name!r} is not one of {', '.join(KINDS)}")
    for count in groups or ():
        if count != "channels" and not (count.isdecimal() and int(count) > 0):
            raise ConfigError(f"--groups: {count!r}, expected numbers >= 1, or channels (one group per channel)")
    names = [GROUPS + (c if c == "channels" else str(int(c))) for c in groups] if groups else norms
    return list(dict.fromkeys(names))


def refuse_own(overrides: Sequence[str], batch: str, by_groups: bool) -> None:
    """Raise ConfigError for an override of a key that each cell sets (`cell_overrides`)."""
    instead = OWN | {f"train.{name}": "" for name in SET}
    if batch == "scaled":
        instead["train.global_batch"] = " to --images-per-gpu; --batch fixed keeps it"
    if by_groups:
        instead |= {f"model.norm.{key}": "; use --groups" for key in ("groups", "channels_per_group")}
    for override in overrides:
        if (words := instead.get(override.partition("=")[0].strip())) is not None:
            raise ConfigError(f"override {override!r}: the study sets this key in each cell{words}")


def norm_overrides(variant: str) -> list[str]:
    """Return the overrides that set model.norm to a variant; parts with a norm of their own keep it."""
    if not variant.startswith(GROUPS):
        return [f"model.norm.kind={variant}"]
    count = variant.removeprefix(GROUPS)
    if count in ("1", "channels"):
        return [f"model.norm.kind={'ln' if count == '1' else 'in'}"]
    return ["model.norm.kind=gn", f"model.norm.groups={count}", "model.norm.channels_per_group=null"]


def begin(cfg: Config, config: str, overrides: Sequence[str], cells: list[CellResult], batch: str, jobs: int) -> Study:
    """Return a new study, with the cells that cannot be trained marked as refused.

    Raises ConfigError if no cell can be trained.
    """
    schedule, optimizer = cfg.train.schedule, cfg.train.optimizer
    rule = RULES[batch].format(batch=cfg.train.global_batch)
    rate = f"the learning rate {RATES[optimizer.kind]} the images per update ({optimizer.kind})"
    begun = Study(
        config=config, overrides=list(overrides), settings=cfg.model_dump(mode="json"), batch=batch,
        rule=f"--batch {batch}: {rule}; {rate}", updates=schedule.updates, reference_batch=schedule.reference_batch,
        jobs=jobs, results=cells, date=time.strftime("%Y-%m-%d %H:%M"), notes=_notes(cfg, cells),
        versions={"gndet": __version__, "torch": torch.__version__, "python": platform.python_version(),
                  "device": _device(cfg)},
    )  # fmt: skip
    kinds = {cell.variant for cell in cells}
    built: set[str] = set()
    for cell in cells:
        if cell.variant == "sync_bn" and "bn" in kinds:
            cell.state, cell.reason = "copied", "the same as bn on one rank"
        elif reason := _refusal(cell, begun, built):
            cell.state, cell.reason = "refused", reason
    if all(cell.state == "refused" for cell in cells):
        raise ConfigError(f"no cell can be trained; {cells[0].name}: {cells[0].reason}")
    return begun


def _refusal(cell: CellResult, begun: Study, built: set[str]) -> str:
    """Return why a cell cannot be trained, or "".  built: variants whose model is known to build."""
    try:
        cfg = load_config(begun.config, [*begun.overrides, *cell_overrides(cell, begun)])
        if cell.variant not in built:
            with torch.device("meta"):
                build_model(cfg.model, 2)
            built.add(cell.variant)
    except ConfigError as error:
        return str(error)
    return ""


def _notes(cfg: Config, cells: list[CellResult]) -> list[str]:
    kinds, notes = {cell.variant for cell in cells}, []
    if "frozen_bn" in kinds and not cfg.train.weights:
        notes.append("frozen_bn without train.weights is the identity: its cells train without any normalization.")
    if "sync_bn" in kinds:
        how = "its cells are copied from bn's" if "bn" in kinds else "its cells show bn"
        notes.append(f"sync_bn on one rank is the same as bn: {how}.")
    own = [part for part in cfg.model.part_norms() if part != "rpn" and getattr(cfg.model, part).norm]
    notes += [f"The config sets model.{part}.norm, which is the same in every cell." for part in own]
    return notes


def _device(cfg: Config) -> str:
    if cfg.device != "cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {usable_cores()} cores"


def cell_overrides(cell: CellResult, begun: Study) -> list[str]:
    """Return the overrides of a cell, without its folder."""
    settings = begun.settings["train"]
    batch = cell.images if begun.batch == "scaled" else settings["global_batch"]
    total = max(round(begun.updates * begun.reference_batch / batch), 1)
    changed = [f"train.global_batch={batch}"] if begun.batch == "scaled" else []
    if begun.factor != 1:
        schedule = settings["schedule"]
        steps = [round(step * begun.factor) for step in schedule["steps"]]
        warmup = round(schedule["warmup"] * begun.factor)
        changed += [f"train.schedule.updates={begun.updates}", f"train.schedule.steps={steps}".replace(" ", "")]
        changed += [f"train.schedule.warmup={warmup}"]
    return [
        *norm_overrides(cell.variant), f"seed={cell.seed}", f"train.images_per_gpu={cell.images}", *changed,
        "train.keep_last=1", "train.vis_images=0", "train.report=false", "train.eval_every=0",
        f"train.checkpoint_every={-(-total // 3)}", f"train.log_every={-(-total // 10)}",
    ]  # fmt: skip


def resume_study(folder: Path, new: Study, show: Callable[[str], None]) -> Study:
    """Return the study of a folder with the cells of the new study added, or the new study if the folder has none.

    A resumed study keeps its measured speed and its shortened schedule.  Raises OutputError if its settings differ and
    it has begun to train.
    """
    if not is_study(folder):
        return new
    old = read_study(folder)
    if old.speed is None and not any(result.state in ("done", "failed") for result in old.results):
        return new  # it failed, or was killed, while it measured
    if changed := _changed_settings(old, new):
        raise OutputError("\n".join([f"{folder}: a study with other settings; choose another --out", *changed[:8]]))
    known = {result.name: result for result in old.results if result.state in ("done", "failed")}
    results = [known.get(result.name, result) for result in new.results]
    asked = {result.name for result in results}
    added = [result for result in old.results if result.name not in asked and result.state == "done"]
    if added:
        show(f"{len(added)} finished cells of earlier commands stay in the table, although this one omits them")
    kept = {"updates": old.updates, "factor": old.factor, "budget": old.budget, "speed": old.speed}
    return new.model_copy(update={"results": [*results, *added], **kept})


def _changed_settings(old: Study, new: Study) -> list[str]:
    """Return a line for each setting that differs and that affects what is learned."""
    old_settings, new_settings = (
        {key: value for key, value in flat(config_from_dict(s.settings, f"{STUDY} of {s.date}")).items()
         if not key.startswith((*NEUTRAL, "out", "seed"))} | {"--batch": s.batch}
        for s in (old, new)
    )  # fmt: skip
    keys = old_settings | new_settings
    pairs = {key: (old_settings.get(key, UNSET), new_settings.get(key, UNSET)) for key in keys}
    return [f"  {key}: {before!r} there, {after!r} now" for key, (before, after) in pairs.items() if before != after]


FEWEST_UPDATES = 50  # at the reference batch; shorter runs say nothing about training
RESERVE = 0.95  # share of the budget that is planned; the rest is a reserve


def per_image_at(speed: Speed, images: int) -> float:
    """Return the seconds per image at `images` per GPU, interpolated between the measured sizes.

    An update has a fixed cost and a cost per image, so seconds per image are linear in 1 / images.
    """
    sizes = sorted(speed.per_image, reverse=True)  # 1 / size ascending, as np.interp needs
    return float(np.interp(1 / images, [1 / size for size in sizes], [speed.per_image[size] for size in sizes]))


def estimate(speed: Speed, sizes: Sequence[int], images: int, jobs: int) -> float:
    """Return the seconds that all cells take, `jobs` at a time.

    sizes: images per GPU of each cell; images: how many images each cell trains on.
    """
    rounds = math.ceil(len(sizes) / jobs) / len(sizes)  # the last round may be incomplete
    return rounds * sum(per_image_at(speed, size) * images + speed.overhead for size in sizes)


def fit_budget(
    speed: Speed, sizes: Sequence[int], updates: int, reference_batch: int, jobs: int, budget: float
) -> tuple[float, int]:
    """Return the factor (at most 1) that shortens the schedule to fit `budget` seconds, and the updates that remain.

    updates: the config's, each of reference_batch images.  Raises ConfigError if too few updates remain.
    """
    room = RESERVE * budget
    whole = estimate(speed, sizes, updates * reference_batch, jobs)
    if whole <= room:
        return 1.0, updates
    fixed = estimate(speed, sizes, 0, jobs)
    factor = max(room - fixed, 0.0) / (whole - fixed)
    left = math.floor(updates * factor)
    if left < min(FEWEST_UPDATES, updates):
        fewest = min(FEWEST_UPDATES, updates)
        needed = estimate(speed, sizes, fewest * reference_batch, jobs)
        cells = math.floor(len(sizes) * room / needed)
        raise ConfigError(
            f"--budget: the remaining {budget:.0f} s suffice for {left} updates of {reference_batch} images in each of "
            f"{len(sizes)} cells; expected at least {fewest}.  Set --budget {math.ceil(needed / RESERVE / 60) + 2}m"
            + (f" or shrink the grid to {cells} cells: fewer norms, sizes or --seeds" if cells else "")
        )
    return left / updates, left
