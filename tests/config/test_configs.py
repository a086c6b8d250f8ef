"""Every config is valid, recipes carry the published numbers, and the commands they show work."""

import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from gndet.cli.main import main, parse
from gndet.config.loading import load_config
from gndet.config.schema import Config

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*_rcnn_*_fpn_*x.yaml"))
ONE_LEVEL = sorted(path.stem for neck in ("c4", "dc5") for path in CONFIGS.glob(f"*_rcnn_*_{neck}_*x.yaml"))
DENSE = ("atss_r50_fpn_gn_hybrid", "fcos_r50_fpn_gn_hybrid", "atss_r50_fpn_gn_1x", "retinanet_r50_fpn_gn_1x")
FROM_OTHERS = ("mask_rcnn_r50_fpn_gn_from_bn", "mask_rcnn_r50_fpn_gn_hybrid")
SCHEDULES = {
    "1x": (90_000, (60_000, 80_000)),
    "2x": (180_000, (120_000, 160_000)),
    "3x": (270_000, (210_000, 250_000)),
    "4x": (360_000, (300_000, 340_000)),
    "9x": (810_000, (750_000, 790_000)),
}
PUBLISHED = {  # box AP, mask AP and their source: the other toolkits' recipes that ours follow
    "mask_rcnn_r50_fpn_gn_2x": "box AP 40.3, mask AP 35.7 (Detectron",
    "mask_rcnn_r50_fpn_gn_3x": "box AP 42.6, mask AP 38.6 (detectron2",
    "mask_rcnn_r50_fpn_scratch_gn_3x": "box AP 39.9, mask AP 36.6 (detectron2",
    "mask_rcnn_r50_fpn_frozen_bn_1x": "box AP 38.6, mask AP 35.2 (detectron2",
    "mask_rcnn_r101_fpn_gn_2x": "box AP 41.8, mask AP 36.8 (Detectron",
    "mask_rcnn_r101_fpn_gn_3x": "box AP 42.3, mask AP 37.2 (Detectron",
    "mask_rcnn_r101_fpn_scratch_gn_3x": "box AP 41.0, mask AP 36.4 (Detectron",
    "cascade_mask_rcnn_r50_fpn_gn_4x": "box AP 46.1, mask AP 40.1 (tensorpack",
    "cascade_mask_rcnn_r50_fpn_frozen_bn_1x": "box AP 42.1, mask AP 36.4 (detectron2",
    "cascade_mask_rcnn_r101_fpn_scratch_gn_9x": "box AP 47.7, mask AP 41.7 (tensorpack",
    "faster_rcnn_x50_32x4d_fpn_gn_ws_1x": "box AP 40.7 (mmdetection",
    "faster_rcnn_x101_32x4d_fpn_gn_ws_1x": "box AP 42.1 (mmdetection",
    "mask_rcnn_x50_32x4d_fpn_gn_ws_2x": "box AP 41.1, mask AP 37.0 (mmdetection",
    "mask_rcnn_x101_32x4d_fpn_gn_ws_2x": "box AP 42.1, mask AP 37.9 (mmdetection",
    "atss_r50_fpn_gn_hybrid": "box AP 39.3 (ATSS, 1x",
    "fcos_r50_fpn_gn_hybrid": "box AP 38.7 (AdelaiDet, FCOS 1x",
    "mask_rcnn_r50_c4_gn_2x": "box AP 38.8, mask AP 33.6 (Wu & He 2018",
    "mask_rcnn_r50_c4_frozen_bn_1x": "box AP 36.8, mask AP 32.2 (detectron2",
    "mask_rcnn_r50_dc5_frozen_bn_1x": "box AP 38.3, mask AP 34.2 (detectron2",
}


def recipe(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path) -> None:
    assert load_config(path).out == f"runs/{path.stem}"


