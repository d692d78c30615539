"""The arithmetic of an `IntegerModel` with torch: every result is a whole number that does not depend on how it was computed.

A sum of products is exact in three ways: of int8 in units that add in int32 (`int8`), of float32 where no sum reaches 2**24
(`float32`; the factors are below 2**7, so products in bfloat16 or TF32 with sums in float32 are exact as well), and of float64.
All else is int32. So neither batch, padding, threads, device nor the version of a library can change a bit.
Letters: B rows, S new tokens, P tokens before them, N = B * S; the others as in integer_model.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from pantheraml.memory.integer_model import (
    FREQUENCY_BITS,
    GAIN_BITS,
    LARGEST_ACTIVATION,
    LARGEST_OUTPUT,
    LARGEST_SUM,
    LOGIT_STEPS,
    PEAK_BITS,
    ROPE_SHIFT,
    SCORE_STEPS,
    SILU_STEPS,
    VALUE_SHIFT,
    IntegerModel,
    Linear,
    Norm,
    likelihoods,
    root_table,
    weights_of_scores,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Products = Literal["int8", "float32", "float64"]
Way = Literal["native", "int8", "float32", "float64"]
"""How a predictor computes: by the kernel for processors, or by torch."""
HIDDEN = -float(1 << 23)
"""Added to the score of a token that must not be seen: beyond all others, and still exact."""
_FURTHEST = 1 << 22
_EXACT_FLOAT32 = 1 << 24
_BLOCK = 128
"""Tokens that look back at once."""


class Network:
    """An `IntegerModel` whose tensors lie on a device of torch.

    Args:
        products: how sums of products are computed.
    """

    def __init__(self, model: IntegerModel, device: torch.device, products: Products) -> None:
        import torch

        self.model, self.device, self.products = model, device, products
        self.floats = torch.float64 if products == "float64" else torch.float32
        """Of scores, of weights of attention, and of keys and values."""
        linears = {"head": model.head}
        for i, layer in enumerate(model.layers):
            linears |= {f"{i}.qkv": layer.qkv, f"{i}.out": layer.out, f"{i}.gate_up": layer.gate_up, f"{i}.down": layer.down}
        norms = {"norm": model.norm}
        for i, layer in enumerate(model.layers):
            norms |= {f"{i}.attention": layer.attention_norm, f"{i}.mlp": layer.mlp_norm}
        self.tensors: dict[str, Tensor] = {name: self._whole(root_table(norm)) for name, norm in norms.items()}
        """Everything that `frequencies` reads, by name."""
        for name, linear in linears.items():
            self.tensors |= {f"{name}.weight": self._factors(linear), f"{name}.scale": self._whole(linear.scale)}
            self.tensors[f"{name}.bias"] = self._whole(linear.bias)
        for i, layer in enumerate(model.layers):
            self.tensors[f"{i}.score"] = self._whole(layer.score)
            self.tensors[f"{i}.score_shift"] = self._whole(layer.score_shift)
        self.tensors["embedding"] = self._whole(model.embedded())
        cosines, sines = model.turns
        self.tensors |= {"cosines": self._whole(cosines), "sines": self._whole(sines), "silu": self._whole(model.silu)}
        self.tensors["attended"] = torch.from_numpy(weights_of_scores()).to(self.device, self.floats)
        self.tensors["likely"] = self._whole(likelihoods())
        self.tensors["peaks"] = self._whole(1 << np.arange(PEAK_BITS, 21))
        self.tensors["squares"] = self._whole(1 << np.arange(12, 31, 2))
        self.tensors["sums"] = self._whole(1 << np.arange(9, 19))
        self.tensors["totals"] = self._whole(1 << np.arange(FREQUENCY_BITS - model.shape.vocabulary_bits, 31))

    def _whole(self, values: np.ndarray) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(self.device)

    def _factors(self, linear: Linear) -> Tensor:
        import torch

        weight = torch.from_numpy(np.array(linear.weight)).to(self.device)
        return weight if self.products == "int8" else weight.to(self.floats)

    def hidden(self, new: int, before: int) -> Tensor:
        """[S, P + S] of 0 and `HIDDEN`: which tokens each of S new ones behind P others must not see."""
        import torch

        mask = torch.full((new, before + new), HIDDEN, dtype=self.floats, device=self.device)
        return mask.triu(before + 1)

    def intervals(self, tensors: dict[str, Tensor], tokens: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Where each target stands among the frequencies behind each of the last T of the tokens.

        Args:
            tensors: those of this network. tokens: int32 [B, S], a window from its beginning. targets: int32 [B, T], T <= S.
            mask: see `hidden`.
        Returns: int32 [3, B, T]: the frequencies of tokens before the target, its own, and those of all.
        """
        import torch

        start = torch.zeros(1, dtype=torch.int32, device=tokens.device)
        likely, _, _ = self.frequencies(tensors, tokens, start, mask, None, targets.shape[1])
        ends = likely.cumsum(-1, dtype=torch.int32)
        chosen = targets.reshape(-1, 1).long()
        width = likely.gather(1, chosen)
        found = torch.cat([ends.gather(1, chosen) - width, width, ends[:, -1:]], 1)
        return found.t().reshape(3, *targets.shape)

    def step(
        self, tensors: dict[str, Tensor], tokens: Tensor, start: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One more token in each row: where the frequencies behind it end, int32 [B, V], and its keys and values.

        Args:
            tokens: int32 [B, 1]. start, mask: see `frequencies`. keys, values: of those before, [L, B * G, P, E].
        """
        import torch

        likely, k, v = self.frequencies(tensors, tokens, start, mask, (keys, values), 1)
        return likely.cumsum(-1, dtype=torch.int32), k, v

    def frequencies(
        self,
        tensors: dict[str, Tensor],
        tokens: Tensor,
        start: Tensor,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        asked: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How likely each token is behind each of the last of the new ones.

        Args:
            tensors: those of this network. tokens: int32 [B, S]. start: int32 [1], the place of the first of them in its window.
            mask: see `hidden`; None: all are seen. past: keys and values of the P tokens before, each [L, B * G, P, E].
            asked: behind so many; 0: none, for keys and values alone.
        Returns: int32 [B * asked, V] at least 1, their sum below 2**31; and keys and values [L, B * G, S, E] of the new tokens.
        """
        import torch

        shape = self.model.shape
        rows, new = tokens.shape
        places = start + torch.arange(new, dtype=torch.int32, device=tokens.device)
        turns = [torch.index_select(tensors[name], 0, places).view(1, new, 1, -1) for name in ("cosines", "sines")]
        x_ND = torch.index_select(tensors["embedding"], 0, tokens.reshape(-1))
        keys, values = [], []
        for i, layer in enumerate(self.model.layers):
            normed = self._normed(x_ND, tensors[f"{i}.attention"], tensors, layer.attention_norm)
            qkv = self._linear(normed, f"{i}.qkv", tensors, layer.qkv.shift)
            q, k, v = self._turned(qkv.view(rows, new, -1, shape.head), turns)
            before = (past[0][i], past[1][i]) if past else None
            attended = self._attention(q, k, v, before, mask, (tensors[f"{i}.score"], tensors[f"{i}.score_shift"]), layer.gain, tensors)
            added = self._linear(attended, f"{i}.out", tensors, layer.out.shift, LARGEST_SUM)
            x_ND = (x_ND + added).clamp_(-LARGEST_SUM, LARGEST_SUM)
            normed = self._normed(x_ND, tensors[f"{i}.mlp"], tensors, layer.mlp_norm)
            both = self._linear(normed, f"{i}.gate_up", tensors, layer.gate_up.shift)
            gate = both[:, : shape.inner].clamp(-SILU_STEPS // 2, SILU_STEPS // 2 - 1) + SILU_STEPS // 2
            opened = torch.index_select(tensors["silu"], 0, gate.reshape(-1)).view(-1, shape.inner)
            gated = _shifted(opened * both[:, shape.inner :], layer.gated_shift)
            added = self._linear(gated, f"{i}.down", tensors, layer.down.shift, LARGEST_SUM)
            x_ND = (x_ND + added).clamp_(-LARGEST_SUM, LARGEST_SUM)
            keys.append(k)
            values.append(v)
        if not asked:
            return x_ND[:0], torch.stack(keys), torch.stack(values)
        x_ND = x_ND.view(rows, new, -1)[:, new - asked :].reshape(rows * asked, -1)
        normed = self._normed(x_ND, tensors["norm"], tensors, self.model.norm)
        logits = self._linear(normed, "head", tensors, self.model.head.shift)
        below = (logits.amax(-1, keepdim=True) - logits).clamp(max=LOGIT_STEPS - 1)
        likely = torch.index_select(tensors["likely"], 0, below.view(-1)).view(below.shape)
        # As many bits of each as leave their sum below 2**31.
        coarse = (likely >> shape.vocabulary_bits).sum(-1, keepdim=True, dtype=torch.int32) + shape.vocabulary
        likely = (likely >> _at_least(coarse, tensors["totals"])) + 1
        return likely, torch.stack(keys), torch.stack(values)

    def _linear(self, x_NI: Tensor, name: str, tensors: dict[str, Tensor], shift: int, largest: int = LARGEST_OUTPUT) -> Tensor:
        """int32 [N, O] of int32 [N, I], which is cut to `LARGEST_ACTIVATION`."""
        sums = self.product(x_NI.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION), tensors[f"{name}.weight"])
        sums = sums.mul_(tensors[f"{name}.scale"]).add_(tensors[f"{name}.bias"]).bitwise_right_shift_(shift)
        return sums.clamp_(-largest, largest)

    def product(self, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        """x W^T, int32 [N, O], of int32 [N, I] of at most `LARGEST_ACTIVATION` and a weight among `tensors`."""
        import torch

        if self.products == "int8":
            return torch.ops.aten._int_mm(x_NI.to(torch.int8), weight_OI.t())
        size = weight_OI.shape[1]
        step = size if self.products == "float64" else (_EXACT_FLOAT32 - 1) // LARGEST_ACTIVATION**2
        parts = [
            torch.nn.functional.linear(x_NI[:, at : at + step].to(self.floats), weight_OI[:, at : at + step]).to(torch.int32)
            for at in range(0, size, step)
        ]
        return sum(parts[1:], start=parts[0])

    def _normed(self, x_ND: Tensor, roots: Tensor, tensors: dict[str, Tensor], norm: Norm) -> Tensor:
        """int32 [N, D]: each token divided by its root mean square."""
        import torch

        down = _at_least(x_ND.abs().amax(-1, keepdim=True), tensors["peaks"])
        x_ND = x_ND >> down
        small = x_ND >> self.model.shape.square_shift
        square = (small * small).sum(-1, keepdim=True, dtype=torch.int32)
        half = _at_least(square, tensors["squares"])
        root = torch.index_select(roots, 0, (square >> (2 * half)).view(-1)).view(-1, 1)
        shift = half + norm.shift
        return (x_ND * root + (torch.ones_like(shift) << (shift - 1))) >> shift

    def _turned(self, qkv: Tensor, turns: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys by their places, and values: [B * G, S * H / G, E], [B * G, S, E] and [B * G, S, E]."""
        import torch

        shape = self.model.shape
        rows, new = qkv.shape[:2]
        qk, v = qkv[:, :, : shape.heads + shape.groups], qkv[:, :, shape.heads + shape.groups :]
        first, second = qk.chunk(2, -1)
        cosines, sines = turns
        qk = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
        qk = _cut(_shifted(qk, ROPE_SHIFT)).to(self.floats)
        v = _cut(_shifted(v, VALUE_SHIFT)).to(self.floats)
        shared = shape.heads // shape.groups
        q = qk[:, :, : shape.heads].reshape(rows, new, shape.groups, shared, shape.head).permute(0, 2, 3, 1, 4)
        k, v = (each.permute(0, 2, 1, 3).reshape(rows * shape.groups, new, shape.head) for each in (qk[:, :, shape.heads :], v))
        return q.reshape(rows * shape.groups, shared * new, shape.head), k, v

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        scale: tuple[Tensor, Tensor],
        gain: int,
        tensors: dict[str, Tensor],
    ) -> Tensor:
        """What each new token takes from those that it sees: int32 [N, H * E]."""
        import torch

        shape = self.model.shape
        shared, rows = shape.heads // shape.groups, len(k) // shape.groups
        new = q.shape[1] // shared
        if before is None and mask is not None and new > _BLOCK:  # what is masked for all of a block is left out
            q = q.view(len(k), shared, new, shape.head)
            blocks = []
            for start in range(0, new, _BLOCK):
                stop = min(start + _BLOCK, new)
                part = q[:, :, start:stop].reshape(len(k), -1, shape.head)
                found = self._attention(part, k[:, :stop], v[:, :stop], None, mask[start:stop, :stop], scale, gain, tensors)
                blocks.append(found.view(rows, stop - start, -1))
            return torch.cat(blocks, 1).view(rows * new, -1)
        scores = torch.bmm(q, k.transpose(1, 2))
        if before is not None:
            scores = torch.cat([torch.bmm(q, before[0].transpose(1, 2)), scores], -1)
        scores = scores.view(rows, shape.groups, shared, new, -1)
        if mask is not None:
            scores = scores + mask
        below = (scores.amax(-1, keepdim=True) - scores).clamp_(max=_FURTHEST).to(torch.int32)
        times, shift = (each.view(1, shape.groups, shared, 1, 1) for each in scale)
        steps = (below.mul_(times) >> shift).clamp_(max=SCORE_STEPS - 1)
        weights = torch.index_select(tensors["attended"], 0, steps.view(-1)).view(len(k), shared * new, -1)
        sums = weights.sum(-1, keepdim=True).to(torch.int32)
        if before is None:
            mixed = torch.bmm(weights, v)
        else:
            seen = before[1].shape[1]
            mixed = torch.bmm(weights[..., :seen], before[1]) + torch.bmm(weights[..., seen:], v)
        down = _at_least(sums, tensors["sums"])
        share = torch.div(torch.full_like(down, gain) << down, sums, rounding_mode="floor")
        mixed = _shifted((mixed.to(torch.int32) >> down) * share, GAIN_BITS)
        return mixed.view(rows, shape.groups, shared, new, shape.head).permute(0, 3, 1, 2, 4).reshape(rows * new, -1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x / 2**bits, rounded."""
    return (x + (1 << (bits - 1))) >> bits


def _cut(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)


def _at_least(x: Tensor, levels: Tensor) -> Tensor:
    """int32: how many of the levels each x [.., 1] reaches."""
    import torch

    return (x >= levels).sum(-1, keepdim=True, dtype=torch.int32)
