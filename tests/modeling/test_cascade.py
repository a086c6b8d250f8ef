"""Cascade R-CNN: what each stage sees, learns from and passes on, and parity with a plain computation by torchvision.

By default a cascade follows detectron2; MMDETECTION are the options of mmdetection's.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from models import NUM_CLASSES, cascade_model, make_batch, small_config, small_model
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from gndet.config.cascade import MMDETECTION as OF_MMDETECTION
from gndet.config.loading import config_from_dict
from gndet.config.model import ModelConfig
from gndet.errors import ConfigError
from gndet.modeling.box_head import BoxHead
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.recompute import set_memory
from gndet.ops.boxes import decode, encode
from gndet.structures import GROUND_TRUTH_IDS, Batch, Proposals, Regions, Step

SIZES = [(96, 128), (128, 97), (65, 80)]
MMDETECTION = OF_MMDETECTION.defaults["cascade"]
STAGES = ("loss_cls_stage{}", "loss_box_reg_stage{}")
BOTH = pytest.mark.parametrize("options", [{}, MMDETECTION], ids=["detectron2", "mmdetection"])


def step_of(model: MaskRCNN, batch: Batch) -> Step:
    return model.step(*model.features(*batch[:2], batch.padded), batch)


def spread(model: MaskRCNN) -> MaskRCNN:
    """Give the predictors outputs that move boxes and tell classes apart; in float64."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_score.weight", "bbox_pred.weight", "objectness.weight")):
                parameter *= 100
    return model.double()


# --- options


def test_the_presets_hold_each_toolkit_s_settings() -> None:
    def options(compat: str) -> ModelConfig:
        return ModelConfig.model_validate({"detector": "cascade_rcnn", "compat": compat})

    for compat in ("gndet", "detectron2"):
        model, cascade = options(compat), options(compat).cascade
        assert (cascade.positive_iou, cascade.loss_weights) == ((0.5, 0.6, 0.7), (1, 1, 1))
        assert cascade.delta_weights == ((10, 5), (20, 10), (30, 15))
        assert (cascade.scale_gradient, cascade.resample, cascade.average) == (True, False, "scores")
        assert (cascade.mask_stages, model.box_head.loss_beta, model.rpn.post_nms_train) == ("first", 0, 2000)
    model, cascade = options("mmdetection"), options("mmdetection").cascade
    assert (cascade.positive_iou, cascade.loss_weights) == ((0.5, 0.6, 0.7), (1, 0.5, 0.25))
    stds = [1 / weight for weights in cascade.delta_weights for weight in weights]
    assert stds == pytest.approx([0.1, 0.2, 0.05, 0.1, 0.033, 0.067])
    assert (cascade.scale_gradient, cascade.resample, cascade.average) == (False, True, "logits")
    assert (cascade.mask_stages, model.box_head.loss_beta, model.rpn.loss_beta) == ("each", 1, 1 / 9)
    assert ModelConfig.model_validate({"compat": "mmdetection"}).box_head.loss_beta == 0  # Mask R-CNN as before


