"""The council: advisors that debate by batched local inference, and a synthesis that rests on what they said. See docs/council.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

if TYPE_CHECKING:
    from pantheraml.council.calibration import Calibration as Calibration
    from pantheraml.council.live import View as View
    from pantheraml.council.local import Local as Local
    from pantheraml.council.persona import DEFAULT_PERSONAS as DEFAULT_PERSONAS
    from pantheraml.council.persona import Endpoint as Endpoint
    from pantheraml.council.persona import Persona as Persona
    from pantheraml.council.persona import load_personas as load_personas
    from pantheraml.council.rounds import debate as debate
    from pantheraml.council.settings import Event as Event
    from pantheraml.council.settings import Settings as Settings
    from pantheraml.council.transcript import Transcript as Transcript
    from pantheraml.council.transcript import Turn as Turn

_HOMES = {
    "Calibration": "pantheraml.council.calibration",
    "DEFAULT_PERSONAS": "pantheraml.council.persona",
    "Endpoint": "pantheraml.council.persona",
    "Event": "pantheraml.council.settings",
    "Local": "pantheraml.council.local",
    "Persona": "pantheraml.council.persona",
    "Settings": "pantheraml.council.settings",
    "Transcript": "pantheraml.council.transcript",
    "Turn": "pantheraml.council.transcript",
    "View": "pantheraml.council.live",
    "debate": "pantheraml.council.rounds",
    "load_personas": "pantheraml.council.persona",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] - it cannot count them; the table is the one list of the names
__getattr__, __dir__ = homes(__name__, _HOMES)
