"""The child process that imports and tries everything: python -m gndet.toolbox.doctor.inside [CONFIG [key=value ...]].

It writes each title, attempt and fact at once, as a line of JSON.  After a crash (caused by a driver, or by a package
built for another processor) the facts found so far and the last attempt are known.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from gndet.config.loading import load_config
from gndet.errors import GndetError
from gndet.toolbox.doctor.facts import Fact, reason

STEPS = {  # modules of this package; each is imported when its turn comes, because the import may fail
    "packages": "packages", "devices": "devices", "kernels": "kernels", "loading": "data loader", "room": "disk",
}  # fmt: skip
PATIENCE = 180  # seconds per attempt; after that SIGALRM ends this process, wherever it hangs


def rows(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Run the steps; yield their titles, attempts and facts."""
    cfg = load_config(arguments[0], arguments[1:]) if arguments else None
    for step, title in STEPS.items():
        yield {"title": title}
        try:
            for found in importlib.import_module(f"gndet.toolbox.doctor.{step}").facts(cfg):
                yield {"trying": found} if isinstance(found, str) else found._asdict()
        except GndetError as error:
            yield Fact(title, " ".join(str(error).split()), "wrong")._asdict()
        except Exception as error:  # any kind: the doctor is here to find it
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frame.filename}:{frame.lineno}"
            yield Fact(title, f"cannot be tried: {reason(error)} ({place})", "wrong")._asdict()


def write(found: Iterator[dict[str, Any]]) -> None:
    """Print each row to stdout as soon as it is known."""
    report = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints
        for row in found:
            print(json.dumps(row), file=report, flush=True)
            signal.alarm(PATIENCE)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(rows(sys.argv[1:]))
    os._exit(0)  # libraries would take seconds to shut down, and a crash there harms no run
