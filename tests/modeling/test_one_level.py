"""C4 and DC5: res5 on regions and dilated equals torchvision's, the heads share what they should, images stay apart."""

from functools import partial

import pytest
import torch
import torchvision
from models import NUM_CLASSES, make_batch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.modeling import one_level as one_level_module
from gndet.modeling.build import build_model
from gndet.modeling.detection_model import image_index, region_features
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.layers import FrozenBatchNorm
from gndet.modeling.recompute import set_memory
from gndet.modeling.resnet import ResNet
from gndet.modeling.rpn import RPN
from gndet.toolbox.invariance.leaks import find_leaks
from gndet.weights.convert import compare_with_original

SIZES = [(64, 96), (96, 65), (50, 64)]
PER_GROUP = 16
NECKS = ("c4", "dc5")


def one_level(neck: str, seed: int = 0, **changes: object) -> MaskRCNN:
    """Build a narrow Mask R-CNN of depth 50 on one level, in float64."""
    small = {"pre_nms_train": 100, "post_nms_train": 50, "pre_nms_test": 100, "post_nms_test": 10}
    tree = {
        "neck": neck, "norm": {"channels_per_group": PER_GROUP}, "backbone": {"width": 0.25},
        "rpn": {"anchor_sizes": (16, 32, 64, 96, 128), "anchors_per_image": 64, **small},
        "box_head": {"regions_per_image": 24, "fc_channels": 32, "detections_per_image": 8},
        "mask_head": {"channels": 32},
    }  # fmt: skip
    torch.manual_seed(seed)
    model: MaskRCNN = build_model(ModelConfig.model_validate(tree | changes), NUM_CLASSES).double()
    return model


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // PER_GROUP, channels)


def torchvision_res5(ours: nn.ModuleList, strides: tuple[int, ...], dilations: tuple[int, ...]) -> nn.Sequential:
    """Build the three blocks with torchvision's Bottleneck and the same weights."""
    blocks = []
    for block, stride, dilation in zip(ours, strides, dilations, strict=True):
        width, channels = block.conv1.conv.weight.shape[:2]
        shortcut = None
        if block.shortcut is not None:
            shortcut = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), group_norm(4 * width))
        blocks.append(Bottleneck(channels, width, stride, shortcut, dilation=dilation, norm_layer=group_norm))
    theirs = nn.Sequential(*blocks).double()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert mine.shape == other.shape
            other.copy_(mine.uniform_(-0.2, 0.2) if mine.ndim > 1 else mine.uniform_(0.5, 1.5))
    return theirs


# --- C4


def test_the_heads_of_c4_compute_what_torchvision_computes_on_each_region_alone() -> None:
    model = one_level("c4")
    res5 = torchvision_res5(model.backbone.res5, (2, 1, 1), (1, 1, 1))
    c4 = torch.randn(2, 256, 8, 10, dtype=torch.float64)
    boxes = torch.tensor([[[3.0, 5, 70, 80], [40, 20, 150, 110]], [[0, 0, 160, 128], [9, 30, 25, 44]]]).double()
    pyramid = model.pooled_levels([c4], {16: None})
    logits, deltas = model.box_head(pyramid, boxes)
    labels = torch.tensor([2, 0, 4, 1])
    masks = model.mask_head(pyramid, boxes.flatten(0, 1), image_index(2, 2, c4.device), labels)
    assert masks.shape == (4, 14, 14)
    predictor = model.box_head
    for region in range(4):
        image, place = divmod(region, 2)
        pooled = torchvision.ops.roi_align(
            c4[image : image + 1], [boxes[image, place : place + 1]], 14, 1 / 16, sampling_ratio=2, aligned=True
        )
        x = res5(pooled)  # (1, 512, 7, 7)
        mean = x.flatten(2).mean(2)
        torch.testing.assert_close(logits[image, place], predictor.cls_score(mean)[0], rtol=1e-9, atol=1e-9)
        expected = predictor.bbox_pred(mean).view(NUM_CLASSES, 4)
        torch.testing.assert_close(deltas[image, place], expected, rtol=1e-9, atol=1e-9)
        expected = model.mask_head.logits(model.mask_head.deconv(x).relu())[0, labels[region]]
        torch.testing.assert_close(masks[region], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at_once", [1, 7])
def test_detection_does_not_depend_on_how_many_regions_res5_sees_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = one_level("c4").eval(), make_batch(SIZES)
    whole = model.detect(batch.images, batch.sizes, batch.padded)
    monkeypatch.setattr(one_level_module, "AT_ONCE", at_once)
    seen: list[int] = []
    model.backbone.res5[0].register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    parts = model.detect(batch.images, batch.sizes, batch.padded)
    assert whole.valid.sum() == 24 and max(seen[:-1]) == 3 * at_once  # the last are the mask head's
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_what_the_heads_share_in_training_is_what_each_would_pool_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = one_level("c4"), make_batch(SIZES)

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        losses = torch.stack([*model(batch).values()])
        losses.sum().backward()
        return losses.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    runs: list[int] = []
    model.backbone.res5[0].register_forward_hook(lambda _, args, out: runs.append(len(args[0])))
    shared = run()
    assert runs == [3 * 24]
    features, areas = model.features(batch.images, batch.sizes, batch.padded)
    regions = model.step(features, areas, batch).regions
    image = image_index(3, 24, regions.boxes.device)
    alone = region_features(
        model.pooled_levels(features, areas), regions.boxes.flatten(0, 1), image, model.box_head.cfg
    )
    torch.testing.assert_close(regions.features.flatten(0, 1), alone)
    runs.clear()
    monkeypatch.setattr(model.box_head, "shared", lambda pyramid, boxes: None)
    torch.testing.assert_close(run(), shared, rtol=1e-8, atol=1e-11)
    assert len(runs) == 2


def test_a_frozen_res5_lets_gradients_through_to_the_maps() -> None:
    model = one_level("c4", backbone={"width": 0.25, "freeze_at": 2})
    sum(loss.sum() for loss in model(make_batch(SIZES)).values()).backward()
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is not None}
    assert {name.partition(".")[0] for name in trained} == {"res3", "res4", "res5"}
    model = one_level("c4")
    model.backbone.res5.requires_grad_(False)
    losses = model(make_batch(SIZES))
    losses["loss_cls"].sum().backward()
    assert model.backbone.res4[-1].conv3.conv.weight.grad.abs().sum() > 0


