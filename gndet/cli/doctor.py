"""`gndet doctor [--config FILE] [--json FILE] [key=value ...]`."""

from pathlib import Path

from gndet.cli.arguments import Options, Verbs, add_overrides, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("doctor", help="versions, devices, kernels, loader speed, disk: to paste into an issue")
    verb.add_argument("--config", help="config: measure with its data, check its run folder's disk")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write it here too")
    add_overrides(verb)


def run(options: Options) -> int:
    """Examine the machine.  Returns 1 where something will not work."""
    from gndet.toolbox.doctor.doctor import doctor

    healthy = doctor(say, options.config, options.overrides, options.json)
    return 0 if healthy else 1
