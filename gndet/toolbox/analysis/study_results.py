"""The results of a norm study: its grid of norm x images per GPU x seed, means and intervals over seeds, a verdict.

A study folder holds study.json (a `Study`), study.csv, curve.png, cells/NAME (the run folder of each cell) and
logs/NAME.txt.  AP and error are fractions in the files; they are
shown in percent, as in Wu & He 2018.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gndet.errors import DataError
from gndet.files import write_whole
from gndet.text import csv_table, text_table

STUDY, TABLE, CURVE = "study.json", "study.csv", "curve.png"
GROUPS = "groups-"  # prefix of the variants of a group ablation: groups-1, groups-8, groups-channels
# the verdict uses the first that was measured
METRICS = {"box/AP": "box AP", "mask/AP": "mask AP", "error": "validation error"}
LOWER = ("error",)  # metrics of which the smallest is the best
CONFIDENCE = 0.95  # of all intervals


class CellResult(BaseModel):
    """A cell of the grid: its metrics as an evaluation logs them, and how many seconds it trained."""

    model_config = ConfigDict(extra="forbid")
    variant: str
    images: int
    seed: int
    state: Literal["pending", "running", "done", "copied", "failed", "refused"] = "pending"
    metrics: dict[str, float | None] = {}
    seconds: float = 0.0
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of the cell's folder, e.g. bn-2-seed0."""
        return f"{self.variant}-{self.images}-seed{self.seed}"


class Speed(BaseModel):
    """The measured speed: seconds per image by images per GPU, and seconds that a cell spends outside training."""

    model_config = ConfigDict(extra="forbid")
    per_image: dict[int, float]
    overhead: float


class Study(BaseModel):
    """The content of study.json."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    config: str
    overrides: list[str]
    settings: dict[str, Any]  # the resolved config, before norm, batch, seed and budget
    batch: Literal["scaled", "fixed"]
    rule: str
    updates: int  # of every cell's schedule, at the reference batch
    reference_batch: int
    factor: float = 1.0  # schedule of the cells / schedule of the config; below 1 if the budget shortened it
    budget: float | None = None  # seconds
    jobs: int = 1
    speed: Speed | None = None
    notes: list[str] = []
    versions: dict[str, str] = {}
    date: str = ""
    results: list[CellResult] = Field(min_length=1)

    @property
    def variants(self) -> list[str]:
        """Norms or group counts, in the given order."""
        return list(dict.fromkeys(result.variant for result in self.results))

    @property
    def sizes(self) -> list[int]:
        """Images per GPU, ascending."""
        return sorted({result.images for result in self.results})

    @property
    def by_groups(self) -> bool:
        """Whether this study compares group counts."""
        return self.variants[0].startswith(GROUPS)


class Mean(NamedTuple):
    """A mean over n seeds, or a difference of two means, with the half width of its interval; nan if n < 2."""

    mean: float
    half: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half


def study_cells(variants: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> list[CellResult]:
    """Return the cells in running order: seed by seed, so that an interrupted study still has complete curves."""
    return [CellResult(variant=v, images=size, seed=seed) for seed in seeds for v in variants for size in sizes]


def variant_title(variant: str) -> str:
    """Return the name of a variant as it is shown."""
    if not variant.startswith(GROUPS):
        return variant
    count = variant.removeprefix(GROUPS)
    return {"1": "1 group (ln)", "channels": "one group per channel (in)"}.get(count, f"{count} groups")


def fraction_point(df: float) -> float:
    """Return the t for which |T| < t with probability CONFIDENCE; T is Student's t with df >= 1 degrees of freedom.

    After the substitution t = sqrt(df) tan(a), the density of the angle a is proportional to cos(a) ** (df - 1).
    """
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle).clip(0) ** (df - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(float(np.interp(CONFIDENCE, below / below[-1], angle)))


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean with Student's 95 % interval."""
    n = len(values)
    if n < 2:
        return Mean(values[0] if n else math.nan, math.nan, n)
    return Mean(float(np.mean(values)), fraction_point(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n), n)


def mean_difference(a: Sequence[float], b: Sequence[float]) -> Mean:
    """Return mean(a) - mean(b) with its 95 % interval (Welch 1947: the variances may differ); a and b are not empty."""
    value, n = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
    if n < 2:
        return Mean(value, math.nan, n)
    parts = [float(np.var(sample, ddof=1)) / len(sample) for sample in (a, b)]
    total = sum(parts)
    if total == 0:
        return Mean(value, 0.0, n)
    df = total**2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, (a, b), strict=True))
    return Mean(value, fraction_point(df) * math.sqrt(total), n)


def cell_values(study: Study, variant: str, size: int, metric: str) -> list[float]:
    """Return the metric in percent of the finished cells of a norm and size, one value per seed."""
    finished = (cell for cell in _cells(study, variant, size) if cell.state in ("done", "copied"))
    return [100 * value for cell in finished if (value := cell.metrics.get(metric)) is not None]


def percent_mean(study: Study, variant: str, size: int, metric: str) -> Mean:
    """Return the mean of a cell's metric over seeds, in percent."""
    return mean_of(cell_values(study, variant, size, metric))


def _cells(study: Study, variant: str, size: int) -> list[CellResult]:
    return [result for result in study.results if (result.variant, result.images) == (variant, size)]


def metrics_of(study: Study) -> list[str]:
    """Return the metrics of METRICS that any cell has."""
    return [metric for metric in METRICS if any(result.metrics.get(metric) is not None for result in study.results)]


