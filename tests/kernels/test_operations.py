"""Every operation against its definition in float64, written out here: the reference in torch and the C++ of the CPU.

The criterion in a low dtype is stock torch: what the same formula errs when torch computes it in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F

from pantheraml.kernels import native
from pantheraml.kernels.operations import ops
from pantheraml.kernels.table import KERNELS, OPERATIONS, installed, load

DTYPES = [torch.float32, torch.bfloat16]
LOW_RANK_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]


@pytest.fixture(params=["reference", "cpu"])
def compute(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """compute(name, *arguments): one implementation of the operations."""
    if request.param == "cpu" and native.opened() is None:
        pytest.skip(f"the C++ kernels are not here: {native.why_not()}")

    def run(name: str, *arguments: Any) -> Any:
        return load(OPERATIONS[name].reference if request.param == "reference" else KERNELS[name, "cpu"])(*arguments)

    return run


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def error(mine: Tensor, exact: Tensor) -> float:
    return float((mine.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def assert_no_worse(mine: Tensor, stock: Tensor, exact: Tensor, what: str) -> None:
    """No more than 1.1 times the error of stock torch in the same dtype; a rounding or two of float32 is always allowed."""
    assert mine.shape == exact.shape, what
    assert error(mine, exact) <= 1.1 * error(stock, exact) + 2e-7, f"{what}: {error(mine, exact):.2e} against {error(stock, exact):.2e}"


def with_gradients(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(each.detach().clone().requires_grad_() for each in inputs)
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def stock_norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    """As transformers computes it: the square in float32 or wider, then the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * (weight + offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 33), (65, 96), (130, 576), (3, 5)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(compute: Any, dtype: torch.dtype, rows: int, width: int, offset: float) -> None:
    x, weight, dy, add = (drawn(rows, width, dtype=dtype, seed=s) for s in (1, 2, 3, 4))
    weight = weight[0] * 0.5 + 1
    exact = with_gradients(lambda x, w: stock_norm(x, w, offset), dy.double(), x.double(), weight.double())
    stock = with_gradients(lambda x, w: stock_norm(x, w, offset), dy, x, weight)
    y, rstd = compute("rms_norm", x, weight, 1e-5, offset)
    dx, dw = compute("rms_norm_backward", dy, x, weight, rstd, offset, None, True)
    assert y.dtype == dx.dtype == dtype and rstd.dtype == dw.dtype == torch.float32
    for what, mine, other, true in zip(("y", "dx", "dweight"), (y, dx, dw), stock, exact, strict=True):
        assert_no_worse(mine, other, true, what)
    more, nothing = compute("rms_norm_backward", dy, x, weight, rstd, offset, add, False)
    assert_no_worse(more, stock[1] + add, exact[1] + add.double(), "dx with the residual's gradient")
    assert not nothing.numel()


def test_rms_norm_of_strided_rows_without_weight_and_with_a_weight_of_another_dtype(compute: Any) -> None:
    wide = drawn(9, 3, 64, dtype=torch.bfloat16)
    x = wide[:, 1]
    assert torch.equal(compute("rms_norm", x, None, 1e-5, 0.0)[0], compute("rms_norm", x.contiguous(), None, 1e-5, 0.0)[0])
    weight = drawn(64)
    y, rstd = compute("rms_norm", x, weight, 1e-5, 0.0)
    assert error(y, stock_norm(x.double(), weight.double(), 0.0)) < 3e-3
    dx, dw = compute("rms_norm_backward", x, x, weight, rstd, 0.0, None, True)
    exact = with_gradients(lambda x, w: stock_norm(x, w, 0.0), x.double(), x.double(), weight.double())
    assert error(dx, exact[1]) < 3e-3 and error(dw, exact[2]) < 1e-5


def test_what_is_no_number_stays_none(compute: Any) -> None:
    for dtype in DTYPES:
        x = drawn(3, 32, dtype=dtype)
        x[1, 20] = float("nan")
        for y in (
            compute("rms_norm", x, None, 1e-5, 0.0)[0],
            compute("gated", x, x, "silu"),
            compute("gated", x, x, "gelu_tanh"),
            compute("cross_entropy", x.clone(), torch.tensor([1, 2, 3]), 1.0, 0.0, False)[:, None],
        ):
            assert y[1].isnan().any() and y[0].isfinite().all() and y[2].isfinite().all()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 33), (40, 352)])
