"""Schedules, parameter groups and optimizer state."""

import math

import pytest
import torch
from models import small_model

from gndet.config.schema import OptimizerConfig, ScheduleConfig
from gndet.modeling.norms.layers import GroupNorm
from gndet.training.optim import (
    average_weights,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
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


def test_gamma_and_beta_are_not_decayed_and_every_trainable_parameter_is_in_one_group() -> None:
    model = small_model()
    model.backbone.freeze(2)
    optimizer = make_optimizer(SGD, model)
    decayed, free = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    affine = {id(p) for m in model.modules() if isinstance(m, GroupNorm) for p in m.parameters() if p.requires_grad}
    assert free == affine and optimizer.param_groups[1]["weight_decay"] == 0
    assert decayed | free == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
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


def test_the_average_follows_its_formula() -> None:
    model = torch.nn.Linear(2, 1)
    average = average_weights(model, 0.9)
    average.update_parameters(model)
    first = model.weight.detach().clone()
    model.weight.data += 1
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, 0.9 * first + 0.1 * (first + 1))
