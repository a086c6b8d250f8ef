"""`gndet norm-study CONFIG [--norms ...] [--images-per-gpu ...] [--seeds N] [--budget T]`."""

from gndet.cli.arguments import CONFIG, Options, Verbs, add_overrides, duration, names, numbers, one_or_more, path, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser(
        "norm-study", help="measure AP or error against images per GPU for several norms on your data"
    )
    verb.add_argument("config", help=CONFIG)
    verb.add_argument("--norms", type=names, default=("gn", "bn"), help="norms, e.g. gn,bn,frozen_bn (default: gn,bn)")
    verb.add_argument("--groups", type=names, help="instead, group counts of gn: 1,2,4,8,16,32,channels (LN to IN)")
    verb.add_argument("--images-per-gpu", type=numbers, default=(1, 2, 4, 8), metavar="N,N", help="(default: 1,2,4,8)")
    verb.add_argument("--seeds", type=one_or_more, default=3, help="runs per cell (default: 3)")
    verb.add_argument(
        "--budget", type=duration, metavar="2h", help="shorten the schedule so that the study ends in this time"
    )
    verb.add_argument(
        "--batch", choices=("scaled", "fixed"), default="scaled",
        help="images per update: images per GPU x ranks, as in the paper (scaled), or the config's value (fixed)",
    )  # fmt: skip
    verb.add_argument("--jobs", type=one_or_more, help="runs at once (default: one per GPU; one on a CPU)")
    verb.add_argument("--out", type=path, metavar="FOLDER", help="study folder (default: runs/norm-study-CONFIG)")
    add_overrides(verb)


def run(options: Options) -> int:
    """Run the study.  Returns 1 if a cell failed."""
    from gndet.toolbox.norm_study.study import study

    passed = study(
        options.config, options.overrides, say, norms=options.norms,
        groups=options.groups, images_per_gpu=options.images_per_gpu, seeds=options.seeds, budget=options.budget,
        batch=options.batch, jobs=options.jobs, out=options.out,
    )  # fmt: skip
    return 0 if passed else 1
