"""Encryption at rest: what is written is sealed with data keys, and those are kept wrapped with a key that the store never keeps.

Sealed bytes are `epoch (uint16) | nonce (12) | ciphertext and tag (16)`. The nonce is random, so one epoch is good for 2**32 of them
(NIST SP 800-38D, 8.3). Associated data say what the bytes are and where they belong: they cannot be put elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import blake3

from pantheraml.errors import MissingExtra, StorageError

Cipher = Literal["aes-256-gcm", "chacha20-poly1305"]
KEY_BYTES = 32
KEY_NAME = "PANTHERAML_MEMORY_KEY"
OVERHEAD_BYTES = 30
"""That sealing adds."""
_EPOCHS = 1 << 16


class Keys:
    """Master keys of 32 bytes, the newest first: that one wraps, the older ones still open what they have wrapped. Never shown.

    Raises: ValueError for another length, or none at all.
    """

    __slots__ = ("_masters",)

    def __init__(self, *masters: bytes) -> None:
        if not masters or any(len(each) != KEY_BYTES for each in masters):
            raise ValueError(f"a key has {KEY_BYTES} bytes, and there must be one")
        self._masters = masters

    @classmethod
    def from_text(cls, text: str) -> Keys:
        """One key a line, 64 hexadecimal digits or the base64 of 32 bytes, the newest first; `#` begins a comment.

        Raises: StorageError for anything else; it names the line and never what stands there.
        """
        lines = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
        masters = [_key(number, line) for number, line in lines if line]
        if not masters:
            raise _no_key("there is no key")
        return cls(*masters)

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """The keys of a file, as `from_text` reads them."""
        try:
            return cls.from_text(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise _no_key(f"the key file {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, str], name: str = KEY_NAME) -> Keys | None:
        """The keys under a name, or in the file that `NAME_FILE` says; None where neither is set."""
        if text := mapping.get(name):
            return cls.from_text(text)
        if path := mapping.get(f"{name}_FILE"):
            return cls.from_file(Path(path))
        return None

    @staticmethod
    def generate() -> str:
        """A key from the system's random source, as text for `from_text`."""
        return base64.b64encode(os.urandom(KEY_BYTES)).decode()

    def wrap(self, key: bytes, about: str) -> str:
        """A data key sealed with the newest master key, as text."""
        master = self._masters[0]
        nonce = os.urandom(12)
        return base64.b64encode(key_id(master) + nonce + _wrapper(master).encrypt(nonce, key, about.encode())).decode()

    def unwrap(self, wrapped: str, about: str) -> bytes:
        """Undoes `wrap`. Raises: StorageError if it was wrapped with none of these keys, or is damaged."""
        from cryptography.exceptions import InvalidTag

        try:
            data = base64.b64decode(wrapped, validate=True)
        except binascii.Error:
            data = b""
        wanted, nonce, sealed = data[:8], data[8:20], data[20:]
        for master in self._masters:
            if key_id(master) == wanted:
                try:
                    return _wrapper(master).decrypt(nonce, sealed, about.encode())
                except (InvalidTag, ValueError):
                    break
        given = ", ".join(key_id(each).hex() for each in self._masters)
        raise StorageError(
            f"the key given is not that of this store: it was sealed with key {wanted.hex()}, and {given} is given",
            why="without it, nothing in the store can be read; the numbers are fingerprints, which tell nothing of the keys",
            fix=f"give the key that the store was made with or last rotated to ({KEY_NAME}, {KEY_NAME}_FILE)",
        )

    def __repr__(self) -> str:
        return f"Keys({len(self._masters)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not written anywhere")


