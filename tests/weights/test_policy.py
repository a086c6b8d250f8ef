"""If weights have other norms than the model, train.norm_policy refuses, keeps, converts or fits them."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lived_in import BN, CLASSES, GN, NONE, STATISTICS, config, dataset, features, lived_in, norm_names, pictures, save
from models import make_batch
from run_files import assert_same
from torch import Tensor

from gndet.checkpoint import load_checkpoint, save_checkpoint
from gndet.config.loading import load_config, with_overrides
from gndet.config.schema import Config
from gndet.distributed.process import Process
from gndet.errors import CheckpointError, ConfigError, TrainingError
from gndet.evaluation.detector import evaluate_checkpoint, load_detector
from gndet.evaluation.evaluate import scalars
from gndet.modeling.build import build_model
from gndet.modeling.mask_rcnn import MaskRCNN
from gndet.modeling.norms.layers import FrozenBatchNorm, GroupNorm
from gndet.train import train
from gndet.training.averaging import WeightAverage
from gndet.weights.convert import compare_with_original, convert_batch_norm
from gndet.weights.foreign.export import export_weights
from gndet.weights.load import InitialModel, initial_model, load_weights
from gndet.weights.policy import reference_norms
from gndet.weights.read import read_source

ALONE, WHOLE = ("backbone",), ("backbone", "fpn", "rpn", "box_head", "mask_head")
NORMED = tuple(part for part in WHOLE if part != "rpn")  # the RPN has no norm


@pytest.fixture(scope="module")
def bn() -> MaskRCNN:
    """Return a detector with BN everywhere."""
    return lived_in(config(BN))


@pytest.fixture(scope="module")
def files(bn: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], str]:
    """Save that detector, and its backbone alone, as checkpoints."""
    folder = tmp_path_factory.mktemp("bn")
    return {parts: save(folder / str(len(parts)), config(BN), bn.state_dict(), parts) for parts in (ALONE, WHOLE)}


def start(weights: str, policy: str, norm: dict[str, Any] = GN, images: bool = False, **model: Any) -> InitialModel:
    """Return the model that training starts with."""
    train = {"weights": weights, "norm_policy": policy, "calibration_images": 4}
    cfg = config(norm, train=train, **model)
    return initial_model(cfg, CLASSES, images=dataset(cfg) if images else None)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def by_hand(state: dict[str, Tensor], model: MaskRCNN, name: str, damp: float = 1.0, bn_eps: float = 1e-5) -> Any:
    """Convert one BN layer of a file by the closed form."""
    numbers = (state[f"{name}.{key}"] for key in ("weight", "bias", *STATISTICS))
    return convert_batch_norm(*numbers, bn_eps=bn_eps, groups=model.get_submodule(name).groups, eps=1e-5, damp=damp)


# --- what each policy does


@pytest.mark.parametrize("parts", [ALONE, WHOLE])
def test_without_a_policy_another_norm_is_refused_and_every_choice_is_named(
    files: dict[tuple[str, ...], str], parts: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        start(files[parts], "error")
    text = str(caught.value)
    assert "its backbone has bn, this model has gn (16 channels per group)" in text
    for policy in ("hybrid", "convert", "calibrate", "affine", "reinit"):
        assert f"train.norm_policy={policy} " in text
    assert "model.backbone.norm={kind: bn}" in text


@pytest.mark.parametrize("parts", [ALONE, WHOLE])
def test_hybrid_keeps_the_parts_of_the_file_as_frozen_bn_and_no_others(
    bn: MaskRCNN, files: dict[tuple[str, ...], str], parts: tuple[str, ...]
) -> None:
    model, cfg, _, fates = start(files[parts], "hybrid")
    norms = cfg.model.part_norms()
    kinds = {part: norms[part].kind for part in cfg.model.parts}
    assert kinds == {part: "none" if part == "rpn" else "frozen_bn" if part in parts else "gn" for part in WHOLE}
    state, file = model.state_dict(), bn.state_dict()
    names = [name for name in norm_names(model) if name.partition(".")[0] in parts]
    assert list(fates) == names and {fate.what for fate in fates.values()} == {"as in the file, frozen"}
    for name in names:
        assert all(
            torch.equal(state[f"{name}.{key}"], file[f"{name}.{key}"]) for key in ("weight", "bias", *STATISTICS)
        )
    batch = pictures(cfg)
    got, expected = features(model, batch), features(bn, batch)
    for level in [level for level in got if level.startswith("C") or "fpn" in parts]:
        torch.testing.assert_close(got[level], expected[level], rtol=1e-4, atol=1e-4)
    if parts == WHOLE:
        boxes = [net.detect(batch.images, batch.sizes, batch.padded).boxes for net in (model, bn)]
        torch.testing.assert_close(*boxes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("parts", [ALONE, WHOLE])
def test_convert_is_the_closed_form_in_every_layer_and_leaves_the_rest(
    bn: MaskRCNN, files: dict[tuple[str, ...], str], parts: tuple[str, ...]
) -> None:
    model, cfg, _, fates = start(files[parts], "convert")
    assert {norm.kind for norm in cfg.model.part_norms().values()} == {"gn", "none"}
    state, file = model.state_dict(), bn.state_dict()
    names = [name for name in norm_names(model) if name.partition(".")[0] in parts]
    for name in names:
        new = by_hand(file, model, name)
        assert torch.equal(state[f"{name}.weight"], new.gamma) and torch.equal(state[f"{name}.bias"], new.beta)
        assert model.get_submodule(name).eps == new.eps > 1e-5
        assert fates[name].what == "converted from bn, damp 1" and fates[name].expected_error == new.expected_error
    others = [key for key in state if key.partition(".")[0] in parts and ".norm." not in key]
    assert list(fates) == names and all(torch.equal(state[key], file[key]) for key in others)


@pytest.mark.parametrize("damp", [0, 4])
def test_the_damping_is_the_configs(bn: MaskRCNN, files: dict[tuple[str, ...], str], damp: float) -> None:
    cfg = config(train={"weights": files[ALONE], "norm_policy": "convert", "norm_damp": damp})
    model = initial_model(cfg, CLASSES).model
    for name in norm_names(model.backbone):
        new = by_hand(bn.backbone.state_dict(), model.backbone, name, damp)
        assert model.backbone.get_submodule(name).eps == new.eps
        assert torch.equal(model.backbone.get_submodule(name).weight, new.gamma)


def test_a_layers_own_eps_outlives_files_rebuilding_averaging_and_copies(
    files: dict[tuple[str, ...], str], tmp_path: Path
) -> None:
    model, cfg, _, _ = start(files[WHOLE], "convert")
    eps = {name: model.get_submodule(name).eps for name in norm_names(model)}
    assert len(set(eps.values())) == len(eps)
    save_checkpoint(tmp_path / "a", {"model": model.state_dict()}, {})
    rebuilt = build_model(cfg.model, len(CLASSES))
    rebuilt.load_state_dict(load_checkpoint(tmp_path / "a").groups["model"])
    average = WeightAverage(model, 0.9)
    average.update()
    from_average = build_model(cfg.model, len(CLASSES))
    from_average.load_state_dict(average.module.state_dict())
    for other in (rebuilt, average.module, from_average, copy.deepcopy(model)):
        assert {name: other.get_submodule(name).eps for name in eps} == eps
    batch = pictures(cfg)
    assert same(features(rebuilt, batch), features(model, batch))


def test_a_layers_own_eps_lies_where_its_weights_lie() -> None:
    """NCCL cannot broadcast CPU tensors."""
    norm = GroupNorm(32, 2, 1e-5, masked=True).to("meta")
    norm.eps = 0.5
    assert {tensor.device.type for tensor in norm.state_dict().values()} == {"meta"}


def test_calibration_comes_nearer_to_the_file_than_the_closed_form(files: dict[tuple[str, ...], str]) -> None:
    converted, fitted = (start(files[WHOLE], policy, images=True) for policy in ("convert", "calibrate"))
    assert list(fitted.fates) == norm_names(fitted.model)
    for name, fate in fitted.fates.items():
        assert fate.what == "converted from bn, damp 1, fitted on 4 images"
        assert fate.measured_error <= converted.fates[name].measured_error, name
        changed = not torch.equal(fitted.model.get_submodule(name).weight, converted.model.get_submodule(name).weight)
        assert changed and fitted.model.get_submodule(name).eps == converted.model.get_submodule(name).eps, name
    assert {name.partition(".")[0] for name in fitted.fates} == set(NORMED)
    assert fitted.model.backbone.stem.norm.weight[5] == 0  # what is off stays off


def test_calibration_measures_what_the_two_networks_differ_by(bn: MaskRCNN, files: dict[tuple[str, ...], str]) -> None:
    model, cfg, notes, _ = start(files[WHOLE], "calibrate", images=True)
    batch = pictures(cfg)
    got, expected = features(model, batch), features(bn, batch)
    words = []
    for level, t in expected.items():
        error = (got[level] - t).norm() / (t - t.mean((0, 2, 3), keepdim=True)).norm()
        words.append(f"{level} {error:.2f}")
    assert f"features against the file's own norms, relative error on 4 images: {', '.join(words)}" in notes


def test_calibration_twice_gives_the_same_weights(files: dict[tuple[str, ...], str]) -> None:
    first, second = (start(files[WHOLE], "calibrate", images=True) for _ in range(2))
    assert same(first.model.state_dict(), second.model.state_dict()) and first.fates == second.fates
    assert any(key.endswith("norm.eps") for key in first.model.state_dict())


@pytest.mark.parametrize("kind", ["bn", "frozen_bn"])
def test_padding_beside_the_pictures_does_not_enter_a_calibration(bn: MaskRCNN, tmp_path: Path, kind: str) -> None:
    file_cfg = config({"kind": kind})
    source = read_source(save(tmp_path / "a", file_cfg, bn.state_dict(), ("backbone", "fpn")), file_cfg.train.source)
    cfg, results = config(train={"norm_policy": "calibrate"}), []
    for canvas in ((96, 96), (160, 128)):
        model = build_model(cfg.model, len(CLASSES))
        load_weights(model, source, CLASSES, cfg)
        batch = make_batch([(64, 96), (96, 64)], canvas)
        layers, _ = compare_with_original(model, reference_norms(source, model, cfg.model), batch, fit=True)
        gammas = {name: model.get_submodule(name).weight for name in layers}
        results.append((gammas, layers))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


def test_affine_copies_gamma_and_beta_by_name(bn: MaskRCNN, files: dict[tuple[str, ...], str]) -> None:
    model, _, _, fates = start(files[WHOLE], "affine")
    state, file = model.state_dict(), bn.state_dict()
    assert all(torch.equal(state[key], file[key]) for key in state)
    assert {fate.what for fate in fates.values()} == {"gamma and beta of bn copied by name"}
    assert all(model.get_submodule(name).eps == 1e-5 for name in fates)


def test_affine_from_gn_gives_bn_its_gamma_and_beta_and_fresh_statistics(tmp_path: Path) -> None:
    file = lived_in(config()).state_dict()
    model = start(save(tmp_path / "a", config(), file), "affine", BN).model
    state = model.state_dict()
    assert all(torch.equal(state[key], file[key]) for key in state if key in file)
    assert all(model.get_submodule(name).running_var.eq(1).all() for name in norm_names(model))


@pytest.mark.parametrize("norm_cfg", [GN, NONE])
def test_reinit_takes_the_convolutions_only(bn: MaskRCNN, files: dict[tuple[str, ...], str], norm_cfg: dict) -> None:
    model, _, _, fates = start(files[WHOLE], "reinit", norm_cfg, images=True)
    state, file = model.state_dict(), bn.state_dict()
    fresh = initial_model(config(norm_cfg), CLASSES).model.state_dict()
    for key, value in state.items():
        anew = ".norm." in key or (norm_cfg == NONE and key.endswith(".conv.bias") and key not in file)
        assert torch.equal(value, fresh[key] if anew else file[key]), key
    assert {fate.what for fate in fates.values()} == {"anew"} and len(fates) == len(norm_names(bn))


# --- files that not every policy can start from


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same network with its statistics folded into gamma and beta, as in Detectron's files."""
    result = dict(state)
    for name in {key.rpartition(".")[0] for key in state if key.endswith("running_var")}:
        sigma = (state[f"{name}.running_var"] + 1e-5).sqrt()
        result[f"{name}.weight"] = state[f"{name}.weight"] / sigma
        result[f"{name}.bias"] = state[f"{name}.bias"] - state[f"{name}.running_mean"] * result[f"{name}.weight"]
        result[f"{name}.running_mean"] = torch.zeros_like(sigma)
        result[f"{name}.running_var"] = torch.ones_like(sigma)
    return result


