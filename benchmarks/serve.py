"""64 clients stream answers from `pantheraml serve` for two minutes, some are killed on the way, and every answer is checked.

    python benchmarks/serve.py [--quick] [--clients N] [--rows N] [--seconds S] [--kill SHARE] [--threads N]

A Llama of four layers with large random weights, and two LoRA adapters, are written into a folder and served by a process of its own on the
loopback interface. Beforehand this process answers each question alone, one at a time: greedy ones, and drawn ones with a seed, of the base
and of both adapters, all of different lengths. Then the clients ask for them at random, each the next one as soon as it has an answer, over
HTTP with server-sent events; a share of the requests is cut off after some events, or before the first. An answer counts if it came to its
end and every character is that of the answer computed alone.

At the end all rows must be free, and the service must end by itself on SIGTERM with exit status 0.

The last line is JSON: requests, answers, tokens/s, milliseconds to the first token and between tokens (p50, p99), errors. The exit status is
1 if an answer was lost or wrong, or a row was not free again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ADAPTERS = ("lawyer", "doctor")
QUESTIONS = 60
TOKENS = 192
"""Of a row."""
FREE_SECONDS = 60.0
"""For the rows of the last clients to become free."""


@dataclass(frozen=True)
class Question:
    """A request, and the answer that was computed alone."""

    body: dict[str, Any]
    answer: str
    tokens: int


@dataclass
class Seen:
    """What the clients saw. first_s, gaps_s: until the first piece of text, and between two of them."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0
    killed: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    most_busy: float = 0
    most_waiting: float = 0

    @property
    def requests(self) -> int:
        """All that were begun."""
        return self.answers + self.killed + len(self.wrong) + self.errors.total()


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 clients on 4 rows for 10 seconds, for a check of the benchmark itself")
    parser.add_argument("--clients", type=int, help="at once; default: 64, quick: 8")
    parser.add_argument("--rows", type=int, help="answers at once; default: 64, quick: 4")
    parser.add_argument("--seconds", type=float, help="default: 120, quick: 10")
    parser.add_argument("--kill", type=float, default=0.1, metavar="SHARE", help="of the requests that are cut off; default: 0.1")
    parser.add_argument("--threads", type=int, default=1, help="of the service's arithmetic; more help little at this size")
    asked = parser.parse_args()
    clients, rows = asked.clients or (8 if asked.quick else 64), asked.rows or (4 if asked.quick else 64)
    with TemporaryDirectory(prefix="pantheraml-serve-") as place:
        result = measure(Path(place), clients, rows, asked.seconds or (10.0 if asked.quick else 120.0), asked.kill, asked.threads)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def measure(place: Path, clients: int, rows: int, seconds: float, kill: float, threads: int) -> dict[str, Any]:
    """Write the model, answer alone, serve, ask, count."""
    write_model(place)
    questions = answered_alone(place, rows, threads)
    print(f"{len(questions)} questions answered alone, {len({each.answer for each in questions})} different answers", file=sys.stderr)
    with service(place, rows, clients, threads) as (process, url, device):
        seen, took_s = asyncio.run(ask_all(url, questions, clients, seconds, kill))
        free, counted = asyncio.run(until_free(url))
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    lost = len(seen.wrong) + seen.errors.total()
    for wrong in seen.wrong[:3]:
        print(f"wrong: {wrong}", file=sys.stderr)
    return {
        "benchmark": "serve",
        "ok": lost == 0 and free and status == 0 and seen.answers > 0,
        "device": device,
        "clients": clients,
        "rows": rows,
        "seconds": round(took_s, 1),
        "requests": seen.requests,
        "answers": seen.answers,
        "wrong": len(seen.wrong),
        "errors": dict(seen.errors),
        "killed": seen.killed,
        "cancelled_by_service": int(counted.get('pantheraml_answers_total{finished="cancelled"}', 0)),
        "rows_free_at_the_end": free,
        "exit_status": status,
        "most_rows_busy": int(seen.most_busy),
        "most_waiting": int(seen.most_waiting),
        "tokens_per_s": round(seen.tokens / took_s, 1),
        "answers_per_s": round(seen.answers / took_s, 2),
        "first_token_ms": percentiles(seen.first_s),
        "between_tokens_ms": percentiles(seen.gaps_s),
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The middle, and what one in a hundred exceeds, in milliseconds."""
    ordered = sorted(values)
    return {
        name: round(1000 * ordered[int(share * (len(ordered) - 1))], 2) if ordered else None
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


# ---- The model, and what it says alone --------------------------------------------------------------------------


def write_model(place: Path) -> None:
    """`model` and a folder for each adapter."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from pantheraml.models.adapters import attach
    from pantheraml.models.tiny import tiny_config, tiny_tokenizer
    from pantheraml.recipe.types import LoRA

    logging.disable_progress_bar()
    torch.manual_seed(0)
    # At the usual 0.02, logits are so alike that all questions have the same answer.
    model = AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.1))
    model.save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    for number, name in enumerate(ADAPTERS):
        tuned = attach(model, LoRA(rank=8), seed=number)
        for key, weight in tuned.named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(weight, std=0.1)
        tuned.save_pretrained(str(place / name))
        model = tuned.unload()


