"""The report's section on training batches as the network saw them: augmented, padded, with boxes and masks.

The batches are rebuilt instead of recorded, because order and augmentation are functions of the seed.
"""

from contextlib import closing

from gndet.config.schema import Config
from gndet.data.batches.stream import train_batches
from gndet.data.records import Dataset
from gndet.errors import GndetError
from gndet.toolbox.report import blocks
from gndet.toolbox.report.blocks import GalleryPicture, Section
from gndet.toolbox.report.record import RunRecord
from gndet.training.validation import draw

PICTURES = 8


def section(run: RunRecord) -> Section:
    """Return the section on the first batches of the run."""
    if run.train_set is None:
        notice = blocks.notice("warn", "The training data could not be read.")
        return blocks.section("batches", "Training batches", notice)
    try:
        pictures, padding = draw_batches(run.train_set, run.cfg, run.images_at_once or 1, PICTURES)
    except GndetError as error:
        return blocks.section("batches", "Training batches", blocks.notice("bad", str(error)))
    words = (
        "The first pictures of the run as the network saw them: resized, flipped, and placed on the canvas of their "
        f"batch. The stripes are padding, {100 * padding:.0f} % of these canvases"
        + (", which the norms ignore." if run.cfg.model.norm.masked else ", which the norms' statistics include.")
    )
    return blocks.section("batches", "Training batches", blocks.gallery("batch-pictures", pictures), lead=words)


def draw_batches(dataset: Dataset, cfg: Config, at_once: int, count: int) -> tuple[list[GalleryPicture], float]:
    """Draw the first `count` training pictures on canvases of `at_once` images.

    Returns the drawings and the share of padding on these canvases.  Raises DataError if pictures cannot be read.
    """
    pictures: list[GalleryPicture] = []
    padded = cells = 0
    batches = train_batches(
        dataset, cfg.data.model_copy(update={"workers": 0}), seed=cfg.seed, start=0, stop=count,
        images_per_gpu=at_once, global_batch=cfg.train.global_batch, rank=0, world=1, masks=cfg.model.masks,
        pin_memory=False,
    )  # fmt: skip
    with closing(batches):
        for number, loaded in enumerate(batches, start=1):
            height, width = loaded.batch.images.shape[-2:]
            cells += len(loaded.image_ids) * height * width
            padded += len(loaded.image_ids) * height * width - int(loaded.batch.sizes.prod(1).sum())
            for row, image_id in enumerate(loaded.image_ids):
                caption = f"batch {number}, image {image_id}, canvas {height} x {width}"
                pictures.append(GalleryPicture(draw(loaded, row, dataset.classes), caption))
            if len(pictures) >= count:
                break
    return pictures[:count], padded / cells
