from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from openai import OpenAI

from pantheraml.models.adapters import attach
from pantheraml.models.tiny import tiny_config, tiny_tokenizer
from pantheraml.recipe.types import LoRA
from pantheraml.serve import Limits, Service, open_service
from pantheraml.serve.server import Server, bind, check_reach

ADAPTERS = ("lawyer", "doctor")


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Products this small gain nothing from threads, which only wait for each other where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`: a Llama of two layers with large random weights, so that its answers differ; an adapter of that name for each of ADAPTERS;
    and `endless`: the same, but what ends a greedy answer is never the likeliest token.
    """
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("served")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = tiny_config("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=128, initializer_range=0.1)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / "model")
        tiny_tokenizer().save_pretrained(root / "model")
        for i, name in enumerate(ADAPTERS):
            tuned = attach(model, LoRA(rank=4), seed=i)
            for key, weight in tuned.named_parameters():
                if ".lora_B." in key:
                    torch.nn.init.normal_(weight, std=0.3)
            tuned.save_pretrained(root / name)
            model = tuned.unload()
        with torch.no_grad():
            model.lm_head.weight[2] = 0
        model.save_pretrained(root / "endless")
        tiny_tokenizer().save_pretrained(root / "endless")
    return root


class Running:
    """A service that answers on a port of this machine."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.url = service, f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=service.key or "none", max_retries=0, timeout=60)
        self.http = httpx2.Client(
            base_url=self.url, timeout=60, headers={} if service.key is None else {"Authorization": f"Bearer {service.key}"}
        )
        self.port = port

    def metric(self, name: str) -> float:
        """As /metrics says it; 0 for one that was not counted yet."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)

    def post(self, path: str, **body: Any) -> Any:
        """The response to a request, whatever it is."""
        return self.http.post(path, json=body)


@contextmanager
def running(folder: Path, **how: Any) -> Iterator[Running]:
    """Serve from a thread of this process until the block ends."""
    key = how.get("key")
    service = open_service(str(folder), **{"dtype": "float32", "hosts": check_reach("127.0.0.1", key), **how})
    listening = bind("127.0.0.1", 0)
    server = Server(service, listening)
    thread = threading.Thread(target=server.run_here)
    thread.start()
    here = Running(service, listening.getsockname()[1])
    try:
        eventually(lambda: server.started)
        yield here
    finally:
        here.client.close()
        here.http.close()
        server.should_exit = True
        thread.join(60)
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(folders: Path) -> Iterator[Running]:
    """The model and both adapters, in four rows."""
    with running(folders / "model", adapters={name: folders / name for name in ADAPTERS}, rows=4, limits=Limits(grace_seconds=5)) as here:
        yield here


def eventually(what: Callable[[], Any], seconds: float = 60) -> Any:
    """Waits until something is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.01)
    return found


@contextmanager
def slowly(here: Running, seconds: float = 0.02) -> Iterator[None]:
    """Every step takes longer, so that answers are still in work when a test comes to look."""
    rows: Any = here.service.engine.batcher._rows
    read = rows.read

    def late(*given: Any) -> Any:
        time.sleep(seconds)
        return read(*given)

    rows.read = late
    try:
        yield
    finally:
        rows.read = read


def raw(port: int) -> socket.socket:
    """A connection without manners."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)