def test_fused_bn_cannot_be_converted_and_can_be_calibrated(bn: MaskRCNN, tmp_path: Path) -> None:
    file_cfg = config({"kind": "frozen_bn", "eps": 0})
    path = save(tmp_path / "a", file_cfg, fused(bn.state_dict()), ALONE, fused=True)
    with pytest.raises(CheckpointError, match=r"convert is impossible: .* statistics are gone; calibrate measures"):
        start(path, "convert")
    model, cfg, _, fates = start(path, "calibrate", images=True)
    assert {fate.what for fate in fates.values()} == {"gamma and beta of frozen_bn, fitted on 4 images"}
    batch = pictures(cfg)
    t, affine = features(bn, batch)["C5"], features(start(path, "affine").model, batch)["C5"]
    got = features(model, batch)["C5"]
    assert (got - t).norm() < 0.6 * (t - t.mean((0, 2, 3), keepdim=True)).norm() < 0.6 * (affine - t).norm()


def test_a_pyramid_without_norms_can_be_calibrated_or_newly_initialized(tmp_path: Path) -> None:
    file_cfg = config(GN, fpn={"norm": NONE})
    file = lived_in(file_cfg)
    path = save(tmp_path / "a", file_cfg, file.state_dict(), ("backbone", "fpn"))
    for policy in ("convert", "affine", "hybrid"):
        with pytest.raises(
            CheckpointError, match=rf"its fpn has none, this model has gn (.|\n)*{policy} is impossible"
        ):
            start(path, policy)
    anew, fitted = start(path, "reinit"), start(path, "calibrate", images=True)
    assert {name.partition(".")[0]: fate.what for name, fate in fitted.fates.items()} == {
        "backbone": "as in the file", "fpn": "anew, fitted on 4 images",
    }  # fmt: skip
    batch = pictures(fitted.cfg)
    truth, got, unfitted = (features(model, batch) for model in (file, fitted.model, anew.model))
    for level in ("P2", "P3", "P4", "P5"):
        torch.testing.assert_close(got["C5"], truth["C5"])
        t = truth[level]
        assert (got[level] - t).norm() < 0.7 * t.norm() and (got[level] - t).norm() < (unfitted[level] - t).norm()


