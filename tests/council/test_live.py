"""What somebody sees who watches a debate."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from pantheraml.council import Event, Turn, View

SAID = Turn(advisor="ann", round=0, text="It [bold]is\x1b[31m so.\nAnswer: 4", position="4")
LOST = Turn(advisor="bob", round=0, error="gone")


def watched(terminal: bool) -> str:
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with View(console) as view:
        view.hear(Event(kind="recalled", text="Was it? -> yes"))
        view.hear(Event(kind="round", round=0))
        view.hear(Event(kind="text", round=0, advisor="ann", text="It [bold]is\x1b[31m"))
        view.hear(Event(kind="text", round=0, advisor="ann", text=" so."))
        if terminal:
            console.print(view.table())
        view.hear(Event(kind="turn", round=0, advisor="ann", text=SAID.text, turn=SAID))
        view.hear(Event(kind="turn", round=0, advisor="bob", turn=LOST))
        view.hear(Event(kind="sampling"))
        view.hear(Event(kind="verdict", text="printed by whoever asked"))
    return out.getvalue()


def test_without_a_terminal_it_is_plain_lines_of_what_is_complete() -> None:
    assert watched(False).splitlines() == [
        "recalled: Was it? -> yes",
        "round 0",
        "[ann] It [bold]is\ufffd[31m so.",
        "Answer: 4",
        "[bob] failed: gone",
        "asking again, to see who says the same",
    ]


def test_on_a_terminal_a_table_fills_and_advisors_cannot_move_the_cursor() -> None:
    said = watched(True)
    assert "writes" in said and "It [bold]is\ufffd[31m so." in said and "[bob] failed: gone" in said
    assert "\x1b[31m" not in said
