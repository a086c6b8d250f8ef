"""`gndet report RUN ... [--out FILE] [key=value ...]`."""

from pathlib import Path

from gndet.cli.arguments import Options, Verbs, add_overrides, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("report", help="a page of what a run saw, learned and gets wrong; several runs compared")
    verb.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or the folder of a norm study")
    verb.add_argument("--out", type=Path, help="file to write (RUN/report.html)")
    add_overrides(verb, "like data.root=PATH where the data has moved")


def run(options: Options) -> int:
    """Write the page."""
    from gndet.toolbox.report.report import write_report

    write_report(options.runs, options.out, options.overrides, say)
    return 0
