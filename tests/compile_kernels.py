"""Compile Triton kernels for NVIDIA GPUs without a GPU, as a run would launch them.

For programs that tests start: the interpreter mode of the tests must be off before Triton is imported.

    with recorded() as launches:
        forward(torch.empty(2, 64, 100, 100, device="meta"), ...)  # any code that launches kernels
    facts = [compiled(launch, 90) for launch in launches]
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


ARITHMETIC = {  # PTX instructions that tests of exact kernels count
    "fused": r"\bfma\.|\bmad\.\w*\.?f32", "divisions": r"\bdiv\.rn\.f32", "inexact divisions": r"\bdiv\.(?!rn|s|u)",
    "flushed": r"\.ftz", "barriers": r"\bbar\.", "atomics": r"\b(?:atom|red)\.",
}  # fmt: skip


class Launch(NamedTuple):
    """A kernel's launch that was asked for."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # num_warps and the like, and arguments by name


class Compiled(NamedTuple):
    """What the compiler made of a launch."""

    accesses: list[str]  # PTX loads, stores and asynchronous copies, e.g. "ld.global.v4.b32"
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes of shared memory per program
    warps: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches in this context instead of running them; tensors may be on the device "meta"."""
    launches: list[Launch] = []

    def run(self: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, grid, arguments, options))

    true, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = true


def specialized(launch: Launch, capability: int) -> tuple[Any, Any, list[tuple[str, Any]]]:
    """Return Triton's backend, the arguments by name, and of each argument what Triton specializes it for.

    Triton compiles a kernel once for each distinct list.
    """
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    arguments, kinds, _ = bind(*launch.arguments, **launch.options)
    return backend, arguments, kinds


def binary_of(launch: Launch, capability: int) -> CompiledKernel:
    """Compile a launch's kernel for a compute capability, e.g. 90 of an H100."""
    kernel = launch.kernel
    backend, arguments, kinds = specialized(launch, capability)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, arguments, kinds, launch.options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)


def compiled(launch: Launch, capability: int) -> Compiled:
    """Return what the compiler made of a launch for a compute capability."""
    binary = binary_of(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    accesses = re.findall(r"(?:(?:ld|st)\.global|cp\.async\.c[ag])[.\w:]*", binary.asm["ptx"])
    return Compiled(accesses, registers, stack + local, binary.metadata.shared, binary.metadata.num_warps)


def counts(launch: Launch, capability: int, patterns: dict[str, str]) -> dict[str, int]:
    """Count instructions of a launch's PTX by regular expression, and add registers and spilled bytes."""
    facts, ptx = compiled(launch, capability), binary_of(launch, capability).asm["ptx"]
    found = {what: len(re.findall(pattern, ptx)) for what, pattern in patterns.items()}
    return found | {"registers": facts.registers, "spilled": facts.spilled}