def test_gated(compute: Any, dtype: torch.dtype, activation: str, rows: int, width: int) -> None:
    both, dy = drawn(rows, 2 * width, dtype=dtype, scale=3.0), drawn(rows, width, dtype=dtype, seed=1)
    gate, up = both[:, :width], both[:, width:]  # as Phi has them: side by side, so rows are strided

    def stock(gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[activation](gate) * up

    exact, theirs = with_gradients(stock, dy.double(), gate.double(), up.double()), with_gradients(stock, dy, gate, up)
    y = compute("gated", gate, up, activation)
    dgate, dup, again = compute("gated_backward", dy, gate, up, activation)
    assert torch.equal(y, again)
    for what, mine, other, true in zip(("y", "dgate", "dup"), (y, dgate, dup), theirs, exact, strict=True):
        assert_no_worse(mine, other, true, what)


def test_gates_far_out_are_their_limits(compute: Any) -> None:
    x = torch.tensor([[-1e4, -100.0, -50.0, 50.0, 100.0, 1e4]])
    one = torch.ones_like(x)
    for activation, act in ACTIVATIONS.items():
        dgate, _, y = compute("gated_backward", one, x, one, activation)
        assert torch.allclose(y, act(x), atol=1e-20) and torch.allclose(dgate, (x > 0).float(), atol=1e-12), activation


def stock_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As transformers does: angles once for each of a pair, and the half rotated."""
    pairs = cos.shape[1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        c, s = (each.repeat_interleave(2, -1)[:, None].to(x.dtype) for each in (cos, sin))
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        c, s = (torch.cat((each, each), -1)[:, None].to(x.dtype) for each in (cos, sin))
        half = torch.cat((-turned[..., pairs:], turned[..., :pairs]), -1)
    return torch.cat((turned * c + half * s, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "width", "pairs"), [(1, 1, 32, 16), (9, 3, 64, 32), (5, 2, 96, 36), (4, 2, 40, 5)])
def test_rope(compute: Any, dtype: torch.dtype, interleaved: bool, tokens: int, heads: int, width: int, pairs: int) -> None:
    # Heads of q, k and v side by side, and of the gradients too.
    x, dy = (drawn(tokens, heads + 2, width, dtype=dtype, seed=s)[:, 1:-1] for s in (1, 2))
    angles = drawn(tokens, pairs, seed=3) * 100
    cos, sin = angles.cos() * 1.2, angles.sin() * 1.2  # a factor, as YaRN has one
    exact = with_gradients(lambda x: stock_rope(x, cos, sin, interleaved), dy.double(), x.double())
    stock = with_gradients(lambda x: stock_rope(x, cos, sin, interleaved), dy, x)
    assert_no_worse(compute("rope", x, cos, sin, interleaved, False), stock[0], exact[0], "y")
    assert_no_worse(compute("rope", dy, cos, sin, interleaved, True), stock[1], exact[1], "dx")


def stock_loss(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    z = torch.tanh(z / softcap) * softcap if softcap else z
    return F.cross_entropy(z, labels, ignore_index=-100, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 5.0), (2.0, 1.0)])
@pytest.mark.parametrize("vocabulary", [7, 16, 263, 5003])
def test_cross_entropy(compute: Any, dtype: torch.dtype, scale: float, softcap: float, vocabulary: int) -> None:
    logits = drawn(6, vocabulary, dtype=dtype, scale=4.0)
    labels = torch.tensor([0, 3, -100, vocabulary - 1, 5, -100])
    ones = torch.ones(6, dtype=torch.float64)
    exact = with_gradients(lambda x: stock_loss(x, labels, scale, softcap), ones, logits.double())
    stock = with_gradients(lambda x: stock_loss(x, labels, scale, softcap), ones, logits)
    written = logits.clone()
    loss = compute("cross_entropy", written, labels, scale, softcap, True)
    assert loss.dtype == torch.float32 and written.dtype == dtype
    assert_no_worse(loss, stock[0], exact[0], "loss")
    assert_no_worse(written, stock[1], exact[1], "gradient")
    untouched = logits.clone()
    assert torch.equal(compute("cross_entropy", untouched, labels, scale, softcap, False), loss) and torch.equal(untouched, logits)
    assert not loss[2] and not written[2].any()


def stock_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int, softcap: float) -> Tensor:
    groups, results, start = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        one, keys, values = (each[start : start + length].transpose(0, 1) for each in (q, k, v))
        keys, values = (each.repeat_interleave(groups, 0) for each in (keys, values))
        scores = one @ keys.transpose(1, 2) * scale
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        behind = torch.arange(length)[:, None] - torch.arange(length)[None]
        scores = scores.masked_fill((behind < 0) | (behind >= (window or length)), float("-inf"))
        results.append((torch.softmax(scores, -1) @ values).transpose(0, 1))
        start += length
    return torch.cat(results)


LENGTHS = [[1], [5, 1, 30], [64, 65], [200], [33, 0, 100, 7]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "keys", "width"), [(4, 4, 32), (6, 2, 64), (3, 1, 96)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 0.0), (70, 2.0)])
def test_attention(
    compute: Any, dtype: torch.dtype, lengths: list[int], heads: int, keys: int, width: int, window: int, softcap: float
) -> None:
    tokens = sum(lengths)
    together = drawn(tokens, heads + 2 * keys, width, dtype=dtype)  # strided: q, k and v of one product
    q, k, v = together[:, :heads], together[:, heads : heads + keys], together[:, heads + keys :]
    dy = drawn(tokens, heads, width, dtype=dtype, seed=1)
    scale = 1.3 / math.sqrt(width)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return stock_attention(q, k, v, lengths, scale, window, softcap)

    exact, theirs = with_gradients(stock, dy.double(), *(each.double() for each in (q, k, v))), with_gradients(stock, dy, q, k, v)
    out, lse = compute("attention", q, k, v, starts, max(lengths), scale, window, softcap)
    grads = compute("attention_backward", dy, q, k, v, out, lse, starts, max(lengths), scale, window, softcap)
    assert lse.shape == (heads, tokens) and lse.dtype == torch.float32
    for what, mine, other, true in zip(("out", "dq", "dk", "dv"), (out, *grads), theirs, exact, strict=True):
        if float(true.norm()) > 1e-9:  # one token alone: its weight is 1, and q and k have no gradient
            assert_no_worse(mine, other, true, what)


@pytest.mark.parametrize(("dtype", "b_dtype"), LOW_RANK_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "rank"), [(1, 16, 1), (33, 48, 5), (513, 272, 16), (300, 32, 40), (7, 17, 3)], ids=str)
def test_low_rank(compute: Any, dtype: torch.dtype, b_dtype: torch.dtype, tokens: int, outputs: int, rank: int) -> None:
    """On a slice of a wider matrix, as the skinny products of several adapters lie side by side."""
    grad, y = drawn(tokens, outputs, dtype=dtype), drawn(tokens, outputs + 3, dtype=dtype, seed=1)[:, :outputs]
    low, b = drawn(tokens, rank + 7, dtype=dtype, seed=2)[:, 4 : 4 + rank], drawn(outputs, rank, dtype=b_dtype, seed=3)
    exact_b = b.to(dtype).double()
    added, others = y.clone(), y.clone()
    compute("low_rank_add", added, low, b, 0.7)
    others += (low @ b.to(dtype).T) * 0.7
    assert_no_worse(added, others, y.double() + 0.7 * low.double() @ exact_b.T, "y")
    grad_low, grad_b = compute("low_rank_backward", grad, low, b, 0.7)
    assert grad_low.dtype == dtype and grad_b.dtype == b_dtype
    assert_no_worse(grad_low, grad @ b.to(dtype) * 0.7, 0.7 * grad.double() @ exact_b, "grad_low")
    assert_no_worse(grad_b, (grad.T @ low).to(b_dtype) * 0.7, 0.7 * grad.double().T @ low.double(), "grad_b")


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_gradients_of_the_references_are_those_of_finite_differences(name: str) -> None:
    from pantheraml.kernels.attention import attention
    from pantheraml.kernels.gated import gated
    from pantheraml.kernels.rms_norm import rms_norm
    from pantheraml.kernels.rope import rope

    x, w = drawn(4, 6, dtype=torch.float64).requires_grad_(), drawn(6, dtype=torch.float64, seed=1).requires_grad_()
    q = drawn(4, 2, 6, dtype=torch.float64, seed=2).requires_grad_()
    angles, starts = drawn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 4], dtype=torch.int32)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: rms_norm(x, w, eps=1e-5, offset=1.0), (x, w))
    assert check(lambda x: gated(x, x * 0.5, name), (x,))
    assert check(lambda q: rope(q, angles.cos(), angles.sin(), interleaved=name == "silu"), (q,))
    assert check(lambda q: attention(q, q[:, :1] * 0.3, q[:, 1:], starts, 3, scale=0.7, window=2, softcap=3.0), (q,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "keys"), [([100, 150], 2), ([700], 1), ([33, 0, 513, 64], 1), ([640, 5], 3)], ids=str)
@pytest.mark.parametrize("window", [0, 90])
def test_threads_do_not_change_a_bit(dtype: torch.dtype, lengths: list[int], keys: int, window: int) -> None:
    """Where there are more of them than examples times key heads, they share the work of one in another way."""
    if native.opened() is None:
        pytest.skip(f"the C++ kernels are not here: {native.why_not()}")
    before, tokens = torch.get_num_threads(), sum(lengths)
    x, dy = drawn(tokens, 192, dtype=dtype), drawn(tokens, 192, dtype=dtype, seed=1)
    q, dout, starts = x.view(tokens, 6, 32), dy.view(tokens, 6, 32), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    k, v = q[:, :keys], dout[:, :keys]
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            out, lse = ops.attention(q, k, v, starts, max(lengths), 0.1, window, 0.0)
            grads = ops.attention_backward(dout, q, k, v, out, lse, starts, max(lengths), 0.1, window, 0.0)
            norm = ops.rms_norm_backward(dy, x, x[0], ops.rms_norm(x, x[0], 1e-5, 0.0)[1], 0.0, None, True)
            low = ops.low_rank_backward(dy, x[:, :8], x.T[:, :8].float(), 0.7)
            added = x.clone()
            ops.low_rank_add(added, x[:, :8], x.T[:, :8].float(), 0.7)
            results.append([out, lse, *grads, *norm, *low, added])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_eight_bits_err_half_a_step(dtype: torch.dtype) -> None:
    from pantheraml.kernels.cpu import round_rows, scale_rows_

    x = drawn(5, 77, dtype=dtype)
    x[3] = 0
    q, scale = round_rows(x)
    assert q.dtype == torch.uint8 and torch.all(scale[:, 0] <= x.float().abs().amax(1) / 127 + 1e-20)
    back = (q.float() - 128) * scale
    assert torch.all((back - x.float()).abs() <= scale * 0.501)
    y = drawn(5, 77, dtype=dtype, seed=1)
    expected = (y.double() * scale.double() + x.double()).to(dtype)
    assert torch.allclose(scale_rows_(y, scale, x).double(), expected.double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_torch_knows_the_operations() -> None:
    """Signature, empty tensors of the right shape, and no hidden writing: as torch.compile needs it."""
    x, w = drawn(6, 32), drawn(32, seed=1)
    q, starts = drawn(6, 2, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
    angles = drawn(6, 8)
    y, rstd = ops.rms_norm(x, w, 1e-5, 0.0)
    out, lse = ops.attention(q, q, q, starts, 4, 0.3, 0, 0.0)
    calls: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, w, 1e-5, 0.0),
        "rms_norm_backward": (y, x, w, rstd, 0.0, None, True),
        "gated": (x, y, "silu"),
        "gated_backward": (x, x, y, "silu"),
        "rope": (q, angles.cos(), angles.sin(), False, False),
        "attention": (q, q, q, starts, 4, 0.3, 0, 0.0),
        "attention_backward": (q, q, q, q, out, lse, starts, 4, 0.3, 0, 0.0),
        "cross_entropy": (x.clone(), torch.tensor([1, 2, 3, 4, 5, -100]), 1.0, 0.0, True),
        "low_rank_add": (x.clone(), x[:, :3], drawn(32, 3), 0.5),
        "low_rank_backward": (x, x[:, :3], drawn(32, 3), 0.5),
    }
    assert calls.keys() == OPERATIONS.keys()
    for name, given in calls.items():
        library.opcheck(getattr(ops, name).default, given, test_utils=("test_schema", "test_faketensor"))


def test_every_implementation_of_the_table_is_there_or_its_package_is_not() -> None:
    for kind in ("cpu", "a device of next year"):
        assert all(callable(load(target)) for target in installed(kind).values())
    assert installed("a device of next year") == {name: operation.reference for name, operation in OPERATIONS.items()}
    assert installed("cpu")["attention"] == KERNELS["attention", "cpu"]
    assert all(name in OPERATIONS for name, _ in KERNELS)


def test_without_a_compiler_the_references_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_state", native._State(folder=tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    x = drawn(5, 32)
    assert torch.equal(ops.rms_norm(x, None, 1e-5, 0.0)[0], load(OPERATIONS["rms_norm"].reference)(x, None, 1e-5, 0.0)[0])
    assert "no C++ compiler" in (native.why_not() or "")


def test_a_build_is_announced_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if native.opened() is None:
        pytest.skip(f"the C++ kernels are not here: {native.why_not()}")
    said: list[str] = []
    for _ in range(2):
        monkeypatch.setattr(native, "_state", native._State())
        assert native.prepare(tmp_path, said.append) is None
    assert len(said) == 1 and said[0].startswith("Building the CPU kernels")
    assert len(list((tmp_path / "kernels").iterdir())) == 1
    broken = tmp_path / "other"
    monkeypatch.setattr(native, "_state", native._State())
    monkeypatch.setattr(native, "_FLAGS", ("-std=c++20", "-no-such-flag"))
    assert native.prepare(broken) is not None and native.opened() is None and not list((broken / "kernels").glob("*.so"))