def test_gn_with_other_groups_needs_a_policy_and_can_be_calibrated(tmp_path: Path) -> None:
    file_cfg = config({"kind": "gn", "groups": 8})
    file = lived_in(file_cfg)
    path = save(tmp_path / "a", file_cfg, file.state_dict(), ALONE)
    with pytest.raises(CheckpointError, match=r"gn \(8 groups\)(.|\n)*model\.backbone\.norm=\{kind: gn, groups: 8\} "):
        start(path, "error")
    for policy in ("convert", "hybrid"):
        with pytest.raises(CheckpointError, match=f"{policy} is impossible"):
            start(path, policy)
    model, cfg, _, _ = start(path, "calibrate", images=True)
    batch = pictures(cfg)
    t, got, copied = (features(net, batch)["C5"] for net in (file, model, start(path, "affine").model))
    assert (got - t).norm() < (copied - t).norm()
    kept = start(path, "error", backbone={"norm": {"kind": "gn", "groups": 8}}).model
    assert torch.equal(features(kept, batch)["C5"], t)


def test_ln_is_gn_with_one_group(tmp_path: Path) -> None:
    file_cfg = config({"kind": "ln"})
    file = lived_in(file_cfg)
    model = start(save(tmp_path / "a", file_cfg, file.state_dict()), "error", {"kind": "gn", "groups": 1}).model
    assert same(model.state_dict(), file.state_dict())
    batch = pictures(file_cfg)
    assert same(features(model, batch), features(file, batch))


