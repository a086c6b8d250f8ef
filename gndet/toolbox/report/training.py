"""The curves of a run: loss, AP, learning rate, speed, memory."""

from collections.abc import Sequence
from typing import Any

from gndet.toolbox.report import blocks, charts
from gndet.toolbox.report.blocks import Section
from gndet.toolbox.report.charts import Series
from gndet.toolbox.report.record import RunRecord


def section(run: RunRecord) -> Section:
    """Return the section with loss, AP, speed and memory over the updates."""
    if not run.train and not run.evaluations:
        return blocks.section("training", "Training", blocks.notice("plain", "Nothing was logged yet."))

    def logged(key: str, factor: float = 1.0) -> list[Series]:
        return [_series(run.train, key, key, factor)]

    figures = [
        _figure("loss", _losses(run), "loss", "mean losses between two lines of the log"),
        _figure("ap", _scores(run), "AP, percent", "AP on data.val, over IoU 0.5 to 0.95 and at 0.5"),
        _figure("lr", logged("lr"), "learning rate", "learning rate of single updates"),
        _figure("speed", logged("images_per_s"), "images/s", "images per second, without evaluations and saves"),
        _figure("wait", logged("data_wait", 100), "percent", "share of the time spent waiting for data"),
        _figure("memory", logged("memory_mib"), "MiB", "peak memory so far"),
    ]
    return blocks.section("training", "Training", blocks.beside(*figures))


def _figure(name: str, series: list[Series], y_label: str, caption: str) -> str:
    limits = {"x_range": (0, None), "y_range": (0, None)}
    return charts.lines(f"chart-{name}", series, caption, x_label="update", y_label=y_label, **limits)


def _series(log: Sequence[dict[str, Any]], key: str, name: str, factor: float = 1.0) -> Series:
    """Return a value of the log over the updates, with a gap where it was not finite."""
    entries = [entry for entry in log if key in entry]
    values = [float("nan") if entry[key] is None else factor * entry[key] for entry in entries]
    return Series(name, [entry["update"] for entry in entries], values)


def _losses(run: RunRecord) -> list[Series]:
    parts = sorted({key for entry in run.train for key in entry if key.startswith("loss_")})
    return [_series(run.train, "loss", "total"), *(_series(run.train, key, key.removeprefix("loss_")) for key in parts)]


def _scores(run: RunRecord) -> list[Series]:
    keys = [f"{part}/{key}" for part in ("box", "mask") for key in ("AP", "AP50")]
    return [_series(run.evaluations, key, key.replace("/", " "), 100) for key in keys]
