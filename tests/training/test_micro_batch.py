"""The split of an update into micro-batches and ranks, or by a full memory, does not change what is learned."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import REPOSITORY
from faults.launch import Started, spawn, start
from faults.tiny import CONFIG
from models import make_batch, small_model
from rich.console import Console
from run_files import forget, last, load, losses

from gndet.checkpoint import load_checkpoint
from gndet.config.data import DataConfig
from gndet.config.loading import load_config
from gndet.config.schema import Config
from gndet.data.batches.batch import largest_batch, split
from gndet.data.batches.stream import Loaded, Replay, micro_batches, train_batches
from gndet.data.datasets.reading import read_dataset
from gndet.distributed.process import Process
from gndet.errors import ConfigError, TrainingError
from gndet.train import train
from gndet.training.gradient_buckets import sum_gradients
from gndet.training.memory import MIB, TensorBytes
from gndet.training.setup import build_run
from gndet.training.update import backward, resident_bytes

EXACT = ("train.precision=float64",)  # rounding in float32 may flip a sampled region
pytestmark = pytest.mark.usefixtures("thin")
SIZES = [(96, 128), (128, 97), (65, 80), (128, 128)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    schedule = CONFIG["train"]["schedule"] | {"reference_batch": 8}
    path.write_text(yaml.safe_dump(CONFIG | {"train": CONFIG["train"] | {"global_batch": 8, "schedule": schedule}}))
    return path


def two_ranks(config: Path, out: str, *overrides: str) -> Started:
    """Start the same run on two ranks; that torchrun starts them just so is what tests/faults tries."""
    batch = ("train.global_batch=8", "train.schedule.reference_batch=8")
    return start(config.parent, out, *batch, *overrides, world=2)


def difference(a: Path, b: Path) -> tuple[float, float]:
    """Return the largest relative difference of two runs: of a weight tensor (L2), and of a step's loss."""
    one, two = last(a), last(b)
    weights = [name for name in one if name.startswith(("model/", "ema/")) and one[name].is_floating_point()]
    steps = zip(losses(a), losses(b), strict=True)
    return (
        max(((one[name] - two[name]).norm() / (one[name].norm() + 1e-12)).item() for name in weights),
        max(abs(x - y) / abs(x) for (_, x), (_, y) in steps),
    )


def test_8x1_4x2_1x8_and_2_processes_x_2_x_2_learn_the_same(config: Path) -> None:
    recipe = ("train.optimizer.kind=adamw", "train.optimizer.clip_grad_norm=1", "train.schedule.updates=4")
    train(load(config, "whole", *EXACT, *recipe, "train.images_per_gpu=8"))
    for size in (1, 2, 3):
        train(load(config, f"by-{size}", *EXACT, *recipe, f"train.images_per_gpu={size}"))
    two_ranks(config, "two", *EXACT, *recipe, "train.images_per_gpu=2").expect(0, 0)
    for other in ("by-1", "by-2", "by-3", "two"):
        assert max(difference(config.parent / "whole", config.parent / other)) < 1e-9


def test_processes_whose_shares_differ_learn_the_same(config: Path) -> None:
    options = (*EXACT, "train.global_batch=5", "train.schedule.updates=3")  # 3 images and 2, of a set of 7
    train(load(config, "one", *options))
    two_ranks(config, "two", *options, "train.images_per_gpu=2").expect(0, 0)
    assert max(difference(config.parent / "one", config.parent / "two")) < 1e-9


def test_batch_statistics_do_not_learn_the_same(config: Path) -> None:
    """Guards the tests above: their property does not hold by itself."""
    options = (*EXACT, "model.norm.kind=bn", "train.schedule.updates=2")
    for size in (2, 4):
        train(load(config, f"by-{size}", *options, f"train.images_per_gpu={size}"))
    assert min(difference(config.parent / "by-2", config.parent / "by-4")) > 1e-3


def test_sync_bn_over_two_processes_learns_what_bn_does_in_one(config: Path) -> None:
    options = (*EXACT, "train.schedule.updates=2", "model.masks=false")  # two micro-batches per update
    options += ("data.shortest_edge=[64]",)  # no padding, which BN would see
    train(load(config, "one", *options, "model.norm.kind=bn", "train.images_per_gpu=4"))
    two_ranks(config, "two", *options, "model.norm.kind=sync_bn", "train.images_per_gpu=2").expect(0, 0)
    assert max(difference(config.parent / "one", config.parent / "two")) < 1e-9


