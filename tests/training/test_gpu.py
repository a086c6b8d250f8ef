"""Tests that need a GPU: the allocator's limit, `auto` within it, a step without waiting, CUDA graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from faults.tiny import CONFIG
from models import make_batch
from rich.console import Console
from run_files import load, losses

from gndet.cli.main import main
from gndet.data.batches.batch import largest_batch
from gndet.distributed.process import process
from gndet.errors import out_of_memory
from gndet.structures import Batch, GroundTruth
from gndet.train import train
from gndet.training.memory import MIB, limited
from gndet.training.setup import build_run
from gndet.training.update import backward, to_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"device": "cuda"}))
    return path


def test_the_limit_holds_inside_and_is_put_back() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.get_per_process_memory_fraction(device)
    with pytest.raises(RuntimeError) as error, limited(device, torch.cuda.memory_reserved(device) + 64 * MIB):
        torch.empty(512 * MIB, dtype=torch.uint8, device=device)
    assert out_of_memory(error.value)
    assert torch.cuda.get_per_process_memory_fraction(device) == before
    torch.empty(512 * MIB, dtype=torch.uint8, device=device)


def test_auto_and_a_run_out_of_memory_on_a_gpu(config: Path) -> None:
    options = ["train.global_batch=8", "train.schedule.reference_batch=8", "train.schedule.updates=2"]
    for out, size in (("auto", "auto"), ("fixed", "8")):
        with (config.parent / out).with_suffix(".log").open("w") as file:
            train(load(config, out, *options, f"train.images_per_gpu={size}"), console=Console(file=file))
    assert "8 at once" in (config.parent / "auto.log").read_text()
    tight = [*options, "train.images_per_gpu=8", "train.memory_limit_mib=400", "data.shortest_edge=[512]"]
    with (config.parent / "tight.log").open("w") as file:
        train(load(config, "tight", *tight), console=Console(file=file))
    assert "out of memory with 8 images at once" in (config.parent / "tight.log").read_text()


def test_invariance_passes_on_a_gpu_and_over_two_processes_that_share_it(config: Path) -> None:
    assert main(["invariance", str(config)]) == 0


def test_a_step_does_not_wait_for_the_gpu(config: Path) -> None:
    """Forward, backward and the optimizer's step are issued without reading a result."""
    cfg = load(config, "unused", "train.global_batch=2", "train.images_per_gpu=2", "data.shortest_edge=[64]")
    with process("cuda") as proc:
        run, _ = build_run(cfg, Path("unused"), proc, None)
    batch = largest_batch(run.train_set, cfg.data, 2, masks=True)
    batch = Batch(*(field.pin_memory() for field in batch[:3]), GroundTruth(*(f.pin_memory() for f in batch.gt)), False)
    for mode in ("default", "error"):  # the first step may wait, because it sets up libraries
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run.model.zero_grad()
            backward(run.forward, run.autocast, [batch], 2, cfg)
            run.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_copies_ahead_arrive_whole_and_in_order() -> None:
    device = torch.device("cuda", 0)
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(8):
        batch = make_batch([(512, 512)] * 2)
        batch = batch._replace(images=torch.full_like(batch.images, number).pin_memory())
        busy = busy @ busy.softmax(1)  # keeps the GPU busy while copies run ahead
        sums.append(to_device(batch, device).images.sum())
    assert [int(total) for total in sums] == [number * batch.images.numel() for number in range(8)]


def test_expandable_segments_are_set_before_the_gpu_is_used_unless_the_user_says_otherwise() -> None:
    code = (
        "import torch\nfrom gndet.distributed.process import process\n"
        "with process('cuda') as proc:\n    x = torch.ones(1, device=proc.device)\n"
        "print(any(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))"
    )
    for variables, expandable in (({}, "True"), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, "False")):
        clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
        done = subprocess.run([sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True)
        assert done.stdout.strip() == expandable, done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_learns_the_same_on_a_gpu(config: Path, mode: str) -> None:
    options = ("data.max_edge=96", "data.canvases=[[96,96]]", "train.precision=float32", "train.global_batch=4")
    train(load(config, "plain", *options))
    train(load(config, "compiled", *options, f"train.compile={mode}"))
    steps = zip(losses(config.parent / "plain"), losses(config.parent / "compiled"), strict=True)
    assert all(abs(one - other) < 1e-2 * one for (_, one), (_, other) in steps)
