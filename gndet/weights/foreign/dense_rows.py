"""The order of the channels that a dense head predicts, in gndet's files and in those of other toolkits.

K classes, A anchors per cell: scales times ratios.  gndet orders class scores as (K, A), so that a class has its own
rows; toolkits order them as (A, K).  Anchors come scale by scale, except in torchvision, ratio by ratio.
"""

import torch
from torch import Tensor

from gndet.config.model import DenseConfig
from gndet.weights.read import DENSE

BOXES = "dense.boxes"
NEVER = -100.0  # logit of torchvision's background class, whose score must not count


def from_file(state: dict[str, Tensor], cfg: DenseConfig, format: str) -> None:
    """Reorder the predictors in place, from a toolkit's order to gndet's."""
    order = _anchors(cfg, format)
    for key in _keys(state, DENSE):
        state[key] = state[key].unflatten(0, (cfg.kinds, -1))[order].transpose(0, 1).flatten(0, 1).contiguous()
    for key in _keys(state, BOXES):
        state[key] = state[key].unflatten(0, (cfg.kinds, 4))[order].flatten(0, 1)


def to_file(state: dict[str, Tensor], cfg: DenseConfig, format: str, *, background: bool) -> None:
    """Undo `from_file` in place; background: add a class that is never found before the others."""
    order = _anchors(cfg, format).argsort()
    for key in _keys(state, DENSE):
        rows = state[key].unflatten(0, (-1, cfg.kinds))  # (K, A, ...)
        if background:
            fill = NEVER if key.endswith(".bias") else 0.0
            rows = torch.cat([torch.full_like(rows[:1], fill), rows])
        state[key] = rows.transpose(0, 1)[order].flatten(0, 1)
    for key in _keys(state, BOXES):
        state[key] = state[key].unflatten(0, (cfg.kinds, 4))[order].flatten(0, 1)


def _keys(state: dict[str, Tensor], layer: str) -> list[str]:
    return [key for key in (f"{layer}.weight", f"{layer}.bias") if key in state]


def _anchors(cfg: DenseConfig, format: str) -> Tensor:
    """Return the place in the toolkit's order of each anchor in gndet's, (A,) int64."""
    order, ratios = torch.arange(cfg.kinds), len(cfg.aspect_ratios)
    return order.view(ratios, -1).t().flatten() if format == "torchvision" else order
