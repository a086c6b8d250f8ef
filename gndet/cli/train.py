"""`gndet train CONFIG [key=value ...] [--fresh]`: train, then write the report, even after an error."""

from contextlib import suppress
from pathlib import Path

from gndet.cli.arguments import CONFIG, Options, Verbs, add_overrides


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("train", help="train a detector, or resume an unfinished run")
    verb.add_argument("config", help=CONFIG)
    add_overrides(verb)
    verb.add_argument("--fresh", action="store_true", help="move an existing run in the folder aside and start over")


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
        with suppress(OSError):  # the terminal may be gone
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    train(cfg, fresh=options.fresh, console=console, at_end=write_report)
    return 0
