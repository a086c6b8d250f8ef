"""The errors a user can cause. `gndet VERB` prints their text without a traceback and exits with 2.

Every message names where the mistake came in (file, line, key or id), the value got and what was expected.
"""


class GndetError(Exception):
    """Base of all errors that a user can cause."""


class ConfigError(GndetError):
    """A config file or an override is wrong."""


class DataError(GndetError):
    """A data set, an annotation file or an image is wrong."""


class CheckpointError(GndetError):
    """A checkpoint or a weights file is wrong, or does not fit."""


class OutputError(GndetError):
    """A file or folder that a result should go to cannot be written."""


class TrainingError(GndetError):
    """A training run cannot go on: a non-finite loss, an output folder in use."""


class ProcessLost(TrainingError):
    """Another process of the run did not come to where all meet."""


class MachineError(GndetError):
    """The machine is at a limit: open files, memory.  No file is at fault, and none is passed over."""


class Preempted(GndetError):
    """A signal ended a run; what it learned is saved and the same command goes on. `gndet` exits with status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status
