"""`gndet doctor [--config FILE] [--json FILE] [key=value ...]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, file_name, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("doctor", help="check the machine: versions, devices, kernels, loader speed, disk")
    verb.add_argument(
        "--config", type=file_name, metavar="FILE", help="config: use its data and the disk of its run folder"
    )
    verb.add_argument("--json", type=path, metavar="FILE", help="also write the report here as JSON")
    add_overrides(verb)


def run(options: Options) -> int:
    """Check the machine.  Returns 1 if something will not work."""
    from gndet.toolbox.doctor.doctor import doctor

    healthy = doctor(say, options.config, options.overrides, options.json)
    return 0 if healthy else 1