class Seal:
    """The data keys of an open store, one for each epoch; the newest seals. Safe to use from several threads. Never shown.

    Attributes:
        cipher: that seals. epoch: the newest. index_key: 32 bytes for keyed hashes, the same over all epochs.
    """

    __slots__ = ("_ciphers", "_data", "cipher", "epoch", "index_key")

    def __init__(self, cipher: Cipher, index_key: bytes, data: Mapping[int, bytes]) -> None:
        make = _aead(cipher)
        self.cipher: Cipher = cipher
        self.index_key = index_key
        self.epoch = max(data)
        self._data = dict(data)
        self._ciphers = {epoch: make(key) for epoch, key in data.items()}

    @classmethod
    def create(cls, cipher: Cipher = "aes-256-gcm") -> Seal:
        """New random keys, epoch 1."""
        return cls(cipher, os.urandom(KEY_BYTES), {1: os.urandom(KEY_BYTES)})

    @classmethod
    def load(cls, stored: bytes, keys: Keys) -> Seal:
        """What `stored` has written. Raises: StorageError for the wrong key."""
        said = json.loads(stored)
        if said["cipher"] not in get_args(Cipher):
            raise StorageError(
                f"the store is sealed with {said['cipher']!r}, which this version does not know",
                why="it was made by a newer version",
                fix="pip install -U pantheraml",
            )
        epochs = {int(epoch): keys.unwrap(wrapped, f"nbmf epoch {epoch}") for epoch, wrapped in said["epochs"].items()}
        return cls(said["cipher"], keys.unwrap(said["index"], "nbmf index"), epochs)

    def stored(self, keys: Keys) -> bytes:
        """All keys, wrapped with the newest master key: what the store keeps."""
        epochs = {str(epoch): keys.wrap(key, f"nbmf epoch {epoch}") for epoch, key in self._data.items()}
        return json.dumps({"cipher": self.cipher, "index": keys.wrap(self.index_key, "nbmf index"), "epochs": epochs}).encode()

    def next_epoch(self) -> Seal:
        """The same with one more data key, which seals from now on."""
        if self.epoch + 1 >= _EPOCHS:
            raise StorageError(f"the store has had {self.epoch} data keys", why="their number has 16 bits", fix="export it into a new one")
        return Seal(self.cipher, self.index_key, {**self._data, self.epoch + 1: os.urandom(KEY_BYTES)})

    def only(self, epochs: set[int]) -> Seal:
        """The same without the data keys of other epochs: what they have sealed can never be read again."""
        return Seal(self.cipher, self.index_key, {epoch: key for epoch, key in self._data.items() if epoch in epochs | {self.epoch}})

    @property
    def epochs(self) -> frozenset[int]:
        """Those that can be read."""
        return frozenset(self._data)

    def seal(self, data: bytes, about: bytes) -> bytes:
        """Sealed with the newest data key; `about` must be given again to open it."""
        nonce = os.urandom(12)
        return self.epoch.to_bytes(2, "little") + nonce + self._ciphers[self.epoch].encrypt(nonce, data, about)

    def unseal(self, sealed: bytes, about: bytes) -> bytes:
        """Undoes `seal`. Raises: UnknownEpoch; StorageError for bytes that are damaged, or are not what `about` says."""
        from cryptography.exceptions import InvalidTag

        cipher = self._ciphers.get(epoch_of(sealed))
        if cipher is None:
            raise UnknownEpoch(epoch_of(sealed))
        try:
            return cipher.decrypt(sealed[2:14], sealed[14:], about)
        except (InvalidTag, ValueError):
            raise StorageError(
                f"{len(sealed)} sealed bytes do not open",
                why="they are damaged, or were put where they do not belong",
                fix="`pantheraml memory verify` names what is damaged, `pantheraml memory repair` saves the rest",
            ) from None

    def __repr__(self) -> str:
        return f"Seal({self.cipher}, epoch {self.epoch})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not written anywhere")


class UnknownEpoch(StorageError):
    """Bytes that were sealed with a data key that is not here: the key was rotated elsewhere, or that epoch was given up."""

    def __init__(self, epoch: int) -> None:
        super().__init__(
            f"epoch {epoch} of the data keys is not known",
            why="the store's key was rotated since it was opened, or that data key was given up",
            fix="open the store again, with its newest key",
        )


def epoch_of(sealed: bytes) -> int:
    """With which data key bytes are sealed."""
    return int.from_bytes(sealed[:2], "little")


def key_id(master: bytes) -> bytes:
    """8 bytes by which a key can be told from others, and which tell nothing of it."""
    return blake3.blake3(master, derive_key_context="pantheraml nbmf 1: which key this is").digest(8)


def _wrapper(master: bytes) -> Any:
    return _aead("aes-256-gcm")(blake3.blake3(master, derive_key_context="pantheraml nbmf 1: wraps data keys").digest())


def _aead(cipher: Cipher) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers import aead
    except ImportError as error:
        raise MissingExtra("cryptography", needed_for="encryption at rest", install="'pantheraml[memory]'") from error
    return aead.AESGCM if cipher == "aes-256-gcm" else aead.ChaCha20Poly1305


def _key(number: int, line: str) -> bytes:
    try:
        key = bytes.fromhex(line) if re.fullmatch(r"[0-9a-fA-F]{64}", line) else base64.b64decode(line, validate=True)
    except ValueError:  # also binascii.Error
        key = b""
    if len(key) != KEY_BYTES:
        raise _no_key(f"line {number} of the keys is not a key ({len(line)} characters)")
    return key


def _no_key(what: str) -> StorageError:
    return StorageError(
        what,
        why=f"a key is {KEY_BYTES} random bytes, as 64 hexadecimal digits or in base64, one a line",
        fix="make one with `head -c 32 /dev/urandom | base64`, and keep it apart from the store",
    )
