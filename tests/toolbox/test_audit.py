"""The audit of norm layers, at the start of training and by `gndet norms`: each warning appears if and only if due."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from lived_in import BN, CLASSES, GN, STATISTICS, config, dataset, lived_in, norm_names, save
from torch import Tensor

from gndet.cli.main import main
from gndet.config.loading import config_from_dict, config_to_yaml, with_overrides
from gndet.config.schema import Config
from gndet.errors import ConfigError
from gndet.modeling.build import build_model
from gndet.train import train
from gndet.training.norms import Audit, audit, audit_table, summary
from gndet.weights.load import initial_model

FROZEN = {"kind": "frozen_bn"}
COLUMNS = ["layer", "kind", "channels", "groups", "per group", "eps", "padding", "trained", "decay", "lr", "origin"]


@pytest.fixture(scope="module")
def bn() -> dict[str, Tensor]:
    """The weights of a detector with BN everywhere."""
    return lived_in(config(BN)).state_dict()


@pytest.fixture(scope="module")
def backbone(bn: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that holds only the backbone of `bn`."""
    return save(tmp_path_factory.mktemp("weights") / "bn", config(BN), bn, ("backbone",))


def audited(cfg: Config, world: int = 1, images: int | None = None) -> Audit:
    """Audit a config as training would at its start."""
    start = initial_model(cfg, CLASSES, images=dataset(cfg))
    return audit(start.model, start.cfg, {name: fate.what for name, fate in start.fates.items()}, world, images)


def weights(path: str, policy: str = "error", **train: Any) -> dict[str, Any]:
    return {"weights": path, "norm_policy": policy, "calibration_images": 2} | train


# --- no findings if nothing is wrong


@pytest.mark.parametrize("policy", ["hybrid", "convert", "calibrate", "affine"])
def test_usual_starts_of_a_gn_detector_are_silent(backbone: str, policy: str) -> None:
    for freeze_at in (0, 2):
        report = audited(config(train=weights(backbone, policy), backbone={"freeze_at": freeze_at}))
        assert (report.warnings, report.errors) == ([], [])
    assert audited(config()).warnings == audited(config()).errors == []


# --- frozen layers


