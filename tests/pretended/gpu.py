"""The pretended GPU itself: its memory, what operators do there, what Python asks of its tensors.

How it works is said in `pretended/__init__.py`.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from pretended.kernels import replaced_launches, self_tests
from pretended.operators import functions, is_device, num_launches, own_kernel, place, tensors_in
from pretended.replaced import CUDA, replacements

CPU = torch.device("cpu")
MIB = 2**20
HOST_NEEDS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # tags of operators
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
COPYING = ("aten::copy_", "aten::_foreach_copy_")
MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # of a grid along x, y and z


class Refused(Exception):
    """CUDA would refuse this, or compute with values that have not arrived."""


class Wait(NamedTuple):
    """A point where the host waits for the GPU."""

    what: str
    place: str  # as `operators.place`
    within: tuple[str, ...]  # as `operators.functions`


@dataclass
class Phase:
    """What happened in a phase."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)  # by operator and place
    waits: list[Wait] = field(default_factory=list)
    peak: int = 0  # bytes


class Memory:
    """The storages on the GPU, and their bytes while they live."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.fraction, self.live, self.peak = capacity, 1.0, 0, 0
        self.fails: Callable[[], bool] = lambda: False  # whether to refuse a tensor that would fit
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @property
    def free(self) -> int:
        """Return the bytes that no tensor takes."""
        return self.capacity - self.live

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the GPU."""
        return tensor.untyped_storage() in self._storages

    def add(self, tensor: Tensor) -> None:
        """Put a tensor on the GPU.  Raises torch.OutOfMemoryError."""
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        size, limit = storage.nbytes(), self.fraction * self.capacity
        if self.live + size > limit or self.fails():
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size / MIB:.2f} MiB more, limit {limit / MIB:.0f} MiB")
        self._storages.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size


