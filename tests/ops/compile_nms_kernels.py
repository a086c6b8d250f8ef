"""Compile the NMS kernels for NVIDIA GPUs without a GPU; print what matters of their code as JSON.

This is a separate program, because the interpreter mode of the tests must be off before Triton is imported.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gndet.ops import nms_kernels

TYPES = {"boxes": "*fp32", "groups": "*i64", "bits": "*i32", "valid": "*u8", "keep": "*u8", "threshold": "fp32"}
KERNELS = [  # kernel, its constants, its launch options
    (
        nms_kernels._overlap_kernel,
        {"words": 64, "rows": nms_kernels.ROWS, "columns": nms_kernels.COLUMNS},
        nms_kernels.EXACT,
    ),
    *(
        (nms_kernels._walk_kernel, {"words": words}, {"num_warps": nms_kernels.walk_warps(words)})
        for words in (1, 64, 512)
    ),
]


def compiled(kernel: triton.JITFunction, constants: dict[str, int], options: dict[str, int], capability: int) -> dict:
    """Return counts of instructions in the PTX, and what ptxas says of registers and spills."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=target, options=options).asm["ptx"]
    found = {name: len(re.findall(words, ptx)) for name, words in PATTERNS.items()}
    return found | assembled(ptx, capability)


PATTERNS = {
    "fused": r"\bfma\.|\bmad\.\w*\.?f32", "divisions": r"\bdiv\.rn\.f32", "inexact divisions": r"\bdiv\.(?!rn|s|u)",
    "flushed": r"\.ftz", "barriers": r"\bbar\.", "atomics": r"\b(?:atom|red)\.",
}  # fmt: skip


def assembled(ptx: str, capability: int) -> dict[str, int]:
    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    program = Path(nvidia.__file__).parent / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]  # sm_90a, not sm_90
        options = ["-v", "--fmad=false", f"--gpu-name={target}", "-o", "kernel.cubin", "kernel.ptx"]
        said = subprocess.run([program, *options], cwd=folder, capture_output=True, text=True, check=True).stderr
    registers, stores, loads = (
        sum(map(int, re.findall(words, said)))
        for words in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return {"registers": registers, "spills": stores + loads}


print(
    json.dumps(
        {
            f"{kernel.__name__} {constants} sm_{capability}": compiled(kernel, constants, options, capability)
            for capability in (80, 90, 100)
            for kernel, constants, options in KERNELS
        }
    )
)