def test_newly_initialized_norms_that_are_frozen_stop_training(backbone: str, tmp_path: Path) -> None:
    cfg = config(train=weights(backbone, "reinit"), backbone={"freeze_at": 2})
    assert audited(cfg).errors == [
        "5 norm layers from backbone.stem.norm on: frozen by model.backbone.freeze_at: 2 with random weights; set "
        "freeze_at=0, or a train.norm_policy that keeps the norms of the weights"
    ]
    with pytest.raises(ConfigError, match=r"5 norm layers from backbone\.stem\.norm on: frozen by"):
        train(cfg.model_copy(update={"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
    assert audited(config(train=weights(backbone, "reinit"))).errors == []


def test_frozen_bn_without_statistics_is_the_identity_and_warned_of(backbone: str, tmp_path: Path) -> None:
    alone = config(GN, fpn={"norm": FROZEN})
    (warning,) = audited(alone).warnings
    assert re.match(r"8 norm layers from fpn\.lateral2\.norm on: frozen_bn with untouched statistics", warning)
    assert audited(config(GN, train=weights(backbone), backbone={"norm": FROZEN})).warnings == []
    (warning,) = audited(config(FROZEN, train=weights(backbone))).warnings  # the file has no pyramid and no heads
    assert warning.startswith("10 norm layers from fpn.lateral2.norm on: frozen_bn with untouched")


def test_frozen_bn_of_a_fused_file_has_no_statistics_and_that_is_right(bn: dict[str, Tensor], tmp_path: Path) -> None:
    fused = {key: torch.zeros_like(value) if key.endswith("running_mean") else value for key, value in bn.items()}
    fused |= {key: torch.ones_like(value) for key, value in bn.items() if key.endswith("running_var")}
    path = save(tmp_path / "a", config({"kind": "frozen_bn", "eps": 0}), fused)
    assert audited(config(FROZEN, train=weights(path))).warnings == []


# --- batches


@pytest.mark.parametrize(("kind", "images"), [("bn", 1), ("bn", 7), ("brn", 2), ("sync_bn", 2)])
def test_statistics_over_few_images_are_warned_of(kind: str, images: int) -> None:
    options = {"global_batch": images, "images_per_gpu": images}
    said = [text for text in audited(config({"kind": kind}, train=options)).warnings if "statistics over" in text]
    assert len(said) == 1
    assert said[0].startswith(
        f"30 norm layers from backbone.stem.norm on: {kind} takes its statistics over {images} "
        f"image{'s' if images > 1 else ''}; below 8 they are noise"
    )


@pytest.mark.parametrize(
    ("kind", "images", "world"), [("bn", 8, 1), ("sync_bn", 4, 2), ("frozen_bn", 1, 1), ("ln", 1, 1), ("in", 1, 1)]
)
def test_enough_images_or_no_batch_statistics_are_not_warned_of(kind: str, images: int, world: int) -> None:
    cfg = config({"kind": kind}, train={"global_batch": 16, "images_per_gpu": images})
    assert not any("statistics over" in text for text in audited(cfg, world).warnings)


def test_frozen_stages_take_no_batch_statistics(backbone: str) -> None:
    cfg = config(GN, train=weights(backbone), backbone={"norm": BN, "freeze_at": 5})
    assert audited(cfg).warnings == []
    (warning,) = audited(config(GN, train=weights(backbone), backbone={"norm": BN, "freeze_at": 4})).warnings
    assert warning.startswith("5 norm layers from backbone.res5.0.conv1.norm on: bn takes its statistics over 1 image;")


def test_the_number_of_images_found_by_auto_counts() -> None:
    cfg = config({"kind": "bn"}, train={"global_batch": 16, "images_per_gpu": 16})
    assert not audited(cfg).warnings and "over 4 images" in audited(cfg, images=4).warnings[0]


@pytest.mark.parametrize(("kind", "world", "said"), [("sync_bn", 1, 1), ("sync_bn", 2, 0), ("bn", 1, 0)])
def test_sync_bn_on_one_rank_is_warned_of(kind: str, world: int, said: int) -> None:
    cfg = config({"kind": kind}, train={"global_batch": 16, "images_per_gpu": 8})
    assert sum("sync_bn on one rank is plain BN" in text for text in audited(cfg, world).warnings) == said


# --- groups and decay


def test_groups_of_one_channel_cause_a_warning_if_they_are_called_gn() -> None:
    (warning,) = audited(config(GN, fpn={"norm": {"kind": "gn", "groups": 16}})).warnings
    assert warning.startswith("8 norm layers from fpn.lateral2.norm on: groups of one channel are Instance Normal")
    assert audited(config({"kind": "in"})).warnings == []


@pytest.mark.parametrize(
    ("norm", "edge", "layers"),
    [
        ({"kind": "in"}, 32, "7 norm layers from backbone.res5.0.conv1.norm on"),
        ({"kind": "in"}, 16, "14 norm layers from backbone.res4.0.conv1.norm on"),
        ({"kind": "in"}, 33, None),
        ({"kind": "gn", "groups": 16}, 32, "2 norm layers from fpn.lateral5.norm on"),
        ({"kind": "gn", "groups": 8}, 32, None),
        ({"kind": "ln"}, 16, None),
    ],
)
@pytest.mark.parametrize("key", ["shortest_edge=[{},800]", "shortest_edge_test={}"])
def test_a_group_of_one_number_is_an_error(norm: dict[str, Any], edge: int, layers: str | None, key: str) -> None:
    errors = audited(with_overrides(config(norm), [f"data.{key.format(edge)}"], "test")).errors
    assert len(errors) == (layers is not None)
    for error in errors:
        assert error.startswith(f"{layers}: a group is one number on a picture of {edge} x {edge} pixels")


@pytest.mark.parametrize("crop", ["{size: 32}", "{size: 64, size_test: 32}", "{size: 64}"])
def test_a_classifier_s_pictures_have_the_size_of_the_crop(tmp_path: Path, crop: str) -> None:
    tree = {"task": "classification", "model": {"norm": {"kind": "in"}, "backbone": {"depth": 18}}, "data": {}}
    cfg = with_overrides(config_from_dict(tree, "test"), [f"data.crop={crop}", "data.shortest_edge_test=64"], "test")
    errors = audit(build_model(cfg.model, 2), cfg, {}, 1, None).errors
    assert len(errors) == ("32" in crop)
    for error in errors:
        assert "a picture of 32 x 32 pixels (data.crop.size, data.crop.size_test)" in error


@pytest.mark.parametrize(("edge", "wrong"), [(32, True), (64, False)])
def test_such_a_layer_gives_beta_whatever_the_picture(edge: int, wrong: bool) -> None:
    """The error of the test above is justified: such a layer outputs beta for every picture."""
    model = build_model(config({"kind": "in"}).model, len(CLASSES)).eval()
    model.backbone.res5[1].conv2.norm.bias.data.uniform_(0, 1)
    maps: list[Tensor] = []
    model.backbone.res5[1].conv2.norm.register_forward_hook(lambda module, inputs, y: maps.append(y))
    for seed in (0, 1):
        pixels = torch.randint(256, (2, 3, edge, edge), generator=torch.Generator().manual_seed(seed))
        model.features(pixels.to(torch.uint8), torch.tensor([[edge, edge]] * 2), False)
    assert torch.equal(maps[0], maps[1]) == wrong


@pytest.mark.parametrize("decay", [0.0, 1e-5, 1e-3])
def test_decay_of_gamma_and_beta_is_warned_of(decay: float) -> None:
    said = audited(config(train={"optimizer": {"norm_weight_decay": decay}})).warnings
    assert said == (
        [
            f"30 norm layers from backbone.stem.norm on: train.optimizer.norm_weight_decay: {decay:g} pulls gamma and "
            "beta to 0; published recipes use 0 (Detectron)"
        ]
        if decay
        else []
    )


# --- padding


@pytest.mark.parametrize(("old", "new"), [("plain", "masked"), ("masked", "plain"), ("plain", "plain")])
def test_gn_weights_under_another_padding_are_warned_of(tmp_path: Path, old: str, new: str) -> None:
    file = config({**GN, "padding": old})
    path = save(tmp_path / "a", file, build_model(file.model, len(CLASSES)).state_dict())
    cfg = config({**GN, "padding": new}, train=weights(path))
    said = [note for note in initial_model(cfg, CLASSES).notes if note.startswith("warning")]
    words = f"trained with padding: {old}, here it is {new}; results differ if a batch mixes picture sizes"
    parts = [] if old == new else ["backbone", "fpn"]  # the heads' regions have no padding
    assert said == [f"warning: {part}.norm was {words}" for part in parts]


# --- the output of `gndet norms`


def cells(text: str) -> list[list[str]]:
    """Return the cells, row by row, of a table whose columns are aligned and two spaces apart."""
    lines = text.splitlines()
    starts = [match.start() for match in re.finditer(r"(?<=  )\S|^\S", lines[0])]
    for line in lines:
        assert all(line[start - 2 : start] == "  " and line[start] != " " for start in starts[1:]), line
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]


def test_the_table_has_a_line_for_each_layer_that_says_what_it_is(backbone: str) -> None:
    cfg = config(train=weights(backbone, "convert"), backbone={"freeze_at": 1}, fpn={"norm": BN})
    start = initial_model(cfg, CLASSES)
    report = audit(start.model, start.cfg, {name: fate.what for name, fate in start.fates.items()}, 1)
    head, *rows = cells(audit_table(report))
    assert head == COLUMNS and [row[0] for row in rows] == norm_names(start.model)
    found = {row[0]: row[1:] for row in rows}
    eps = f"{start.model.backbone.stem.norm.eps:.3g}"
    converted = "converted from bn, damp 1"
    assert found["backbone.stem.norm"] == ["gn", "64", "4", "16", eps, "masked", "no", "0", "0", converted]
    assert found["fpn.output5.norm"] == ["bn", "16", "-", "-", "1e-05", "plain", "yes", "0", "0.02", "new"]
    assert found["backbone.res5.1.conv2.norm"][:3] == ["gn", "512", "32"]


def test_the_summary_has_a_line_for_each_kind_in_each_part(backbone: str) -> None:
    cfg = config(train=weights(backbone, "hybrid"), mask_head={"norm": {"kind": "gn", "groups": 16}})
    assert summary(audited(cfg)) == [
        "norm of backbone: 20 frozen_bn, masked, eps 1e-05, not trained, as in the file, frozen",
        "norm of fpn: 8 gn, masked, 16 channels per group, eps 1e-05, weight decay 0, lr 0.02, new",
        "norm of box_head: 1 gn, masked, 16 channels per group, eps 1e-05, weight decay 0, lr 0.02, new",
        "norm of mask_head: 1 gn, masked, 1 channel per group, eps 1e-05, weight decay 0, lr 0.02, new",
        "warning: mask_head.convs.0.norm: groups of one channel are Instance Normalization; ImageNet error 28.4 %, "
        "with GN 24.1 % (Wu & He 2018, table 1)",
    ]


def test_norms_of_a_config_and_of_its_run(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "configs" / "quickstart.yaml"
    assert main(["norms", str(path), "data.train.count=2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.split()[0].endswith(".norm") and " gn " in line for line in printed) == 31
    assert printed[0].split() == " ".join(COLUMNS).split() and not any("warning" in line for line in printed)

    schedule = {"updates": 1, "warmup": 0, "steps": [], "reference_batch": 2}
    cfg = config(train=weights(backbone, "hybrid", schedule=schedule)).model_copy(update={"out": str(tmp_path / "run")})
    (tmp_path / "tiny.yaml").write_text(config_to_yaml(cfg))
    assert main(["norms", str(tmp_path / "tiny.yaml")]) == 0
    before = capsys.readouterr().out
    train(cfg)
    assert main(["norms", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == before and "frozen_bn" in before and "as in the file, frozen" in before


def test_norms_that_cannot_work_exit_with_1(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(train=weights(backbone, "reinit"), backbone={"freeze_at": 2})
    (tmp_path / "tiny.yaml").write_text(config_to_yaml(cfg))
    assert main(["norms", str(tmp_path / "tiny.yaml")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("error: 5 norm layers from backbone.stem.norm on: frozen by model.backbone.freeze_at: 2")
    assert main(["norms", str(tmp_path / "tiny.yaml"), "train.norm_policy=convert"]) == 0


def test_norms_of_a_config_that_calibrates_need_no_pictures(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(config_to_yaml(config(train=weights(backbone, "calibrate"))))
    assert main(["norms", str(tmp_path / "tiny.yaml")]) == 0
    assert "converted from bn, damp 1" in capsys.readouterr().out


def test_a_checkpoint_run_with_another_padding_is_warned_of(
    bn: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config()
    path = save(tmp_path / "a", cfg, build_model(cfg.model, len(CLASSES)).state_dict())
    assert main(["norms", path]) == 0
    assert "padding:" not in capsys.readouterr().out
    assert main(["norms", path, "model.norm.padding=plain"]) == 0
    assert "warning: fpn.norm was trained with padding: masked, here it is plain" in capsys.readouterr().out


def test_norms_need_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "coco.yaml").write_text(yaml.safe_dump({"model": {"backbone": {"depth": 18}}}))
    assert main(["norms", str(tmp_path / "coco.yaml"), f"data.root={tmp_path}"]) == 0
    assert "mask_head.convs.3.norm" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_tell_where_its_norms_come_from_is_not_blamed(
    bn: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = config({"kind": "frozen_bn"}, train={"weights": "gone"}, backbone={"freeze_at": 2})
    path = save(tmp_path / "a", saved, {key: value for key, value in bn.items() if "num_batches" not in key})
    assert main(["norms", path]) == 0
    printed = capsys.readouterr().out
    assert "unknown" in printed and "error" not in printed and "warning" not in printed
    assert all(bn[f"backbone.stem.norm.{key}"].any() for key in STATISTICS)


def test_weights_that_do_not_fit_are_refused_and_not_shown(
    bn: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {key: value for key, value in bn.items() if not key.startswith("fpn.output3.")}
    assert main(["norms", save(tmp_path / "a", config(BN), short)]) == 2
    assert "fpn.output3.conv.weight" in capsys.readouterr().err
    assert main(["norms", save(tmp_path / "b", config(BN), bn), "model.norm.kind=gn"]) == 2
    alone = {key: value for key, value in bn.items() if key.startswith("backbone.")}
    assert main(["norms", save(tmp_path / "c", config(BN), alone)]) == 0
