"""The launcher, with small programs in the place of training: what it starts, hears, ends, starts again, and says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.fakes import h100s, laptop
from tests.tiny import chats, losses, written

from pantheraml.distributed import job
from pantheraml.distributed.launch import count_processes, launch, wanted_processes
from pantheraml.errors import DeviceError, RecipeError, StorageError
from pantheraml.recipe.load import load_recipe
from pantheraml.recipe.types import HardwareAsk

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from pantheraml.distributed.heartbeat import attend, open_heartbeat

attend()
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
(here / f"pid-{rank}").write_text(str(os.getpid()))

def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.02)

def say(name, text=""):
    (here / (name + ".part")).write_text(text)
    (here / (name + ".part")).rename(here / name)
"""


@pytest.fixture(autouse=True)
def nobody_has_launched_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PANTHERAML_LOGS", "PANTHERAML_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)


class Place:
    """A folder with a program in it, and what the launcher said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs, self.said = folder, folder / "run" / "logs", list[str]()

    def program(self, text: str) -> list[str]:
        path = self.folder / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(text))
        return [sys.executable, str(path), str(self.folder)]

    def launched(self, text: str, *, processes: int = 2, restarts: int = 0, hang_s: float = 60.0) -> int:
        return launch(
            self.program(text),
            processes=processes,
            folder=self.logs,
            restarts=restarts,
            hang_s=hang_s,
            announce=self.said.append,
            environment=os.environ,
        )

    def log(self, rank: int) -> str:
        return (self.logs / f"rank-{rank:05}.log").read_text()

    def gone(self, rank: int) -> bool:
        try:
            return psutil.Process(int((self.folder / f"pid-{rank}").read_text())).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def until(true: Callable[[], object]) -> None:
    """It becomes true, or the test runs into its time limit."""
    while not true():
        time.sleep(0.02)


def test_each_process_knows_who_it_is_and_only_the_first_one_is_seen(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    code = place.launched(
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        print("out", *(os.environ[name] for name in names), os.environ["MASTER_PORT"].isdecimal(), sys.stdin.read())
        print("err", rank, file=sys.stderr)
        """,
        processes=3,
    )
    assert code == 0
    seen = capfd.readouterr()
    assert "out 0 0 3 3 127.0.0.1 True" in seen.out and "err 0" in seen.err
    for rank in (1, 2):
        assert f"out {rank} {rank} 3 3 127.0.0.1 True" in place.log(rank) and f"err {rank}" in place.log(rank)
        assert f"err {rank}" not in seen.err
    assert place.said == [f"Starting 3 processes; what all but the first print is kept in {place.logs}/rank-*.log."]
    assert sorted(path.name for path in place.logs.iterdir()) == ["rank-00000.log", "rank-00001.log", "rank-00002.log"]


def test_one_that_is_killed_ends_the_others_and_is_named_with_its_last_lines(place: Place) -> None:
    with pytest.raises(DeviceError) as ended:
        place.launched("""
            def waiting_for_the_other():
                say("waiting")
                time.sleep(3600)

            if rank == 1:
                wait_for("waiting")
                print("at step 17")
                os.kill(os.getpid(), signal.SIGKILL)
            waiting_for_the_other()
        """)
    said = str(ended.value)
    assert "process 1 of 2 ended with SIGKILL" in said and "at step 17" in said and str(place.logs / "rank-00001.log") in said
    assert "memory runs out" in said and "--resume" in said
    assert place.gone(0)
    assert "waiting_for_the_other" in place.log(0)  # where it was when it was ended


def test_a_traceback_is_quoted(place: Place) -> None:
    with pytest.raises(DeviceError) as ended:
        place.launched("""
            if rank == 1:
                raise ValueError("of all things")
            time.sleep(3600)
        """)
    assert "process 1 of 2 ended with exit code 1" in str(ended.value) and "ValueError: of all things" in str(ended.value)


@pytest.mark.parametrize(
    ("first", "last", "code"),
    [
        ("sys.exit(76)", "sys.exit(4)", 4),  # it only heard of the other one
        ("sys.exit(1)", "sys.exit(3)", 3),  # its connection broke when the other one ended
        ("sys.exit(76)", "sys.exit(76)", 4),
    ],
)
def test_the_code_of_who_is_to_blame_is_passed_on(place: Place, first: str, last: str, code: int) -> None:
    found = place.launched(f"""
        if rank == 0:
            say("gone")
            {first}
        wait_for("gone")
        time.sleep(0.2)
        print("error: torn")
        {last}
    """)
    assert found == code
    if "76" not in last:
        assert f"process 1 of 2 ended with exit code {code}." in place.said[-1] and "error: torn" in place.said[-1]


def test_what_the_first_one_has_explained_is_not_repeated(place: Place) -> None:
    assert place.launched("wait_for('pid-1')\nsys.exit(6) if rank == 0 else time.sleep(3600)") == 6
    assert len(place.said) == 1 and place.gone(1)


