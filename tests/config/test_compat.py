"""Other toolkits' conventions equal numbers worked by hand and torchvision's operators; presets are defaults."""

from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from foreign import NUM_CLASSES, detector
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, roi_align

from gndet.config.loading import config_from_dict, load_config, with_overrides
from gndet.config.model import ModelConfig
from gndet.config.presets import PRESETS
from gndet.config.schema import Config
from gndet.config.training import TrainConfig
from gndet.modeling.anchors import cell_anchors
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.ops.boxes import clip_boxes
from gndet.ops.roi_align import Alignment, Pyramid, roi_align_pyramid

STRIDES = (4, 8, 16, 32)
BOXES = torch.tensor(
    [
        [10.3, 20.7, 70.1, 55.5],  # P2
        [30.0, 40.0, 31.5, 41.0],  # less than a cell of P2
        [-9.0, -5.0, 40.0, 50.0],  # over the edge
        [0.0, 0.0, 180.0, 170.0],  # P3
        [5.5, 3.25, 310.0, 250.0],  # P4
        [8.0, 9.0, 232.0, 233.0],  # P4, the smallest: Detectron counts the last pixel
        [0.0, 0.0, 500.0, 480.0],  # P5, larger than the map
    ]
)
LEVELS = (0, 0, 0, 1, 2, 2, 3)  # floor(4 + log2(sqrt(w h) / 224)), from P2


@pytest.mark.parametrize(
    ("stride", "size", "inclusive"),
    [  # stride 16: as py-faster-rcnn's generate_anchors.py lists them; stride 4: P2's, worked by hand
        (16, 128, [[-84, -40, 99, 55], [-56, -56, 71, 71], [-36, -80, 51, 95]]),
        (16, 256, [[-176, -88, 191, 103], [-120, -120, 135, 135], [-80, -168, 95, 183]]),
        (4, 32, [[-22, -10, 25, 13], [-14, -14, 17, 17], [-10, -22, 13, 25]]),
    ],
)
def test_detectron_s_anchors_are_those_of_generate_anchors(
    stride: int, size: float, inclusive: list[list[int]]
) -> None:
    found = cell_anchors(size, (0.5, 1.0, 2.0), stride, "detectron")
    last_pixel_to_edge = torch.tensor([0.0, 0, 1, 1])
    assert torch.equal(found, torch.tensor(inclusive).float() + last_pixel_to_edge)


def test_rounded_anchors_are_torchvision_s() -> None:
    found = cell_anchors(32, (0.5, 1.0, 2.0), 4, "rounded")  # sides 45.25 x 22.63
    assert found.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_detectron_clips_to_the_first_and_last_pixel() -> None:
    height, width = 30, 50
    torch.manual_seed(0)
    corner = torch.rand(1, 200, 2) * 120 - 40
    inclusive = torch.cat([corner, corner + torch.rand(1, 200, 2) * 60], dim=-1)
    limit = torch.tensor([width - 1, height - 1, width - 1, height - 1]).float()
    expected = torch.minimum(inclusive, limit).clamp(min=0)  # utils/boxes.py: every corner into [0, side - 1]
    edge = torch.tensor([0.0, 0, 1, 1])
    found = clip_boxes(inclusive + edge, torch.tensor([[height, width]]), to_pixels=True)
    torch.testing.assert_close(found, expected + edge)
    plain = clip_boxes(inclusive, torch.tensor([[height, width]]))
    assert torch.equal(plain[0], clip_boxes_to_image(inclusive[0], (height, width)))


def pyramid() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 5, 256 // stride, 320 // stride) for stride in STRIDES]


def pooled_by_torchvision(features: list[Tensor], alignment: Alignment, size: int, ratio: int) -> Tensor:
    """Pool each box from its level; a box of Detectron is pooled up to the near edge of its last pixel."""
    last = 1 if alignment == "detectron" else 0
    boxes = torch.cat([BOXES[:, :2], BOXES[:, 2:] - last], dim=1)
    return torch.cat(
        [
            roi_align(features[level], [box[None]], size, 1 / STRIDES[level], ratio, aligned=alignment == "aligned")
            for level, box in zip(LEVELS, boxes, strict=True)
        ]
    )


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("alignment", ["aligned", "unaligned", "detectron"])
def test_roi_align_is_torchvision_s_with_and_without_half_pixels(alignment: Alignment, ratio: int) -> None:
    features = pyramid()
    found = roi_align_pyramid(Pyramid(features, STRIDES), BOXES, torch.zeros(len(BOXES)).long(), 7, ratio, alignment)
    torch.testing.assert_close(found, pooled_by_torchvision(features, alignment, 7, ratio), rtol=1e-4, atol=1e-4)


def heads(compat: str) -> MaskRCNN:
    small = detector("gn", "none", "2fc", 18).model_dump(exclude_unset=True)
    small["fpn"]["channels"] = 5
    return build_model(ModelConfig.model_validate(small | {"compat": compat}), NUM_CLASSES)


def input_of(layer: nn.Module) -> list[Tensor]:
    """Return a list that collects the inputs of a layer."""
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, arguments, out: seen.append(arguments[0]))
    return seen


