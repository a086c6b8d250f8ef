"""`gndet train` on a pretended GPU, from its set-up to its report: what it learns, when it waits, memory that runs out.

Triton's interpreter is slow: where the kernels do not matter, they are taken to be broken.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.tiny import CONFIG, check_same
from pretended.gpu import MIB, PretendedGPU, Wait
from pretended.kernels import KERNEL_MODULES
from pretended.marks import each_detector, needs_no_gpu, runs_kernels
from pretended.operators import functions
from rich.console import Console

import gndet.train as train_module
from gndet.config.loading import config_from_dict, with_overrides
from gndet.errors import ConfigError, TrainingError
from gndet.train import train
from gndet.training.log import read_metrics

pytestmark = [*needs_no_gpu, pytest.mark.usefixtures("thin")]
TOLERANCE = 1e-5  # relative, of a float32 loss on the pretended GPU from the CPU's
OUTSIDE = {"training.setup.set_up", "training.norms.measure", "train.evaluate_and_save", "training.checkpointing.save"}
FIRST_WAITS = 1  # of the first update, for the weight average
BREAK = 2  # updates before a run is broken off
FEW = (  # images, updates and regions, for Triton's interpreter
    "train.precision=float32", "train.global_batch=1", "train.schedule.reference_batch=1", "train.schedule.updates=2",
    "data.val.count=1", "model.rpn.post_nms_test=4", "model.box_head.regions_per_image=4",
    "model.box_head.detections_per_image=2", "model.dense.pre_nms=4", "model.dense.detections_per_image=2",
)  # fmt: skip
FOUR = ("train.global_batch=4", "train.schedule.reference_batch=4", "train.schedule.updates=2", "train.norm_images=0")


def learn(folder: Path, model: dict[str, Any], out: str, *options: str, gpu: PretendedGPU | None = None) -> str:
    """Train a tiny detector on a pretended GPU, or on the CPU.  Returns what the run says."""
    tree = CONFIG | {"model": CONFIG["model"] | model, "device": "cpu" if gpu is None else "cuda"}
    options = ("train.schedule.updates=4", "train.log_every=2", "train.norm_images=0", *options, f"out={folder / out}")
    path = folder / f"{out}.log"
    with path.open("a") as file, gpu or nullcontext():
        train(with_overrides(config_from_dict(tree, "test"), options, "test"), console=Console(file=file, width=200))
    return path.read_text()


def waits_of_updates(gpu: PretendedGPU) -> list[Wait]:
    """Return the waits of the loop over updates, without those for evaluations and checkpoints."""
    waits = [wait for phase in gpu.phases.values() for wait in phase.waits]
    return [wait for wait in waits if "train.train" in wait.within and not OUTSIDE & set(wait.within)]


@runs_kernels
@each_detector(slowly=True)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")
def test_a_run_learns_what_it_does_on_a_cpu_and_waits_once_per_log_line(tmp_path: Path, model: dict[str, Any]) -> None:
    gpu = PretendedGPU(broken_kernels=())
    learn(tmp_path, model, "gpu", *FEW, gpu=gpu)
    learn(tmp_path, model, "cpu", *FEW)
    on_gpu, on_cpu = (
        [line for line in read_metrics(tmp_path / out / "metrics.jsonl") if line["kind"] == "train"]
        for out in ("gpu", "cpu")
    )
    assert len(on_gpu) == len(on_cpu) == 1
    for here, there in zip(on_gpu, on_cpu, strict=True):
        numbers = {key: value for key, value in there.items() if key.startswith("loss")}
        assert {key: here[key] for key in numbers} == pytest.approx(numbers, rel=TOLERANCE)
    assert any(name.startswith("triton") for phase in gpu.phases.values() for name, _ in phase.launches)
    waits = [f"{wait.what}, {wait.place}" for wait in waits_of_updates(gpu)]
    assert len(waits) <= len(on_gpu) + FIRST_WAITS, waits


def without_kernels(capacity: int = 80 << 30) -> PretendedGPU:
    return PretendedGPU(capacity, broken_kernels=KERNEL_MODULES)


@each_detector(slowly=True)
def test_a_run_broken_off_and_resumed_is_the_run_that_was_not(
    tmp_path: Path, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("train.precision=bf16", "train.optimizer.kind=adamw", "train.memory=lean", "train.norm_images=1")
    learn(tmp_path, model, "whole", *options, gpu=without_kernels())
    made, make_update = [], train_module.make_update

    def breaking(*args: Any) -> None:
        if len(made) == BREAK:
            raise KeyboardInterrupt
        made.append(make_update(*args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "make_update", breaking)
        learn(tmp_path, model, "resumed", *options, gpu=without_kernels())
    assert "continuing after update" in learn(tmp_path, model, "resumed", *options, gpu=without_kernels())
    check_same(tmp_path / "resumed", tmp_path / "whole", "a run broken off on a GPU")


class Failing(PretendedGPU):
    """A GPU whose memory runs out once: in one of gndet's functions, or in the backward pass."""

    def __init__(self, where: str) -> None:
        super().__init__(broken_kernels=KERNEL_MODULES)
        self.where, self.failed = where, False
        self.memory.fails = self._fails

    def _fails(self) -> bool:
        here = not self.failed and (self.in_backward_pass if self.where == "backward" else self.where in functions())
        self.failed |= here
        return here