def driver(place: Place, text: str) -> subprocess.Popen[str]:
    """The launcher as a process of its own, which can be sent signals."""
    words = place.program(text)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom pantheraml.distributed.launch import launch\n"
        f"code = launch({words!r}, processes=2, folder=Path({str(place.logs)!r}), restarts=3, hang_s=60, announce=print, "
        "environment=os.environ)\nsys.exit(code)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_request_to_stop_reaches_all_and_is_waited_for(place: Place, number: signal.Signals, code: int) -> None:
    launcher = driver(
        place,
        f"""
        def stop(number, frame):
            time.sleep(0.5)
            print("saved", flush=True)
            sys.exit({code})
        signal.signal({int(number)}, stop)
        say(f"ready-{{rank}}")
        while True:
            time.sleep(0.1)
        """,
    )
    until(lambda: (place.folder / "ready-0").exists() and (place.folder / "ready-1").exists())
    launcher.send_signal(number)
    printed, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == code, printed
    assert "saved" in printed and "saved" in place.log(1) and "started again" not in printed


def test_a_request_before_anybody_listens_ends_all(place: Place) -> None:
    launcher = driver(place, "say(f'ready-{rank}')\ntime.sleep(3600)")
    until(lambda: (place.folder / "ready-0").exists() and (place.folder / "ready-1").exists())
    launcher.send_signal(signal.SIGTERM)
    printed, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM, printed


def test_the_processes_end_when_the_launcher_is_killed(place: Place) -> None:
    launcher = driver(place, "say(f'ready-{rank}')\ntime.sleep(3600)")
    until(lambda: (place.folder / "ready-0").exists() and (place.folder / "ready-1").exists())
    launcher.kill()
    launcher.communicate(timeout=60)
    until(lambda: place.gone(0) and place.gone(1))


def test_a_crash_starts_all_again_with_resume_said_once(place: Place) -> None:
    code = place.launched(
        """
        attempt = len(list(here.glob(f"words-{rank}-*")))
        say(f"words-{rank}-{attempt}", " ".join([*sys.argv[2:], os.environ["MASTER_PORT"]]))
        if attempt < 2 and rank == attempt:
            wait_for(f"words-{1 - rank}-{attempt}")
            os.kill(os.getpid(), signal.SIGSEGV)
        elif attempt < 2:
            time.sleep(3600)
        """,
        restarts=5,
    )
    assert code == 0
    words = [[(place.folder / f"words-{rank}-{attempt}").read_text().split() for attempt in range(3)] for rank in range(2)]
    assert words[0] == words[1]
    assert [said[:-1] for said in words[0]] == [[], ["--resume"], ["--resume"]]
    assert "process 0 of 2 ended with SIGSEGV." in place.said[1] and "started again from the last checkpoint (1 of 5)" in place.said[1]
    assert "process 1 of 2 ended with SIGSEGV." in place.said[2] and "(2 of 5)" in place.said[2] and len(place.said) == 3


def test_restarts_come_to_an_end(place: Place) -> None:
    with pytest.raises(DeviceError, match="process 1 of 2 ended with exit code 9"):
        place.launched("say(f'{rank}-{time.time()}')\nsys.exit(9) if rank else time.sleep(3600)", restarts=1)
    assert len(list(place.folder.glob("1-*"))) == 2


@pytest.mark.parametrize("code", [2, 3, 5, 6])
def test_a_mistake_is_not_tried_again(place: Place, code: int) -> None:
    assert place.launched(f"say(f'{{rank}}-{{time.time()}}')\nsys.exit({code}) if rank else time.sleep(3600)", restarts=3) == code
    assert len(list(place.folder.glob("1-*"))) == 1


def test_a_hang_is_seen_and_the_stacks_of_all_are_kept(place: Place) -> None:
    with pytest.raises(DeviceError) as ended:
        place.launched(
            """
            def stuck_in_the_third_step():
                time.sleep(3600)

            def waiting_for_the_other():
                time.sleep(3600)

            with open_heartbeat() as heart:
                for step in range(3):
                    heart.beat()
                if rank == 1:
                    say("stuck")
                    stuck_in_the_third_step()
                wait_for("stuck")
                heart.beat()
                waiting_for_the_other()
            """,
            hang_s=1.0,
        )
    said = str(ended.value)
    assert "process 1 of 2 gave no sign of life for 1 s" in said
    assert "process 0 after 4, process 1 after 3" in said and f"{place.logs}/rank-*.log" in said and "hardware.timeout_s" in said
    assert "waiting_for_the_other" in place.log(0) and "stuck_in_the_third_step" in place.log(1)
    assert place.gone(0) and place.gone(1)


def test_no_sign_of_life_is_expected_before_the_first_and_while_one_rests(place: Place) -> None:
    code = place.launched(
        """
        time.sleep(1.5)
        with open_heartbeat() as heart:
            heart.beat()
            heart.rest()
            time.sleep(2.5)
            heart.beat()
        time.sleep(1.5)
        """,
        hang_s=1.0,
    )
    assert code == 0


