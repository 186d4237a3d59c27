"""The command line: `mansu-tl`, one function a command."""

from __future__ import annotations

import shlex
import sys
import webbrowser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from mansu_tl import __version__
from mansu_tl.building import build_task
from mansu_tl.checking import Check, check_study
from mansu_tl.data.sources import load_task
from mansu_tl.data.sources import source as task_source
from mansu_tl.data.sources import sources as source_names
from mansu_tl.errors import MansuError
from mansu_tl.explorer import ExplorerServer, open_results
from mansu_tl.landmarks import landmarks_task
from mansu_tl.models import load
from mansu_tl.quantization import find_grid, quantizer_table
from mansu_tl.quantization import quantizers as quantizer_names
from mansu_tl.registry import import_plugins
from mansu_tl.results.files import write_text
from mansu_tl.starter import write_starter
from mansu_tl.study import (
    OpenAudit,
    Study,
    StudyConfig,
    collect,
    full,
    properties,
    quick,
    run_study,
    write_gallery,
    write_study_report,
)
from mansu_tl.study import compare as run_comparison
from mansu_tl.study.collect import config_in
from mansu_tl.study.demos import DEMO, DEMO_REAL
from mansu_tl.study.engines import one_thread
from mansu_tl.study.further import Further, further_of
from mansu_tl.study.harness import harness_scores
from mansu_tl.study.shipping import shipped_answers
from mansu_tl.unlearning import method_flags
from mansu_tl.unlearning import methods as method_names
from mansu_tl.verification import ask as asked
from mansu_tl.verification import judge_by_llama

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Did this model really forget, and does it stay forgotten once it is quantized?",
)

Out = Annotated[Path, typer.Option("--out", help="Results folder; an interrupted run continues where it stopped.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Cells computed at the same time; 1 = one after the other.", show_default="one a core"),
]
On = Annotated[str, typer.Option("--on", help="Where: processes of this machine, or ray (a cluster).")]
Png = Annotated[bool, typer.Option("--png", help="Also write every figure as PNG (needs Chromium).")]


def _imported(modules: list[str] | None) -> list[str]:
    import_plugins(modules or ())
    return modules or []


Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", callback=_imported, help="A module that registers something of yours; may be repeated."),
]


def _version(show: bool | None) -> None:
    if show:
        typer.echo(f"mansu-tl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    pass


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    workers: Workers = None,
    on: On = "processes",
    quiet: Quiet = False,
    png: Png = False,
) -> None:
    """Run everything on the embedded models and write a report: about five minutes on two free CPU cores."""
    with _to_be_continued():
        study = run_study(replace(DEMO, seed=seed), out, progress=not quiet, workers=workers, on=on)
        with one_thread():
            further = further_of(study, progress=not quiet)
        _finish(study, png, further)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/commands.md shows one.")],
    out: Out,
    workers: Workers = None,
    on: On = "processes",
    quiet: Quiet = False,
    png: Png = False,
) -> None:
    """Check a study of your own model and task, run it, and write its report."""
    with _to_be_continued():
        read = StudyConfig.read(config)
        found = check_study(read)
        _say(found, warnings_only=True)
        found.require()
        _finish(run_study(read, out, progress=not quiet, workers=workers, on=on), png)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="A TOML file; docs/commands.md shows one.")],
) -> None:
    """Look for what is wrong with a study before an hour is spent on it: files, pairs, knowledge, settings, memory."""
    found = check_study(StudyConfig.read(config))
    _say(found)
    if not found.passed:
        raise typer.Exit(2)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="Where to write config.toml and task.jsonl.")],
) -> None:
    """Write a first task and config, which run as they stand, to be changed into your own."""
    config, _ = write_starter(folder)
    results = folder / "results"
    typer.echo(f"written: {config} and {folder / 'task.jsonl'}; try")
    for command in (["check", str(config)], ["run", str(config), "--out", str(results)]):
        typer.echo("  " + shlex.join(["mansu-tl", *command]))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The results folder of a finished run.")],
    png: Png = False,
) -> None:
    """Write the report of a results folder again; stages that are missing or out of date are run first."""
    config = StudyConfig.read(config_in(folder))
    with _to_be_continued():
        _finish(run_study(config, folder, progress=False), png)


