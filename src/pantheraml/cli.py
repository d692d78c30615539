"""The command line: each verb imports its room when it is called, so that help is there at once."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pantheraml.cli_council import council_app
from pantheraml.cli_memory import memory_app
from pantheraml.cli_serve import serve_app
from pantheraml.errors import PantheraError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from pantheraml.distributed.crew import Crew
    from pantheraml.recipe.types import Recipe
    from pantheraml.trainer.runs import Loaded

app = typer.Typer(
    name="pantheraml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune and run language models on whatever hardware is there.",
    epilog="Exit codes: 0 done, 2 recipe or usage, 3 data, 4 device or memory, 5 diverged, 6 storage, "
    "75 stopped by the system with a checkpoint saved, 130 stopped by Ctrl-C with a checkpoint saved.  "
    "The shape of the Python API, and the idea of fast fine-tuning for everybody, come from Unsloth "
    "(Daniel and Michael Han, unsloth.ai); no code of theirs is in here.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it: check, show, convert, split.", rich_markup_mode=None)
recipe_app = typer.Typer(no_args_is_help=True, help="What a recipe can say: explain, schema.", rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(memory_app, name="memory")
app.add_typer(council_app, name="council")
app.add_typer(serve_app)  # one verb, no group

Words = Annotated[
    list[str], typer.Argument(metavar="MODEL DATA | RECIPE.yaml [KEY=VALUE]...", help="What to train on what, and what to change.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")]
ModelOrRun = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, a model folder, a Hub id, or tiny:llama.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
MaxNew = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]


@app.command()
def train(
    words: Words,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe and data, print the plan, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this recipe's run, if there is one.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model: pantheraml train MODEL DATA [key=value...], or pantheraml train recipe.yaml [key=value...]."""
    recipe = _recipe(words)
    if dry_run:
        return _print_plan(recipe, as_json)
    _train(recipe, resume=resume, as_json=as_json)


@app.command()
def resume(run: RunFolder, as_json: AsJson = False) -> None:
    """Go on with a run from its newest sound checkpoint. Other hardware settings: change recipe.yaml in its folder first."""
    from pantheraml.trainer.runs import Run

    run = run if run.name else run.resolve()
    recipe = Run(run).recipe
    where = recipe.run.model_copy(update={"folder": str(run.parent), "name": run.name})
    _train(recipe.model_copy(update={"run": where}), resume=True, as_json=as_json)


@app.command()
def plan(
    words: Words,
    device: Annotated[
        str | None, typer.Option(metavar="SLICE", help="A TPU slice that is not here (v5e-8, v5p-4x4x4, 2*v6e-8): compile a step for it.")
    ] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="With --device: compile for cheaper slices too, until one fits. Takes minutes more.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a run would do, and why, before any weight is loaded."""
    if device is None:
        if suggest:
            raise RecipeError("--suggest needs --device", why="it compares slices of TPUs with the one you name", fix="add --device v5e-8")
        return _print_plan(_recipe(words), as_json)
    recipe = _recipe(words)
    # libtpu looks for a TPU's metadata server and for other users of it otherwise, and talks to standard error.
    os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}.items():
        os.environ.setdefault(name, value)
    with _working():
        from pantheraml.trainer.ahead import plan_ahead

        found = plan_ahead(recipe, device, suggest=suggest, announce=lambda said: _err().print(said, markup=False, highlight=False))
    if as_json:
        return _print_json(found.to_dict())
    _print_lines(found.lines())


