"""T1 to T4: a run stopped anywhere resumes bit for bit; with another split it sees the same images in order."""

import signal
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from faults.launch import Faults, finish, start, unbroken
from faults.tiny import check, check_same, newest_update, read_trace, write_config
from gndet.checkpoint import CHECKPOINTS
from gndet.config.loading import load_config
from gndet.data.batches.stream import Loaded, train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.training.run_folder import PREEMPTED

TERM = int(signal.SIGTERM)
# 4 updates per epoch, 2 micro-batches per update
EPOCHS = ("data.train.count=8", "train.eval_every=3", "train.checkpoint_every=0", "train.log_every=2")
STOPS: dict[str, tuple[int, Faults]] = {
    "after update 1": (1, {"signal_after": [TERM, 1]}),
    "mid-epoch": (3, {"signal_after": [TERM, 3]}),
    "at an epoch's end": (4, {"signal_after": [TERM, 4]}),
    "within an update": (4, {"signal_within": [TERM, 5, 2]}),
}


def stop_and_resume(
    folder: Path, name: str, overrides: tuple[str, ...], stop: tuple[int, Faults], workers: tuple[int, int] = (0, 0)
) -> None:
    """Stop a run by a fault, resume it, and compare it with the unbroken run."""
    update, faults = stop
    first, then = (f"data.workers={count}" for count in workers)
    stopped = start(folder, name, *overrides, first, faults=dict(faults))
    stopped.expect(0)
    out = stopped.out
    check(newest_update(out) == update, f"{name}: saved at update {newest_update(out)}, expected {update}")
    check((out / PREEMPTED).exists(), f"{name}: no {PREEMPTED} in {out}")
    text = finish(folder, name, *overrides, then, faults={"watch_rng": []})
    check(f"continuing after update {update} of" in text, f"{name}: does not report the resume: {text}")
    check("not bit-exact" not in text, f"{name}: reports a difference: {text}")
    check(not (out / PREEMPTED).exists(), f"{name}: {PREEMPTED} is left")
    check_same(out, unbroken(folder, *overrides), name)


def stopped_anywhere(folder: Path) -> str:
    """T1."""
    for number, stop in enumerate(STOPS.values()):
        stop_and_resume(folder, f"stop-{number}", EPOCHS, stop)
    for update, _ in STOPS.values():
        check_next_batches(folder, update)
    return f"bit-identical after a stop {', '.join(STOPS)}; no global generator is used"


def killed_while_saving(folder: Path) -> str:
    """T1, with SIGKILL."""
    saving = (*EPOCHS, "train.checkpoint_every=2")
    killed = start(folder, "killed", *saving, faults={"kill_while_saving": [4]})
    killed.expect(-signal.SIGKILL)
    torn = list((killed.out / CHECKPOINTS).glob(".*"))
    check(len(torn) == 1, f"killed in the middle of a save, which left {torn}")
    finish(folder, "killed", *saving)
    check(not torn[0].exists(), f"not swept: {torn[0]}")
    check_same(killed.out, unbroken(folder, *EPOCHS), "killed")
    return "killed between two files of a checkpoint: swept, resumed from the previous one, bit-identical"


def check_next_batches(folder: Path, update: int) -> None:
    """Check that a stream that starts at an update yields the same batches as the whole stream."""
    cfg = load_config(write_config(folder), [*EPOCHS, "out=nowhere"])
    dataset = read_dataset(cfg.data.train, cfg.data)

    def batches(first: int) -> list[Loaded]:
        stream = train_batches(
            dataset, cfg.data, seed=cfg.seed, start=first, stop=8, images_per_gpu=1, global_batch=2, rank=0, world=1,
            masks=True, pin_memory=False,
        )  # fmt: skip
        with closing(stream):
            return list(islice(stream, 2 * (update - first), 2 * (update - first) + 3))

    for resumed, whole in zip(batches(update), batches(0), strict=True):
        tensors = [(*loaded.batch[:3], *loaded.batch.gt) for loaded in (resumed, whole)]
        same = all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
        check(
            same and resumed.image_ids == whole.image_ids, f"other batches after update {update}: {resumed.image_ids}"
        )


