"""The same frequencies, whatever the way: all at once or token by token, any batch, threads, arithmetic, device and reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from tests.memory.models import CPU, contents, float_model, model_file, tokens
from tests.memory.slow_network import SlowNetwork

from pantheraml.errors import DeviceError, PantheraError, RecipeError, StorageError
from pantheraml.kernels import native
from pantheraml.memory.calibrate import calibrate, float_logits
from pantheraml.memory.integer_model import IntegerModel, Linear
from pantheraml.memory.integer_network import Way
from pantheraml.memory.integer_predictor import IntegerPredictor
from pantheraml.memory.predictor import as_inputs, windows

FAMILIES = [("llama", True), ("llama", False), ("mistral", True), ("qwen2", False)]
NATIVE: list[Way] = ["native"] if native.compiler() else []
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on several threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def predictor(data: bytes | None = None, way: Way | None = None) -> IntegerPredictor:
    return IntegerPredictor(data or model_file(), CPU, way=way)


def step_by_step(made: IntegerPredictor, texts: list[np.ndarray]) -> list[np.ndarray]:
    """What `intervals` gives, by begin, find and advance of all rows at once; rows that end are let go."""
    found = [np.zeros((3, len(each)), np.int64) for each in texts]
    expected = made.intervals(texts)
    rows = [i for i, each in enumerate(texts) if len(each)]
    state = made.begin(len(rows))
    place = 0
    while True:
        # Any number of the interval leads to the token: its last one here.
        targets = np.array([expected[i][0, place] + expected[i][1, place] - 1 for i in rows])
        said, starts, widths = state.find(np.minimum(targets, state.totals - 1))
        for row, i in enumerate(rows):
            assert said[row] == texts[i][place]
            found[i][:, place] = starts[row], widths[row], state.totals[row]
        place += 1
        going = [row for row, i in enumerate(rows) if len(texts[i]) > place]
        if not going:
            return found
        if len(going) < len(rows):
            state.keep(going)
            rows = [rows[row] for row in going]
        state.advance(np.array([texts[i][place - 1] for i in rows]))


def check_equal(these: list[np.ndarray], those: list[np.ndarray]) -> None:
    for a, b in zip(these, those, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_all_at_once_is_token_by_token(family, tied):
    made = predictor(model_file(family, tied))
    # Windows of 24: up to four of them in a row of 60.
    texts = [*contents(5, 60), *contents(1, 24, fewest=24), *contents(1, 25, fewest=25), np.zeros(0, np.int32)]
    check_equal(made.intervals(texts), step_by_step(made, texts))


def test_batch_and_padding_change_nothing():
    made = predictor()
    texts = contents(64, 60, seed=3)
    together = made.intervals(texts)
    check_equal(together, [made.intervals([each])[0] for each in texts])
    made._tokens_at_once = 100
    check_equal(together, made.intervals(texts[::-1])[::-1])


def test_threads_change_nothing():
    texts, found = contents(30, 40, seed=4), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found += [predictor().intervals(texts), step_by_step(predictor(), texts[:3])]
    check_equal(found[0], found[2])
    check_equal(found[1], found[3])


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_ways_to_multiply_change_nothing(family, tied):
    texts = contents(6, 40, seed=5)
    ways: list[Way] = ["int8", "float32", "float64", *NATIVE]
    made = [predictor(model_file(family, tied), each) for each in ways]
    for other in made[1:]:
        check_equal(made[0].intervals(texts), other.intervals(texts))
        check_equal(step_by_step(made[0], texts[:2]), step_by_step(other, texts[:2]))
    assert {each.fingerprint for each in made} == {made[0].fingerprint}, "what one encodes the others decode"


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_second_reader_comes_to_the_same_frequencies(family, tied):
    data = model_file(family, tied)
    made, slow = predictor(data), SlowNetwork(data)
    text = contents(1, 40, seed=6, fewest=40)[0]
    found = made.intervals([text])[0]
    inputs = as_inputs(text, 1).tolist()
    # Of each window the first tokens that it predicts, and the last.
    for start, stop, skip in windows(len(text), made.context):
        rows = slow.frequencies(inputs[start : start + skip + 4])
        for place in range(skip, min(skip + 4, stop - start)):
            row, token = rows[place], text[start + place]
            assert found[:, start + place].tolist() == [sum(row[:token]), row[token], sum(row)]
    assert slow.largest < 1 << 31


def extreme(model: IntegerModel) -> IntegerModel:
    """Weights at their ends and the largest scales that are allowed: sums as large as they can become."""
    draw = np.random.default_rng(0)

    def stretched(linear: Linear) -> Linear:
        weight = np.where(draw.random(linear.weight.shape) < 0.5, -127, 127).astype(np.int8)
        bias = np.sign(linear.bias + 0.5).astype(np.int32) * (1 << 24)
        return replace(linear, weight=weight, scale=np.full_like(linear.scale, 255), bias=bias)

    layers = tuple(
        replace(
            each,
            qkv=stretched(each.qkv),
            out=replace(stretched(each.out), shift=4),
            gate_up=stretched(each.gate_up),
            down=replace(stretched(each.down), shift=4),
            score_shift=np.full_like(each.score_shift, 20),
            gain=(16 << 17) - 1,
        )
        for each in model.layers
    )
    return replace(model, layers=layers, head=stretched(model.head), embedding_gain=np.full_like(model.embedding_gain, 32767))


def test_no_sum_leaves_32_bits_whatever_the_weights():
    data = extreme(IntegerModel.from_bytes(model_file())).to_bytes()
    texts = contents(4, 30, seed=7, fewest=30)
    exact = predictor(data, "float64").intervals(texts)
    check_equal(exact, predictor(data, "int8").intervals(texts))
    check_equal(exact, predictor(data, "float32").intervals(texts))
    for way in NATIVE:
        check_equal(exact, predictor(data, way).intervals(texts))
        check_equal(exact, step_by_step(predictor(data, way), texts))
    slow = SlowNetwork(data)
    rows = slow.frequencies(as_inputs(texts[0], 1)[:12].tolist())
    assert [sum(row) for row in rows] == exact[0][2, :12].tolist()
    assert 1 << 27 < slow.largest < 1 << 31


def test_every_token_is_possible_and_frequencies_fit():
    made = predictor()
    state = made.begin(3)
    for tokens_of_rows in contents(12, 3, fewest=3):
        ends = np.asarray(state._ends)
        assert (np.diff(ends, prepend=0) >= 1).all()
        assert (ends[:, -1] == state.totals).all()
        assert (state.totals < 1 << 31).all()
        assert (state.totals > 1 << 28).all(), "as many bits as fit"
        state.advance(tokens_of_rows)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_whole_numbers_are_near_the_floats(family, tied):
    model = float_model(family, tie_word_embeddings=tied)
    weights = dict(model.state_dict())
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    texts = contents(20, 24, seed=8, fewest=24)
    ids = torch.from_numpy(np.stack([as_inputs(each, 1) for each in texts])).long()
    with torch.no_grad():
        theirs = model(ids).logits
        torch.testing.assert_close(float_logits(model, weights, ids), theirs, atol=1e-4, rtol=1e-4)
    chosen = torch.from_numpy(np.stack(texts)).long()[..., None]
    expected = float(-theirs.double().log_softmax(-1).gather(-1, chosen).sum()) / np.log(2)
    found = sum(float(np.log2(total / width).sum()) for _, width, total in predictor(model_file(family, tied)).intervals(texts))
    # Random weights are harder than learned ones, for which test_memory_train asks 2%.
    assert found == pytest.approx(expected, rel=0.02)


def test_the_file_comes_back_and_damage_is_met(tmp_path):
    data = model_file("qwen2", False)
    model = IntegerModel.from_bytes(data)
    assert model.to_bytes() == data
    plain, draw, refused = zstandard.decompress(data), np.random.default_rng(0), 0
    for _ in range(60):
        broken = bytearray(plain)
        broken[int(draw.integers(3000))] ^= 1 << int(draw.integers(8))
        try:
            IntegerModel.from_bytes(zstandard.compress(bytes(broken)))
        except StorageError as error:
            refused += 1
            assert "model of the neural codec" in error.what or "tokens of a model" in error.what
        except PantheraError:
            refused += 1
    assert refused > 40, "most of the first bytes are sizes and names"
    with pytest.raises(StorageError, match="version is 2"):
        IntegerModel.from_bytes(zstandard.compress(plain.replace(b'\\"version\\": 1', b'\\"version\\": 2')))
    for nothing in (b"", data[:-5], plain, zstandard.compress(b"")):
        with pytest.raises(StorageError):
            IntegerModel.from_bytes(nothing)
    large = replace(
        model, head=replace(model.head, weight=np.full_like(model.head.weight, 127), bias=np.full_like(model.head.bias, 2**31 - 1))
    )
    with pytest.raises(StorageError, match="sums up to"):
        IntegerModel.from_bytes(large.to_bytes())


def test_what_cannot_be_converted_is_refused_with_a_reason():
    with pytest.raises(RecipeError, match="gemma") as error:
        calibrate(float_model("gemma"), tokens(), contents(1, 5))
    assert "FloatPredictor" in error.value.fix
    with pytest.raises(RecipeError) as error:
        calibrate(float_model("llama", head_dim=256), tokens(), contents(1, 5))
    assert "256" in error.value.why


def test_torch_computes_where_the_kernel_is_missing_or_wrong(monkeypatch):
    texts = contents(3, 30, seed=10)
    expected = predictor(way="float64").intervals(texts)
    with monkeypatch.context() as changed:
        changed.setattr(
            "pantheraml.memory.integer_native.NativeNetwork.intervals", lambda self, tokens, targets: np.zeros((3, *targets.shape))
        )
        made = predictor()
        assert made._native is None
        check_equal(expected, made.intervals(texts))
    monkeypatch.setattr("pantheraml.kernels.native.opened", lambda: None)
    check_equal(expected, predictor().intervals(texts))
    with pytest.raises(DeviceError, match="no kernel for models") as error:
        predictor(way="native")
    assert "torch" in error.value.fix


def test_a_device_that_does_not_add_right_is_refused(monkeypatch):
    monkeypatch.setattr("pantheraml.memory.integer_network.Network.product", lambda self, x, w: torch.nn.functional.linear(x, w.int()) + 1)
    with pytest.raises(DeviceError, match="exact sums") as error:
        predictor()
    assert "cpu" in error.value.fix


def test_windows_score_each_token_once_with_half_a_window_before_it():
    for context in (8, 9, 24):
        for length in range(1, 60):
            scored = [i for start, stop, skip in windows(length, context) for i in range(start + skip, stop)]
            assert scored == list(range(length))
            for start, stop, skip in windows(length, context):
                assert stop - start <= context
                assert start == 0 or skip >= context // 2


XLA = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from dataclasses import replace
from tests.memory.models import CPU, contents
from tests.memory.test_predictor import step_by_step
from pantheraml.memory.integer_predictor import IntegerPredictor
device = replace(CPU, kind="tpu", simulated=True)
made = IntegerPredictor(Path(sys.argv[1]).read_bytes(), device, memory_bytes=1 << 20)
texts = contents(4, 40, seed=9, fewest=30)
print(json.dumps({"origin": made.origin(1).kind, "all": [each.tolist() for each in made.intervals(texts)],
                  "steps": [each.tolist() for each in step_by_step(made, texts[:2])]}))
"""


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory) -> Iterator[dict[str, list[list[list[int]]]]]:
    """What XLA on the CPU computes, in a process of its own: torchax changes torch, and JAX warns at every fork."""
    if find_spec("jax") is None or find_spec("torchax") is None:
        pytest.skip("jax or torchax is not installed")
    folder = tmp_path_factory.mktemp("xla")
    (folder / "model.nbm").write_bytes(model_file())
    done = subprocess.run(
        [sys.executable, "-c", XLA, str(folder / "model.nbm")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": "/usr/bin:/bin", "HOME": str(folder), "PANTHERAML_CACHE": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    yield json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_xla_comes_to_the_same_frequencies(on_xla):
    texts = contents(4, 40, seed=9, fewest=30)
    assert on_xla["origin"] == "tpu"
    assert on_xla["all"] == [each.tolist() for each in predictor().intervals(texts)]
    assert on_xla["steps"] == on_xla["all"][:2]