@app.command()
def chat(
    target: ModelOrRun,
    compare: Annotated[bool, typer.Option("--compare", help="Answer twice: before and after training.")] = False,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends it; every answer is greedy unless a temperature is given."""
    loaded = _load(target)
    if compare:
        with loaded.untuned():
            pass  # says at once if there is nothing to compare with
    talk: list[dict[str, str]] = []
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if not said:
            break
        talk.append({"role": "user", "content": said})
        if compare:
            print("base:  " + loaded.answer(talk, max_new_tokens=max_new_tokens, temperature=temperature, tuned=False))
            print("tuned: ", end="", flush=True)
        answer = loaded.answer(
            talk, max_new_tokens=max_new_tokens, temperature=temperature, on_text=lambda text: print(text, end="", flush=True)
        )
        print()
        talk.append({"role": "assistant", "content": answer})


@app.command()
def generate(
    target: ModelOrRun,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Each is answered on its own.")],
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    as_json: AsJson = False,
) -> None:
    """Answer prompts and stop."""
    loaded = _load(target)
    answers = [
        loaded.answer([{"role": "user", "content": prompt}], max_new_tokens=max_new_tokens, temperature=temperature) for prompt in prompts
    ]
    if as_json:
        _print_json([{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)])
    else:
        print("\n\n".join(answers))


@app.command(name="eval")
def evaluate(
    target: ModelOrRun,
    data: Annotated[list[str] | None, typer.Argument(metavar="[DATA]...", help="Rows. Default: those that the run held out.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="At most so many rows are answered; the loss is over all.")] = 100,
    max_new_tokens: MaxNew = 256,
    as_json: AsJson = False,
) -> None:
    """Measure loss and exact match on held-out rows."""
    from pantheraml.recipe.load import recipe_from
    from pantheraml.trainer.evaluate import evaluate as measure
    from pantheraml.trainer.folder import is_run
    from pantheraml.trainer.runs import Run

    if is_run(Path(target)):
        recipe = Run(target).recipe
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": Run(target).base})})
    elif data:
        recipe = recipe_from({"model": target, "data": data})
    else:
        raise RecipeError(
            "eval needs rows", why=f"{target} is no run, so nothing was held out", fix=f"name a file: pantheraml eval {target} FILE"
        )
    asked = recipe.eval.model_copy(update={"generate_rows": rows, "max_new_tokens": max_new_tokens})
    changes: dict[str, Any] = {"eval": asked}
    if data:
        changes["data"] = recipe.data.model_copy(update={"train": tuple(data), "eval": tuple(data), "max_eval_rows": 2**31})
    with _working():
        found = measure(recipe.model_copy(update=changes), _load(target))
    if as_json:
        return _print_json(found)
    matched = "" if found["exact_match"] is None else f", exact match {found['exact_match']:.1%} of {found['answered_rows']} rows"
    print(f"loss {found['loss']:.4f} on {found['rows']} rows{matched}")


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Literal["adapter", "merged", "gguf", "ollama"], typer.Option(help="For PEFT, transformers, llama.cpp, or Ollama.")],
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"], typer.Option(help="Of the numbers in a GGUF file.")
    ] = "q8_0",
    out: Annotated[Path | None, typer.Option(help="Folder or file to write. Default: inside the run folder.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read it back and compare.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Take the result away: adapter, merged model, GGUF file, or an Ollama Modelfile with it."""
    from pantheraml.trainer.runs import Run

    with _working():
        done = Run(run).export(to, type=type, out=out, verify=verify, overwrite=overwrite)
    print(f"{done.path}: {done.said}")


@app.command()
def devices(
    as_json: AsJson = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also capability, load, temperature, prices' sources, and every package.")
    ] = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure a matrix product and copies on each device, and keep the figures.")
    ] = False,
    folder: Annotated[str, typer.Option(help="Where runs would be written.")] = "runs",
) -> None:
    """Show what is here, what is not and why, and whether each device can train."""
    from pantheraml.doctor import report

    found = report(folder, bench=bench)
    gc.freeze()  # the end of the process would look through all of torch's objects once more, for a quarter of a second
    if as_json:
        _print_json(found.to_dict())
    else:
        _out().print(found.render(verbose=verbose))
    if found.problems:
        raise typer.Exit(4)