def cell_words(study: Study, variant: str, size: int, metric: str) -> str:
    """Return a cell of the table, e.g. "34.1 ± 1.2 (3)", and how many of its runs failed or have yet to run."""
    states = Counter(cell.state for cell in _cells(study, variant, size))
    mean = percent_mean(study, variant, size, metric)
    words = [f"{mean.mean:.1f}{_half(mean)} ({mean.n})"] if mean.n else []
    for state in ("failed", "refused"):
        if count := states[state]:
            words.append(f"{count} {state}" if count < states.total() else state)
    if unfinished := states["pending"] + states["running"]:
        words.append(f"{unfinished} to run")
    return ", ".join(words) or "-"


def _half(mean: Mean) -> str:
    return f" ± {mean.half:.1f}" if mean.n > 1 else ""


def study_verdict(study: Study) -> list[str]:
    """Return sentences that say what the study shows, with the intervals of all differences."""
    metric = next(iter(metrics_of(study)), None)
    if metric is None:
        return ["No cell is finished, so there is no verdict yet."]
    said = list(_best(study, metric))
    if max(len(cell_values(study, v, s, metric)) for v in study.variants for s in study.sizes) == 1:
        said.insert(0, "One seed per cell: there are no intervals, so effects cannot be distinguished from chance.")
    if len(study.sizes) > 1:
        said += [words for variant in study.variants for words in _fall(study, variant, metric)]
    failed = [f"{variant_title(r.variant)} at {r.images} (seed {r.seed})" for r in study.results if r.state == "failed"]
    said += [f"Failed: {', '.join(failed)}; {STUDY} and the report give the reasons."] if failed else []
    return said


def _best(study: Study, metric: str) -> Iterator[str]:
    """Name the best variant at the smallest size, and the variants that cannot be distinguished from it."""
    size, name = study.sizes[0], METRICS[metric]
    reached = {v: found for v in study.variants if (found := cell_values(study, v, size, metric))}
    if not reached:
        yield f"At {images_per_gpu(size)} no cell is finished."
        return
    sign, side = (1, "below") if metric in LOWER else (-1, "above")
    first, *others = sorted(reached, key=lambda v: sign * mean_of(reached[v]).mean)
    mean = mean_of(reached[first])
    reach = f"{name} {mean.mean:.1f}{_half(mean)} (n = {mean.n})"
    yield f"At {images_per_gpu(size)} {variant_title(first)} is best: {reach}."
    clear: list[str] = []
    unclear: list[str] = []
    for variant in others:
        gap = mean_difference(reached[first], reached[variant])
        (clear if gap.clear else unclear).append(f"{variant_title(variant)} ({_points(gap)})")
    if clear:
        yield f"That is clearly {side} {', '.join(clear)}."
    if unclear:
        yield (
            f"It cannot be distinguished from {', '.join(unclear)}: the difference's interval contains 0 or does not "
            "exist."
        )
    if len(others) > 1:
        yield "Each interval is for a single difference; it is not corrected for multiple comparisons."


def _fall(study: Study, variant: str, metric: str) -> Iterator[str]:
    """Say whether a variant's AP or error falls from the largest to the smallest size."""
    small, large = study.sizes[0], study.sizes[-1]
    at_small, at_large = (cell_values(study, variant, size, metric) for size in (small, large))
    if not at_small or not at_large:
        return
    change = mean_difference(at_small, at_large)
    way = (" falls" if change.mean < 0 else " rises") if change.clear else ""
    doubt = ", without an interval" if change.n < 2 else "" if change.clear else "; the interval includes 0"
    span = f"from {large} to {images_per_gpu(small)}"
    yield f"{variant_title(variant)}{way} {span}: {_points(change)} {METRICS[metric]}{doubt}."


def images_per_gpu(size: int) -> str:
    """Return a size in words, e.g. "2 images per GPU"."""
    return f"{size} image{'s' if size > 1 else ''} per GPU"


def _points(change: Mean) -> str:
    low, high = change.mean - change.half, change.mean + change.half
    return f"{change.mean:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if change.n > 1 else "")


def study_table(study: Study, metric: str) -> str:
    """Return the table of norm x images per GPU as text."""
    head = ["norm" if not study.by_groups else "groups", *map(str, study.sizes)]
    rows = [[variant_title(v), *(cell_words(study, v, size, metric) for size in study.sizes)] for v in study.variants]
    caption = f"{METRICS[metric]} in percent by images per GPU: mean ± half of the 95 % interval (number of seeds)"
    return f"{caption}\n{text_table([head, *rows], left=range(len(head)))}"


def is_study(folder: Path) -> bool:
    """Return whether a folder holds a norm study."""
    return (folder / STUDY).is_file()


def read_study(folder: Path) -> Study:
    """Read study.json.  Raises DataError if it cannot be read or is not of this version."""
    path = folder / STUDY
    try:
        return Study.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the study: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"not a norm study of this version: {where}: {first['msg']}"
        raise DataError(f"{path}: {what}; restore this file, or choose another folder") from None


def write_study(folder: Path, study: Study) -> None:
    """Write study.json and study.csv, each atomically.  Raises OutputError."""
    write_whole(folder / STUDY, study.model_dump_json(indent=1))
    names = sorted({name for result in study.results for name in result.metrics})
    rows: list[list[Any]] = [["norm", "images_per_gpu", "seed", "state", "seconds", *names, "reason"]]
    for r in study.results:
        found = [None if (value := r.metrics.get(name)) is None else f"{value:.6f}" for name in names]
        rows.append([r.variant, r.images, r.seed, r.state, f"{r.seconds:.1f}", *found, r.reason])
    write_whole(folder / TABLE, csv_table(rows))
