"""`gndet export` with a classifier: write an ONNX file, after running it and comparing it with torch.

K classes.  The file's input is `image`, a picture (H, W, 3) uint8 RGB, already resized and cropped (metadata:
shortest_edge, max_edge, antialias, crop); its output is `probabilities` (K,) float32 (metadata: classes, category_ids).
H and W are any with global average pooling, and data.crop's size otherwise: ONNX pools only maps of one size to cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gndet.data.batches.crops import center_crop, resized
from gndet.data.datasets.reading import user_paths
from gndet.distributed.process import process
from gndet.errors import DataError, in_one_line, out_of_memory
from gndet.evaluation.picture_classifier import load_picture_classifier
from gndet.files import refuse_output, write_whole
from gndet.text import printable
from gndet.toolbox.onnx.export import (
    EXPORTED,
    FIRST_OPSET,
    SCORES,
    Show,
    candidate_pictures,
    converted,
    metadata,
    opened,
    refuse_export,
    resize_picture,
    session,
)
from gndet.toolbox.onnx.model import INPUT, OneClassified

OUTPUT = "probabilities"
FACTS = ("shortest_edge", "max_edge", "antialias", "crop", "size")  # of the metadata: how a picture is prepared


def export_classifier(
    checkpoint: Path, file: Path, overrides: Sequence[str], show: Show, *, opset: int = FIRST_OPSET,
    picture: Path | None = None,
) -> bool:  # fmt: skip
    """Write a classifier as an ONNX file, run it with onnxruntime, and compare it with torch on real pictures.

    picture: the picture to compare on; by default some of data.val.  Computes in float32.  Returns whether the results
    are equal; if not, no file is written.  Raises CheckpointError, ConfigError, DataError, OutputError.
    """
    refuse_export(opset)
    with process("cpu") as proc:
        classifier = load_picture_classifier(checkpoint, overrides, proc, show)
        cfg = classifier.config
        assert cfg.data.crop is not None  # the config demands it
        refuse_output(file, "--onnx", EXPORTED, user_paths(cfg.data))
        size = [cfg.data.crop.tested] * 2 if cfg.model.classifier.pool_size > 1 else None
        about = metadata(classifier, crop=cfg.data.crop.tested, size=size)
        facts = dict(zip(FACTS, (cfg.data.shortest_edge_test, cfg.data.max_edge, cfg.data.antialias,
                                 cfg.data.crop.tested, size), strict=True))  # fmt: skip
        found, name = candidate_pictures(cfg, picture, show)
        pictures = [prepared(image, facts, name) for image in found]
        module = OneClassified(classifier.model.float()).eval()
        axes = {} if size else {INPUT: {0: "height", 1: "width"}}
        model = converted(module, pictures[0], [OUTPUT], axes, about, opset)
        difference = _difference(module, model, pictures, show)
    if not difference <= SCORES:  # NaN too
        before = ", the existing file is unchanged" if file.exists() else ""
        show(f"{file}: not written{before}; expected probabilities within {SCORES} of torch's")
        return False
    show(f"equal on {len(pictures)} of {printable(name)}: probabilities within {difference:.2g}")
    write_whole(file, model)
    shapes = f"{size[0]} x {size[1]}" if size else "any size"
    show(f"{file}: {file.stat().st_size / 1e6:.1f} MB, opset {opset}, pictures of {shapes}")
    return True


def prepared(picture: np.ndarray, facts: dict[str, Any], name: str) -> torch.Tensor:
    """Resize and crop a picture (h, w, 3) uint8 as evaluation does; facts: by FACTS.  Returns (H, W, 3).

    Raises DataError, with the name, for a picture too narrow for a file that takes one size.
    """
    image = resize_picture(
        picture, resized(picture.shape[:2], facts["shortest_edge"], facts["max_edge"]), facts["antialias"]
    )
    image = center_crop(image.permute(2, 0, 1), facts["crop"]).permute(1, 2, 0).contiguous()
    if facts["size"] and list(image.shape[:2]) != list(facts["size"]):
        height, width = image.shape[:2]
        expected = " x ".join(map(str, facts["size"]))
        raise DataError(f"{name}: {height} x {width} pixels after resizing; the file takes {expected} only")
    return image


def _difference(module: torch.nn.Module, model: bytes, pictures: Sequence[torch.Tensor], show: Show) -> float:
    """Return the largest difference of a probability between onnxruntime and torch; inf if the file does not run."""
    largest = 0.0
    for picture in pictures:
        with torch.no_grad():
            expected = module(picture).numpy()
        try:
            (found,) = session(model).run(None, {INPUT: picture.numpy()})
        except Exception as error:  # the common base of onnxruntime's errors
            if out_of_memory(error):
                raise
            show(f"mismatch: onnxruntime cannot run it: {in_one_line(error)}")
            return float("inf")
        difference = float(np.abs(found - expected).max())
        if not difference <= SCORES:
            height, width = picture.shape[:2]
            show(f"mismatch on a picture of {height} x {width}: probabilities {difference:.2g} apart")
            return difference
        largest = max(largest, difference)
    return largest


def classify_onnx(file: Path, picture: np.ndarray) -> np.ndarray:
    """Classify a picture (H, W, 3) uint8 RGB of any size with an exported file.  Returns the probabilities (K,).

    Raises as `run_onnx` does, and DataError for a picture too narrow for the file's only size.
    """
    running, facts = opened(file, picture, FACTS)
    (found,) = running.run(None, {INPUT: prepared(picture, facts, "picture").numpy()})
    return np.asarray(found)
