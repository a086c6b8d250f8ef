"""The process that imports and tries everything: python -m gndet.toolbox.doctor.inside [CONFIG [key=value ...]].

It writes a line of JSON for each title, attempt and fact as it comes to them, so that what ends it (a package built for
another processor, a driver) leaves what was found before, and what was tried last.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from gndet.config.loading import load_config
from gndet.errors import GndetError
from gndet.toolbox.doctor.facts import Fact, reason

STEPS = {  # modules of this package: imported in turn, since importing one may be what does not work
    "packages": "packages", "devices": "devices", "kernels": "kernels", "loading": "data loader", "room": "disk",
}  # fmt: skip


def main(arguments: list[str], write: Callable[[dict[str, Any]], None]) -> None:
    """Go through the steps."""
    cfg = load_config(arguments[0], arguments[1:]) if arguments else None
    for step, title in STEPS.items():
        write({"title": title})
        try:
            for found in importlib.import_module(f"gndet.toolbox.doctor.{step}").facts(cfg):
                write({"trying": found} if isinstance(found, str) else found._asdict())
        except GndetError as error:
            write(Fact(title, " ".join(str(error).split()), "wrong")._asdict())
        except Exception as error:  # whatever it is, it is what was looked for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{frame.filename}:{frame.lineno}"
            write(Fact(title, f"cannot be tried: {reason(error)} ({place})", "wrong")._asdict())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    report = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints

        def put(one: dict[str, Any]) -> None:
            """A line of the report."""
            report.write(json.dumps(one) + "\n")
            report.flush()

        main(sys.argv[1:], put)
    os._exit(0)  # all is said; libraries would take seconds to go, and what one does wrong then harms no run
