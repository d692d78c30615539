"""The launcher, with small programs in the place of training: what it starts, hears, ends, starts again, and says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests.fakes import h100s, laptop
from tests.tiny import chats, losses, tiny_recipe, written

from pantheraml.distributed import job
from pantheraml.distributed.crew import Crew, Elastic, count_crew, look, wanted_crew
from pantheraml.distributed.launch import launch
from pantheraml.errors import DeviceError, RecipeError, StorageError
from pantheraml.hardware.device import Inventory
from pantheraml.recipe.load import load_recipe
from pantheraml.recipe.types import HardwareAsk

PRELUDE = """
import json, os, signal, sys, time
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
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "PANTHERAML_DEVICES",
        "PANTHERAML_LOGS",
        "PANTHERAML_SIGNS",
        "PANTHERAML_LAUNCHER",
    ):
        monkeypatch.delenv(name, raising=False)


TWO = Crew(2)


class Place:
    """A folder with a program in it, and what the launcher said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs, self.said = folder, folder / "run" / "logs", list[str]()

    def program(self, text: str) -> list[str]:
        path = self.folder / "program.py"
        path.write_text(PRELUDE + textwrap.dedent(text))
        return [sys.executable, str(path), str(self.folder)]

    def launched(self, text: str, *, crew: Crew = TWO, elastic: Elastic | None = None, restarts: int = 0, hang_s: float = 60.0) -> int:
        return launch(
            self.program(text),
            crew=crew,
            elastic=elastic,
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
        crew=Crew(3),
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
        "import os, sys\nfrom pathlib import Path\nfrom pantheraml.distributed.crew import Crew\nfrom pantheraml.distributed.launch import launch\n"
        f"code = launch({words!r}, crew=Crew(2), folder=Path({str(place.logs)!r}), restarts=3, hang_s=60, announce=print, "
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


def test_the_same_started_once_more_leaves_the_signs_of_the_first_alone(place: Place) -> None:
    """Its folder is the same, and a run that is in use is refused by its first process: that must not end the run that uses it."""
    with job.Job(place.program("with open_heartbeat() as pulse: pulse.beat(); wait_for('over')"), 1, made(place.logs), os.environ) as first:
        until(lambda: first.pulses[0].path.exists() and first.pulses[0].path.read_bytes())
        again = [sys.executable, "-c", "import os, sys, time; sys.exit(6) if os.environ['RANK'] == '0' else time.sleep(60)"]
        with job.Job(again, 2, place.logs, os.environ) as second:
            assert second.watched(60.0, job.Asked()).code == 6
            assert job.lost_file(second.signs).exists() and not job.lost_file(first.signs).exists()
        assert first.pulses[0].path.read_bytes() == b"1"
        (place.folder / "over").touch()
        assert first.watched(60.0, job.Asked()).code == 0
    assert sorted(path.name for path in place.logs.iterdir()) == ["rank-00000.log", "rank-00001.log"]


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_folder_that_cannot_be_written_is_said(place: Place) -> None:
    place.logs.parent.mkdir()
    place.logs.write_text("a file")
    with pytest.raises(StorageError, match="logs cannot be made"):
        place.launched("")


def test_a_command_that_cannot_be_started_is_said(place: Place) -> None:
    with pytest.raises(DeviceError, match="process 0 of 2 could not be started"):
        launch(["/no/such/program"], crew=Crew(2), folder=place.logs, restarts=0, hang_s=1, announce=print, environment={})


# ---- How many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "crew"),
    [
        ({}, Crew(1, "cuda", (0,))),
        ({"index": 5}, Crew(1, "cuda", (5,))),
        ({"devices": 3}, Crew(3, "cuda", (0, 1, 2))),
        ({"devices": "all"}, Crew(8, "cuda", tuple(range(8)))),
        ({"dp": 2, "tp": 2}, Crew(4, "cuda", (0, 1, 2, 3))),
        ({"devices": 2, "kind": "cpu"}, Crew(2, "cpu")),
        ({"devices": "all", "kind": "cpu"}, Crew(1, "cpu")),
        ({"devices": 12, "min_devices": 6}, Crew(8, "cuda", tuple(range(8)))),
    ],
    ids=str,
)
def test_one_process_for_each_device_that_is_asked_for(ask: dict[str, object], crew: Crew) -> None:
    assert wanted_crew(HardwareAsk.model_validate(ask), h100s(8)) == crew


def lost(*indices: int) -> Inventory:
    """Eight GPUs, of which some do not answer."""
    here = h100s(8)
    return replace(here, devices=tuple(each for each in here.devices if each.kind == "cpu" or each.index not in indices))


def test_those_that_answer_are_taken_whatever_their_index() -> None:
    assert wanted_crew(HardwareAsk(devices="all"), lost(0, 5)) == Crew(6, "cuda", (1, 2, 3, 4, 6, 7))
    assert wanted_crew(HardwareAsk(devices=2), lost(0)) == Crew(2, "cuda", (1, 2))
    assert wanted_crew(HardwareAsk(devices="all"), lost(3), [0, 7]) == Crew(5, "cuda", (1, 2, 4, 5, 6))
    assert wanted_crew(HardwareAsk(devices="all"), h100s(2), [0]) == Crew(1, "cuda", (1,))
    assert wanted_crew(HardwareAsk(devices=4, kind="cpu", min_devices=1), laptop(), [2, 1]) == Crew(2, "cpu")


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(DeviceError, match="9 devices were asked for, and 8 of kind cuda answered"):
        wanted_crew(HardwareAsk(devices=9), h100s(8))
    with pytest.raises(RecipeError, match="devices"):
        wanted_crew(HardwareAsk(devices=4, dp=3), h100s(8))
    for devices in ("all", 12):
        with pytest.raises(DeviceError, match="at least 9 devices were asked for, and 8 of kind cuda answered") as refused:
            wanted_crew(HardwareAsk(devices=devices, min_devices=9), h100s(8))
        assert refused.value.fix == "set hardware.min_devices to 8"
    with pytest.raises(RecipeError, match="dp 4 does not come to 3 devices"):
        wanted_crew(HardwareAsk(devices=4, dp=4, min_devices=2), h100s(3))
    with pytest.raises(RecipeError, match=r"hardware\.min_devices=3 is more than hardware\.devices=2"):
        tiny_recipe(Path("runs"), hardware={"devices": 2, "min_devices": 3})


def test_who_was_launched_launches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert wanted_crew(HardwareAsk(devices=3), h100s(8)) == Crew(1)
    assert count_crew(HardwareAsk(devices=3, kind="cpu")) == Crew(1)


def test_counting_here_needs_no_device_where_the_recipe_says_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be looked for")

    monkeypatch.setattr(subprocess, "run", refuse)
    asks = [HardwareAsk(), HardwareAsk(devices=1), HardwareAsk(devices=8, kind="tpu"), HardwareAsk(kind="cpu", devices="all")]
    assert [count_crew(ask).size for ask in asks] == [1, 1, 1, 1]
    assert [count_crew(HardwareAsk(kind="cpu", devices=3)), count_crew(HardwareAsk(kind="cpu", dp=2, tp=2))] == [
        Crew(3, "cpu"),
        Crew(4, "cpu"),
    ]


def test_counting_here_asks_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "cpu:0")
    assert count_crew(HardwareAsk(kind="auto", devices=2)) == Crew(2, "cpu")  # said in the recipe: the environment is silent
    assert count_crew(HardwareAsk(kind="auto", devices=2, dp=3)) == Crew(1)  # the run says what is wrong
    with pytest.raises(RecipeError, match="dp 3 does not come to 2 devices") as refused:
        look(HardwareAsk(kind="auto", devices=2, dp=3))
    assert refused.value.why and refused.value.fix


@pytest.mark.parametrize(
    ("program", "what"),
    [("import os; os.abort()", "ended with SIGABRT"), ("import time; time.sleep(60)", "no answer within 1 s"), ("1 / 0", "exit code 1")],
)
def test_a_driver_that_breaks_while_it_is_asked_is_said(monkeypatch: pytest.MonkeyPatch, program: str, what: str) -> None:
    real = subprocess.run
    monkeypatch.setattr("pantheraml.distributed.crew._ANSWER_S", 1.0)
    monkeypatch.setattr(subprocess, "run", lambda words, **how: real([words[0], "-c", program], **how))
    with pytest.raises(DeviceError, match=f"the devices could not be counted.*{what}") as refused:
        look(HardwareAsk(devices="all"))
    assert "ZeroDivisionError" in refused.value.why or "1 / 0" not in program


# ---- With fewer --------------------------------------------------------------------------------------------------


def answering(monkeypatch: pytest.MonkeyPatch, *crews: tuple[int, ...]) -> list[list[int]]:
    """At each look other devices answer; the last ones from then on. What was to be left out at each."""
    asked: list[list[int]] = []

    def look(ask: HardwareAsk, left_out: list[int]) -> Crew:
        assert ask.kind == "cuda"  # the run does not go on on a CPU
        asked.append(list(left_out))
        here = replace(h100s(8), devices=tuple(each for each in h100s(8).devices if each.index in crews[min(len(asked), len(crews)) - 1]))
        return wanted_crew(ask, here, left_out)

    monkeypatch.setattr("pantheraml.distributed.crew.look", look)
    return asked


def ended_by(rank: int | None) -> job.End:
    return job.End(said=f"process {rank} ended", again=True, rank=rank)


def test_those_that_answer_then_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(4, "cuda", (0, 1, 2, 3))
    answering(monkeypatch, (0, 3), (0, 3), (0, 1, 2, 3), ())
    elastic = Elastic(HardwareAsk(devices="all"), crew, lambda: None)
    crew, said = elastic.after(ended_by(None), crew)
    assert crew == Crew(2, "cuda", (0, 3)) and said == " 2 of 4 devices answer; going on with 2."
    assert elastic.after(ended_by(None), crew) == (crew, "")
    crew, said = elastic.after(ended_by(None), crew)
    assert crew.size == 4 and said == " 4 of 4 devices answer; going on with 4."
    with pytest.raises(DeviceError, match=r"hardware\.kind=cuda"):
        elastic.after(ended_by(None), crew)


def test_fewer_than_the_recipe_allows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(4, "cuda", (0, 1, 2, 3))
    answering(monkeypatch, (0, 1, 3), (0, 3))
    elastic = Elastic(HardwareAsk(devices=4, min_devices=3), crew, lambda: None)
    crew, _ = elastic.after(ended_by(None), crew)
    assert crew.devices == (0, 1, 3)
    with pytest.raises(DeviceError, match="at least 3 devices were asked for, and 2 of kind cuda answered"):
        elastic.after(ended_by(None), crew)
    crew = Crew(4, "cuda", (0, 1, 2, 3))
    answering(monkeypatch, (0, 1, 3))
    with pytest.raises(RecipeError, match="dp 4 does not come to 3 devices"):
        Elastic(HardwareAsk(devices=4, dp=4, min_devices=3), crew, lambda: None).after(ended_by(None), crew)


def test_where_the_recipe_says_how_many_all_of_them_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, (0,))
    crew = Crew(4, "cuda", (0, 1, 2, 3))
    elastic = Elastic(HardwareAsk(devices=4), crew, lambda: None)
    assert [elastic.after(ended_by(1), crew) for _ in range(3)] == [(crew, "")] * 3 and not asked


def test_a_device_whose_process_ends_the_run_twice_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, (0, 1, 2, 3))
    crew, steps = Crew(4, "cuda", (0, 1, 2, 3)), [0]
    elastic = Elastic(HardwareAsk(devices="all"), crew, lambda: list(steps))
    for culprit in (1, None, 1, 2, 1):  # never twice in a row
        assert elastic.after(ended_by(culprit), crew) == (crew, "")
    steps.append(10)  # a new checkpoint
    assert elastic.after(ended_by(1), crew) == (crew, "")
    crew, said = elastic.after(ended_by(1), crew)
    assert crew == Crew(3, "cuda", (0, 2, 3)) and asked[-1] == [1]
    assert said == (
        " The process of cuda:1 has ended the run twice without a new checkpoint in between, so it is left out. Going on with 3 of 4."
    )
    for _ in range(2):  # process 1 is on another device now
        crew, said = elastic.after(ended_by(1), crew)
    assert crew == Crew(2, "cuda", (0, 3)) and "cuda:2" in said and asked[-1] == [1, 2]


def test_the_last_ones_that_the_recipe_allows_are_kept() -> None:
    crew = Crew(3, "cpu")
    elastic = Elastic(HardwareAsk(devices=3, min_devices=2, kind="cpu"), crew, lambda: None)
    sizes = []
    for _ in range(5):
        crew, said = elastic.after(ended_by(1), crew)
        sizes.append((crew.size, said))
    left_out = " Process 1 has ended the run twice without a new checkpoint in between, so it is left out. Going on with 2 of 3."
    assert sizes == [(3, ""), (2, left_out), (2, ""), (2, ""), (2, "")]


def test_the_processes_of_the_next_start_are_those_that_are_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose device fails again and again; the others go on without it, each on the device that it had."""
    answering(monkeypatch, (0, 2, 5))
    crew = Crew(3, "cuda", (0, 2, 5))
    code = place.launched(
        """
        attempt = len(list(here.glob(f"words-{rank}-*")))
        devices = json.loads(os.environ["PANTHERAML_DEVICES"])
        say(f"words-{rank}-{attempt}", f"{os.environ['WORLD_SIZE']} {os.environ['LOCAL_WORLD_SIZE']} {devices[rank]}")
        if devices[rank] == 2:
            wait_for(f"words-0-{attempt}")
            wait_for(f"words-2-{attempt}")
            os.kill(os.getpid(), signal.SIGKILL)
        elif 2 in devices:
            time.sleep(3600)
        """,
        crew=crew,
        elastic=Elastic(HardwareAsk(devices="all"), crew, lambda: None),
        restarts=5,
    )
    assert code == 0
    last = [(place.folder / f"words-{rank}-2").read_text() for rank in range(2)]
    assert last == ["2 2 0", "2 2 5"] and not (place.folder / "words-2-2").exists()
    assert len(place.said) == 3 and "(1 of 5)." in place.said[1]
    assert place.said[2].endswith(
        "(2 of 5). The process of cuda:2 has ended the run twice without a new checkpoint in between, so it is left out. Going on with 2 of 3."
    )


