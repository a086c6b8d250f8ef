"""Triton's kernels without a GPU: count their launches, and choose which modules' kernels count as working."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

import gndet

ROOM = Path(gndet.__file__).parent
# the modules that launch kernels; each tests its own once per device, in `trouble`, by `_compare`
KERNEL_MODULES = [
    ".".join(("gndet", *path.relative_to(ROOM).with_suffix("").parts)) for path in sorted(ROOM.rglob("*_kernels.py"))
]


@contextmanager
def replaced_launches(launch: Callable[[Any, Any, list[Any]], bool]) -> Iterator[None]:
    """Call launch(kernel, grid, arguments) whenever a Triton kernel is launched; run the kernel if it returns True."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    with ExitStack() as stack:
        for kind in (InterpretedFunction, JITFunction):

            def run(kernel: Any, *args: Any, grid: Any, run: Any = kind.run, **kwargs: Any) -> None:
                with torch._C.DisableTorchFunction():
                    if launch(kernel, grid, [*args, *kwargs.values()]):
                        with _disable_current_modes():
                            run(kernel, *args, grid=grid, **kwargs)

            stack.enter_context(mock.patch.object(kind, "run", run))
        yield


@contextmanager
def self_tests(broken: Collection[str] | None, tested: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """Let kernels pass their self-tests, except in the `broken` modules, after tested(module); None: run the tests."""
    with ExitStack() as stack:
        for name in KERNEL_MODULES:
            module = import_module(name)
            if broken is not None:

                def compare(*args: Any, name: str = name) -> list[str]:
                    tested(name)
                    return ["broken"] if name in broken else []

                stack.enter_context(mock.patch.object(module, "_compare", compare))
            module.trouble.cache_clear()
            stack.callback(module.trouble.cache_clear)
        yield