@pytest.mark.parametrize("kind", ["bn", "gn"])
def test_standardized_weights_become_plain_ones_exactly_and_not_the_reverse(tmp_path: Path, kind: str) -> None:
    plain = {"kind": kind, "groups": 8}
    file_cfg = config({**plain, "weight_standardization": True})
    file = lived_in(file_cfg)
    model = start(save(tmp_path / "a", file_cfg, file.state_dict()), "error", plain).model
    batch = pictures(file_cfg)
    torch.testing.assert_close(features(model, batch), features(file, batch), rtol=1e-5, atol=1e-5)
    back = save(tmp_path / "b", config(plain), model.state_dict())
    with pytest.raises(CheckpointError, match=rf"its backbone has {kind}.*, this model has {kind}.* with weight stand"):
        start(back, "error", {**plain, "weight_standardization": True})
    with pytest.raises(CheckpointError, match=r"convert is impossible: .*weight standardization changes the conv"):
        start(back, "convert", {"kind": "gn", "groups": 8, "weight_standardization": True})


@pytest.mark.parametrize("policy", ["hybrid", "convert", "calibrate", "affine"])
def test_a_convolution_without_a_norm_comes_over_as_it_is(tmp_path: Path, policy: str) -> None:
    bare = {"num_convs": 2, "norm_last": False}
    file_cfg = config(BN, box_head=bare)
    file, last = lived_in(file_cfg), f"box_head.convs.{file_cfg.model.box_head.num_convs - 1}"
    saved = save(tmp_path / "a", file_cfg, file.state_dict())
    model, _, _, fates = start(saved, policy, images=policy == "calibrate", box_head=bare)
    state = model.state_dict()
    for key in ("weight", "bias"):
        assert torch.equal(state[f"{last}.conv.{key}"], file.state_dict()[f"{last}.conv.{key}"])
    assert f"{last}.norm" not in fates and "box_head.convs.0.norm" in fates
    with pytest.raises(CheckpointError, match=rf"(.|\n)*{last}.norm.weight: absent(.|\n)*box_head.norm_last: False"):
        start(saved, policy, box_head={"num_convs": 2})