def test_norms_on_regions_are_probed_once_and_converted_too() -> None:
    model = one_level("c4").eval()
    batch, calls = make_batch(SIZES), []
    norm = model.backbone.res5[1].conv2.norm
    hook = norm.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    model.probe(batch.images, batch.sizes, batch.padded)
    model.probe(batch.images, batch.sizes, batch.padded, regions=False)
    assert calls == [3 * 10]
    hook.remove()
    name = "backbone.res5.1.conv2.norm"
    assert model.sees_regions(name) and not model.sees_regions("backbone.res4.0.conv1.norm")
    assert not one_level("dc5").sees_regions(name)
    reference = FrozenBatchNorm(128, 1e-5, masked=True).double()
    reference.weight.mul_(2.0)
    errors, _ = compare_with_original(model, {name: reference}, batch, fit=True)
    assert 0 < errors[name] < 1 and not norm.weight.eq(1).all()


# --- DC5


def resnet(**options: object) -> ResNet:
    """Return a ResNet-50 in float64 whose GN has 16 channels per group."""
    torch.manual_seed(0)
    cfg = BackboneConfig(dilated_blocks=options.pop("dilated_blocks", "all"), width=0.25)
    return ResNet(cfg, NormConfig(channels_per_group=PER_GROUP), **options).double()


