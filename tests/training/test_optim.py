"""Schedules, parameter groups and optimizer state."""

import copy
import math
import sys
from typing import Any

import pytest
import torch
from models import small_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from gndet.config.norm import NormConfig
from gndet.config.training import OptimizerConfig, ScheduleConfig
from gndet.errors import ConfigError
from gndet.modeling.norms.layers import GroupNorm
from gndet.training.averaging import WeightAverage
from gndet.training.optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    make_step,
    optimizer_tensors,
    total_updates,
)

SGD = OptimizerConfig()


def test_the_recipe_of_detectron2_at_its_own_batch() -> None:
    schedule = ScheduleConfig()
    assert total_updates(schedule, 16) == 90_000
    rates = [learning_rate(u, SGD, schedule, 16) for u in (0, 500, 1000, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([0.02 * 0.001, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.0002])


@pytest.mark.parametrize("global_batch", [1, 2, 8, 32])
def test_another_batch_sees_the_same_images_at_a_rate_in_proportion(global_batch: int) -> None:
    schedule = ScheduleConfig()
    assert total_updates(schedule, global_batch) * global_batch == 90_000 * 16
    for images in (0, 8_000, 16_000, 960_000, 1_280_000):
        here = learning_rate(images // global_batch, SGD, schedule, global_batch)
        there = learning_rate(images // 16, SGD, schedule, 16)
        assert here == pytest.approx(there * global_batch / 16)


def test_adamw_scales_with_the_root_and_cosine_ends_at_zero() -> None:
    adamw = OptimizerConfig(kind="adamw", lr=1e-3)
    cosine = ScheduleConfig(kind="cosine", updates=100, warmup=0)
    assert learning_rate(0, adamw, cosine, 4) == pytest.approx(1e-3 / 2)
    assert learning_rate(50, adamw, cosine, 16) == pytest.approx(1e-3 / 2)
    assert learning_rate(100, adamw, cosine, 16) == pytest.approx(0, abs=1e-9)
    assert learning_rate(25, adamw, cosine, 16) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 4)) / 2)
    lamb, ending = OptimizerConfig(kind="lamb", lr=8e-3), cosine.model_copy(update={"final_factor": 1.25e-4})
    rates = [learning_rate(update, lamb, ending, 16) for update in (0, 50, 100, 101)]
    assert rates == pytest.approx([8e-3, (8e-3 + 1e-6) / 2, 1e-6, 1e-6])


def test_gamma_and_beta_are_not_decayed_and_every_trainable_parameter_is_in_one_group() -> None:
    model = small_model()
    model.backbone.freeze(2)
    optimizer = make_optimizer(SGD, model)
    decayed, free = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    affine = {id(p) for m in model.modules() if isinstance(m, GroupNorm) for p in m.parameters() if p.requires_grad}
    assert free == affine and optimizer.param_groups[1]["weight_decay"] == 0
    assert decayed | free == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb"])
def test_optimizer_state_survives_a_round_trip(kind: str) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(noise)  # in the parameter's layout, as autograd's
        optimizer.step()

    models = [small_model().to(memory_format=torch.channels_last) for _ in range(2)]
    optimizers = [make_optimizer(OptimizerConfig(kind=kind), model) for model in models]
    step(models[0], optimizers[0], 0)
    models[1].load_state_dict(models[0].state_dict())
    saved = {name: value.contiguous().clone() for name, value in optimizer_tensors(optimizers[0], models[0]).items()}
    load_optimizer_tensors(optimizers[1], models[1], saved)
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 1)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_state_made_beforehand_gives_the_steps_of_torchs_own_state_to_the_bit(kind: str) -> None:
    models = [small_model().to(memory_format=torch.channels_last) for _ in range(2)]
    ours, torchs = optimizers = [make_optimizer(OptimizerConfig(kind=kind), model) for model in models]
    assert ours.state
    torchs.state.clear()  # torch makes it in the first step
    for update in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(update)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(noise)
            optimizer.step()
    found, expected = (optimizer_tensors(*pair) for pair in zip(optimizers, models, strict=True))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_lamb_takes_the_steps_of_the_paper_and_biases_do_not_decay() -> None:
    """You et al. 2020, algorithm 2, with the bias correction of Adam; without decay a layer has no trust ratio."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4).double()
    cfg = OptimizerConfig(kind="lamb", lr=0.01, weight_decay=0.02, betas=(0.8, 0.9))
    optimizer: Any = make_optimizer(cfg, layer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in expected.items()}
    for update in range(1, 4):
        for name, parameter in layer.named_parameters():
            parameter.grad = grad = torch.randn_like(parameter)
            m, v = moments[name]
            m.mul_(0.8).add_(0.2 * grad), v.mul_(0.9).add_(0.1 * grad**2)
            step = (m / (1 - 0.8**update)) / ((v / (1 - 0.9**update)).sqrt() + 1e-6)
            if name == "weight":
                step = step + 0.02 * expected[name]
                step = step * expected[name].norm() / step.norm()
            expected[name] -= 0.01 * step
        make_step(optimizer, torch.zeros(()))
    assert all(torch.allclose(p, expected[name], rtol=1e-12) for name, p in layer.named_parameters())
    make_step(optimizer, torch.ones(()))
    assert all(torch.allclose(p, expected[name], rtol=1e-12) for name, p in layer.named_parameters())
    assert optimizer.param_groups[0]["step"] == 3


def test_lamb_without_timm_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"train\.optimizer\.kind: lamb needs timm: pip install timm"):
        make_optimizer(OptimizerConfig(kind="lamb"), torch.nn.Linear(2, 2))


def test_a_first_step_that_found_inf_turns_off_leaves_weights_and_state_without_garbage() -> None:
    model = small_model()
    optimizer: Any = make_optimizer(SGD, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(value.any() for value in optimizer_tensors(optimizer, model).values())


def moved(model: torch.nn.Module, seed: int) -> None:
    """Change every weight and statistic, as an update does; count a batch."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.01 * torch.randn(tensor.shape, generator=generator)
        else:
            tensor += 1


