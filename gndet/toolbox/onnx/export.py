"""`gndet export`: write a detector as an ONNX file, after running it and comparing it with torch.

D detections, S side of a mask: 28, or 14 in a C4 model.  The file's input is `image`, a picture (H, W, 3) uint8 RGB
already resized (metadata: shortest_edge, max_edge, antialias; or a fixed size); its outputs are boxes (D, 4) float32
xyxy in pixels of that picture, scores (D,), labels (D,) int64 (metadata: classes, category_ids), and masks (D, S, S),
probabilities in the frame of the box.
"""

import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import functional

import gndet
from gndet.config.loading import config_to_yaml
from gndet.config.schema import Config
from gndet.data.batches.crops import resized
from gndet.data.datasets.images import Reading, read_image
from gndet.data.datasets.reading import read_dataset, user_paths
from gndet.data.datasets.shapes import read_shapes
from gndet.distributed.process import process
from gndet.errors import CheckpointError, DataError, GndetError, OutputError, in_one_line, out_of_memory
from gndet.evaluation.detector import Detector, load_detector
from gndet.evaluation.trained_model import TrainedModel
from gndet.files import Kind, refuse_output, write_whole
from gndet.modeling.detection_model import DetectionModel
from gndet.toolbox.onnx.model import INPUT, OUTPUTS, OnePicture, own_operators

try:
    import onnx
    import onnxruntime
except ImportError:
    onnx = onnxruntime = None  # type: ignore[assignment]  # the extra `onnx` is not installed

Show = Callable[[str], None]
EXPORTED = Kind("a file of gndet export", rb"\n\x05gndet\x12[^\n]{,99}\Z")  # the last entry of its metadata
FIRST_OPSET, LAST_OPSET = 17, 20  # first with half-pixel RoIAlign; last that the TorchScript exporter supports
BOXES, SCORES, MASKS = 0.01, 1e-4, 1e-3  # largest differences: pixels, scores, probabilities
SMALLER = 0.75  # scale of the second picture that is compared if the file takes any size
TRIED = 8  # pictures of data.val to try; the one with the most detections is compared


class Found(NamedTuple):
    """Detections of one picture."""

    boxes: np.ndarray  # (D, 4) float32 xyxy
    scores: np.ndarray  # (D,) float32
    labels: np.ndarray  # (D,) int64
    masks: np.ndarray | None  # (D, S, S) float32; None without a mask head


def export(
    checkpoint: Path, file: Path, overrides: Sequence[str], show: Show, *, size: tuple[int, int] | None = None,
    masks: bool = True, opset: int = FIRST_OPSET, picture: Path | None = None,
) -> bool:  # fmt: skip
    """Write a detector as an ONNX file, run it with onnxruntime, and compare it with torch on a real picture.

    size: height and width of all pictures; None: dynamic.  masks: include the mask head, if there is one.  picture: the
    picture to compare on; by default one of data.val.  Computes in float32, whatever the precision of training.
    Returns whether the results are equal; if not, no file is written.  Raises CheckpointError, ConfigError, DataError,
    OutputError.
    """
    refuse_export(opset)
    with process("cpu") as proc:
        detector = load_detector(checkpoint, overrides, proc, show)
        refuse_output(file, "--onnx", EXPORTED, user_paths(detector.config.data))
        detector.model.float()  # NonMaxSuppression and RoIAlign take float32 only
        masks = masks and detector.config.model.masks
        pictures, name = comparison_pictures(detector, picture, size, show)
        names = list(OUTPUTS if masks else OUTPUTS[:-1])
        axes = {name: {0: "detections"} for name in names} | ({} if size else {INPUT: {0: "height", 1: "width"}})
        about = metadata(detector, size=size, mask_paste=detector.config.model.mask_paste)
        model = converted(OnePicture(detector.model, masks), pictures[0], names, axes, about, opset)
        passed = compare_with_torch(detector, model, pictures, name, masks, show)
    if passed:
        write_whole(file, model)
    else:
        before = ", the existing file is unchanged" if file.exists() else ""
        show(f"{file}: not written{before}; expected boxes within {BOXES} px, scores {SCORES}, masks {MASKS}")
        return False
    shapes = f"{size[0]} x {size[1]}" if size else "any size"
    show(f"{file}: {file.stat().st_size / 1e6:.1f} MB, opset {opset}, pictures of {shapes}")
    if not detector.config.data.exact_canvas:
        multiple = detector.config.data.canvas_multiple
        show(f"note: gndet evaluates on canvases padded to multiples of {multiple}; the file does not pad")
    return True