def test_only_standardized_weights_are_folded(tmp_path: Path) -> None:
    plain, bare = {"kind": "gn", "groups": 8}, {"norm_last": False}
    file_cfg = config({**plain, "weight_standardization": True}, box_head=bare)
    file = lived_in(file_cfg)
    model = start(save(tmp_path / "a", file_cfg, file.state_dict()), "error", plain, box_head=bare).model
    batch = pictures(file_cfg)
    got, expected = (net.eval().detect(batch.images, batch.sizes, batch.padded) for net in (model, file))
    assert expected.valid.any() and torch.equal(got.labels, expected.labels)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-5)


FRN, EVONORM = {"kind": "frn"}, {"kind": "evonorm_s0", "groups": 8}


@pytest.mark.parametrize("own", [FRN, EVONORM], ids=str)
def test_norms_that_replace_relu_load_their_own_weights_and_others_only_by_name(
    own: dict[str, Any], tmp_path: Path
) -> None:
    """tau and v are loaded, or start at 0 and 1, and are not left in a model with ReLU."""
    model, gn = lived_in(config(own)), lived_in(config(GN))
    saved = {name: save(tmp_path / name, cfg, net.state_dict()) for name, cfg, net in (
        ("own", config(own), model), ("gn", config(GN), gn))}  # fmt: skip
    assert same(start(saved["own"], "error", own).model.state_dict(), model.state_dict())
    for weights, norm in ((saved["gn"], own), (saved["own"], GN), (saved["own"], {**own, "eps": 0.1})):
        with pytest.raises(CheckpointError, match="the same numbers mean something else"):
            start(weights, "error", norm)
        for policy in ("convert", "calibrate", "hybrid"):
            with pytest.raises(CheckpointError, match=f"{policy} is impossible"):
                start(weights, policy, norm)
    for policy in ("affine", "reinit"):
        found = start(saved["gn"], policy, own).model.state_dict()
        new = [tensor for name, tensor in found.items() if name.endswith((".tau", ".v"))]
        assert new and all(bool((tensor == (own is EVONORM)).all()) for tensor in new)
        assert start(saved["own"], policy, GN).model.state_dict().keys() == gn.state_dict().keys()
    with pytest.raises(ConfigError, match=rf"model\.backbone\.norm: {own['kind']}; torchvision has no such norm"):
        export_weights(model.state_dict(), config(own).model, CLASSES, "torchvision")


