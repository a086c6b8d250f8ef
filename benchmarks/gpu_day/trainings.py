"""Parts of the day that train: the quickstart, two real data sets, and one of them at full size."""

import json
import statistics

from benchmarks.gpu_day.notes import CPU, DATA, DEVICE, WORK, Notes, gndet, run

SHORT = ("train.schedule.updates=4", "data.val.limit=2", "train.report=false", "train.log_every=1")  # on a CPU


def quickstart(note: Notes) -> None:
    """Train the quickstart as it stands; the goal is a minute, with the start and the report."""
    small = ("train.schedule.updates=4", "data.train.count=8", "data.val.count=4", "train.log_every=1")
    train(note, "configs/quickstart.yaml", *(small if CPU else ()))


def bccd(note: Notes) -> None:
    """Train on blood cells, boxes only."""
    train_on(note, "bccd", "configs/bccd_r18_gn_scratch.yaml")


def nuclei(note: Notes) -> None:
    """Train on cell nuclei, with masks and up to 375 objects per picture."""
    train_on(note, "nuclei", "configs/nuclei_r18_gn_scratch.yaml")


def nuclei_full(note: Notes) -> None:
    """Train a ResNet-50 on cell nuclei at the size of COCO's recipes: the memory of pictures full of objects."""
    size = ("model.backbone.depth=50", "model.fpn.channels=256", "train.schedule.updates=150", "data.val.limit=16")
    edges = ("data.shortest_edge=[800]", "data.shortest_edge_test=800", "data.max_edge=1333")
    train_on(note, "nuclei", "configs/nuclei_r18_gn_scratch.yaml", *(() if CPU else (*size, *edges)))


def train_on(note: Notes, name: str, config: str, *overrides: str) -> None:
    """Train a config on a data set that `prepare` packed."""
    if not (DATA / name).is_dir():
        note("skipped", f"{DATA / name} is missing; `prepare --{name} FOLDER` packs it")
        return
    more = (*SHORT, "data.train.limit=4", "data.shortest_edge=[64]") if CPU else ("data.workers=3",)
    train(note, config, f"data.root={DATA / name}", *overrides, *more)


def train(note: Notes, config: str, *overrides: str) -> None:
    """Run `gndet train`, and note its time, speed, memory and scores."""
    folder = WORK / f"run-{note.file.stem}"
    command = gndet("train", config, f"out={folder}", f"device={DEVICE}", "data.cache=", *overrides)
    status, text, seconds = run(command, note.left)
    note("status", status)
    note("seconds", round(seconds, 1))
    note("words", [line for line in text.splitlines() if not line.startswith("update ")][-20:])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line for line in lines if line["kind"] == "train"]
    note("scores", [scores(line) for line in lines if line["kind"] == "evaluation"])
    later = speeds[len(speeds) // 4 :]  # without the start
    note("updates", speeds[-1]["update"])
    note("images/s", round(statistics.median(line["images_per_s"] for line in later), 1))
    note("data wait", round(statistics.median(line["data_wait"] for line in later), 3))
    note("peak MiB", round(max(line["memory_mib"] for line in speeds)))
    note("last loss", round(speeds[-1]["loss"], 4))
    if status:
        raise RuntimeError(f"gndet train ended with {status}")


def scores(line: dict[str, float]) -> dict[str, float]:
    """Return the update and the average precisions of an evaluation."""
    found = {name: round(value, 4) for name, value in line.items() if name.endswith(("/AP", "/AP50"))}
    return {"update": line["update"]} | found