@pytest.mark.parametrize("decay", [0.9, 0.998])
def test_the_average_equals_torchs_to_the_bit_and_counters_are_the_models(decay: float) -> None:
    model = small_model(NormConfig(kind="bn")).to(memory_format=torch.channels_last)
    average = WeightAverage(model, decay)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for update in range(5):
        moved(model, update)
        average.update()
        torchs.update_parameters(model)
    found, expected = average.module.state_dict(), torchs.module.state_dict()
    assert found.keys() == expected.keys()
    counters = {name for name in found if name.endswith("num_batches_tracked")}
    assert counters and all(found[name] == model.state_dict()[name] == 5 for name in counters)
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() - counters)


def test_a_skipped_update_leaves_every_bit_of_the_average() -> None:
    model = small_model(NormConfig(kind="bn"))
    plain, average = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    zero, one = torch.zeros(()), torch.ones(())
    for update, skipped in enumerate((True, False, False, True, False)):
        good = copy.deepcopy(model.state_dict())
        moved(model, update)
        if skipped:  # running statistics may be NaN after a forward pass that is not finite
            for buffer in model.buffers():
                buffer.fill_(float("nan") if buffer.is_floating_point() else 100)
        else:
            plain.update()
        average.update(one if skipped else zero)
        for name, value in average.module.state_dict().items():
            assert torch.equal(value, plain.module.state_dict()[name]), (update, name)
        if skipped:
            model.load_state_dict(good)


def test_an_update_of_the_average_is_few_launches_and_the_host_does_not_wait() -> None:
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.__name__)
            return func(*args, **kwargs or {})

    model, called = small_model(NormConfig(kind="bn")), list[str]()
    average = WeightAverage(model, 0.9)
    average.update()
    skip = torch.zeros(())
    with Operators():
        average.update(skip)
    assert "_fused_sgd_.default" in called and len(called) < 10  # a call per type of tensor, not per tensor
    assert "_local_scalar_dense.default" not in called  # what bool(), item() and a comparison on the host end in
