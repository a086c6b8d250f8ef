"""`gndet evaluate RUN_OR_CHECKPOINT [key=value ...] [--out FILE]`."""

from gndet.cli.arguments import CHECKPOINT, Options, Verbs, add_overrides, device_of, path


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("evaluate", help="compute the COCO metrics of a checkpoint, or a classifier's error")
    verb.add_argument("checkpoint", type=path, help=CHECKPOINT)
    add_overrides(verb)
    verb.add_argument("--out", type=path, metavar="FILE", help="write the detections here as COCO results (JSON)")


def run(options: Options) -> int:
    """Print the metrics; with --out, write the detections."""
    from gndet.data.datasets.reading import user_paths
    from gndet.distributed.process import process
    from gndet.errors import ConfigError
    from gndet.evaluation.classification import classification_table
    from gndet.evaluation.detector import evaluate_checkpoint, load_detector
    from gndet.evaluation.evaluate import evaluation_table
    from gndet.evaluation.picture_classifier import evaluate_classifier, load_picture_classifier
    from gndet.evaluation.results import RESULTS, save_results
    from gndet.files import refuse_output
    from gndet.modeling.trained import is_classifier

    with process(device_of(options.overrides)) as proc:
        say = print if proc.first else lambda _: None
        if is_classifier(options.checkpoint):
            if options.out:
                raise ConfigError("--out: a classifier has no detections to write")
            classifier = load_picture_classifier(options.checkpoint, options.overrides, proc, say)
            dataset, found = evaluate_classifier(classifier, proc)
            say(f"{options.checkpoint} on {dataset.name}: {len(dataset.records)} images")
            say(classification_table(found, dataset.classes))
            return 0
        detector = load_detector(options.checkpoint, options.overrides, proc, say)
        if options.out:
            refuse_output(options.out, "--out", RESULTS, user_paths(detector.config.data))
        dataset, evaluation = evaluate_checkpoint(detector, proc)
        if proc.first:
            chosen = detector.config.evaluation
            how = f", BN with the statistics of {chosen.precise_bn} training images" if chosen.precise_bn else ""
            how = ", BN with the statistics of each batch" if chosen.batch_statistics else how
            print(f"{options.checkpoint} on {dataset.name}: {len(dataset.records)} images{how}")
            print(evaluation_table(evaluation))
            if options.out:
                save_results(options.out, evaluation.results, marked=True)
                print(f"{len(evaluation.results)} detections -> {options.out}")
    return 0