def test_a_preset_gives_way_to_what_a_config_states() -> None:
    stated = {"cascade": {"resample": False}, "rpn": {"post_nms_train": 7}}
    model = ModelConfig.model_validate({"detector": "cascade_rcnn", "compat": "mmdetection", **stated})
    assert (model.cascade.resample, model.rpn.post_nms_train, model.cascade.average) == (False, 7, "logits")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cascade": {"positive_iou": [0.5, 0.6]}}, "values for 2 of positive_iou, 3 of delta_weights, 3 of loss_wei"),
        ({"cascade": {"positive_iou": []}}, "model.cascade.positive_iou"),
        ({"cascade": {"positive_iou": [0.5, 1.5, 0.7]}}, "model.cascade.positive_iou"),
        ({"cascade": {"delta_weights": [[10, 5], [20, 0], [30, 15]]}}, "model.cascade.delta_weights"),
        ({"cascade": {"average": "boxes"}}, "model.cascade.average"),
        ({"box_head": {"class_agnostic": False}}, "box_head.class_agnostic: false.*expected true"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_dict({"model": {"detector": "cascade_rcnn", **options}}, "test")


# --- what a stage is


def test_one_stage_is_a_class_agnostic_mask_rcnn_to_the_bit() -> None:
    agnostic = small_config().box_head.model_copy(update={"class_agnostic": True, "score_threshold": 0.0})
    plain = small_model(box_head=agnostic)
    one = {"positive_iou": (0.5,), "delta_weights": ((10.0, 5.0),), "loss_weights": (1.0,)}
    cascade, batch = cascade_model(box_head={"score_threshold": 0.0}, **one), make_batch(SIZES)
    expected, got = plain(batch), cascade(batch)
    assert list(got) == [name + "_stage0" * name.startswith(("loss_cls", "loss_box")) for name in expected]
    sum(expected.values()).sum().backward()
    sum(got.values()).sum().backward()
    for model in (plain, cascade):
        model.eval()
    for a, b in zip(expected.values(), got.values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.parameters(), cascade.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    for a, b in zip(plain.detect(*batch[:2], True), cascade.detect(*batch[:2], True), strict=True):
        assert torch.equal(a, b)


def test_a_class_agnostic_head_learns_what_one_with_the_same_box_for_each_class_does() -> None:
    """Repeating its four rows for each class gives a class-specific head of the same losses and detections."""
    agnostic = small_config().box_head.model_copy(update={"class_agnostic": True, "score_threshold": 0.0})
    model = spread(small_model(box_head=agnostic))
    wide = small_model(box_head=agnostic.model_copy(update={"class_agnostic": False})).double()
    state = model.state_dict()
    for name in ("box_head.bbox_pred.weight", "box_head.bbox_pred.bias"):
        state[name] = torch.cat([state[name]] * NUM_CLASSES)
    wide.load_state_dict(state)
    batch = make_batch(SIZES)
    torch.testing.assert_close(wide(batch), model(batch))
    for a, b in zip(wide.eval().detect(*batch[:2], True), model.eval().detect(*batch[:2], True), strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_an_object_is_its_own_box_at_the_scale_of_each_stage(options: dict[str, Any]) -> None:
    batch = make_batch(SIZES)
    anchors = batch.gt.boxes + torch.tensor([1.0, -2.0, 4.0, 3.0])
    targets = []
    for stage in cascade_model(**options).box_head.stages:
        target = encode(batch.gt.boxes, anchors, stage.delta_weights)
        decoded = decode(target, anchors, stage.delta_weights)
        torch.testing.assert_close(decoded[batch.gt.valid], batch.gt.boxes[batch.gt.valid], rtol=0, atol=1e-4)
        targets.append(target[batch.gt.valid])
    for before, after in pairwise(targets):
        assert (after.abs() > before.abs()).all()


# --- training


@BOTH
def test_losses_reach_every_parameter_also_of_an_image_without_objects(options: dict[str, Any]) -> None:
    model, empty = cascade_model(**options), make_batch(SIZES[:1], first=3)
    assert not empty.gt.valid.any()
    losses = model(empty)
    sum(losses.values()).sum().backward()
    for i in range(3):
        assert losses[f"loss_box_reg_stage{i}"].item() == 0 and losses[f"loss_cls_stage{i}"].item() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    losses = model(make_batch(SIZES))
    assert all(loss.shape == (3,) and (loss.isfinite() & (loss > 0)).all() for loss in losses.values())
    sum(losses.values()).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_no_gradient_crosses_the_boxes_between_stages() -> None:
    """Stage 1's regions move with stage 0's box layer, but its losses have no gradient there."""
    model, batch = spread(cascade_model()), make_batch(SIZES)
    first = model.box_head.stages[0]
    step = step_of(model, batch)
    for name in STAGES:
        loss = step.losses[name.format(1)].sum()
        own = torch.autograd.grad(loss, list(first.parameters()), retain_graph=True, allow_unused=True)
        assert own == (None,) * len(own)
    with torch.no_grad():
        first.bbox_pred.bias += 0.5
    moved = step_of(model, batch)
    assert torch.equal(moved.regions.boxes, step.regions.boxes)
    assert not torch.equal(moved.later[0].boxes, step.later[0].boxes)


def test_the_gradient_of_the_levels_is_divided_by_the_stages_and_no_other() -> None:
    batch = make_batch(SIZES)
    found = []
    for scale in (True, False):
        model = spread(cascade_model(scale_gradient=scale))
        levels, areas = model.features(*batch[:2], True)
        leaves = [level.detach().requires_grad_() for level in levels]
        losses = model.step(leaves, areas, batch).losses
        boxes = sum(losses[name.format(i)] for i in range(3) for name in STAGES).sum()
        head = list(model.box_head.parameters())
        of_boxes = torch.autograd.grad(boxes, [*leaves[:4], *head], retain_graph=True)
        found.append((of_boxes[:4], (*of_boxes[4:], *torch.autograd.grad(losses["loss_mask"].sum(), leaves[:4]))))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(3 * a, b)
    assert found[0][0][0].any()
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


def regions_by_hand(stage: BoxHead, boxes: Tensor, gt: Tensor) -> Regions:
    """Return what a stage takes from boxes (R, 4), given one object of class 2 with the box gt (4,)."""
    batch = make_batch([(100, 100)])
    batch.gt.boxes[0, 0], batch.gt.labels[0, 0] = gt, 2
    proposals = Proposals(boxes[None], torch.arange(len(boxes))[None], torch.tensor([[True, True, True, False]]))
    return stage.take_all(proposals, batch)


def test_a_later_stage_takes_all_boxes_and_labels_them_at_its_own_threshold() -> None:
    """Boxes that cover 62 % and 50 % of an object, one beside it, and an empty slot of NaN; IoU .5, .6 and .7."""
    boxes = torch.tensor([[0.0, 0, 62, 10], [0, 0, 50, 10], [0, 50, 100, 60], [torch.nan] * 4])
    expected = ([True, True, False, False], [True, False, False, False], [False] * 4)
    for stage, positive in zip(cascade_model().box_head.stages, expected, strict=True):
        regions = regions_by_hand(stage, boxes, torch.tensor([0.0, 0, 100, 10]))
        assert regions.positive[0].tolist() == positive and regions.positive_slots == 4
        assert regions.labels[0].tolist() == [2 if each else NUM_CLASSES for each in positive]
        assert regions.valid[0].tolist() == [True, True, True, False] and not regions.boxes[0, 3].any()


def test_boxes_that_a_stage_moves_out_of_the_picture_do_not_count() -> None:
    """Stage 0 moves every region right by 90 pixels of a picture of 100; those of the right side become empty."""
    model, batch = cascade_model(), make_batch([(100, 100)])
    first, boxes = model.box_head.stages[0], torch.tensor([[[0.0, 0, 20, 10], [50, 0, 70, 10], [5, 5, 9, 25]]])
    regions = first.take_all(Proposals(boxes, torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool)), batch)
    deltas = torch.tensor([[90 / 20, 0, 0, 0], [90 / 20, 0, 0, 0], [torch.nan] * 4]) * 10
    refined = model.box_head._refined(first, deltas[None, :, None], regions, batch.sizes)
    torch.testing.assert_close(refined.boxes[0, :2], torch.tensor([[90.0, 0, 100, 10], [100, 0, 100, 10]]))
    assert refined.valid[0].tolist() == [True, False, False] and refined.ids.tolist() == [[0, 1, 2]]
    second = model.box_head.stages[1]
    chosen = second.take_all(refined, batch)
    logits, deltas = torch.randn(1, 3, NUM_CLASSES + 1), torch.zeros(1, 3, 1, 4)
    loss = second.losses(logits, deltas, chosen, batch.gt)["loss_cls"]
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :1], torch.tensor([NUM_CLASSES]))[None])


