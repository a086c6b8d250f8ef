"""What only a GPU has: its allocator's limit, the trial of `auto` against it, processes that share it."""

from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from test_train import CONFIG, load

from gndet.cli import main
from gndet.memory import MIB, limited, out_of_memory
from gndet.train import train

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
