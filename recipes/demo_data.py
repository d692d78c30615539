"""Write the data of the demo: chats in JSONL, the same ones every time.

    python recipes/demo_data.py FOLDER

FOLDER/base.jsonl   four simple tasks, for a model that is trained from nothing
FOLDER/train.jsonl  the new task: an order in plain words, to be answered as JSON
FOLDER/test.jsonl   the same task with other orders; no order stands in both
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

BASE_ROWS, TRAIN_ROWS, TEST_ROWS = 12000, 4000, 100
NAMES = "Anna Bert Carla David Elena Felix Grace Henry Irene Jonas Karin Leo Maria Nils Olga Paul Quinn Rosa Simon Tara Ugo Vera".split()
CITIES = "Oslo Rome Paris Lima Cairo Delhi Tokyo Quito Berlin Madrid Vienna Dublin Athens Hanoi Sofia Kyoto".split()
ITEMS = "lamp chair table book pen cup plate clock mirror shelf rug vase sofa desk kettle jar".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ORDERS = (
    "{name} from {city} orders a {item} for {day}.",
    "Please send a {item} to {name} in {city} on {day}.",
    "On {day}: one {item} for {name}, {city}.",
    "In {city}, {name} wants a {item} by {day}.",
)


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """One row in the format `messages`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def facts(draw: random.Random) -> dict[str, str]:
    """Who, where, what and when."""
    return {"name": draw.choice(NAMES), "city": draw.choice(CITIES), "item": draw.choice(ITEMS), "day": draw.choice(DAYS)}


def base_task(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """Repeat, pick out, or rewrite: the skills that the new task is made of, never in its form."""
    fact = facts(draw)
    order = draw.choice(ORDERS).format(**fact)
    words = [draw.choice((*NAMES, *CITIES, *ITEMS, *DAYS)) for _ in range(draw.randint(2, 4))]
    match draw.randrange(4):
        case 0:
            return chat(f"Repeat: {' '.join(words)}", " ".join(words))
        case 1:
            return chat(f"Quote: {' '.join(words)}", "{" + ", ".join(f'"{word}"' for word in words) + "}")
        case 2:
            key, asked = draw.choice((("name", "Who?"), ("city", "Where?"), ("item", "What?"), ("day", "When?")))
            return chat(f"{order} {asked}", fact[key])
        case _:
            return chat(f"Sum up: {order}", "{day}: {item} to {name} ({city})".format(**fact))


def order_task(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """An order in words, and the same as JSON."""
    fact = facts(draw)
    return chat(f"To JSON: {draw.choice(ORDERS).format(**fact)}", json.dumps(fact))


def write(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    """All three files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    write(folder / "base.jsonl", [base_task(draw) for _ in range(BASE_ROWS)])
    orders = list({json.dumps(row): row for row in (order_task(draw) for _ in range(2 * (TRAIN_ROWS + TEST_ROWS)))}.values())
    write(folder / "train.jsonl", orders[:TRAIN_ROWS])
    write(folder / "test.jsonl", orders[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
