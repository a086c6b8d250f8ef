"""The fault scenarios by number."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from faults import disk, numbers, pictures, processes, resuming, saving, signalling, soak


class Scenario(NamedTuple):
    """A fault and the promise about it."""

    number: str  # T: of the original list of faults; X: added later
    title: str
    run: Callable[[Path], str]  # runs in an empty folder; returns a figure, raises if the promise is not kept
    mark: str = ""  # "slow": not in the quick suite; "soak": minutes of training


SLOW = "slow"
SCENARIOS = (
    Scenario("T1", "stopped anywhere, then resumed", resuming.stopped_anywhere, SLOW),
    Scenario("T1-killed", "killed while saving, then resumed", resuming.killed_while_saving),
    Scenario("T2", "resumed with other loader processes", resuming.other_workers),
    Scenario("T3", "resumed in bfloat16, and with BN", resuming.other_state, SLOW),
    Scenario("T4", "resumed with another split", resuming.other_split, SLOW),
    Scenario("T5", "killed at random while saving", saving.killed_at_random),
    Scenario("T6", "killed at every step of saving", saving.killed_at_every_step, SLOW),
    Scenario("T7", "a damaged checkpoint", partial(disk.damaged, first=1)),
    Scenario("T7-all", "damaged checkpoints", disk.damaged, SLOW),
    Scenario("T8", "SIGTERM to torchrun", signalling.launcher),
    Scenario("T9", "SIGTERM to one process of two", partial(signalling.one_rank, names=["SIGTERM"])),
    Scenario("T9-others", "SIGINT and SIGUSR1", partial(signalling.one_rank, names=["SIGINT", "SIGUSR1"]), SLOW),
    Scenario("T10", "a signal in the first batch", partial(signalling.at_bad_moments, names=["first-batch"])),
    Scenario("T10-all", "a signal at a bad moment", signalling.at_bad_moments, SLOW),
    Scenario("T11", "two signals", partial(signalling.twice, names=["one"])),
    Scenario("T11-more", "two signals to several ranks", partial(signalling.twice, names=["two", "torchrun"]), SLOW),
    Scenario("T12", "a process killed", partial(processes.killed_rank, ranks=[1])),
    Scenario("T12-both", "each process killed", processes.killed_rank, SLOW),
    Scenario("T12-torchrun", "a process of torchrun killed", processes.killed_under_torchrun, SLOW),
    Scenario("T13", "a process killed, torchrun restarts", processes.restarted, SLOW),
    Scenario("T14", "a process stopped", processes.stopped_rank),
    Scenario("T14-torchrun", "a process of torchrun stopped", partial(processes.stopped_rank, launched=True), SLOW),
    Scenario("T15", "inf in one process", partial(numbers.stops, places=["loss"])),
    Scenario("T15-all", "NaN and inf in one process", numbers.stops, SLOW),
    Scenario("T16", "updates that are not finite are skipped", numbers.skipped),
    Scenario("T19", "pictures that go bad in mid-run", pictures.gone_bad, SLOW),
    Scenario("T20", "a full disk", disk.full),
    Scenario("T20-again", "a full disk that has room again", disk.full_for_a_while, SLOW),
    Scenario("T22", "data sets with hardly anything to learn from", pictures.hardly_anything, SLOW),
    Scenario("T25", "a loader process killed", processes.killed_worker, SLOW),
    Scenario("T26", "nothing grows in a minute", soak.short_soak, SLOW),
    Scenario("T26-long", "nothing grows in 2000 updates", soak.soak, "soak"),
    Scenario("X1", "the best and the last checkpoint are kept", saving.best_is_kept),
    Scenario("X2", "a slow disk", disk.beside_training),
    Scenario("X3", "two runs in one folder", processes.two_runs),
    Scenario("X4", "resumed with another recipe", resuming.other_recipe, SLOW),
)
