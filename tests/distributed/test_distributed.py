"""What a process sets up before it computes."""

import datetime
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faults.launch import free_port, spawn

from gndet.distributed import process as ranks
from gndet.distributed.collectives import exchange
from gndet.distributed.process import Process, limit_waiting, process
from gndet.errors import ConfigError, ProcessLost


def note_allocator(rank: int, device: str, given: dict[str, str], out: Path) -> None:
    """Set up a process; write what its environment says of the allocator."""
    for name in [name for name in os.environ if "ALLOC_CONF" in name]:
        del os.environ[name]
    os.environ |= given
    with process(device):
        out.write_text(json.dumps({name: value for name, value in os.environ.items() if "ALLOC_CONF" in name}))


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("auto", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("auto", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ("auto", {"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
        ("cpu", {}, {}),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_configured_it(
    tmp_path: Path, device: str, given: dict[str, str], expected: dict[str, str]
) -> None:
    spawn(note_allocator, (device, given, tmp_path / "said.json"), nprocs=1)
    assert json.loads((tmp_path / "said.json").read_text()) == expected


def test_a_rank_that_finds_no_other_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    meeting = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "START_TIMEOUT", 1.0)
    with pytest.raises(ProcessLost, match=r"rank 1 could not connect to the other ranks \(.*127\.0\.0\.1") as error:
        process("cpu").__enter__()
    assert port in str(error.value) and "\n" not in str(error.value)


def test_the_loopback_is_never_named_to_gloo() -> None:
    assert ranks._interface_to("127.0.0.1") is None and ranks._interface_to("no.such.host.invalid") is None


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"rank 0 needs GPU 1 \(from 0\) of this machine, which has 1 for it"):
        process("auto").__enter__()


@pytest.mark.parametrize("error", [torch.AcceleratorError, torch.OutOfMemoryError, RuntimeError])
def test_a_fault_of_this_rank_s_gpu_is_not_called_a_lost_rank(error: type[RuntimeError]) -> None:
    expected = ProcessLost if error is RuntimeError else error
    with pytest.raises(expected), exchange(Process(0, 2, torch.device("cpu"))):
        raise error("it failed")


@pytest.mark.parametrize(("backends", "waits"), [("cpu:gloo,cuda:nccl", [5.0, 65.0]), ("cpu:gloo,cuda:gloo", [5.0])])
def test_nccl_waits_longer_than_gloo(monkeypatch: pytest.MonkeyPatch, backends: str, waits: list[float]) -> None:
    """NCCL would end the process at its limit, before it can save."""
    limits = []

    class Group:
        def _get_backend(self, device: torch.device) -> "Group":
            return self

        def _set_default_timeout(self, limit: datetime.timedelta) -> None:
            limits.append(limit.total_seconds())

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", Group)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "set_timeout", lambda limit: limits.append(limit.total_seconds()), raising=False)
    limit_waiting(Process(0, 2, torch.device("cuda", 0)), 5.0)
    assert limits == waits


def test_the_group_s_backends_can_be_asked_and_set(tmp_path: Path) -> None:
    """The functions that the test above replaces are torch's."""
    spawn(set_limits, (tmp_path,), nprocs=2)


def set_limits(rank: int, folder: Path) -> None:
    """Set the time limit of a real group."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    limit_waiting(Process(rank, 2, torch.device("cpu")), 60.0)
    assert "gloo" in dist.get_backend_config()
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    backend._set_default_timeout(datetime.timedelta(seconds=65))
    dist.destroy_process_group()