def c5(model: ResNet, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return C4 and C5 of an image that fills its canvas."""
    return tuple(model(image, dict.fromkeys((2, 4, 8, 16, 32)))[-2:])


@pytest.mark.parametrize(("dilated_blocks", "dilations"), [("all", (2, 2, 2)), ("after_first", (1, 2, 2))])
def test_a_dilated_res5_is_torchvision_s(dilated_blocks: str, dilations: tuple[int, ...]) -> None:
    model = resnet(res5="dilated", dilated_blocks=dilated_blocks)
    assert (model.strides, model.channels) == ((4, 8, 16, 16), (64, 128, 256, 512))
    res5 = torchvision_res5(model.res5, (1, 1, 1), dilations)
    before, after = c5(model, torch.randn(1, 3, 80, 112, dtype=torch.float64))
    assert after.shape == (1, 512, 5, 7)
    torch.testing.assert_close(after, res5(before), rtol=1e-9, atol=1e-9)


def test_torchvision_s_own_network_dilates_after_the_first_block() -> None:
    """The dilations above are those of torchvision's option, and detectron2's differ in the first block."""
    options = {"weights": None, "replace_stride_with_dilation": [False, False, True]}
    with torch.device("meta"):
        layer = torchvision.models.resnet50(**options).layer4
    assert [block.conv2.dilation[0] for block in layer] == [1, 2, 2] and layer[0].stride == 1
    ours = resnet(res5="dilated", dilated_blocks="after_first").res5
    assert [block.conv2.conv.dilation[0] for block in ours] == [1, 2, 2]


def test_res5_has_the_same_tensors_however_it_runs_and_undilated_it_is_the_plain_one() -> None:
    plain, dilated, regions = (resnet(res5=res5) for res5 in ("map", "dilated", "regions"))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, dilated, regions)]
    assert shapes[0] == shapes[1] == shapes[2]
    image = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    assert not torch.allclose(c5(dilated, image)[1][:, :, ::2, ::2], c5(plain, image)[1])
    for block in dilated.res5:
        block.conv2.conv.dilation, block.conv2.conv.padding = (1, 1), (1, 1)
    dilated.res5[0].conv2.conv.stride = dilated.res5[0].shortcut.conv.stride = (2, 2)
    dilated.strides = plain.strides
    torch.testing.assert_close(c5(dilated, image), c5(plain, image), rtol=0, atol=1e-12)
    maps = regions(image, dict.fromkeys((2, 4, 8, 16)))
    assert len(maps) == 3
    torch.testing.assert_close(regions.on_regions(lambda: maps[-1]), c5(plain, image)[1], rtol=0, atol=1e-12)


# --- both


def test_a_cell_has_the_published_anchors_of_all_sizes_ratios_within_sizes() -> None:
    published = [  # of Faster R-CNN's first release, by ratio and size: first and last pixel, from 0
        (-83, -39, 100, 56), (-175, -87, 192, 104), (-359, -183, 376, 200),
        (-55, -55, 72, 72), (-119, -119, 136, 136), (-247, -247, 264, 264),
        (-35, -79, 52, 96), (-79, -167, 96, 184), (-167, -343, 184, 360),
    ]  # fmt: skip
    cfg = ModelConfig.model_validate({"neck": "c4", "compat": "detectron", "rpn": {"anchor_sizes": (128, 256, 512)}})
    rpn = RPN(cfg.rpn, NormConfig(kind="none"), 8, (16,))
    expected = torch.tensor(published).view(3, 3, 4).transpose(0, 1).flatten(0, 1) + torch.tensor([0, 0, 1, 1])
    shift = rpn.cells[0, 0] - expected[0]  # theirs lie half a pixel further
    assert shift.abs().max() <= 1
    torch.testing.assert_close(rpn.cells[0] - shift, expected.float(), rtol=0, atol=0)
    default = RPN(ModelConfig(neck="c4").rpn, NormConfig(kind="none"), 8, (16,))
    assert default.cells.shape == (1, 15, 4) and default.objectness.out_channels == 15
    features = [torch.zeros(1, 8, 3, 2)]
    anchors = default.anchors(features, {16: None}, (48, 32))
    assert len(anchors.ids[0].unique()) == len(anchors.boxes[0]) == 90


@pytest.mark.parametrize("neck", NECKS)
def test_no_leak_between_images(neck: str) -> None:
    singles = [make_batch([size], first=i) for i, size in enumerate(SIZES)]
    assert find_leaks(one_level(neck), singles, make_batch(SIZES)) == []


def test_a_dilated_convolution_that_reads_the_padding_is_found() -> None:
    model = one_level("dc5", norm={"channels_per_group": PER_GROUP, "padding": "plain"})
    singles = [make_batch([size], first=i) for i, size in enumerate(SIZES)]
    assert [leak.coupling for leak in find_leaks(model, singles, make_batch(SIZES))] == ["padding"]


@pytest.mark.parametrize("kind", ["gn", pytest.param("frozen_bn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("neck", NECKS)
def test_every_memory_option_gives_the_same_losses_and_gradients(neck: str, kind: str) -> None:
    model, batch = one_level(neck, norm={"kind": kind, "channels_per_group": PER_GROUP}), make_batch(SIZES[:2])

    def run(memory: str) -> tuple[Tensor, Tensor]:
        set_memory(model, memory)
        model.zero_grad()
        losses = torch.stack([*model(batch).values()])
        losses.sum().backward()
        return losses.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    plain = run("fast")
    for memory in ("balanced", "lean"):
        torch.testing.assert_close(run(memory), plain, rtol=1e-8, atol=1e-11)


def test_running_statistics_of_res5_see_the_regions_once() -> None:
    model = one_level("c4", norm={"kind": "bn"})
    set_memory(model, "lean")
    sum(loss.sum() for loss in model(make_batch(SIZES)).values()).backward()
    counts = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts and {int(count) for count in counts} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("neck", NECKS)
def test_the_training_forward_is_one_graph(neck: str) -> None:
    explained = torch._dynamo.explain(one_level(neck).float())(make_batch(SIZES))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("neck", NECKS)
def test_the_way_of_a_convolution_changes_rounding_only(neck: str) -> None:
    model, batch = one_level(neck).float(), make_batch(SIZES[:1])
    losses = torch.stack([*model(batch).values()])
    model.choose_convolutions(800)
    changed = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    changed(torch.stack([*model(batch).values()]), losses)
