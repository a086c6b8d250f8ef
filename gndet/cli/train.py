"""`gndet train CONFIG [key=value ...] [--fresh]`, and `gndet.train(...)` from Python: train, then write the report."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gndet.cli.arguments import CONFIG, Options, Verbs, add_overrides

if TYPE_CHECKING:
    from gndet.config.schema import Config
    from gndet.evaluation.detector import Detector
    from gndet.evaluation.picture_classifier import PictureClassifier


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("train", help="train a detector, or resume an unfinished run")
    verb.add_argument("config", help=CONFIG)
    add_overrides(verb)
    verb.add_argument("--fresh", action="store_true", help="move an existing run in the folder aside and start over")


def run(options: Options) -> int:
    """Train a detector."""
    from gndet.config.loading import load_config

    _train(load_config(options.config, options.overrides), fresh=options.fresh, progress=True)
    return 0


class TrainedRun(NamedTuple):
    """A finished run."""

    folder: Path
    metrics: dict[str, float]  # of the last evaluation, {"box/AP": 0.41, ...}
    report: Path | None  # the page, if one was written

    def load(self, device: str = "auto", **overrides: Any) -> "Detector":
        """Load the best checkpoint, as `gndet.load` does."""
        from gndet.evaluation.detector import load

        return load(self.folder, device, **overrides)

    def load_classifier(self, device: str = "auto", **overrides: Any) -> "PictureClassifier":
        """Load the best checkpoint of a run of task: classification, as `gndet.load_classifier` does."""
        from gndet.evaluation.picture_classifier import load_classifier

        return load_classifier(self.folder, device, **overrides)


def train_run(
    config: "str | Path | Config", *, fresh: bool = False, progress: bool = True, **overrides: Any
) -> TrainedRun:
    """Train a detector as `gndet train` does, or resume an unfinished run of the same config.

    config: a YAML file, the name of a packaged config, or a Config.  fresh: move an existing run in the folder aside
    and start over.  progress: show it, as the command line does.  overrides: changes to the config: out="runs/x",
    train={"schedule": {"updates": 60}}, or with dotted names, **{"train.schedule.updates": 60}.
    Returns the run: its folder, its last metrics and its report; its `load` returns the detector.
    Raises what `gndet.train.train` raises.
    """
    from gndet.config.loading import load_config, override_words, with_overrides
    from gndet.config.schema import Config
    from gndet.training.run_folder import REPORT

    words = override_words(overrides)
    if isinstance(config, Config):
        cfg = with_overrides(config, words, "gndet.train")
    else:
        cfg = load_config(os.path.expanduser(config), words)
    metrics, out = _train(cfg, fresh=fresh, progress=progress), Path(os.path.expanduser(cfg.out))
    report = out / REPORT
    return TrainedRun(out, metrics, report if cfg.train.report and report.is_file() else None)


def _train(cfg: "Config", *, fresh: bool, progress: bool) -> dict[str, float]:
    from gndet.cli.console import EscapingConsole
    from gndet.errors import RunFinished
    from gndet.train import train
    from gndet.training.run_folder import REPORT

    console = EscapingConsole()

    def write_report(out: Path) -> None:
        if cfg.train.report:
            from gndet.toolbox.report.report import report_on_ending  # with matplotlib, for which no start waits

            report_on_ending(out, show)

    def show(text: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            if progress:
                console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        at_end = write_report if cfg.train.report else None
        return train(cfg, fresh=fresh, console=console if progress else None, at_end=at_end)
    except RunFinished:
        out = Path(cfg.out).expanduser()
        if not os.path.lexists(out / REPORT):  # a kill may have come before
            write_report(out)
        raise
