"""A bar for work that may be long: it comes only if it is."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")
PATIENCE_SECONDS = 2.0


class DelayedProgress:
    """Shows on a terminal how far several loops in turn have come, from the third second of the whole on.

    Args:
        wanted: whether to show anything.
        console: where; None: the terminal's error stream, which carries no results.
    """

    def __init__(self, wanted: bool = True, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.wanted = wanted and (self.console.is_terminal or self.console.is_jupyter)
        self.bar = Progress(console=self.console, transient=True)
        self.began, self.shown = time.monotonic(), False

    def __enter__(self) -> "DelayedProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.bar.stop()

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """The items, counted."""
        task = self.bar.add_task(what, total=total)
        for item in items:
            yield item
            self.bar.advance(task)
            self._show_if_long()
        self.bar.remove_task(task)

    def _show_if_long(self) -> None:
        if self.wanted and not self.shown and time.monotonic() - self.began > PATIENCE_SECONDS:
            self.shown = True
            self.bar.start()
