"""The report's section on training: curves of loss, AP, learning rate, speed and memory."""

import math
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

    losses = sorted({key for entry in run.train for key in entry if key.startswith("loss_")})
    scores = [f"{part}/{key}" for part in ("box", "mask") for key in ("AP", "AP50")]
    train = run.train
    quality = scores, "AP, percent", "AP (IoU 0.5 to 0.95) and AP50 on data.val"
    if run.cfg.task == "classification":
        quality = ["error"], "error, percent", "top-1 error on data.val"
    figures = [
        _figure("loss", train, ["loss", *losses], "loss", "losses, averaged between two log entries"),
        _figure("ap", run.evaluations, *quality, 100),
        _figure("lr", train, ["lr"], "learning rate", "learning rate at each log entry"),
        _figure("speed", train, ["images_per_s"], "images/s", "images per second, not counting evaluations and saves"),
        _figure("wait", train, ["data_wait"], "percent", "share of the time spent waiting for data", 100),
        _figure("memory", train, ["memory_mib"], "MiB", "peak memory so far"),
    ]
    return blocks.section("training", "Training", blocks.beside(*figures))


def _figure(
    name: str, log: Sequence[dict[str, Any]], keys: Sequence[str], y_label: str, caption: str, factor: float = 1.0
) -> str:
    """Draw values of the log over the updates; values that are not finite leave gaps."""
    series = []
    for key in keys:
        entries = [entry for entry in log if key in entry]
        values = [math.nan if entry[key] is None else factor * entry[key] for entry in entries]
        title = "total" if key == "loss" else key.removeprefix("loss_").replace("/", " ")
        series.append(Series(title, [entry["update"] for entry in entries], values))
    return charts.lines(
        f"chart-{name}", series, caption, x_label="update", y_label=y_label, x_range=(0, None), y_range=(0, None)
    )
