"""`gndet convert`: convert weights of any known format to a gndet checkpoint (with GN instead of BN if asked), or to
another toolkit's file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from gndet.checkpoint import save_checkpoint
from gndet.config.loading import with_overrides
from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.presets import DATA
from gndet.config.schema import Config
from gndet.data.datasets.images import Reading, picture_size
from gndet.data.records import Dataset
from gndet.errors import ConfigError
from gndet.evaluation.sources import Pictures, find_sources
from gndet.files import refuse_output
from gndet.text import text_table
from gndet.weights.convert import Fate
from gndet.weights.foreign.export import TOOLKITS, export_weights
from gndet.weights.foreign.files import write_torch
from gndet.weights.load import InitialModel, initial_model
from gndet.weights.read import Source, read_source

Show = Callable[[str], None]


def convert(
    where: str, out: Path, overrides: Sequence[str], show: Show, *, to: str | None, policy: str,
    channels_per_group: int, damp: float, pictures: Sequence[Path], count: int,
) -> None:  # fmt: skip
    """Convert weights and write them.

    where: the weights, named as in train.weights.  out: a checkpoint folder, or a .pth file if `to` is a toolkit; it
    must not exist yet.  overrides: `key=value` over the config of the source's model, including train.source.*.
    to: "gn" turns every part with BN into GN by `policy`, with channels_per_group and damp.  pictures: files and
    folders of images; "calibrate" takes `count` of them, other policies a few.  show: called with each line to report.
    Raises CheckpointError, ConfigError, DataError or OutputError before it writes anything.
    """
    if refused := [text for text in overrides if text.startswith("train.") and not text.startswith("train.source.")]:
        raise ConfigError(
            f"{refused[0]}: gndet convert takes --policy, --damp and --count, and of train only train.source"
        )
    refuse_output(out, "OUT", None, filter(Path.is_dir, pictures))
    if policy == "calibrate" and not pictures:
        raise ConfigError("--policy calibrate needs pictures to fit on: name files or folders with --images")
    source, cfg = _read(where, overrides)
    classes = source.classes or tuple(f"class_{i}" for i in range(source.num_classes))
    if to == "gn":
        cfg = cfg.model_copy(update={"model": with_group_norm(source, cfg.model, channels_per_group)})
    train = {"weights": where, "norm_policy": policy, "norm_damp": damp, "calibration_images": count}
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update=train)})
    images = _pictures(pictures, Reading.of(cfg.data)) if pictures else None
    start = initial_model(cfg, classes or ("object",), images=images, source=source._replace(classes=classes or None))
    for note in start.notes:
        if not note.startswith("newly initialized tensors"):  # these are not written
            show(note)
    show(f"holds: {', '.join(source.parts)}")
    if to in TOOLKITS:
        export = export_weights(_held(start, source), start.cfg.model, classes, to, named=source.classes is not None)
        write_torch(out, export.content)
        show(f"{len(export.tensors)} tensors, named as in {to} -> {out}; set in {to}:")
        for note in export.notes:
            show(f"  {note}")
    else:
        _write_checkpoint(out, start, source, classes, where, show)


def _read(where: str, overrides: Sequence[str]) -> tuple[Source, Config]:
    """Read the weights; return them with the config of their model, overrides applied."""
    named = [text for text in overrides if text.startswith("train.source.")]
    train = with_overrides(Config(), named, "the command").train
    source = read_source(where, train.source)
    data = Config().data.model_copy(update=DATA.get(source.model.compat, {}))
    cfg = (source.config or Config(model=source.model, data=data)).model_copy(update={"train": train})
    return source, with_overrides(cfg, [text for text in overrides if text not in named], "the command")


def _held(start: InitialModel, source: Source) -> dict[str, Tensor]:
    """Return the tensors of the parts that the source holds."""
    prefixes = tuple(f"{part}." for part in source.parts)
    return {key: value for key, value in start.model.state_dict().items() if key.startswith(prefixes)}


def _write_checkpoint(
    out: Path, start: InitialModel, source: Source, classes: Sequence[str], where: str, show: Show
) -> None:
    """Show a table of the conversion error of each norm layer, then write a gndet checkpoint."""
    if any(fate.expected_error is not None or fate.measured_error is not None for fate in start.fates.values()):
        show(fate_table(start.fates))
    ids = source.category_ids or tuple(range(1, len(classes) + 1))
    meta = {
        "update": 0, "classes": list(classes), "classes_named": source.classes is not None, "category_ids": list(ids),
        "config": start.cfg.model_copy(update={"train": Config().train}).model_dump(mode="json"),
        "norms": {name: fate.what for name, fate in start.fates.items()}, "parts": list(source.parts),
        "source": [where, *start.notes],
    }  # fmt: skip
    save_checkpoint(out, {"model": _held(start, source)}, meta)
    show(f"gndet checkpoint -> {out}")


def fate_table(fates: dict[str, Fate]) -> str:
    """Return a table with one line per norm layer: its relative errors and how it was converted."""
    rows = [["norm layer", "expected", "measured", "(relative errors)"]]
    for name, fate in fates.items():
        errors = ("-" if error is None else f"{error:.3f}" for error in (fate.expected_error, fate.measured_error))
        rows.append([name, *errors, fate.what])
    return text_table(rows, left=(0, 3))


def with_group_norm(source: Source, model: ModelConfig, channels_per_group: int) -> ModelConfig:
    """Return the model config with GN in every part that has BN in the source."""
    norm = NormConfig(kind="gn", channels_per_group=channels_per_group)
    kinds = source.model.part_norms()
    parts = [part for part in source.parts if part in kinds]  # a classifier's head has no norm
    norms = {part: norm if kinds[part].has_running_statistics else kinds[part] for part in parts}
    return model.model_copy(
        update={part: getattr(model, part).model_copy(update={"norm": kind}) for part, kind in norms.items()}
        | {"norm": norms.get("backbone", model.norm)}
    )


def _pictures(paths: Sequence[Path], reading: Reading) -> Dataset:
    """Return pictures as a data set without objects.  Raises DataError if the paths hold none."""
    found = find_sources(list(map(str, paths)))
    sizes = {file: picture_size(file, reading) for file in (*found.pictures, *found.videos)}  # refuses a video
    return Dataset(", ".join(map(str, paths)), (), (), Pictures(sizes, reading))
