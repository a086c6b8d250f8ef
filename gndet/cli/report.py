"""`gndet report RUN ... [--out FILE] [key=value ...]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("report", help="write an HTML page about a run, or compare several runs")
    verb.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run folder, or the folder of a norm study")
    verb.add_argument("--out", type=path, metavar="FILE", help="file to write (default: RUN/report.html)")
    add_overrides(verb, "config overrides, e.g. data.root=PATH if the data has moved")


def run(options: Options) -> int:
    """Write the page."""
    from gndet.toolbox.report.report import write_report

    write_report(options.runs, options.out, options.overrides, say)
    return 0