@each_detector(slowly=True)
@pytest.mark.parametrize("where", ["modeling.image_model.forward", "backward"])
def test_memory_that_runs_out_in_a_pass_halves_the_images_and_loses_nothing(
    tmp_path: Path, model: dict[str, Any], where: str
) -> None:
    gpu = Failing(where)
    said = learn(tmp_path, model, "failing", *FOUR, "train.images_per_gpu=4", gpu=gpu)
    assert gpu.failed and "out of memory with 4 images at once, continuing with 2" in said
    learn(tmp_path, model, "two", *FOUR, "train.images_per_gpu=2", gpu=without_kernels())
    check_same(tmp_path / "failing", tmp_path / "two", "a run that went on with fewer images")


@pytest.mark.slow
@each_detector()
@pytest.mark.parametrize("where", ["evaluation.evaluate.detect_share", "training.update.make_update"])
def test_a_run_that_memory_ends_elsewhere_can_be_repeated_and_loses_nothing(
    tmp_path: Path, model: dict[str, Any], where: str
) -> None:
    gpu = Failing(where)
    clear = "detect_share" in where  # an update that cannot be applied has no advice: its memory is taken in set-up
    words = r"out of memory while evaluating .* lower evaluation\.images_per_gpu" if clear else "out of memory"
    with pytest.raises(TrainingError if clear else torch.OutOfMemoryError, match=words):
        learn(tmp_path, model, "failing", *FOUR, gpu=gpu)
    learn(tmp_path, model, "failing", *FOUR, gpu=without_kernels())
    learn(tmp_path, model, "whole", *FOUR, gpu=without_kernels())
    check_same(tmp_path / "failing", tmp_path / "whole", "a run that ran out of memory")


@pytest.mark.slow
def test_as_many_images_as_fit_the_gpu_or_a_stated_limit_are_computed_at_once(tmp_path: Path) -> None:
    peaks = {}
    for size in (1, 2, 4):
        gpu = without_kernels()
        learn(tmp_path, {}, f"by-{size}", *FOUR, f"train.images_per_gpu={size}", "train.ema=0", gpu=gpu)
        peaks[size] = gpu.peak
    options = (*FOUR, "train.ema=0")
    between = (peaks[2] + peaks[4]) // 2
    auto = without_kernels(int(between / 0.9))  # `auto` keeps a tenth free
    assert ", 2 at once" in learn(tmp_path, {}, "auto", *options, "train.images_per_gpu=auto", gpu=auto)
    assert auto.peak <= between
    limit = ("train.images_per_gpu=4", f"train.memory_limit_mib={between / MIB}")
    said = learn(tmp_path, {}, "limited", *options, *limit, gpu=without_kernels())
    assert "out of memory with 4 images at once, continuing with 2" in said
    check_same(tmp_path / "limited", tmp_path / "by-2", "a run within a stated limit")
    with pytest.raises(TrainingError, match=r"out of memory with 1 image\(s\) .* lower data\.max_edge"):
        learn(tmp_path, {}, "little", *options, gpu=without_kernels(peaks[1] // 2))
    with pytest.raises(ConfigError, match=r"without any image, training takes \d+ MiB on cuda:0"):
        learn(tmp_path, {}, "none", *options, gpu=without_kernels(peaks[1] // 4))
