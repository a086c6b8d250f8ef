"""Start Python interpreters, directly or through a library, that import nothing from the current folder.

`python -m` and `python -c` put the current folder first on the path, where a user's numpy.py, or a folder gndet, would
be imported instead of the package.  -P and the variable PYTHONSAFEPATH prevent that.

Every process that gndet starts ends soon after the process that started it, however that one ended.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gndet

SAFE_PATH = "PYTHONSAFEPATH"
# gndet's own folder comes last, for a checkout that is not installed
START = """import runpy, sys
home, parent, module = sys.argv[1:4]
del sys.argv[1:4]
sys.path.append(home)
from gndet.distributed.children import end_with_parent
end_with_parent(int(parent))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
LOOK = 0.5  # seconds between checks that the parent process is alive
# seconds for an orphan to save its state; shorter than work_folder.LOCK_WAIT, so that a new run can take its folder
ORPHAN_GRACE = 6.0


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module like `python -m`, without the current folder on its path.

    Only this process may start it, because it ends with this process.
    """
    home = Path(gndet.__file__).parent.parent
    return [sys.executable, "-P", "-c", START, str(home), str(os.getpid()), module, *arguments]


def end_with_parent(parent: int, grace: float = ORPHAN_GRACE) -> None:
    """End this process soon after its parent: SIGTERM, so that a run can save, and SIGKILL after `grace` seconds.

    parent: the process id of the parent; it may have ended before this call.  A thread looks for its end.  Linux can
    send a signal instead (PR_SET_PDEATHSIG), but already when the thread ends that started this process, and only one,
    which a process that hangs or ignores it would survive.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent").start()


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