def other_workers(folder: Path) -> str:
    """T2."""
    stop_and_resume(folder, "0-to-2", EPOCHS, STOPS["within an update"], (0, 2))
    stop_and_resume(folder, "2-to-0", EPOCHS, STOPS["mid-epoch"], (2, 0))
    return "bit-identical with 0, then 2 loader processes, and with 2, then 0"


def other_state(folder: Path) -> str:
    """T3."""
    options = (*EPOCHS, "train.precision=bf16", "train.optimizer.kind=adamw", "train.optimizer.clip_grad_norm=1")
    stop_and_resume(folder, "bf16", options, STOPS["within an update"])
    stop_and_resume(folder, "bn", (*EPOCHS, "model.norm.kind=bn"), STOPS["within an update"])
    return (
        "bit-identical in bfloat16 with AdamW and a clipped gradient (there is no loss scaler to keep), and with BN, "
        "whose statistics the broken update had changed"
    )


def other_split(folder: Path) -> str:
    """T4."""
    options = (EPOCHS[0], "train.eval_every=0", "train.checkpoint_every=0")
    seen = []
    for name, worlds, split in (("2-to-1", (2, 1), 1), ("1-to-2", (1, 2), 1), ("split", (1, 1), 2)):
        trace = str(folder / f"{name}.jsonl")
        started = start(folder, name, *options, faults={"trace": [trace], "signal_after": [TERM, 2]}, world=worlds[0])
        started.expect(*[0] * worlds[0])
        again = (*options, f"train.images_per_gpu={split}")
        text = finish(folder, name, *again, faults={"trace": [trace]}, world=worlds[1])
        lines = [line for line in text.splitlines() if line.startswith("not bit-exact from here on")]
        check(len(lines) == 1, f"{name}: expected one line that says it is not bit-exact: {text}")
        made: dict[int, list[int]] = {}
        for line in read_trace(Path(trace)):
            made.setdefault(line["update"], []).extend(line["images"])
        check(sorted(made) == [1, 2, 3, 4, 5, 6], f"{name}: updates {sorted(made)}, expected 1 to 6, each once")
        epoch = sorted(image for update in (1, 2, 3, 4) for image in made[update])
        check(len(epoch) == len(set(epoch)) == 8, f"{name}: images of the epoch {epoch}, expected 8, each once")
        seen.append({update: sorted(images) for update, images in made.items()})
    check(seen[0] == seen[1] == seen[2], f"the images of an update depend on the split: {seen}")
    return (
        "2 -> 1 and 1 -> 2 processes, 1 -> 2 images at once: the same 8 images per epoch in the same updates, reported"
    )


def other_recipe(folder: Path) -> str:
    """Which options may change when a run resumes, and which are refused."""
    options = (EPOCHS[0], "train.eval_every=0", "train.checkpoint_every=0")
    start(folder, "run", *options, faults={"signal_after": [TERM, 2]}).expect(0)
    refused = {
        ("train.optimizer.lr=0.01",): "train.optimizer.lr: 0.02 there, 0.01 now",
        ("data.train.seed=3",): "data.train.seed: 1 there, 3 now",
        ("data.classes=[disc,star]",): "data.classes: None there, ['disc', 'star'] now",
        ("model.norm.kind=ln",): "model.norm.kind: 'gn' there, 'ln' now",
    }
    for overrides, words in refused.items():
        text = start(folder, "run", *options, *overrides).expect(2)
        check(words in text and "another config" in text, f"{overrides}: {words!r} expected: {text}")
        check(newest_update(folder / "run") == 2, "a refused command changed the run")
    allowed = ("train.log_every=2", "train.keep_last=3", "data.workers=1", "data.val.count=3")
    finish(folder, "run", *options, *allowed)
    return f"{len(refused)} changes of the recipe refused by their key, {len(allowed) - 1} neutral ones taken"
