"""How far a run has come: what changes from update to update beside the tensors, and goes into its checkpoints."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Best(NamedTuple):
    """The evaluation that `best` points to."""

    score: float
    update: int


def nothing() -> None:
    """Do nothing."""


@dataclass
class Progress:
    """The state of a run after `update` updates, equal in all of its processes."""

    update: int = 0
    evaluation_due: bool = False  # the evaluation after this update has not been finished
    values: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best: Best | None = None
    nonfinite: int = 0  # updates that were not made because a loss or a gradient was not finite
    unreadable: dict[int, str] = field(default_factory=dict)  # training image's id: why it was left out
    whole: bool = True  # False while an update is being made: weights and `update` do not belong together
    undo: Callable[[], None] = nothing  # puts back what an update that is not made yet has changed

    def to_meta(self) -> dict[str, Any]:
        """Its part of a checkpoint's meta.json."""
        return {
            "update": self.update, "evaluation_due": self.evaluation_due, "best": self.best and self.best.score,
            "best_update": self.best and self.best.update, "nonfinite": self.nonfinite,
            "metrics": {name: value if math.isfinite(value) else None for name, value in self.values.items()},
            "unreadable": {str(image): reason for image, reason in self.unreadable.items()},
        }  # fmt: skip

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "Progress":
        """What `to_meta` wrote."""
        return cls(
            update=int(meta["update"]),
            evaluation_due=bool(meta.get("evaluation_due", False)),
            values={name: math.nan if value is None else value for name, value in meta["metrics"].items()},
            best=None if meta["best"] is None else Best(meta["best"], meta["best_update"]),
            nonfinite=int(meta.get("nonfinite", 0)),
            unreadable={int(image): reason for image, reason in meta.get("unreadable", {}).items()},
        )

    def evaluated(self, values: dict[str, float]) -> bool:
        """Note the metrics of an evaluation after this update.  Returns whether it is the best so far."""
        self.evaluation_due, self.values = False, values
        better = self.best is None or score(values) > self.best.score
        self.best = Best(score(values), self.update) if better else self.best
        return better


def score(values: Mapping[str, float]) -> float:
    """What `best` means: mask AP, or box AP without masks; undefined counts as 0."""
    value = values.get("mask/AP", values["box/AP"])
    return 0.0 if math.isnan(value) else value
