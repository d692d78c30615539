"""The templates for schedulers in docs/distributed.md, as far as they can be tried without one: with stand-ins of their commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny import chats, losses, tiny_recipe, written
from torch.distributed.run import get_args_parser

from pantheraml import cli
from pantheraml.recipe.load import dump_recipe
from pantheraml.recipe.types import Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text("utf-8")
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="the templates are for bash, which is not here")


def template(language: str, about: str) -> str:
    """The one block of a language that speaks of something."""
    (found,) = (text for text in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if about in text)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a recipe in it, and programs that write their words to `said` instead of doing anything; torchrun fails."""
    (tmp_path / "recipe.yaml").write_text("{model: 'tiny:llama', data: rows.jsonl}")
    programs = tmp_path / "bin"
    programs.mkdir()
    say = f"import json, os, sys; open({str(tmp_path / 'said')!r}, 'a').write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + chr(10))"
    written_programs = {
        "torchrun": f"#!{sys.executable}\n{say}\nsys.exit(int(os.environ.get('ENDS_WITH', '1')))\n",
        "srun": f"#!{sys.executable}\n{say}\nat = sys.argv.index('bash')\nos.execvp('bash', sys.argv[at:])\n",
        "scontrol": f"#!{sys.executable}\n{say}\nif sys.argv[1] == 'show': print('node-a\\nnode-b')\n",
    }
    for name, text in written_programs.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(folder: Path, program: str) -> list[list[str]]:
    """The words of each call of a stand-in."""
    calls = [json.loads(line) for line in (folder / "said").read_text().splitlines()]
    return [words[1:] for words in calls if words[0] == program]


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Recipe, bool]:
    """What torchrun takes from its words; the recipe and `--resume` that `pantheraml train` takes from the rest."""
    launcher = get_args_parser().parse_args(words)
    assert launcher.module and launcher.training_script == "pantheraml"
    taken: list[tuple[Recipe, bool]] = []
    monkeypatch.setattr(cli, "_train", lambda recipe, *, resume, as_json: taken.append((recipe, resume)))
    monkeypatch.setattr(sys, "argv", ["pantheraml", *launcher.training_script_args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    ((recipe, resume),) = taken
    return launcher, recipe, resume


@needs_bash
@pytest.mark.parametrize(("restarted", "ends_with", "queued"), [(None, "0", 0), (None, "1", 1), ("2", "1", 1), ("3", "1", 0)])
def test_the_slurm_script_starts_one_torchrun_a_node_and_queues_itself_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, restarted: str | None, ends_with: str, queued: int
) -> None:
    assert BASH is not None
    script = folder / "first.sbatch"
    script.write_text(template("bash", "#SBATCH"))
    subprocess.run([BASH, "-n", script], check=True)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "32",
    }
    again = {} if restarted is None else {"SLURM_RESTART_COUNT": restarted}
    done = subprocess.run([BASH, script], env={**os.environ, **slurm, **again, "ENDS_WITH": ends_with}, check=False)
    assert done.returncode == int(ends_with)
    assert said(folder, "scontrol") == [["show", "hostnames", "node-[a-b]"], *([["requeue", "7"]] * queued)]
    (words,) = said(folder, "torchrun")
    launcher, recipe, resume = understood(words, monkeypatch)
    assert (launcher.nnodes, launcher.node_rank, launcher.nproc_per_node) == ("2", 1, "8")
    assert (launcher.master_addr, launcher.master_port) == ("node-a", 29500)
    assert recipe.run.name == "first" and resume


@needs_bash
def test_the_task_of_skypilot_starts_torchrun_with_what_skypilot_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BASH is not None
    task = yaml.safe_load(template("yml", "job_recovery"))
    assert set(task) <= {"name", "num_nodes", "workdir", "resources", "file_mounts", "setup", "run"}  # of SkyPilot's reference
    assert set(task["resources"]["job_recovery"]) == {"max_restarts_on_errors"}
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    done = subprocess.run([BASH, "-c", task["run"]], env={**os.environ, **sky}, check=False)
    assert done.returncode == 1  # an error is seen
    (words,) = said(folder, "torchrun")
    launcher, recipe, resume = understood(words, monkeypatch)
    assert (launcher.nnodes, launcher.node_rank, launcher.nproc_per_node) == ("2", 1, "8")
    assert (launcher.master_addr, launcher.master_port) == ("10.0.0.1", 29500)
    assert (recipe.run.folder, recipe.run.name) == ("/shared/runs", "first") and resume
    assert recipe.run.folder.startswith(tuple(task["file_mounts"]))


def test_the_job_of_kubeflow_gives_torchrun_what_the_trainer_leaves_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, job = yaml.safe_load_all(template("yml", "TrainJob"))
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # By this label and these names the trainer finds where its variables belong.
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert node["name"] == container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, *words = job["spec"]["trainer"]["command"]
    assert program == "torchrun"
    trainer = {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "1", "MASTER_ADDR": "first-node-0-0.first", "MASTER_PORT": "29500"}
    for name, value in trainer.items():
        monkeypatch.setenv(f"PET_{name}", value)
    mounted = [word.replace("/shared/recipe.yaml", str(folder / "recipe.yaml")) for word in words]
    launcher, recipe, resume = understood(mounted, monkeypatch)
    assert (launcher.nnodes, launcher.node_rank, launcher.nproc_per_node) == ("2", 1, "8")
    assert (launcher.master_addr, launcher.master_port) == ("first-node-0-0.first", 29500)
    assert (recipe.run.folder, recipe.run.name) == ("/shared/runs", "first") and resume
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == job["spec"]["trainer"]["numProcPerNode"]


STAND_IN_FOR_RAY = """
    import sys, threading, types
    from dataclasses import dataclass

    import torch.distributed as dist


    @dataclass
    class FailureConfig:
        max_failures: int

    @dataclass
    class RunConfig:
        name: str
        storage_path: str
        failure_config: FailureConfig

    @dataclass
    class ScalingConfig:
        num_workers: int
        use_gpu: bool

    @dataclass
    class TorchTrainer:
        train_loop_per_worker: object
        scaling_config: ScalingConfig
        run_config: RunConfig

        def fit(self):
            dist.init_process_group("gloo")
            worker = threading.Thread(target=self.train_loop_per_worker)
            worker.start()
            worker.join()
            dist.barrier()
            dist.destroy_process_group()

    for name in ("ray", "ray.train", "ray.train.torch"):
        sys.modules[name] = types.ModuleType(name)
    for each in (FailureConfig, RunConfig, ScalingConfig):
        setattr(sys.modules["ray.train"], each.__name__, each)
    sys.modules["ray.train.torch"].TorchTrainer = TorchTrainer
"""


@pytest.mark.slow
def test_the_function_for_ray_trains_in_its_threads_and_its_group(folder: Path) -> None:
    script = template("py", "TorchTrainer").replace("/shared", str(folder))
    (folder / "script.py").write_text(textwrap.dedent(STAND_IN_FOR_RAY) + script)
    rows = written(folder / "rows.jsonl", chats(20))
    asked = tiny_recipe(folder, rows, optim={"steps": 2}, eval={"every": 2, "generate_rows": 0}, hardware={"timeout_s": 60})
    (folder / "recipe.yaml").write_text(dump_recipe(asked))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    for _ in range(2):  # the second time as after a failure
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    run = folder / "runs" / "first"
    assert len(losses(run)) == 2
    assert json.loads((run / "plan.json").read_text())["mesh"] == {"dp": 2}
