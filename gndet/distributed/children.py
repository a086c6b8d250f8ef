"""Start Python interpreters, directly or through a library, that import nothing from the current folder.

`python -m` and `python -c` put the current folder first on the path, where a user's numpy.py, or a folder gndet, would
be imported instead of the package.  -P and the variable PYTHONSAFEPATH prevent that.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gndet

SAFE_PATH = "PYTHONSAFEPATH"
# gndet's own folder comes last, for a checkout that is not installed
START = """import runpy, sys
sys.path.append(sys.argv.pop(1))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module like `python -m`, without the current folder on its path."""
    home = Path(gndet.__file__).parent.parent
    return [sys.executable, "-P", "-c", START, str(home), module, *arguments]


@contextmanager
def safe_children() -> Iterator[None]:
    """Keep the current folder off the path of every interpreter started in the context, and of its children.

    multiprocessing starts ranks and its resource tracker, and torch.compile starts its workers, without -P.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before