def refuse_export(opset: int) -> None:
    """Raise OutputError without the extra `onnx`, and for an opset that torch cannot write."""
    if onnx is None or onnxruntime is None:
        raise OutputError("gndet export needs onnx and onnxruntime: pip install onnx onnxruntime")
    if not FIRST_OPSET <= opset <= LAST_OPSET:
        raise OutputError(f"--opset {opset}: expected {FIRST_OPSET} to {LAST_OPSET}, which torch's exporter can write")


def converted(
    module: torch.nn.Module, picture: torch.Tensor, names: Sequence[str], axes: dict[str, dict[int, str]],
    about: dict[str, str], opset: int,
) -> bytes:  # fmt: skip
    """Trace a module on a picture (H, W, 3), and add the metadata.  Returns the content of the file.

    names: of the outputs; axes: the names of the dimensions that may differ.
    Raises OutputError if torch's exporter fails or writes invalid ONNX.
    """
    content = io.BytesIO()
    try:
        with torch.no_grad(), own_operators(opset), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one per traced shape, and the exporter's deprecation
            torch.onnx.export(
                module, (picture,),
                content,  # type: ignore[arg-type]  # torch's annotation is that of its other exporter
                dynamo=False, opset_version=opset, input_names=[INPUT], output_names=list(names), dynamic_axes=axes,
                training=torch.onnx.TrainingMode.PRESERVE,  # else torch 2.14 merges BN into convolutions wrongly
            )  # fmt: skip
        model = onnx.load_from_string(content.getvalue())
        for key, value in about.items():
            model.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(model)
    except (RuntimeError, onnx.checker.ValidationError) as error:  # torch's exporter raises RuntimeErrors
        if out_of_memory(error):
            raise
        reason = in_one_line(error)
        raise OutputError(f"torch {torch.__version__} cannot write this model as ONNX: {reason}") from error
    return bytes(model.SerializeToString())


def metadata(trained: TrainedModel, **more: Any) -> dict[str, str]:
    """Return the metadata of the file: JSON values, with `more` of them, and the config as YAML."""
    cfg, data = trained.config, trained.config.data
    values: dict[str, Any] = {
        "classes": trained.classes, "category_ids": trained.category_ids, "shortest_edge": data.shortest_edge_test,
        "max_edge": data.max_edge, "antialias": data.antialias, **more, "torch": torch.__version__,
    }  # fmt: skip
    named = {key: json.dumps(value) for key, value in values.items()}
    return named | {
        "config": config_to_yaml(cfg),
        "gndet": json.dumps(gndet.__version__),
    }  # the mark of EXPORTED is last


def comparison_pictures(
    detector: Detector, path: Path | None, size: tuple[int, int] | None, show: Show
) -> tuple[list[torch.Tensor], str]:
    """Return pictures (H, W, 3) uint8 as the network sees them, and their source.  Raises DataError."""
    data = detector.config.data
    candidates, name = candidate_pictures(detector.config, path, show)
    pictures = [
        resize_picture(image, size or resized(image.shape[:2], data.shortest_edge_test, data.max_edge), data.antialias)
        for image in candidates
    ]
    best = max(pictures, key=lambda picture: len(by_torch(detector.model, picture, masks=False).scores))
    if size:
        return [best], name
    smaller = tuple(max(32, math.ceil(side * SMALLER)) for side in best.shape[:2])
    return [best, resize_picture(best.numpy(), smaller, data.antialias)], name


