"""What is replaced in torch so that it sees a pretended GPU."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils

if TYPE_CHECKING:
    from pretended.gpu import PretendedGPU

CUDA = torch.device("cuda", 0)


def replacements(gpu: "PretendedGPU") -> Iterator[AbstractContextManager]:
    """Yield contexts that replace functions of torch, to be entered in turn."""
    for name, answer in _cuda(gpu).items():
        yield mock.patch.object(torch.cuda, name, answer)
    yield mock.patch.object(Tensor, "record_stream", gpu.record_stream)
    yield from _autocast()
    yield from _lists_of_tensors()
    yield from _fake_tensors(gpu)
    # hooks of autograd run where torch has switched the function mode off, and would see another device there
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    yield mock.patch.dict(checks, {"default": lambda tensor: (tensor.shape, tensor.dtype)})
    engine = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with gpu.backward_pass():
            return engine(*args, **kwargs)

    yield mock.patch.object(torch.autograd, "_engine_run_backward", run_backward)


def _autocast() -> Iterator[AbstractContextManager]:
    """Let autocast on the CPU stand for that on the GPU."""

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    for module in (torch, torch.amp, torch.amp.autocast_mode):
        yield mock.patch.object(module, "autocast", Autocast)
    yield mock.patch.object(torch, "is_autocast_enabled", lambda device="cuda": enabled("cpu"))
    yield mock.patch.object(torch, "get_autocast_dtype", lambda device: dtype("cpu"))


def _lists_of_tensors() -> Iterator[AbstractContextManager]:
    """Let torch choose its foreach kernels, whose code asks for the device in C++ and takes no subclass of Tensor."""
    grouped = _foreach_utils._group_tensors_by_device_and_dtype

    def group(lists: list[Any], *args: Any, **kwargs: Any) -> dict[Any, Any]:
        groups = grouped(lists, *args, **kwargs)
        return {(next(t for t in group[0][0] if t is not None).device, key[1]): group for key, group in groups.items()}

    yield mock.patch.object(_foreach_utils, "_foreach_supported_types", [Tensor, nn.Parameter, FakeTensor])
    for name in ("torch.nn.utils.clip_grad", "torch.optim.optimizer"):
        yield mock.patch.object(sys.modules[name], "_group_tensors_by_device_and_dtype", group)
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # new and old name
        if hasattr(torch.optim.Optimizer, check):
            yield mock.patch.object(torch.optim.Optimizer, check, lambda optimizer: None)


def _fake_tensors(gpu: "PretendedGPU") -> Iterator[AbstractContextManager]:
    """Let modules of fake tensors be moved and copied, and show the device of a fake tensor."""
    real = FakeTensor.device.fget  # a property in Python, which the function mode does not see

    def device(tensor: FakeTensor) -> torch.device:
        on_gpu = torch._C._is_torch_function_enabled() and gpu.memory.holds(tensor)
        return CUDA if on_gpu else real(tensor)

    yield mock.patch.object(FakeTensor, "device", property(device))
    yield mock.patch.object(nn.Module, "_apply", apply)
    yield mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True)


def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what Module.to and the like do, by new parameters: torch cannot change a fake parameter."""
    for child in module.children():
        apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def _cuda(gpu: "PretendedGPU") -> dict[str, Any]:
    """Return the functions of torch.cuda that gndet calls, as the pretended GPU answers them."""
    memory = gpu.memory

    class Stream:
        def __init__(self, device: object = None, **kwargs: object) -> None:
            self.device = CUDA

        def wait_stream(self, stream: object) -> None: ...

        def wait_event(self, event: object) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize")

    class Event:
        def __init__(self, **kwargs: object) -> None: ...

        def record(self, stream: object = None) -> None: ...

        def wait(self, stream: object = None) -> None: ...

        def query(self) -> bool:
            return gpu.arrived()

        def synchronize(self) -> None:
            gpu.wait("Event.synchronize")

    properties = SimpleNamespace(name="pretended", total_memory=memory.capacity, multi_processor_count=132)
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "Stream": Stream,
        "Event": Event, "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(),
        "device_of": lambda tensor: nullcontext(), "set_device": lambda device: None,
        "current_stream": lambda device=None: Stream(), "synchronize": lambda device=None: gpu.wait("synchronize"),
        "empty_cache": lambda: None, "mem_get_info": lambda device=None: (memory.free, memory.capacity),
        "memory_allocated": lambda device=None: memory.live, "memory_reserved": lambda device=None: memory.live,
        "max_memory_allocated": lambda device=None: gpu.peak, "reset_peak_memory_stats": lambda device=None: None,
        "get_per_process_memory_fraction": lambda device=None: memory.fraction,
        "set_per_process_memory_fraction": lambda fraction, device=None: setattr(memory, "fraction", fraction),
        "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0), "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
