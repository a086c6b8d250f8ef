"""Batches that processes prepare ahead of training or evaluation, and prepare again when a process is killed."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gndet.data.workers import Death, Failure, map_ahead
from gndet.errors import DataError

Notify = Callable[[str], None]


def prefetch(
    load: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int,
    pin_memory: bool,
    describe: Callable[[Any], str],
    notify: Notify | None = None,
) -> Generator[Any, None, None]:
    """Yield load(item) for each item, in order, prepared by `workers` processes of one thread, or here if that is 0.

    The processes end with the generator: exhausted, closed or no longer held.
    load: depends on the item alone; a GndetError that it raises is raised here.  describe: names an item in messages.
    notify: called with a line when a process was killed; a new process prepares its items again.
    Raises DataError when two processes in a row die over one item.
    """

    def retry(item: Any, death: Death, deaths: int) -> None:
        if deaths > 1:
            raise DataError(
                f"{death} while preparing {describe(item)}, and so did the one before it; data.workers=0 "
                "shows the cause; if memory is short, set data.workers lower; if shared memory is (signal 7), give "
                "the container more (docker run --shm-size=8g)"
            )
        if notify:
            notify(f"{death} while preparing {describe(item)}; started anew")

    if workers == 0:
        for item in items:
            result = load(item)
            yield _pinned(result) if pin_memory else result
        return
    results = map_ahead(partial(_on_one_thread, load), items, workers=workers, on_death=retry)
    with closing(results):
        for item, result in results:
            if isinstance(result, Failure):
                raise RuntimeError(f"in a loader process, preparing {describe(item)}:\n{result.text}")
            yield _pinned(result) if pin_memory else result


def _on_one_thread(load: Callable[[Any], Any], item: Any) -> Any:
    """Load an item in a worker: the workers share the cores, each with one thread."""
    torch.set_num_threads(1)
    return load(item)


def _pinned(value: Any) -> Any:
    """Put the tensors of nested NamedTuples into page-locked memory, from where a GPU fetches them by itself."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    return type(value)(*map(_pinned, value)) if hasattr(value, "_fields") else value