def test_too_few_that_answer_end_the_run_with_both_reasons(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, (0,))
    crew = Crew(2, "cuda", (0, 1))
    with pytest.raises(DeviceError, match="at least 2 devices were asked for, and 1 of kind cuda answered"):
        place.launched(
            "sys.exit(9) if rank else time.sleep(3600)",
            crew=crew,
            elastic=Elastic(HardwareAsk(devices="all", min_devices=2), crew, lambda: None),
            restarts=1,
        )
    assert "process 1 of 2 ended with exit code 9" in place.said[1] and "started again" not in place.said[1]


def test_who_is_to_blame_for_a_hang_is_known_only_where_one_is_behind(tmp_path: Path) -> None:
    for beats, rank in (((4, 3, 4), 1), ((3, 3, 4), None), ((3, 4, 0), None)):
        watched = job.Job([], 3, tmp_path, {})
        for pulse, number in zip(watched.pulses, beats, strict=True):
            pulse.beats = number
        end = watched._hang([min((0, 1), key=lambda each: beats[each])], 1.0)
        assert end.rank == rank, beats


def test_those_that_have_done_as_little_before_a_hang_are_all_named(tmp_path: Path) -> None:
    watched = job.Job([], 3, tmp_path, {})
    for pulse, number in zip(watched.pulses, (3, 4, 3), strict=True):
        pulse.beats = number
    assert watched._hang([0, 2, 1], 6.0).said == "the processes 0, 2 of 3 gave no sign of life for 6 s"
    assert watched._hang([1], 6.0).said == "process 1 of 3 gave no sign of life for 6 s"