@BOTH
def test_regions_of_a_later_stage_are_the_refined_ones_of_the_stage_before(options: dict[str, Any]) -> None:
    model, batch = spread(cascade_model(**options)), make_batch(SIZES)
    levels, areas = model.features(*batch[:2], True)
    step = model.step(levels, areas, batch)
    pyramid = model.pooled_levels(levels, areas)
    resample = model.box_head.cascade.resample
    earlier = (step.regions, *step.later[:-1])
    for stage, before, after in zip(model.box_head.stages[:-1], earlier, step.later, strict=True):
        _, deltas = stage(pyramid, before.boxes)
        refined = stage.refine(deltas, before.boxes, batch.sizes)
        for i in range(len(SIZES)):
            places = {id: slot for slot, id in enumerate(before.ids[i].tolist()) if before.valid[i, slot]}
            for id, box in zip(after.ids[i][after.valid[i]].tolist(), after.boxes[i][after.valid[i]], strict=True):
                if resample and id >= GROUND_TRUTH_IDS:
                    expected = batch.gt.boxes[i, id - GROUND_TRUTH_IDS].double()
                else:
                    expected = refined[i, places[id]]
                torch.testing.assert_close(box.double(), expected, rtol=0, atol=1e-6)
            not_empty = {id for id in places if (refined[i, places[id], 2:] > refined[i, places[id], :2]).all()}
            assert resample or set(after.ids[i][after.valid[i]].tolist()) == not_empty


