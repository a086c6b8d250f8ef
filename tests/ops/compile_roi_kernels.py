"""Compile the RoIAlign kernels for NVIDIA GPUs without a GPU; print what matters of their code as JSON.

This is a separate program, because the interpreter mode of the tests must be off before Triton is imported.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gndet.ops import roi_align_kernels as kernels

LEVELS = 4
CHANNELS = 256
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
PATTERNS = {
    "16-byte loads": r"ld\.global(?:\.\w+)*\.v4\.b32|ld\.global(?:\.\w+)*\.v2\.b64",
    "16-byte stores": r"st\.global(?:\.\w+)*\.v4\.b32|st\.global(?:\.\w+)*\.v2\.b64",
    "16-byte copies": r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (?:0x)?(?:10|16)",
    "tensor core": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)",
    "atomics": r"\b(?:atom|red)\.",
}


def cases() -> list[tuple[Any, str, int, dict[str, Any]]]:
    """Return kernels with the type of their maps and their constants."""
    found: list[tuple[Any, str, int, dict[str, Any]]] = []
    for name, dtype in TYPES.items():
        exact, width = tl.float64 if name == "fp64" else tl.float32, dtype.primitive_bitwidth // 8
        for size, ratio in ((7, 2), (14, 2), (7, 0)):
            shared = {"exact": exact, "size": size, "ratio": ratio, "limited": True}
            pool, gradient = kernels.pool_options(size, CHANNELS, width), kernels.gradient_options(CHANNELS, width)
            found.append((kernels._pool_kernel, name, pool | shared | {"aligned": True}))
            found.append((kernels._gradient_kernel, name, gradient | shared | {"operand": dtype}))
    constants = {"levels": LEVELS, "block": kernels.LISTED, "exact": tl.float32, "size": 7, "ratio": 2, "aligned": True}
    found.append((kernels._list_kernel, "fp32", constants))
    return found


def compiled(kernel: triton.JITFunction, name: str, constants: dict[str, Any], capability: int) -> dict[str, int]:
    """Return counts of instructions in the PTX, registers, bytes that spill, and shared memory."""
    tuples = dict.fromkeys(("maps", "grads"), f"*{name}") | dict.fromkeys(("heights", "widths", "strides"), "fp32")
    types = {
        "boxes": "*fp32", "level": "*i64", "image": "*i64", "limits": "*i64", "regions": "*i32", "starts": "*i32",
        "bins": "*fp64" if name == "fp64" else "*fp32",
        "pooled": f"*{name}", "grad": f"*{name}",
    }  # fmt: skip
    constants = dict(constants)
    options = {word: constants.pop(word) for word in ("num_warps", "num_stages") if word in constants}
    signature: dict[str, Any] = {}
    fixed, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], fixed[place,] = "constexpr", constants[argument]
        elif argument in tuples:
            signature[argument] = (tuples[argument],) * LEVELS
            if tuples[argument].startswith("*"):
                aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(LEVELS)}
        else:
            signature[argument] = types.get(argument, "i32")
            if argument in types or argument == "channels":
                aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, aligned)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = result.asm["ptx"]
    counts = {what: len(re.findall(pattern, ptx)) for what, pattern in PATTERNS.items()}
    return counts | assembled(ptx, capability) | {"shared": result.metadata.shared}


def assembled(ptx: str, capability: int) -> dict[str, int]:
    """Return what ptxas says of registers and spills."""
    program = Path(nvidia.__file__).parent / "bin" / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        architecture = re.search(r"\.target (\w+)", ptx)[1]  # sm_90a, not sm_90
        command = [program, "-v", f"--gpu-name={architecture}", "-o", "kernel.cubin", "kernel.ptx"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {"registers": sum(map(int, re.findall(r"Used (\d+) registers", said))), "spilled": spilled}


def main() -> None:
    """Print the counts of every kernel, type and GPU."""
    found = {}
    for capability in (80, 90, 100):
        for kernel, name, constants in cases():
            shape = f" P={constants['size']} ratio={constants['ratio']}" if "size" in constants else ""
            found[f"{kernel.__name__} {name}{shape} sm_{capability}"] = compiled(kernel, name, constants, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
