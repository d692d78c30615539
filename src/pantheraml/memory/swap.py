"""A repaired store takes the place of a damaged one: killed at any moment, it is the one or the other, or the move goes on when next opened.

The new files lie beside the old ones as NAME.repaired. Once all are on the disk, the file `repaired` is made; from then on the new store
counts. The old files are moved to quarantine/WHEN, SQLite's log first, since it must never be applied to another database.
"""

from __future__ import annotations

from pathlib import Path

from pantheraml.memory.pages import DB, HEAD, QUARANTINE, SHM, SUMS, WAL, fsync

MARKER = "repaired"
_ENDING = ".repaired"


def beside(folder: Path, name: str) -> Path:
    """Where the new file of this name is written."""
    return folder / (name + _ENDING)


def swap(folder: Path, when: str) -> Path:
    """Puts the new files in place of the old ones, and gives the folder that those are in. Raises: OSError."""
    for name in (DB, SUMS, HEAD):
        fsync(beside(folder, name))
    quarantine = folder / QUARANTINE / when
    quarantine.mkdir(parents=True)
    marker = folder / MARKER
    marker.with_suffix(".part").write_text(when, "utf-8")
    fsync(marker.with_suffix(".part"))
    marker.with_suffix(".part").replace(marker)
    fsync(folder)
    finish_swap(folder)
    return quarantine


def unfinished(folder: Path) -> bool:
    """A repair was killed while it moved files; `finish_swap` goes on."""
    return (folder / MARKER).exists()


def finish_swap(folder: Path) -> None:
    """Moves what is still to be moved. Only the process that holds the store's lock may. Raises: OSError."""
    marker = folder / MARKER
    if not marker.exists():
        for name in (DB, SUMS, HEAD):
            beside(folder, name).unlink(missing_ok=True)
        return
    quarantine = folder / QUARANTINE / marker.read_text("utf-8")
    quarantine.mkdir(parents=True, exist_ok=True)
    for name in (WAL, SHM, DB, SUMS, HEAD):
        new, old = beside(folder, name), folder / name
        if old.exists() and (new.exists() or (name in (WAL, SHM) and beside(folder, DB).exists())):
            old.rename(quarantine / name)
    fsync(quarantine)
    fsync(folder)
    for name in (SUMS, HEAD, DB):  # the database last: without it there is no store to open
        if beside(folder, name).exists():
            beside(folder, name).rename(folder / name)
    fsync(folder)
    marker.unlink()
    fsync(folder)
