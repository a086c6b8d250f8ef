"""`gndet invariance CONFIG [key=value ...] [--images N] [--out FILE]`."""

from gndet.cli.arguments import Options, Verbs, add_overrides, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("invariance", help="show that an image's training does not depend on the rest of its batch")
    verb.add_argument("config", help="config with the training images and the model")
    add_overrides(verb)
    verb.add_argument("--images", type=int, default=4, metavar="N", help="images to compare, 4 to 16 (default: 4)")
    verb.add_argument("--out", type=path, metavar="FILE", help="write the report here as JSON")


def run(options: Options) -> int:
    """Compare images alone and in batches.  Returns 1 if images depend on each other."""
    from gndet.config.loading import load_config

    cfg = load_config(options.config, options.overrides)
    from gndet.data.datasets.reading import user_paths
    from gndet.distributed.process import process
    from gndet.files import refuse_output, report_kind, write_whole
    from gndet.toolbox.invariance.invariance import check_invariance, json_report

    if options.out:
        refuse_output(options.out, "--out", report_kind("invariance"), user_paths(cfg.data))
    with process(cfg.device) as proc:
        report = check_invariance(cfg, options.images, proc, say)
    if options.out:
        write_whole(options.out, json_report(report))
    return 0 if report.passed else 1
