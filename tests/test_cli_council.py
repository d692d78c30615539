"""`pantheraml council`, from the words of the command line to what is printed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.council.conftest import Service, service

from pantheraml import cli
from pantheraml.council import Calibration, Transcript
from pantheraml.hardware.cpu import CpuBackend

__all__ = ["service"]  # pytest finds the fixture here
KEY = "sk-secret-of-the-test"
set_threads = CpuBackend.set_threads


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """(exit code, standard output, standard error) of `pantheraml council ...`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # A model this small gains nothing from more threads, which would only wait for each other where the cores are busy.
    monkeypatch.setattr(CpuBackend, "set_threads", lambda self, threads: set_threads(self, threads or 1))

    def made(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pantheraml", "council", *words])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return made


def personas(service: Service, key_env: str | None = None) -> str:
    key = f", key_env: {key_env}" if key_env else ""
    there = f"endpoint: {{url: '{service.url}', model: m{key}}}"
    Path("who.yaml").write_text(f"- {{name: a, prompt: p, {there}}}\n- {{name: b, prompt: q, {there}}}\n")
    return "who.yaml"


def test_a_local_model_is_asked_and_the_debate_is_kept_found_and_shown(run) -> None:
    words = ["--model", "tiny:llama", "--max-new-tokens", "12", "--memory", "debates", "--samples", "1", "--extract"]
    code, out, err = run("ask", "Is 91 a prime number?", *words, "--out", "t.json")
    assert code == 0, err
    assert "Verdict: " in out and "Confidence: " in out and "Quorum: " in out and "12 new tokens" not in out
    assert "round 0" in err and "[sceptic] " in err and "asking again" in err
    transcript = Transcript.from_dict(json.loads(Path("t.json").read_text()))
    assert len(transcript.turns) == 10 and transcript.work is not None and transcript.work.device is not None
    assert transcript.work.rows == 5, "as many as advisors and their samples"
    assert f"Kept: {transcript.key}" in out
    code, found, _ = run("search", "prime number", "--memory", "debates")
    assert code == 0 and transcript.key in found
    code, found, _ = run("search", "prime number", "--memory", "debates", "--json")
    assert json.loads(found)[0]["key"] == transcript.key
    code, shown, _ = run("show", transcript.key, "--memory", "debates")
    assert code == 0 and "[analyst] " in shown and "Round 1" in shown
    code, shown, _ = run("show", transcript.key, "--memory", "debates", "--json")
    assert Transcript.from_dict(json.loads(shown)) == transcript
    code, out, err = run("ask", "Is 97 a prime number?", *words, "--json")
    assert code == 0 and "recalled: Is 91 a prime number?" in err
    assert Transcript.from_dict(json.loads(out)).recalled[0].key == transcript.key


def test_services_answer_with_the_key_of_the_environment(run, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("ask", "Why?", "--personas", personas(service, "COUNCIL_TEST_KEY"))
    assert code == 2 and "the variable COUNCIL_TEST_KEY is not set" in err and service.bodies == []
    monkeypatch.setenv("COUNCIL_TEST_KEY", KEY)
    service.say = lambda body: "Because.\x1b[31m\nAnswer: 42"
    code, out, err = run("ask", "Why?", "--personas", "who.yaml", "--quorum", "unanimous", "--memory", "debates")
    assert code == 0, err
    assert "Verdict: 42" in out and "unanimous takes all" in out and "Ended: all agreed" in out
    assert service.headers[0]["authorization"] == f"Bearer {KEY}" and KEY not in out + err
    assert "\x1b" not in out + err, "a service does not speak to the terminal"
    assert all(KEY.encode() not in file.read_bytes() for file in Path("debates").rglob("*") if file.is_file())


def test_personas_are_listed(run, service: Service) -> None:
    code, out, _ = run("personas")
    assert code == 0 and all(name in out for name in ("analyst", "sceptic", "practitioner", "historian", "advocate"))
    code, out, _ = run("personas", personas(service), "--json")
    assert [each["name"] for each in json.loads(out)] == ["a", "b"]


def test_a_calibration_is_learned_and_used(run, service: Service) -> None:
    drawn = random.Random(0)
    rows = [(confidence := drawn.random(), drawn.random() < confidence**2) for _ in range(400)]
    Path("pairs.jsonl").write_text("".join(json.dumps({"confidence": c, "right": r}) + "\n" for c, r in rows))
    code, out, err = run("calibrate", "pairs.jsonl")
    assert code == 0, err
    found = Calibration.load(Path("calibration.json"))
    assert f"expected calibration error {found.after.ece:.3f}" in out and found.after.ece < found.before.ece
    code, out, _ = run("ask", "Why?", "--personas", personas(service), "--samples", "3", "--calibration", "calibration.json")
    assert code == 0 and ", calibrated from 0.80 (platt, 400 known answers" in out
    assert f"Confidence: {found(0.8):.2f}" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["ask", "Why?"], 2, "nothing answers for analyst"),
        (["ask", " ", "--model", "tiny:llama"], 2, "a debate needs a question"),
        (["ask", "Why?", "--personas", "none.yaml"], 2, "none.yaml cannot be read"),
        (["ask", "Why?", "--model", "tiny:none"], 2, "no tiny model of the family"),
        (["ask", "Why?", "--out", "no/folder/x.json"], 6, "there is no folder"),
        (["ask", "Why?", "--calibration", "none.json"], 3, "is no calibration"),
        (["show", "none", "--memory", "nowhere"], 6, "nowhere"),
        (["calibrate", "none.jsonl"], 3, "cannot be read"),
    ],
)
def test_mistakes_are_answered_in_words(run, words: list[str], code: int, said: str) -> None:
    found, _, err = run(*words)
    assert found == code and said in err and "Traceback" not in err


def test_a_row_that_is_no_pair_is_named(run) -> None:
    Path("pairs.jsonl").write_text('{"confidence": 0.5, "right": true}\n{"confidence": 0.5, "right": 1}\n')
    code, _, err = run("calibrate", "pairs.jsonl")
    assert code == 3 and "pairs.jsonl, line 2" in err
