"""Find where images of a batch influence each other: four couplings, each tested by itself, in float64.

padding: the cells outside a picture, whose number depends on the sizes of the other pictures.  batch statistics: the
values of other images.  sampling: what is drawn for an image.  normalizer: the number that an image's loss is divided
by.  The tests keep the couplings apart: padding is tested without other images in the batch, batch statistics on one
canvas, and sampling and normalizers on pyramids that were computed image by image.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gndet.modeling.image_model import ImageModel
from gndet.modeling.norms.valid_area import ValidAreas
from gndet.structures import Batch

COUPLINGS = ("padding", "batch statistics", "sampling", "normalizer")
TOLERANCE = 1e-9  # relative (L2); rounding in float64 stays below 1e-12


class Leak(NamedTuple):
    """A coupling and the first place where it shows."""

    coupling: str
    where: str
    difference: float  # relative (L2)


Trace = list[tuple[str, Tensor]]  # each module's name and output, in running order


def find_leaks(model: ImageModel, singles: list[Batch], together: Batch) -> list[Leak]:
    """Test each coupling on at least two images of different sizes.

    model: in float64 and in training mode.  singles: each image on its own canvas.  together: all images on one canvas.
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
    shares = None if batch.shares is None else batch.shares[i : i + 1]
    return Batch(batch.images[i : i + 1], batch.sizes[i : i + 1], batch.keys[i : i + 1], gt, batch.padded, shares)


@contextmanager
def _listening(model: nn.Module, note: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call note with the name, module, first input and output of every leaf module that runs on a tensor."""

    def heard(name: str, module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor):  # not what only chooses among maps, like OneLevel
            note(name, module, arguments[0], out)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(partial(heard, name)))
        yield


@torch.no_grad()
def _image_trace(model: ImageModel, batch: Batch) -> Trace:
    """Return the outputs of the layers that see whole images, module by module."""
    trace: Trace = []
    with kept_statistics(model), _listening(model, lambda name, m, x, out: trace.append((name, out.clone()))):
        model.probe(batch.images, batch.sizes, batch.padded, regions=False)
    return trace


def _first_difference(model: nn.Module, small: Trace, large: Trace, row: int) -> tuple[str, float] | None:
    """Return the first module whose output for the only image of `small` differs from row `row` of `large`.

    Returns its description and the relative difference; None if no module differs.
    """
    for (name, expected), (_, got) in zip(small, large, strict=True):
        inside: tuple[Any, ...] = tuple(map(slice, expected.shape[1:]))  # maps (B, C, H, W), and timm's (B, H, W, C)
        difference = relative(got[row][inside], expected[0])
        if difference > TOLERANCE:
            return described(model, name), difference
    return None


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference divided by that of `expected`; 0 if both are zero."""
    difference = (got - expected).norm().item()
    return 0.0 if difference == 0 else difference / max(expected.norm().item(), 1e-300)


def described(model: nn.Module, name: str) -> str:
    """Return a module's name and its description."""
    return f"{name}: {model.get_submodule(name)}"


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics on exit, so that one pass does not change the next."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


@torch.no_grad()
def _behind_the_pyramid(model: ImageModel, singles: list[Batch], together: Batch) -> Iterator[Leak]:
    """Yield the leaks of the sampling, the heads and the losses, given pyramids that do not leak."""
    with kept_statistics(model):
        pyramids = [model.features(single.images, single.sizes, single.padded, single.keys) for single in singles]
        shapes, areas = model.features(together.images, together.sizes, together.padded, together.keys)
    stitched = [torch.zeros_like(level) for level in shapes]
    for i, (pyramid, _) in enumerate(pyramids):
        for level, feature in zip(stitched, pyramid, strict=True):
            level[i, :, : feature.shape[2], : feature.shape[3]] = feature[0]
    mixed: list[Leak] = []
    trace: Trace = []

    def note(name: str, module: nn.Module, x: Tensor, out: Tensor) -> None:
        if not model.sees_regions(name):
            trace.append((name, out.clone()))
        else:  # a head: is the output for its first region the same with and without the other regions?
            difference = relative(out[:1], module.forward(x[:1]))
            if difference > TOLERANCE:
                mixed.append(Leak("batch statistics", described(model, name), difference))

    def step(pyramid: list[Tensor], areas: ValidAreas, batch: Batch) -> tuple[Any, Trace]:
        trace.clear()
        extends, model.extends_edges = model.extends_edges, True  # what RoIAlign reads beyond an edge counts as padding
        try:
            with kept_statistics(model), _listening(model, note):
                return model.step(pyramid, areas, batch), list(trace)
        finally:
            model.extends_edges = extends

    company, company_trace = step(stitched, areas, together)
    yield from mixed
    for i, (single, (pyramid, single_areas)) in enumerate(zip(singles, pyramids, strict=True)):
        alone, alone_trace = step(pyramid, single_areas, single)
        same_scores = _first_difference(model, alone_trace, company_trace, i) is None
        got, expected = model.choices(company, i), model.choices(alone, 0)
        # the other choices depend on the scores
        kinds = [kind for kind in expected if same_scores or kind == "sampled anchors"]
        flipped = {kind: len(got[kind] ^ expected[kind]) / max(len(expected[kind]), 1) for kind in kinds}
        if any(flipped.values()):
            kind = next(kind for kind in kinds if flipped[kind])
            yield Leak("sampling", f"{kind} of an image", flipped[kind])
        elif same_scores and not mixed:
            for name, loss in company.losses.items():
                difference = relative(loss[i], alone.losses[name][0])
                if difference > TOLERANCE:
                    yield Leak("normalizer", name, difference)