def test_one_that_does_not_end_is_ended_by_force_with_its_children(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "GRACE_S", 0.3)
    with pytest.raises(DeviceError, match="process 0 of 2 ended with exit code 1"):
        place.launched("""
            if rank == 1:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                import subprocess
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
                say("pid-2", str(child.pid))
                time.sleep(3600)
            wait_for("pid-2")
            sys.exit(1)
        """)
    assert place.gone(1)
    until(lambda: place.gone(2))


def test_a_program_that_a_process_starts_is_not_taken_for_one(place: Place) -> None:
    """It has the variables, and must neither hold the launcher's pipe nor read from another one."""
    code = place.launched("""
        import subprocess
        program = "from pantheraml.distributed.heartbeat import attend; import threading; attend(); print(threading.active_count())"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout == "1\\n", done
    """)
    assert code == 0


def test_a_folder_that_cannot_be_written_is_said(place: Place) -> None:
    place.logs.parent.mkdir()
    place.logs.write_text("a file")
    with pytest.raises(StorageError, match="logs cannot be made"):
        place.launched("")


def test_a_command_that_cannot_be_started_is_said(place: Place) -> None:
    with pytest.raises(DeviceError, match="process 0 of 2 could not be started"):
        launch(["/no/such/program"], processes=2, folder=place.logs, restarts=0, hang_s=1, announce=print, environment={})


# ---- How many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "many"),
    [
        ({}, 1),
        ({"devices": 3}, 3),
        ({"devices": "all"}, 8),
        ({"dp": 2, "tp": 2}, 4),
        ({"devices": 2, "kind": "cpu"}, 2),
        ({"devices": "all", "kind": "cpu"}, 1),
    ],
    ids=str,
)
def test_one_process_for_each_device_that_is_asked_for(ask: dict[str, object], many: int) -> None:
    assert wanted_processes(HardwareAsk.model_validate(ask), h100s(8)) == many


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(DeviceError, match="9 devices were asked for, and 8 of kind cuda answered"):
        wanted_processes(HardwareAsk(devices=9), h100s(8))
    with pytest.raises(RecipeError, match="devices"):
        wanted_processes(HardwareAsk(devices=4, dp=3), h100s(8))


def test_who_was_launched_launches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert wanted_processes(HardwareAsk(devices=3), h100s(8)) == 1
    assert count_processes(HardwareAsk(devices=3, kind="cpu")) == 1


def test_counting_here_needs_no_device_where_the_recipe_says_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be looked for")

    monkeypatch.setattr(subprocess, "run", refuse)
    asks = [HardwareAsk(), HardwareAsk(devices=1), HardwareAsk(devices=8, kind="tpu"), HardwareAsk(kind="cpu", devices="all")]
    assert [count_processes(ask) for ask in asks] == [1, 1, 1, 1]
    assert [count_processes(HardwareAsk(kind="cpu", devices=3)), count_processes(HardwareAsk(kind="cpu", dp=2, tp=2))] == [3, 4]


def test_counting_here_asks_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "cpu:0")
    assert count_processes(HardwareAsk(kind="auto", devices=2)) == 2  # said in the recipe: the environment is silent
    assert count_processes(HardwareAsk(kind="auto", devices=2, dp=3)) == 1  # the run says what is wrong
    assert wanted_processes(HardwareAsk(devices=2, kind="cpu"), laptop()) == 2


# ---- A whole run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_two_processes_goes_on_when_one_is_killed(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", chats(40))
    words = f"tiny:llama {rows} run.folder={tmp_path / 'runs'} run.save_every=2 run.log_every=1 batch.size=4 optim.steps=40 adapter.rank=4"
    words += " model.dtype=float32 eval.generate_rows=0 eval.every=40 hardware.kind=cpu hardware.threads=1 hardware.devices=2"
    command = [sys.executable, "-m", "pantheraml", "train", *words.split(), "hardware.restarts=2"]
    environment = {**os.environ, "PANTHERAML_CACHE": str(tmp_path / "cache")}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "runs" / "llama-rows"
    until(lambda: launcher.poll() is not None or list(run.glob("checkpoints/step-*")))
    children = {each.environ().get("RANK"): each for each in psutil.Process(launcher.pid).children()}
    children["1"].kill()
    printed, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, printed
    assert "process 1 of 2 ended with SIGKILL" in printed and "started again from the last checkpoint (1 of 2)" in printed
    assert "Going on after step" in printed and (run / "report.md").exists()
    assert "Process 1 of 2" in (run / "logs" / "rank-00001.log").read_text()
    assert len(losses(run)) >= 40 and load_recipe(run / "recipe.yaml").run.name == "llama-rows"
    assert not list((tmp_path / "runs").glob("llama-rows-*"))
