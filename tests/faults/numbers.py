"""T15 and T16: a loss or gradient that is not finite stops all ranks, or is skipped as often as allowed."""

import json
import shutil
import signal
from collections.abc import Collection
from pathlib import Path

from faults.launch import finish, start, unbroken
from faults.tiny import check, check_same, different_tensors, newest_update
from gndet.checkpoint import load_checkpoint

OPTIONS = ("train.checkpoint_every=1", "train.schedule.updates=5")


PLACES = {"image": "NaN in a picture", "loss": "inf in a loss", "gradient": "NaN in a gradient"}


def stops(folder: Path, places: Collection[str] = tuple(PLACES)) -> str:
    """T15."""
    reference = unbroken(folder, *OPTIONS, world=2)
    for where in places:
        run = start(folder, where, *OPTIONS, faults={"not_finite": [where, [3], 1]}, world=2)
        text = run.expect(2, 2)
        check("not finite at update 3" in text, f"{where}: no clear end: {text}")
        saved = load_checkpoint(run.out / "last")
        before = load_checkpoint(reference / "checkpoints" / "update-0000002")
        changed = list(different_tensors(saved, before))
        check(saved.meta["update"] == 2 and not changed, f"{where}: the weights were changed: {changed[:5]}")
        reports = [
            json.loads((run.out / "nonfinite" / f"update-0000003-process{rank}" / "report.json").read_text())
            for rank in (0, 1)
        ]
        culprits = [[image["image_id"] for image in report["images"] if image["first"]] for report in reports]
        check(culprits[0] == [] and len(culprits[1]) == 1, f"{where}: the reports name the images {culprits}")
        check(f"image {culprits[1][0]}: " in text, f"{where}: the image is not named: {text}")
        check(
            (run.out / "nonfinite" / "update-0000003-process1" / "batch-0.safetensors").exists(), f"{where}: no batch"
        )
        finish(folder, where, *OPTIONS, world=2)
        check_same(run.out, reference, where)
        shutil.rmtree(run.out)
    found = ", ".join(PLACES[where] for where in places)
    return f"{found} on one rank: both stopped before update 3, image named"


def skipped(folder: Path) -> str:
    """T16."""
    skipping = (*OPTIONS, "train.on_nonfinite=skip:2")
    text = finish(folder, "once", *skipping, faults={"not_finite": ["loss", [2], 0]})
    meta = load_checkpoint(folder / "once" / "last").meta
    check(meta["nonfinite"] == 1 and meta["update"] == 5, f"counted {meta['nonfinite']} up to update {meta['update']}")
    check("skipped: 1 so far" in text and "left out: 1 update(s)" in text, f"not reported: {text}")
    faults = {"not_finite": ["loss", [2], 0], "signal_after": [int(signal.SIGTERM), 3]}
    start(folder, "stopped", *skipping, faults=faults).expect(0)
    finish(folder, "stopped", *skipping)
    check_same(folder / "stopped", folder / "once", "with a skipped update")
    run = start(folder, "often", *skipping, faults={"not_finite": ["gradient", [2, 3, 4], 0]})
    text = run.expect(2)
    check("2 have been skipped before" in text and newest_update(run.out) == 3, f"three: {text}")
    return "skip:2: one skipped and counted, exactly resumed; the third stopped the run at update 3"
