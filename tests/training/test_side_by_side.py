"""Images that are computed side by side give the gradient of their micro-batch, and the same bits in every run."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from models import make_batch, small_model
from run_files import last, load, losses
from torch import Tensor, nn

from gndet.config.loading import config_from_dict
from gndet.config.norm import NormConfig
from gndet.config.schema import Config
from gndet.distributed.process import Process, process
from gndet.errors import out_of_memory
from gndet.structures import Batch
from gndet.train import train
from gndet.training.setup import build_run
from gndet.training.side_by_side import ROOM, add_gradients, image_threads
from gndet.training.update import backward

CPU = Process(0, 1, torch.device("cpu"))
SIZES = [(96, 128), (128, 80), (100, 90)]


def config(**train: Any) -> Config:
    return config_from_dict({"train": {"global_batch": 3, "images_per_gpu": 3} | train}, "test")


@pytest.fixture
def four_threads() -> Iterator[None]:
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


# --- gradients


def gradients(model: nn.Module, batches: Sequence[Batch], threads: int) -> tuple[list[Tensor], Tensor]:
    model.zero_grad()
    found = backward(model, nullcontext, batches, 3, config(), threads=threads)
    return list(found.values()), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("threads", "standardized"), [(2, False), (3, False), (2, True)])
def test_the_gradient_is_that_of_the_micro_batches(threads: int, standardized: bool) -> None:
    model = small_model(NormConfig(channels_per_group=16, weight_standardization=standardized)).double()
    batches = [make_batch(SIZES), make_batch(SIZES[:1], first=3), make_batch(SIZES, first=4)]
    (losses_together, together), (losses_apart, apart) = (gradients(model, batches, count) for count in (1, threads))
    torch.testing.assert_close(losses_apart, losses_together, rtol=1e-12, atol=0)
    assert (apart - together).norm() < 1e-12 * together.norm()


@pytest.mark.parametrize("seconds", [(0.0, 0.02, 0.04), (0.04, 0.02, 0.0), (0.02, 0.0, 0.04)])
def test_gradients_are_added_in_the_order_of_the_parts(seconds: tuple[float, ...]) -> None:
    """In float32, (1e8 + 1) - 1e8 is 0, and 1e8 - 1e8 + 1 is 1."""
    model = nn.Linear(1, 1, bias=False)

    def losses_of(part: Any) -> dict[str, Tensor]:
        gradient, delay = part
        time.sleep(delay)
        return {"loss": model.weight.sum() * gradient, "other": model.weight.sum() * 0 + gradient}

    parts: Any = list(zip((1e8, 1.0, -1e8), seconds, strict=True))
    found = add_gradients(losses_of, parts, model)
    assert model.weight.grad.item() == 0 and found["other"].item() == 1  # losses are summed in float64
    assert not any(loss.requires_grad for loss in found.values())


def test_a_parameter_that_only_some_parts_reach_gets_their_gradient() -> None:
    model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
    parts: Any = [0, 1]
    add_gradients(lambda part: {"loss": model[part].weight.sum() * 3}, parts, model)
    assert [layer.weight.grad if layer.weight.grad is None else layer.weight.grad.item() for layer in model] == [
        3,
        3,
        None,
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_when_no_thread_uses_the_weights_any_more(failing: int) -> None:
    model, running = nn.Linear(1, 1), threading.Semaphore(0)

    def losses_of(part: Any) -> dict[str, Tensor]:
        if part == failing:
            raise torch.OutOfMemoryError("out of memory")
        time.sleep(0.1)
        running.release()
        return {"loss": model.weight.sum()}

    parts: Any = [0, 1, 2]
    with pytest.raises(torch.OutOfMemoryError) as raised:
        add_gradients(losses_of, parts, model)
    assert out_of_memory(raised.value) and all(running.acquire(blocking=False) for _ in range(2))


# --- runs


@pytest.mark.usefixtures("thin")
def test_a_run_learns_the_same_and_has_the_same_bits_each_time(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    batch = ("train.global_batch=4", "train.images_per_gpu=2", "train.schedule.updates=3")
    for name, threads, options in (
        ("one", 1, ("train.precision=float64",)), ("two", 2, ("train.precision=float64",)), ("a", 2, ()), ("b", 2, ()),
    ):  # fmt: skip
        torch.set_num_threads(threads)
        train(load(path, name, *batch, *options))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    one, two, a, b = (last(tmp_path / name) for name in ("one", "two", "a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a) and losses(tmp_path / "a") == losses(tmp_path / "b")
    for name, value in one.items():
        if value.is_floating_point():
            assert (two[name] - value).norm() <= 1e-9 * value.norm(), name
    assert not all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("thin", "four_threads")
def test_torch_uses_one_thread_during_such_a_run_and_the_log_says_so(tmp_path: Path) -> None:
    tree = CONFIG | {"train": CONFIG["train"] | {"global_batch": 2, "images_per_gpu": 2}}
    with process("cpu") as proc:
        run, notes = build_run(config_from_dict(tree, "test"), tmp_path, proc, None)
        assert run.threads == 2 and torch.get_num_threads() == 1
        assert "2 images side by side, each in a thread" in notes
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_only_small_networks_with_independent_images_on_one_process_use_threads() -> None:
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB
    assert image_threads(config(), model, CPU) == 3
    assert image_threads(config(images_per_gpu=8, global_batch=8), model, CPU) == 4
    assert image_threads(config(images_per_gpu=1), model, CPU) == 1
    assert image_threads(config(memory_limit_mib=1000), model, CPU) == 1
    assert image_threads(config(memory_limit_mib=1000, images_per_gpu="auto"), model, CPU) == 1
    assert image_threads(config(), model, CPU._replace(world=2)) == 1
    assert image_threads(config(), model, CPU._replace(device=torch.device("cuda"))) == 1
    bn = config_from_dict(
        {"model": {"norm": {"kind": "bn"}}, "train": {"images_per_gpu": 3, "global_batch": 3}}, "test"
    )
    assert image_threads(bn, model, CPU) == 1
    large = nn.Linear(1, ROOM // 4, bias=False, device="meta")
    assert image_threads(config(), large, CPU) == 2
    assert image_threads(config(), nn.Linear(1, ROOM // 4 + 1, bias=False, device="meta"), CPU) == 1
    assert image_threads(config(), large.requires_grad_(False), CPU) == 3
