"""train.compile makes few graphs, all before the first update, with the same results as without them."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from rich.console import Console
from run_files import load
from test_micro_batch import difference
from torch import Tensor

from gndet.config.data import DataConfig
from gndet.config.training import TrainConfig
from gndet.data.batches.batch import collate, split
from gndet.data.batches.stream import train_batches
from gndet.data.batches.transforms import Sample
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.process import Process
from gndet.errors import ConfigError
from gndet.structures import Batch
from gndet.train import train
from gndet.training.run import Run
from gndet.training.setup import build_run, compile_ahead, compiled
from gndet.training.update import backward

CANVASES = ((64, 96), (96, 64), (96, 96))
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def sample(height: int, width: int) -> Sample:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return Sample(image, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4, 4).bool(), 0)


# --- canvases


def test_photographs_share_the_smallest_canvas_and_one_number_of_slots(data_root: Path) -> None:
    data = DataConfig(
        root=str(data_root / "coco-tiny"), shortest_edge=(48, 64), max_edge=96, workers=0, canvases=CANVASES
    )
    stream = train_batches(
        read_dataset(data.train, data), data, seed=0, start=0, stop=40, images_per_gpu=2, global_batch=2, rank=0,
        world=1, masks=False, pin_memory=False,
    )  # fmt: skip
    seen, slots = set(), set()
    for batch, *_ in stream:
        height, width = batch.sizes.amax(0).tolist()
        holding = [canvas for canvas in CANVASES if height <= canvas[0] and width <= canvas[1]]
        seen.add(tuple(batch.images.shape[2:]))
        slots.add(batch.gt.valid.shape)
        assert tuple(batch.images.shape[2:]) == holding[0] and batch.padded
    assert seen == set(CANVASES) and len(slots) == 1


def test_parts_of_a_batch_lie_within_its_canvas() -> None:
    """A canvas of the same area but the other orientation is not used: the batch does not cover it."""
    batch = collate([sample(64, 90), sample(50, 60)], 32, True, ((64, 96), (96, 64)))
    parts = split(batch, 1, 32, True, ((96, 64), (64, 96)))
    assert [(*part.images.shape[2:], part.padded) for part in parts] == [(64, 96, True)] * 2


def test_canvases_that_do_not_hold_every_batch_are_refused(config: Path) -> None:
    few = ("data.max_edge=96", "data.shortest_edge=[64]")
    with pytest.raises(ConfigError, match=r"train\.compile: default .* data\.canvases must .*\[\[64,96\],\[96,64\]\]"):
        load(config, "run", *few, "train.compile=default")
    with pytest.raises(ConfigError, match=r"none of 64 x 96 holds 96 x 64, the largest batch that"):
        load(config, "run", *few, "data.canvases=[[64,96]]")
    load(config, "run", *few, "data.canvases=[[64,96],[96,64]]")
    with pytest.raises(ConfigError, match=r"none of 64 x 96, 96 x 64 holds 96 x 96"):
        load(config, "run", *few, "data.canvases=[[64,96],[96,64]]", "train.images_per_gpu=2")


# --- graphs


def test_what_a_cpu_cannot_compile_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduce-overhead needs a GPU, but the device is cpu"):
        compiled(torch.nn.Linear(1, 1), TrainConfig(compile="reduce-overhead"), CPU)
    with pytest.raises(ConfigError, match=r"memory_limit_mib: 99 would count on a CPU"):
        compiled(torch.nn.Linear(1, 1), TrainConfig(compile="default", memory_limit_mib=99), CPU)


@pytest.fixture
def run(config: Path) -> Run:
    """A run with one canvas, on the CPU."""
    options = ("data.shortest_edge=[64,96]", "data.max_edge=96", "data.canvases=[[96,96]]", "train.compile=default")
    options += ("train.images_per_gpu=2", "train.precision=float64", "device=cpu")
    return build_run(load(config, "unused", *options), Path("unused"), Process(0, 1, CPU), None)[0]


class Toy(torch.nn.Module):
    """A model that is traced in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": batch.images.sum((1, 2, 3)) * self.weight}


def test_a_missing_compiler_is_reported(run: Run) -> None:
    def compiler(graph: object, inputs: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    with pytest.raises(ConfigError, match=r"train\.compile: default: torch cannot .* No working C\+\+ compiler"):
        compile_ahead(run._replace(forward=torch.compile(Toy(), backend=compiler)), 2)


def test_graphs_that_were_not_made_for_want_of_memory_are_not_reported_as_made(run: Run) -> None:
    class Large(Toy):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("out of memory")

    (note,) = compile_ahead(run._replace(forward=Large()), 2)
    assert note.startswith("out of memory while compiling ahead")


@pytest.mark.slow  # the trace of the whole model; test_model makes one, too
def test_the_graphs_made_ahead_serve_the_run_and_change_rounding_only(run: Run) -> None:
    """The graphs are only traced; the next test compiles them, which takes minutes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = run._replace(forward=torch.compile(run.model, backend="eager", dynamic=False))
    (note,) = compile_ahead(run, 2)
    assert re.fullmatch(r"compiled for 1 canvas\(es\) of 2 image\(s\) in \d+ s \(train\.compile: default\)", note)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    stream = train_batches(
        run.train_set, run.cfg.data, seed=0, start=0, stop=3, images_per_gpu=2, global_batch=2, rank=0, world=1,
        masks=True, pin_memory=False,
    )  # fmt: skip
    for batch, *_ in stream:
        traced, plain = (step(run, forward, [batch]) for forward in (run.forward, run.model))
        for result, expected in zip(traced, plain, strict=True):
            assert (result - expected).norm() < 1e-9 * expected.norm()
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] == 1 and not stats["graph_break"]


def step(run: Run, forward: torch.nn.Module, batches: list) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of an update."""
    run.model.zero_grad()
    losses = backward(forward, run.autocast, batches, 2, run.cfg)
    return torch.stack(list(losses.values())), torch.cat([p.grad.flatten() for p in run.model.parameters()])


@pytest.mark.soak
def test_a_compiled_run_learns_the_same(config: Path) -> None:
    options = ("data.max_edge=96", "data.canvases=[[96,96]]", "train.precision=float64", "device=cpu")
    train(load(config, "plain", *options))
    with (config.parent / "log").open("w") as file:
        train(load(config, "compiled", *options, "train.compile=default"), console=Console(file=file))
    assert "compiled for 1 canvas(es) of 1 image(s) in" in (config.parent / "log").read_text()
    assert max(difference(config.parent / "plain", config.parent / "compiled")) < 1e-9
