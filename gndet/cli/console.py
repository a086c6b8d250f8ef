"""The console of a run: rich draws with escape sequences of its own, the texts that it shows have none."""

import sys
from collections.abc import Iterable
from contextlib import suppress

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from gndet.cli.terminal import EscapingStream
from gndet.text import escaped


class EscapingConsole(Console):
    """A console on stdout that escapes all texts that are shown in it."""

    def __init__(self) -> None:
        super().__init__(file=sys.stdout.stream if isinstance(sys.stdout, EscapingStream) else None)

    def on_broken_pipe(self) -> None:
        """Write nothing more, where rich would also end the program: what runs behind `| head` goes on."""
        with suppress(SystemExit):
            super().on_broken_pipe()

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; only rich's own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))