@pytest.mark.parametrize("own", [FRN, EVONORM], ids=str)
def test_the_options_that_the_error_offers_load_the_file(own: dict[str, Any], tmp_path: Path) -> None:
    cfg = config({**own, "eps": 1e-6})  # the FRN paper's
    path = save(tmp_path / "file", cfg, lived_in(cfg).state_dict())
    mine = with_overrides(config(own), [f"train.weights={path}"], "test")
    with pytest.raises(CheckpointError, match="as in the file") as refused:
        initial_model(mine, CLASSES)
    offered = re.findall(r"model\.\w+\.norm=\{.*?\}", str(refused.value))
    assert offered
    initial_model(with_overrides(mine, offered, "test"), CLASSES)


@pytest.mark.parametrize("file_eps", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("norm_cfg", [{"kind": "bn", "eps": 1e-3}, {"kind": "frozen_bn", "eps": 0.0}])
def test_bn_computes_the_same_with_another_eps(
    bn: MaskRCNN, tmp_path: Path, file_eps: float, norm_cfg: dict[str, Any]
) -> None:
    file_cfg = config({"kind": "bn", "eps": file_eps})
    file = build_model(file_cfg.model, len(CLASSES))
    file.load_state_dict(bn.state_dict())
    for name in norm_names(file):
        file.get_submodule(name).running_var *= 1e-3  # so that eps matters
    model = start(save(tmp_path / "a", file_cfg, file.state_dict(), ALONE), "error", norm_cfg).model
    batch = pictures(file_cfg)
    got, expected = features(model, batch), features(file, batch)
    for level in ("C2", "C3", "C4", "C5"):
        torch.testing.assert_close(got[level], expected[level], rtol=1e-4, atol=1e-4 * expected[level].abs().max())


def test_each_files_own_bn_eps_is_in_the_closed_form(bn: MaskRCNN, tmp_path: Path) -> None:
    file_cfg = config({"kind": "bn", "eps": 0.05})
    model = start(save(tmp_path / "a", file_cfg, bn.state_dict(), ALONE), "convert").model
    for name in norm_names(model.backbone):
        new = by_hand(bn.backbone.state_dict(), model.backbone, name, bn_eps=0.05)
        assert torch.equal(model.backbone.get_submodule(name).weight, new.gamma)


@pytest.mark.parametrize(("policy", "norm_cfg"), [("error", BN), ("convert", GN)])
def test_another_pixel_std_is_folded_into_the_stem(
    bn: MaskRCNN, tmp_path: Path, policy: str, norm_cfg: dict[str, Any]
) -> None:
    file_cfg = config(BN, pixel_std=[1.0, 2.0, 4.0])
    path = save(tmp_path / "a", file_cfg, bn.state_dict(), ALONE)
    unfolded, folded = (start(path, policy, norm_cfg, **std) for std in ({"pixel_std": [1.0, 2.0, 4.0]}, {}))
    assert "folded into the stem" in "".join(folded.notes) and "folded" not in "".join(unfolded.notes)
    batch = pictures(file_cfg)
    got, expected = (features(initial.model, batch) for initial in (folded, unfolded))
    for level in ("C2", "C3", "C4", "C5"):
        torch.testing.assert_close(got[level], expected[level], rtol=1e-4, atol=1e-4 * expected[level].abs().max())


# --- files that cannot be loaded


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("running_var", lambda x: -x, r"backbone\.res5\.1\.conv2\.norm: running variance of channel 0 is -"),
        ("running_mean", None, r"(.|\n)*backbone\.res5\.1\.conv2\.norm\.running_mean: absent from the file"),
        (
            "weight",
            lambda x: x[:8],
            r"(.|\n)*backbone\.res5\.1\.conv2\.norm\.weight: \[8\] in the file, expected \[512\]",
        ),
    ],
)
def test_a_load_that_fails_names_file_and_layer_and_leaves_the_model_untouched(
    bn: MaskRCNN, tmp_path: Path, key: str, change: Any, message: str
) -> None:
    state, cfg = dict(bn.state_dict()), config(train={"norm_policy": "convert"})
    old = state.pop(f"backbone.res5.1.conv2.norm.{key}")
    if change is not None:
        state[f"backbone.res5.1.conv2.norm.{key}"] = change(old).clone()
    saved = save(tmp_path / "a", config(BN), state, ALONE)
    model = build_model(cfg.model, len(CLASSES))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'a'}: {message}"):
        source = read_source(saved, cfg.train.source)  # compares the shapes
        load_weights(model, source, CLASSES, cfg)
    assert same(model.state_dict(), before)