def test_each_stage_that_samples_draws_anew_and_one_region_less_changes_no_other() -> None:
    model, batch = cascade_model(box_head={"regions_per_image": 16}, **MMDETECTION), make_batch(SIZES[:1])
    proposals = step_of(model, batch).proposals
    proposals = proposals._replace(valid=torch.ones_like(proposals.valid))
    drawn = []
    for stage in model.box_head.stages:
        regions = stage.sample(proposals, batch)
        kept = proposals._replace(valid=proposals.ids != regions.ids[0, -1])
        fewer = stage.sample(kept, batch)
        before, after = set(regions.ids[0].tolist()), set(fewer.ids[0].tolist())
        assert before - after == {regions.ids[0, -1].item()} and len(after - before) == 1
        drawn.append(before)
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@BOTH
def test_what_an_image_learns_and_chooses_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    model, together = spread(cascade_model(**options)), make_batch(SIZES)
    company = step_of(model, together)
    for i, size in enumerate(SIZES):
        alone = step_of(model, make_batch([size], first=i))
        choices = model.choices(alone, 0)
        assert model.choices(company, i) == choices
        assert {"sampled regions", "regions of stage 1", "regions of stage 2"} < set(choices)
        assert all(choices.values())
        for name, loss in company.losses.items():
            torch.testing.assert_close(loss[i], alone.losses[name][0], rtol=1e-9, atol=1e-12)


def test_every_option_of_memory_gives_the_same_losses_and_gradients() -> None:
    model, batch = spread(cascade_model(**MMDETECTION)), make_batch(SIZES[:2])
    found = []
    for memory in ("fast", "balanced", "lean"):
        set_memory(model, memory)
        model.zero_grad()
        losses = model(batch)
        sum(losses.values()).sum().backward()
        found.append((losses, [parameter.grad for parameter in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), MMDETECTION], ids=["d2", "mmdet"])
def test_the_training_forward_after_the_levels_is_one_graph(options: dict[str, Any]) -> None:
    model, batch = cascade_model(**options), make_batch(SIZES)
    explained = torch._dynamo.explain(model.step)(*model.features(*batch[:2], True), batch)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


# --- masks


def mask_boxes(**options: Any) -> tuple[Step, list[Tensor]]:
    """Return a step, and the boxes that each mask head ran on."""
    model, seen = spread(cascade_model(**options)), []
    heads = getattr(model.mask_head, "stages", [model.mask_head])
    for head in heads:
        predict = head.forward
        head.forward = lambda *args, predict=predict: seen.append(args[1]) or predict(*args)
    return step_of(model, make_batch(SIZES)), seen


def test_the_mask_head_trains_on_the_regions_of_the_stated_stage() -> None:
    for stage, options in ((0, {}), (2, {"mask_stages": "last"})):
        step, (boxes,) = mask_boxes(**options)
        regions = (step.regions, *step.later)[stage]
        positive = set(map(tuple, regions.boxes[regions.positive].tolist()))
        assert positive and positive <= set(map(tuple, boxes.tolist()))
    step, seen = mask_boxes(mask_stages="each", loss_weights=(1.0, 0.5, 0.25))
    assert [name for name in step.losses if "mask" in name] == [f"loss_mask_stage{i}" for i in range(3)]
    for regions, boxes in zip((step.regions, *step.later), seen, strict=True):
        assert set(map(tuple, regions.boxes[regions.positive].tolist())) <= set(map(tuple, boxes.tolist()))
    full, _ = mask_boxes(mask_stages="each")
    for i, weight in enumerate((1.0, 0.5, 0.25)):
        for name in (*STAGES, "loss_mask_stage{}"):
            torch.testing.assert_close(step.losses[name.format(i)], weight * full.losses[name.format(i)])


def test_masks_of_all_stages_are_averaged() -> None:
    model, batch = (
        spread(cascade_model(box_head={"score_threshold": 0.0}, mask_stages="each")).eval(),
        make_batch(SIZES),
    )
    found = model.detect(*batch[:2], True)
    pyramid = model.pooled_levels(*model.features(*batch[:2], True))
    single = [head.detect(pyramid, found, batch.sizes).masks for head in model.mask_head.stages]
    torch.testing.assert_close(found.masks, sum(single) / 3)
    assert found.valid.any() and not torch.equal(single[0], single[1])


# --- parity with a plain computation for one image, in float64


def pooled(features: list[Tensor], boxes: Tensor) -> Tensor:
    """Pool boxes (R, 4) from P2 to P5, box by box, as the paper of FPN states."""
    rows = []
    for box in boxes:
        side = ((box[2] - box[0]) * (box[3] - box[1])).clamp(min=0).sqrt()
        level = int((4 + torch.log2(side / 224 + 1e-8)).floor().clamp(2, 5)) - 2
        roi = torch.cat([box.new_zeros(1), box])[None]
        rows.append(torchvision.ops.roi_align(features[level], roi, 7, 1 / 2 ** (level + 2), 2, aligned=True))
    return torch.cat(rows)


