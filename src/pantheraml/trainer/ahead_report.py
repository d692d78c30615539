"""What a step takes on a TPU slice that is not here, as lines for a person and values for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pantheraml.hardware.tpu import TpuSlice
from pantheraml.planning.cost import format_dollars
from pantheraml.planning.levels import format_levels
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan
from pantheraml.planning.sharding import format_mesh

if TYPE_CHECKING:
    from pantheraml.engines.xla_ahead import Compiled

GUESS = "a first guess from the catalog's peak, not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A step that does not fit. rows, tokens: of a micro-batch over all devices. levels: of its layers. why: the compiler's words."""

    rows: int
    tokens: int
    levels: str
    why: str
    took_s: float

    def __str__(self) -> str:
        return f"{format_rows(self.rows, self.tokens)}, layers at {self.levels}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The last step that the compiler was asked for on a slice.

    Attributes:
        plan: of this step. settings: keys of a recipe that make a run take it; none where a run does so by itself.
        doubt: why it does not fit by arithmetic; None: it does.
        compiled: what the compiler said of its parts; empty if it refused. refused: all that it refused, in order.
    """

    tpu: TpuSlice
    plan: Plan
    settings: tuple[str, ...] = ()
    doubt: str | None = None
    compiled: tuple[Compiled, ...] = ()
    refused: tuple[Refusal, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the compiler found room."""
        return bool(self.compiled)

    @property
    def memory_bytes(self) -> int | None:
        """What a program gets on each device."""
        return self.plan.device.free_bytes

    @property
    def peak_bytes(self) -> int | None:
        """At the busiest moment of a step, on each device."""
        return max((each.peak_bytes for each in self.compiled), default=None)

    @property
    def rows(self) -> int:
        """Of a micro-batch, over all devices."""
        return self.plan.micro_tokens // self.plan.row_tokens[-1]

    @property
    def step_s(self) -> float | None:
        """Of a micro-batch; a guess."""
        return None if self.plan.cost.tokens_per_s is None else self.plan.micro_tokens / self.plan.cost.tokens_per_s

    @property
    def usd_per_million_tokens(self) -> float | None:
        """What training on a million tokens costs, padding counted; a guess."""
        return usd_per_million_tokens(self.plan)

    def lines(self) -> list[tuple[str, str, str]]:
        """(choice, value, reason) for a person."""
        plan, cost, tpu = self.plan, self.plan.cost, self.tpu
        of = f"{tpu.slices} slices, " if tpu.slices > 1 else ""
        of += f"{tpu.chips} chip{'s' if tpu.chips > 1 else ''} of {plan.device.name}"
        of += f", {tpu.devices_each} devices a chip" if tpu.devices_each > 1 else ""
        lines = [
            ("slice", str(tpu), f"{of}, {format_bytes(self.memory_bytes)} a device; none is here"),
            *(line for line in plan.lines() if line[0] in ("dtype", "base_dtype", "devices")),
            ("micro-batch", format_rows(self.rows, plan.row_tokens[-1]), "over all devices"),
            ("checkpointing", format_levels(plan.levels), ""),
            *(("refused", f"{format_rows(each.rows, each.tokens)}, {each.levels}", each.why) for each in self.refused),
        ]
        said = f"the compiler of TPUs says {format_bytes(self.peak_bytes)} of {format_bytes(self.memory_bytes)} a device"
        lines.append(("fits", "yes" if self.fits else "no", said if self.fits else "nothing is left to try; see what was refused"))
        if self.doubt:
            lines.append(("by arithmetic", "no", f"{self.doubt}; the compiler was asked all the same"))
        if self.settings and self.fits:
            lines.append(("to run it so", " ".join(self.settings), "so that a run takes it from the start"))
        for part in self.compiled:
            lines += _part_lines(part)
        took_s = sum(each.compile_s for each in self.compiled) + sum(each.took_s for each in self.refused)
        lines += [
            ("compiling", f"{took_s:.0f} s", "on this machine" + (", refused steps included" if self.refused else "")),
            ("price", _per_hour(cost.usd_per_hour), plan.reasons["price"]),
        ]
        if not self.fits:
            return lines
        lines += [
            (
                "arithmetic",
                f"{cost.flops_per_token * plan.micro_tokens / plan.world_size / 1e12:.3g} TFLOP",
                "a micro-batch, on each device; counted from the model's shape",
            ),
            (
                "time",
                "unknown" if self.step_s is None else f"about {self.step_s:.2g} s",
                f"a micro-batch; {GUESS}" + ("; exchanges between slices are not counted" if tpu.slices > 1 else ""),
            ),
            ("price of tokens", _per_million(self.usd_per_million_tokens), f"the price an hour, and the time above: {GUESS}"),
        ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "slice": str(self.tpu),
            "fits": self.fits,
            "refused": [asdict(each) for each in self.refused],
            "settings": list(self.settings),
            "doubt": self.doubt,
            "memory_bytes": self.memory_bytes,
            "peak_bytes": self.peak_bytes,
            "compiled": [{**asdict(each), "peak_bytes": each.peak_bytes} for each in self.compiled],
            "guessed_step_s": self.step_s,
            "usd_per_hour": self.plan.cost.usd_per_hour,
            "guessed_usd_per_million_tokens": self.usd_per_million_tokens,
            "plan": self.plan.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cheapest:
    """The slice with the lowest price an hour.

    Attributes:
        plan: there; None if no slice with a known price was found. fit: what the compiler said; None: it was not asked.
        passed: cheaper slices that the compiler refused. unpriced: slices that fit by arithmetic, and have no known price.
    """

    tpu: TpuSlice | None
    plan: Plan | None
    fit: Fit | None = None
    passed: tuple[TpuSlice, ...] = ()
    unpriced: tuple[TpuSlice, ...] = ()

    def lines(self) -> list[tuple[str, str, str]]:
        """(choice, value, reason) for a person."""
        others = f"; the price of {', '.join(map(str, self.unpriced))} is not known" if self.unpriced else ""
        passed = f"; refused on {', '.join(map(str, self.passed))}" if self.passed else ""
        if self.plan is None:
            return [("cheapest that fits", "none is known", f"among single slices whose price is known{passed}{others}")]
        plan = self.plan
        prices = f"{_per_hour(plan.cost.usd_per_hour)}, {_per_million(usd_per_million_tokens(plan))} (a guess)"
        value = f"{self.tpu}: {format_mesh(plan.mesh)}"
        if self.fit is None:
            return [("cheapest that fits", value, f"{prices}; by arithmetic: the compiler was not asked, which --suggest does{others}")]
        proof = f"the compiler of TPUs says {format_bytes(self.fit.peak_bytes)} of {format_bytes(self.fit.memory_bytes)} a device"
        step = f"for {format_rows(self.fit.rows, plan.row_tokens[-1])}, layers at {format_levels(plan.levels)}"
        lines = [("cheapest that fits", value, f"{prices}; {proof} {step}{passed}{others}")]
        if self.fit.settings:
            lines.append(("to run it so", " ".join(self.fit.settings), "there"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "slice": None if self.tpu is None else str(self.tpu),
            "mesh": None if self.plan is None else self.plan.mesh,
            "usd_per_hour": None if self.plan is None else self.plan.cost.usd_per_hour,
            "guessed_usd_per_million_tokens": None if self.plan is None else usd_per_million_tokens(self.plan),
            "compiler_asked": self.fit is not None,
            "peak_bytes": None if self.fit is None else self.fit.peak_bytes,
            "rows": None if self.fit is None else self.fit.rows,
            "settings": [] if self.fit is None else list(self.fit.settings),
            "refused_on": [str(each) for each in self.passed],
            "unpriced": [str(each) for each in self.unpriced],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What a step would take on the slice that was asked for, and which one is the cheapest. hint: what may fit where this does not."""

    fit: Fit
    cheapest: Cheapest
    hint: str | None

    def lines(self) -> list[tuple[str, str, str]]:
        """(choice, value, reason) for a person."""
        hint = [("may fit", self.hint, "by arithmetic; the compiler was not asked")] if self.hint else []
        return [*self.fit.lines(), *hint, *self.cheapest.lines()]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self.fit.to_dict(), "may_fit": self.hint, "cheapest": self.cheapest.to_dict()}


def format_rows(rows: int, tokens: int) -> str:
    """`8 rows of 2048`."""
    return f"{rows} row{'s' if rows != 1 else ''} of {tokens}"


def usd_per_million_tokens(plan: Plan) -> float | None:
    """US dollars, by the catalog's speed; None where that or the price is unknown."""
    hour, speed = plan.cost.usd_per_hour, plan.cost.tokens_per_s
    return None if hour is None or speed is None else hour / 3600 / speed * 1e6


def _per_hour(usd: float | None) -> str:
    return "unknown" if usd is None else f"{format_dollars(usd)} an hour"


def _per_million(usd: float | None) -> str:
    return "unknown" if usd is None else f"about {format_dollars(usd)} a million tokens"


def _part_lines(part: Compiled) -> list[tuple[str, str, str]]:
    sizes = {
        "arguments": part.arguments_bytes,
        "results": part.results_bytes,
        "temporary": part.temporary_bytes,
        "waiting": part.waiting_bytes,
    }
    said = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    lines = [
        (
            part.phase,
            format_bytes(part.peak_bytes),
            f"{said}; exchanges in its text: {_counted(part.collectives)}; compiled in {part.compile_s:.0f} s",
        )
    ]
    if part.between_slices:
        size = f"{format_bytes(part.between_slices_bytes)} from each device, those in a loop over layers counted once"
        lines.append(("between slices", _counted(part.between_slices), f"{part.phase}, over the slower network (dcn): {size}"))
    return lines


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
