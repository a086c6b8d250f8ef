"""Where images of a batch reach each other: the four couplings, each looked for by itself, in float64.

padding: the cells beside a picture, which other pictures' sizes decide.  batch statistics: other images' values.
sampling: what is drawn for an image.  normaliser: what an image's loss is divided by.
A leak of one is not taken for another: padding is judged without batch mates, batch statistics on one canvas, and
sampling and normalisers behind pyramids that were computed image by image.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gndet.modeling.detection_model import DetectionModel
from gndet.modeling.norms.valid_area import ValidAreas
from gndet.structures import Batch, Step

COUPLINGS = ("padding", "batch statistics", "sampling", "normaliser")
TOLERANCE = 1e-9  # relative (L2); rounding of float64 stays below 1e-12


class Leak(NamedTuple):
    """A coupling that was found, at the first place it shows."""

    coupling: str
    where: str
    difference: float  # relative (L2)


Trace = list[tuple[str, Tensor]]  # a module's name and its output, in the order they ran


def find_leaks(model: DetectionModel, singles: list[Batch], together: Batch) -> list[Leak]:
    """Look for each coupling among images of different sizes, two at least.

    model: in float64 and in training mode.  singles: each image on its own canvas; together: all on one.
    Returns the first leak of each coupling that leaks.
    """
    found: dict[str, Leak] = {}
    company = _image_trace(model, together)
    for i, alone in enumerate(singles):
        padded = _image_trace(model, _on_canvas_of(together, i))
        for coupling, small, large, row in (
            ("padding", _image_trace(model, alone), padded, 0),
            ("batch statistics", padded, company, i),
        ):
            if coupling not in found and (first := _first_difference(model, small, large, row)):
                found[coupling] = Leak(coupling, *first)
    for leak in _behind_the_pyramid(model, singles, together):
        found.setdefault(leak.coupling, leak)
    return [found[coupling] for coupling in COUPLINGS if coupling in found]


def _on_canvas_of(batch: Batch, i: int) -> Batch:
    gt = type(batch.gt)(*(field[i : i + 1] for field in batch.gt))
    return Batch(batch.images[i : i + 1], batch.sizes[i : i + 1], batch.keys[i : i + 1], gt, batch.padded)


@contextmanager
def _listening(model: nn.Module, note: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call note with name, module, first input and output of every module without parts that runs."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hook = module.register_forward_hook(lambda m, args, out, name=name: note(name, m, args[0], out))
                hooks.enter_context(hook)
        yield


@torch.no_grad()
def _image_trace(model: DetectionModel, batch: Batch) -> Trace:
    """What the layers that see whole images compute of a batch, module by module."""
    trace: Trace = []
    with kept_statistics(model), _listening(model, lambda name, m, x, out: trace.append((name, out.clone()))):
        model.probe(batch.images, batch.sizes, batch.padded, regions=False)
    return trace


def _first_difference(model: nn.Module, small: Trace, large: Trace, row: int) -> tuple[str, float] | None:
    """The first module whose output for the only image of `small` differs from row `row` of `large`, and how much."""
    for (name, expected), (_, got) in zip(small, large, strict=True):
        height, width = expected.shape[2:]
        difference = relative(got[row, :, :height, :width], expected[0])
        if difference > TOLERANCE:
            return described(model, name), difference
    return None


def relative(got: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference over that of the expected; 0 where both are zero."""
    difference = (got - expected).norm().item()
    return 0.0 if difference == 0 else difference / max(expected.norm().item(), 1e-300)


def described(model: nn.Module, name: str) -> str:
    """A module's name with what it is."""
    return f"{name}: {model.get_submodule(name)}"


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Put running statistics back afterwards: one pass must not change the next."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


@torch.no_grad()
def _behind_the_pyramid(model: DetectionModel, singles: list[Batch], together: Batch) -> Iterator[Leak]:
    """Leaks of the sampling, the heads and the losses, given pyramids that do not leak."""
    with kept_statistics(model):
        pyramids = [model.features(one.images, one.sizes, one.padded) for one in singles]
        shapes, areas = model.features(together.images, together.sizes, together.padded)
    stitched = [torch.zeros_like(level) for level in shapes]
    for i, (pyramid, _) in enumerate(pyramids):
        for level, feature in zip(stitched, pyramid, strict=True):
            level[i, :, : feature.shape[2], : feature.shape[3]] = feature[0]
    mixed: list[Leak] = []
    trace: Trace = []

    def note(name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        if not model.sees_regions(name):
            trace.append((name, out.clone()))
        else:  # a head: does it make of its first region the same in company as by itself?
            difference = relative(out[:1], module.forward(x[:1]))
            if difference > TOLERANCE:
                mixed.append(Leak("batch statistics", described(model, name), difference))

    def step(pyramid: list[Tensor], areas: ValidAreas, batch: Batch) -> tuple[Step, Trace]:
        trace.clear()
        extends, model.extends_edges = model.extends_edges, True  # what RoIAlign finds beyond an edge is padding's leak
        try:
            with kept_statistics(model), _listening(model, note):
                return model.step(pyramid, areas, batch), list(trace)
        finally:
            model.extends_edges = extends

    company, company_trace = step(stitched, areas, together)
    yield from mixed
    for i, (one, (pyramid, own_areas)) in enumerate(zip(singles, pyramids, strict=True)):
        alone, alone_trace = step(pyramid, own_areas, one)
        same_scores = _first_difference(model, alone_trace, company_trace, i) is None
        mine, expected = model.choices(company, i), model.choices(alone, 0)
        kinds = list(expected) if same_scores else ["sampled anchors"]  # the others follow from the scores
        flipped = {kind: len(mine[kind] ^ expected[kind]) / max(len(expected[kind]), 1) for kind in kinds}
        if any(flipped.values()):
            kind = next(kind for kind in kinds if flipped[kind])
            yield Leak("sampling", f"{kind} of an image", flipped[kind])
        elif same_scores and not mixed:
            for name, loss in company.losses.items():
                difference = relative(loss[i], alone.losses[name][0])
                if difference > TOLERANCE:
                    yield Leak("normaliser", name, difference)
