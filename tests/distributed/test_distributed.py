"""What a process sets up before it computes."""

import os
import subprocess
import sys

import pytest

CODE = (
    "import os, sys\nfrom gndet.distributed.process import process\nwith process(sys.argv[1]):\n"
    "    print({name: value for name, value in os.environ.items() if 'ALLOC_CONF' in name})"
)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("auto", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("auto", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ("auto", {"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
        ("cpu", {}, {}),
    ],
)
def test_the_allocator_is_told_to_grow_its_segments_unless_the_user_has_told_it_something(
    device: str, given: dict[str, str], expected: dict[str, str]
) -> None:
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", CODE, device], env=clean | given, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr
