"""What the codecs of the memory make of real text, beside those of others, and what it gives to put many records at once.

    python benchmarks/memory.py [--quick] [--minutes N] [--device KIND] [--without-neural] [--seed N]

Records of about 1 KB of four corpora (corpora.py), split by document into those that are learned from and those that are held out.
Each held-out record is compressed by itself, since a store must give back one without the others:

- by zlib, zstd, zstd with a dictionary, and xz: bare, in the smallest frame that each can write. The dictionary is trained on the same
  records that the model learns from: one of 110 KB for each corpus, with which records are 8% smaller than with one for all.
- by a store: `Memory.train` on the train records of all corpora, then the store's codecs, as `put` (zstd-9) and `compact` (zstd-19, neural)
  ask them. What is counted is the container, with its head and checksum. Their encoding time holds the proof that each record
  decodes to itself; they are decoded in a store that was opened anew, so by what lies on the disk and nothing else.

- the codec alone: what the store's neural row says less the container, that is the data and the size of the content, which is all that decoding
  takes beside the model. It is what compares with the bare frames of others.

What decoding needs beside the records, a model and dictionaries, is counted by itself, and set against what the model saves. Rates are
megabytes of raw text a second, of one thread but where a model computes; the best of some rounds, since another process on the machine
only ever makes one slower.

The bars: the held-out records by the neural codec are at least 1.3 times smaller than by zstd-19 with a dictionary, like with like: both bare,
and both in containers; and 1,000 records in one `put_many` are at least 3 times as fast as one after the other (both on the CPU, both on the disk when they return).
The last line is JSON. The exit status is 1 if a record does not come back as it was; a bar that is missed is printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import lzma
import os
import platform
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corpora import corpora, split

if TYPE_CHECKING:
    from pantheraml.memory.store import Memory

SMALLER_BAR = 1.3
"""Bytes by zstd-19 with a dictionary to bytes by the neural codec."""
FASTER_BAR = 3.0
"""Records a second by `put_many` to those one by one."""
ZLIB_LEVEL, ZSTD_LEVEL = 9, 19
DICTIONARY_BYTES = 112_640
"""110 KB, zstd's own default. Where there is less to learn from, an eighth of that: zstd refuses much more."""
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 16}]
"""What records refer to is never farther away; a larger window would only be slower to make."""
PUT_RECORDS = 1000
"""As the issue says; where there are fewer train records, some come again with another end."""
ALONE_RECORDS = 32
"""Of which the neural codec encodes each by itself, to see what a batch gives."""
CORPUS_BYTES, QUICK_CORPUS_BYTES = 2_000_000, 180_000
"""Of each corpus, about: the last document is taken whole."""
MINUTES, QUICK_MINUTES = 20.0, 0.2
"""Of training."""
ROUNDS, QUICK_ROUNDS = 3, 1
FEWEST_SAMPLES = 8
"""Of which zstd makes a dictionary."""
PACKAGES = ("numpy", "zstandard", "blake3", "torch", "tokenizers", "pantheraml")
BASE, CLAIM, STORE_BASE, BARE = "zstd-19+dictionary", "store, neural", "store, zstd-19", "neural, bare"


@dataclass(frozen=True, slots=True)
class Figures:
    """What a codec made of some records. Bytes before and after; seconds; None: not a measure of it."""

    records: int
    raw_bytes: int
    bytes: int
    encode_s: float | None = None
    decode_s: float | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.raw_bytes / self.bytes

    def rate(self, seconds: float | None) -> float | None:
        """Megabytes of raw text a second."""
        return None if seconds is None else self.raw_bytes / seconds / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "records": self.records,
            "raw_bytes": self.raw_bytes,
            "bytes": self.bytes,
            "ratio": round(self.ratio, 4),
            "bits_per_byte": round(8 / self.ratio, 4),
            "encode_mb_s": self.rate(self.encode_s),
            "decode_mb_s": self.rate(self.decode_s),
        }


