"""Is a council right more often than one advisor? On a task with answers, which a model trained here solves imperfectly.

    python benchmarks/council_accuracy.py [--quick] [--questions N] [--seeds N] [--advisors N] [--steps N] [--threads N] [--keep FOLDER]

The task: which of four letters stands most often in a string of nine to fourteen. A tiny Llama is trained from nothing on questions in the very
shape in which a debate asks them: half of them first rounds, half of them later rounds, with answers of others some of which are wrong,
so that reading others means something to it. It is stopped early, so that it is wrong now and then. The tuned advisors have a LoRA each,
trained on other strings, from another seed. Questions of the test stand in no training file.

Asked are, for every seed (of training and of debates): one advisor, greedy; the vote of several samples, which is the first round of
the debate; the debate, after its second round; and the vote and the debate of the tuned advisors. Ties go to the side that is surer. Shares of right
answers are printed with 95 % intervals (Wilson), and what the second round mended and spoilt. At last the confidence of the verdicts is
calibrated, each fifth by the others. Whatever is printed is reported as it is.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantheraml.council import Local, Persona, Transcript, Turn

LETTERS = "abcd"
SHORTEST, LONGEST = 9, 14
RIGHT_SHARE = 0.75
"""Of the answers that a training row's advisors give."""
NEW_TOKENS = 40
ROW_TOKENS = 512


def main() -> int:
    """Train, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little training and few questions, for a check of the benchmark itself")
    parser.add_argument("--questions", type=int, help="for each seed; default: 400, quick: 20")
    parser.add_argument("--seeds", type=int, help="default: 2, quick: 1")
    parser.add_argument("--advisors", type=int, help="default: 5, quick: 3")
    parser.add_argument("--steps", type=int, help="of training; default: 220, quick: 20")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", type=Path, help="keep models and data in this folder")
    asked = parser.parse_args()
    questions, seeds = asked.questions or (20 if asked.quick else 400), asked.seeds or (1 if asked.quick else 2)
    advisors, steps = asked.advisors or (3 if asked.quick else 5), asked.steps or (20 if asked.quick else 220)
    found: dict[str, list[bool]] = {}
    pairs: list[tuple[float, bool]] = []
    begun = time.perf_counter()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as passing:
            folder = asked.keep / f"seed-{seed}" if asked.keep else Path(passing)
            folder.mkdir(parents=True, exist_ok=True)
            local, personas = trained(folder, advisors, steps, seed, threads=asked.threads)
            ask_all(local, personas, strings(questions, seed=1_000_000 + seed), seed, found, pairs)
    result = report(found, pairs, seeds=seeds, advisors=advisors, steps=steps, seconds=time.perf_counter() - begun)
    print(json.dumps(result | {"quick": asked.quick}))
    return 0


# ---- The task --------------------------------------------------------------------------------------------------------


def string(draw: random.Random) -> str:
    """Letters, one of them more often than each other."""
    while True:
        weights = [draw.random() for _ in LETTERS]
        found = "".join(draw.choices(LETTERS, weights, k=draw.randint(SHORTEST, LONGEST)))
        order = sorted(Counter(found).values(), reverse=True)
        if len(order) > 1 and order[0] > order[1]:
            return found


def strings(count: int, seed: int) -> list[str]:
    """Those of the test: their hash is even, that of no training row is."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        each = string(draw)
        if held_out(each):
            found[each] = None
    return list(found)


def held_out(text: str) -> bool:
    """Whether a string is for the test only."""
    return sum(ord(each) * (place + 1) for place, each in enumerate(text)) % 5 == 0


def question_of(text: str) -> str:
    """As an advisor is asked."""
    return f"Which letter stands most often in {text}?"


def right_answer(text: str) -> str:
    """The one that does."""
    return Counter(text).most_common(1)[0][0]


