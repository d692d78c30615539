"""The HTTP face: OpenAI-compatible chat, completions and embeddings, and the council, over one batch of rows. See docs/serve.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pantheraml.lazy import homes

if TYPE_CHECKING:
    from pantheraml.serve.app import create_app as create_app
    from pantheraml.serve.limits import Limits as Limits
    from pantheraml.serve.opening import open_service as open_service
    from pantheraml.serve.server import serve as serve
    from pantheraml.serve.service import Service as Service

_HOMES = {
    "Limits": "pantheraml.serve.limits",
    "Service": "pantheraml.serve.service",
    "create_app": "pantheraml.serve.app",
    "open_service": "pantheraml.serve.opening",
    "serve": "pantheraml.serve.server",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll] - it cannot count them; the table is the one list of the names
__getattr__, __dir__ = homes(__name__, _HOMES)
