"""Compile the Triton kernels for NVIDIA GPUs without a GPU; print the widths of their memory accesses as JSON.

This is a separate program, because the interpreter mode of the tests must be off before Triton is imported.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gndet.modeling.norms import triton_kernels as norm_kernels

WHOLE = ("positions", "channels", "width", "groups", "stripe", "stripes")
MAPS = ("x", "y", "grad", "grad_x")
SIDES = {"block_p": 16, "block_c": 256}
KERNELS = {
    norm_kernels._sums_kernel: SIDES,
    norm_kernels._statistics_kernel: {"members": 8, "block": 8},
    norm_kernels._apply_kernel: {"relu": True, **SIDES},
    norm_kernels._gradient_sums_kernel: SIDES,
    norm_kernels._gradient_kernel: SIDES,
}


def accesses(kernel: triton.JITFunction, map_type: str, masked: bool, capability: int) -> list[str]:
    """Return the PTX loads and stores, e.g. "ld.global.v4.b32", of a kernel compiled for a compute capability."""
    constants = {"masked": masked, **KERNELS[kernel]} | ({} if masked else {"sizes": None})
    signature, fixed, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[place,] = "constexpr", constants[name]
            continue
        signature[name] = "i32" if name in WHOLE else "fp32" if name == "eps" else "*fp32"
        signature[name] = {"sizes": "*i64", **dict.fromkeys(MAPS, map_type)}.get(name, signature[name])
        if name not in ("eps", "stripes"):  # divisible by 16, like a ResNet's channels and torch's addresses
            divisible[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return re.findall(r"(?:ld|st)\.global[.\w:]*", compiled.asm["ptx"])


found = {}
for capability in (80, 90):
    for map_type in ("*bf16", "*fp32"):
        for masked in (False, True):
            for kernel in KERNELS:
                name = f"{kernel.__name__} {map_type} masked={masked} sm_{capability}"
                found[name] = accesses(kernel, map_type, masked, capability)
print(json.dumps(found))