def test_groups_that_do_not_divide_a_layer_name_part_and_divisors(files: dict[tuple[str, ...], str]) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.backbone: norm groups: 24 does not divide 64 channels; these do: 1, 2, 4"
    ):
        start(files[ALONE], "convert", {"kind": "gn", "groups": 24})


def test_calibration_without_pictures_is_refused(files: dict[tuple[str, ...], str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.norm_policy: calibrate needs training images"):
        start(files[ALONE], "calibrate")


# --- training


def forget(folder: Path, update: int) -> None:
    """Remove the newest checkpoint of a finished run, as if the run had been killed earlier."""
    shutil.rmtree(folder / "checkpoints" / f"update-{update:07d}")


def run_config(out: Path, weights: Path, policy: str, **train: Any) -> Config:
    schedule = {"updates": 4, "warmup": 1, "steps": [3], "reference_batch": 2}
    options = {"weights": str(weights), "norm_policy": policy, "schedule": schedule, "calibration_images": 4} | train
    return config(train=options).model_copy(update={"out": str(out)})


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        pytest.param("hybrid", "as in the file, frozen", marks=pytest.mark.slow),
        ("convert", "converted from bn, damp 1"),
        pytest.param("calibrate", "converted from bn, damp 1, fitted on 4 images", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_keeps_its_norms_and_needs_the_weights_no_more(
    bn: MaskRCNN, tmp_path: Path, policy: str, what: str
) -> None:
    save(tmp_path / "bn", config(BN), bn.state_dict(), ALONE)
    for name in ("unbroken", "killed"):
        train(run_config(tmp_path / name, tmp_path / "bn", policy))
    forget(tmp_path / "killed", 4)
    shutil.rmtree(tmp_path / "bn")
    train(run_config(tmp_path / "killed", tmp_path / "bn", policy))
    assert_same(tmp_path / "unbroken", tmp_path / "killed")

    saved = load_checkpoint(tmp_path / "killed" / "last")
    detector = load_detector(tmp_path / "killed", [], Process(0, 1, torch.device("cpu")))
    names = norm_names(detector.model.backbone)
    assert saved.meta["norms"] == {f"backbone.{name}": what for name in names}
    assert same(detector.model.state_dict(), saved.groups["ema"])
    assert detector.config.model.part_norms()["fpn"].kind == "gn"
    for name in names:
        norm = detector.model.backbone.get_submodule(name)
        if policy == "hybrid":
            file = {key: bn.state_dict()[f"backbone.{name}.{key}"] for key in ("weight", "bias", *STATISTICS)}
            assert isinstance(norm, FrozenBatchNorm) and same(norm.state_dict(), file)
        else:
            assert norm.eps == by_hand(bn.backbone.state_dict(), detector.model.backbone, name).eps > 1e-5


def test_hybrid_trains_what_is_not_frozen_and_evaluates_and_predicts(
    files: dict[tuple[str, ...], str], tmp_path: Path
) -> None:
    values = train(run_config(tmp_path / "run", Path(files[WHOLE]), "hybrid"))
    detector = load_detector(tmp_path / "run", [], Process(0, 1, torch.device("cpu")))
    _, evaluation = evaluate_checkpoint(detector, Process(0, 1, torch.device("cpu")))
    assert scalars(evaluation) == pytest.approx(values, nan_ok=True)
    first = start(files[WHOLE], "hybrid").model.state_dict()
    for key, value in detector.model.state_dict().items():
        assert torch.equal(value, first[key]) == (".norm." in key), key
    restarted = start(str(tmp_path / "run"), "error", {"kind": "frozen_bn"}).model  # weights may be a run
    assert same(restarted.state_dict(), detector.model.state_dict())


def test_another_policy_is_another_run(files: dict[tuple[str, ...], str], tmp_path: Path) -> None:
    train(run_config(tmp_path / "run", Path(files[ALONE]), "hybrid"))
    forget(tmp_path / "run", 4)
    with pytest.raises(TrainingError, match=r"another config(.|\n)*norm_policy: 'hybrid' there, 'convert' now"):
        train(run_config(tmp_path / "run", Path(files[ALONE]), "convert"))
    assert load_config(tmp_path / "run" / "config.yaml").train.norm_policy == "hybrid"