def together(parts: Sequence[Figures]) -> Figures:
    """Of all corpora."""
    encode, decode = ([getattr(each, name) for each in parts] for name in ("encode_s", "decode_s"))
    return Figures(
        sum(each.records for each in parts),
        sum(each.raw_bytes for each in parts),
        sum(each.bytes for each in parts),
        None if None in encode else sum(encode),
        None if None in decode else sum(decode),
    )


Table = dict[str, dict[str, Figures]]
"""Codec -> corpus -> figures."""
Records = dict[str, list[bytes]]
"""Corpus -> records."""


class Wrong(Exception):
    """A record did not come back as it was."""


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="little text, and a model trained for seconds: a check of the benchmark itself"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help=f"of training, at most (default: {MINUTES:g}, quick: {QUICK_MINUTES:g})")
    parser.add_argument("--device", default="auto", help='where the model computes: "cpu", "cuda:1" (default: %(default)s)')
    parser.add_argument("--without-neural", action="store_true", help="train no model, and measure everything else")
    parser.add_argument("--seed", type=int, default=3407, help="of the order of documents (default: %(default)s)")
    asked = parser.parse_args()
    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
    minutes = (QUICK_MINUTES if asked.quick else MINUTES) if asked.minutes is None else asked.minutes
    about = machine(PACKAGES)
    print(f"# run on {about['said']}")

    made = corpora(asked.seed, QUICK_CORPUS_BYTES if asked.quick else CORPUS_BYTES)
    train, held = Records(), Records()
    for name, documents in made.items():
        train[name], held[name] = ([record.encode() for record in records] for records in split(documents, asked.seed))
    counts = {
        what: (sum(map(len, part.values())), sum(map(size, part.values()))) for what, part in (("to learn from", train), ("held out", held))
    }
    print(
        "; ".join(f"{records:,} records {what}, {total:,} bytes, {total / records:.0f} each" for what, (records, total) in counts.items())
    )

    try:
        table, own = plain(train, held, rounds)
        with tempfile.TemporaryDirectory(prefix="pantheraml-memory-") as folder:
            more, about_store = stored(Path(folder), train, held, asked, minutes)
            putting = put_rates(Path(folder), [record for records in train.values() for record in records], rounds)
        table |= more
    except Wrong as error:
        print(f"WRONG: {error}")
        print(json.dumps({"benchmark": "memory", "ok": False, "quick": asked.quick, "wrong": [str(error)]}))
        return 1
    solid = {corpus: len(lzma.compress(b"".join(records), preset=9 | lzma.PRESET_EXTREME)) for corpus, records in held.items()}
    paid = paying(table, own, about_store)
    show(table, solid)
    bars = judge(table, own, about_store, paid, putting)
    print(
        json.dumps(
            {
                "benchmark": "memory",
                "ok": True,
                "quick": asked.quick,
                "bars": bars,
                "machine": about,
                "minutes": None if asked.without_neural else minutes,
                "seed": asked.seed,
                "records": counts,
                "codecs": {
                    codec: {"all": together(list(each.values())).to_dict(), **{corpus: one.to_dict() for corpus, one in each.items()}}
                    for codec, each in table.items()
                },
                "solid_xz_bytes": solid,
                "own_bytes": {BASE: own},
                "store": about_store,
                "paid_after_mb": paid,
                "putting": putting,
            }
        )
    )
    return 0


def size(records: Sequence[bytes]) -> int:
    """Bytes."""
    return sum(map(len, records))


# ---- Others ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coder:
    """A way to compress a record. own_bytes: of what decoding needs beside it."""

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes]
    own_bytes: int = 0


