"""Every block of README and docs is run, or read as what it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer.main

from pantheraml import cli
from pantheraml.data.load import Row, detect_format, normalize
from pantheraml.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUESTIONS = ("France Paris", "Italy Rome", "Norway Oslo", "Peru Lima", "Egypt Cairo", "India Delhi", "Japan Tokyo", "Cuba Havana")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as a reader of the page has it."""
    rows = [
        {"messages": [{"role": "user", "content": f"What is the capital of {land}? ({n})"}, {"role": "assistant", "content": town}]}
        for n in range(5)
        for land, town in (each.split() for each in QUESTIONS)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and everything that a `pantheraml` command prints."""
    words = shlex.split(command, comments=True)
    assert words[0] == "pantheraml", command
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# The page on TPUs is run by tests/xla, in a process of its own.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "tpu.md"], ids=named)
def test_every_block_of_the_page_works(page, folder, monkeypatch, capsys):
    check_page(page, monkeypatch, capsys)


def check_page(page, monkeypatch, capsys):
    with ExitStack() as until_the_end:
        check_blocks(page, monkeypatch, capsys, until_the_end)


def check_blocks(page, monkeypatch, capsys, until_the_end: ExitStack) -> None:
    port = free_port()  # in place of the usual one, where somebody else may listen
    for language, text in BLOCK.findall(page.read_text("utf-8")):
        text = text.replace(":8000", f":{port}")
        match language:
            case "sh":
                for line in text.splitlines():
                    if line.endswith(" &"):
                        until_the_end.callback(end, start(line.removesuffix(" &"), port))
                    elif line.startswith("curl "):
                        if shutil.which("curl"):
                            subprocess.run([*shlex.split(line), "--fail"], check=True, timeout=60, stdout=subprocess.DEVNULL)
                    elif line.startswith("sh scripts/"):  # run by .ci/run
                        name = line.split()[1]
                        assert (ROOT / name).is_file() and name.removeprefix("scripts/") in (ROOT / ".ci" / "run").read_text()
                    else:
                        code, said = run(line, monkeypatch, capsys)
                        assert code == 0, f"{line}\n{said}"
            case "shell":  # for other machines
                for line in text.splitlines():
                    check_command(line, monkeypatch, capsys)
            case "hosts":  # run by tests/xla/test_hosts.py and tests/distributed/test_two_hosts.py
                assert page.name in ("tpu.md", "distributed.md")
            case "bash" | "yml" | "py":  # for schedulers; tried by tests/distributed/test_templates.py
                assert page.name == "distributed.md"
            case "console":
                command, _, expected = text.removeprefix("$ ").partition("\n")
                code, said = run(command, monkeypatch, capsys)
                assert code != 0
                assert expected.strip() in said
            case "python":
                exec(compile(text, str(page), "exec"), {"__name__": "page"})
            case "jsonl":
                rows = [Row(json.loads(line), page.name, n) for n, line in enumerate(text.splitlines(), 1)]
                for row in rows:
                    normalize(row, detect_format(rows).format)
            case "yaml":
                Path("recipe.yaml").write_text(text)
                assert load_recipe(Path("recipe.yaml")).model.name
            case "text":  # pictures of the house, layouts of bytes; nothing to run
                assert page.name in ("architecture.md", "nbmf.md")
            case _:
                pytest.fail(f"{page.name}: a block of {language or 'nothing'} is run by nobody")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def start(command: str, port: int) -> subprocess.Popen[str]:
    """A service in the background, once it listens."""
    words = [sys.executable, "-m", *shlex.split(command), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("listening on "):
            return process
    process.wait()
    raise AssertionError("".join(said))


def end(process: subprocess.Popen[str]) -> None:
    """It ends when it is told, without an error."""
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0


def check_command(line: str, monkeypatch, capsys) -> None:
    """As far as it can be tried here: what is installed is there to be installed, and what is trained can be planned."""
    words = shlex.split(line)
    match words[0]:
        case "gcloud":
            for inner in (word.removeprefix("--command=") for word in words if word.startswith("--command=")):
                check_command(inner, monkeypatch, capsys)
        case "pip":
            asked = re.fullmatch(r"pantheraml\[(\w+)\]", words[-1])
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert words[1] == "install" and asked and asked[1] in extras
        case "pantheraml" if words[1] == "train":
            given = [word for word in words[2:] if not word.startswith("--")]
            code, said = run(shlex.join(["pantheraml", "plan", *given, "hardware.simulate_tpu=true"]), monkeypatch, capsys)
            assert code == 0, f"{line}\n{said}"
        case "pantheraml" if words[1] == "serve":  # it would not end, and the runs are not here
            typer.main.get_command(cli.app).commands["serve"].make_context("serve", words[2:])  # pyright: ignore[reportAttributeAccessIssue]
        case _:
            code, said = run(line, monkeypatch, capsys)
            assert code == 0, f"{line}\n{said}"


def test_the_plan_of_the_house_shows_the_floors_that_are_enforced():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (floors,) = (each["layers"] for each in contracts if each["type"] == "layers")
    pictures = [text for language, text in BLOCK.findall((ROOT / "docs" / "architecture.md").read_text("utf-8")) if language == "text"]
    assert pictures[0].splitlines() == floors


def test_the_plan_of_the_house_names_every_room():
    plan = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = [
        path.name + ("/" if path.is_dir() else "") for path in (ROOT / "src" / "pantheraml").iterdir() if not path.name.startswith("_")
    ]
    assert not [room for room in rooms if room != "py.typed" and f"\n{room}" not in plan]


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
