"""Encryption at rest: what is sealed opens with the right key only, where it belongs only, and nothing of it shows."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from tests.memory.stores import bands, memory_folder, row, same

from pantheraml.errors import StorageError
from pantheraml.memory.pages import SHM
from pantheraml.memory.rows import pack_row, unpack_row
from pantheraml.memory.seal import OVERHEAD_BYTES, Cipher, Keys, Seal, UnknownEpoch, epoch_of
from pantheraml.memory.warm import Warm

__all__ = ["memory_folder"]
ONE, TWO = bytes(range(32)), bytes(range(100, 132))
CIPHERS = pytest.mark.parametrize("cipher", get_args(Cipher))


@pytest.mark.parametrize(
    "text",
    [ONE.hex(), ONE.hex().upper(), base64.b64encode(ONE).decode(), f"# newest first\n{ONE.hex()}  # mine\n\n{TWO.hex()}\n"],
)
def test_keys_are_read_from_text(text, tmp_path):
    sealed = Keys(ONE).wrap(b"data key", "it")
    (tmp_path / "key").write_text(text)
    for keys in (Keys.from_text(text), Keys.from_file(tmp_path / "key")):
        assert keys.unwrap(sealed, "it") == b"data key"


def test_keys_of_a_mapping():
    assert Keys.from_mapping({}) is None
    for mapping in ({"PANTHERAML_MEMORY_KEY": ONE.hex()}, {"A": ONE.hex()}):
        keys = Keys.from_mapping(mapping, *(["A"] if "A" in mapping else []))
        assert keys and keys.unwrap(Keys(ONE).wrap(b"x", ""), "") == b"x"


def test_a_mapping_may_name_a_file(tmp_path):
    (tmp_path / "key").write_text(ONE.hex())
    keys = Keys.from_mapping({"PANTHERAML_MEMORY_KEY_FILE": str(tmp_path / "key")})
    assert keys and keys.unwrap(Keys(ONE).wrap(b"x", ""), "") == b"x"


@pytest.mark.parametrize("text", ["", "# nothing", "hunter2", ONE.hex()[:-2], base64.b64encode(ONE[:-1]).decode(), "schlüssel"])
def test_what_is_no_key_is_refused_and_not_repeated(text, tmp_path):
    with pytest.raises(StorageError, match="32 random bytes") as caught:
        Keys.from_text(text)
    assert not text or text not in str(caught.value)
    with pytest.raises(StorageError, match="cannot be read"):
        Keys.from_file(tmp_path / "none")


def test_generated_keys_differ_and_are_keys():
    assert Keys.generate() != Keys.generate()
    Keys.from_text(Keys.generate())


def test_keys_and_seals_are_not_shown_and_not_written():
    keys = Keys(ONE, TWO)
    seal = Seal.create()
    secrets = {ONE.hex(), base64.b64encode(ONE).decode(), seal.index_key.hex(), *(each.hex() for each in seal._data.values())}
    for each in (keys, seal):
        shown = f"{each} {each!r}"
        assert not any(secret in shown for secret in secrets) and str(ONE) not in shown
        for write in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="not written"):
                write(each)
    said = seal.stored(keys)
    assert not any(secret in said.decode() for secret in secrets)
    assert not any(base64.b64encode(key).decode()[:20] in said.decode() for key in seal._data.values())


@CIPHERS
@given(data=st.binary(max_size=300), about=st.binary(max_size=30))
def test_sealed_bytes_open_again(cipher, data, about):
    seal = Seal.create(cipher)
    sealed = seal.seal(data, about)
    assert len(sealed) == len(data) + OVERHEAD_BYTES
    assert seal.unseal(sealed, about) == data
    assert seal.seal(data, about) != sealed  # another nonce
    with pytest.raises(StorageError):
        seal.unseal(sealed, about + b"?")


@CIPHERS
def test_a_second_reader_opens_them_by_the_format(cipher):
    """As docs/nbmf.md has it, with nothing of ours but the wrapped keys."""
    import blake3

    seal = Seal.create(cipher)
    stored = json.loads(seal.stored(Keys(ONE)))
    wrapped = base64.b64decode(stored["epochs"]["1"])
    wrapper = blake3.blake3(ONE, derive_key_context="pantheraml nbmf 1: wraps data keys").digest()
    key = AESGCM(wrapper).decrypt(wrapped[8:20], wrapped[20:], b"nbmf epoch 1")
    sealed = seal.seal(b"content", b"about")
    opener = {"aes-256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}[cipher](key)
    assert opener.decrypt(sealed[2:14], sealed[14:], b"about") == b"content"


@CIPHERS
def test_each_flipped_byte_is_noticed(cipher):
    seal = Seal.create(cipher)
    sealed = seal.seal(b"some content", b"")
    for i in range(len(sealed)):
        flipped = sealed[:i] + bytes([sealed[i] ^ 0x40]) + sealed[i + 1 :]
        with pytest.raises(StorageError):
            seal.unseal(flipped, b"")


def test_the_wrong_key_is_named_by_its_fingerprint():
    stored = Seal.create().stored(Keys(ONE))
    with pytest.raises(StorageError, match="is not that of this store") as caught:
        Seal.load(stored, Keys(TWO))
    assert TWO.hex() not in str(caught.value)
    assert Seal.load(stored, Keys(TWO, ONE)).epoch == 1


def test_epochs():
    first = Seal.create()
    old = first.seal(b"old", b"")
    second = Seal.load(first.next_epoch().stored(Keys(TWO)), Keys(TWO))
    new = second.seal(b"new", b"")
    assert (epoch_of(old), epoch_of(new), second.epochs) == (1, 2, {1, 2})
    assert second.unseal(old, b"") == b"old" and second.index_key == first.index_key
    with pytest.raises(UnknownEpoch, match="epoch 2"):
        first.unseal(new, b"")
    with pytest.raises(UnknownEpoch, match="given up"):
        second.only(set()).unseal(old, b"")


def test_a_row_opens_as_itself_only():
    seal = Seal.create()
    packed = pack_row(row(1), 7, 9, 0, seal)
    assert same(unpack_row(7, packed, {}, seal), replace(row(1), id=7))
    import blake3

    for id, seq in ((8, 9), (7, 10)):  # moved to another record or change, with a checksum made anew
        moved = packed[:3] + seq.to_bytes(8, "little") + packed[11:-8]
        with pytest.raises(StorageError, match="not sealed"):
            unpack_row(id, moved + blake3.blake3(id.to_bytes(8, "little") + moved).digest(8), {}, seal)


def test_nothing_of_a_sealed_store_shows(memory_folder):
    secrets = [b"the key of it", b"what nobody", b"should read", b"vector of it", b"a tenant's name", b"a kind of note"]
    with Warm(memory_folder / "s", keys=Keys(ONE)) as store:
        store.insert([
            replace(
                row(1), key="the key of it", container=b"what nobody" * 9, metadata={"a": "should read"}, vector=b"vector of it",
                tenant="a tenant's name", kind="a kind of note",
            )
        ], bands(1))  # fmt: skip
        seen = b"".join(path.read_bytes() for path in (memory_folder / "s").iterdir() if path.name != SHM)
        store.checkpoint()
        seen += b"".join(path.read_bytes() for path in (memory_folder / "s").iterdir() if path.name != SHM)
        assert store.rows([1])[1].container == b"what nobody" * 9
    assert not [secret for secret in [*secrets, ONE, row(1).hash] if secret in seen]


def test_a_sealed_store_needs_its_key(memory_folder):
    sealed, plain = memory_folder / "sealed", memory_folder / "plain"
    for folder, keys in ((sealed, Keys(ONE)), (plain, None)):
        with Warm(folder, keys=keys) as store:
            store.insert([row(1)])
    for folder, keys, said in (
        (sealed, None, "no key is given"),
        (sealed, Keys(TWO), "not that of this store"),
        (plain, Keys(ONE), "is not encrypted"),
    ):
        with pytest.raises(StorageError, match=said):
            Warm(folder, keys=keys)
    with Warm(sealed, keys=Keys(ONE)) as store:  # the refusal has let go of the lock
        assert store.count() == 1


@CIPHERS
def test_rotation(memory_folder, cipher):
    folder = memory_folder / "s"
    with Warm(folder, keys=Keys(ONE), cipher=cipher) as store:
        store.insert([row(i) for i in range(1, 51)])
        reader = Warm(folder, keys=Keys(ONE, TWO), readonly=True)
        stale = Warm(folder, keys=Keys(ONE), readonly=True)
        store.rotate(Keys(TWO))
        store.insert([row(51)])
        assert reader.rows([51])[51].key == "k51"  # learns of the new data key by itself
        with pytest.raises(StorageError, match="not that of this store"):
            stale.rows([51])
        reader.close()
        stale.close()
    with pytest.raises(StorageError, match="not that of this store"):
        Warm(folder, keys=Keys(ONE))
    with Warm(folder, keys=Keys(TWO)) as store:
        assert store.seal and store.seal.epochs == {1, 2}
        assert store.retire() == frozenset()  # epoch 1 is in use
        after = 0
        while (after := store.reseal(after, most=20)) is not None:
            pass
        assert store.retire(keep=frozenset({1})) == frozenset()
        assert store.retire() == {1}
        assert store.find("default", "k7") == 7 and store.count() == 51
        assert store.verify() == []
    with Warm(folder, keys=Keys(TWO)) as store:
        assert [each.key for each in store.scan()] == [f"k{i}" for i in range(1, 52)]


def test_a_store_without_a_key_does_not_rotate(memory_folder):
    with Warm(memory_folder / "s") as store, pytest.raises(StorageError, match="not encrypted"):
        store.rotate(Keys(ONE))


def test_keys_are_random_bytes_of_the_system(monkeypatch):
    asked = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: asked.append(count) or real(count))
    seal = Seal.create()
    nonces = {seal.seal(b"", b"")[2:14] for _ in range(1000)}
    assert asked[:2] == [32, 32] and len(nonces) == 1000


def test_importing_needs_no_cryptography():
    import subprocess
    import sys

    code = "import sys; sys.modules['cryptography'] = None\nimport pantheraml.memory.warm, pantheraml.memory.repair\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
