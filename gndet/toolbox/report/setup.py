"""The report's section on how the run was made: commands, weights, environment and config."""

import shlex
from collections import Counter

from gndet.config.loading import config_to_yaml
from gndet.config.schema import Config
from gndet.toolbox.report import blocks
from gndet.toolbox.report.blocks import Section
from gndet.toolbox.report.record import RunRecord
from gndet.training.run_folder import CONFIG, flat

META = {"device": "device", "processes": "processes", "data": "hash of data", "masks": "hash of masks",
        "val_data": "hash of val_data"}  # fmt: skip


def section(run: RunRecord) -> Section:
    """Return the section with everything that is needed to repeat the run."""
    rows: list[list[blocks.Cell]] = [[name, str(value)] for name, value in run.meta.get("versions", {}).items()]
    rows += [[name, str(run.meta[key])] for key, name in META.items() if key in run.meta]
    options = ("option", "value", "default")
    return blocks.section(
        "setup", "How it was made",
        blocks.heading("Commands"), blocks.preformatted("\n".join(next_commands(run))),
        blocks.heading("Weights"), blocks.paragraph(weights(run)),
        blocks.sortable_table("environment", ("what", "value"), rows, "environment") if rows else "",
        blocks.sortable_table("changed", options, changed(run.cfg), "options that differ from their defaults"),
        blocks.details("the resolved config", blocks.preformatted(config_to_yaml(run.cfg))),
    )  # fmt: skip


def next_commands(run: RunRecord) -> list[str]:
    """Return commands that repeat the run, and commands that use its checkpoint."""
    folder, config = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / CONFIG))
    lines = [f"gndet train {config} {shlex.quote(f'out={run.folder}-again')}      # repeats the run"]
    if run.meta:  # there is a checkpoint
        lines.append(f"gndet evaluate {folder}")
    if run.meta and run.cfg.task == "detection":
        lines += [
            f"gndet predict {folder} IMAGE_OR_FOLDER --out predictions",
            f"gndet analyze {folder} --json analysis.json",
        ]
    if run.ending[0] != "finished":
        lines.append(f"gndet train {config} {shlex.quote(f'out={run.folder}')}            # continues the run")
    return lines


def weights(run: RunRecord) -> str:
    """Say which weights the run started from."""
    if not run.cfg.train.weights:
        return "Trained from scratch (no train.weights)."
    fates = Counter((run.meta.get("norms") or {}).values())
    layers = "; norm layers: " + ", ".join(f"{count} {fate}" for fate, count in fates.items()) if fates else ""
    return f"train.weights: {run.cfg.train.weights}, norm_policy: {run.cfg.train.norm_policy}{layers}."


def changed(cfg: Config) -> list[list[str]]:
    """Return the options that differ from their defaults: name, value, default."""
    usual = flat(Config())
    options = ((key, value, usual.get(key, "-")) for key, value in flat(cfg).items())
    return [[key, str(value), str(default)] for key, value, default in options if value != default]
