"""What docs/nbmf.md says of a model in whole numbers, in plain Python: a second reader, slow and without torch or numpy."""

from __future__ import annotations

import json
import struct
from math import isqrt
from typing import Any

import zstandard

SIZES = {"I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I"}
Vector = list[int]


def read(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the JSON, tensors as nested lists) of a model's file."""
    data = zstandard.ZstdDecompressor().decompress(data)
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    said = json.loads(head.pop("__metadata__")["nbm"])
    tensors: dict[str, Any] = {}
    for name, each in head.items():
        start, end = (8 + length + at for at in each["data_offsets"])
        letter = SIZES[each["dtype"]]
        flat = list(struct.unpack(f"<{(end - start) // struct.calcsize(letter)}{letter}", data[start:end]))
        if len(each["shape"]) == 2:
            wide = each["shape"][1]
            flat = [flat[at : at + wide] for at in range(0, len(flat), wide)]
        tensors[name] = flat
    return said, tensors


def cut(x: int, most: int) -> int:
    return max(-most, min(most, x))


def rounded(x: int, s: int) -> int:
    return (x + (1 << (s - 1))) >> s


def reached(x: int, levels: range) -> int:
    """How many of two to these powers are at most x."""
    return sum(1 << level <= x for level in levels)


def root_of_two(power: int, part: int) -> int:
    """floor(2**(power / part)) for a part that is a power of two."""
    if power < 0:
        return 0
    value = 1 << power
    while part > 1:
        value, part = isqrt(value), part // 2
    return value


F = [root_of_two(1920 - i, 64) for i in range(1984)]
W = [(255 * root_of_two(24 * 32 - i, 32) + 2**23) >> 24 for i in range(320)]
B15, B20 = 32767, 1048575


class SlowNetwork:
    """Give it a model's file, then the inputs of a window."""

    def __init__(self, data: bytes) -> None:
        self.said, self.tensors = read(data)
        self.shape = self.said["shape"]
        self.largest = 0

    def frequencies(self, inputs: Vector) -> list[Vector]:
        """Behind each input."""
        s = self.shape
        seen: list[list[tuple[list[Vector], list[Vector]]]] = [[] for _ in range(s["layers"])]
        return [self._behind(token, place, seen) for place, token in enumerate(inputs)]

    def _behind(self, token: int, place: int, seen: list[list[tuple[list[Vector], list[Vector]]]]) -> Vector:
        t, s = self.tensors, self.shape
        name = "embedding" if "embedding.weight" in t else "head"
        weight, scale = t[f"{name}.weight"][token], t[f"{name}.scale"][token]
        x = [cut(rounded(w * scale * g, self.said["embedding_shift"]), B20) for w, g in zip(weight, t["embedding.gain"], strict=True)]
        for i, layer in enumerate(self.said["layers"]):
            y = self._linear(self._norm(x, layer["attention_norm"]), f"layers.{i}.qkv", layer["qkv"]["shift"], B15)
            parts = [y[at : at + s["head"]] for at in range(0, len(y), s["head"])]
            turned = [self._turned(each, place) for each in parts[: s["heads"] + s["groups"]]]
            values = [[cut(rounded(each, 6), 127) for each in part] for part in parts[s["heads"] + s["groups"] :]]
            seen[i].append((turned[s["heads"] :], values))
            out = [each for h in range(s["heads"]) for each in self._attended(turned[h], h, i, layer["gain"], seen[i])]
            x = [cut(a + b, B20) for a, b in zip(x, self._linear(out, f"layers.{i}.out", layer["out"]["shift"], B20), strict=True)]
            y = self._linear(self._norm(x, layer["mlp_norm"]), f"layers.{i}.gate_up", layer["gate_up"]["shift"], B15)
            gates, ups = y[: s["inner"]], y[s["inner"] :]
            opened = [t["silu"][max(-2048, min(2047, g)) + 2048] for g in gates]
            z = [self._small(rounded(a * u, layer["gated_shift"])) for a, u in zip(opened, ups, strict=True)]
            x = [cut(a + b, B20) for a, b in zip(x, self._linear(z, f"layers.{i}.down", layer["down"]["shift"], B20), strict=True)]
        logits = self._linear(self._norm(x, self.said["norm"]), "head", self.said["head"]["shift"], B15)
        top = max(logits)
        f = [F[min(top - each, 1983)] for each in logits]
        bits = (s["vocabulary"] - 1).bit_length()
        k = reached(sum(each >> bits for each in f) + s["vocabulary"], range(30 - bits, 31))
        return [(each >> k) + 1 for each in f]

    def _small(self, x: int) -> int:
        """x, of which is noted how large it was: it must fit 32 bits."""
        self.largest = max(self.largest, abs(x))
        return x

    def _linear(self, x: Vector, name: str, shift: int, most: int) -> Vector:
        t = self.tensors
        x = [cut(each, 127) for each in x]
        out = []
        for row, scale, bias in zip(t[f"{name}.weight"], t[f"{name}.scale"], t[f"{name}.bias"], strict=True):
            total = self._small(sum(w * each for w, each in zip(row, x, strict=True)) * scale + bias)
            out.append(cut(total >> shift, most))
        return out

    def _norm(self, x: Vector, norm: dict[str, int]) -> Vector:
        n = reached(max(map(abs, x)), range(14, 21))
        u = [each >> n for each in x]
        small = 4 + max(0, (len(x) - 1).bit_length() - 10)
        m = self._small(sum((each >> small) ** 2 for each in u))
        h = reached(m, range(12, 31, 2))
        root = isqrt(norm["square"] // max(1, m >> (2 * h)))
        return [rounded(self._small(each * root), h + norm["shift"]) for each in u]

    def _turned(self, y: Vector, place: int) -> Vector:
        half = len(y) // 2
        first, second = [], []
        for i in range(half):
            angle = ((place * self.tensors["phases"][i] + 2**19) >> 20) % 4096
            s, c = self.tensors["sine"][angle], self.tensors["sine"][(angle + 1024) % 4096]
            a, b = y[i], y[i + half]
            first.append(cut(rounded(self._small(a * c - b * s), 20), 127))
            second.append(cut(rounded(self._small(b * c + a * s), 20), 127))
        return first + second

    def _attended(self, q: Vector, h: int, i: int, gain: int, seen: list[tuple[list[Vector], list[Vector]]]) -> Vector:
        s, t = self.shape, self.tensors
        group = h * s["groups"] // s["heads"]
        scores = [sum(a * b for a, b in zip(q, keys[group], strict=True)) for keys, _ in seen]
        times, shift = t[f"layers.{i}.score"][h], t[f"layers.{i}.score_shift"][h]
        w = [W[min(self._small((max(scores) - each) * times) >> shift, 319)] for each in scores]
        total = sum(w)
        n = reached(total, range(9, 19))
        out = []
        for e in range(s["head"]):
            mixed = sum(each * values[group][e] for each, (_, values) in zip(w, seen, strict=True))
            out.append(rounded(self._small((mixed >> n) * ((gain << n) // total)), 17))
        return out
