"""How the run was made: config, environment, where its weights came from, and commands that do it again."""

from typing import Any

from gndet.config.loading import config_to_yaml
from gndet.config.schema import Config
from gndet.toolbox.report import blocks
from gndet.toolbox.report.record import RunRecord, best_checkpoint
from gndet.training.run_folder import CONFIG, flat


def section(run: RunRecord) -> str:
    """Everything that is needed to make the run once more."""
    versions = run.meta.get("versions", {})
    rows: list[list[blocks.Cell]] = [[name, str(value)] for name, value in versions.items()]
    rows += [
        ["device", str(run.meta[key])] if key == "device" else [key, str(run.meta[key])]
        for key in ("device", "processes")
        if key in run.meta
    ]
    rows += [[f"hash of {key}", str(run.meta[key])] for key in ("data", "masks", "val_data") if key in run.meta]
    return blocks.section(
        "setup",
        "How it was made",
        blocks.heading("Commands"),
        blocks.command_lines(next_commands(run)),
        blocks.heading("Weights"),
        blocks.paragraph(weights(run)),
        blocks.sortable_table("environment", ("what", "value"), rows, "environment", filtered=False) if rows else "",
        blocks.sortable_table(
            "changed",
            ("option", "value", "default"),
            changed(run.cfg),
            "options that are not at their default",
            filtered=False,
        ),
        blocks.details("the resolved config", blocks.preformatted(config_to_yaml(run.cfg))),
    )


def next_commands(run: RunRecord) -> list[str]:
    """Commands that make the run again and use what it learned."""
    folder = run.folder
    lines = [f"gndet train {folder / CONFIG} out={folder}-again      # the same run once more"]
    if best_checkpoint(run):
        lines += [
            f"gndet evaluate {folder}",
            f"gndet predict {folder} IMAGE_OR_FOLDER --out predictions",
            f"gndet analyze {folder} --json analysis.json",
        ]
    if run.ended != "finished":
        lines.append(f"gndet train {folder / CONFIG} out={folder}            # goes on where it stopped")
    return lines


def weights(run: RunRecord) -> str:
    """What the run began with."""
    if not run.cfg.train.weights:
        return "From scratch: no train.weights."
    norms = run.meta.get("norms") or {}
    fates: dict[str, int] = {}
    for fate in norms.values():
        fates[fate] = fates.get(fate, 0) + 1
    told = "; norm layers: " + ", ".join(f"{count} {fate}" for fate, count in fates.items()) if fates else ""
    return f"train.weights: {run.cfg.train.weights}, norm_policy: {run.cfg.train.norm_policy}{told}."


def changed(cfg: Config) -> list[list[blocks.Cell]]:
    """Options that are not at their default: name, value, default."""
    usual, own = flat(Config()), flat(cfg)
    return [
        [key, _short(value), _short(usual.get(key, "-"))] for key, value in own.items() if value != usual.get(key, "-")
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
