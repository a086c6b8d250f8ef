"""`gndet invariance` passes if images do not influence each other; otherwise it fails and names the leak."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faults.tiny import CONFIG
from models import cascade_model, make_batch, small_model

from gndet.cli.main import main
from gndet.config.loading import load_config
from gndet.config.norm import NormConfig
from gndet.config.parts import BoxHeadConfig, RPNConfig
from gndet.data.batches.transforms import Sample
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.process import Process
from gndet.errors import ConfigError
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.toolbox.invariance import invariance, samples
from gndet.toolbox.invariance.invariance import check_invariance, compare_arrangements
from gndet.toolbox.invariance.leaks import Leak, find_leaks
from gndet.toolbox.invariance.measure import (
    Difference,
    Result,
    Signs,
    batch_of,
    compare,
    difference,
    flips,
    largest_difference,
    measure,
    parameter_groups,
)
from gndet.toolbox.invariance.samples import choose_samples, needed_bytes, within_memory
from gndet.training.memory import TensorBytes
from gndet.training.update import backward
from gndet.weights.load import initial_model

pytestmark = pytest.mark.usefixtures("thin", "forked_ranks")
SIZES = [(96, 128), (128, 97), (65, 80), (128, 128)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def report(config: Path, *overrides: str, passes: bool) -> dict:
    out = config.parent / "report.json"
    assert main(["invariance", str(config), *overrides, "--out", str(out)]) == (0 if passes else 1)
    return json.loads(out.read_text())


@pytest.mark.faults  # T24
@pytest.mark.parametrize(
    "overrides",
    [
        (), ("model.norm.kind=frozen_bn",), ("model.masks=false", "model.norm.kind=ln"), ("model.norm.kind=frn",),
         ("model.norm.kind=evonorm_s0", "model.norm.weight_standardization=true"), ("model.neck=c4",),
         ("model.neck=dc5", "model.backbone.depth=50"), ("model.detector=cascade_rcnn",),
         ("model.backbone.stochastic_depth=0.5",),
    ],
)  # fmt: skip
def test_it_passes_if_images_are_kept_apart(config: Path, overrides: tuple[str, ...]) -> None:
    found = report(config, *overrides, passes=True)
    assert found["passed"] and found["leaks"] == []
    columns = found["differences"]["float64"]
    assert list(columns) == ["together", "in twos", "1 and 3", "permuted", "beside a wider", "2 processes"]
    for column in columns.values():
        assert all(diff["relative"] < 1e-11 and diff["cosine"] < 1e-20 for diff in column.values())
    level = "features P4" if "neck" in "".join(overrides) else "features P2"
    cls = "loss_cls_stage2" if "model.detector=cascade_rcnn" in overrides else "loss_cls"
    groups = {level, cls, f"d {cls} / d pyramid", "d all / d backbone.res5", "d all / d box_head"}
    assert groups <= set(columns["together"]) and "detections" in columns["beside a wider"]
    for kinds in found["flips"]["float64"].values():
        assert kinds["choices"][0] == 0 < kinds["choices"][1] and kinds["ReLUs"][0] == 0 < kinds["ReLUs"][1]
    together = found["differences"]["float32"]["together"]
    features = [diff["relative"] for name, diff in together.items() if "feat" in name]
    assert 0 < max(features) < 1e-5


def test_it_passes_on_a_backbone_of_timm(config: Path) -> None:
    pytest.importorskip("timm")
    own = yaml.safe_load(config.read_text())
    own["model"]["backbone"] = {"kind": "timm", "name": "regnety_002"}
    config.write_text(yaml.safe_dump(own))
    found = report(config, "model.norm={kind: gn, channels_per_group: 8}", "model.masks=false", passes=True)
    together = found["differences"]["float64"]["together"]
    assert "d all / d backbone.net" in together and found["flips"]["float64"]["together"]["ReLUs"][1] > 0


@pytest.mark.faults  # T24
@pytest.mark.parametrize("detector", ["fcos", pytest.param("retinanet", marks=pytest.mark.slow)])
def test_it_passes_for_dense_detectors(config: Path, detector: str) -> None:
    model = [f"model.detector={detector}", "model.masks=false", "model.dense.num_convs=1"]
    found = report(config, *model, "model.norm.channels_per_group=8", passes=True)
    groups = {"features P7", "loss_cls", "d loss_box_reg / d pyramid", "d all / d fpn", "d all / d dense"}
    for column in found["differences"]["float64"].values():
        assert all(diff["relative"] < 1e-11 and diff["cosine"] < 1e-20 for diff in column.values())
    assert groups <= set(found["differences"]["float64"]["beside a wider"])
    for kinds in found["flips"]["float64"].values():
        assert kinds["choices"][0] == 0 < kinds["choices"][1] and kinds["ReLUs"][0] == 0 < kinds["ReLUs"][1]


@pytest.mark.parametrize("kind", ["bn", "brn"])
def test_batch_statistics_are_named_at_the_first_norm(
    config: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    leaks = {leak["coupling"]: leak for leak in report(config, f"model.norm.kind={kind}", passes=False)["leaks"]}
    assert set(leaks) == {"padding", "batch statistics"}
    assert leaks["batch statistics"]["where"].startswith("backbone.stem.norm: Batch")
    printed = capsys.readouterr().out
    assert "failed: how an image trains depends on what else is in its batch" in printed
    assert "batch statistics leaks, first at backbone.stem.norm" in printed and "sampling: no leak" in printed


@pytest.mark.faults  # T24
def test_padding_is_named_and_nothing_else(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (leak,) = report(config, "model.norm.padding=plain", passes=False)["leaks"]
    assert leak["coupling"] == "padding" and leak["where"].startswith("backbone.stem.norm: GroupNorm")
    assert "norm: {padding: masked} keeps the padding out" in capsys.readouterr().out


def test_what_it_cannot_compare_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["invariance", str(config), "--images", "3"]) == 2
    assert "--images: 3, expected 4 to 16" in capsys.readouterr().err
    assert main(["invariance", str(config), "data.train.count=1"]) == 2
    assert "1 images with objects, gndet invariance takes 4 (--images)" in capsys.readouterr().err


# --- each coupling alone


def leaks(model: MaskRCNN) -> list[Leak]:
    singles = [make_batch([size], first=i) for i, size in enumerate(SIZES)]
    return find_leaks(model.double(), singles, make_batch(SIZES))


def test_no_leak_in_a_model_that_keeps_images_apart() -> None:
    assert leaks(small_model()) == []
    assert leaks(small_model(rpn=RPNConfig(anchor_sizes=(16, 32, 64, 96, 128), norm=NormConfig(groups=8)))) == []
    assert leaks(cascade_model()) == []


def test_a_later_stage_that_draws_for_all_images_is_found_as_sampling() -> None:
    model, generator = cascade_model(resample=True, box_head={"regions_per_image": 8}), torch.Generator().manual_seed(0)
    last = model.box_head.stages[2]
    sample: Callable = last.sample
    last.sample = lambda regions, batch: sample(
        regions, batch._replace(keys=torch.randint(2**62, batch.keys.shape, generator=generator))
    )
    (leak,) = leaks(model)
    assert (leak.coupling, leak.where) == ("sampling", "regions of stage 2 of an image")


def test_a_part_s_own_batch_norm_is_found_in_that_part() -> None:
    head = BoxHeadConfig(conv_channels=32, num_convs=1, fc_channels=64, norm=NormConfig(kind="bn"))
    (leak,) = leaks(small_model(box_head=head))
    assert leak.coupling == "batch statistics" and leak.where.startswith("box_head.convs.0.norm: BatchNorm")
    rpn = RPNConfig(anchor_sizes=(16, 32, 64, 96, 128), norm=NormConfig(kind="bn"))
    found = {leak.coupling: leak.where for leak in leaks(small_model(rpn=rpn))}
    assert set(found) == {"padding", "batch statistics"} and all(
        w.startswith("rpn.convs.0.norm") for w in found.values()
    )


def test_a_generator_for_all_images_is_found_as_sampling() -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    sample: Callable = model.rpn.sample_anchors
    model.rpn.sample_anchors = lambda anchors, batch: sample(
        anchors, batch._replace(keys=torch.randint(2**62, batch.keys.shape, generator=generator))
    )
    (leak,) = leaks(model)
    assert (leak.coupling, leak.where) == ("sampling", "sampled anchors of an image")


def test_a_divisor_of_the_whole_batch_is_found_as_normalizer() -> None:
    model = small_model()
    loss: Callable = model.mask_head.loss

    def pooled(pyramid: object, regions: object, batch: object) -> dict[str, torch.Tensor]:
        count = regions.positive.sum(1)  # as detectron2: the sum over the batch's positives divided by their number
        mean = loss(pyramid, regions, batch)["loss_mask"]
        return {"loss_mask": mean * count * len(count) / count.sum()}

    model.mask_head.loss = pooled
    (leak,) = leaks(model)
    assert (leak.coupling, leak.where) == ("normalizer", "loss_mask")


def test_what_it_measures_is_the_gradient_that_training_takes(config: Path) -> None:
    cfg = load_config(config, ["train.global_batch=4"])
    dataset = read_dataset(cfg.data.train, cfg.data)
    samples = choose_samples(dataset, cfg, 4)
    model = initial_model(cfg, dataset.classes).model.double()
    measured = measure(model, [*samples, samples[0]], [[0, 1, 2, 3]], cfg, nullcontext).gradients
    backward(model, nullcontext, [batch_of(samples, model, cfg)], 4, cfg)
    for name, gradient in parameter_groups(model).items():
        assert difference(measured[name], gradient).relative < 1e-12, name


def test_a_choice_that_differs_counts_whichever_side_it_is_on() -> None:
    def result(*ids: int) -> Result:
        return Result({}, {}, {}, {}, [{"sampled regions": {(id,) for id in ids}}], [Signs([], [])])

    assert flips(result(1, 2), result(1))["choices"] == (1, 2) and flips(result(1), result(1, 2))["choices"] == (1, 1)


def test_relus_that_switch_are_counted() -> None:
    def result(region: int, *bits: int) -> Result:
        signs = Signs([np.array(bits, np.uint8)], [np.array(bits, np.uint8)])
        return Result({}, {}, {}, {}, [{"sampled regions": {(region,)}}], [signs])

    assert flips(result(1, 255, 1), result(1, 254, 3))["ReLUs"] == (4, 32)
    assert flips(result(2, 255, 1), result(1, 254, 3))["ReLUs"] == (2, 16)  # other regions are not compared


def test_a_narrow_canvas_is_measured_at_its_true_strides(config: Path) -> None:
    cfg = load_config(config, ["data.canvas_multiple=8"])
    sizes = [(65, 130), (70, 70), (80, 33)]
    samples = [
        Sample(image[:, :h, :w], gt[0][:1], gt[1][:1], gt[2][:1], 0)
        for (h, w), image, *gt in zip(sizes, *make_batch([*sizes])[:1], *make_batch(sizes).gt[:3], strict=True)
    ]
    model = initial_model(cfg, ("a", "b", "c", "d", "e")).model.double()
    got, alone = (measure(model, samples, places, cfg, nullcontext) for places in ([[0, 1]], [[0], [1]]))
    assert all(diff.small for diff in compare(got, alone).values())


def test_out_of_memory_is_a_mistake_with_a_remedy(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.autograd, "backward", full)
    told = {
        (): "out of memory (no room); lower data.max_edge, data.shortest_edge, model.box_head.regions_per_image, or ",
        ("model.detector=fcos", "model.masks=false"): "(no room); lower data.max_edge, data.shortest_edge, or --images",
    }
    for overrides, words in told.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            check_invariance(load_config(config, overrides), 4, Process(0, 1, torch.device("cpu")), lambda line: None)


def test_a_report_that_cannot_be_written_is_reported_first(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["invariance", str(config), "--out", str(config.parent)]) == 2
    assert "is a folder, expected the name of a file" in capsys.readouterr().err


def test_nan_in_one_image_is_a_difference() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert not largest_difference([good, bad], [good, good]).small
    assert largest_difference([good, good], [good, good]) == Difference(0, 0)


def test_difference_by_hand() -> None:
    got, expected = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert difference(got, expected).relative == pytest.approx(4 / 3)
    assert difference(got, expected).cosine == pytest.approx(1 - 0.6)
    assert difference(2 * got, got).cosine == 0 and difference(2 * got, got).relative == 1
    assert difference(0 * got, 0 * got) == Difference(0, 0)
    assert not difference(got, 0 * got).small and not difference(got * torch.nan, got).small


# --- within a GPU's memory


def test_float32_is_compared_without_tf32(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(invariance, "_check", lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    check_invariance(load_config(config, []), 4, Process(0, 1, torch.device("cpu")), print)
    assert seen == [False] and torch.backends.cudnn.allow_tf32


@pytest.mark.slow
@pytest.mark.parametrize("num", [4, 6])
def test_the_memory_of_large_images_is_estimated_from_that_of_small_ones(config: Path, num: int) -> None:
    cfg = load_config(config, ["data.shortest_edge=[160]", "data.max_edge=160"])
    dataset = read_dataset(cfg.data.train, cfg.data)
    model = initial_model(cfg, dataset.classes, images=dataset)[0].double().train()
    estimate = needed_bytes(model, num, cfg)(160 * 160)
    images = choose_samples(dataset, cfg, num)
    with TensorBytes(2**62) as counted:
        compare_arrangements(model, images, cfg, nullcontext, lambda _: None)
    assert 0.8 * counted.peak < estimate < 1.3 * counted.peak


def test_images_are_made_smaller_until_they_fit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, said = load_config(config, ["data.shortest_edge=[240,320]", "data.max_edge=320"]), list[str]()
    dataset = read_dataset(cfg.data.train, cfg.data)
    model = initial_model(cfg, dataset.classes, images=dataset)[0].train()
    monkeypatch.setattr(samples, "needed_bytes", lambda *_: lambda pixels: 1e9 + 1e4 * pixels)  # 1 to 2 GB
    assert within_memory(model, dataset, cfg, 4, 3 * 10**9, said.append) is cfg and not said
    smaller = within_memory(model, dataset, cfg, 4, 16 * 10**8, said.append).data  # 1.28 GB usable: (0.28)^0.5
    assert (smaller.shortest_edge, smaller.max_edge) == ((120, 160), 160)
    (line,) = said
    assert line.startswith("4 images of up to 320 x 320 need about 1.9 GiB in float64, 1.5 GiB of GPU memory are free")
    assert line.endswith(": made smaller, data.shortest_edge=[120, 160] data.max_edge=160")
    with pytest.raises(ConfigError, match=r"too few even for small images; lower --images"):
        within_memory(model, dataset, cfg, 4, 10**9, said.append)