def answer(text: str, draw: random.Random | None = None) -> str:
    """How an advisor answers: with the counts, and the letter. draw: the counts are wrong here and there."""
    counts = Counter(text)
    said = {each: counts[each] for each in LETTERS}
    if draw is not None:
        for each in draw.sample(LETTERS, 2):
            said[each] = max(0, said[each] + draw.choice((-2, -1, 1, 2)))
    best = max(LETTERS, key=lambda each: said[each])
    return " ".join(f"{each}{said[each]}" for each in LETTERS) + f".\nAnswer: {best}"


def rows(count: int, personas: Sequence[Persona], draw: random.Random) -> list[dict[str, Any]]:
    """Questions as a debate asks them, of its first round and its later ones, with the right answer."""
    from pantheraml.council.prompts import Piece, first_messages, later_messages

    found: list[dict[str, Any]] = []
    while len(found) < count:
        text = string(draw)
        if held_out(text):
            continue
        who = draw.choice(personas)
        if draw.random() < 0.5:
            messages = first_messages(who, question_of(text), ())
        else:
            said = [answer(text, None if draw.random() < RIGHT_SHARE else draw) for _ in personas]
            pieces = [Piece(advisor=each.name, round=0, text=words, said=words) for each, words in zip(personas, said, strict=True)]
            messages = later_messages(who, question_of(text), pieces)
        found.append({"messages": [*messages, {"role": "assistant", "content": answer(text)}]})
    return found


# ---- Training --------------------------------------------------------------------------------------------------------


