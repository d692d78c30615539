"""Content by a language model: what it finds likely takes few bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pantheraml.errors import StorageError
from pantheraml.memory.container import NEURAL, NEURAL_FLOAT, Payload
from pantheraml.memory.range_coder import RangeDecoder, RangeEncoder
from pantheraml.memory.record import FORMS, Form, Origin
from pantheraml.memory.shared import ID_BYTES, Shared

if TYPE_CHECKING:
    from pantheraml.hardware.device import Device
    from pantheraml.memory.predictor import Predictor

LARGEST_CONTENT = 1 << 20
"""Bytes of a content. A megabyte takes a core half a minute, and other codecs have learned its likes by then."""
_ENCODED_AT_ONCE = 512
"""Contents whose frequencies are held together: 24 bytes a token."""
_KEPT_SHARE = 0.75
"""Rows that are done are let go when no more than so many are left of those that are computed."""


class NeuralCodec:
    """A `codec.Codec` that lets a model predict each token, and writes how far it was wrong. Safe to use from several threads.

    Nothing of torch is imported before something is encoded or decoded.

    Args:
        shared: where models (.nbm) are kept. model: id of the one that encodes; None: the first of `predictors`.
        device: on which they compute, or what finds it when it is needed.
        predictors: others that can be used, as a `FloatPredictor`.
    """

    name = "neural"
    numbers = frozenset((NEURAL, NEURAL_FLOAT))

    def __init__(
        self,
        shared: Shared | None,
        model: bytes | None = None,
        *,
        device: Device | Callable[[], Device] | None = None,
        predictors: Sequence[Predictor] = (),
    ) -> None:
        if model is None and not predictors:
            raise ValueError("a neural codec needs a model, or a predictor")
        self._shared, self._device = shared, device
        self._opened = {each.fingerprint: each for each in predictors}
        self._model = model if model is not None else predictors[0].fingerprint
        self._lock = threading.Lock()

    @property
    def model(self) -> bytes:
        """The id of what encodes."""
        return self._model

    def origin(self, batch: int) -> Origin:
        """Where a batch of so many contents is encoded."""
        return self._predictor(self._model).origin(batch)

    def encode(self, contents: Sequence[bytes], forms: Sequence[Form], kinds: Sequence[str]) -> list[Payload | None]:
        """Payloads of the contents; None for those that are empty, over `LARGEST_CONTENT`, or do not become smaller.

        They have not been decoded yet; `Codecs` does so before it keeps one.
        """
        payloads: list[Payload | None] = [None] * len(contents)
        chosen = [i for i, content in enumerate(contents) if 0 < len(content) <= LARGEST_CONTENT]
        predictor = self._predictor(self._model)
        for at in range(0, len(chosen), _ENCODED_AT_ONCE):
            part = chosen[at : at + _ENCODED_AT_ONCE]
            tokens = predictor.tokens.encode([contents[i] for i in part])
            for i, intervals in zip(part, predictor.intervals(tokens), strict=True):
                encoder = RangeEncoder()
                for start, width, total in intervals.T.tolist():
                    encoder.push(start, width, total)
                data = encoder.finish()
                if len(data) < len(contents[i]):
                    payloads[i] = Payload(predictor.number, FORMS.index(forms[i]), len(contents[i]), predictor.fingerprint, data)
        return payloads

    def decode(self, payloads: Sequence[Payload]) -> list[bytes]:
        """The contents. Raises: StorageError if a model is missing, computes in another way here, or a payload says what cannot be."""
        contents = [b""] * len(payloads)
        for fingerprint in sorted({each.model for each in payloads}):
            predictor = self._predictor(fingerprint)
            # Alike long ones together, so that few rows wait for others.
            order = sorted((i for i, each in enumerate(payloads) if each.model == fingerprint), key=lambda i: -payloads[i].raw_size)
            for at in range(0, len(order), predictor.rows):
                part = order[at : at + predictor.rows]
                for i, content in zip(part, _decode(predictor, [payloads[i] for i in part]), strict=True):
                    contents[i] = content
        return contents

    def _predictor(self, fingerprint: bytes) -> Predictor:
        with self._lock:
            if fingerprint not in self._opened:
                self._opened[fingerprint] = self._open(fingerprint)
            return self._opened[fingerprint]

    def _open(self, fingerprint: bytes) -> Predictor:
        if len(fingerprint) != ID_BYTES or self._shared is None:
            alike = [each for each in self._opened if each[:ID_BYTES] == fingerprint[:ID_BYTES]]
            raise _elsewhere(fingerprint) if alike else _unknown(fingerprint)
        data = self._shared.get(fingerprint, SUFFIX)
        from pantheraml.hardware.find import find
        from pantheraml.memory.integer_predictor import IntegerPredictor

        device = self._device() if callable(self._device) else self._device
        return IntegerPredictor(data, device or find(training=False).device)


def _decode(predictor: Predictor, payloads: Sequence[Payload]) -> list[bytes]:
    """Their contents, all token by token at once."""
    for each in payloads:
        if not 0 < each.raw_size <= LARGEST_CONTENT:
            raise _damaged(each, f"contents have 1 to {LARGEST_CONTENT:,} bytes")
    table = predictor.tokens.table
    decoders = [RangeDecoder(each.data) for each in payloads]
    found: list[list[bytes]] = [[] for _ in payloads]
    missing = [each.raw_size for each in payloads]
    rows = list(range(len(payloads)))
    """Which payload each row of the state is; those that are done are read on for a while, for nothing."""
    state = predictor.begin(len(rows))
    while True:
        totals = state.totals.tolist()
        targets = np.array([decoders[i].target(total) if missing[i] else 0 for i, total in zip(rows, totals, strict=True)])
        tokens, starts, widths = state.find(targets)
        for i, token, start, width in zip(rows, tokens.tolist(), starts.tolist(), widths.tolist(), strict=True):
            if missing[i]:
                piece = table[token]
                if not 0 < len(piece) <= missing[i]:
                    raise _damaged(payloads[i], f"the token {token} stands where {missing[i]} bytes are missing")
                decoders[i].take(start, width)
                found[i].append(piece)
                missing[i] -= len(piece)
        going = [row for row, i in enumerate(rows) if missing[i]]
        if not going:
            return [b"".join(pieces) for pieces in found]
        if len(going) <= len(rows) * _KEPT_SHARE:
            state.keep(going)
            rows, tokens = [rows[row] for row in going], tokens[going]
        state.advance(tokens)


SUFFIX = "nbm"


def _damaged(payload: Payload, what: str) -> StorageError:
    return StorageError(
        f"content of {payload.raw_size:,} bytes that a model has encoded cannot be read: {what}",
        why="what is stored is not what was written",
        fix="`pantheraml memory verify` names the record; put it again, or restore it from a backup",
    )


def _unknown(fingerprint: bytes) -> StorageError:
    return StorageError(
        f"the model {fingerprint.hex()} is not here",
        why="what it has encoded can be decoded with its help alone",
        fix="open the store with it: NeuralCodec(..., predictors=[FloatPredictor(model, ...)])",
    )


def _elsewhere(fingerprint: bytes) -> StorageError:
    return StorageError(
        f"the model {fingerprint[:ID_BYTES].hex()} is here, and computes in another way than when it encoded this",
        why="it computes with floats, whose last bits depend on the kind of device, the dtype, the number of threads and the "
        "versions of torch and transformers; with other bits other tokens would come out",
        fix="open the store where it was written, and compact it with codec=zstd, or with a model in whole numbers "
        "(`pantheraml memory train`), which every device can decode",
    )