class PretendedGPU:
    """A context in which torch seems to have a GPU of `capacity` bytes."""

    def __init__(self, capacity: int = 80 << 30, broken_kernels: Collection[str] | None = None) -> None:
        """broken_kernels: modules whose kernels do not pass their self-test, the others do; None: run the tests."""
        self.memory = Memory(capacity)
        self.phases: dict[str, Phase] = defaultdict(Phase)
        self.phase = self.phases["start"]
        self.in_backward_pass = False
        self._broken_kernels = broken_kernels
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._arriving: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # being copied from the GPU
        self._scalars: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # made by C++ of a number
        self._copying = False  # whether operators belong to a copy between devices
        self._functions, self._operators = _Functions(self), _Operators(self)
        self._methods = {
            Tensor.to: self._to, Tensor.cuda: self._to, Tensor.cpu: self._to, Tensor.tolist: self._read,
            Tensor.numpy: self._read, Tensor.__array__: self._read, Tensor.pin_memory: self._pin,
            Tensor.is_pinned: self._is_pinned, Tensor.new_tensor: self._new_tensor, Tensor.__deepcopy__: self._deepcopy,
        }  # fmt: skip

    def __enter__(self) -> "PretendedGPU":
        with ExitStack() as stack:
            for replacement in replacements(self):
                stack.enter_context(replacement)
            stack.enter_context(self_tests(self._broken_kernels, lambda name: self.wait(f"the self-test of {name}")))
            stack.enter_context(replaced_launches(self._launch))
            stack.enter_context(self._operators)
            stack.enter_context(self._functions)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.at("end")
        self._stack.close()

    def at(self, name: str) -> None:
        """Begin a phase."""
        self.phase.peak = max(self.phase.peak, self.memory.peak)
        self.phase, self.memory.peak = self.phases[name], self.memory.live

    @property
    def peak(self) -> int:
        """Return the largest number of bytes on the GPU so far."""
        return max(self.memory.peak, *(phase.peak for phase in self.phases.values()))

    def wait(self, what: str) -> None:
        """Note that the host waits until the GPU has done everything that it was told to do."""
        self.phase.waits.append(Wait(what, place(), functions()))
        self._arriving.clear()

    def arrived(self) -> bool:
        """Return True: all copies have arrived, as an event says without waiting."""
        self._arriving.clear()
        return True

    def record_stream(self, stream: object) -> None:
        """Stand for Tensor.record_stream, which has no effect here."""

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Let the function mode see what custom backward functions ask; Tensor.backward has switched it off."""
        self.in_backward_pass = True
        try:
            with self._asked():
                yield
        finally:
            self.in_backward_pass = False

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Switch the function mode on."""
        is_on = self._functions in _get_current_function_mode_stack()
        with torch._C._EnableTorchFunction(), nullcontext() if is_on else self._functions:
            yield

    @contextmanager
    def _copies(self) -> Iterator[None]:
        """Let operators be part of a copy between devices."""
        before, self._copying = self._copying, True
        try:
            yield
        finally:
            self._copying = before

    def _count(self, name: str, number: int = 1) -> None:
        if number:
            self.phase.launches[name, place()] += number

    # what operators do

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on tensors of either device."""
        if func is torch.ops.prim.device.default:
            return CPU
        name, tensors = func._schema.name, [*tensors_in((args, kwargs))]
        here = not self._copying and any(map(self.memory.holds, tensors))
        if here:
            if own := own_kernel(func):
                with torch.no_grad(), self._operators, self._asked():
                    return own(*args, **kwargs)
            self._check(func, args, kwargs, tensors)
            self._count(name, num_launches(func, args))
        elif self._arriving:
            self._check_arrived(name, tensors)
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 0.0)  # a value that it may have
        result = func(*args, **kwargs)
        if name == "aten::scalar_tensor":
            self._scalars.add(result.untyped_storage())
        if here:
            given = {tensor.untyped_storage()._cdata for tensor in tensors}
            for tensor in tensors_in(result):
                if tensor.untyped_storage()._cdata not in given:
                    self.memory.add(tensor)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Note what makes the host wait for an operator.  Raises Refused for tensors on both devices."""
        name = func._schema.name
        if name in COPYING:
            targets, sources = (part if isinstance(part, list | tuple) else [part] for part in args[:2])
            for target, source in zip(targets, sources, strict=True):
                self._copied(source, target, kwargs.get("non_blocking") or True in args[2:])
        elif name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("an index of bools")
            elif any(index.dim() and not self.memory.holds(index) for index in indices):
                self.wait("an index on the CPU")
        else:
            if name == "aten::where":  # makes a tensor of a number, and copies one from the CPU
                for value in args:
                    if not isinstance(value, Tensor) or value.untyped_storage() in self._scalars:
                        self._count("aten::scalar_tensor")
                    elif not (value.dim() or self.memory.holds(value)):
                        self.wait("a copy to the GPU")
            off = [tuple(t.shape) for t in tensors if t.dim() and t.numel() and not self.memory.holds(t)]
            if off:
                raise Refused(f"{name} of tensors on both devices, {off[0]} is on the CPU, {place()}")
            if name == "torchvision::nms" or any(tag in func.tags for tag in HOST_NEEDS):
                self.wait(name)

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Note a copy; CUDA's "API synchronization behavior" says when the host waits for it."""
        from_gpu, to_gpu = self.memory.holds(source), self.memory.holds(target)
        if from_gpu and not to_gpu and non_blocking and target.untyped_storage() in self._pinned:
            self._arriving.add(target.untyped_storage())
        elif from_gpu != to_gpu and (from_gpu or not non_blocking):
            self.wait(f"a copy to the {'GPU' if to_gpu else 'CPU'}")

    def _check_arrived(self, name: str, tensors: list[Tensor]) -> None:
        if any(tensor.untyped_storage() in self._arriving for tensor in tensors):
            raise Refused(f"{name} of a tensor that is still being copied from the GPU, {place()}")

    def _launch(self, kernel: Any, grid: Any, arguments: list[Any]) -> bool:
        """Count the launch of a Triton kernel.  Returns whether to run it: not on fake tensors."""
        tensors = [*tensors_in(arguments)]
        self._count(f"triton {kernel.__name__}")
        if not callable(grid) and any(size > most for size, most in zip(grid, MOST_BLOCKS[: len(grid)], strict=True)):
            raise Refused(f"{kernel.__name__}: no GPU has a grid of {grid}")
        if not all(map(self.memory.holds, tensors)):
            raise Refused(f"{kernel.__name__}: a tensor is on the CPU")
        return not any(isinstance(tensor, FakeTensor) for tensor in tensors)

    # what Python asks

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer a function of torch."""
        name, first = getattr(func, "__name__", ""), args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and name == "__get__":
            attribute = getattr(func.__self__, "__name__", "")
            if attribute in ("is_cuda", "is_cpu"):
                return self.memory.holds(first) == (attribute == "is_cuda")
            return CUDA if attribute == "device" and self.memory.holds(first) else func(*args, **kwargs)
        if func in self._methods and first is not None:
            return self._methods[func](func, *args, **kwargs)
        devices = [] if func is torch.device or name == "_parse_to" else [*filter(is_device, (*args, *kwargs.values()))]
        pinned = bool(kwargs.get("pin_memory"))
        if not devices and not pinned:
            return func(*args, **kwargs)
        args, kwargs = _on_cpu(args, kwargs)
        kwargs.pop("pin_memory", None)
        with self._copies():
            result = func(*args, **kwargs)
        if pinned:
            self._pinned.add(result.untyped_storage())
        elif torch.device(devices[0]).type == "cuda" and isinstance(result, Tensor):
            self._made(name, result)
        return result

    def _made(self, name: str, result: Tensor) -> None:
        """Put what a factory has made on the GPU."""
        if "tensor" in name or name == "asarray":
            self.wait(f"{name}() on the GPU")
        elif "empty" not in name:
            self._count(f"torch.{name}")
        self.memory.add(result)

    def _new_tensor(self, func: Any, tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None) or (CUDA if self.memory.holds(tensor) else CPU)
        result: Tensor = func(tensor, data, **kwargs)
        if torch.device(device).type == "cuda":
            self._made("new_tensor", result)
        return result

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run Tensor.to, Tensor.cuda or Tensor.cpu."""
        here, other = self.memory.holds(tensor), next((one for one in args if isinstance(one, Tensor)), None)
        devices = [*filter(is_device, (*args, *kwargs.values()))]
        if func in (Tensor.cuda, Tensor.cpu):
            there = func is Tensor.cuda
        elif other is not None:
            there = self.memory.holds(other)
        else:
            there = torch.device(devices[0]).type == "cuda" if devices else here
        args, kwargs = _on_cpu(args, kwargs)
        if there == here:
            return Tensor.to(tensor, *args, **kwargs) if args or kwargs else tensor
        non_blocking = kwargs.pop("non_blocking", False) or True in [one for one in args if isinstance(one, bool)]
        args = [one for one in args if not isinstance(one, bool)]
        with self._copies():
            result = Tensor.to(tensor, *(args or [CPU]), **(kwargs | {"copy": True}))
        if there:
            self.memory.add(result)
        elif non_blocking:  # torch then takes pinned memory
            self._pinned.add(result.untyped_storage())
        self._copied(tensor, result, non_blocking)
        self._count("copy")
        return result

    def _read(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run tolist, or numpy, which refuses a tensor on the GPU."""
        name = func.__name__
        if self.memory.holds(tensor):
            if name != "tolist":
                raise Refused(f"{name} of a tensor on the GPU, {place()}")
            self.wait(name)
        self._check_arrived(name, [tensor])
        with self._copies():  # the item() of fake tensors in tolist
            return func(tensor, *args, **kwargs)

    def _pin(self, func: Any, tensor: Tensor) -> Tensor:
        if self.memory.holds(tensor):
            raise Refused(f"pin_memory of a tensor on the GPU, {place()}")
        result = tensor.clone()
        self._pinned.add(result.untyped_storage())
        return result

    def _is_pinned(self, func: Any, tensor: Tensor) -> bool:
        return tensor.untyped_storage() in self._pinned

    def _deepcopy(self, func: Any, tensor: Tensor, memo: Any) -> Tensor:
        result: Tensor = func(tensor, memo)
        if self.memory.holds(tensor):
            self.memory.add(result)
        return result


def _on_cpu(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Replace devices among arguments by the CPU."""
    args = [CPU if is_device(argument) else argument for argument in args]
    return args, {key: CPU if is_device(value) else value for key, value in kwargs.items()}


class _Functions(TorchFunctionMode):
    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.gpu.operator(func, args, kwargs or {})
