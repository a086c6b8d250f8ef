"""`gndet config CONFIG [key=value ...]`."""

from gndet.cli.arguments import CONFIG, Options, Verbs, add_overrides


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("config", help="print a config with its overrides and all defaults")
    verb.add_argument("config", help=CONFIG)
    add_overrides(verb)


def run(options: Options) -> int:
    """Print the config with all its defaults."""
    from gndet.config.loading import config_to_yaml, load_config

    print(config_to_yaml(load_config(options.config, options.overrides)), end="")
    return 0