def trained(folder: Path, advisors: int, steps: int, seed: int, *, threads: int | None) -> tuple[Local, list[Persona]]:
    """A model that answers, and its advisors; each has an adapter of its own, which it does not name."""
    import pantheraml
    from pantheraml.council import Local, Persona
    from pantheraml.recipe.types import HardwareAsk

    personas = [Persona(name=f"n{i}", prompt="Count.", temperature=1.0) for i in range(advisors)]

    def run(name: str, model: str, count: int, draw: int, **sections: Any) -> Path:
        begun = time.perf_counter()
        found = pantheraml.train(
            model,
            rows(count, personas, random.Random(draw)),
            model__dtype="float32",
            model__max_tokens=ROW_TOKENS,
            data__eval_fraction=0.02,
            eval={"every": "end", "generate_rows": 0},
            hardware={"threads": threads},
            run={"folder": str(folder), "name": name, "seed": draw, "save_every": "end", "log_every": 50},
            **sections,
        )
        print(f"trained {name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        return found.folder

    optim = {"lr": 3e-3, "steps": steps, "warmup": 0.05}
    base = run("base", "tiny:llama", 16 * steps, 3 * seed, adapter={"kind": "full"}, batch={"size": 16}, optim=optim)
    model = str(base / "model")
    optim = {"lr": 1e-3, "steps": max(2, steps // 10), "warmup": 0.05}
    adapters = {
        persona.name: str(
            run(
                persona.name,
                model,
                16 * max(2, steps // 10),
                1000 * (seed + 1) + number,
                adapter={"kind": "lora", "rank": 8, "alpha": 16.0},
                batch={"size": 16},
                optim=optim,
            )
        )
        for number, persona in enumerate(personas)
    }
    local = Local.open(model, adapters, rows=min(64, 8 * advisors), tokens=ROW_TOKENS, ask=HardwareAsk(threads=threads))
    return local, personas


# ---- Asking ----------------------------------------------------------------------------------------------------------


def ask_all(
    local: Local, personas: list[Persona], texts: Sequence[str], seed: int, found: dict[str, list[bool]], pairs: list[tuple[float, bool]]
) -> None:
    """Every question to everybody, several debates at the same time in the rows of one model."""
    from pantheraml.council import Settings, debate

    settings = Settings(rounds=2, max_new_tokens=NEW_TOKENS, seed=seed, synthesis="extract", stop_early=False)
    tuned = [replace(each, adapter=each.name) for each in personas]
    greedy = [replace(personas[0], temperature=0.0)]

    def ask(text: str) -> tuple[dict[str, bool], tuple[float, bool] | None]:
        right = right_answer(text)
        question = question_of(text)
        alone = debate(question, greedy, replace(settings, rounds=1), local=local)
        plain = debate(question, personas, settings, local=local)
        own = debate(question, tuned, settings, local=local)
        said = {
            "one advisor": held(alone.turns) == right,
            "vote of samples": held(in_round(plain, 0)) == right,
            "debate": held(in_round(plain, 1)) == right,
            "vote of tuned": held(in_round(own, 0)) == right,
            "debate of tuned": held(in_round(own, 1)) == right,
        }
        sure = plain.verdict_confidence.raw
        return said, None if sure is None else (sure, plain.outcome.position == right)

    with local.batcher, ThreadPoolExecutor(8) as pool:
        for said, pair in pool.map(ask, texts):
            for name, value in said.items():
                found.setdefault(name, []).append(value)
            pairs += [] if pair is None else [pair]


def in_round(transcript: Transcript, round: int) -> list[Turn]:
    """What was answered in it."""
    return [turn for turn in transcript.turns if turn.round == round]


def held(turns: Sequence[Turn]) -> str:
    """What most hold; of as many, those who are surer."""
    votes: dict[str, tuple[int, float]] = {}
    for turn in turns:
        count, sure = votes.get(turn.position, (0, 0.0))
        votes[turn.position] = count + 1, sure + math.exp(turn.answer_logprob or -9.0)
    return max(votes, key=lambda each: votes[each])


# ---- What came of it -------------------------------------------------------------------------------------------------


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, share = 1.959964, right / count
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - spread) / (1 + z * z / count)), min(1.0, (middle + spread) / (1 + z * z / count))


def report(found: dict[str, list[bool]], pairs: list[tuple[float, bool]], **about: Any) -> dict[str, Any]:
    """Print the table, and give what the last line says."""
    from pantheraml.council import Calibration
    from pantheraml.errors import DataError

    count = len(next(iter(found.values())))
    print(
        f"{count} questions over {about['seeds']} seeds, {about['advisors']} advisors, {about['steps']} steps; {about['seconds']:.0f} s in all"
    )
    print(f"{'':18} {'right':>7} {'95 % interval':>17}")
    shares: dict[str, Any] = {}
    for name, right in found.items():
        low, high = wilson(sum(right), count)
        shares[name] = {"right": sum(right), "count": count, "share": sum(right) / count, "interval": [low, high]}
        print(f"{name:18} {sum(right) / count:7.1%} {low:8.1%} - {high:6.1%}")
    changed: dict[str, Any] = {}
    for vote, debated in (("vote of samples", "debate"), ("vote of tuned", "debate of tuned")):
        both = list(zip(found[vote], found[debated], strict=True))
        mended, spoilt = both.count((False, True)), both.count((True, False))
        changed[debated] = {"mended": mended, "spoilt": spoilt}
        print(f"{debated}: its second round mended {mended} votes and spoilt {spoilt}")
    calibrated: dict[str, Any] | None = None
    try:
        learned = Calibration.fit([sure for sure, _ in pairs], [right for _, right in pairs])
        before, after = learned.before, learned.after
        calibrated = {"method": learned.method, "pairs": len(pairs)}
        calibrated |= {"ece": [before.ece, after.ece], "brier": [before.brier, after.brier]}
        print(
            f"confidence of {len(pairs)} verdicts: expected error {before.ece:.3f}, calibrated {after.ece:.3f}; "
            f"Brier {before.brier:.3f}, calibrated {after.brier:.3f} ({learned.method})"
        )
    except DataError as error:
        print(f"confidence: {error.what}")
    return {"benchmark": "council_accuracy", **about, "accuracy": shares, "changed": changed, "calibration": calibrated}


if __name__ == "__main__":
    sys.exit(main())
