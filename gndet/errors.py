"""Errors that a user can cause.  `gndet VERB` prints their message without a traceback and exits with status 2.

Every message names the source of the mistake (file, line, key or id), the value found and the value expected.
"""


class GndetError(Exception):
    """Base class of all errors that a user can cause."""


class ConfigError(GndetError):
    """A config file or an override is wrong."""


class DataError(GndetError):
    """A data set, an annotation file or an image is wrong."""


class CheckpointError(GndetError):
    """A checkpoint or a weights file is wrong, or does not fit."""


class OutputError(GndetError):
    """An output file or folder cannot be written."""


class TrainingError(GndetError):
    """A training run cannot continue: a non-finite loss, an output folder in use."""


class RunFinished(TrainingError):
    """The run of this config is finished; rank 0 raises it."""


class ProcessLost(TrainingError):
    """Another rank of the run did not take part in a collective."""


class MachineError(GndetError):
    """The machine has reached a limit: open files, memory.  No file is at fault, and none is skipped."""


class Preempted(GndetError):
    """A signal ended a run; its progress is saved and the same command resumes it.  `gndet` exits with `status`."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",  # torch on a CPU
    "bad allocation", "std::bad_alloc",  # C++
    "unable to mmap", "Cannot allocate memory", "failed to map segment",  # the system
    "could not create a primitive", "could not execute a primitive",  # oneDNN
    "unable to find an engine",  # cuDNN, when no algorithm's workspace fits
    "_STATUS_ALLOC_FAILED",  # cuDNN 8, cuBLAS
    "_ALLOCATION_FAILED",  # cuDNN 9
    "CUDA error: out of memory",  # the driver, to torch
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",  # the driver, when Triton loads or launches a kernel
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out; libraries below torch have their own words for it."""
    # by name: torch, whose error it is, takes seconds to import
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def in_one_line(error: BaseException) -> str:
    """Say in one line what went wrong.  Of a library's error, the type and the first line: a stack may follow."""
    if isinstance(error, GndetError):
        return " ".join(str(error).split())
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
