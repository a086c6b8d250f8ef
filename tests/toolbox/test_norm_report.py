"""The norm report: statistics agree with torch, planted faults are found and worded, runs are not affected."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.tiny import CONFIG
from models import make_batch, small_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from gndet.checkpoint import load_checkpoint
from gndet.config.loading import config_from_dict
from gndet.config.norm import NormConfig
from gndet.evaluation.norm_statistics import affine, measure, moments, norm_layers, similarity
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.valid_area import ValidArea
from gndet.toolbox.report.norm_words import norm_findings
from gndet.toolbox.report.norms import section
from gndet.train import train
from gndet.training.log import Log
from gndet.training.norms import read_norms, read_start
from gndet.training.run_folder import NORMS

STEM = "backbone.stem.norm"
NO_AREA = None


def look(model: MaskRCNN, sizes: list[tuple[int, int]], start: Any = None, autocast: Any = nullcontext) -> list[Any]:
    """Measure a model on a batch of pictures."""
    return measure(model, [make_batch(sizes)], autocast, start)


def numbers(measured: list[Any], name: str = STEM) -> dict[str, Any]:
    return next(layer.numbers for layer in measured if layer.numbers["name"] == name)


def inputs_of(model: MaskRCNN, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Return the input of each norm layer of backbone and pyramid, collected with plain hooks."""
    given: dict[str, Tensor] = {}
    model.eval()
    for name, layer in norm_layers(model).items():
        layer.register_forward_pre_hook(lambda layer, x, name=name: given.update({name: x[0].double()}))
    batch = make_batch(sizes)
    with torch.no_grad():
        model.features(batch.images, batch.sizes, batch.padded)
    return given