def test_a_process_that_cannot_go_on_ends_the_run_with_its_reason_on_all(config: Path) -> None:
    sizes = ("data.shortest_edge=[64,128]", "train.global_batch=2", "train.images_per_gpu=1")
    limit = sum(peak_mib(config, 1, f"data.shortest_edge=[{edge}]") for edge in (64, 128)) / 2
    text = two_ranks(config, "run", *sizes, f"train.memory_limit_mib={limit}", "train.log_every=1").expect(2, 2)
    told = [line for line in text.splitlines() if line.startswith("gndet train: ")]
    assert "Connection closed" not in text
    assert told and all("out of memory with 1 image(s) at once (rank " in line for line in told), text


def count_messages(rank: int, rendezvous: str, outputs: str) -> None:
    """Run one of two ranks: sum the gradients once, and note what was sent."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, sent = small_model(), []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: (sent.append(tensor.numel()), all_reduce(tensor))[1]
    if rank == 0:  # the share of rank 1 reaches no parameter
        sum(p.sum() for p in model.parameters()).backward()
    sum_gradients(model, Process(rank, 2, torch.device("cpu")))
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save({"sent": sum(sent), "gradients": gradients}, f"{outputs}/{rank}")
    dist.destroy_process_group()


def test_every_gradient_is_sent_once_an_update(tmp_path: Path) -> None:
    spawn(count_messages, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        got = torch.load(tmp_path / str(rank))
        assert got["sent"] == len(got["gradients"]) and (got["gradients"] == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_shares_cover_an_update_and_differ_by_one_image_at_most(world: int, size: int) -> None:
    shares = [[place for part in micro_batches(8, size, rank, world) for place in part] for rank in range(world)]
    assert sorted(place for share in shares for place in share) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(len(part) <= size for rank in range(world) for part in micro_batches(8, size, rank, world))
    assert micro_batches(8, 2, 1, 2) == [range(2, 4), range(6, 8)]  # the images of a round are adjacent


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_split_batch_has_the_same_losses_on_smaller_canvases(num: int) -> None:
    model, batch = small_model().double(), make_batch(SIZES)
    parts = split(batch, num, 32)
    assert [len(part.images) for part in parts] == {1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1]}[num]
    whole, pieces = model(batch), [model(part) for part in parts]
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), expected, rtol=1e-9, atol=1e-12)
    if num == 1:
        assert [tuple(part.images.shape[2:]) for part in parts] == SIZES and not any(part.padded for part in parts)
    assert split(batch, 4, 32)[0] is batch


def test_an_update_s_batches_can_be_gone_through_again() -> None:
    source = iter([Loaded(number, (), ()) for number in (1, 2, 3, 4)])
    update = Replay(functools.partial(next, source), 3)
    assert next(iter(update)) == 1  # interrupted
    assert list(update) == [1, 2, 3] == list(update)
    assert next(source).batch == 4 and [loaded.batch for loaded in update.taken] == [1, 2, 3]


@pytest.mark.parametrize("edges", [(64,), (64, 72), (64, 96)])
def test_no_batch_is_larger_than_the_largest(config: Path, data_root: Path, edges: tuple[int, ...]) -> None:
    data = DataConfig(root=str(data_root / "coco-tiny"), shortest_edge=edges, max_edge=120, workers=0)
    train_set = read_dataset(data.train, data)
    for num in (1, 3):
        largest = largest_batch(train_set, data, num, masks=True)
        assert largest_batch(train_set, data, num, masks=True, objects=200).gt.valid.sum() == 200 * num
        assert len(largest.images) == num and largest.gt.masks.shape[1:] == (largest.gt.valid.shape[1], 112, 112)
        for batch, *_ in train_batches(
            train_set, data, seed=0, start=0, stop=60 // num, images_per_gpu=num, global_batch=num, rank=0, world=1,
            masks=True, pin_memory=False,
        ):  # fmt: skip
            assert batch.images[0].numel() <= largest.images[0].numel()
            assert batch.gt.valid.shape[1] <= largest.gt.valid.shape[1]


# --- as many as fit in memory


def peak_mib(config: Path, size: int, *overrides: str) -> float:
    """Return the peak memory in a step over the largest batch of `size` images."""
    cfg = load(config, "peak", *overrides)
    run, _ = build_run(cfg, Path("unused"), Process(0, 1, torch.device("cpu")), None)
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = largest_batch(
        run.train_set, cfg.data, size, masks=True, objects=4
    )  # as many as there may be positive regions
    with TensorBytes(10**12, resident_bytes(run)) as counted:
        backward(run.model, run.autocast, [batch], size, cfg)
    return counted.peak / MIB


def messages(config: Path, out: str, *overrides: str) -> str:
    with (config.parent / "log").open("w") as file:
        train(load(config, out, "train.schedule.updates=1", *overrides), console=Console(file=file))
    return (config.parent / "log").read_text()


@pytest.mark.parametrize("size", [1, 4, 8])
def test_auto_takes_the_largest_that_leaves_the_margin_free(config: Path, size: int) -> None:
    limit = (peak_mib(config, size) + 0.5) / 0.9
    text = messages(config, "run", "train.images_per_gpu=auto", f"train.memory_limit_mib={limit}")
    assert f"8 images per update over 1 rank(s) on cpu, {size} at once" in text
    assert "out of memory" not in text


def test_auto_that_cannot_is_refused_before_anything_is_written(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"not even one image fits in 90 % of train\.memory_limit_mib: 12, with"):
        train(load(config, "run", "train.images_per_gpu=auto", "train.memory_limit_mib=12"))
    with pytest.raises(ConfigError, match=r"auto on a CPU needs train\.memory_limit_mib"):
        train(load(config, "run", "train.images_per_gpu=auto"))
    with pytest.raises(ConfigError, match=r"auto would change what is learned: model\.norm\.kind: bn takes its"):
        load(config, "run", "train.images_per_gpu=auto", "model.norm.kind=bn")
    with pytest.raises(ConfigError, match=r"model\.fpn\.norm\.padding: plain includes the padding"):
        load(config, "run", "train.images_per_gpu=auto", "model.fpn.norm.padding=plain")
    assert not (config.parent / "run").exists()


def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing_learned(config: Path) -> None:
    kept = (*EXACT, "train.memory=fast")  # so that images take more memory than weights
    train(load(config, "calm", *kept, "train.images_per_gpu=1"))
    limit = (peak_mib(config, 2, *kept) + peak_mib(config, 4, *kept)) / 2
    with (config.parent / "log").open("w") as file:
        cfg = load(config, "tight", *kept, "train.images_per_gpu=8", f"train.memory_limit_mib={limit}")
        train(cfg, console=Console(file=file))
    text = (config.parent / "log").read_text()
    assert "out of memory with 8 images at once, continuing with" in text and "does not change what is learned" in text
    assert text.count("out of memory") <= 2  # not at every update: later ones start with the smaller size
    lines = [json.loads(line) for line in (config.parent / "tight" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_at_once"] for line in lines if line["kind"] == "train"][-1] == 2
    assert max(difference(config.parent / "calm", config.parent / "tight")) < 1e-9


def test_running_out_of_memory_stops_a_run_if_fewer_images_would_change_it(config: Path) -> None:
    limit = "train.memory_limit_mib=12"
    with pytest.raises(TrainingError, match=r"out of memory with 1 image\(s\) at once .*lower data\.max_edge"):
        train(load(config, "run", "train.images_per_gpu=1", limit))
    # with this seed the first picture is small, the second large
    options = ("train.images_per_gpu=1", "train.global_batch=1", "train.checkpoint_every=0", "seed=5")
    edges = ("data.shortest_edge=[32,256]", "data.max_edge=256")
    peaks = (peak_mib(config, 1, f"data.shortest_edge=[{edge}]", edges[1]) for edge in (32, 256))
    room = sum(peaks) / 2
    with pytest.raises(TrainingError, match="out of memory"):
        train(load(config, "late", *options, *edges, f"train.memory_limit_mib={room}"))
    assert load_checkpoint(config.parent / "late" / "last").meta["update"] == 1  # what was learned is kept
    tight = f"train.memory_limit_mib={peak_mib(config, 2)}"
    with pytest.raises(TrainingError, match=r"with 8 image.*fewer would change what is learned: .*kind: bn.* lower"):
        train(load(config, "bn", "train.images_per_gpu=8", "model.norm.kind=bn", tight))


@pytest.mark.parametrize(("kind", "keys"), [("sgd", 1), ("adamw", 3)])
def test_the_first_step_of_the_optimizer_takes_no_memory(config: Path, kind: str, keys: int) -> None:
    cfg = load(config, "unused", f"train.optimizer.kind={kind}")
    run, _ = build_run(cfg, Path("unused"), Process(0, 1, torch.device("cpu")), None)
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = resident_bytes(run)
    assert {len(state) for state in run.optimizer.state.values()} == {keys}
    with TensorBytes(before, before) as counted:  # raises if a byte is added
        run.optimizer.step()
    assert counted.peak == resident_bytes(run) == before


def test_a_limit_below_what_training_always_holds_is_refused_with_what_takes_how_much(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"without any image, training takes 14 MiB on cpu \(weights 3,") as error:
        train(load(config, "run", "train.memory_limit_mib=12", "train.optimizer.kind=adamw"))
    assert "optimizer state 6), but train.memory_limit_mib is 12; choose a smaller model, train.opt" in str(error.value)
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("limit_mib", [4, 12, 15, 20])  # in the weights, the average, the optimizer's state
def test_memory_that_runs_out_in_set_up_is_an_error_of_the_config(config: Path, limit_mib: int) -> None:
    cfg = load(config, "unused", "train.optimizer.kind=adamw", "train.precision=float64")
    proc = Process(0, 1, torch.device("cpu"))
    text = rf"averaged weights \d.* but memory ran out \(\d+ MiB of tensors, the limit is {limit_mib}\); choose a"
    with pytest.raises(ConfigError, match=text), TensorBytes(limit_mib * MIB):
        build_run(cfg, Path("unused"), proc, None)


# --- splits that are not possible


def checked(world: int, *overrides: str) -> None:
    if mistake := load_config(REPOSITORY / "configs/quickstart.yaml", overrides).split_mistake(world):
        raise ConfigError(mistake)


def test_splits_that_are_not_possible_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"images_per_gpu: 9 is more than 8 images per rank of .*global_batch: 8"):
        checked(1, "train.global_batch=8", "train.images_per_gpu=9")
    with pytest.raises(ConfigError, match=r"global_batch: 2 is less than the number of ranks, 3"):
        checked(3, "train.images_per_gpu=1")
    with pytest.raises(ConfigError, match=r"images_per_gpu: 8 is more than 4 images per rank of .*: 8"):
        checked(2, "train.global_batch=8", "train.images_per_gpu=8")
    with pytest.raises(ConfigError, match=r"global_batch: 3 is not a multiple of train\.images_per_gpu: 2, and .*: bn"):
        checked(1, "train.global_batch=3", "model.norm.kind=bn")
    with pytest.raises(ConfigError, match=r"global_batch: 6 .* 2 x 2 ranks, and model\.norm\.kind: sync_bn takes its"):
        checked(2, "train.global_batch=6", "model.norm.kind=sync_bn")
    checked(3, "train.global_batch=7", "train.images_per_gpu=2")  # 2, 2 and 3 images


def test_a_data_set_of_one_image_fills_an_update_with_it(config: Path) -> None:
    """The rule: an epoch ends after its last image, even in the middle of an update."""
    train(load(config, "run", "data.train.count=1", "train.schedule.updates=1", "train.images_per_gpu=3"))
    assert last(config.parent / "run")


def test_the_split_may_change_when_a_run_goes_on_unless_it_matters(config: Path) -> None:
    def cfg(out: str, *overrides: str) -> Config:
        return load(config, out, "train.checkpoint_every=1", "train.schedule.updates=2", *overrides)

    train(cfg("gn", "train.images_per_gpu=4"))
    forget(config.parent / "gn", 2)
    train(cfg("gn", "train.images_per_gpu=1"))
    train(cfg("bn", "train.images_per_gpu=4", "model.norm.kind=bn"))
    forget(config.parent / "bn", 2)
    with pytest.raises(TrainingError, match=r"train\.images_per_gpu: 4 there, 2 now"):
        train(cfg("bn", "train.images_per_gpu=2", "model.norm.kind=bn"))
    options = ("train.checkpoint_every=1", "train.schedule.updates=2", "train.images_per_gpu=4", "model.norm.kind=bn")
    text = two_ranks(config, "bn", *options).expect(2, 2)
    assert "trained by 1 rank(s), there are 2 now, which would change what is learned: model.norm" in text
