"""The detector: its losses, its single graph, and what may and may not influence the result of an image."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from models import NUM_CLASSES, make_batch, rows, small_config, small_model
from torch import nn
from torchvision.models.detection.roi_heads import fastrcnn_loss

from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig, BoxHeadConfig
from gndet.errors import ConfigError
from gndet.modeling.anchors import cell_anchors, cell_ids, level_anchors
from gndet.modeling.box_head import BoxHead
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.layers import NORMS, FrozenBatchNorm, GroupNorm, NoNorm
from gndet.modeling.norms.valid_area import picture_areas
from gndet.modeling.resnet import ResNet
from gndet.ops.boxes import encode, gather_rows
from gndet.ops.roi_align import Pyramid
from gndet.structures import Batch, Proposals

LOSSES = ["loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"]
SIZES = [(96, 128), (128, 97), (65, 80), (128, 128)]
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18d": {"depth": 18, "stem": "deep", "average_shortcuts": True},
    "resnet50d": {"depth": 50, "stem": "deep", "average_shortcuts": True},
    "resnext50_32x4d": {"depth": 50, "cardinality": 32, "group_width": 4},
}


def gradients(model: MaskRCNN, *batches: Batch) -> torch.Tensor:
    """Return the gradient of the mean loss over the images of all batches, as one vector."""
    model.zero_grad()
    total = sum(len(batch.images) for batch in batches)
    for batch in batches:
        (sum(model(batch).values()).sum() / total).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_losses_have_detectron2_s_names_are_finite_and_reach_every_parameter() -> None:
    model = small_model()
    losses = model(make_batch(SIZES[:3]))
    assert list(losses) == LOSSES
    sum(losses.values()).sum().backward()
    assert all(value.shape == (3,) and (value.isfinite() & (value > 0)).all() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(0.6 < losses[name].mean() < 0.8 for name in ("loss_rpn_cls", "loss_mask"))  # ln 2 before training


def test_initial_class_loss_is_that_of_an_even_guess() -> None:
    model = small_model()
    nn.init.zeros_(model.box_head.cls_score.weight)
    expected = torch.full((4,), math.log(NUM_CLASSES + 1))
    torch.testing.assert_close(model(make_batch(SIZES))["loss_cls"], expected)


def test_the_whole_training_forward_is_one_graph() -> None:
    explained = torch._dynamo.explain(small_model())(make_batch(SIZES))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("junk", [5000.0, -300.0, float("nan")])
def test_empty_slots_and_padding_do_not_change_gradients(junk: float) -> None:
    model, batch = small_model(), make_batch(SIZES)
    clean = gradients(model, batch)
    gt, empty = batch.gt, ~batch.gt.valid
    poisoned = gt._replace(
        boxes=torch.where(empty[..., None], junk, gt.boxes),
        labels=torch.where(empty, 4, gt.labels),
        masks=gt.masks | empty[..., None, None],
    )
    images = batch.images.clone()
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:, height:] = 255
        image[:, :, width:] = 255
    assert torch.equal(gradients(model, batch._replace(gt=poisoned, images=images)), clean)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["gn", "ln", "in", "frozen_bn", "none"])
def test_an_image_s_features_do_not_depend_on_its_batch(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = small_model(NormConfig(kind=kind, channels_per_group=16)).to(dtype)
    together = make_batch(SIZES)
    features, _ = model.features(together.images, together.sizes, together.padded)
    for i, size in enumerate(SIZES):
        single = make_batch([size], first=i)
        alone, _ = model.features(single.images, single.sizes, single.padded)
        for level, expected in zip(features, alone, strict=True):
            got = level[i : i + 1, :, : expected.shape[2], : expected.shape[3]]
            assert (got - expected).norm() <= tolerance * expected.norm()
            assert level[i].abs().sum().isclose(got.abs().sum())  # and the padding is zero


@pytest.mark.parametrize("kind", ["gn", "frozen_bn"])
@pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES)
def test_a_picture_of_odd_sides_has_the_same_maps_on_any_canvas(options: dict[str, Any], kind: str) -> None:
    """A ResNet-D averages 2x2 cells, of which the last of an odd side must not be padding."""
    torch.manual_seed(0)
    norm = NormConfig(kind=kind, channels_per_group=8, weight_standardization="cardinality" in options)
    backbone = ResNet(BackboneConfig(width=0.25, **options), norm).double()
    for name, tensor in backbone.state_dict().items():
        if name.endswith(("norm.weight", "norm.bias")):  # a beta that is not 0 would show up in the padding
            tensor.uniform_(0.5, 1.5)
    for height, width in ((65, 97), (43, 70)):
        picture = torch.randn(1, 3, height, width, dtype=torch.float64)
        alone = backbone(picture, picture_areas(torch.tensor([(height, width)]), height, width, False))
        for canvas in ((height + 1, width + 1), (128, 160)):
            batch = torch.randn(2, 3, *canvas, dtype=torch.float64)  # the other picture is as large as the canvas
            batch[0] = 0
            batch[0, :, :height, :width] = picture[0]
            together = backbone(batch, picture_areas(torch.tensor([(height, width), canvas]), *canvas, True))
            for small, large in zip(alone, together, strict=True):
                rows, columns = small.shape[2:]
                assert (large[0, :, :rows, :columns] - small[0]).norm() < 1e-12 * small.norm()
                assert not large[0, :, rows:].any() and not large[0, :, :, columns:].any()


@pytest.mark.parametrize("kind", ["gn", "ln", "in"])
def test_the_norm_of_a_head_sees_one_region(kind: str) -> None:
    model = small_model(NormConfig(kind=kind, channels_per_group=16)).double()
    x = torch.randn(6, 32, 7, 7, dtype=torch.float64)
    for head in (model.box_head, model.mask_head):
        together = head.convs[0](x)
        for region in range(6):
            torch.testing.assert_close(together[region], head.convs[0](x[region : region + 1])[0], rtol=0, atol=1e-12)


def test_nothing_is_sampled_or_proposed_in_the_padding() -> None:
    model = small_model()
    model.rpn.cfg = model.rpn.cfg.model_copy(update={"anchors_per_image": 4096, "pre_nms_train": 4096})
    batch = make_batch([(64, 128), (128, 65)])
    features, areas = model.features(batch.images, batch.sizes, batch.padded)
    step = model.step(features, areas, batch)
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        ids = torch.cat([step.anchors.ids[i][step.anchors.valid[i]], step.proposals.ids[i][step.proposals.valid[i]]])
        level, row, column = ids >> 28, ids >> 16 & 4095, ids >> 4 & 4095
        stride = 4 * 2**level
        assert len(ids) > 200 and (row * stride < height).all() and (column * stride < width).all()
        for part in (step.proposals, step.regions):
            boxes = part.boxes[i][part.valid[i]]
            assert boxes.min() >= 0 and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()


def test_equal_scores_are_proposed_in_order_whatever_the_padding() -> None:
    """A black picture has equal scores everywhere; topk would choose by the number of anchors, padding included."""
    model = small_model().double()
    nn.init.zeros_(model.rpn.objectness.weight)
    model.rpn.cfg = model.rpn.cfg.model_copy(update={"pre_nms_train": 20})
    small, large = (make_batch([(64, 96)], canvas)._replace(padded=canvas is not None) for canvas in (None, (128, 256)))
    alone, padded = (model.step(*model.features(*batch[:2], batch.padded), batch).proposals for batch in (small, large))
    assert torch.equal(alone.ids[alone.valid], padded.ids[padded.valid])


def test_one_proposal_less_does_not_change_how_the_others_are_sampled() -> None:
    """Regions are sampled by their anchor, not by their rank, so that a rounding error changes only one of them."""
    model, batch = small_model(), make_batch(SIZES[:1])
    step = model.step(*model.features(*batch[:2], batch.padded), batch)
    proposals = step.proposals._replace(valid=step.proposals.valid.clone())
    dropped = step.regions.ids[0, -1]  # a sampled negative
    proposals.valid[proposals.ids == dropped] = False
    regions = model.box_head.sample(proposals, batch)
    before, after = set(step.regions.ids[0].tolist()), set(regions.ids[0][regions.valid[0]].tolist())
    assert before - after == {dropped.item()} and len(after - before) <= 1


def test_losses_equal_detectron2_s_for_one_image_and_weigh_images_equally_for_two() -> None:
    """torchvision's heads divide by the regions of the whole batch, as detectron2's do; its box loss has beta 1/9."""
    head = BoxHeadConfig(conv_channels=32, num_convs=1, fc_channels=64, regions_per_image=512, loss_beta=1 / 9)
    model, batch = small_model(box_head=head), make_batch(SIZES[1:3], first=1)  # 2 objects and 3
    features, areas = model.features(batch.images, batch.sizes, batch.padded)
    step = model.step(features, areas, batch)
    pyramid = model.pooled_levels(features, areas)
    logits, deltas = model.box_head(pyramid, step.regions.boxes)
    target = encode(gather_rows(batch.gt.boxes, step.regions.matched), step.regions.boxes, (10.0, 5.0))

    def pooled(images: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = step.regions.valid[images]
        label = step.regions.labels[images][rows]
        box_deltas = F.pad(deltas[images][rows].flatten(1), (4, 0))  # torchvision's background is class 0
        scores = logits[images][rows].roll(1, dims=-1)
        return fastrcnn_loss(scores, box_deltas, [(label + 1) % (NUM_CLASSES + 1)], [target[images][rows]])

    for i in (0, 1):
        for got, expected in zip(("loss_cls", "loss_box_reg"), pooled([i]), strict=True):
            torch.testing.assert_close(step.losses[got][i], expected)
    count = step.regions.valid.sum(1)
    assert count[0] != count[1]
    for got, expected in zip(("loss_cls", "loss_box_reg"), pooled([0, 1]), strict=True):
        torch.testing.assert_close((step.losses[got] * count).sum() / count.sum(), expected)
        assert not step.losses[got].mean().isclose(expected, rtol=1e-6)


def test_gradients_do_not_depend_on_how_images_are_batched() -> None:
    model = small_model().double()
    together = make_batch(SIZES)
    alone = [make_batch([size], first=i) for i, size in enumerate(SIZES)]
    expected = gradients(model, together)
    for parts in (alone, [rows(together, 0, 2), rows(together, 2, 4)]):
        got = gradients(model, *parts)
        assert F.cosine_similarity(got, expected, dim=0) > 1 - 1e-9
        assert (got - expected).norm() / expected.norm() < 1e-6


def test_plain_padding_does_leak() -> None:
    """Show that the tests above can fail: without masked norms the padding leaks."""
    model = small_model(NormConfig(channels_per_group=16, padding="plain")).double()
    alone = [make_batch([size], first=i) for i, size in enumerate(SIZES)]
    assert F.cosine_similarity(gradients(model, make_batch(SIZES)), gradients(model, *alone), dim=0) < 0.999


def test_detections_are_those_of_the_image_alone_and_lie_inside_it() -> None:
    model = small_model().double().eval()
    model.box_head.cfg = model.box_head.cfg.model_copy(update={"score_threshold": 0.0})
    batch = make_batch(SIZES)
    found = model.detect(batch.images, batch.sizes, batch.padded)
    assert found.boxes.shape == (4, 100, 4) and found.masks.shape == (4, 100, 28, 28)
    for i, (height, width) in enumerate(SIZES):
        single = make_batch([(height, width)], first=i)
        alone = model.detect(single.images, single.sizes, single.padded)
        torch.testing.assert_close(found.boxes[i], alone.boxes[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.scores[i], alone.scores[0])
        torch.testing.assert_close(found.masks[i], alone.masks[0])
        kept = found.boxes[i][found.valid[i]]
        assert kept.min() >= 0 and (kept[:, 2] <= width).all() and (kept[:, 3] <= height).all()
        assert (found.scores[i].diff() <= 0).all()


def test_as_many_detections_are_kept_as_detections_per_image_allows() -> None:
    cfg = BoxHeadConfig(num_convs=1, conv_channels=8, fc_channels=8, detections_per_image=2300, score_threshold=1e-4)
    head = BoxHead(cfg, NormConfig(kind="none"), 8, 2)
    corner = torch.arange(2500.0) * 4
    boxes = torch.stack([corner, corner * 0, corner + 3, corner * 0 + 3], dim=1)[None]  # none overlaps another
    found = Proposals(boxes, torch.arange(2500)[None], torch.ones(1, 2500, dtype=torch.bool))
    scores = torch.tensor([0.6, 0.0, 0.4]).expand(1, 2500, 3)
    kept = head.select(scores, torch.zeros(1, 2500, 2, 4), found, torch.tensor([[8, 20_000]]))
    assert int(kept.valid.sum()) == 2300


def test_the_same_batch_and_key_give_the_same_losses_and_another_key_samples_otherwise() -> None:
    model, batch = small_model(), make_batch(SIZES)
    first, repeated, other = model(batch), model(batch), model(batch._replace(keys=batch.keys + 1))
    assert all(torch.equal(first[name], repeated[name]) for name in LOSSES)
    assert (first["loss_rpn_cls"] != other["loss_rpn_cls"]).all()


def test_images_without_objects_train_as_negatives() -> None:
    losses = small_model()(make_batch([(64, 96)], first=3))
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0
    assert losses["loss_cls"] > 0 and losses["loss_rpn_cls"] > 0


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_every_norm_trains_with_and_without_weight_standardization(kind: str) -> None:
    for standardize in (False, True):
        norm = NormConfig(kind=kind, channels_per_group=16, weight_standardization=standardize)
        losses = small_model(norm)(make_batch(SIZES[:2]))
        sum(losses.values()).sum().backward()
        assert all(value.isfinite().all() for value in losses.values())


def test_a_part_may_have_a_norm_of_its_own_and_the_rpn_has_none_by_default() -> None:
    cfg = small_config(backbone=BackboneConfig(depth=18, norm=NormConfig(kind="frozen_bn")))
    model = build_model(cfg, NUM_CLASSES)
    kinds = {
        part: {type(m) for m in getattr(model, part).modules() if isinstance(m, GroupNorm | FrozenBatchNorm | NoNorm)}
        for part in ("backbone", "fpn", "rpn", "box_head", "mask_head")
    }
    assert kinds == {
        "backbone": {FrozenBatchNorm}, "fpn": {GroupNorm}, "rpn": {NoNorm}, "box_head": {GroupNorm},
        "mask_head": {GroupNorm},
    }  # fmt: skip


def test_a_norm_that_does_not_fit_names_the_part() -> None:
    with pytest.raises(ConfigError, match=r"model\.fpn: norm groups: 24 does not divide 32 channels"):
        build_model(small_config().model_copy(update={"norm": NormConfig(groups=24), "backbone":
                    BackboneConfig(depth=18, norm=NormConfig())}), NUM_CLASSES)  # fmt: skip


def test_masks_off_is_a_faster_rcnn() -> None:
    model = small_model(masks=False)
    assert list(model(make_batch(SIZES))) == LOSSES[:4]
    batch = make_batch(SIZES)
    assert model.eval().detect(batch.images, batch.sizes, True).masks.shape[2:] == (0, 0)


@pytest.mark.parametrize("kind", ["2fc", "4conv1fc"])
def test_box_head_layouts(kind: str) -> None:
    head = small_model(box_head=BoxHeadConfig(kind=kind, conv_channels=32, fc_channels=64)).box_head
    assert (len(head.convs), len(head.fcs)) == ((0, 2) if kind == "2fc" else (4, 1))


def test_without_its_last_norm_a_box_head_keeps_how_strong_features_are() -> None:
    """GN forgets the scale of a region; without the norm before the linear layer the scale arrives there."""
    pyramid = Pyramid([torch.randn(1, 32, 16, 16, dtype=torch.float64)] * 4, (4, 8, 16, 32))
    doubled = Pyramid([2 * level for level in pyramid.maps], pyramid.strides)
    boxes = torch.tensor([[[4.0, 4.0, 40.0, 44.0]]], dtype=torch.float64)
    for norm_last, factor in ((True, 1), (False, 2)):
        options = BoxHeadConfig(conv_channels=32, num_convs=1, fc_channels=64, norm_last=norm_last)
        head = BoxHead(options, NormConfig(groups=4, eps=0), 32, num_classes=3).double()
        torch.testing.assert_close(head(doubled, boxes)[0], factor * head(pyramid, boxes)[0])
    kinds = [
        type(conv.norm) for conv in small_model(box_head=BoxHeadConfig(num_convs=3, norm_last=False)).box_head.convs
    ]
    assert kinds == [GroupNorm, GroupNorm, NoNorm]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnet_equals_torchvision_s(depth: int) -> None:
    """Same parameters in the same order, and same result: checks the layout and the stride in the 3x3."""
    reference = getattr(torchvision.models, f"resnet{depth}")(norm_layer=lambda c: nn.GroupNorm(32, c)).double()
    model = ResNet(BackboneConfig(depth=depth), NormConfig()).double()
    parameters = [p for name, p in reference.named_parameters() if not name.startswith("fc.")]
    names = {name: p.shape for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in parameters), names
    with torch.no_grad():
        for parameter, expected_parameter in zip(model.parameters(), parameters, strict=True):
            parameter.copy_(expected_parameter)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
    for stage, got in zip("1234", model(x, dict.fromkeys((2, 4, 8, 16, 32))), strict=True):
        expected = getattr(reference, f"layer{stage}")(expected)
        torch.testing.assert_close(got, expected)


def test_zero_init_makes_every_block_start_as_its_shortcut() -> None:
    model = ResNet(BackboneConfig(depth=50, zero_init_last_gamma=True), NormConfig())
    assert all(block.conv3.norm.weight.abs().max() == 0 for stage in model.stages() for block in stage)
    frozen = ResNet(BackboneConfig(depth=18, zero_init_last_gamma=True), NormConfig(kind="frozen_bn"))
    assert all(block.conv2.norm.weight.min() == 1 for stage in frozen.stages() for block in stage)


def test_freezing_stops_the_stem_and_the_first_stages() -> None:
    model = ResNet(BackboneConfig(depth=18, freeze_at=2), NormConfig())
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


def test_frozen_stages_keep_their_running_statistics() -> None:
    cfg = small_config(NormConfig(kind="bn"), backbone=BackboneConfig(depth=18, freeze_at=2))
    model = build_model(cfg, NUM_CLASSES).train()
    model(make_batch(SIZES[:2]))
    assert model.backbone.stem.norm.running_mean.abs().max() == 0
    assert model.backbone.res3[0].conv1.norm.running_mean.abs().max() > 0


def test_anchors_by_hand() -> None:
    cell = cell_anchors(32, (0.5, 1.0, 2.0), 16, "exact")
    anchors = level_anchors(cell, (16, 16), 2, 3).view(2, 3, 3, 4)
    assert anchors[0, 0, 1].tolist() == [-16, -16, 16, 16]
    assert anchors[1, 2, 1].tolist() == [16, 0, 48, 32]
    size = anchors[..., 2:] - anchors[..., :2]
    torch.testing.assert_close(size.prod(-1), torch.full((2, 3, 3), 1024.0))
    torch.testing.assert_close(size[0, 0, :, 1] / size[0, 0, :, 0], torch.tensor([0.5, 1.0, 2.0]))


def test_an_anchor_s_id_does_not_depend_on_the_canvas() -> None:
    small = cell_ids(1, 4, 5, 3, torch.device("cpu")).view(4, 5, 3)
    large = cell_ids(1, 8, 9, 3, torch.device("cpu")).view(8, 9, 3)
    assert torch.equal(small, large[:4, :5])
    assert len(torch.cat([cell_ids(i, 8, 9, 3, torch.device("cpu")) for i in range(5)]).unique()) == 5 * 8 * 9 * 3


def test_default_config_is_the_paper_s_detector() -> None:
    model = build_model(ModelConfig(), 80)
    assert model.backbone.channels == (256, 512, 1024, 2048)
    assert len(model.box_head.convs) == 4 and len(model.mask_head.convs) == 4
    assert all(m.groups == 32 for m in model.modules() if isinstance(m, GroupNorm))
