"""`gndet train CONFIG [key=value ...] [--fresh]`: train, then write the report, however the training ends."""

from contextlib import suppress
from pathlib import Path

from gndet.cli.arguments import CONFIG, Options, Verbs, add_overrides


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("train", help="train a detector, or go on with an unfinished run")
    verb.add_argument("config", help=CONFIG)
    add_overrides(verb)
    verb.add_argument("--fresh", action="store_true", help="move a run that is in the folder aside and start anew")


def run(options: Options) -> int:
    """Train a detector."""
    from gndet.config.loading import load_config

    cfg = load_config(options.config, options.overrides)
    from rich.console import Console

    from gndet.toolbox.report.report import report_on_ending
    from gndet.train import train

    console = Console()

    def write_report(out: Path) -> None:
        if cfg.train.report:
            report_on_ending(out, show)

    def show(text: str) -> None:
        with suppress(OSError):  # nobody reads any more
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    train(cfg, fresh=options.fresh, console=console, at_end=write_report)
    return 0
