"""What a process sets up before it computes."""

import json
import os
from pathlib import Path

import pytest
from faults.launch import spawn

from gndet.distributed.process import process


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
