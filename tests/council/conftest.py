from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from pantheraml.council import Endpoint, Local, Persona
from pantheraml.models.tiny import tiny_config, tiny_tokenizer


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return tiny_tokenizer()


def tiny_model(**sizes: Any) -> Any:
    """A Llama of two layers whose random logits differ from each other."""
    from transformers import AutoModelForCausalLM

    given = {"num_hidden_layers": 2, "initializer_range": 0.1, "max_position_embeddings": 2048, **sizes}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config("llama", **given)).eval()


@pytest.fixture(scope="package")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def local(model: Any, tokenizer: Any) -> Local:
    return Local.of(model, tokenizer, "tiny", rows=8, tokens=1024)


@dataclass
class Service:
    """A service that answers as it is told, and keeps what it was asked."""

    say: Callable[[dict[str, Any]], Any] = lambda body: "Answer: 42"
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def persona(self, name: str = "afar", **more: Any) -> Persona:
        endpoint = Endpoint(url=self.url, model="there", timeout_s=more.pop("timeout_s", 10.0), key_env=more.pop("key_env", None))
        return Persona(name=name, prompt="Think.", endpoint=endpoint, **more)


@dataclass
class Said:
    """A response with more than a text."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])


def completion(text: str, tokens: Sequence[tuple[str, float]] = ()) -> dict[str, Any]:
    content = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    return {
        "choices": [
            {
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": {"content": content} if tokens else None,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": len(tokens) or 5},
    }


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A real HTTP server of the standard library, on loopback."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    made = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.bodies.append(body)
            made.headers.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            answer = made.say(body)
            said = answer if isinstance(answer, Said) else Said(completion(answer))
            data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            self.send_response(said.status)
            for name, value in {"Content-Length": str(len(data)), **said.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()