def candidate_pictures(cfg: Config, path: Path | None, show: Show) -> tuple[list[np.ndarray], str]:
    """Return the picture at a path, or else some of data.val, or else drawn shapes, and their source."""
    if path is not None:
        if not path.is_file():  # opening a pipe would wait
            raise DataError(f"--picture {path}: no such picture")
        return [read_image(path, None, Reading.of(cfg.data))], str(path)
    pictures, reason = [], "it has no pictures"
    try:
        dataset = read_dataset(cfg.data.val, cfg.data)
        for record in dataset.records[:TRIED]:
            try:
                pictures.append(record.load())
            except DataError as error:
                reason = str(error)
    except GndetError as error:  # often the data set is not on this machine
        reason = str(error)
    if pictures:
        return pictures, dataset.name
    show(f"note: compared on drawn shapes, because data.val gives no picture (--picture FILE names one): {reason}")
    val = cfg.data.val.model_copy(update={"kind": "shapes", "count": TRIED})
    return [record.load() for record in read_shapes(val).records], "drawn shapes"


def resize_picture(picture: np.ndarray, size: Sequence[int], antialias: bool) -> torch.Tensor:
    """Resize (H, W, 3) uint8 as gndet does for evaluation.  Returns (h, w, 3), dense."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # a copy: Pillow's arrays are not writable
    return functional.resize(image, list(size), antialias=antialias).permute(1, 2, 0).contiguous()


def by_torch(model: DetectionModel, picture: torch.Tensor, *, masks: bool) -> Found:
    """Detect objects in a picture (H, W, 3) uint8 with gndet, as in evaluation."""
    sizes = torch.tensor([picture.shape[:2]])
    found = model.detect(picture.permute(2, 0, 1)[None], sizes, False)
    kept = found.valid[0]
    boxes, scores, labels = (part[0][kept].float().numpy() for part in (found.boxes, found.scores, found.labels))
    return Found(boxes, scores, labels.astype(np.int64), found.masks[0][kept].float().numpy() if masks else None)


def session(model: Path | bytes) -> Any:
    """Open an onnxruntime session on the CPU.  model: a file, or its content."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def by_onnxruntime(running: Any, picture: np.ndarray) -> Found:
    """Detect objects in a picture (H, W, 3) uint8, of the size that the network takes, with an open session."""
    boxes, scores, labels, *masks = running.run(None, {INPUT: picture})
    return Found(boxes, scores, labels, masks[0] if masks else None)


def run_onnx(file: Path, picture: np.ndarray) -> Found:
    """Detect objects in a picture (H, W, 3) uint8 RGB of any size with an exported file; boxes in its pixels.

    `gndet.evaluation.results.paste_masks` pastes the masks into the picture.  Raises DataError for another array,
    CheckpointError for a file that `export` did not write, and OutputError without onnxruntime.
    """
    running, facts = opened(file, picture, ("size", "shortest_edge", "max_edge", "antialias"))
    size = facts["size"] or resized(picture.shape[:2], facts["shortest_edge"], facts["max_edge"])
    found = by_onnxruntime(running, resize_picture(picture, size, facts["antialias"]).numpy())
    scale = np.array(picture.shape[1::-1]) / np.array([size[1], size[0]])
    return found._replace(boxes=found.boxes * np.tile(scale, 2).astype(np.float32))


