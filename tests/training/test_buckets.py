"""Gradients are summed over the ranks while the last backward pass runs, whatever fails in it."""

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from faults.launch import spawn
from faults.tiny import CONFIG
from models import make_batch, small_model
from run_files import load
from torch import Tensor, nn

from gndet.data.batches.stream import Replay, train_batches
from gndet.distributed.process import Process
from gndet.distributed.signals import Stop, StopSignals
from gndet.training.gradient_buckets import Buckets
from gndet.training.run import Run
from gndet.training.setup import build_run
from gndet.training.update import UpdateState, compute_gradients

pytestmark = pytest.mark.usefixtures("thin")
FAULTS = ("", "memory on the way", "memory before", "stop on the way", "stop before", "signal while sending", "none")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, thin: None) -> list[dict[str, Any]]:
    """The results of two ranks in an update of 8 images, by fault on rank 1, and last those of a single rank."""
    folder = tmp_path_factory.mktemp("buckets")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(CONFIG | {"train": CONFIG["train"] | {"global_batch": 8, "precision": "float64"}}))
    spawn(all_faults, args=(folder, config), nprocs=2)
    run, batches = update(config, Process(0, 1, torch.device("cpu")))
    share = compute_gradients(run, UpdateState(), batches, 2, StopSignals())
    alone = {"gradients": flat(run.model), "losses": torch.stack(list(share.losses.values()))}
    return [torch.load(folder / str(rank)) for rank in (0, 1)] + [alone]


def all_faults(rank: int, folder: Path, config: Path) -> None:
    """Run all faults on one of the two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run, batches = update(config, Process(rank, 2, torch.device("cpu")))
    got = {}
    for fault in FAULTS:
        with StopSignals() as stop, injected(run, stop, fault if rank == 1 else "none"):
            try:
                share = compute_gradients(run, UpdateState(), batches, 2, stop)
                losses = torch.stack(list(share.losses.values()))
                got[fault] = {"gradients": flat(run.model), "losses": losses, "size": share.size}
            except Stop:
                got[fault] = "stopped"
    torch.save(got, folder / str(rank))
    dist.destroy_process_group()


def update(config: Path, proc: Process) -> tuple[Run, Replay]:
    """Return a run and the batches of its first update: on each of two ranks, 2 batches of 2 images."""
    cfg = load(config, "unused", "train.images_per_gpu=2")
    run, _ = build_run(cfg, Path("unused"), proc, None)
    batches = train_batches(
        run.train_set, cfg.data, seed=0, start=0, stop=1, images_per_gpu=2, global_batch=8, rank=proc.rank,
        world=proc.world, masks=True, pin_memory=False,
    )  # fmt: skip
    return run, Replay(functools.partial(next, batches), 4 // proc.world)


@contextmanager
def injected(run: Run, stop: StopSignals, fault: str) -> Iterator[None]:
    """Let memory run out once, or a stop arrive, before or while gradients are sent."""
    first = next(run.model.parameters())  # a backward pass reaches it last
    all_reduce, done = dist.all_reduce, []

    def strike(_: Tensor) -> None:
        if fault not in ("", "none") and run.buckets.begun != fault.endswith("before") and not done:
            done.append(fault)
            if fault.startswith("stop"):
                stop.ask()
            elif fault.startswith("memory"):
                raise torch.OutOfMemoryError("a made-up end of memory")

    def sent_and_signalled(*arguments: Any, **options: Any) -> Any:
        work = all_reduce(*arguments, **options)
        if not done:
            done.append(fault)
            os.kill(os.getpid(), signal.SIGTERM)
        return work

    handle = first.register_post_accumulate_grad_hook(strike)
    dist.all_reduce = sent_and_signalled if fault.startswith("signal") else all_reduce
    yield
    dist.all_reduce = all_reduce
    handle.remove()


def flat(model: nn.Module) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_both_have_the_sum_that_one_process_computes(results: list[dict[str, Any]]) -> None:
    first, second, alone = results
    assert torch.equal(first[""]["gradients"], second[""]["gradients"])
    torch.testing.assert_close(first[""]["gradients"], alone["gradients"], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(first[""]["losses"] + second[""]["losses"], alone["losses"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("fault", ["memory on the way", "memory before"])
def test_a_process_that_runs_out_of_memory_changes_no_sum(results: list[dict[str, Any]], fault: str) -> None:
    for got in results[:2]:
        torch.testing.assert_close(got[fault]["gradients"], got[""]["gradients"], rtol=1e-9, atol=1e-14)
        assert got[fault]["size"] == 1  # both ranks learn the smaller size


@pytest.mark.parametrize("fault", ["stop on the way", "stop before", "signal while sending"])
def test_a_stop_of_one_process_stops_both_at_once(results: list[dict[str, Any]], fault: str) -> None:
    assert [got[fault] for got in results[:2]] == ["stopped", "stopped"]
    assert all(
        torch.equal(got["none"]["gradients"], got[""]["gradients"]) for got in results[:2]
    )  # the ranks still agree


def count(rank: int, folder: Path) -> None:
    """Run one of two ranks; note what is sent when, and the layout of gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, sent = small_model(), []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **options: (sent.append(tensor.numel()), all_reduce(tensor, **options))[1]
    buckets = Buckets(model, Process(rank, 2, torch.device("cpu")))
    seen = []
    for _ in range(2):  # the second round must equal the first
        buckets.clear()
        losses = model(make_batch([(64, 64)]))
        used = losses if rank == 0 else {"loss_cls": losses["loss_cls"]}  # the mask head gets no gradient there
        with buckets.sending():
            sum(loss.sum() for loss in used.values()).backward()
        on_the_way = sum(sent)
        layouts = [p.grad.stride() == p.stride() for p in model.parameters()]
        buckets.finish()
        seen.append((on_the_way, sum(sent), all(layouts)))
        sent.clear()
    torch.save({"seen": seen, "total": sum(p.numel() for p in model.parameters())}, folder / str(rank))
    dist.destroy_process_group()


def test_each_gradient_is_sent_once_and_early_if_all_ranks_have_it(tmp_path: Path) -> None:
    spawn(count, args=(tmp_path,), nprocs=2)
    for rank in (0, 1):
        got = torch.load(tmp_path / str(rank))
        for on_the_way, whole, as_parameters in got["seen"]:
            assert whole == got["total"] and as_parameters
            assert (on_the_way == whole) if rank == 0 else (on_the_way == 0)  # the first bucket never fills


def test_a_lone_process_sends_nothing_and_its_gradients_keep_their_place() -> None:
    model = small_model()
    buckets = Buckets(model, Process(0, 1, torch.device("cpu")))
    for _ in range(2):
        model.zero_grad()  # as the search for a NaN does
        buckets.clear()
        sum(loss.sum() for loss in model(make_batch([(64, 64)])).values()).backward()
        buckets.finish()
    other = small_model()
    sum(loss.sum() for loss in other(make_batch([(64, 64)])).values()).backward()
    torch.testing.assert_close(flat(model), flat(other))
    assert {p.grad.data_ptr() for p in model.parameters()} == {
        g.data_ptr() for b in buckets.buckets for g in b.gradients
    }
