"""The paths for a GPU, tried on a pretended one: devices, waits, launches, memory, whole runs, memory that runs out.

Every detector of `gndet.modeling.build.DETECTORS` is tried, with masks and without.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pretended.fake_cuda import fake_cuda
from pretended.gpu import MIB, PretendedGPU, Refused
from pretended.kernels import KERNEL_MODULES, self_tests
from pretended.marks import each_detector, needs_no_gpu
from pretended.replaced import CUDA
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gndet.config.loading import config_from_dict
from gndet.config.schema import Config
from gndet.data.batches.batch import largest_batch
from gndet.distributed.process import Process, place
from gndet.modeling.build import build_model
from gndet.modeling.norms import triton_kernels as norm_kernels
from gndet.modeling.recompute import set_memory
from gndet.modeling.timm_backbone import TimmBackbone
from gndet.structures import Batch, GroundTruth
from gndet.training.setup import build_run
from gndet.training.task import TASKS
from gndet.training.update import UpdateState, backward, clear_gradients, make_update

pytestmark = needs_no_gpu


class Limit(NamedTuple):
    """The most that a phase of a step may take."""

    launches: int
    mib: int  # at the peak, with weights, averaged weights, gradients and momentum: 691 MiB


# A step of R50-FPN GN with masks at 800 x 1344: one image with 20 objects, bf16, padded.  Lower a limit when a change
# takes less; raise one only with a reason.
LIMITS = {
    "fast": {"forward": Limit(864, 2032), "backward": Limit(625, 2106), "update": Limit(38, 692)},
    "balanced": {"forward": Limit(757, 1271), "backward": Limit(673, 1353), "update": Limit(38, 692)},
    "lean": {"forward": Limit(757, 1141), "backward": Limit(774, 1275), "update": Limit(38, 692)},
}
DETECT_LIMIT = Limit(656, 912)
# modules of kernels without which a step takes longer, but does not wait; without those of NMS it does
OPTIONAL = [name for name in KERNEL_MODULES if name != "gndet.ops.nms_kernels"]


def large(model: dict[str, Any], memory: str = "balanced") -> Config:
    """Return the config of a detector at full size."""
    data = {
        "train": {"kind": "shapes", "count": 1, "size": 64}, "val": {"kind": "shapes", "count": 1, "size": 64},
        "shortest_edge": [800], "canvases": [[800, 1344], [1344, 800]], "workers": 0, "cache": "",
    }  # fmt: skip
    steps = {"global_batch": 1, "images_per_gpu": 1, "precision": "bf16", "memory": memory, "ema": 0.999}
    optimizer = {"optimizer": {"clip_grad_norm": 10.0}}
    return config_from_dict({"device": "cuda", "model": model, "data": data, "train": steps | optimizer}, "test")


@cache
def full_batch(num: int, masks: bool) -> Batch:
    """Return a batch of pictures of 800 x 1344 with 20 objects each."""
    cfg = large({})
    return largest_batch(TASKS[cfg.task].read(cfg)[0], cfg.data, num, masks=masks, objects=20)


def converted(batch: Batch, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    fields, gt = map(function, batch[:3]), map(function, batch.gt)
    return Batch(*fields, GroundTruth(*gt), batch.padded)


@each_detector()
@pytest.mark.parametrize("broken", [(), OPTIONAL], ids=["kernels", "no_kernels"])
def test_forward_and_detect_stay_on_the_gpu_under_cudas_autocast(model: dict[str, Any], broken: Any) -> None:
    cfg = large(model)
    real = full_batch(2, cfg.model.masks)
    with self_tests(broken), fake_cuda() as mode:
        detector, autocast = place(build_model(cfg.model, 80), "bf16", Process(0, 1, CUDA))
        set_memory(detector, "balanced")
        batch = converted(real, lambda field: mode.from_tensor(field).to(CUDA))
        for padded, precision in product((False, True), (autocast, nullcontext)):
            batch = batch._replace(padded=padded)
            with precision():
                step = detector.train()(batch)
                with torch.inference_mode():
                    found = detector.eval().detect(batch.images, batch.sizes, batch.padded)
            assert {(loss.device, loss.dtype, loss.shape) for loss in step.values()} == {(CUDA, torch.float32, (2,))}
            assert {field.device for field in found} == {CUDA}
            assert {field.dtype for field in (found.boxes, found.scores, found.masks)} == {torch.float32}


class Steps(NamedTuple):
    """What two updates and a detection took."""

    gpu: PretendedGPU  # its phases: of the second update, and of the detection
    live: list[int]  # bytes on the GPU after each update
    allocated: list[int]  # bytes that the optimizer, the clipping and the weight average took for a while


def steps(model: dict[str, Any], memory: str) -> Steps:
    """Make two updates and detect, at full size."""
    cfg = large(model, memory)
    real, live, allocated = full_batch(1, cfg.model.masks), [], []
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, PretendedGPU(broken_kernels=()) as gpu:
        run, _ = build_run(cfg, Path("unused"), Process(0, 1, CUDA), None)
        batch = converted(real, lambda field: mode.from_tensor(field).pin_memory())
        run.model.register_forward_pre_hook(lambda *_: gpu.at("forward"))
        run.model.register_forward_hook(lambda *_: gpu.at("backward"))
        for _ in range(2):
            gpu.phases.clear()
            gpu.at("copies")
            clear_gradients(run)
            losses = backward(run.forward, run.autocast, [batch], 1, cfg)
            gpu.at("update")
            before = gpu.memory.live
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), 10.0)
            make_update(run, UpdateState(), losses, norm, evaluation_due=False)
            del losses, norm
            gpu.at("detect")
            live.append(gpu.memory.live)
            allocated.append(gpu.phases["update"].peak - before)
        images, sizes = (field.to(CUDA, non_blocking=True) for field in (batch.images, batch.sizes))
        with torch.inference_mode(), run.autocast():
            run.model.eval().detect(images, sizes, batch.padded)
    return Steps(gpu, live, allocated)


@pytest.mark.parametrize("memory", LIMITS)
def test_a_step_of_mask_rcnn_takes_no_more_launches_and_memory_than_stated(memory: str) -> None:
    gpu = steps({"detector": "mask_rcnn"}, memory).gpu
    for name, most in (LIMITS[memory] | {"detect": DETECT_LIMIT}).items():
        launches = gpu.phases[name].launches
        found = Limit(launches.total(), -(-gpu.phases[name].peak // MIB))
        words = f"{name}: {found}, at most {most}; most launches: {launches.most_common(20)}"
        assert found.launches <= most.launches and found.mib <= most.mib, words


@each_detector()
def test_an_update_and_a_detection_do_not_wait_and_leave_nothing_behind(model: dict[str, Any]) -> None:
    found = steps(model, "balanced")
    assert [wait for phase in found.gpu.phases.values() for wait in phase.waits] == []
    assert found.live[0] == found.live[1]
    assert max(found.allocated) < MIB  # all memory of the optimizer is taken in set-up


OTHERS = (
    *({"norm": norm} for norm in ({"kind": "frn"}, {"kind": "evonorm_s0"}, {"weight_standardization": True})),
    {"backbone": {"stochastic_depth": 0.2}},
)


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_nor_do_they_with_other_activations_standardized_weights_or_skipped_blocks(model: dict[str, Any]) -> None:
    found = steps(model, "balanced")
    assert [wait for phase in found.gpu.phases.values() for wait in phase.waits] == []
    assert found.live[0] == found.live[1]


@pytest.mark.slow
def test_nor_do_they_with_a_backbone_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(TimmBackbone, "check", lambda self: None)  # pictures without values show nothing
    model = {"backbone": {"kind": "timm", "name": "mobilenetv3_small_050"}, "norm": {"channels_per_group": 8}}
    found = steps(model, "balanced")
    assert [wait for phase in found.gpu.phases.values() for wait in phase.waits] == []
    assert found.live[0] == found.live[1]


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda")


Action = Callable[[torch.Tensor], Any]
WAITS: dict[str, tuple[Action, int]] = {
    "item": (lambda x: x.sum().item(), 1),
    "bool": (lambda x: bool(x[0] > 0), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "index of bools": (lambda x: x[x > 0], 1),
    "index on the CPU": (lambda x: x[torch.tensor([0, 1])], 1),
    "copy to the CPU": (lambda x: x.cpu(), 1),
    "copy to pinned memory": (lambda x: x.to("cpu", non_blocking=True), 0),
    "copy to pageable memory": (lambda x: torch.empty(4).copy_(x, non_blocking=True), 1),
    "copy from the CPU": (lambda x: x.copy_(torch.ones(4)), 1),
    "copy from pageable memory": (lambda x: torch.ones(4).to(x.device), 1),
    "copy from pinned memory": (lambda x: torch.ones(4).pin_memory().to(x.device, non_blocking=True), 0),
    "tensor": (lambda x: torch.tensor([1.0], device="cuda"), 1),
    "new_tensor": (lambda x: x.new_tensor([1.0]), 1),
    "zeros": (lambda x: torch.zeros(4, device=x.device) + x, 0),
    "where, a number": (lambda x: torch.where(x > 0, x, 0.0).sum(), 0),
    "where, a number on the CPU": (lambda x: torch.where(x > 0, x, torch.zeros(())), 1),
    "synchronize": (lambda x: torch.cuda.synchronize(), 1),
}
REFUSED: dict[str, Action] = {
    "both devices": lambda x: x + torch.ones(4),
    "weights on the CPU": lambda x: nn.Linear(4, 1)(x),
    "numpy": lambda x: x.numpy(),
    "pin_memory": lambda x: x.pin_memory(),
    "not arrived": lambda x: x.to("cpu", non_blocking=True).sum(),
    "not arrived, numpy": lambda x: x.to("cpu", non_blocking=True).numpy(),
    "a kernel on the CPU": lambda x: norm_kernels.forward(torch.ones(1, 4, 2, 2), x, x, 2, 1e-5, None, relu=False),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_pretended_gpu_knows_when_the_host_waits(name: str) -> None:
    action, waits = WAITS[name]
    with PretendedGPU() as gpu:
        action(on_gpu(4))
    assert len(gpu.phases["start"].waits) == waits


@pytest.mark.parametrize("name", REFUSED)
def test_the_pretended_gpu_refuses_what_cuda_refuses(name: str) -> None:
    with PretendedGPU(), pytest.raises(Refused):
        REFUSED[name](on_gpu(4))


@pytest.mark.parametrize(
    ("action", "launches"),
    [
        (lambda x: torch.where(x > 0, x, 1.0), ["aten::gt", "aten::scalar_tensor", "aten::where"]),
        (lambda x: x.masked_fill(x > 0, 1.0), ["aten::gt", "aten::masked_fill"]),
        (lambda x: x.view(2, 2)[1:].t().reshape(2), []),
        (lambda x: torch._foreach_add_([x] * 111, 1), ["aten::_foreach_add_"] * 2),  # 110 tensors per launch
        (lambda x: (torch.zeros(4, device="cuda"), torch.empty_like(x)), ["torch.zeros"]),
    ],
)
def test_the_pretended_gpu_counts_launches(action: Action, launches: list[str]) -> None:
    with PretendedGPU() as gpu:
        x = on_gpu(4)
        gpu.at("action")
        action(x)
    assert sorted(name for name, _ in gpu.phases["action"].launches.elements()) == launches


def test_tensors_of_the_pretended_gpu_have_values_gradients_and_bytes() -> None:
    with PretendedGPU(capacity=8000) as gpu:
        x = on_gpu(500).requires_grad_()
        y = (x * 3).sum()
        assert x.is_cuda and x.device == y.device == CUDA and gpu.memory.live == 2000 + 4
        y.backward()
        assert x.grad.is_cuda and not x.grad.cpu().is_cuda and x.grad.cpu().eq(3).all()
        with pytest.raises(torch.OutOfMemoryError):
            on_gpu(1500)
        del x, y
        assert gpu.memory.live == 0 and gpu.peak < 8000