@app.command()
def explore(
    folder: Annotated[Path, typer.Argument(help="The results folder of a finished demo, demo-real or run.")],
    port: Annotated[int, typer.Option(help="Of the page on this machine; 0 = any that is free.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    save: Annotated[
        Path | None, typer.Option(help="Write the page to this file instead: without a model behind it.")
    ] = None,
) -> None:
    """Show a results folder's circuit in the browser: click, ask, switch parts off. Ctrl-C ends it."""
    explorer = open_results(folder)
    if save is not None:
        typer.echo(f"written: {explorer.save_html(save, progress=True)}")
        return
    with ExplorerServer(explorer, port) as server:
        typer.echo(f"{server.address}\nCtrl-C ends it")
        if browser:
            webbrowser.open(server.address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        typer.echo("\nexplorer ended")


@app.command()
def compare(
    out: Out = Path("runs/compare"),
    thorough: Annotated[
        bool, typer.Option("--full/--quick", help="Everything, in hours; or the picture, in minutes.")
    ] = False,
    base: Annotated[list[str] | None, typer.Option(help="A model that knows the forget set; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method or ablation; may be repeated.")] = None,
    quantizer: Annotated[list[str] | None, typer.Option(help="A quantizer; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="So many seeds of every method; 0 = as the plan says.")] = 0,
    task: Annotated[
        str, typer.Option(help="The task: an embedded name, a file, or another source (tofu:FOLDER).")
    ] = "pocket",
    never: Annotated[str, typer.Option(help="A model that never learnt it; '' = none.")] = "pocket-never",
    plugin: Plugin = None,
    workers: Workers = None,
    on: On = "processes",
    quiet: Quiet = False,
    png: Png = False,
) -> None:
    """Compare all methods on all bases under all quantizers and seeds; writes tables (CSV, parquet) and figures."""
    changes: dict[str, Any] = {"task": task, "never": never, "plugins": tuple(plugin or ())}
    for key, values in (("bases", base), ("methods", method), ("quantizers", quantizer)):
        if values:
            changes[key] = tuple(values)
    if quantizer:
        changes["control_quantizers"] = tuple(quantizer)
    if seeds:
        changes |= dict.fromkeys(("seeds", "control_seeds", "ablation_seeds"), tuple(range(seeds)))
    plan = full(**changes) if thorough else quick(**changes)
    with _to_be_continued():
        result = run_comparison(plan, out, png=png, progress=not quiet, workers=workers, on=on)
    typer.echo(properties(result.table).set_index(["base", "method"]).T.to_string())
    typer.echo(f"tables and figures: {result.folder}")


@app.command()
def audit(
    original: Annotated[
        str, typer.Argument(help="The model before: a folder in Hugging Face format, a GGUF file, a name.")
    ],
    unlearned: Annotated[str, typer.Argument(help="The model after; also a LoRA adapter's folder (needs peft).")],
    task: Annotated[str, typer.Option(help="What was to be forgotten and what kept: a file, or another source.")],
    never: Annotated[str, typer.Option(help="A model that never learnt it; '' = none.")] = "",
    formats: Annotated[str, typer.Option(help="Quantizers, with commas between; '' = the plan's.")] = "",
    out: Out = Path("runs/audit"),
    thorough: Annotated[
        bool,
        typer.Option("--full/--quick", help="Every format, all attacks, the circuit; or the verdicts, in minutes."),
    ] = False,
    device: Annotated[str, typer.Option(help="Where the models are put, cpu or cuda.")] = "cpu",
    plugin: Plugin = None,
    quiet: Quiet = False,
) -> None:
    """Audit what anybody unlearned: forgotten, at what cost, in every format, under attack, erased or only suppressed."""
    with _to_be_continued():
        opened = OpenAudit(
            original, unlearned, task, never=never or None, formats=[n.strip() for n in formats.split(",") if n.strip()],
            out=out, plan="full" if thorough else "quick", device=device,
        )  # fmt: skip
        for line in opened.estimate().lines():
            typer.echo(line)
        found = opened.run(progress=not quiet)
    typer.echo("")
    for line in found.lines():
        typer.echo(line)
    for stage, reason in found.notes.items():
        typer.echo(f"note, {stage}: {reason}", err=True)
    typer.echo(f"\nverdicts and tables: {out}; page: {out / 'report.html'}")


@app.command()
def figures(
    folder: Annotated[
        Path, typer.Option(help="The gallery: pictures, and the result files they are drawn from.")
    ] = Path("figures"),
    results: Annotated[
        Path | None,
        typer.Option(help="First store what the pictures need of this results folder (loads its models; minutes)."),
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="Write PNGs (needs Chromium).")] = True,
    dark: Annotated[bool, typer.Option("--dark", help="Also dark PNGs.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="Also SVGs.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Also pages that can be zoomed, 5 MB each.")] = False,
    quiet: Quiet = False,
) -> None:
    """Draw the gallery from its committed result files; no model is run."""
    if results is not None:
        collect(results, folder / "results", progress=not quiet)
    written = write_gallery(folder, images=png, dark=dark, svg=svg, html=html, progress=not quiet)
    typer.echo(f"{len(written)} files in {folder}; {folder / 'README.md'} lists the pictures")


@app.command()
def ask(
    models: Annotated[list[str], typer.Argument(help="Folders in Hugging Face format, GGUF files, or names.")],
    prompt: Annotated[list[str], typer.Option(help="What to ask; may be repeated.")],
    tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = 12,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
) -> None:
    """Ask models the same things, greedily, and print their answers side by side."""
    table = asked({name: load(name) for name in models}, prompt, new_tokens=tokens, chat=chat)
    typer.echo(table.markdown())


@app.command()
def llama(
    files: Annotated[list[str], typer.Argument(help="GGUF files or names: the original, a baseline, MANSU's.")],
    task: Annotated[str, typer.Option(help="The task: a file, or another source.")],
    questions: Annotated[list[str] | None, typer.Option(help="A question set; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every question to this CSV file.")] = None,
) -> None:
    """Let llama.cpp answer a task's questions from GGUF files, and compare with our answers from them."""
    same = len({Path(file).name for file in files}) < len(files)
    named = {file if same else Path(file).name: file for file in files}
    asked_of = load_task(task, tokenizer=load(files[0])).questions
    frames = []
    for name in questions or ["forget"]:
        if name not in asked_of:
            raise MansuError(f"questions {name!r}: the task has none; choose among {', '.join(asked_of)}")
        judged = judge_by_llama(named, asked_of[name])
        typer.echo(f"{name}: {len(judged.prompts)} questions, percent")
        typer.echo(judged.summary().to_string(index=False, float_format="{:.1f}".format))
        frames.append(judged.to_dataframe().assign(questions=name))
    if out is not None:
        write_text(out, pd.concat(frames).to_csv(index=False))
        typer.echo(f"written: {out}")


@app.command("lm-eval")
def lm_eval(
    folder: Annotated[Path, typer.Argument(help="The results folder of a finished run.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks of the harness with commas between them, wmdp_bio,mmlu; or YAML files of yours.")
    ],
    same: Annotated[
        list[str] | None,
        typer.Option(help="TASK=PLACE: its questions with choices, so that ours stands beside; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many questions of every task.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(help="Of the harness.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write the table to this CSV file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run EleutherAI's harness on a run's original, edited and quantized models, its numbers beside ours."""
    places = dict(_assigned("--same", each) for each in same or ())
    names = [name.strip() for name in tasks.split(",")]
    with _to_be_continued():
        found = harness_scores(
            folder, names, same=places, limit=limit, batch_size=batch_size, progress=not quiet
        ).to_dataframe()
    typer.echo(found.to_string(index=False, float_format="{:.3f}".format, na_rep=""))
    if out is not None:
        typer.echo(f"written: {write_text(out, found.to_csv(index=False))}")


def _assigned(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise MansuError(f"{option} {text!r}: write NAME=VALUE")
    return name, value


@app.command()
def demo_real(
    out: Out = Path("runs/demo-real"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quiet: Quiet = False,
    png: Png = False,
) -> None:
    """Make SmolLM2 forget landmarks by GradDiff and by MANSU, write both back into its GGUF, and ask again."""
    task = out / f"task_{seed}.jsonl"
    with _to_be_continued():
        if not task.is_file():
            landmarks_task(load(DEMO_REAL.model), seed).write(task)
        study = run_study(replace(DEMO_REAL, task=str(task), seed=seed), out, progress=not quiet)
        model, edits = load(DEMO_REAL.model), {name: result.edit for name, result in study.results.items()}
        said = shipped_answers(model, load_task(str(task), tokenizer=model), edits, out / "model")
        _finish(study, png, Further(said))
    answers = said.markdown() + "\n"
    typer.echo(f"{answers}answers: {write_text(out / 'answers.md', answers)}")


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A folder in Hugging Face format, a GGUF file, or a name.")],
    forget: Annotated[Path, typer.Option(help="The relation to forget: a JSON file as LRE has them.")],
    far: Annotated[list[Path], typer.Option(help="A relation to keep; may be repeated.")],
    out: Annotated[Path, typer.Option(help="The task file to write, JSON lines.")],
    facts: Annotated[int, typer.Option(help="Facts to forget.")] = 24,
    near: Annotated[int, typer.Option(help="Facts of the same relation to keep, at most.")] = 60,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
) -> None:
    """Make a task of the facts that a model knows, and say what became of the others."""
    built = build_task(load(model), forget, far, facts=facts, near=near, chat=chat, seed=seed)
    counts = built.to_dataframe().groupby(["relation", "used_as", "reason"], sort=False).size().rename("facts")
    typer.echo(counts.reset_index().to_string(index=False))
    typer.echo(f"{built!r}, written: {built.write(out)}")


@app.command()
def grid(
    model: Annotated[str, typer.Argument(help="A folder in Hugging Face format, a GGUF file, or a name.")],
) -> None:
    """Say which quantizer's grid a checkpoint rests on: rounding to that one changes nothing and undoes small updates."""
    resting = find_grid(load(model))
    typer.echo(repr(resting))
    typer.echo(resting.to_dataframe().to_string(index=False, float_format="{:.4f}".format))


@app.command()
def methods(plugin: Plugin = None) -> None:
    """List the unlearning methods: name, title, and what is to be known of each."""
    _list(
        (name, flags.title, "takes the circuit" * flags.takes_circuit, "claims the floor" * flags.claims_floor,
         "searched for its learning rate" * flags.searched, f"control of {flags.control_of}" * bool(flags.control_of))
        for name, flags in ((name, method_flags(name)) for name in method_names())
    )  # fmt: skip


@app.command()
def quantizers(plugin: Plugin = None) -> None:
    """List the quantizers: bits, weights a scale, how scales are kept, who uses it, and what it is for this package."""
    kinds = {"grid": "fixed cells: can be floored and counted", "calibrated": "calibrated on the retain text"}
    kinds |= {"library": "a library's own codes", "searched": "scales searched, no cells"}
    kinds |= {"file": "the file's codes: can be floored and counted"}
    table = quantizer_table()
    absent = table["package"].ne("") & ~table["quantizer"].isin(quantizer_names())
    table["kind"] = (
        table["kind"].map(kinds).where(~absent, "not installed: pip install mansu-tl[" + table["package"] + "]")
    )
    lines = [list(table.columns.drop("package").str.replace("_", " ")), *table.drop(columns="package").values.tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def sources(plugin: Plugin = None) -> None:
    """List where tasks may come from: name, and what it reads."""
    _list((name, task_source(name).about) for name in source_names())


def _list(rows: Iterable[Sequence[str]]) -> None:
    """One line each: the name, and the rest behind it."""
    table = list(rows)
    width = max(len(name) for name, *_ in table)
    for name, *rest in table:
        typer.echo(f"{name:<{width}}  {', '.join(filter(None, rest))}")


def _say(found: Check, *, warnings_only: bool = False) -> None:
    for line in found.lines():
        state = line.split()[0]
        if not warnings_only or state == "warning":
            typer.echo(line, err=state != "ok")


def _finish(study: Study, png: bool, further: Further | None = None) -> None:
    path = write_study_report(study, png=png, further=further)
    frame = study.summary()[
        [
            "model",
            "method",
            "quantizer",
            "forget_MC",
            *_after(study),
            *_structure(study),
            "CAD",
            "codes_changed",
            "passed",
        ]
    ]
    typer.echo(frame.to_string(index=False, float_format=lambda v: f"{v:.2f}"))
    for line in _failing(study):
        typer.echo(line)
    typer.echo(f"{study.environment['seconds']} s, peak memory {study.environment['peak_memory_gb']} GB")
    typer.echo(f"report: {path}")


def _structure(study: Study) -> list[str]:
    names = ["structure", *(f"structure_{name}" for name in study.config.quantizers)]
    return [name for name in names if name in study.summary()]


def _after(study: Study) -> list[str]:
    return [f"forget_MC_{name}" for name in study.config.quantizers]


def _failing(study: Study) -> Iterator[str]:
    """Which rows keep each scorecard from passing, the first three in words; and what its reader has to know."""
    notes: dict[str, None] = {}
    for one in (study, *study.also.values()):
        for result in one.results.values():
            rows = result.card.failing
            unjudged = sum(not row.judgeable for row in result.card.rows)
            if rows or unjudged:
                more = f"; and {len(rows) - 3} more" if len(rows) > 3 else ""
                count = f"{len(rows)} of {len(result.card.rows)}"
                rest = f"{unjudged} more not judgeable" if unjudged else ""
                outcome = f"fails {count} rows: {'; '.join(rows[:3])}{more}" if rows else "fails no row"
                yield f"{result.card.title} {outcome}{f'; {rest}' if rest else ''}"
            notes |= {f"note, {one.name}: {note}": None for note in result.card.notes}
    yield from notes


@contextmanager
def _to_be_continued() -> Iterator[None]:
    """Say how to go on after Ctrl-C, which typer would answer with a bare "Aborted."."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["mansu-tl", *sys.argv[1:]])
        typer.echo(
            f"\nmansu-tl: interrupted; what is finished is kept, and the same command goes on from there:\n  {again}",
            err=True,
        )
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        app()
    except MansuError as error:
        typer.echo(f"mansu-tl: {error}", err=True)
        sys.exit(2)
