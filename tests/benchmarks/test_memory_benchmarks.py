"""The benchmarks of the memory: records and queries are what is promised, recall is counted by its definition, and both run."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *words: str, cwd: Path) -> tuple[dict, str]:
    done = subprocess.run([sys.executable, BENCHMARKS / name, *words], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def benchmark():
    """A benchmark as a module, by name."""
    made = []

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        made.append(name)
        spec.loader.exec_module(module)
        return module

    sys.path.insert(0, str(BENCHMARKS))  # they import their neighbours
    yield load
    sys.path.remove(str(BENCHMARKS))
    for name in [*made, "corpora", "memory"]:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def million(benchmark):
    module = benchmark("memory_million")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(3, 9))) for _ in range(300)]
    document = [". ".join(" ".join(draw.choices(words, k=9)) for _ in range(10)) for _ in range(20)]
    module.corpora = lambda seed: {"docstrings": [document], "pages": [document[:3]]}
    return module


def test_records_are_the_same_each_time(million):
    records = list(million.made_records(500, 7))
    assert records == list(million.made_records(500, 7)) and records != list(million.made_records(500, 8))
    assert records[:100] == list(million.made_records(100, 7))
    assert len(set(records)) == 500 and 60 < sum(map(len, records)) / 500 < 160
    assert all(f"-{i:07d}:" in record for i, record in enumerate(records))


def test_queries_are_parts_without_the_number(million):
    records = list(million.made_records(200, 7))
    queries = million.made_queries(records, 7)
    assert queries == million.made_queries(records, 7)
    for record, query in zip(records, queries, strict=True):
        kept, rest = query.split(), iter(record.split()[1:])
        assert len(kept) >= 2 and len(query) < len(record)
        assert all(word in rest for word in kept)  # in the record's order
    assert sum(len(query) for query in queries) < 0.7 * sum(len(record) for record in records)


def test_recall_is_that_of_the_definition(million, monkeypatch):
    from pantheraml.memory.embed import LexicalEmbedder

    monkeypatch.setattr(million, "BATCH", 64)  # several blocks, the last of which is short
    records = list(million.made_records(300, 7))
    queries = million.made_queries(records[::30], 7)
    truth = million.Truth(records, queries)
    embedder = LexicalEmbedder()
    cosines = embedder.embed(queries).astype(np.float64) @ embedder.embed(records).astype(np.float64).T
    nearest = np.argsort(-cosines, axis=1)[:, : million.K]
    assert truth.last == pytest.approx(np.sort(cosines, axis=1)[:, -million.K], abs=1e-6)
    assert truth.recall(nearest.tolist()) == truth.recall(truth.ids.tolist()) == 1
    farthest = np.argsort(cosines, axis=1)[:, : million.K]
    assert truth.recall(farthest.tolist()) == 0
    half = np.concatenate([nearest[:, :5], farthest[:, :5]], axis=1)
    assert truth.recall(half.tolist()) == truth.recall(nearest[:, :5].tolist()) == 0.5
    assert truth.recall([[each[0]] * 10 for each in nearest.tolist()]) == 0.1  # one record counts once


def test_percentiles(million):
    assert million.median([3, 1, 2]) == 2
    assert million.share(list(range(1000)), 0.99) == 990


def test_a_codec_that_changes_a_record_is_wrong(benchmark):
    module = benchmark("memory")
    records = [b"one record", b"another one"]
    kept = module.measured("kept", module.Coder(bytes, bytes), records, 2)
    assert (kept.records, kept.raw_bytes, kept.bytes, kept.ratio) == (2, 21, 21, 1)
    with pytest.raises(module.Wrong, match="turned did not give back"):
        module.measured("turned", module.Coder(bytes, lambda data: data[::-1]), records, 1)


def test_when_a_model_has_paid_for_itself(benchmark):
    module = benchmark("memory")
    about = {"model_bytes": 90_000, "dictionary_bytes": 20_000, "on_disk_bytes": 220_000}
    figures = {name: {"one": module.Figures(10, 1000, size)} for name, size in ((module.BASE, 400), (module.CLAIM, 300))}
    # A tenth of a byte is saved for each byte of raw text, and 60,000 bytes more have to be kept.
    assert module.paying(figures, 50_000, about) == pytest.approx({"once": 0.6, "as it lies in the store": 1.7})
    figures[module.CLAIM] = figures[module.BASE]
    assert module.paying(figures, 50_000, about) == {"once": None, "as it lies in the store": None}
    assert module.paying({module.BASE: figures[module.BASE]}, 50_000, about) is None


CODECS = ["raw", "zlib-9", "zstd-19", "zstd-19+dictionary", "xz", "store, put", "store, zstd-19"]


@pytest.mark.slow
def test_memory_without_a_model(tmp_path):
    result, said = run("memory.py", "--quick", "--without-neural", cwd=tmp_path)
    assert (result["benchmark"], result["ok"], result["quick"], result["paid_after_mb"]) == ("memory", True, True, None)
    assert said.startswith("# run on ")
    assert list(result["codecs"]) == CODECS
    for codec, each in result["codecs"].items():
        assert list(each) == ["all", "docstrings", "sources", "pages", "logs"]
        assert each["all"]["bytes"] == sum(part["bytes"] for name, part in each.items() if name != "all")
        assert each["all"]["bits_per_byte"] == pytest.approx(8 / each["all"]["ratio"], rel=1e-3)
        assert codec == "raw" or (each["all"]["encode_mb_s"] > 0 and each["all"]["decode_mb_s"] > 0)
    everything = {codec: each["all"]["bytes"] for codec, each in result["codecs"].items()}
    assert everything["store, zstd-19"] <= everything["store, put"] < everything["raw"]
    assert everything["zstd-19+dictionary"] < everything["zstd-19"] < everything["raw"]
    assert list(result["bars"]) == ["put_many"] and result["putting"]["records"] == 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory(tmp_path):
    result, said = run("memory.py", "--quick", "--minutes", "0.05", "--device", "cpu", cwd=tmp_path)
    assert result["ok"] is True and list(result["codecs"]) == [*CODECS, "store, neural", "neural, bare"]
    assert list(result["bars"]) == ["smaller", "smaller in containers", "put_many"] and "bar 1.3" in said
    everything = {codec: each["all"]["bytes"] for codec, each in result["codecs"].items()}
    # The store takes the smaller one of both, whatever the model has learned.
    assert everything["store, neural"] <= everything["store, zstd-19"]
    store = result["store"]
    assert store["device"].startswith("cpu") and store["model_bytes"] > 0
    assert store["on_disk_bytes"] == 2 * (store["model_bytes"] + store["dictionary_bytes"])
    records = result["codecs"]["raw"]["all"]["records"]
    assert sum(store["codecs_of_neural"].values()) == records == result["records"]["held out"][0]
    assert result["paid_after_mb"].keys() == {"once", "as it lies in the store"}


@pytest.mark.slow
def test_memory_million(tmp_path):
    result, said = run("memory_million.py", "--quick", "--records", "12000", "--queries", "20", "--only", "memory", "fts5", cwd=tmp_path)
    assert (result["benchmark"], result["ok"], result["records"], result["queries"]) == ("memory_million", True, 12_000, 20)
    assert said.startswith("# run on ")
    ours, fts5 = result["results"]["memory"], result["results"]["fts5"]
    assert ours["in_graph"] == 12_000
    assert len(ours["batch_s"]) == 2 and len(ours["search_s"]) == 20 and ours["disk_bytes"] > 12_000 * 100
    assert ours["recall"] >= 0.9 and ours["exact_recall"] >= 0.95 and fts5["recall"] is None
    assert min(ours["hit"], fts5["hit"], result["brute_force_hit"]) >= 0.8
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_million_beside_lancedb(tmp_path):
    words = ("--quick", "--records", "3000", "--queries", "10", "--only", "lancedb-pq", "lancedb-hnsw")
    result, said = run("memory_million.py", *words, cwd=tmp_path)
    for name in ("lancedb-pq", "lancedb-hnsw"):
        each = result["results"][name]
        if importlib.util.find_spec("lancedb") is None:
            assert each == {"absent": "not installed (pip install lancedb)"} and f"{name}: left out, not installed" in said
        else:
            assert each["recall"] >= 0.5 and len(each["search_s"]) == 10
