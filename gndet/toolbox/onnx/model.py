"""The detector, or the classifier, as a graph of ONNX operators: the modules to trace, and two operators in ONNX.

N boxes, D detections, K classes, S side of a mask, (H, W) picture.  The graph takes one picture at a time, which fills
its canvas: nothing is padded, and no norm needs a mask.  It is made for torch's TorchScript exporter, as the newer one
supports neither a stable sort nor `nms_keep` (torch 2.14 with onnxscript 0.7).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.symbolic_helper import parse_args

from gndet.modeling.classifier import Classifier
from gndet.modeling.detection_model import DetectionModel

FLOAT = 1  # of onnx.TensorProto.DataType
INPUT, OUTPUTS = "image", ("boxes", "scores", "labels", "masks")


class OnePicture(nn.Module):
    """A detector for one picture (H, W, 3) uint8 RGB, already resized; no padding, no slots."""

    def __init__(self, model: DetectionModel, masks: bool) -> None:
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image (H, W, 3).  Returns boxes (D, 4) xyxy in its pixels, scores (D,), labels (D,), masks (D, S, S)."""
        model = self.model
        images = image.permute(2, 0, 1)[None]  # (1, 3, H, W)
        sizes = torch._shape_as_tensor(image)[:2][None].to(image.device)  # (1, 2), traced rather than constant
        found = model.detect(images, sizes, False)
        kept = found.valid[0].nonzero()[:, 0]
        boxes, scores, labels = found.boxes[0][kept], found.scores[0][kept], found.labels[0][kept]
        return (boxes, scores, labels, found.masks[0][kept]) if self.masks else (boxes, scores, labels)


class OneClassified(nn.Module):
    """A classifier for one picture (H, W, 3) uint8 RGB, already resized and cropped; no padding."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """image (H, W, 3).  Returns the probabilities of its classes (K,)."""
        images = image.permute(2, 0, 1)[None]  # (1, 3, H, W)
        sizes = torch._shape_as_tensor(image)[:2][None].to(image.device)  # (1, 2), traced rather than constant
        logits = self.model.classify(images, sizes, False)
        return self.model.classifier.probabilities(logits)[0]


@contextmanager
def own_operators(opset: int) -> Iterator[None]:
    """Register, within the context, the ONNX form of operators that torch's exporter does not know."""
    own: dict[str, Callable[..., Any]] = {"gndet::nms_keep": _nms_keep, "aten::sort": _sort}
    for name, symbolic in own.items():
        torch.onnx.register_custom_op_symbolic(name, symbolic, opset)
    try:
        yield
    finally:
        for name in own:  # so that other models are exported with torch's sort
            torch.onnx.unregister_custom_op_symbolic(name, opset)


@parse_args("v", "b", "i", "b")
def _sort(g: Any, values: Any, stable: bool, axis: int, descending: bool) -> Any:
    """Write a stable sort as a TopK of all values: in ONNX's definition, equal values keep their order."""
    shape = g.op("Shape", values)
    count = g.op("Gather", shape, g.op("Constant", value_t=torch.tensor([axis])), axis_i=0)
    return g.op("TopK", values, count, axis_i=axis, largest_i=int(descending), sorted_i=1, outputs=2)


@parse_args("v", "v", "v", "v", "f")
def _nms_keep(g: Any, boxes: Any, scores: Any, groups: Any, valid: Any, threshold: float) -> Any:
    """Write `ops.matching.nms_keep` as ONNX's NonMaxSuppression, with a class per group.

    The boxes come by descending score; their ranks replace the scores, so that all are positive and distinct.
    """
    zero, one = (g.op("Constant", value_t=torch.tensor([value])) for value in (0, 1))
    count = g.op("Gather", g.op("Shape", boxes), one, axis_i=0)  # (1,) N
    places = g.op("Range", *(_scalar(g, value) for value in (zero, count, one)))
    rank = g.op("Cast", g.op("Sub", count, places), to_i=FLOAT)  # (N,) from N down to 1
    unusable = g.op("Constant", value_t=torch.tensor([-1.0]))
    usable = g.op("Unsqueeze", g.op("Where", valid, rank, unusable), one)  # (B, 1, N)
    most = g.op("Add", g.op("ReduceMax", groups, keepdims_i=0), one)  # (1,) groups
    names = g.op("Unsqueeze", g.op("Range", *(_scalar(g, value) for value in (zero, most, one))), one)  # (groups, 1)
    own = g.op("Equal", names, g.op("Unsqueeze", groups, one))  # (B, groups, N)
    table = g.op("Where", own, usable, unusable)
    limits = (g.op("Constant", value_t=torch.tensor([value])) for value in (threshold, 0.0))
    chosen = g.op("NonMaxSuppression", boxes, table, count, *limits)  # (kept, 3) image, group, box
    index = g.op("Gather", chosen, g.op("Constant", value_t=torch.tensor([0, 2])), axis_i=1)  # (kept, 2)
    keep = g.op("ConstantOfShape", g.op("Shape", valid), value_t=torch.tensor([False]))
    kept = g.op("Gather", g.op("Shape", index), zero, axis_i=0)
    return g.op("ScatterND", keep, index, g.op("ConstantOfShape", kept, value_t=torch.tensor([True])))


def _scalar(g: Any, value: Any) -> Any:
    return g.op("Squeeze", value, g.op("Constant", value_t=torch.tensor([0])))
