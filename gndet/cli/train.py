"""`gndet train CONFIG [key=value ...] [--fresh]`."""

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

    from gndet.train import train

    train(cfg, fresh=options.fresh, console=Console())
    return 0
