"""The contents of rows: where their containers lie, what it takes to decode them, and who needs whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pantheraml.errors import StorageError
from pantheraml.memory.codec import Codecs
from pantheraml.memory.cold import Cold
from pantheraml.memory.container import Payload, pack, unpack
from pantheraml.memory.record import FORMS, content_hash
from pantheraml.memory.records import Records
from pantheraml.memory.rows import Row

MOST_SHARES = 8
"""Rows that are the same as another one, one behind the other: one is usual, more than this is damage."""


class Contents:
    """Gives what rows hold, warm or cold, from a container of their own or another row's. Safe to use from several threads.

    Args:
        records: the rows. cold: the segments.

    Attributes:
        codecs: to be set before anything is asked; they ask here for the `bases` of deltas.
    """

    def __init__(self, records: Records, cold: Cold) -> None:
        self._records, self._cold = records, cold
        self.codecs: Codecs

    def of(self, rows: Sequence[Row]) -> list[bytes | StorageError]:
        """The content of each row, proved by its hash; or why it cannot be had."""
        payloads = [self._payload(row) for row in rows]
        places = [i for i, each in enumerate(payloads) if isinstance(each, Payload)]
        decoded = self.codecs.decode_each([each for each in payloads if isinstance(each, Payload)])
        found: list[bytes | StorageError] = [each if isinstance(each, StorageError) else b"" for each in payloads]
        for i, content in zip(places, decoded, strict=True):
            found[i] = _proved(rows[i], content)
        return found

    def bases(self, ids: Sequence[int]) -> list[Payload]:
        """The payloads of rows that deltas were taken from. Raises: StorageError for one that cannot be had."""
        rows = self._records.rows(ids)
        found: list[Payload] = []
        for id in ids:
            payload = self._payload(rows[id]) if id in rows else _gone(id)
            if isinstance(payload, StorageError):
                raise payload
            found.append(payload)
        return found

    def place(self, row: Row) -> Row:
        """The row in whose place the container lies: itself, or the one that has the same content."""
        for _ in range(MOST_SHARES):
            if row.same_as is None:
                return row
            owner = self._records.rows([row.same_as]).get(row.same_as)
            if owner is None:
                raise _gone(row.same_as)
            row = owner
        raise StorageError(
            f"record {row.key!r} is the same as another one, and that as another one, {MOST_SHARES} times",
            why="no writer makes that: a row is damaged",
            fix="`pantheraml memory repair` saves what is sound",
        )

    def container(self, row: Row) -> bytes:
        """The container of a row that has one, opened where it was sealed. Raises: StorageError if it cannot be had."""
        if row.container is not None:
            return row.container
        assert row.cold
        seal = self._records.seal
        data = self._cold.read(row.cold, row.id)
        return data if seal is None else seal.unseal(data, about(row))

    def _payload(self, row: Row) -> Payload | StorageError:
        try:
            return unpack(self.container(self.place(row)), most_bytes=row.raw_size)
        except StorageError as error:
            return error

    # ---- Who needs whom ------------------------------------------------------------------------------------------

    def released(self, ids: Sequence[int]) -> list[Row]:
        """Rows as they must be written before those of these numbers may change or go: what others need of them moves to the others.

        Raises: StorageError if a content that others need cannot be had.
        """
        needed = self._records.referrers(ids)
        others = sorted({each for referrers in needed.values() for each in referrers} - set(ids))
        rows = self._records.rows([*needed, *others])
        changed: dict[int, Row] = {}
        for owner, referrers in needed.items():
            heir: int | None = None
            for row in (rows[id] for id in referrers if id in rows and id not in ids):
                if row.same_as is None:
                    changed[row.id] = self._alone(row)
                elif heir is None:
                    changed[row.id] = self._heir(row, rows[owner])
                    heir = row.id
                else:
                    changed[row.id] = replace(row, same_as=heir)
        return list(changed.values())

    def _heir(self, row: Row, owner: Row) -> Row:
        """A row that was the same as another one, with what that one had, which lies warm then."""
        owner = self.place(owner)
        return replace(
            row,
            codec=owner.codec,
            model=owner.model,
            container=self.container(owner),
            stored_bytes=owner.stored_bytes,
            same_as=None,
            origin=owner.origin,
        )

    def _alone(self, row: Row) -> Row:
        """A delta as a row that needs no other."""
        content = self.of([row])[0]
        if isinstance(content, StorageError):
            raise content
        (payload,) = self.codecs.encode([content], [row.form], [row.kind])
        return with_payload(row, payload)


def with_payload(row: Row, payload: Payload) -> Row:
    """The row with another container of the same content, here."""
    container = pack(payload)
    return replace(
        row,
        codec=payload.codec,
        model=payload.model,
        container=container,
        stored_bytes=len(container),
        cold=None,
        same_as=None,
        origin=None,
    )


def about(row: Row) -> bytes:
    """What a sealed container in a cold segment belongs to."""
    return b"cold" + row.hash


def _proved(row: Row, content: bytes | StorageError) -> bytes | StorageError:
    if isinstance(content, StorageError) or row.fidelity == "gist" or content_hash(row.form, content) == row.hash:
        return content
    return StorageError(
        f"record {row.key!r} gives {len(content):,} bytes that are not those that were put",
        why=f"their hash is another one (form {FORMS.index(row.form)})",
        fix="`pantheraml memory verify` names what is damaged; put the record again, or restore it from a backup",
    )


def _gone(id: int) -> StorageError:
    return StorageError(
        f"record number {id} is gone, and another one takes it to be decoded",
        why="it was lost by damage: the store never takes away what others need",
        fix="put the record again, or restore the store from a backup",
    )
