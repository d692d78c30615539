from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from blake3 import blake3

from pantheraml.errors import StorageError
from pantheraml.memory.shared import Shared

DATA = bytes(range(256)) * 3


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_is_kept_twice_under_its_hash(tmp_path):
    shared = Shared(tmp_path / "shared")
    id = shared.put(DATA, "zdict")
    assert id == blake3(DATA).digest()[:8]
    assert files(tmp_path / "shared") == [f"{id.hex()}.zdict", f"{id.hex()}.zdict.copy"]
    assert {path.read_bytes() for path in (tmp_path / "shared").iterdir()} == {DATA}
    assert shared.put(DATA, "zdict") == id and shared.get(id, "zdict") == DATA
    assert Shared(tmp_path / "shared").ids("zdict") == [id] and shared.ids("nbm") == [] and shared.verify() == []


@pytest.mark.parametrize("which", [0, 1])
def test_every_flipped_byte_is_found_named_and_mended(tmp_path, which):
    heard: list[str] = []
    shared = Shared(tmp_path)
    data = DATA[:100]
    id = shared.put(data, "nbm")
    path = sorted(tmp_path.iterdir())[which]
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= random.Random(at).randrange(1, 256)
        path.write_bytes(damaged)
        shared = Shared(tmp_path, announce=heard.append)
        assert shared.get(id, "nbm") == data
        if which == 0:
            assert heard.pop() == f"{path} was damaged or missing; mended from its other copy"
        else:  # the first is sound, and the copy is not read
            assert shared.verify() == [f"{path} is damaged; mended from its other copy"]
        assert path.read_bytes() == data and shared.verify() == [] and not heard


def test_a_reader_mends_nothing_and_says_so_once(tmp_path):
    heard: list[str] = []
    id = Shared(tmp_path).put(DATA, "nbm")
    file = tmp_path / f"{id.hex()}.nbm"
    file.write_bytes(b"")
    shared = Shared(tmp_path, readonly=True, announce=heard.append)
    for _ in range(3):
        assert shared.get(id, "nbm") == DATA
    assert heard == [f"{file} was damaged or missing; the other copy is sound, and used"]
    assert shared.verify() == [f"{file} is damaged; the other copy is sound, and used"]
    assert file.read_bytes() == b""


def test_two_damaged_files_are_both_named(tmp_path):
    shared = Shared(tmp_path)
    id, other = shared.put(DATA, "nbm"), shared.put(DATA[1:], "nbm")
    file, copy = tmp_path / f"{id.hex()}.nbm", tmp_path / f"{id.hex()}.nbm.copy"
    file.write_bytes(DATA[:-1])
    copy.unlink()
    with pytest.raises(StorageError) as error:
        shared.get(id, "nbm")
    assert error.value.what == f"{file} is damaged, and {copy} is missing"
    assert "backup" in error.value.fix
    assert shared.verify() == [f"{file} is damaged; no sound copy is left", f"{copy} is missing; no sound copy is left"]
    assert shared.get(other, "nbm") == DATA[1:]
    shared.put(DATA, "nbm")
    assert shared.verify() == [] and shared.get(id, "nbm") == DATA


def test_what_a_killed_process_left_is_put_right_by_the_next_writer(tmp_path):
    heard: list[str] = []
    id = Shared(tmp_path).put(DATA, "nbm")
    copy = tmp_path / f"{id.hex()}.nbm.copy"
    copy.unlink()
    (tmp_path / f"{copy.name}.0123abcd.part").write_bytes(DATA[:10])
    Shared(tmp_path, readonly=True)
    assert len(files(tmp_path)) == 2
    shared = Shared(tmp_path, announce=heard.append)
    assert files(tmp_path) == [f"{id.hex()}.nbm", copy.name] and copy.read_bytes() == DATA
    assert heard == [f"{copy} was damaged or missing; mended from its other copy"]
    assert shared.verify() == []


def test_a_stranger_is_named(tmp_path):
    shared = Shared(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert shared.verify() == [f"{tmp_path / 'notes.txt'} is not one of the store's files"]


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Shared(tmp_path / "file" / "shared")


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    shared = Shared(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        shared.put(DATA, "nbm")
    assert files(tmp_path) == []


def test_a_reader_of_no_folder(tmp_path):
    shared = Shared(tmp_path / "none", readonly=True)
    assert shared.verify() == [] and shared.ids("nbm") == [] and not (tmp_path / "none").exists()
    with pytest.raises(StorageError, match=r"\.nbm is missing, and"):
        shared.get(bytes(8), "nbm")


@pytest.mark.parametrize(("id", "suffix"), [(bytes(7), "nbm"), (bytes(8), "../nbm"), (bytes(8), ""), (bytes(8), "a.b")])
def test_names_lead_nowhere_else(tmp_path, id, suffix):
    with pytest.raises(ValueError):
        Shared(tmp_path).get(id, suffix)


def test_threads_that_meet_at_a_damaged_file(tmp_path):
    shared = Shared(tmp_path, announce=lambda _: None)
    id = shared.put(DATA, "nbm")
    (tmp_path / f"{id.hex()}.nbm").write_bytes(b"damaged")
    with ThreadPoolExecutor(8) as pool:
        assert all(data == DATA for data in pool.map(lambda _: shared.get(id, "nbm"), range(64)))
    assert shared.verify() == []