def test_the_set_of_recipes_is_whole() -> None:
    kinds = ("gn_1x", "gn_2x", "gn_3x", "scratch_gn_3x", "frozen_bn_1x")
    heads, depths = ("faster_rcnn", "mask_rcnn"), ("r50", "r101")
    resnets = {f"{head}_{depth}_fpn_{kind}" for head in heads for depth in depths for kind in kinds}
    wide = ("x50_32x4d_fpn_gn_ws", "x101_32x4d_fpn_gn_ws")
    resnexts = {f"{head}_{name}_{length}" for head, length in zip(heads, ("1x", "2x"), strict=True) for name in wide}
    cascades = {"r50_fpn_gn_1x", "r50_fpn_gn_4x", "r50_fpn_frozen_bn_1x", "r101_fpn_scratch_gn_9x"}
    assert resnets | resnexts | {f"cascade_mask_rcnn_{name}" for name in cascades} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_name_says(name: str) -> None:
    cfg = recipe(name)
    assert cfg.model.masks == ("mask_rcnn" in name)
    assert cfg.model.detector == ("cascade_rcnn" if name.startswith("cascade") else "mask_rcnn")
    assert cfg.model.backbone.depth == int(re.search(r"_[rx](\d+)_", name)[1])
    assert (cfg.model.backbone.cardinality, cfg.model.backbone.group_width) == ((32, 4) if "_x" in name else (1, 64))
    assert cfg.model.norm.weight_standardization == ("_ws_" in name)
    assert (cfg.train.schedule.updates, cfg.train.schedule.steps) == SCHEDULES[name[-2:]]
    kinds = {part: norm.kind for part, norm in cfg.model.part_norms().items()}
    if "frozen_bn" in name:
        assert kinds.pop("backbone") == "frozen_bn" and set(kinds.values()) == {"none"}
        assert cfg.model.box_head.kind == "2fc"
    else:
        assert kinds.pop("rpn") == "none" and set(kinds.values()) == {"gn"}
        assert cfg.model.box_head.kind == "4conv1fc"
    scratch = "scratch" in name
    assert (cfg.model.backbone.freeze_at, cfg.train.weights == "") == ((0, True) if scratch else (2, False))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_what_all_published_ones_share(name: str) -> None:
    cfg = recipe(name)
    optimizer, schedule, data, model = cfg.train.optimizer, cfg.train.schedule, cfg.data, cfg.model
    assert (optimizer.kind, optimizer.lr, optimizer.momentum) == ("sgd", 0.02, 0.9)
    assert (optimizer.weight_decay, optimizer.norm_weight_decay) == (1e-4, 0)
    assert (cfg.train.global_batch, schedule.reference_batch, schedule.kind, schedule.gamma) == (
        16,
        16,
        "step",
        0.1,
    )
    assert (schedule.warmup, schedule.warmup_factor) == (1000, 0.001)
    assert (data.shortest_edge, data.max_edge) == ((640, 672, 704, 736, 768, 800), 1333)
    assert (data.shortest_edge_test, data.flip) == (800, 0.5)
    assert all(norm.groups == 32 and norm.eps == 1e-5 for norm in model.part_norms().values())
    assert (model.fpn.channels, model.mask_head.channels, model.mask_head.num_convs) == (256, 256, 4)
    assert (model.rpn.pre_nms_train, model.rpn.post_nms_train, model.box_head.regions_per_image) == (
        2000,
        2000 if name.startswith("cascade") else 1000,
        512,
    )
    assert (model.box_head.fc_channels, model.box_head.score_threshold, model.box_head.nms_threshold) == (
        1024,
        0.05,
        0.5,
    )


def test_the_configs_that_start_from_other_toolkits_say_how() -> None:
    converted, hybrid = (recipe(name) for name in FROM_OTHERS)
    assert (converted.train.norm_policy, converted.model.backbone.freeze_at) == ("convert", 0)
    assert {norm.kind for norm in converted.model.part_norms().values()} == {"gn", "none"}
    assert hybrid.model.part_norms()["backbone"].kind == "frozen_bn"
    assert {hybrid.model.part_norms()[part].kind for part in ("fpn", "box_head", "mask_head")} == {"gn"}
    detector = recipe("finetune_coco_detector").model
    assert (detector.rpn.num_convs, detector.rpn.anchors, detector.box_head.roi_align) == (2, "rounded", "unaligned")
    assert recipe("finetune_gn_detector").model.box_head.roi_align == "detectron"