def opened(file: Path, picture: np.ndarray, keys: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Check a picture, and open a session with an exported file.  Returns it and those keys of the metadata.

    Raises as `run_onnx` does.
    """
    if onnxruntime is None:
        raise OutputError("running an ONNX file needs onnxruntime: pip install onnx onnxruntime")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise DataError(f"picture: {picture.dtype} {picture.shape}, expected uint8 (height, width, 3), RGB")
    try:
        running = session(file)
        stored = running.get_modelmeta().custom_metadata_map
        return running, {key: json.loads(stored[key]) for key in keys}
    except KeyError as error:
        raise CheckpointError(f"{file}: its metadata lack {error.args[0]}; `gndet export` did not write it") from None
    except Exception as error:  # the common base of onnxruntime's errors
        raise CheckpointError(f"{file}: onnxruntime cannot load it: {in_one_line(error)}") from None


def compare_with_torch(
    detector: Detector, model: bytes, pictures: Sequence[torch.Tensor], name: str, masks: bool, show: Show
) -> bool:
    """Compare a file's content with torch on each picture and show the differences.  Returns whether they are small."""
    (least, most), passed, count = detector.config.model.detection_limits, True, 0
    for picture in pictures:
        expected = by_torch(detector.model, picture, masks=masks)
        where = f"{name}, {picture.shape[0]} x {picture.shape[1]}"
        try:
            found = by_onnxruntime(session(model), picture.numpy())
        except Exception as error:  # the common base of onnxruntime's errors
            if out_of_memory(error):
                raise
            show(f"mismatch on {where}: onnxruntime {onnxruntime.__version__} cannot run it: {in_one_line(error)}")
            return False
        full = len(expected.scores) == most  # then detections beyond the limit may score as high as the worst kept one
        difference = detection_difference(expected, found, float(expected.scores.min()) if full else least)
        show(f"{'mismatch' if difference.wrong else 'equal'} on {where}: {difference.words}")
        passed, count = passed and not difference.wrong, count + len(expected.scores)
    if passed and not count:
        show(f"note: nothing was found in {name}, so no box, score or mask was compared; --picture FILE names another")
    return passed


class DetectionDifference(NamedTuple):
    """How much two sets of detections differ."""

    boxes: float  # pixels
    scores: float
    masks: float | None  # probabilities; None without masks
    unmatched: int  # detections that only one of the two has
    count: int  # type: ignore[assignment]  # hides tuple.count

    @property
    def wrong(self) -> bool:
        """Whether they differ by more than rounding."""
        near = self.boxes <= BOXES and self.scores <= SCORES and (self.masks is None or self.masks <= MASKS)
        return bool(self.unmatched) or not near  # also for NaN

    @property
    def words(self) -> str:
        """The differences in a line."""
        text = f"{self.count} detections, boxes within {self.boxes:.2g} px, scores {self.scores:.2g}"
        text += f", masks {self.masks:.2g}" if self.masks is not None else ""
        return text + (f"; {self.unmatched} found by only one of the two" if self.unmatched else "")


def detection_difference(expected: Found, found: Found, threshold: float) -> DetectionDifference:
    """Compare each detection with the nearest of the same label; those scoring `threshold` or less may be missing."""
    distances = np.abs(expected.boxes[:, None] - found.boxes).max(axis=2)  # (D, D')
    distances[expected.labels[:, None] != found.labels] = math.inf
    a, b = [], []  # the indices of matched pairs
    for row, near in enumerate(distances):
        if near.min(initial=math.inf) <= 1:  # pixel; a box farther away is another object's
            a.append(row)
            b.append(int(near.argmin()))
            distances[:, b[-1]] = math.inf
    alone = np.concatenate([np.delete(expected.scores, a), np.delete(found.scores, b)])
    unmatched = int(np.count_nonzero(~(alone <= threshold + SCORES)))  # NaN too
    masks = None if expected.masks is None and found.masks is None else math.inf
    if expected.masks is not None and found.masks is not None:
        masks = _largest(expected.masks[a] - found.masks[b])
    boxes, scores = _largest(expected.boxes[a] - found.boxes[b]), _largest(expected.scores[a] - found.scores[b])
    return DetectionDifference(boxes, scores, masks, unmatched, len(expected.scores))


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0
