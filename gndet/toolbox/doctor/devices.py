"""Examine the hardware: processor, memory, GPUs."""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import torch

from gndet.config.schema import Config
from gndet.data.workers import usable_cores
from gndet.distributed.neighbors import core_time, taken_by_others
from gndet.toolbox.doctor.facts import Fact, Facts, reason

OBSERVED = 0.5  # seconds in which other processes are watched
LITTLE = 2 << 30  # bytes: a run of the quickstart takes 1 GiB, torch and data included
DRIVER = Path("/proc/driver/nvidia/version")
SETTINGS = r"MALLOC_|OMP_|MKL_|GLIBC_TUNABLES|LD_PRELOAD|PYTORCH_\w*ALLOC_CONF|CUDA_VISIBLE_DEVICES"
GIB = 2**30


def facts(cfg: Config | None) -> Facts:
    """Yield facts about the processor, the memory and the GPUs."""
    yield Fact("processor", processor())
    yield cores()
    yield memory(*memory_bytes(), cgroup_memory())
    if settings := [f"{name}={value}" for name, value in sorted(os.environ.items()) if re.match(SETTINGS, name)]:
        yield Fact("environment", ", ".join(settings))
    yield "asking for GPUs"
    yield from gpus()


def processor() -> str:
    """Return the processor's name and the instruction set that torch uses."""
    names = re.findall(r"(?m)^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"))
    return f"{names[0] if names else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


def cores() -> Fact:
    """Compare the number of torch's threads with the cores that this process may use."""
    usable, quota, threads = usable_cores(), cpu_quota(), torch.get_num_threads()
    text = f"{os.cpu_count()}, of which this process may use {usable}"
    text += (f" (cgroup limit: {quota:g})" if quota else "") + f"; torch computes with {threads} thread(s)"
    most = max(int(min(usable, quota or usable)), 1)
    if threads > most:
        return Fact("cores", f"{text}: more threads than cores is slow; set OMP_NUM_THREADS={most}", "warning")
    since = core_time()
    time.sleep(OBSERVED)
    if taken := taken_by_others(since):
        return Fact("cores", f"{text}; {taken}, so training is slower: stop them or wait", "warning")
    return Fact("cores", text)


def cpu_quota() -> float | None:
    """Return the number of CPUs that the cgroup allows; None if there is no limit."""
    for folder in _cgroups("cpu"):
        quota, _, period = _read(f"{folder}/cpu.max").strip().partition(" ")
        if not quota:
            quota, period = _read(f"{folder}/cpu.cfs_quota_us").strip(), _read(f"{folder}/cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit():
            return int(quota) / int(period)
    return None


def memory_bytes() -> tuple[int, int]:
    """Return the machine's total and available memory in bytes; 0 if the system does not report it."""
    kib = dict(re.findall(r"(?m)^(\w+):\s*(\d+) kB", _read("/proc/meminfo")))
    return 1024 * int(kib.get("MemTotal", 0)), 1024 * int(kib.get("MemAvailable", 0))


def cgroup_memory() -> tuple[int, int] | None:
    """Return the bytes that the cgroup allows and the bytes in use; None if there is no limit."""
    for folder in _cgroups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            allowed, taken = (_read(f"{folder}/{name}").strip() for name in (limit, used))
            if allowed.isdigit() and taken.isdigit() and int(allowed) < 1 << 60:  # v1 writes about 2^63 if unlimited
                return int(allowed), int(taken)
    return None


def memory(total: int, available: int, limit: tuple[int, int] | None) -> Fact:
    """Judge the memory; all arguments are in bytes."""
    text = f"{total / GIB:.1f} GiB, {available / GIB:.1f} available"
    if limit is not None:
        text += f"; this process's cgroup: {limit[0] / GIB:.1f} GiB, {limit[1] / GIB:.1f} in use"
        available = min(available, limit[0] - limit[1])
    if available < LITTLE:
        return Fact("memory", f"{text}: training may need more than {LITTLE / GIB:.0f} GiB", "warning")
    return Fact("memory", text)


def gpus() -> Facts:
    """Yield a fact per GPU, or why there is none."""
    driver = "".join(re.findall(r"Kernel Module[^\d]*([\d.]+)", _read(DRIVER))[:1])
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if not torch.cuda.is_available():
        yield no_gpu(driver, built)
        return
    yield Fact("CUDA", f"torch {built}, cuDNN {torch.backends.cudnn.version()}, driver {driver or '?'}")
    for number in range(torch.cuda.device_count()):
        yield f"using GPU {number}"
        yield _gpu(torch.device("cuda", number))


def no_gpu(driver: str, built: str) -> Fact:
    """Return why torch has no GPU.  driver: the version of NVIDIA's driver, "" if it is not loaded."""
    if not driver:
        return Fact("GPU", f"none (torch {built})")
    if torch.version.cuda is None:
        text = f"NVIDIA's driver {driver} is loaded, but torch is {built}: install torch for CUDA"
        return Fact("GPU", text, "warning")
    try:
        torch.cuda.init()
        why = "torch gives no reason"
    except Exception as error:  # torch's or the driver's
        why = reason(error)
    return Fact("GPU", f"NVIDIA's driver {driver} is loaded, but torch ({built}) finds no GPU: {why}", "warning")


def _gpu(device: torch.device) -> Fact:
    name = f"GPU {device.index}"
    try:
        known = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.ones(1, device=device).add(1).item()
    except Exception as error:  # a broken driver, a GPU in use by another process, a torch not built for this GPU
        return Fact(name, f"cannot be used: {reason(error)}", "wrong")
    text = (
        f"{known.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free, compute capability {known.major}.{known.minor}, "
        f"bf16 {'yes' if bf16 else 'no'}"
    )
    if not bf16:
        return Fact(name, f"{text}: use train.precision=float32", "warning")
    return Fact(name, text, "ok")


def _cgroups(controller: str) -> list[str]:
    """Return the folders of this process's cgroup and its ancestors, innermost first, for cgroup v2 and v1."""
    folders = []
    for _, controllers, path in (line.split(":", 2) for line in _read("/proc/self/cgroup").splitlines()):
        if not controllers or controller in controllers.split(","):
            top = Path("/sys/fs/cgroup") / (controller if controllers else "")
            innermost = top / path.lstrip("/")
            folders += [innermost, *(parent for parent in innermost.parents if parent.is_relative_to(top))]
    return [str(folder) for folder in folders]


def _read(path: str | Path) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""
