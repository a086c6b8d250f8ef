"""Test Triton kernels before their first use on a device, so that a broken compiler or driver costs speed only."""

from collections.abc import Callable

import torch

try:
    import triton
except ImportError:  # a torch without GPU support
    triton = None


def failure(compare: Callable[[], list[str]]) -> str:
    """Return what is wrong with kernels, in words, or "".

    compare: returns a line per wrong result.  Raises its errors about memory: they pass, and the kernels are not to
    blame for them.
    """
    if triton is None:
        return "Triton is not installed"
    try:
        with torch.device("cpu"):  # where the tests draw, whatever the default device is
            wrong = compare()
    except Exception as error:  # any failure of compiler or driver: torch's own operators take over
        if "out of memory" in str(error).lower():
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "; ".join(wrong[:2])
