"""What an open store is made of: rows, segments, codecs and the index, whatever the tenant."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.memory.codec import Codecs
from pantheraml.memory.cold import Cold
from pantheraml.memory.contents import Contents
from pantheraml.memory.finder import Finder
from pantheraml.memory.gist import GistCodec, Summarise
from pantheraml.memory.policy import Budgets
from pantheraml.memory.records import Records
from pantheraml.memory.seal import Keys
from pantheraml.memory.shared import Shared
from pantheraml.memory.warm import Warm
from pantheraml.memory.zstd import ZstdCodec

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device
    from pantheraml.memory.neural import NeuralCodec

COLD, SHARED, INDEX = "cold", "shared", "index"
TRAINING = "training"
"""Folder in which a model is trained; it holds texts in the clear, and goes with the training, or when the store is next opened to be written."""
DICTIONARIES, MODEL, QUARANTINE = "dictionaries", "model", "quarantine"
_ABOUT_SETTING = b"setting "
SMALL_LEVEL = 19
"""Of zstd, for what is encoded once and kept long."""


class Parts:
    """What all memories of one open store share, whatever their tenant."""

    def __init__(
        self,
        path: Path,
        *,
        create: bool,
        readonly: bool,
        keys: Keys | None,
        embedder: str | None,
        device: str,
        budgets: Budgets,
        summarise: Summarise | None,
        wait_s: float,
        announce: Callable[[str], None],
    ) -> None:
        self.path, self.readonly, self.budgets, self.announce = path, readonly, budgets, announce
        self.asked_device, self._summarise = device, summarise
        self.lock = threading.RLock()
        self.hot: dict[int, bytes] = {}
        """Contents that lie decoded in memory, by number; compacting says which."""
        with ExitStack() as stack:
            opened = Records if readonly else Warm
            how: dict[str, Any] = {"readonly": readonly, "create": create, "wait_s": wait_s, "announce": announce}
            self.records: Records = stack.enter_context(opened(path, keys=keys, **how))
            readonly = readonly or self.records.readonly
            if not readonly:
                shutil.rmtree(path / TRAINING, ignore_errors=True)
            self.shared = Shared(path / SHARED, readonly=readonly, announce=announce, seal=lambda: self.records.seal)
            self.cold = Cold(path / COLD, readonly=readonly, announce=announce)
            self.contents = Contents(self.records, self.cold)
            self.open_codecs()
            self.finder = Finder(
                self.records,
                self.shared,
                path / INDEX,
                asked=embedder,
                device=lambda: self.device,
                announce=announce,
                quarantined=lambda: self.quarantined,
            )
            self._stack = stack.pop_all()

    @cached_property
    def device(self) -> Device:
        """Where models compute; looked for when it is needed."""
        from pantheraml.hardware.device import parse_device
        from pantheraml.hardware.find import find
        from pantheraml.recipe.types import HardwareAsk

        kind, index = parse_device(self.asked_device)
        return find(HardwareAsk(kind=kind, index=index or 0), training=False, asked_by=f"device={self.asked_device!r}").device

    @property
    def warm(self) -> Warm:
        """To be written. Raises: ValueError if the store was opened for reading."""
        if not isinstance(self.records, Warm):
            raise ValueError("the store was opened for reading")
        return self.records

    def gists(self) -> GistCodec:
        """What makes gists of texts, as the store finds its records."""
        return GistCodec(self.finder.embedder, summarise=self._summarise)

    def open_codecs(self) -> None:
        """As the settings say which dictionaries and which model there are."""
        settings = self.records.settings()
        said: dict[str, Any] = json.loads(self.kept(DICTIONARIES) or b"{}")
        self._settings = settings.get(DICTIONARIES), settings.get(MODEL)
        dictionaries = {kind: bytes.fromhex(each["id"]) for kind, each in said.items()}
        self.zstd = ZstdCodec(self.shared, dictionaries=dictionaries, announce=self.announce)
        small = ZstdCodec(self.shared, level=SMALL_LEVEL, dictionaries=dictionaries, announce=self.announce)
        self.neural = self._open_neural(settings.get(MODEL))
        self.codecs = Codecs(self.zstd, self.neural, bases=self.contents.bases, announce=self.announce)
        self.small_codecs = Codecs(small, self.neural, bases=self.contents.bases, announce=self.announce)
        self.contents.codecs = self.codecs

    def _open_neural(self, id: bytes | None) -> NeuralCodec | None:
        if id is None:
            return None
        from pantheraml.memory.neural import NeuralCodec

        return NeuralCodec(self.shared, bytes.fromhex(id.decode()), device=lambda: self.device)

    def close(self) -> None:
        """Ends it, and keeps the index."""
        with self.lock:
            if not self.readonly and not self.records.readonly:
                self.finder.save()
            self._stack.close()

    def kept(self, name: str) -> bytes | None:
        """A setting that tells of records, such as the names of kinds; None if it was never set."""
        value, seal = self.records.settings().get(name), self.records.seal
        if value is None or seal is None or value[:2] in (b"{}", b'{"'):  # JSON in the clear, from before these were sealed
            return value
        return seal.unseal(value, _ABOUT_SETTING + name.encode())

    def keep(self, name: str, value: bytes) -> None:
        """Sets such a one, sealed where the store is encrypted."""
        seal = self.records.seal
        self.warm.set({name: value if seal is None else seal.seal(value, _ABOUT_SETTING + name.encode())})

    @property
    def quarantined(self) -> dict[int, str]:
        """Number of each record that has failed a check, and why."""
        said: dict[str, str] = json.loads(self.kept(QUARANTINE) or b"{}")
        return {int(id): why for id, why in said.items()}

    def quarantine(self, failed: Mapping[int, str]) -> None:
        """Records that have failed a check are no longer found; getting one says why. They leave it when they are put again."""
        if failed and not self.records.readonly:
            known = self.quarantined
            self.keep(QUARANTINE, json.dumps({str(id): why for id, why in {**known, **failed}.items()}).encode())
            self.finder.hot.remove(list(failed))

    def restored(self, ids: Iterable[int]) -> None:
        """They were put again."""
        known, back = self.quarantined, set(ids)
        left = {str(id): why for id, why in known.items() if id not in back}
        if len(left) < len(known):
            self.keep(QUARANTINE, json.dumps(left).encode())