app.command(name="doctor", hidden=True)(devices)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where run folders are.")] = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs in a folder."""
    from pantheraml.trainer.runs import list_runs

    found = [(run, run.report) for run in list_runs(folder)]
    if as_json:
        return _print_json([{"run": str(run.folder), "ended": report is not None, "report": report} for run, report in found])
    if not found:
        print(f"there are no runs in {folder}/; start one: pantheraml train MODEL DATA")
    for run, report in found:
        if report is None:
            print(f"{run.folder}  not ended; go on with: pantheraml resume {run.folder}")
            continue
        held = report["eval"]
        matched = (
            ""
            if held["exact_match_after"] is None
            else f"  exact match {held['exact_match_before']:.0%} -> {held['exact_match_after']:.0%}"
        )
        loss = "" if held["loss_after"] is None else f"  held-out loss {held['loss_before']:.3f} -> {held['loss_after']:.3f}"
        print(f"{run.folder}  {report['model']}  {report['train']['steps']} steps{loss}{matched}")


DataPaths = Annotated[list[str], typer.Argument(metavar="DATA...", help="Files, folders, or hub:ORG/SET[:SPLIT].")]
Tokens = Annotated[str | None, typer.Option("--model", help="Whose tokenizer and chat template to use.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Longest example in tokens.")]
Shape = Annotated[
    Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"], typer.Option("--format", help="auto: detected.")
]
LossOn = Annotated[Literal["assistant", "last", "all"], typer.Option(help="Which tokens are learned.")]