def coders(train: Sequence[bytes]) -> dict[str, Coder]:
    """The codecs of others; the dictionary learns from `train`."""
    import zstandard

    dictionary = None
    if len(train) >= FEWEST_SAMPLES:
        dictionary = zstandard.train_dictionary(min(DICTIONARY_BYTES, size(train) // 8), list(train), level=ZSTD_LEVEL).as_bytes()
    else:
        say(f"no dictionary: {len(train)} records are too few to learn from")
    return {
        f"zlib-{ZLIB_LEVEL}": Coder(lambda data: zlib.compress(data, ZLIB_LEVEL), zlib.decompress),
        f"zstd-{ZSTD_LEVEL}": zstd(),
        BASE: zstd(dictionary),
        "xz": Coder(lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=XZ_FILTERS), lzma.decompress),
    }


def zstd(dictionary: bytes | None = None) -> Coder:
    """Frames without magic, size, checksum and the dictionary's number: 10 to 15 bytes less than the usual ones."""
    import zstandard

    opened = None if dictionary is None else zstandard.ZstdCompressionDict(dictionary)
    how = zstandard.ZstdCompressionParameters(
        compression_level=ZSTD_LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=0, write_checksum=0, write_dict_id=0
    )
    encoder = zstandard.ZstdCompressor(compression_params=how, dict_data=opened)
    decoder = zstandard.ZstdDecompressor(dict_data=opened, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    return Coder(encoder.compress, lambda data: decoder.decompress(data, max_output_size=1 << 20), len(dictionary or b""))


def plain(train: Records, held: Records, rounds: int) -> tuple[Table, int]:
    """The codecs of others on each corpus, and the bytes of all dictionaries. Raises: Wrong."""
    table: Table = {"raw": {corpus: Figures(len(records), size(records), size(records)) for corpus, records in held.items()}}
    own = 0
    for corpus, records in held.items():
        say(f"{corpus}: zlib, zstd, xz")
        for name, coder in coders(train[corpus]).items():
            table.setdefault(name, {})[corpus] = measured(name, coder, records, rounds)
            own += coder.own_bytes
    return table, own


def measured(name: str, coder: Coder, records: list[bytes], rounds: int) -> Figures:
    """Each record by itself. Raises: Wrong."""
    encoded, encode_s = best(rounds, lambda: [coder.encode(record) for record in records])
    decoded, decode_s = best(rounds, lambda: [coder.decode(each) for each in encoded])
    if decoded != records:
        raise Wrong(f"{name} did not give back what it was given")
    return Figures(len(records), size(records), size(encoded), encode_s, decode_s)


def best(rounds: int, work: Callable[[], list[bytes]]) -> tuple[list[bytes], float]:
    """What the last round gave, and the seconds of the fastest."""
    found, seconds = list[bytes](), list[float]()
    for _ in range(rounds):
        begun = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - begun)
    return found, min(seconds)


# ---- A store ---------------------------------------------------------------------------------------------------------


def stored(folder: Path, train: Records, held: Records, asked: argparse.Namespace, minutes: float) -> tuple[Table, dict[str, Any]]:
    """A store that has learned from the train records, on the held-out ones. Raises: Wrong."""
    from pantheraml.memory.container import NAMES, unpack
    from pantheraml.memory.record import Record
    from pantheraml.memory.store import Memory

    path = folder / "store"
    refused: dict[str, int] = {}
    containers: dict[str, dict[str, list[bytes]]] = {}
    seconds: dict[tuple[str, str], tuple[float, float]] = {}
    with Memory.open(path, device=asked.device) as memory:
        for corpus, records in train.items():
            memory.put_many([Record(key=f"{corpus} {i}", content=text.decode(), kind=corpus) for i, text in enumerate(records)])
        say(f"training{'' if asked.without_neural else f' for {minutes:g} minutes at most'}")
        begun = time.perf_counter()
        trained = memory.train(minutes=minutes, model=not asked.without_neural)
        about: dict[str, Any] = {"train_s": time.perf_counter() - begun, "trained": trained.said, "device": None, "batch": None}
        if memory.parts.neural is not None:
            origin = memory.parts.neural.origin(1)
            about["device"] = f"{origin.kind}: {origin.name}, {origin.dtype}"
            about["batch"] = alone(memory, [record for some in zip(*held.values(), strict=False) for record in some][:ALONE_RECORDS])
        for name, level, codec in _paths(asked.without_neural):
            for corpus, records in held.items():
                say(f"{corpus}: {name}")
                begun = time.perf_counter()
                containers.setdefault(name, {})[corpus] = encoded(memory, corpus, records, level, codec)
                seconds[name, corpus] = (time.perf_counter() - begun, 0.0)
        for codecs in (memory.parts.codecs, memory.parts.small_codecs):
            refused |= codecs.refused
    if refused:
        raise Wrong(f"codecs of the store did not give back what they were given: {refused}")

    with Memory.open(path, readonly=True, device=asked.device) as memory:
        for name, by_corpus in containers.items():
            for corpus, each in by_corpus.items():
                begun = time.perf_counter()
                payloads = [unpack(container, most_bytes=1 << 20) for container in each]
                decoded = [content for some in chunks(payloads) for content in memory.parts.codecs.decode(some)]
                seconds[name, corpus] = (seconds[name, corpus][0], time.perf_counter() - begun)
                if decoded != held[corpus]:
                    raise Wrong(f"{name}: records of {corpus} came back as others, from a store that was opened anew")
        dictionaries = {id.hex() for id in memory.parts.zstd.dictionaries.values()}
    bare = {
        corpus: sum(len(said.data) + varint_bytes(said.raw_size) for said in (unpack(one, most_bytes=1 << 20) for one in each))
        for corpus, each in containers.get(CLAIM, {}).items()
    }
    used = [NAMES[unpack(each, most_bytes=1 << 20).codec] for some in containers.get(CLAIM, {}).values() for each in some]
    about["codecs_of_neural"] = {name: used.count(name) for name in sorted(set(used))}
    files = {each: each.stat().st_size for each in (path / "shared").iterdir()}
    model = {each: bytes for each, bytes in files.items() if each.name.split(".")[0] == trained.model}
    about["model_bytes"] = max(model.values(), default=0)
    about["dictionary_bytes"] = sum(max(n for each, n in files.items() if each.name.startswith(id)) for id in dictionaries)
    # Whatever many records need lies there twice.
    about["on_disk_bytes"] = sum(model.values()) + sum(n for each, n in files.items() if each.name.split(".")[0] in dictionaries)
    table = {
        name: {
            corpus: Figures(len(held[corpus]), size(held[corpus]), size(each), *seconds[name, corpus]) for corpus, each in by_corpus.items()
        }
        for name, by_corpus in containers.items()
    }
    if bare:
        table[BARE] = {corpus: Figures(len(held[corpus]), size(held[corpus]), bytes) for corpus, bytes in bare.items()}
    return table, about


def varint_bytes(number: int) -> int:
    """What a number takes, seven bits a byte."""
    return max(1, -(-number.bit_length() // 7))


def _paths(without_neural: bool) -> list[tuple[str, str, Literal["zstd", "neural"]]]:
    """Rows of the table: what it is called, whose codecs, and which of them is asked."""
    paths: list[tuple[str, str, Literal["zstd", "neural"]]] = [("store, put", "put", "zstd"), (STORE_BASE, "compact", "zstd")]
    return paths if without_neural else [*paths, (CLAIM, "compact", "neural")]


def encoded(memory: Memory, corpus: str, records: list[bytes], by: str, codec: Literal["zstd", "neural"]) -> list[bytes]:
    """Containers, each proved, in the batches in which `compact` encodes."""
    from pantheraml.memory.container import pack

    codecs = memory.parts.codecs if by == "put" else memory.parts.small_codecs
    containers: list[bytes] = []
    for some in chunks(records):
        containers += [pack(each) for each in codecs.encode(some, forms(some), [corpus] * len(some), codec=codec)]
    return containers


def forms(records: list[bytes]) -> list[Literal["text"]]:
    """All of them are text."""
    return ["text"] * len(records)


def chunks(items: list[Any]) -> list[list[Any]]:
    """As many at once as `compact` takes."""
    from pantheraml.memory.upkeep import AT_ONCE

    return [items[begin : begin + AT_ONCE] for begin in range(0, len(items), AT_ONCE)]


def alone(memory: Memory, records: list[bytes]) -> dict[str, float]:
    """Records a second by the neural codec, there and back: in one call, and each in a call of its own."""
    codec = memory.parts.neural
    assert codec is not None

    def there_and_back(some: list[bytes]) -> None:
        payloads = codec.encode(some, forms(some), ["note"] * len(some))
        codec.decode([each for each in payloads if each])

    there_and_back(records[:1])  # what is made once is made now
    begun = time.perf_counter()
    there_and_back(records)
    middle = time.perf_counter()
    for record in records:
        there_and_back([record])
    many_s, each_s = middle - begun, time.perf_counter() - middle
    return {"records": len(records), "many_per_s": len(records) / many_s, "each_per_s": len(records) / each_s, "ratio": each_s / many_s}


def put_rates(folder: Path, texts: list[bytes], rounds: int) -> dict[str, float]:
    """Records a second into a new store: `put_many`, and `put` for each. They take turns."""
    from pantheraml.memory.record import Record
    from pantheraml.memory.store import Memory

    draw = random.Random(0)
    chosen = [texts[i % len(texts)].decode() + (f" {i}" if i >= len(texts) else "") for i in range(PUT_RECORDS)]
    draw.shuffle(chosen)
    records = [Record(key=f"record {i}", content=text) for i, text in enumerate(chosen)]

    def many(memory: Memory) -> None:
        memory.put_many(records)

    def each(memory: Memory) -> None:
        for record in records:
            memory.put(record.key, record.content)

    seconds: dict[str, list[float]] = {}
    for round in range(rounds):
        for name, work in (("many", many), ("each", each)):
            say(f"putting {PUT_RECORDS:,} records, {name}")
            with Memory.open(folder / f"{name}{round}") as memory:
                memory.put("first", "what is loaded once is loaded now")
                begun = time.perf_counter()
                work(memory)
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
                back = memory.get_many([record.key for record in records])
                if any(back[record.key].content != record.content for record in records):
                    raise Wrong(f"a record that was put ({name}) came back as another")
    many_s, each_s = min(seconds["many"]), min(seconds["each"])
    return {"records": PUT_RECORDS, "many_per_s": PUT_RECORDS / many_s, "each_per_s": PUT_RECORDS / each_s, "ratio": each_s / many_s}


# ---- What it says ----------------------------------------------------------------------------------------------------


def paying(table: Table, own: int, about: dict[str, Any]) -> dict[str, float | None] | None:
    """Megabytes of raw text after which the model has paid for itself: its file counted once, and as it lies in the store. None: never."""
    if CLAIM not in table:
        return None
    neural, base = (together(list(table[name].values())) for name in (CLAIM, BASE))
    saved = (base.bytes - neural.bytes) / neural.raw_bytes
    needed = {"once": about["model_bytes"] + about["dictionary_bytes"], "as it lies in the store": about["on_disk_bytes"]}
    return {how: max(0.0, (bytes - own) / saved / 1e6) if saved > 0 else None for how, bytes in needed.items()}


def show(table: Table, solid: dict[str, int]) -> None:
    """Both tables: bytes and ratios of each corpus; ratio, bits a byte and rates of all."""
    names = list(next(iter(table.values())))
    print(f"\n{'bytes (times smaller)':20}" + "".join(f"{name:>22}" for name in names))
    for codec, by_corpus in table.items():
        print(f"{codec:20}" + "".join(f"{each.bytes:>14,} ({each.ratio:5.2f})" for each in by_corpus.values()))
    print(f"\n{'all corpora':20}{'bytes':>14}{'times smaller':>15}{'bits/byte':>11}{'encode MB/s':>13}{'decode MB/s':>13}")
    for codec, by_corpus in table.items():
        every = together(list(by_corpus.values()))
        rates = "".join(f"{'-' if rate is None else f'{rate:.3g}':>13}" for rate in map(every.rate, (every.encode_s, every.decode_s)))
        print(f"{codec:20}{every.bytes:>14,}{every.ratio:>15.3f}{8 / every.ratio:>11.3f}{rates}")
    raw = together(list(table["raw"].values())).bytes
    print(
        f"\nall records of a corpus in one file of xz, of which none can be read alone: {sum(solid.values()):,} bytes ({raw / sum(solid.values()):.2f})"
    )


def judge(table: Table, own: int, about: dict[str, Any], paid: dict[str, float | None] | None, putting: dict[str, float]) -> dict[str, Any]:
    """Says what the claims come to. Returns: of each what it is, and whether the bar is met."""
    bars: dict[str, Any] = {}
    print(f"dictionaries of {BASE}: {own:,} bytes; of the store: {about['dictionary_bytes']:,}")
    if CLAIM in table:
        print(f"the model: {about['model_bytes']:,} bytes, trained in {about['train_s']:.0f} s; it computes on {about['device']}")
        print(f"codecs of the held-out records: {', '.join(f'{count:,} {name}' for name, count in about['codecs_of_neural'].items())}")
        for how, mb in (paid or {}).items():
            print(f"it has paid for itself after {'no amount' if mb is None else f'{mb:,.1f} MB'} of raw text ({how}), against {BASE}")
        batch = about["batch"]
        print(
            f"neural, there and back, {batch['records']} records in one call: {batch['many_per_s']:.1f} records/s, "
            f"{batch['ratio']:.2f} times as fast as one by one"
        )
        for name, above, below in (("smaller", BASE, BARE), ("smaller in containers", STORE_BASE, CLAIM)):
            bars[name] = bar(f"{above} / {below}", times(table, above, below), SMALLER_BAR)
            for corpus in table[CLAIM]:
                print(f"  {corpus}: {table[above][corpus].bytes / table[below][corpus].bytes:.3f}")
        print(f"{BASE}, bare / {CLAIM}, in containers: {times(table, BASE, CLAIM):.3f}")
    print(f"put_many: {putting['many_per_s']:,.0f} records/s; one by one: {putting['each_per_s']:,.0f}")
    bars["put_many"] = bar(f"put_many({PUT_RECORDS:,}) / one by one", putting["ratio"], FASTER_BAR)
    return bars


def times(table: Table, above: str, below: str) -> float:
    """How many times as many bytes one codec takes as another, of all corpora."""
    return together(list(table[above].values())).bytes / together(list(table[below].values())).bytes


def bar(what: str, is_: float, wanted: float) -> dict[str, Any]:
    """Prints a line."""
    print(f"{what}: {is_:.3f}, bar {wanted:g} {'met' if is_ >= wanted else 'MISSED'}")
    return {"is": is_, "bar": wanted, "met": is_ >= wanted}


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Where a benchmark runs; said: in a line."""
    from pantheraml.hardware.cpu import cpu_name

    versions = {name: version(name) for name in packages}
    cores, load = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, os.getloadavg()[0]
    said = f"{cpu_name()}, {cores} cores (load {load:.1f} before), {platform.system()} {platform.release()}, Python {platform.python_version()}; "
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "load_before": load,
        "python": platform.python_version(),
        "versions": versions,
        "said": said + ", ".join(f"{name} {each or 'not installed'}" for name, each in versions.items()),
    }


def version(package: str) -> str | None:
    """Of what is installed; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def say(what: str) -> None:
    """For a person who waits."""
    print(what, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
