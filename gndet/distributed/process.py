"""A rank of a run: its number, device and memory allocator.  Only this file reads torchrun's variables."""

import ctypes
import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gndet.distributed.children import end_with_parent, safe_children
from gndet.distributed.watch import Watch
from gndet.errors import ConfigError, ProcessLost

Model = TypeVar("Model", bound=nn.Module)
_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # variables that torchrun sets; defaults without it
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the new and old names
START_TIMEOUT = 600.0  # seconds for ranks to connect and read their data, and for rank 0 to calibrate
NCCL_GRACE = 60.0  # seconds that NCCL waits longer than gloo
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
_INTERFACE = "GLOO_SOCKET_IFNAME"  # the variable that names gloo's network interface
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: asks for the IPv4 address of an interface


class Process(NamedTuple):
    """One of the `world` ranks of a run."""

    rank: int
    world: int
    device: torch.device
    watch: Watch | None = None  # only in training

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


@contextmanager
def process(device: str, deterministic: bool = False, watched: bool = False) -> Iterator[Process]:
    """Join the run that torchrun started, or be the only rank; leave the run at the end.

    device: auto, cpu or cuda.  watched: add a Watch; ranks then wait for each other for at most START_TIMEOUT, until
    `limit_waiting` is called.  Raises ConfigError if cuda is asked for and missing.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN.items())
    with _member(device, deterministic, rank, world, local, "env://", nccl=True) as proc, ExitStack() as stack:
        if watched:
            # a separate connection: the group's is busy while a collective looks for its peers
            store = dist.distributed_c10d._get_default_store().clone() if world > 1 else None
            proc = proc._replace(watch=stack.enter_context(Watch(store, rank, world, START_TIMEOUT)))
        yield proc


def alone(device: str) -> Process:
    """Return the only rank of a program that uses gndet as a library; the settings of its process stay as they are.

    device: auto, cpu or cuda (the current GPU).  Raises ConfigError.
    """
    _check_device(device)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return Process(0, 1, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))


def spawn(function: Callable[..., None], world: int, device: str, *args: Any) -> None:
    """Run function(proc, *args) on `world` new ranks of this machine and wait; they share GPUs if there are too few.

    function (defined at module level) and args are pickled.  Raises torch.multiprocessing's errors if a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder, safe_children():
        mp.spawn(_spawned, (function, world, device, f"file://{folder}/rendezvous", args), nprocs=world)


def _spawned(
    rank: int, function: Callable[..., None], world: int, device: str, rendezvous: str, args: tuple[Any, ...]
) -> None:
    if (parent := mp.parent_process()) and parent.pid:
        end_with_parent(parent.pid)
    torch.set_num_threads(max(torch.get_num_threads() // world, 1))
    gpus = torch.cuda.device_count()
    with _member(device, False, rank, world, rank % max(gpus, 1), rendezvous, nccl=world <= gpus) as proc:
        function(proc, *args)


@contextmanager
def _member(
    device: str, deterministic: bool, rank: int, world: int, local: int, rendezvous: str, *, nccl: bool
) -> Iterator[Process]:
    """Act as rank `rank` of `world`, on GPU `local` if there is one, during the context; nccl: no ranks share a GPU."""
    _check_device(device)
    if device != "cpu" and not any(name in os.environ for name in _ALLOCATOR):
        # canvases of many sizes fragment fixed segments; torch reads this when it first uses the GPU
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {rank} needs GPU {local} (from 0) of this machine, which has {torch.cuda.device_count()} for it; "
            "start as many ranks per machine as it has GPUs (torchrun --nproc-per-node, CUDA_VISIBLE_DEVICES)"
        )
    chosen = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if world > 1:
        _connect("cpu:gloo,cuda:nccl" if on_gpu and nccl else "gloo", rank, world, rendezvous)
    threads = torch.get_num_threads()
    try:
        yield Process(rank, world, chosen)
    finally:
        torch.set_num_threads(threads)  # a run of a small network uses one
    if world > 1:  # not after an error: this would wait for a lost rank
        dist.destroy_process_group()


def _connect(backend: str, rank: int, world: int, rendezvous: str) -> None:
    """Make the group of all ranks within START_TIMEOUT.  Raises ProcessLost."""
    limit, first = timedelta(seconds=START_TIMEOUT), os.environ.get("MASTER_ADDR", "")
    try:
        store, *_ = next(dist.rendezvous(rendezvous, rank, world, timeout=limit))
        # when torchrun restarts ranks, it keeps the store with the addresses of the dead ranks
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        if _INTERFACE not in os.environ and (name := _interface_to(first)):
            os.environ[_INTERFACE] = name
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except RuntimeError as error:
        raise ProcessLost(
            f"rank {rank} could not connect to the other ranks ({str(error).splitlines()[0]}); they met at {first}, on "
            f"network interface {os.environ.get(_INTERFACE, 'unknown')}, which {_INTERFACE} can name"
        ) from error


def _interface_to(address: str) -> str | None:
    """Return the network interface through which this machine reaches an address; None if it is its own loopback.

    gloo by itself takes the address of the host name.  On many machines that is 127.0.0.1, which other nodes cannot
    reach.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # any port: this sends nothing, it only chooses a route
        own = probe.getsockname()[0]
        for _, name in () if own.startswith("127.") else socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: got {device!r}, expected auto, cpu or cuda; torch.cuda.set_device chooses a GPU")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda: torch finds no GPU here; use device=cpu or device=auto")


def limit_waiting(proc: Process, seconds: float) -> None:
    """Limit how long this rank waits for the others from now on."""
    if proc.watch is not None:
        proc.watch.timeout_s = seconds
    if proc.world > 1:
        named = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.12
        named(timedelta(seconds=seconds))
        if "nccl" in dist.get_backend_config():  # it ends the process; gloo comes first, so that this rank can save
            nccl = dist.distributed_c10d._get_default_group()._get_backend(proc.device)
            nccl._set_default_timeout(timedelta(seconds=seconds + NCCL_GRACE))


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory: page faults from mapping it again take 38 % of a CPU training step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device is a GPU that computes in bfloat16 itself, as NVIDIA's do since Ampere."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def place(model: Model, precision: str, proc: Process) -> tuple[Model, Callable[[], AbstractContextManager]]:
    """Move a model to the device in a precision (train.precision).  Returns it and a factory of autocast contexts."""
    model = model.to(proc.device, torch.float64 if precision == "float64" else None)
    if proc.device.type == "cuda" or not model.training:  # on a CPU, gradients and the optimizer would copy each weight
        model = model.to(memory_format=torch.channels_last)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(proc.device))
    return model, partial(torch.autocast, proc.device.type, torch.bfloat16) if bf16 else nullcontext
