"""Training batches as the network got them: augmented, padded, with boxes and masks.

They are not kept while training: order and augmentation are functions of the seed, so they are made once more.
"""

import numpy as np
from pycocotools import mask as coco_mask

from gndet.data.batching import Loaded, train_batches
from gndet.errors import GndetError
from gndet.paste import paste_masks
from gndet.report import blocks
from gndet.report.blocks import Picture
from gndet.report.record import RunRecord
from gndet.visualize import draw_objects

PICTURES = 8
STRIPE = 16  # pixels between the stripes of the padding
SHADES = (150, 120)


def section(run: RunRecord) -> str:
    """The first batches of the run."""
    if run.train_set is None:
        return blocks.section(
            "batches", "Training batches", blocks.notice("warn", "The training data could not be read.")
        )
    try:
        pictures, padding = _drawn(run)
    except GndetError as error:
        return blocks.section("batches", "Training batches", blocks.notice("bad", str(error)))
    words = (
        "The first pictures of the run as the network got them: resized, flipped, on the canvas they shared; "
        f"striped: padding, {100 * padding:.0f} % of these canvases"
        + (", and norms do not see it." if run.cfg.model.norm.masked else ", and enters the norms' statistics.")
    )
    return blocks.section("batches", "Training batches", blocks.gallery("batch-pictures", pictures), lead=words)


def _drawn(run: RunRecord) -> tuple[list[Picture], float]:
    """Pictures of the first batches, and the share of padding on their canvases."""
    cfg, pictures, padded, cells = run.cfg, [], 0, 0
    at_once = run.meta.get("images_at_once") or cfg.train.images_per_gpu
    at_once = at_once if isinstance(at_once, int) else 1
    assert run.train_set is not None
    batches = train_batches(
        run.train_set, cfg.data.model_copy(update={"workers": 0}), seed=cfg.seed, start=0, stop=PICTURES,
        images_per_gpu=at_once, global_batch=cfg.train.global_batch, rank=0, world=1, masks=cfg.model.masks,
        pin_memory=False,
    )  # fmt: skip
    for number, loaded in enumerate(batches):
        for place in range(len(loaded.image_ids)):
            height, width = loaded.batch.images.shape[-2:]
            padded += height * width - int(loaded.batch.sizes[place].prod())
            cells += height * width
            if len(pictures) < PICTURES:
                caption = f"batch {number + 1}, image {loaded.image_ids[place]}, canvas {height} x {width}"
                pictures.append(Picture(_draw(loaded, place, run.train_set.classes), caption))
        if len(pictures) >= PICTURES:
            break
    batches.close()
    return pictures, padded / max(cells, 1)


def _draw(loaded: Loaded, place: int, classes: tuple[str, ...]) -> np.ndarray:
    """One image of a batch on its canvas."""
    batch = loaded.batch
    image = batch.images[place].permute(1, 2, 0).numpy().copy()
    height, width = batch.sizes[place].tolist()
    row, column = np.indices(image.shape[:2])
    stripes = np.where((row + column) // STRIPE % 2 == 0, *SHADES)
    beside = (row >= height) | (column >= width)
    image[beside] = stripes[beside][:, None]
    valid = batch.gt.valid[place]
    boxes = batch.gt.boxes[place][valid].numpy().astype(np.float64)
    labels = batch.gt.labels[place][valid].tolist()
    masks = None
    if batch.gt.masks.shape[-1]:
        codes = paste_masks(batch.gt.masks[place][valid].float().numpy(), boxes, image.shape[:2])
        masks = [coco_mask.decode(code).astype(bool) for code in codes]
    return draw_objects(image, boxes, [classes[label] for label in labels], labels, masks)
