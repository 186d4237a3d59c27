"""The command line: `mansu-tl demo`, `mansu-tl run`, `mansu-tl report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mansu_tl import __version__
from mansu_tl.config import StudyConfig
from mansu_tl.errors import MansuError
from mansu_tl.study import Study, run_study
from mansu_tl.study_report import write_study_report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Did this model really forget, and does it stay forgotten once it is quantized?",
)

_DEMO = StudyConfig(model="pocket", never="pocket-never", also=("pocket-fp",))

Out = Annotated[Path, typer.Option("--out", help="Results folder; an interrupted run continues where it stopped.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Png = Annotated[bool, typer.Option("--png", help="Also write every figure as PNG (needs Chromium).")]


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
    quiet: Quiet = False,
    png: Png = False,
) -> None:
    """Run the whole road on the embedded models and write a report: about three minutes on two CPU cores."""
    config = StudyConfig(**{**_DEMO.__dict__, "seed": seed})
    _finish(run_study(config, out, progress=not quiet), png)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file; README shows one.")],
    out: Out,
    quiet: Quiet = False,
    png: Png = False,
) -> None:
    """Run a study of your own model and task, and write its report."""
    _finish(run_study(StudyConfig.read(config), out, progress=not quiet), png)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The results folder of a finished run.")],
    png: Png = False,
) -> None:
    """Write the report of a results folder again; stages that are missing or out of date are run first."""
    if not (folder / "config.toml").is_file():
        raise MansuError(f"{folder}: no config.toml in it, so it is no results folder; give the --out of a run")
    _finish(run_study(StudyConfig.read(folder / "config.toml"), folder, progress=False), png)


def _finish(study: Study, png: bool) -> None:
    path = write_study_report(study, png=png)
    frame = study.summary()[
        ["model", "method", "quantizer", "forget_MC", *_after(study), "CAD", "codes_changed", "passed"]
    ]
    typer.echo(frame.to_string(index=False, float_format=lambda v: f"{v:.2f}"))
    typer.echo(f"{study.environment['seconds']} s, peak memory {study.environment['peak_memory_gb']} GB")
    typer.echo(f"report: {path}")


def _after(study: Study) -> list[str]:
    return [f"forget_MC_{name}" for name in study.config.quantizers]


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        app()
    except MansuError as error:
        typer.echo(f"mansu-tl: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("mansu-tl: interrupted; the same command continues from the last finished stage", err=True)
        sys.exit(130)