@data_app.command()
def check(
    data: DataPaths,
    model: Tokens = None,
    evaluation: Annotated[list[str] | None, typer.Option("--eval", help="Evaluation files, to find rows that stand in both.")] = None,
    max_tokens: MaxTokens = 2048,
    format: Shape = "auto",
    loss_on: LossOn = "assistant",
    show: Annotated[int, typer.Option(min=0, help="Show so many rows as the model reads them, learned tokens in colour.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Report formats, bad rows, lengths, what is learned, and packing; exit code 3 if a row cannot be used."""
    from pantheraml.data import inspect
    from pantheraml.recipe.types import DataSpec

    spec = DataSpec(train=tuple(data), eval=tuple(evaluation or ()), format=format, on_bad_row="skip")
    tokenizer = _tokenizer(model) if model else None
    found = inspect.check(data, tokenizer, spec, max_tokens, loss_on=loss_on)
    if as_json:
        _print_json(found.to_dict())
    else:
        _out().print(found.render())
        if tokenizer and show:
            _show(data, tokenizer, found.format, loss_on, show)
        elif not tokenizer:
            print("name a model for lengths and masks: --model MODEL")
    if found.bad:
        raise typer.Exit(3)


@data_app.command(name="show")
def show_rows(
    data: DataPaths,
    model: Tokens = "tiny:llama",
    rows: Annotated[int, typer.Option(min=1)] = 3,
    format: Shape = "auto",
    loss_on: LossOn = "assistant",
) -> None:
    """Show rows as the model reads them; learned tokens are green."""
    _show(data, _tokenizer(model or "tiny:llama"), format, loss_on, rows)


@data_app.command()
def convert(
    data: DataPaths,
    out: Annotated[str, typer.Option(help="The JSONL file to write.")],
    to: Annotated[Literal["messages", "sharegpt", "alpaca", "prompt-completion"], typer.Option(help="The format to write.")] = "messages",
    format: Shape = "auto",
) -> None:
    """Write rows in another format, as JSONL."""
    from pantheraml.data import inspect

    with _disk(out):
        print(f"{out}: {inspect.convert(data, out, to, format)} rows as {to}")


@data_app.command()
def split(
    data: Annotated[str, typer.Argument(metavar="DATA", help="One file.")],
    train_out: Annotated[str, typer.Option("--train", help="The JSONL file for training.")],
    eval_out: Annotated[str, typer.Option("--eval", help="The JSONL file for evaluation.")],
    fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share that is held out.")] = 0.1,
    seed: int = 3407,
) -> None:
    """Divide rows into training and evaluation; equal rows stay together."""
    from pantheraml.data import inspect

    with _disk(train_out):
        trained, held = inspect.split_file(data, train_out, eval_out, fraction, seed)
    print(f"{train_out}: {trained} rows; {eval_out}: {held} rows")


@recipe_app.command()
def explain(words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...")] = None) -> None:
    """Print each key with its default, or a recipe's value, and its reason."""
    from pantheraml.recipe.explain import explain as table

    _out().print(table(_recipe(words) if words else None))


@recipe_app.command()
def schema() -> None:
    """Print a JSON schema of recipes, for editors."""
    from pantheraml.recipe.explain import schema as recipe_schema

    _print_json(recipe_schema())


@recipe_app.command()
def example() -> None:
    """Print a small recipe to start from."""
    from pantheraml.recipe.explain import example as text

    print(text(), end="")


def main() -> None:
    """Run the command line; errors a person can act on are three lines and an exit code, not a traceback."""
    # Transformers asks the Hub for statistics otherwise. Nobody asked for that network.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Threads that wait for each other spin for about a tenth of a millisecond, which is as long as a step is between two kernels, and then
    # sleep. To sleep at once costs a small model a fifth of its speed; to spin for milliseconds, as is usual, costs a third beside another
    # program. OpenMP libraries other than GNU's know no such number, and sleep.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="3000")
    # Where a process of several ends, torch prints the calls inside it that led to each lost connection; the error says what is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        if "PANTHERAML_LAUNCHER" in os.environ:
            from pantheraml.distributed.heartbeat import attend

            attend()
        app(prog_name="pantheraml")
    except PantheraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


# ---- What the verbs share ---------------------------------------------------------------------------------------


@contextmanager
def _working() -> Iterator[None]:
    """Libraries keep their bars and notes to themselves, and Ctrl-C is answered in words."""
    from pantheraml.models.load import quiet_library

    quiet_library()
    with _interruptible():
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; if a checkpoint was saved, go on with: pantheraml resume RUN", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _disk(out: str) -> Iterator[None]:
    from pantheraml.errors import StorageError

    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written: {error.strerror or error}",
            why="the rows go there",
            fix="name a file in a folder that you may write to",
        ) from error


def _train(recipe: Recipe, *, resume: bool, as_json: bool) -> None:
    with _interruptible():
        from pantheraml.distributed.crew import count_crew

        crew = count_crew(recipe.hardware)
    if crew.size > 1:
        raise typer.Exit(_launch(recipe, crew, resume=resume, as_json=as_json))
    with _working():
        from pantheraml.trainer.run import train as run_recipe

        run = run_recipe(recipe, resume=resume, console=_err())
    report = run.report
    if report is None:
        return None  # the first host of several keeps it, and says all of this
    if as_json:
        return _print_json(report)
    held, folder = report["eval"], run.folder
    _err().rule(style="dim")
    if held["rows"]:
        print(
            f"exact match on {held['rows']} held-out rows: {held['exact_match_before']:.1%} before, {held['exact_match_after']:.1%} after"
        )
    if held["loss_after"] is not None:
        print(f"held-out loss: {held['loss_before']:.4f} before, {held['loss_after']:.4f} after")
    for sample in report["samples"][:3]:
        print(f"\n  prompt  {_short(sample['prompt'])}\n  before  {_short(sample['before'])}\n  after   {_short(sample['after'])}")
    print(f"\nreport: {folder / 'report.md'}   loss curve: {folder / 'loss.png'}")
    compare = " --compare" if (folder / "adapter").is_dir() else ""
    print(f"next:\n  pantheraml chat {folder}{compare}\n  pantheraml eval {folder}\n  pantheraml export {folder} --to ollama")


def _launch(recipe: Recipe, crew: Crew, *, resume: bool, as_json: bool) -> int:
    """The same run in several processes, one for each device; its exit code."""
    from pantheraml.distributed.crew import Elastic
    from pantheraml.distributed.launch import launch
    from pantheraml.recipe.load import dump_recipe
    from pantheraml.trainer.folder import CHECKPOINTS, LOGS, choose_folder

    folder = choose_folder(recipe, resume)  # once, so that all processes go to the same one
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": folder.name})})
    with TemporaryDirectory(prefix="pantheraml-") as passing:
        asked = Path(passing) / "recipe.yaml"
        asked.write_text(dump_recipe(recipe), "utf-8")
        words = [*(["--resume"] if resume else []), *(["--json"] if as_json else [])]
        return launch(
            [sys.executable, "-m", "pantheraml", "train", str(asked), *words],
            crew=crew,
            folder=folder / LOGS,
            restarts=recipe.hardware.restarts,
            hang_s=recipe.hardware.timeout_s,
            announce=lambda said: _err().print(said, markup=False, highlight=False),
            environment=os.environ,
            elastic=Elastic(recipe.hardware, crew, lambda: sorted(place.name for place in (folder / CHECKPOINTS).glob("step-*"))),
        )


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return shown if len(shown) <= 110 else shown[:107] + "..."


def _recipe(words: list[str]) -> Recipe:
    """The recipe that a command line asks for."""
    from pantheraml.recipe.load import load_recipe, recipe_from

    # The first two words may be paths, and a path may hold a "=".
    changes = [word for i, word in enumerate(words) if "=" in word and not (i < 2 and Path(word).exists())]
    names = [word for word in words if word not in changes]
    if len(names) == 1 and Path(names[0]).suffix in (".yaml", ".yml"):
        return load_recipe(Path(names[0]), changes)
    if len(names) == 2:
        return recipe_from({"model": names[0], "data": names[1]}, changes)
    raise RecipeError(
        f"cannot tell what to train from: {' '.join(words)}",
        why="a run needs a model and data, or one recipe file that names them",
        fix="pantheraml train MODEL DATA [key=value...], or pantheraml train recipe.yaml [key=value...]",
    )


def _print_plan(recipe: Recipe, as_json: bool) -> None:
    with _working():
        from pantheraml.trainer.survey import survey

        made = survey(recipe, console=None if as_json else _err()).plan
    if as_json:
        return _print_json(made.to_dict())
    _print_lines(made.lines())


def _print_lines(lines: Sequence[tuple[str, str, str]]) -> None:
    """(choice, value, reason) as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table("choice", "value", "why", box=None, pad_edge=False)
    for choice, value, reason in lines:
        table.add_row(choice, Text(value), Text(reason))
    _out().print(table)


def _load(target: str) -> Loaded:
    """The model of a run, or one that is named."""
    from pantheraml.recipe.types import ModelSpec
    from pantheraml.trainer.folder import is_run
    from pantheraml.trainer.runs import Run, load_target

    with _working():
        return Run(target).loaded if is_run(Path(target)) else load_target(ModelSpec(name=target))


def _tokenizer(model: str) -> Any:
    from pantheraml.models.load import load_tokenizer
    from pantheraml.recipe.types import ModelSpec

    with _working():
        return load_tokenizer(ModelSpec(name=model))


def _show(data: list[str], tokenizer: Any, format: Any, loss_on: Any, rows: int) -> None:
    from pantheraml.data import inspect
    from pantheraml.data.chat import Encoder, ensure_chat_template
    from pantheraml.data.load import BadRows

    found, detected = inspect.open_rows(data, format, on_bad=BadRows("skip", 2**31))
    if detected.format not in ("prompt-completion", "text"):
        ensure_chat_template(tokenizer)
    _out().print(inspect.show(found, Encoder(tokenizer, loss_on, detected.format), rows))


def _print_json(values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False, indent=2, default=str))


def _out() -> Console:
    from rich.console import Console

    return Console()


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)
