"""SQLite's write-ahead log, read by ourselves: which pages were committed, and which frames are not what was written.

SQLite drops everything behind a damaged frame and says nothing. Format: https://sqlite.org/fileformat2.html#walformat
(`header 32 | frames`, a frame is `header 24 | page`, and each frame's checksum goes on from that of the frame before it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pantheraml.memory.pages import PAGE, Problem, page_sum

HEADER = 32
FRAME = 24 + PAGE
_WORDS = FRAME // 4
_CHUNK = 1024  # frames that are read at once: 4 MiB
_MAGIC = {0x377F0682: "<u4", 0x377F0683: ">u4"}


def _fibonacci(count: int) -> NDArray[np.uint32]:
    numbers = [0, 1]
    while len(numbers) < count:
        numbers.append((numbers[-1] + numbers[-2]) & 0xFFFFFFFF)
    return np.array(numbers, np.uint32)


# The checksum is s0 += a + s1; s1 += b + s0 over pairs of words, modulo 2**32. That is linear: a word that stands m from the end counts
# F(m) in s0 and F(m + 1) in s1, F being Fibonacci's numbers, so it is a product of matrices for all frames at once.
_F = _fibonacci(2 * _WORDS)
_COUNTED = _WORDS - 4  # page number and size, and the page; not the salts and the checksum itself
_WEIGHTS = np.stack([_F[:_COUNTED][::-1], _F[1 : _COUNTED + 1][::-1]], axis=1)
_CARRY = np.array([[_F[_COUNTED - 1], _F[_COUNTED]], [_F[_COUNTED], _F[_COUNTED + 1]]], np.uint32)


def _checksum(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Of an even number of words, from nothing."""
    n = len(words)
    return words @ np.stack([_F[:n][::-1], _F[1 : n + 1][::-1]], axis=1)


@dataclass(frozen=True, slots=True)
class Header:
    """The log's own header. checksum: as it stands there; computed: of what stands there; they differ where it is damaged."""

    order: str
    salts: tuple[int, int]
    checksum: tuple[int, int]
    computed: tuple[int, int]

    @property
    def sound(self) -> bool:
        """SQLite would read on."""
        return self.checksum == self.computed


def read_header(data: bytes) -> Header | None:
    """None for less than a header, and for one of another program or page size that is sound."""
    if len(data) < HEADER:
        return None
    words = np.frombuffer(data, ">u4", 8)
    order = _MAGIC.get(int(words[0]), "<u4")  # a damaged magic: as this machine writes it
    computed = _checksum(np.frombuffer(data, order, 6).astype(np.uint32))
    if int(words[0]) not in _MAGIC or int(words[2]) != PAGE:
        computed = computed ^ np.uint32(1)
    return Header(order, (int(words[4]), int(words[5])), (int(words[6]), int(words[7])), (int(computed[0]), int(computed[1])))


@dataclass(frozen=True, slots=True)
class Frames:
    """What the headers of N frames say, and whether it holds.

    Attributes:
        page: [N] number of the page. size: [N] pages of the database after the commit that the frame ends; 0: it ends none.
        holds: [N] its checksum goes on from that of the frame before it, as that stands there.
        salted, related: [N] both, or one, of its salts are those of the log: it belongs to it, or may with a damaged salt.
        mended: [N] it goes on from what the frame before it should say: of that one, the checksum alone is damaged.
        checksum: [N, 2] as it stands there. computed: [N, 2] what it should be.
    """

    page: NDArray[np.uint32]
    size: NDArray[np.uint32]
    holds: NDArray[np.bool_]
    salted: NDArray[np.bool_]
    related: NDArray[np.bool_]
    mended: NDArray[np.bool_]
    checksum: NDArray[np.uint32]
    computed: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.page)

    @property
    def sound(self) -> NDArray[np.bool_]:
        """[N] what the frame holds is what was written, though SQLite may not read so far."""
        return self.holds | self.mended | np.append(self.mended[1:], [False])


