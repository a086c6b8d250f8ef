"""The config reader: chains, overrides, and its messages about mistakes."""

import os
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import ValidationError

from gndet.config.loading import config_files, config_from_dict, config_to_yaml, load_config, with_overrides
from gndet.config.schema import Config
from gndet.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_child_overrides_its_base_key_by_key_and_norm_whole(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model:\n  norm: {kind: gn, groups: 16}\n  fpn: {channels: 64}\nseed: 3\n")
    child = write(tmp_path, "child.yaml", "base: base.yaml\nmodel:\n  norm: {kind: ln}\n")
    cfg = load_config(child)
    assert (cfg.model.norm.kind, cfg.model.norm.groups) == ("ln", 32)
    assert (cfg.model.fpn.channels, cfg.seed, cfg.out) == (64, 3, "runs/child")


def test_overrides_win_and_change_one_key(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model:\n  norm: {kind: gn, groups: 16}\n")
    cfg = load_config(path, ["model.norm.eps=1e-3", "model.backbone.norm.kind=frozen_bn", "data.shortest_edge=[96]"])
    assert (cfg.model.norm.groups, cfg.model.norm.eps) == (16, 1e-3)
    assert cfg.model.backbone.norm.kind == "frozen_bn" and cfg.data.shortest_edge == (96,)
    assert load_config(path, ["model.norm.kind=bn"]).model.norm.kind == "bn"


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "a.yaml", "train: {optimizer: {lr: 1e-3}}\n"), ["train.ema=0.99"])
    assert load_config(write(tmp_path, "b.yaml", config_to_yaml(cfg))) == cfg
    assert config_from_dict(cfg.model_dump(mode="json"), "x") == cfg
    assert cfg.train.optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  nrom: {kind: gn}\n", r"a\.yaml:2: unknown key model\.nrom; did you mean 'norm'"),
        ("train:\n  lr: 0.1\n", r"a\.yaml:2: unknown key train\.lr; did you mean train\.optimizer\.lr"),
        ("model:\n  norm:\n    kind: batch\n", r"a\.yaml:3: model\.norm\.kind: got 'batch'; .*'gn'.*'brn'"),
        ("model:\n  norm: {groups: many}\n", r"a\.yaml:2: model\.norm\.groups: got 'many'; .*integer"),
        ("train: {ema: .nan}\n", r"a\.yaml:1: train\.ema"),
        ("seed: 1\nseed: 2\n", r"a\.yaml:2: key seed is given twice"),
        ("model: {norm: {kind: bn, padding: masked}}\n", r"padding: masked is not available for kind: bn"),
        ("model: {box_head: {kind: 2fc, norm_last: false}}\n", r"norm_last: false; kind: 2fc has no norms of its"),
        ("data: {train: {share: 0.5}}\n", r"a\.yaml:1: data: train\.share: only val takes a share"),
        ("data: {train: {kind: shapes}, val: {share: 0.2}}\n", r"a\.yaml:1: data: val\.share takes .* are drawn"),
        ("data: {val: {share: 0.2, images: x}}\n", r"a\.yaml:1: data: val\.share takes images of train"),
        ("train: {global_batch: 3, images_per_gpu: 4}\n", r"train\.images_per_gpu: 4 is more than .*batch: 3"),
        (
            "model: {norm: {kind: bn}}\ntrain: {global_batch: 3}\n",
            r"global_batch: 3 is not a multiple of .*, and .*bn",
        ),
        ("- 1\n- 2\n", r"a\.yaml: expected `key: value` lines, got list"),
        ("model: [\n", r"a\.yaml: not valid YAML"),
        ("? [a, b]\n: 1\n", r"a\.yaml:1: a key is a word|a\.yaml: not valid YAML"),
        ("data: {shortest_edge: []}\n", r"data\.shortest_edge: got \[\]"),
        ("model: {pixel_std: [0, 1, 1]}\n", r"model\.pixel_std\.0: got 0; .*greater than 0"),
        ("base: missing.yaml\n", r"missing\.yaml: cannot read the config: No such file"),
        ("base: a.yaml\n", r"`base:` leads back to this file"),
        (
            "x: !!python/object/apply:os.system ['true']\n",
            r"a\.yaml: not valid YAML: could not determine a constructor",
        ),
    ],
)
def test_mistakes_name_file_line_key_and_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path, "a.yaml", text))


def test_a_rule_on_several_options_names_the_line_of_the_one_it_is_about(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model:\n  box_head:\n    kind: 2fc\n    norm_last: false\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:4: model\.box_head: norm_last: false; .*; expected true"):
        load_config(path, ["model.box_head.fc_channels=32"])


def test_a_run_folder_given_as_a_config_is_told_where_its_config_is(tmp_path: Path) -> None:
    config = write(tmp_path, "config.yaml", "")
    with pytest.raises(ConfigError, match=f"cannot read the config: .*; the config of this run is {config}$"):
        load_config(tmp_path)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "seeed: 1\nmodel: {masks: perhaps}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.ema=2"])
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "model.norm.kind=[", "model.norm=3"])
def test_bad_overrides_are_refused_and_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(tmp_path, "a.yaml", ""), [override])


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="values once its aliases are expanded"):
        load_config(write(tmp_path, "a.yaml", "\n".join(lines)))


