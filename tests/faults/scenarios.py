"""The fault scenarios by number."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from faults import disk, numbers, pictures, processes, resuming, saving, signalling, soak


class Scenario(NamedTuple):
    """A fault and the promise about it."""

    number: str  # T: of the original list of faults; X: added later
    title: str
    run: Callable[[Path], str]  # runs in an empty folder; returns a figure, raises if the promise is not kept
    soak: bool = False  # minutes of training


SCENARIOS = (
    Scenario("T1", "stopped anywhere, then resumed", resuming.stopped_anywhere),
    Scenario("T2", "resumed with other loader processes", resuming.other_workers),
    Scenario("T3", "resumed in bfloat16, and with BN", resuming.other_state),
    Scenario("T4", "resumed with another split", resuming.other_split),
    Scenario("T5", "killed at random while saving", saving.killed_at_random),
    Scenario("T6", "killed at every step of saving", saving.killed_at_every_step),
    Scenario("T7", "damaged checkpoints", disk.damaged),
    Scenario("T8", "SIGTERM to torchrun", signalling.launcher),
    Scenario("T9", "a signal to one process of two", signalling.one_rank),
    Scenario("T10", "a signal at a bad moment", signalling.at_bad_moments),
    Scenario("T11", "two signals", signalling.twice),
    Scenario("T12", "a process killed", processes.killed_rank),
    Scenario("T13", "a process killed, torchrun restarts", processes.restarted),
    Scenario("T14", "a process stopped", processes.stopped_rank),
    Scenario("T15", "NaN and inf in one process", numbers.stops),
    Scenario("T16", "updates that are not finite are skipped", numbers.skipped),
    Scenario("T19", "pictures that go bad in mid-run", pictures.gone_bad),
    Scenario("T20", "a full disk", disk.full),
    Scenario("T22", "data sets with hardly anything to learn from", pictures.hardly_anything),
    Scenario("T25", "a loader process killed", processes.killed_worker),
    Scenario("T26", "nothing grows in a minute", soak.short_soak),
    Scenario("T26-long", "nothing grows in 2000 updates", soak.soak, soak=True),
    Scenario("X1", "the best and the last checkpoint are kept", saving.best_is_kept),
    Scenario("X2", "a slow disk", disk.beside_training),
    Scenario("X3", "two runs in one folder", processes.two_runs),
    Scenario("X4", "resumed with another recipe", resuming.other_recipe),
)
