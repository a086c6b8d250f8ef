"""Classifiers equal torchvision's at the same weights, and treat an image the same whatever its batch."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from models import make_batch, small_model
from torch import Tensor, nn

from gndet.config.model import ClassifierConfig, ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.parts import BackboneConfig
from gndet.errors import ConfigError
from gndet.modeling.build import build_model
from gndet.modeling.classifier import Classifier, drop_by_key, pool_pictures
from gndet.modeling.norms.activating import ThresholdLinear
from gndet.modeling.norms.valid_area import ValidArea, channel_means
from gndet.modeling.recompute import set_memory
from gndet.structures import Batch, GroundTruth
from gndet.weights.foreign import classifier as classifier_files
from gndet.weights.foreign.export import export_weights

CLASSES = ("a", "b", "c", "d", "e")
KINDS = {  # torchvision's model and our backbone
    "resnet18": {"depth": 18},
    "resnet50": {"depth": 50},
    "resnext50_32x4d": {"depth": 50, "cardinality": 32, "group_width": 4},
}


def config(norm: NormConfig | None = None, backbone: dict | None = None, **head: object) -> ModelConfig:
    return ModelConfig(
        detector="classifier", masks=False, norm=norm or NormConfig(), classifier=ClassifierConfig(**head),
        backbone=BackboneConfig(**(backbone or {"depth": 18})),
    )  # fmt: skip


def classifier(cfg: ModelConfig, seed: int = 0) -> Classifier:
    """Build a classifier in float64 whose norms do something."""
    torch.manual_seed(seed)
    model = build_model(cfg, len(CLASSES)).double().to(memory_format=torch.channels_last)
    assert isinstance(model, Classifier)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.3, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3), module.running_var.uniform_(0.5, 2)
        model.classifier.logits.weight.normal_(0, 0.5)
    return model


def pictures(sizes: list[tuple[int, int]], canvas: tuple[int, int] | None = None, first: int = 0) -> Batch:
    """Make a batch of noise of the given (height, width); picture number first + i does not depend on its batch."""
    height, width = canvas or sizes[0]
    images = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    labels = torch.zeros(len(sizes), 8, dtype=torch.int64)
    for i, (h, w) in enumerate(sizes):
        generator = torch.Generator().manual_seed(first + i)
        images[i, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator).to(torch.uint8)
        labels[i, 0] = (first + i) % len(CLASSES)
    valid = (torch.arange(8) == 0).expand(len(sizes), 8)
    gt = GroundTruth(torch.zeros(len(sizes), 8, 4), labels, torch.zeros(len(sizes), 8, 0, 0, dtype=torch.bool), valid)
    keys = torch.arange(first, first + len(sizes)) + 100
    return Batch(images, torch.tensor(sizes), keys, gt, any(size != (height, width) for size in sizes))


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in
                 ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))  # fmt: skip
    return (images.double() - mean) / std


@pytest.mark.parametrize("kind", ["gn", "bn"])
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_exported_weights_are_torchvisions(name: str, kind: str) -> None:
    cfg = config(NormConfig(kind=kind), KINDS[name])
    model = classifier(cfg).eval()
    exported = export_weights(dict(model.state_dict()), cfg, CLASSES, "torchvision")
    norm = (lambda channels: nn.GroupNorm(32, channels)) if kind == "gn" else nn.BatchNorm2d
    peer = getattr(torchvision.models, name)(num_classes=5, norm_layer=norm).double().eval()
    peer.load_state_dict(exported.tensors)
    batch = pictures([(96, 128)] * 2)
    expected = peer(normalized(batch.images))
    assert (model.classify(batch.images, batch.sizes, False) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert f"resnet{cfg.backbone.depth}(num_classes=5" in exported.notes[0]


@pytest.mark.parametrize("kind", ["none", "bn", "frozen_bn"])
def test_vgg_and_its_exported_weights_are_torchvisions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(NormConfig(kind=kind, eps=1e-3), {"kind": "vgg", "depth": 16}, pool_size=7, fc_channels=(64, 32))
    monkeypatch.setattr(classifier_files, "VGG_HEAD", (7, 64, 32))  # a head of 4096 channels takes seconds
    model = classifier(cfg).eval()
    exported = export_weights(dict(model.state_dict()), cfg, CLASSES, "torchvision")
    name = "vgg16" if kind == "none" else "vgg16_bn"
    with torch.device("meta"):
        peer = getattr(torchvision.models, name)(num_classes=5)
        peer.classifier = nn.Sequential(nn.Linear(25088, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 32), nn.ReLU(),
                                        nn.Dropout(), nn.Linear(32, 5))  # fmt: skip
    assert exported.tensors.keys() == peer.state_dict().keys()
    peer.load_state_dict(exported.tensors, assign=True)
    batch = pictures([(64, 96)])
    expected = peer.double().eval()(normalized(batch.images))
    # gndet holds the mean and deviation of pixels, and writes the gamma of another eps, in float32
    assert (model.classify(batch.images, batch.sizes, False) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("kind", "name"), [("none", "vgg16"), ("bn", "vgg16_bn")])
def test_vgg_is_written_for_torchvisions_own_constructor(kind: str, name: str) -> None:
    cfg = config(
        NormConfig(kind=kind), {"kind": "vgg", "depth": 16}, pool_size=7, fc_channels=(4096, 4096), dropout=0.4
    )
    with torch.device("meta"):
        exported = export_weights(build_model(cfg, 5).state_dict(), cfg, CLASSES, "torchvision")
        assert exported.notes[0] == f"torchvision.models.{name}(num_classes=5, dropout=0.4)"
        eval(exported.notes[0]).load_state_dict(exported.tensors, assign=True)


@pytest.mark.parametrize(
    ("cfg", "toolkit", "said"),
    [
        (config(NormConfig(kind="bn")), "detectron2", "classifiers for torchvision only"),
        (config(fc_channels=(8,)), "torchvision", "ResNets have one fully connected layer"),
        (config(backbone={"kind": "vgg", "depth": 16}), "torchvision", r"has pool_size 7, fc_channels \[4096, 4096\]"),
        (
            config(backbone={"kind": "vgg", "depth": 16}, pool_size=7, fc_channels=(4096, 4096)), "torchvision",
            r"norm: gn; torchvision has VGG-16 without norms \(vgg16\) and with BN \(vgg16_bn\)",
        ),
    ],
)  # fmt: skip
def test_a_classifier_that_torchvision_does_not_have_is_refused(cfg: ModelConfig, toolkit: str, said: str) -> None:
    with torch.device("meta"):
        state = build_model(cfg, 5).state_dict()
    with pytest.raises(ConfigError, match=said):
        export_weights(state, cfg, CLASSES, toolkit)


@pytest.mark.parametrize(("name", "kind"), [("resnet18", "gn"), ("resnext50_32x4d", "bn")])
def test_timm_loads_what_is_exported(name: str, kind: str) -> None:
    timm = pytest.importorskip("timm")
    cfg = config(NormConfig(kind=kind), KINDS[name])
    model = classifier(cfg).eval()
    exported = export_weights(dict(model.state_dict()), cfg, CLASSES, "torchvision")
    peer = eval(exported.notes[-1], {"timm": timm}).double().eval()
    peer.load_state_dict(exported.tensors)
    batch = pictures([(64, 96)] * 2)
    expected = peer(normalized(batch.images))
    assert (model.classify(batch.images, batch.sizes, False) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("side", [1, 2, 7])
def test_pooling_is_adaptive_pooling_of_each_picture_alone(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = torch.tensor([[5, 9], [12, 7], [1, 3], [12, 9]])
    x = torch.randn(4, 3, 12, 9, dtype=torch.float64)
    area = ValidArea.of(sizes, 12, 9)
    garbage = torch.where(area.mask, x, torch.nan)  # what lies in the padding must not matter
    found = pool_pictures(garbage, area, side)
    for image, (height, width) in enumerate(sizes.tolist()):
        expected = F.adaptive_avg_pool2d(x[image, :, :height, :width], side)
        assert torch.allclose(found[image], expected, rtol=0, atol=1e-14)
    expected = F.adaptive_avg_pool2d(x, side)
    assert torch.equal(pool_pictures(x, None, side), expected)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.testing.assert_close(pool_pictures(x, None, side), expected)


def test_half_precision_takes_the_same_means_of_a_picture_alone_and_padded() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 56, 60, generator=generator).add(1).bfloat16()
    area = ValidArea.of(torch.tensor([[49, 53], [56, 60]]), 56, 60)
    true = x[:1, :, :49, :53].double().mean((2, 3), keepdim=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = {"pooled": pool_pictures(x, area, 1), "squeezed": channel_means(x, area)}
    for name, means in found.items():
        assert means.dtype == torch.bfloat16
        assert ((means[:1] / true).mean() - 1).abs() < 5e-4, name  # as a mean of 64 rounded numbers


def test_half_precision_keeps_the_shares_of_mixed_pictures() -> None:
    logits, labels = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 3]])
    head, shares = classifier(config()).float().classifier, torch.tensor([[0.7003, 0.2997]])
    with torch.autocast("cpu", torch.bfloat16):
        found = head.loss(logits, labels, shares)
    assert torch.allclose(found, head.loss(logits, labels, shares), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_those_worked_by_hand(smoothing: float) -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0, 2])
    head = classifier(config(label_smoothing=smoothing)).classifier
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    target = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64) * (1 - smoothing) + smoothing / 3
    assert torch.allclose(head.loss(logits, labels), -(target * logs).sum(1))
    head = classifier(config(label_smoothing=smoothing, loss="sigmoid")).classifier
    p = 1 / (1 + (-logits).exp())
    assert torch.allclose(head.loss(logits, labels), -(target * p.log() + (1 - target) * (1 - p).log()).mean(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_mixed_pictures_are_torchs_with_probabilities(smoothing: float) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, shares = (
        torch.tensor([[0, 3, 0], [2, 2, 0], [4, 1, 0], [1, 0, 0]]),
        torch.tensor([[0.7], [0.5], [0.9], [1]]),
    )
    shares = torch.cat([shares, 1 - shares, torch.zeros(4, 1)], dim=1).double()
    probabilities = torch.tensor([[0.7, 0, 0, 0.3, 0], [0, 0, 1, 0, 0], [0, 0.1, 0, 0, 0.9], [0, 1, 0, 0, 0]]).double()
    head = classifier(config(label_smoothing=smoothing)).classifier
    expected = F.cross_entropy(logits, probabilities, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(head.loss(logits, labels, shares), expected, rtol=1e-6)
    assert torch.allclose(head.loss(logits, labels, shares)[[1, 3]], head.loss(logits[[1, 3]], labels[[1, 3], 0]))
    for threshold, target in ((None, probabilities), (0.2, (probabilities > 0.2).double())):
        head = classifier(config(label_smoothing=smoothing, loss="sigmoid", target_threshold=threshold)).classifier
        target = target * (1 - smoothing) + smoothing / 5
        expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        assert torch.allclose(head.loss(logits, labels, shares), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"target_threshold: 0\.2 is for loss: sigmoid"):
        config(target_threshold=0.2)


def test_dropout_is_a_function_of_the_key() -> None:
    x, keys = torch.ones(3, 4000, dtype=torch.float64), torch.tensor([5, 6, 7])
    found = drop_by_key(x, 0.3, keys, 0)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (found == 0).double().mean(1).tolist() == pytest.approx([0.3] * 3, abs=0.03)
    assert torch.equal(drop_by_key(x[[2, 0]], 0.3, keys[[2, 0]], 0), found[[2, 0]])
    other = drop_by_key(x, 0.3, keys, 1)
    assert ((found == 0) & (other == 0)).double().mean() == pytest.approx(0.09, abs=0.02)  # layers are independent


def gradient(model: Classifier, batches: list[Batch], num: int) -> Tensor:
    model.zero_grad()
    for batch in batches:
        (model(batch)["loss_class"].sum() / num).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def rows(batch: Batch, start: int, stop: int) -> Batch:
    gt = type(batch.gt)(*(field[start:stop] for field in batch.gt))
    return Batch(batch.images[start:stop], batch.sizes[start:stop], batch.keys[start:stop], gt, batch.padded)


@pytest.mark.parametrize("kind", ["gn", "ln", "in", "bn"])
def test_a_batch_of_32_has_the_gradient_of_32_single_images_unless_a_norm_mixes_them(kind: str) -> None:
    model = classifier(config(NormConfig(kind=kind, groups=8), {"depth": 18, "width": 0.25})).train()
    batch = pictures([(64, 64)] * 32)
    whole = gradient(model, [batch], 32)
    for size in (1, 8):
        split = gradient(model, [rows(batch, i, i + size) for i in range(0, 32, size)], 32)
        far = ((split - whole).norm() / whole.norm()).item()
        assert far > 1e-3 if kind == "bn" else far < 1e-12


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ({"depth": 18}, {}),
        ({"depth": 50, "cardinality": 32, "group_width": 4}, {"label_smoothing": 0.1}),
        ({"kind": "vgg", "depth": 16}, {"pool_size": 2, "fc_channels": (32,), "dropout": 0.4, "loss": "sigmoid"}),
    ],
)
@pytest.mark.parametrize("kind", ["gn", "frn"])  # after FRN's activation, a map's numbers may be negative
def test_logits_losses_and_gradients_do_not_depend_on_batch_mates_or_padding(
    kind: str, backbone: dict, head: dict
) -> None:
    model = classifier(config(NormConfig(kind=kind), backbone, **head)).train()
    for module in model.modules():
        if isinstance(module, ThresholdLinear):
            nn.init.uniform_(module.tau, -1, -0.5)
    sizes = [(64, 96), (96, 65), (33, 50)]
    together = pictures(sizes, canvas=(128, 128))
    alone = [pictures([size], first=i) for i, size in enumerate(sizes)]
    losses = model(together)["loss_class"]
    for i, single in enumerate(alone):
        assert torch.allclose(model(single)["loss_class"], losses[i], rtol=1e-12)
    a, b = gradient(model, [together], 3), gradient(model, alone, 3)
    assert (a - b).norm() < 1e-11 * b.norm()


@pytest.mark.parametrize("memory", ["balanced", "lean"])
@pytest.mark.parametrize("backbone", [{"depth": 50, "cardinality": 32, "group_width": 4}, {"kind": "vgg", "depth": 16}])
def test_less_memory_changes_no_gradient(backbone: dict, memory: str) -> None:
    model, batch = classifier(config(backbone=backbone)).train(), pictures([(64, 64)] * 2)
    expected = gradient(model, [batch], 2)
    set_memory(model, memory)
    assert torch.allclose(gradient(model, [batch], 2), expected, rtol=1e-9, atol=1e-12)


def test_vgg_freezes_its_first_stages() -> None:
    model = classifier(config(NormConfig(kind="bn"), {"kind": "vgg", "depth": 16, "freeze_at": 2}))
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "stage1", "stage2"} and not model.backbone.stage1[0].norm.training


@pytest.mark.parametrize("backbone", [{"depth": 50, "cardinality": 32, "group_width": 4}, {"kind": "vgg", "depth": 16}])
def test_a_detector_takes_the_backbones_too(backbone: dict) -> None:
    model = small_model(NormConfig(channels_per_group=16), backbone=BackboneConfig(**backbone)).double().train()
    together = make_batch([(64, 96), (96, 65)])
    losses = model(together)
    alone = model(make_batch([(64, 96)]))
    assert all(torch.allclose(alone[name][0], losses[name][0], rtol=1e-9) for name in losses)
