"""Ask a program that compiles Triton kernels; Triton reads when it is imported whether to interpret them instead."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY


def answer_of(program: str, folder: Path, *arguments: str) -> Any:
    """Run a program of tests/ without the interpreter, with Triton's cache in the folder; return the JSON it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(REPOSITORY), str(REPOSITORY / "tests"), environment.get("PYTHONPATH", ""))
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(REPOSITORY / "tests" / program), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