def test_overrides_of_a_stored_config(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "a.yaml", ""))
    assert with_overrides(cfg, ["data.root=elsewhere"], "x").data.root == "elsewhere"
    with pytest.raises(ConfigError, match=r"override 'data\.rot=1': unknown key data\.rot; did you mean 'root'"):
        with_overrides(cfg, ["data.rot=1"], "x")


def test_a_packaged_config_is_found_by_its_name_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(REPOSITORY / "configs" / "quickstart.yaml")
    assert load_config("quickstart", ["seed=5"]).out == "runs/quickstart"
    assert load_config("mask_rcnn_r50_fpn_gn_2x").train.schedule.updates == 180_000
    assert [path.parent.name for path in config_files("mask_rcnn_r50_fpn_gn_2x")] == ["configs", "_base"]


def test_a_file_of_the_user_comes_before_a_packaged_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "quickstart", "seed: 9\n")
    assert load_config("quickstart").seed == 9
    (tmp_path / "quickstart").unlink()
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(ConfigError, match=r"^quickstart: .* directory; the packaged config .* is .*/quickstart\.yaml$"):
        load_config("quickstart")


def test_an_unknown_name_is_reported_with_the_packaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^'quikstart': no such file, .*; did you mean 'quickstart'\?\n.*, quickstart, .*"
    ):
        load_config("quikstart")
    with pytest.raises(ConfigError, match=r"^'x{199}\.\.\.: no such file"):
        load_config("x" * 5000)  # longer than a file name may be
    with pytest.raises(ConfigError, match=r"configs/quickstart\.yaml: .*; the packaged config of this name is /"):
        load_config("configs/quickstart.yaml")
    with pytest.raises(ConfigError, match=r"^runs/mine: cannot read the config: No such file or directory$"):
        load_config("runs/mine")


def test_a_data_folder_in_place_of_a_config_names_the_config_that_trains_on_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"cannot read the config: .*; own_data data\.root={tmp_path} trains on"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["a\ud83d", os.fsdecode(b"caf\xe9")], ids=["half an emoji", "Latin-1"])
def test_a_text_that_is_not_unicode_is_refused_with_its_key(tmp_path: Path, text: str) -> None:
    words = "which is not valid Unicode"
    with pytest.raises(ConfigError, match=f"override .*{words}.* start gndet in this folder"):
        load_config("quickstart", [f"out={text}"])
    for value in ({"out": text}, {"data": {"root": text}}, {"data": {"classes": ["cat", text]}}):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(value))
        with pytest.raises(ConfigError, match=rf"c.yaml:\d: (out|data.root|data.classes): got .*{words}"):
            load_config(tmp_path / "c.yaml")
    with pytest.raises(ValidationError, match=words):
        Config(out=text)


CROPPED = "task: classification\ndata: {crop: {size: 224}}\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.neck=c4", "neck: c4; a classifier works on the backbone's last map; expected fpn"),
        ("train.compile=default", r"like data\.canvases=\[\[224,224\]\]"),
    ],
)
def test_options_that_do_not_fit_a_classifier_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path, "a.yaml", CROPPED), [override])


def test_edges_follow_another_crop_unless_they_were_chosen(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, "a.yaml", CROPPED))
    assert (cfg.data.shortest_edge, cfg.data.shortest_edge_test) == ((224,), 256)
    larger = with_overrides(cfg, ["data.crop.size=320"], "a run")
    assert (larger.data.shortest_edge, larger.data.shortest_edge_test) == ((320,), 366)
    tested = with_overrides(cfg, ["data.crop.size_test=288"], "a run")
    assert (tested.data.shortest_edge, tested.data.shortest_edge_test) == ((224,), 329)
    chosen = with_overrides(with_overrides(cfg, ["data.shortest_edge_test=240"], "a"), ["data.crop.size=192"], "b")
    assert (chosen.data.shortest_edge, chosen.data.shortest_edge_test) == ((192,), 240)


def test_another_detector_brings_its_own_defaults_and_the_same_one_changes_nothing() -> None:
    retinanet = Config.model_validate({"model": {"detector": "retinanet", "masks": False, "dense": {"offset": 0.25}}})
    fcos = Config.model_validate({"model": {"detector": "fcos", "masks": False}})
    assert with_overrides(retinanet, ["model.detector=fcos"], "a run").model.dense == fcos.model.dense
    assert with_overrides(retinanet, ["model.detector=retinanet"], "a run") == retinanet