def read_frames(path: Path, header: Header, first: int = 0, seed: tuple[int, int] | None = None) -> Frames:
    """All whole frames from the given one on. seed: checksum of the frame before it; None: of the log's header."""
    start = np.array([seed or header.checksum], np.uint32)
    found: list[Frames] = []
    before = start, start if seed else np.array([header.computed], np.uint32)
    with path.open("rb") as file:
        file.seek(HEADER + first * FRAME)
        while len(data := file.read(_CHUNK * FRAME)) >= FRAME:
            found.append(_examined(data[: len(data) // FRAME * FRAME], header, *before))
            before = found[-1].checksum[-1:], found[-1].computed[-1:]
    if not found:
        none = np.zeros(0, np.uint32)
        no, pairs = none.astype(bool), none.reshape(0, 2)
        return Frames(none, none, no, no, no, no, pairs, pairs)
    return Frames(*(np.concatenate([getattr(each, name) for each in found]) for name in Frames.__dataclass_fields__))


def _examined(data: bytes, header: Header, said_before: NDArray[np.uint32], computed_before: NDArray[np.uint32]) -> Frames:
    native = np.frombuffer(data, header.order).reshape(-1, _WORDS).astype(np.uint32, copy=False)
    said = np.frombuffer(data, ">u4").reshape(-1, _WORDS)[:, :6].astype(np.uint32)
    own = native[:, :2] @ _WEIGHTS[:2] + native[:, 6:] @ _WEIGHTS[2:]
    checksum = said[:, 4:6]
    computed = np.concatenate([said_before, checksum[:-1]]) @ _CARRY + own
    holds = (computed == checksum).all(axis=1)
    mended = (np.concatenate([computed_before, computed[:-1]]) @ _CARRY + own == checksum).all(axis=1) & ~holds
    salts = said[:, 2:4] == np.array(header.salts, np.uint32)
    return Frames(said[:, 0], said[:, 1], holds, salts.all(axis=1), salts.any(axis=1), mended, checksum, computed)


def page_at(handle: int, frame: int) -> bytes:
    """The page of a frame. handle: of the log, to be read."""
    return os.pread(handle, PAGE, HEADER + frame * FRAME + 24)


@dataclass(slots=True)
class Wal:
    """Follows the log of the process that writes.

    Attributes:
        salts: of this log; another pair means that SQLite has begun it anew. frames: committed so far. size: pages of the database then.
        pages, sums: number and checksum of the page in each of these frames. finished: frames that a whole checkpoint has copied.
        told: frames whose sums are in store.sums.
    """

    path: Path
    salts: tuple[int, int] = (0, 0)
    frames: int = 0
    size: int = 0
    finished: int = 0
    told: int = 0
    pages: list[int] = field(default_factory=list[int])
    sums: list[int] = field(default_factory=list[int])
    _seed: tuple[int, int] | None = None

    @property
    def waiting_bytes(self) -> int:
        """Of frames that no whole checkpoint has copied yet."""
        return (self.frames - self.finished) * FRAME

    def advance(self) -> list[int]:
        """Reads what was committed since the last call. Returns: the page numbers of its frames."""
        del self.pages[self.frames :], self.sums[self.frames :]  # of a call that was interrupted
        try:
            with self.path.open("rb") as file:
                header = read_header(file.read(HEADER))
        except FileNotFoundError:
            header = None
        if header is None or not header.sound:
            self._begin((0, 0))
            return []
        if header.salts != self.salts:
            self._begin(header.salts)
        frames = read_frames(self.path, header, self.frames, self._seed)
        new = committed(frames)
        if not new:
            return []
        pages = frames.page[:new].tolist()
        handle = os.open(self.path, os.O_RDONLY)
        try:
            self.sums += [page_sum(page, page_at(handle, self.frames + i)) for i, page in enumerate(pages)]
        finally:
            os.close(handle)
        self.pages += pages
        self.size = int(frames.size[new - 1])
        self._seed = (int(frames.checksum[new - 1, 0]), int(frames.checksum[new - 1, 1]))
        self.frames += new
        return pages

    def _begin(self, salts: tuple[int, int]) -> None:
        self.salts, self.frames, self.finished, self.told, self._seed = salts, 0, 0, 0, None
        self.pages, self.sums = [], []


def committed(frames: Frames) -> int:
    """How many frames SQLite would take: those up to the last commit before the first that does not hold."""
    sound = frames.holds & frames.salted
    end = len(sound) if sound.all() else int(np.argmin(sound))
    commits = np.flatnonzero(frames.size[:end])
    return int(commits[-1]) + 1 if len(commits) else 0


def examine(path: Path, covered: tuple[int, int, int] = (0, 0, 0)) -> tuple[Frames | None, int, list[Problem]]:
    """Looks for damage in a log at rest.

    Args:
        covered: salts, and number of frames in a log with them, that were committed for sure (a checkpoint was begun with them).
    Returns: its frames (None: there is no log), how many of them SQLite would take, and what is damaged. What does not hold behind what
        was committed for sure is called harmless: it may never have been finished, when power was lost. Whether something that was
        acknowledged is lost by it, the number of the newest acknowledged change tells (`examine.read_tip`).
    """
    try:
        with path.open("rb") as file:
            header = read_header(file.read(HEADER))
    except FileNotFoundError:
        header = None
    if header is None:
        return None, 0, []
    frames = read_frames(path, header)
    if not header.sound:
        first = read_frames(path, Header(header.order, header.salts, header.computed, header.computed))
        if frames.holds.any() or first.holds.any():
            return frames, 0, [Problem(path.name, "header (bytes 0 to 31)", "it is damaged: SQLite would drop all that the log holds")]
        return None, 0, []
    taken = committed(frames)
    return frames, taken, list(_damaged(path.name, header, frames, taken, covered))


def _damaged(name: str, header: Header, frames: Frames, taken: int, covered: tuple[int, int, int]) -> Iterator[Problem]:
    certain = covered[2] if covered[:2] == header.salts else 0
    of_this_log = np.flatnonzero(frames.related)
    end = max(certain, int(of_this_log[-1]) + 1 if len(of_this_log) else 0)
    for k in np.flatnonzero(~((frames.holds | frames.mended) & frames.salted)[:end]).tolist():
        what = "does not match its checksum" if not frames.sound[k] else "has a damaged checksum or salt"
        yield Problem(name, frame_place(k), f"{what}: SQLite drops all from here on ({taken} frames stand before)", harmless=k >= certain)
        if k >= certain:  # a transaction that a loss of power has torn is no better further on
            break
    if certain > len(frames):
        yield Problem(name, f"its end, after {len(frames)} frames", f"{certain - len(frames)} committed frames are missing")


def frame_place(frame: int) -> str:
    """Where a frame lies, for people; frames are counted from 1, as SQLite does."""
    start = HEADER + frame * FRAME
    return f"frame {frame + 1} (bytes {start} to {start + FRAME - 1})"
