"""The scenarios by number, and how they are run: each in a folder of its own, beside what they compare with."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gndet.errors import ConfigError, OutputError
from gndet.selftest import disk, numbers, pictures, processes, resuming, saving, signalling, soak
from gndet.selftest.launch import cleared


class Scenario(NamedTuple):
    """A fault and the promise about it."""

    number: str  # of the fault tests; X: beyond them
    title: str
    run: Callable[[Path], str]  # in an empty folder; returns its figure, raises where the promise is not kept
    seconds: int  # on 2 idle CPU cores
    quick: bool = False  # one of those that are run when none is named
    soak: bool = False  # minutes of training


SCENARIOS = (
    Scenario("T1", "stopped anywhere, then resumed", resuming.stopped_anywhere, 25, quick=True),
    Scenario("T2", "resumed with other loader processes", resuming.other_workers, 10),
    Scenario("T3", "resumed in bfloat16, and with BN", resuming.other_state, 15),
    Scenario("T4", "resumed with another split", resuming.other_split, 13),
    Scenario("T5", "killed at random while saving", saving.killed_at_random, 7, quick=True),
    Scenario("T6", "killed at every step of saving", saving.killed_at_every_step, 9, quick=True),
    Scenario("T7", "damaged checkpoints", disk.damaged, 44),
    Scenario("T8", "SIGTERM to torchrun", signalling.launcher, 15, quick=True),
    Scenario("T9", "a signal to one process of two", signalling.one_rank, 18),
    Scenario("T10", "a signal at a bad moment", signalling.at_bad_moments, 40),
    Scenario("T11", "two signals", signalling.twice, 27),
    Scenario("T12", "a process killed", processes.killed_rank, 32),
    Scenario("T13", "a process killed, torchrun starts anew", processes.restarted, 17),
    Scenario("T14", "a process stopped", processes.stopped_rank, 46),
    Scenario("T15", "NaN and inf in one process", numbers.stops, 17, quick=True),
    Scenario("T16", "updates that are not finite passed over", numbers.passed_over, 9, quick=True),
    Scenario("T19", "pictures that go bad in mid-run", pictures.gone_bad, 17),
    Scenario("T20", "a full disk", disk.full, 20, quick=True),
    Scenario("T22", "hardly anything to learn from", pictures.hardly_anything, 12),
    Scenario("T25", "a loader process killed", processes.killed_worker, 17, quick=True),
    Scenario("T26", "nothing grows in a minute", soak.short_soak, 35),
    Scenario("T26-long", "nothing grows in 2000 updates", soak.soak, 255, soak=True),
    Scenario("X1", "the best and the last checkpoint are kept", saving.best_is_kept, 1, quick=True),
    Scenario("X2", "a slow disk", disk.beside_training, 15),
    Scenario("X3", "two runs in one folder", processes.two_runs, 16),
    Scenario("X4", "resumed with another recipe", resuming.other_recipe, 10),
)


def chosen(names: Sequence[str], everything: bool) -> list[Scenario]:
    """The scenarios of these numbers; without any the quick ones, or with `everything` all.

    Raises ConfigError for an unknown number.
    """
    known = {scenario.number: scenario for scenario in SCENARIOS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no scenario {', '.join(unknown)}, expected some of {', '.join(known)}")
    if names:
        return [known[name] for name in names]
    return [scenario for scenario in SCENARIOS if everything or scenario.quick]


def run_scenarios(scenarios: Sequence[Scenario], keep: Path | None, say: Callable[[str], None]) -> bool:
    """Run scenarios, with a line for each; returns whether all promises were kept.

    keep: an empty or new folder, which is left as it is at the end; by default a temporary one, of which the folders of
    failures are left.  Raises OutputError for a folder that is not empty, ConfigError where there is no /proc.
    """
    if not Path("/proc/self/cwd").exists():
        raise ConfigError("selftest: needs Linux, where /proc shows what is left of a run")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"--keep: {keep}: expected a new or an empty folder")
    home = Path(tempfile.mkdtemp(prefix="gndet-selftest-")) if keep is None else keep
    minutes = sum(scenario.seconds for scenario in scenarios) / 60
    say(f"{len(scenarios)} scenarios in {home}, about {max(minutes, 1):.0f} min on 2 CPU cores")
    failed = []
    for scenario in scenarios:
        failed += [] if run_scenario(scenario, home / scenario.number, say, keep is not None) else [scenario.number]
    if keep is None:
        shutil.rmtree(home / "unbroken", ignore_errors=True)
        if not failed:
            shutil.rmtree(home)
    say(f"failed: {', '.join(failed)}" if failed else "all promises kept")
    return not failed


def run_scenario(scenario: Scenario, folder: Path, say: Callable[[str], None], keep: bool = False) -> bool:
    """Run a scenario and say how it went; returns whether it passed.  Its folder is left if it did not."""
    folder.mkdir(parents=True)
    began, trouble = time.monotonic(), None
    try:
        with cleared(folder.parent):
            text = scenario.run(folder.resolve())
    except Exception as error:  # whatever it trips over, the promise is not shown to be kept
        trouble = error
        text = f"{type(error).__name__}: {error}\n  see {folder}"
    verdict = "pass" if trouble is None else "FAIL"
    say(f"{scenario.number:8s} {verdict} {time.monotonic() - began:5.1f} s  {scenario.title}: {text}")
    if trouble is None and not keep:
        shutil.rmtree(folder)
    return trouble is None
