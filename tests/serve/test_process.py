"""`pantheraml serve` as a process: it says where it is, and ends as it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from pantheraml import cli


@contextmanager
def process(folder: Path, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it listens."""
    command = [sys.executable, "-m", "pantheraml", "serve", str(folder), "--dtype", "float32", "--rows", "2", "--port", "0", *words]
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=told)
    try:
        assert running.stderr is not None
        said = []
        for line in running.stderr:
            said.append(line)
            if line.startswith("listening on "):
                break
        else:
            pytest.fail("".join(said))
        yield running, line.split()[2].removesuffix(",").removesuffix("/v1")
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
def test_it_ends_when_it_is_told_and_finishes_what_it_has_begun(folders: Path) -> None:
    with process(folders / "endless", "--grace", "0.5") as (running, url), httpx2.Client(timeout=60) as client:
        asked = {"model": "endless", "prompt": ["a", "b"], "n": 8, "temperature": 0, "max_tokens": 500, "stream": True}
        with client.stream("POST", f"{url}/v1/completions", json=asked) as response:  # more than is done in half a second
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        # Those in work end as they are; those that had no row yet say why, and that ends the stream.
        last = json.loads(events[-1]) if events[-1] != "[DONE]" else json.loads(events[-2])
        assert "shutting down" in last["error"]["message"] if "error" in last else last["choices"][0]["finish_reason"] == "length"
        assert running.wait(60) == 0
        with pytest.raises(httpx2.ConnectError):
            client.get(f"{url}/health")
        assert running.stderr is not None and running.stderr.read().splitlines()[-1] == "ended"


@pytest.mark.slow
def test_the_key_comes_from_the_environment_and_is_never_said(folders: Path) -> None:
    key = "this-is-the-key-of-the-test"
    words = ("--host", "0.0.0.0", "--api-key-env", "SERVE_KEY", "--adapter", f"lawyer={folders / 'lawyer'}", "--name", "house")
    with process(folders / "model", *words, SERVE_KEY=key) as (running, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        models = httpx2.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        assert [model["id"] for model in models] == ["house", "lawyer"]
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 0 and key not in out + err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "open to everybody who reaches 0.0.0.0"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE holds no API key"),
        (["--adapter", "lawyer"], "is not NAME=PATH"),
        (["--port", "0"], "there is no model folder"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first three before a model is looked for."""
    monkeypatch.setattr(sys, "argv", ["pantheraml", "serve", "a/model/that/is/not/there", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err and "fix:" in err


@pytest.mark.parametrize("absent", ["fastapi", "uvicorn"])
def test_without_the_extra_it_says_how_to_get_it(absent: str) -> None:
    code = "import sys; sys.modules[sys.argv[1]] = None; sys.argv[:] = ['pantheraml', 'serve', 'tiny:llama']; from pantheraml.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, absent], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert f"{absent} is not installed" in done.stderr and "pip install pantheraml[serve]" in done.stderr
