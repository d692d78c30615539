"""A debate to be watched: a table that fills while the advisors write, or plain lines where there is no terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from pantheraml.council.transcript import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from pantheraml.council.settings import Event

_TAIL = 200
"""Characters of an answer that is being written."""


class View:
    """Shows what happens; a context manager. Give `hear` to a debate as its on_event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._round = 0
        self._state: dict[str, tuple[str, str]] = {}
        self._live: Live | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            from rich.live import Live

            live = Live(console=self._console, get_renderable=self.table, refresh_per_second=8, transient=True)
            self._live = self._stack.enter_context(live)
        return self

    def __exit__(self, *_: object) -> None:
        self._live = None
        self._stack.close()

    def hear(self, event: Event) -> None:
        """Show what has happened."""
        match event.kind:
            case "recalled":
                self._line(f"recalled: {event.text}")
            case "round":
                self._round = event.round
                self._state = dict.fromkeys(self._state, ("waits", ""))
                self._line(f"round {event.round}")
            case "text":
                _, before = self._state.get(event.advisor, ("", ""))
                self._state[event.advisor] = ("writes", (before + event.text)[-_TAIL:])
            case "turn":
                self._turn(event)
            case "sampling":
                self._line("asking again, to see who says the same")
            case "verdict":
                pass  # whoever asked prints it

    def _turn(self, event: Event) -> None:
        assert event.turn is not None
        if event.turn.error is not None:
            self._state[event.advisor] = ("failed", event.turn.error)
            self._line(f"[{event.advisor}] failed: {event.turn.error}")
            return
        self._state[event.advisor] = ("done", event.turn.position)
        self._line(f"[{event.advisor}] {event.text.strip()}")

    def _line(self, said: str) -> None:
        """What stays on the screen, above the table if there is one."""
        self._console.print(shown(said), markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """Who writes, and what, as it stands."""
        from rich.table import Table
        from rich.text import Text

        table = Table("advisor", "", f"round {self._round}", box=None, pad_edge=False, expand=True)
        for name, (state, said) in list(self._state.items()):
            one_line = " ".join(shown(said).split())
            table.add_row(Text(name), Text(state), Text(one_line[-100:], overflow="ellipsis", no_wrap=True))
        return table
