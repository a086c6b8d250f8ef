"""What each neck allows: its defaults give way to what a config states, and what cannot be built is refused."""

from typing import Any

import pytest

from gndet.config.loading import config_from_dict, with_overrides
from gndet.config.model import ModelConfig
from gndet.config.schema import Config
from gndet.errors import ConfigError


def test_a_neck_s_defaults_give_way_to_what_is_stated_and_to_another_neck() -> None:
    c4 = with_overrides(Config(), ["model.neck=c4"], "test")
    assert (c4.model.box_layers, c4.model.rpn.pre_nms_train, c4.model.mask_head.num_convs) == ((0, 0), 12_000, 0)
    assert c4.model.parts == ("backbone", "rpn", "box_head", "mask_head")
    assert c4.model.normed_parts == ("backbone", "rpn")
    dc5 = with_overrides(c4, ["model.neck=dc5"], "test")
    assert dc5 == with_overrides(Config(), ["model.neck=dc5"], "test")
    assert dc5.model.box_head.kind == "2fc" and dc5.model.box_head.pool_size == 7
    assert with_overrides(dc5, ["model.neck=fpn"], "test") == Config()
    stated = ModelConfig.model_validate({"neck": "dc5", "rpn": {"pre_nms_test": 77}, "box_head": {"kind": "4conv1fc"}})
    assert (stated.rpn.pre_nms_test, stated.rpn.post_nms_train, stated.box_head.kind) == (77, 2000, "4conv1fc")


def test_a_toolkit_s_conventions_apply_beside_a_neck_s_defaults() -> None:
    model = ModelConfig.model_validate({"neck": "c4", "compat": "detectron2"})
    assert (model.box_head.sampling_ratio, model.mask_head.sampling_ratio, model.rpn.anchors_in_padding) == (0, 0, True)
    assert (model.rpn.pre_nms_test, model.box_head.pool_size) == (6000, 14)
    assert config_from_dict({"model": model.model_dump(mode="json")}, "test").model == model


@pytest.mark.parametrize(
    ("compat", "neck", "ratio"),
    [
        ("detectron", "c4", 0), ("detectron", "fpn", 2), ("detectron2", "c4", 0), ("mmdetection", "c4", 0),
        ("torchvision", "c4", 2), ("gndet", "c4", 2),
    ],
)  # fmt: skip
def test_detectron_samples_its_regions_as_its_config_of_the_neck_says(compat: str, neck: str, ratio: int) -> None:
    model = ModelConfig.model_validate({"compat": compat, "neck": neck})
    assert (model.box_head.sampling_ratio, model.mask_head.sampling_ratio) == (ratio, ratio)
    other = with_overrides(
        Config(), [f"model.compat={compat}", f"model.neck={'fpn' if neck == 'c4' else 'c4'}"], "test"
    )
    assert with_overrides(other, [f"model.neck={neck}"], "test").model == model


def test_a_stated_sampling_ratio_wins_over_that_of_detectron_s_c4() -> None:
    heads = {name: {"sampling_ratio": 3} for name in ("box_head", "mask_head")}
    model = ModelConfig.model_validate({"compat": "detectron", "neck": "c4", **heads})
    assert (model.box_head.sampling_ratio, model.mask_head.sampling_ratio) == (3, 3)
    stated = with_overrides(Config(), ["model.box_head.sampling_ratio=3"], "test")
    assert with_overrides(stated, ["model.neck=dc5"], "test").model.box_head.sampling_ratio == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rpn": {"anchor_sizes": [32, 64]}}, r"rpn\.anchor_sizes: 2 sizes; expected 5, one for each of P2 to P6"),
        (
            {"neck": "c4", "rpn": {"anchor_sizes": [8, 16, 32, 64, 128, 256]}},
            "18 anchors per cell .* expected up to 16",
        ),
        ({"neck": "c4", "backbone": {"kind": "vgg", "depth": 16}}, "needs the stages of a resnet; got .*vgg"),
        ({"neck": "dc5", "backbone": {"depth": 18}}, r"backbone\.depth from 50 on, got 18"),
        ({"backbone": {"dilated_blocks": "after_first"}}, "after_first has an effect with neck: dc5 only"),
        ({"neck": "c4", "backbone": {"stochastic_depth": 0.1}}, "res5 skips no block on the regions of neck: c4"),
        ({"neck": "c4", "box_head": {"pool_size": 8}}, r"mask_head\.pool_size: 14; expected that of box_head, 8"),
        ({"neck": "c5"}, "model.neck"),
    ],
)
def test_what_cannot_be_built_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"model": model}, "test")


def test_options_that_c4_lacks_name_no_cause_and_no_difference() -> None:
    c4, fpn = (
        ModelConfig.model_validate({"neck": neck, "box_head": {"kind": "2fc", "norm_last": True}})
        for neck in ("c4", "fpn")
    )
    assert "box_head.kind" in fpn.shaping() and not any(option.startswith("box_head.kind") for option in c4.shaping())
    assert "box_head.pool_size" in c4.shaping() and c4.lacks and not fpn.lacks
