from __future__ import annotations

import pytest

from pantheraml.errors import DeviceError
from pantheraml.planning.batch import BUSY_TOKENS, BUSY_TOKENS_FAST, HEADROOM, MOST_LENGTHS, choose_micro_tokens, row_lengths
from pantheraml.planning.levels import Levels, format_levels, lower
from pantheraml.planning.memory import Level, MemoryEstimate

MIB = 1 << 20


LAYERS = 10
PER_TOKEN = {"keep": MIB, "cheap": MIB * 3 // 4, "all": MIB // 10, "tiled": MIB // 20}


def estimate(micro_tokens: int, levels: Levels) -> MemoryEstimate:
    """100 MiB of weights, and 1 MiB a token in all layers together (a tenth of it where they are computed again)."""
    per_token = sum(PER_TOKEN[level] for level in levels) // LAYERS
    return MemoryEstimate(
        weights_bytes=100 * MIB,
        gradients_bytes=0,
        optimizer_bytes=0,
        activations_bytes=micro_tokens * per_token,
        logits_bytes=0,
        runtime_bytes=0,
    )


@pytest.mark.parametrize("max_tokens", [1, 48, 64, 100, 512, 1000, 2048, 8192, 131072])
@pytest.mark.parametrize("longest", [None, 1, 63, 65, 190, 1000, 1537, 10**6])
def test_row_lengths_rise_and_hold_the_longest_example(max_tokens: int, longest: int | None) -> None:
    lengths = row_lengths(max_tokens, longest)
    assert 1 <= len(lengths) <= MOST_LENGTHS
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] <= max_tokens
    assert lengths[-1] >= min(max_tokens, longest or max_tokens)


def test_row_lengths_are_powers_of_two_and_the_points_half_way() -> None:
    assert row_lengths(2048) == (64, 128, 256, 512, 1024, 2048)
    assert row_lengths(2048, 190) == (64, 96, 128, 192)
    assert row_lengths(1000) == (64, 128, 256, 512, 768, 1000)


def choose(free_mib: int, **changes: object):
    arguments = {
        "free_bytes": free_mib * MIB,
        "longest_row": 512,
        "batch_tokens": 10**6,
        "peak_flops": None,
        "layers": LAYERS,
        "rungs": ("keep", "all"),
    }
    return choose_micro_tokens(estimate, **{**arguments, **changes})


def test_micro_tokens_fill_the_memory_but_for_the_headroom() -> None:
    chosen = choose(2048)
    assert chosen.micro_tokens == 1536
    assert chosen.levels == ("keep",) * LAYERS
    assert chosen.memory.total_bytes <= 2048 * MIB * HEADROOM < estimate(2048, ("keep",) * LAYERS).total_bytes


def test_more_memory_never_means_fewer_tokens() -> None:
    taken = [choose(free).micro_tokens for free in range(800, 40_000, 100)]
    assert taken == sorted(taken)
    assert taken[-1] == BUSY_TOKENS


def test_micro_tokens_stop_where_more_would_not_help() -> None:
    assert choose(10**6).micro_tokens == BUSY_TOKENS
    assert choose(10**6, peak_flops=7e14).micro_tokens == BUSY_TOKENS_FAST
    assert choose(10**6, batch_tokens=1600).micro_tokens == 2048  # 1600 and a quarter more, rounded up
    assert choose(10**6, batch_tokens=10).micro_tokens == 512  # one row
    assert choose(10**6, batch_tokens=1024, most_tokens=1024).micro_tokens == 1024  # all rows are full, so no step has more
    assert choose(10**6, batch_tokens=1024, most_tokens=3000).micro_tokens == 1536


def test_checkpointing_comes_only_when_one_row_does_not_fit_without_and_then_in_as_few_layers_as_it_takes() -> None:
    assert choose(800).levels == ("keep",) * LAYERS
    chosen = choose(700)
    # 460 MiB may be filled by 512 tokens: 9 layers kept take 461 + 5.
    assert (chosen.levels, chosen.micro_tokens) == (("all",) * 2 + ("keep",) * 8, 512)
    assert "not even one row fits" in chosen.levels_reason
    assert choose(10**6, rungs=("all",)).levels == ("all",) * LAYERS
    assert choose(10**6, rungs=("all",)).levels_reason.startswith("the recipe asks for it")


def test_what_costs_nearly_nothing_is_tried_before_fewer_tokens_and_mixed() -> None:
    rungs = ("keep", "cheap", "all", "tiled")
    chosen = choose(2200, rungs=rungs)  # 1760 MiB may be filled: 1636 with all cheap, and 51 more for each that is kept
    assert (chosen.levels, chosen.micro_tokens) == (("cheap",) * 8 + ("keep",) * 2, 2048)
    assert choose(10**6, rungs=rungs).levels == ("keep",) * LAYERS
    least = choose(160, rungs=rungs)
    assert least.levels == ("tiled",) * LAYERS or set(least.levels) == {"tiled", "all"}
    taken = [choose(free, rungs=rungs) for free in range(160, 40_000, 100)]
    assert [each.memory.total_bytes <= free * MIB * HEADROOM for each, free in zip(taken, range(160, 40_000, 100), strict=True)]


def test_a_level_lower_is_the_next_one_for_those_that_kept_most() -> None:
    allowed: tuple[Level, ...] = ("keep", "cheap", "all")
    assert lower(("cheap", "keep"), allowed) == ("cheap", "cheap")
    assert lower(("cheap", "cheap"), allowed) == ("all", "all")
    assert lower(("all", "cheap"), allowed) == ("all", "all")
    assert lower(("all", "all"), allowed) is None and lower(("cheap",), ()) is None
    assert format_levels(("all", "all", "cheap")) == "2 all, 1 cheap" and format_levels(("cheap",) * 3) == "3 cheap"


def test_what_is_asked_is_taken_while_it_fits_at_all() -> None:
    assert choose(710, asked=600, rungs=("keep",)).micro_tokens == 600  # 700 MiB: over the headroom, under the memory
    with pytest.raises(DeviceError) as caught:
        choose(690, asked=600, rungs=("keep",))
    assert caught.value.what == "training needs 700 MiB, and the device has 690 MiB free"


def test_the_refusal_names_the_numbers_and_the_remedies() -> None:
    with pytest.raises(DeviceError) as caught:
        choose(150, remedies=("set adapter.kind to lora", "pray"))
    error = caught.value
    assert error.what == "training needs 151 MiB even with checkpointing, and the device has 150 MiB free, of which a plan fills 80%"
    assert "for 512 tokens at once: weights 100 MiB" in error.why
    assert error.fix == "set adapter.kind to lora; or pray"


def test_a_level_that_is_asked_for_takes_as_many_tokens_at_once_as_a_lighter_one() -> None:
    for level in ("keep", "all", "tiled"):
        assert choose(10**6, rungs=(level,)).micro_tokens == choose(10**6, rungs=("keep", "all")).micro_tokens, level