# --- statistics


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_those_of_the_picture_alone(masked: bool) -> None:
    x = torch.randn(2, 6, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    sizes = [(8, 10), (5, 7)]
    area = ValidArea.of(torch.tensor(sizes), 8, 10) if masked else None
    if masked:
        x[1, :, 5:] = math.nan  # whatever lies in the padding
        x[1, :, :, 7:] = math.inf
    got = moments(x, area)
    for i, (height, width) in enumerate(sizes if masked else [(8, 10)] * 2):
        picture = x[i, :, :height, :width]
        torch.testing.assert_close(got.mean[i], picture.mean((1, 2)))
        torch.testing.assert_close(got.var[i], picture.var((1, 2), correction=0))
        assert got.count[i] == height * width


def test_a_layer_s_quantiles_are_those_of_torch_in_float64() -> None:
    model = small_model(NormConfig(channels_per_group=16))
    measured, given = look(model, [(96, 128)] * 2), inputs_of(model, [(96, 128)] * 2)
    for name in (STEM, "backbone.res4.1.conv2.norm", "fpn.output5.norm"):
        var = given[name].unflatten(1, (-1, 16)).var((2, 3, 4), correction=0)  # (2, G)
        expected = torch.quantile(var.sqrt().flatten(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
        np.testing.assert_allclose(numbers(measured, name)["std"], expected.numpy(), rtol=1e-4)
        assert numbers(measured, name)["elements"] == 16 * given[name][0, 0].numel()


@pytest.mark.filterwarnings("error")
def test_bn_whose_input_overflows_is_counted_without_a_warning() -> None:
    model = small_model(NormConfig(kind="bn"))
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(1e37)
    assert numbers(look(model, [(64, 64)]))["nonfinite"] == 1


def test_a_masked_picture_measures_the_same_in_any_batch() -> None:
    model = small_model().double()
    wide = look(model, [(96, 128), (64, 80)])
    alone = measure(model, [make_batch([(96, 128)]), make_batch([(64, 80)], first=1)], nullcontext, None)
    for beside, single in zip(wide, alone, strict=True):
        if beside.numbers["name"].startswith(("backbone.", "fpn.")):
            np.testing.assert_allclose(beside.group_std, single.group_std, rtol=1e-9)


def test_identical_channels_of_a_group_are_wholly_alike() -> None:
    a, b = torch.tensor([1.0, -1, 1, -1] * 8), torch.tensor([1.0, 1, -1, -1] * 8)  # not correlated
    x = torch.stack([a, -3 * a + 5, b, 2 * b]).view(1, 4, 4, 8)
    assert similarity(x, 2, NO_AREA).tolist() == pytest.approx([1, 0], abs=1e-12)
    assert similarity(x[:, [0, 2, 1, 3]], 2, NO_AREA).tolist() == pytest.approx([0, 0.5], abs=1e-12)
    x[:, 3] = 7  # does not vary: compared with nothing
    assert similarity(x, 2, NO_AREA).tolist() == pytest.approx([1, 0], abs=1e-12)


def test_similarity_is_that_of_the_picture_alone() -> None:
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    area = ValidArea.of(torch.tensor([[5, 6]]), 8, 8)
    correlation = np.abs(np.corrcoef(x[0, :, :5, :6].reshape(4, -1).numpy()))
    within = (correlation[0, 1] + correlation[2, 3]) / 2
    across = correlation[:2, 2:].mean()
    assert similarity(x, 2, area).tolist() == pytest.approx([within, across], rel=1e-9)
    assert all(map(math.isnan, similarity(x[:, :, :3, :5], 2, NO_AREA).tolist()))  # 15 positions are too few


# --- planted faults


def planted(change: Callable[[MaskRCNN], None], norm: NormConfig | None = None, **settings: Any) -> list[Any]:
    """Measure a model after a change; gamma and beta before the change count as those of the start."""
    model = small_model(norm)
    start = affine(model)
    with torch.no_grad():
        change(model)
    return look(model, [(96, 128)] * 2, start, **settings)


def words(measured: list[Any], update: int = 50, padding: float | None = None) -> str:
    entry = {"update": update, "layers": [layer.numbers for layer in measured], "padding": padding}
    return "\n".join(f"{kind}: {said}" for kind, said in norm_findings(json.loads(json.dumps(entry))))


def nudge(model: MaskRCNN) -> None:
    """Move gamma and beta a little, as training does."""
    for layer in norm_layers(model).values():
        layer.weight += 0.01
        layer.bias -= 0.02


def test_a_sound_model_is_found_sound() -> None:
    measured = planted(nudge)
    assert words(measured) == f"good: nothing unusual in {len(measured)} norm layers after update 50"
    assert numbers(measured)["drift"] == pytest.approx([0.01, 0.02], rel=1e-3)  # gamma began as ones


def test_groups_below_eps_are_found() -> None:
    def half_silent(model: MaskRCNN) -> None:
        nudge(model)
        model.backbone.stem.conv.weight[:32] *= 1e-6

    measured = planted(half_silent)
    assert numbers(measured)["eps_dominated"] == 0.5 and numbers(measured, "fpn.output2.norm")["eps_dominated"] == 0
    assert words(measured).startswith(f"bad: {STEM}: 50 % of its groups have a variance below eps (1e-05)")


def test_dead_and_exploding_gamma_are_found() -> None:
    def change(model: MaskRCNN) -> None:
        nudge(model)
        model.fpn.output3.norm.weight[:4] = 5e-4
        model.fpn.output4.norm.weight[3] = -40

    measured = planted(change)
    assert numbers(measured, "fpn.output3.norm")["dead"] == pytest.approx(4 / 32)
    assert numbers(measured, "fpn.output4.norm")["exploding"] == pytest.approx(1 / 32)
    assert numbers(measured, "fpn.output4.norm")["gamma"] == pytest.approx([-40, 1.01, 1.01])
    said = words(measured)
    assert said.startswith("bad: fpn.output4.norm: gamma has grown to 40")
    assert "warn: fpn.output3.norm: gamma of 12.5 % of its channels is practically 0" in said


def test_a_layer_that_starts_at_zero_is_dead_only_later() -> None:
    def change(model: MaskRCNN) -> None:
        nudge(model)
        model.backbone.res2[0].conv2.norm.weight.zero_()

    measured = planted(change)
    assert "practically 0" not in words(measured, update=0)
    assert "bad: backbone.res2.0.conv2.norm: gamma of 100 %" in words(measured, update=50)


def test_groups_of_one_number_are_found() -> None:
    model = small_model(NormConfig(kind="in"))
    measured = look(model, [(32, 32)] * 2)
    assert numbers(measured, "backbone.res5.1.conv2.norm")["one_element"] == 1.0
    assert numbers(measured, "backbone.res5.1.conv2.norm")["elements"] == 1
    assert numbers(measured)["one_element"] == 0.0
    assert numbers(measured)["kind"] == "in"
    assert words(measured).startswith("bad: backbone.res5.0.conv1.norm and 6 more: groups of one number")


@pytest.mark.parametrize(
    ("kind", "finding"), [("frozen_bn", ""), ("frn", "statistics over as few as"), ("in", "groups of one number")]
)
def test_only_a_norm_that_takes_statistics_is_blamed_for_them(kind: str, finding: str) -> None:
    found = words(look(small_model(NormConfig(kind=kind)), [(32, 32)] * 2))
    assert finding in found and ("beta for every picture" in found) == (kind == "in")
    if kind == "frozen_bn":
        assert "statistics over" not in found and "variance below eps" not in found
    else:
        assert "Try kind: gn with few groups in model.backbone.norm" in found and "fewer groups" not in found


def test_values_that_are_not_finite_are_reported_and_end_nothing() -> None:
    def change(model: MaskRCNN) -> None:
        model.backbone.res3[0].conv1.conv.weight[0] = math.inf

    measured = planted(change)
    assert numbers(measured)["nonfinite"] == 0 and numbers(measured, "backbone.res3.0.conv1.norm")["nonfinite"] > 0
    json.dumps([layer.numbers for layer in measured], allow_nan=False)
    assert words(measured).startswith("bad: backbone.res3.0.conv1.norm and ")


@pytest.mark.parametrize("kind", ["bn", "sync_bn", "brn", "frozen_bn"])
def test_the_gap_to_running_statistics_is_the_planted_one(kind: str) -> None:
    model = small_model(NormConfig(kind=kind))
    given = inputs_of(model, [(96, 128)] * 2)[STEM]  # before any norm, so it does not depend on running statistics
    var, mean = torch.var_mean(given, (0, 2, 3), correction=0)
    stem = norm_layers(model)[STEM]
    stem.running_var.copy_(4 * var)
    stem.running_mean.copy_(mean - 3 * (4 * var + stem.eps).sqrt())
    measured = look(model, [(96, 128)] * 2)
    got = numbers(measured)
    assert got["kind"] == kind and got["groups"] is None and got["elements"] == 2 * 48 * 64
    assert got["gap_mean"] == pytest.approx([3, 3], rel=1e-3)
    assert got["gap_std"] == pytest.approx([math.log(2)] * 2, rel=1e-3)
    assert got["spread_mean"] is None  # one batch
    assert "means lie" in words(measured) and ("frozen_bn keeps" if kind == "frozen_bn" else "kind: gn") in words(
        measured
    )


def test_the_spread_from_batch_to_batch_is_that_of_batches() -> None:
    model = small_model(NormConfig(kind="bn"))
    batches = [make_batch([(64, 64)] * 2, first=first) for first in (0, 2)]
    got = numbers(measure(model, batches, nullcontext, None))
    means = []
    given: list[Tensor] = []
    norm_layers(model)[STEM].register_forward_pre_hook(lambda layer, x: given.append(x[0].double()))
    with torch.no_grad():
        for batch in batches:
            model.eval().features(batch.images, batch.sizes, batch.padded)
    means = torch.stack([x.mean((0, 2, 3)) for x in given]) / math.sqrt(1 + 1e-5)  # running_var is 1
    assert got["spread_mean"] == pytest.approx(float(np.median(means.numpy().std(0, ddof=1))), rel=1e-4)


def test_padding_is_a_fault_of_plain_layers_alone() -> None:
    for padding, expected in (("plain", True), ("masked", False)):
        measured = planted(nudge, NormConfig(channels_per_group=16, padding=padding))
        assert ("30 % of the training batches is padding" in words(measured, padding=0.3)) == expected


# --- no side effects


@pytest.mark.parametrize("kind", ["gn", "bn", "brn"])
def test_a_model_is_left_as_it_was(kind: str) -> None:
    model = small_model(NormConfig(kind=kind, channels_per_group=16))
    for module in model.modules():
        if hasattr(module, "memory"):
            module.memory = "balanced"
    model.train()
    model.backbone.res2.eval()
    modes, state, random = [m.training for m in model.modules()], affine_and_buffers(model), torch.get_rng_state()
    memory = [getattr(module, "memory", None) for module in model.modules()]
    look(model, [(64, 96)] * 2, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert [getattr(module, "memory", None) for module in model.modules()] == memory
    assert not any(layer._forward_pre_hooks for layer in norm_layers(model).values())
    assert all(torch.equal(value, state[name]) for name, value in affine_and_buffers(model).items())


def affine_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_bf16_measures_what_float32_does() -> None:
    model = small_model()
    wide = numbers(look(model, [(96, 128)] * 2))
    narrow = numbers(look(model, [(96, 128)] * 2, autocast=partial(torch.autocast, "cpu", torch.bfloat16)))
    assert narrow["std"] == pytest.approx(wide["std"], rel=0.02)
    assert narrow["similar"] == pytest.approx(wide["similar"], abs=0.02)


# --- a run


def run(out: Path, kind: str = "gn", **changes: Any) -> Path:
    """Train the tiny detector for 6 updates, with an evaluation after every second update."""
    tree = json.loads(json.dumps(CONFIG))
    tree["model"]["norm"] = {"kind": kind, "channels_per_group": 16}
    tree["train"] |= {"images_per_gpu": 2, "eval_every": 2, **changes}
    train(config_from_dict(tree | {"device": "cpu", "out": str(out)}, "tiny"))
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("norms") / "bn", "bn")


def test_a_run_learns_the_same_with_and_without(trained: Path, tmp_path: Path) -> None:
    without = run(tmp_path / "without", "bn", norm_images=0)
    assert not (without / "norms.jsonl").exists()
    first, second = load_checkpoint(trained / "last").groups, load_checkpoint(without / "last").groups
    assert first.keys() == second.keys()
    for group, tensors in first.items():
        assert [name for name, value in tensors.items() if not torch.equal(value, second[group][name])] == []


def test_a_run_is_measured_at_its_start_and_with_evaluations(trained: Path) -> None:
    entries = read_norms(trained)
    assert [entry["update"] for entry in entries] == [0, 2, 4, 6]
    assert numbers_in(entries[0], STEM)["drift"] == [0, 0] and numbers_in(entries[-1], STEM)["drift"][0] > 0
    assert entries[0]["padding"] is None and 0 < entries[1]["padding"] < 1  # 64 x 64 beside 72 x 72 on 96 x 96
    saved = load_checkpoint(trained / "last").groups["model"]
    assert numbers_in(entries[-1], STEM)["gamma"][2] == pytest.approx(float(saved[f"{STEM}.weight"].max()), rel=1e-4)


def numbers_in(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in entry["layers"] if layer["name"] == name)


def test_tensorboard_has_the_histograms(trained: Path) -> None:
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    found = events.Histograms(f"norm/{STEM}/gamma")
    assert [event.step for event in found] == [0, 2, 4, 6]
    assert found[0].histogram_value.num == 64 and found[0].histogram_value.min == found[0].histogram_value.max == 1
    std = events.Histograms(f"norm/{STEM}/group_std")[-1].histogram_value
    quantiles = numbers_in(read_norms(trained)[-1], STEM)["std"]
    assert 0 < std.min <= quantiles[0] <= quantiles[-1] <= std.max


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Log.append
    with monkeypatch.context() as patch:

        def killed(log: Log, name: str, line: dict[str, Any]) -> None:
            write(log, name, line)
            if name == NORMS and line["update"] == 4:
                raise KeyboardInterrupt

        patch.setattr(Log, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", "bn")
    assert [entry["update"] for entry in read_norms(tmp_path / "run")] == [0, 2, 4]
    start = read_start(tmp_path / "run")
    with (tmp_path / "run" / "norms.jsonl").open("a") as file:
        file.write('{"update": 6, "lay')
    run(tmp_path / "run", "bn")
    assert [entry["update"] for entry in read_norms(tmp_path / "run")] == [0, 2, 4, 6]
    assert all(torch.equal(value, start[name]) for name, value in read_start(tmp_path / "run").items())
    assert [entry["layers"] for entry in read_norms(tmp_path / "run")] == [e["layers"] for e in read_norms(trained)]


# --- the report


def test_the_section_says_what_is_wrong_and_shows_it(trained: Path, tmp_path: Path) -> None:
    entries = read_norms(trained)
    numbers_in(entries[-1], "fpn.output3.norm")["dead"] = 0.75
    (tmp_path / "norms.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = section(tmp_path).html
    assert "Fpn" not in page and "fpn.output3.norm: gamma of 75 % of its channels is practically 0" in page
    assert "the running statistics of bn differ from those of its batches" in page  # six updates are too few for them
    for id in ("norm-std", "norm-gamma", "norm-gap", "norm-drift", "norm-shares", "norm-padding", "norm-layers"):
        assert f'id="{id}"' in page, id
    assert page.count("<tr>") == len(entries[-1]["layers"]) + 1


def test_the_most_serious_finding_comes_first(trained: Path) -> None:
    entries = read_norms(trained)
    entries[-1]["layers"][-1]["nonfinite"] = 0.1
    found = norm_findings(entries[-1])
    kinds = [kind for kind, _ in found]
    assert kinds == sorted(kinds) and "is not finite" in found[0][1]


def test_without_a_record_the_section_says_so(tmp_path: Path) -> None:
    assert "No measurement in norms.jsonl" in section(tmp_path).html