# ---- A whole run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_two_processes_goes_on_when_one_is_killed_and_in_one_when_it_is_killed_again(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", chats(40))
    words = f"tiny:llama {rows} run.folder={tmp_path / 'runs'} run.save_every=2 run.log_every=1 batch.size=4 optim.steps=40 adapter.rank=4"
    words += " model.dtype=float32 eval.generate_rows=0 eval.every=40 hardware.kind=cpu hardware.threads=1"
    command = [sys.executable, "-m", "pantheraml", "train", *words.split()]
    command += ["hardware.devices=2", "hardware.min_devices=1", "hardware.restarts=4"]
    environment = {**os.environ, "PANTHERAML_CACHE": str(tmp_path / "cache")}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "runs" / "llama-rows"

    def second(but: int | None) -> int | None:
        """The number of process 1 of this start."""
        for each in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error):
                if each.environ().get("RANK") == "1" and each.pid != but:
                    return each.pid
        return None

    until(lambda: launcher.poll() is not None or list(run.glob("checkpoints/step-*")))
    first = second(None)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: launcher.poll() is not None or second(first))  # before it has done a step
    again = second(first)
    assert again is not None
    os.kill(again, signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, printed
    assert "process 1 of 2 ended with SIGKILL" in printed and "started again from the last checkpoint (1 of 4)" in printed
    assert (
        "(2 of 4). Process 1 has ended the run twice without a new checkpoint in between, so it is left out. Going on with 1 of 2."
        in printed
    )
    assert "From here on with mesh={}, world_size=1" in printed
    assert "Going on after step" in printed and (run / "report.md").exists()
    assert "Process 1 of 2" in (run / "logs" / "rank-00001.log").read_text()
    assert len(losses(run)) >= 40 and load_recipe(run / "recipe.yaml").run.name == "llama-rows"
    assert not list((tmp_path / "runs").glob("llama-rows-*"))