def predictions(state: dict[str, Tensor], stage: int, features: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (R, K + 1) and deltas (R, 4) of a stage."""

    def of(layer: str) -> tuple[Tensor, Tensor | None]:
        name = f"box_head.stages.{stage}.{layer}"
        return state[f"{name}.weight"], state.get(f"{name}.bias")

    x = F.conv2d(pooled(features, boxes), *of("convs.0.conv"), padding=1)
    x = F.relu(F.group_norm(x, x.shape[1] // 16, *of("convs.0.norm"))).flatten(1)
    x = F.relu(F.linear(x, *of("fcs.0")))
    return F.linear(x, *of("cls_score")), F.linear(x, *of("bbox_pred"))


def one_image(options: dict[str, Any], **box_head: Any) -> tuple[MaskRCNN, Batch, dict[str, Tensor], list[Tensor]]:
    """Return a cascade and an image that fills its canvas, with the model's tensors and levels."""
    model, batch = spread(cascade_model(box_head=box_head, **options)), make_batch([(128, 128)], first=4)
    levels, _ = model.features(*batch[:2], False)
    return model, batch, model.state_dict(), [level.detach() for level in levels]


@BOTH
def test_losses_equal_a_plain_computation_s(options: dict[str, Any]) -> None:
    """The regions of a stage that samples are taken from the step; those of one that does not are computed."""
    beta = 1.0 if options else 0.0
    model, batch, state, levels = one_image(options, loss_beta=beta)
    step = step_of(model, batch)
    gt, labels = batch.gt.boxes[batch.gt.valid].double(), batch.gt.labels[batch.gt.valid]
    regions = step.regions.boxes[0, step.regions.valid[0]].double()
    num_positive = []
    for i, sampled in enumerate((step.regions, *step.later)):
        if options:
            regions = sampled.boxes[0, sampled.valid[0]].double()
        iou, nearest = torchvision.ops.box_iou(gt, regions).max(dim=0)
        positive = iou >= (0.5, 0.6, 0.7)[i]
        wx, wh = model.box_head.cascade.delta_weights[i]
        coder = BoxCoder((wx, wx, wh, wh))
        logits, deltas = predictions(state, i, levels, regions)
        target = torch.where(positive, labels[nearest], NUM_CLASSES)
        difference = deltas[positive] - coder.encode_single(gt[nearest[positive]], regions[positive])
        zero = torch.zeros_like(difference)
        loc = F.smooth_l1_loss(difference, zero, beta=beta, reduction="sum") / len(regions)
        weight = model.box_head.cascade.loss_weights[i]
        for name, expected in zip(STAGES, (F.cross_entropy(logits, target), loc), strict=True):
            assert step.losses[name.format(i)].item() == pytest.approx(weight * expected.item(), rel=1e-6), (name, i)
        num_positive.append(int(positive.sum()))
        refined = torchvision.ops.clip_boxes_to_image(coder.decode_single(deltas, regions), (128, 128))
        regions = refined[torchvision.ops.remove_small_boxes(refined, 1e-12)]
    assert all(num_positive)


@BOTH
def test_detections_equal_a_plain_computation_s(options: dict[str, Any]) -> None:
    model, batch, state, levels = one_image(options, score_threshold=0.05)
    model.eval()
    proposals, _ = model._propose(*batch[:2], False)
    boxes = proposals.boxes[0, proposals.valid[0]].double()
    outputs = []
    for i, (wx, wh) in enumerate(model.box_head.cascade.delta_weights):
        logits, deltas = predictions(state, i, levels, boxes)
        outputs.append(logits if options else logits.softmax(-1))
        refined = BoxCoder((wx, wx, wh, wh)).decode_single(deltas, boxes)
        boxes = torchvision.ops.clip_boxes_to_image(refined, (128, 128))
    scores = sum(outputs) / 3
    scores = scores.softmax(-1) if options else scores
    torch.testing.assert_close(scores.sum(1), torch.ones(len(boxes), dtype=torch.float64))
    row, label = (scores[:, :-1] > 0.05).nonzero(as_tuple=True)
    kept = torchvision.ops.batched_nms(boxes[row], scores[row, label], label, 0.5)[:100]
    found = model.detect(*batch[:2], False)
    valid = found.valid[0]
    assert valid.sum() == len(kept) > 20
    torch.testing.assert_close(found.scores[0, valid].double(), scores[row, label][kept], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.boxes[0, valid].double(), boxes[row][kept], rtol=0, atol=1e-4)
    assert torch.equal(found.labels[0, valid], label[kept])
