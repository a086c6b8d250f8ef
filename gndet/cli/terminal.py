"""What the command line prints: texts from data, checkpoints and file names are shown and never steer the terminal."""

import io
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# control characters but line break and tab, what reverses the order of letters, and surrogates, which no encoding has
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """Replace what would steer a terminal by escapes like \\x1b."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


class EscapingStream:
    """A text stream that escapes what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in data may not fit the terminal's encoding

    def write(self, text: str) -> int:
        """Write text.  Returns its length."""
        self.stream.write(escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts one after the other."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is printed while the context lasts, also the traceback of an error; such an error ends with status 1.

    The standard streams may be None, if they were closed before the start.
    """
    out, err = (stream and cast(TextIO, EscapingStream(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
