"""What a process sets up before it computes."""

import json
import os
from pathlib import Path

import pytest
from faults.launch import free_port, spawn

from gndet.distributed import process as ranks
from gndet.distributed.process import process
from gndet.errors import ProcessLost


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