def answered_alone(place: Path, rows: int, threads: int) -> list[Question]:
    """Each question with its answer, computed while nothing else is."""
    import torch

    from pantheraml.models.request import Request
    from pantheraml.serve import open_service

    adapters = {name: place / name for name in ADAPTERS}
    alone = open_service(str(place / "model"), dtype="float32", adapters=adapters, rows=rows, tokens=TOKENS)
    torch.set_num_threads(threads)  # loading a model sets them to what the machine has
    draw = random.Random(0)
    found: list[Question] = []
    for number in range(QUESTIONS):
        model = draw.choice(["model", *ADAPTERS])
        text = f"{number}: " + "".join(draw.choice("abcdefghij ") for _ in range(draw.randrange(5, 80)))
        how: dict[str, Any] = {"temperature": 0} if number % 2 else {"temperature": 1.0, "top_p": 0.95, "seed": number}
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": draw.randrange(8, 90), **how}
        request = Request(
            prompt=tuple(alone.chat_prompt(body["messages"])),
            max_new_tokens=body["max_tokens"],
            temperature=how["temperature"],
            top_p=how.get("top_p", 1.0),
            seed=how.get("seed"),
            adapter=alone.adapter(model),
        )
        (answer,) = alone.engine.batcher.run([request])
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        found.append(Question(body=body, answer=answer.text, tokens=len(answer.tokens)))
    return found


@contextmanager
def service(place: Path, rows: int, clients: int, threads: int) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its address, and what it says of its device."""
    adapters = [word for name in ADAPTERS for word in ("--adapter", f"{name}={place / name}")]
    sizes = ["--rows", str(rows), "--tokens", str(TOKENS), "--queue", str(2 * clients)]
    command = [sys.executable, "-m", "pantheraml", "serve", str(place / "model"), "--dtype", "float32", "--port", "0", *sizes, *adapters]
    with (place / "log").open("w+") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
        try:
            lines: list[str] = []
            while not any(line.startswith("listening on ") for line in lines):
                if process.poll() is not None:
                    raise SystemExit((place / "log").read_text())
                time.sleep(0.1)
                lines = (place / "log").read_text().splitlines()
            url = next(line for line in lines if line.startswith("listening on ")).split()[2].removesuffix("/v1")
            yield process, url, next(line for line in lines if line.startswith("device: ")).removeprefix("device: ")
        finally:
            process.kill()
            process.wait()


# ---- The clients ------------------------------------------------------------------------------------------------


async def ask_all(url: str, questions: Sequence[Question], clients: int, seconds: float, kill: float) -> tuple[Seen, float]:
    """All clients, until the time is over and each has the answer that it waits for."""
    import httpx2

    seen = Seen()
    limits = httpx2.Limits(max_connections=clients + 8, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        begun = time.perf_counter()
        until = begun + seconds

        async def client(number: int) -> None:
            draw = random.Random(number)
            while time.perf_counter() < until:
                await ask(http, draw.choice(questions), draw.randrange(8) if draw.random() < kill else None, seen)

        async def watch() -> None:
            while True:
                now = await metrics(http)
                seen.most_busy = max(seen.most_busy, now["pantheraml_rows_busy"])
                seen.most_waiting = max(seen.most_waiting, now["pantheraml_queue_length"])
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client(number) for number in range(clients)))
        took_s = time.perf_counter() - begun
        watching.cancel()
    return seen, took_s


async def ask(http: Any, question: Question, killed_after: int | None, seen: Seen) -> None:
    """One request. killed_after: the client is gone after so many events; None: it stays."""
    import httpx2

    begun = last = time.perf_counter()
    said, usage, done = "", {}, False
    events = 0
    try:
        if killed_after == 0:  # before anything has come
            async with asyncio.timeout(0.02):
                await http.post("/v1/chat/completions", json=question.body)
        async with http.stream("POST", "/v1/chat/completions", json=question.body) as response:
            if response.status_code != 200:
                seen.errors[f"status {response.status_code}"] += 1
                return
            async for line in response.aiter_lines():
                if not line:
                    continue
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    done = True
                    continue
                event = json.loads(data)
                events += 1
                if "error" in event:
                    seen.errors[event["error"]["message"]] += 1
                    return
                usage = event.get("usage") or usage
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    now = time.perf_counter()
                    (seen.gaps_s if said else seen.first_s).append(now - (last if said else begun))
                    said, last = said + piece, now
                if events == killed_after:
                    seen.killed += 1
                    return
    except TimeoutError:
        seen.killed += 1
        return
    except httpx2.HTTPError as error:
        seen.errors[type(error).__name__] += 1
        return
    if done and said == question.answer and usage.get("completion_tokens") == question.tokens:
        seen.answers += 1
        seen.tokens += question.tokens
    else:
        seen.wrong.append(
            f"asked {question.body['messages'][0]['content']!r} of {question.body['model']}, got {said!r} for {question.answer!r}"
        )


async def metrics(http: Any) -> dict[str, float]:
    """Every line of /metrics that is a number."""
    lines = (await http.get("/metrics")).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


async def until_free(url: str) -> tuple[bool, dict[str, float]]:
    """Whether all rows became free, and the metrics then."""
    import httpx2

    async with httpx2.AsyncClient(base_url=url, timeout=30) as http:
        until = time.perf_counter() + FREE_SECONDS
        while True:
            now = await metrics(http)
            if now["pantheraml_rows_busy"] == 0 == now["pantheraml_queue_length"]:
                return True, now
            if time.perf_counter() > until:
                return False, now
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