@pytest.mark.parametrize(
    ("compat", "alignment", "ratio"),
    [
        ("torchvision", "unaligned", 2),
        ("detectron", "detectron", 2),
        ("detectron2", "aligned", 0),
        ("mmdetection", "aligned", 0),
        ("gndet", "aligned", 2),
    ],
)
def test_both_heads_pool_as_their_toolkit(compat: str, alignment: Alignment, ratio: int) -> None:
    model, features = heads(compat), pyramid()
    boxes, masks = input_of(model.box_head.fcs[0]), input_of(model.mask_head.convs[0])
    with torch.no_grad():
        model.box_head(Pyramid(features, STRIDES), BOXES[None])
        image, labels = torch.zeros(len(BOXES)).long(), torch.zeros(len(BOXES)).long()
        model.mask_head(Pyramid(features, STRIDES), BOXES, image, labels)
    expected = pooled_by_torchvision(features, alignment, 7, ratio).flatten(1)
    torch.testing.assert_close(boxes[0], expected, rtol=1e-4, atol=1e-4)
    expected = pooled_by_torchvision(features, alignment, 14, ratio)
    torch.testing.assert_close(masks[0], expected, rtol=1e-4, atol=1e-4)


# --- presets


@pytest.mark.parametrize("compat", PRESETS)
def test_values_in_a_file_override_its_preset(tmp_path: Path, compat: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  rpn: {post_nms_train: 77}\n  box_head: {roi_align: aligned, sampling_ratio: 3}\n")
    model = load_config(path, [f"model.compat={compat}"]).model
    said = {"rpn": {"post_nms_train": 77}, "box_head": {"roi_align": "aligned", "sampling_ratio": 3}}
    for part, options in PRESETS[compat].items():
        for option, value in options.items():
            assert getattr(getattr(model, part), option) == said.get(part, {}).get(option, value), (part, option)
    assert model.rpn.post_nms_train == 77 and model.box_head.sampling_ratio == 3
    assert model.fpn == ModelConfig().fpn and model.backbone == ModelConfig().backbone


def test_an_override_takes_precedence_over_the_preset() -> None:
    cfg = with_overrides(Config(), ["model.compat=detectron", "model.rpn.clip=edges"], "test")
    assert (cfg.model.rpn.clip, cfg.model.box_head.clip) == ("edges", "pixels")


def test_another_preset_takes_the_place_of_the_first_in_a_resolved_config() -> None:
    first = with_overrides(Config(), ["model.compat=torchvision", "model.fpn.channels=64"], "test")
    second = with_overrides(first, ["model.compat=detectron"], "test")
    assert second == with_overrides(Config(), ["model.compat=detectron", "model.fpn.channels=64"], "test")
    back = with_overrides(second, ["model.compat=gndet"], "test")
    assert back == with_overrides(Config(), ["model.fpn.channels=64"], "test")


def test_another_preset_replaces_what_any_preset_may_decide() -> None:
    stated = with_overrides(Config(), ["model.rpn.clip=pixels", "model.mask_head.paste=rounded"], "test")
    expected = with_overrides(Config(), ["model.compat=detectron2"], "test")
    assert with_overrides(stated, ["model.compat=detectron2"], "test") == expected


@pytest.mark.parametrize("option", ["compat", "neck"])
def test_a_section_changes_a_preset_as_its_dotted_name_does(option: str) -> None:
    first, last = {"compat": ("torchvision", "detectron"), "neck": ("c4", "fpn")}[option]
    cfg = with_overrides(Config(), [f"model.{option}={first}"], "test")
    dotted = with_overrides(cfg, [f"model.{option}={last}"], "test")
    assert with_overrides(cfg, [f"model={{{option}: {last}}}"], "test") == dotted


def test_a_resolved_config_keeps_what_was_set_against_its_preset() -> None:
    cfg = with_overrides(Config(), ["model.compat=torchvision", "model.rpn.anchors=exact"], "test")
    again = config_from_dict(cfg.model_dump(mode="json"), "test")
    assert again == cfg and again.model.rpn.anchors == "exact"


@pytest.mark.parametrize("compat", ["torchvision", "detectron2", "detectron", "mmdetection"])
def test_conventions_that_look_at_the_padding_couple_images_and_can_be_left_out(compat: str) -> None:
    assert "model.rpn.anchors_in_padding" in (ModelConfig(compat=compat).batch_coupling() or "")
    canvas = ModelConfig(compat="torchvision", rpn={"anchors_in_padding": False})
    assert "model.rpn.anchor_stride" in (canvas.batch_coupling() or "")
    apart = ModelConfig(compat=compat, rpn={"anchors_in_padding": False, "anchor_stride": "level"})
    assert apart.batch_coupling() is None
    with pytest.raises(ValueError, match="anchors_in_padding"):
        Config(model=ModelConfig(compat=compat), train=TrainConfig(images_per_gpu="auto"))


@pytest.mark.parametrize("name", ["finetune_coco_detector", "finetune_gn_detector"])
def test_fine_tuning_from_other_toolkits_keeps_images_apart(name: str) -> None:
    assert load_config(REPOSITORY / "configs" / f"{name}.yaml").model.batch_coupling() is None