@pytest.mark.parametrize("name", DENSE)
def test_a_recipe_of_a_dense_detector_has_the_published_values(name: str) -> None:
    cfg = recipe(name)
    dense, norms, optimizer, schedule = cfg.model.dense, cfg.model.part_norms(), cfg.train.optimizer, cfg.train.schedule
    assert (cfg.model.detector == "retinanet") == (name.startswith("retinanet")) and not cfg.model.masks
    assert dense.assign == {"atss": "atss", "fcos": "center", "retinanet": "iou"}[name.split("_")[0]]
    assert (optimizer.kind, optimizer.lr, optimizer.weight_decay, schedule.updates) == ("sgd", 0.01, 1e-4, 90_000)
    assert (schedule.steps, cfg.train.global_batch) == ((60_000, 80_000), 16)
    assert (norms["dense"].kind, norms["dense"].groups, dense.num_convs) == ("gn", 32, 4)
    assert dense.conv_bias == (dense.quality == "centerness") == (cfg.model.detector == "fcos")
    assert norms["backbone"].kind == ("frozen_bn" if "hybrid" in name else "gn")
    assert dense.nms_threshold == (0.5 if cfg.model.detector == "retinanet" else 0.6)
    assert dense.box_weight == (2 if dense.assign == "atss" else 1)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_a_recipe_on_one_level_has_detectron2_s_proposals_and_its_name_s_norms_and_schedule(name: str) -> None:
    cfg = recipe(name)
    model, neck = cfg.model, name.split("_")[3]
    assert (model.neck, model.masks) == (neck, name.startswith("mask_rcnn"))
    rpn, box, mask = model.rpn, model.box_head, model.mask_head
    assert (rpn.pre_nms_train, rpn.pre_nms_test, rpn.post_nms_train, rpn.post_nms_test) == (12_000, 6000, 2000, 1000)
    assert len(rpn.anchor_sizes) * len(rpn.aspect_ratios) == 15
    assert (box.pool_size, mask.pool_size, mask.num_convs) == ((14, 14, 0) if neck == "c4" else (7, 14, 4))
    assert model.box_layers == ((0, 0) if neck == "c4" else (0, 2) if "frozen_bn" in name else (4, 1))
    kinds = {part: norm.kind for part, norm in model.part_norms().items() if part in model.normed_parts}
    assert kinds.pop("backbone") == ("frozen_bn" if "frozen_bn" in name else "gn")
    assert set(kinds.values()) <= ({"none"} if "frozen_bn" in name else {"none", "gn"})
    assert (cfg.train.schedule.updates, cfg.train.schedule.steps) == SCHEDULES[name[-2:]]
    per_gpu, whole = cfg.train.images_per_gpu, cfg.train.global_batch
    assert (per_gpu, whole) == ((1, 8) if "c4_gn" in name else (2, 16))


@pytest.mark.parametrize("name", [*RECIPES, *ONE_LEVEL, *FROM_OTHERS, *DENSE])
def test_a_recipe_is_headed_by_its_commands_and_what_to_expect(name: str) -> None:
    single, multi, expect, *_ = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert parse(single.removeprefix("# gndet ").split()).config == f"configs/{name}.yaml"
    assert multi == f"# torchrun --nproc_per_node=8 tools/train.py configs/{name}.yaml"
    assert PUBLISHED.get(name, "no published figure known") in expect
    assert expect.endswith("Ours: not run yet.")


@pytest.mark.parametrize(
    "words",
    [
        ("config", "quickstart", "seed=1"),
        ("check", "quickstart", "data.train.count=2", "data.val.count=2"),
        ("norms", "quickstart"),
        ("analyze", "detections.json", "--data", "quickstart", "data.val.count=2"),
    ],
    ids=lambda words: words[0],
)
def test_every_kind_of_verb_takes_the_name_of_a_packaged_config(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("detections.json").write_text("[]")
    assert main([*words]) == 0


TOOLS = sorted(path for path in (REPOSITORY / "tools").glob("*.py") if path.name != "benchmark.py")  # no verb


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_a_tool_is_the_verb_of_its_name(path: Path) -> None:
    source = path.read_text()
    (example,) = re.findall(rf"^python tools/{path.stem}\.py (.*)$", source, re.MULTILINE)
    parse([path.stem, *example.split()])
    assert f'main(["{path.stem}", *sys.argv[1:]])' in source


@pytest.mark.parametrize(("name", "epochs", "lr", "size"), [("a2", 300, 5e-3, 224), ("a3", 100, 8e-3, 160)])
def test_the_recipes_of_wightman_et_al_are_those_of_table_2(name: str, epochs: int, lr: float, size: int) -> None:
    cfg = recipe(f"imagenet_r50_gn_{name}")
    optimizer, schedule, crop, head = cfg.train.optimizer, cfg.train.schedule, cfg.data.crop, cfg.model.classifier
    assert (optimizer.kind, optimizer.lr, optimizer.weight_decay, optimizer.norm_weight_decay) == ("lamb", lr, 0.02, 0)
    epoch = 1_281_167 / 2048
    assert cfg.train.global_batch == schedule.reference_batch == 2048 and schedule.kind == "cosine"
    assert schedule.updates == round(epochs * epoch) and schedule.warmup == round(5 * epoch)
    assert schedule.final_factor * lr == schedule.warmup_factor * lr == pytest.approx(1e-6)
    assert (crop.size, crop.tested, crop.mixup, crop.cutmix) == (size, 224, 0.1, 1.0)
    assert cfg.data.shortest_edge_test == round(224 / 0.95) and (crop.rand_augment, crop.magnitude) == (
        2, 3 * {"a2": 7, "a3": 6}[name],
    )  # fmt: skip
    assert (head.loss, head.target_threshold, head.label_smoothing) == ("sigmoid", 0.2, 0)
    assert cfg.model.backbone.stochastic_depth == {"a2": 0.05, "a3": 0}[name]
