"""`gndet norms CONFIG_OR_CHECKPOINT [key=value ...]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, file_name


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("norms", help="list the norm layers of a config or checkpoint and their problems")
    verb.add_argument(
        "config", type=file_name, help="config (YAML file or packaged name), run folder or checkpoint folder"
    )
    add_overrides(verb)


def run(options: Options) -> int:
    """List the norm layers.  Returns 1 if they cannot work."""
    from gndet.toolbox.norms import audit_path

    return 0 if audit_path(options.config, options.overrides, print) else 1
