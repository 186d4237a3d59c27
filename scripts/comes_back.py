"""Which format brings forgotten facts back: `python scripts/comes_back.py RUN... --out figures/tables/comes_back.csv`.

Every RUN is the folder of `make demo`, `make demo-real` or any study. Each of its edits is asked as it is stored and in every
format that somebody ships (`mansu-tl quantizers`), and of a model from a GGUF file also in that file; beside it the original
in the same format. Rows, intervals over facts and verdicts are the audit's own. What WORK holds is not measured again, so an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.models import gguf_weights, linear_weights
from mansu_tl.models.gguf import q4_k_m
from mansu_tl.quantization import quantizer, quantizer_table, quantizers
from mansu_tl.quantization.formats.gguf_k import MixtureQuantizer, SearchedQuantizer
from mansu_tl.study import Audit, AuditPlan, OpenAudit
from mansu_tl.study.audit_stages import UNLEARNED
from mansu_tl.study.audit_verdicts import FORMATS, NO, YES
from mansu_tl.study.config import tomllib
from mansu_tl.study.plan import ORIGINAL
from mansu_tl.unlearning import Edit
from mansu_tl.verification import Subject

TITLES = {"graddiff": "GradDiff", "mansu": "MANSU", "mansu-closed": "MANSU"}
MODELS = {"smollm2-135m": "SmolLM2"}
NOT_APPLICABLE = "not applicable"
# The audit asks whether it stays forgotten.
BACK = {NO: "yes", YES: "no"}
Row = dict[str, Any]


def formats() -> tuple[str, ...]:
    """The file that a model came in, and every installed format that somebody ships."""
    table = quantizer_table()
    ours = set(table.quantizer[table.used_by.str.startswith("nobody")])
    return tuple(name for name in ("gguf", *quantizers()) if name not in ours)


def misfit(model: TransformerBridge, name: str) -> str:
    """Why a model cannot be stored in a format; "" where it can."""
    if name in quantizers("file"):
        return "" if gguf_weights(model) is not None else "it came from no GGUF file"
    chosen = quantizer(name)
    widths = sorted({each.in_features for each in linear_weights(model).values()})
    if isinstance(chosen, SearchedQuantizer):
        holds = any(chosen.fits(width) for width in widths)
    elif isinstance(chosen, MixtureQuantizer):
        holds = any(kind.endswith("_K") for kind in q4_k_m(model).values())
    else:
        return ""
    return "" if holds else f"rows of {' and '.join(map(str, widths))} weights do not fill blocks of 256"


def rows_of(found: Audit, method: str, title: str) -> Iterator[Row]:
    """One audited model in every format, each as the audit sees it."""
    table = found.table.set_index(["method", "quantizer", "question_set", "measure"]).sort_index()
    judged = [each for each in found.verdicts if each.question == FORMATS]
    for each in judged:
        name, row = each.item, {"model": title, "method": method, "format": each.item}
        if (why := found.notes.get(f"formats/{name}")) is not None:
            yield row | {"comes_back": NOT_APPLICABLE, "why": why}
            continue
        for key, at in {
            "original": (ORIGINAL, name, "forget", "MC"),
            "stored": (UNLEARNED, "", "forget", "MC"),
            "in_format": (UNLEARNED, name, "forget", "MC"),
            "points": (UNLEARNED, name, "forget", "PTQ gap, MC"),
            "nats": (UNLEARNED, name, "forget", "PTQ gap, log-odds"),
        }.items():
            cells = table.loc[at]
            row |= {key: cells["value"]}
            if key in ("points", "nats"):
                row |= {f"{key}_low": cells["low"], f"{key}_high": cells["high"]}
        yield row | {"comes_back": BACK.get(each.verdict, each.verdict), "why": each.why}


def of_run(run: Path, methods: Sequence[str], chosen: Sequence[str], work: Path) -> Iterator[Row]:
    """Every edit of a run in every format; the original is asked once for all of them."""
    config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    model = mtl.load(config["model"])
    title = MODELS.get(config["model"], config["model"])
    (own,) = list(run.glob("task*.jsonl")) or [None]
    task = mtl.load_task(own or config["task"], tokenizer=model)
    # The verdict is about forgotten facts alone; a task has to keep some.
    asked = {name: rows for name, rows in task.questions.items() if name.startswith("forget") or name == "retain"}
    task = replace(task, questions=asked)
    listed = [name for name in formats() if not chosen or name in chosen]
    misfits = {name: why for name in listed if (why := misfit(model, name))}
    fitting = tuple(name for name in listed if name not in misfits)
    plan = AuditPlan(formats=fitting, only=("formats",))
    original = Subject(model, task, None)
    for method in [name for name in methods if (run / "edits" / name).is_dir()]:
        edited = Edit.load(run / "edits" / method / "edit.safetensors").apply(model)
        opened = OpenAudit(model, edited, task, plan=plan, out=work / title / method)
        opened.bench.original = original
        yield from rows_of(opened.run(), TITLES.get(method, method), title)
        for name, why in misfits.items():
            yield {"model": title, "method": TITLES.get(method, method), "format": name,
                   "comes_back": NOT_APPLICABLE, "why": why}  # fmt: skip


def table_of(runs: Sequence[Path], methods: Sequence[str], chosen: Sequence[str], work: Path) -> pd.DataFrame:
    """All runs' rows, in the order in which formats are listed."""
    rows = [row for run in runs for row in of_run(run, methods, chosen, work)]
    order = {name: i for i, name in enumerate(formats())}
    return pd.DataFrame(rows).sort_values("format", key=lambda names: names.map(order), kind="stable")


def by_format(table: pd.DataFrame) -> pd.DataFrame:
    """One row a format, one column a model and method: what the page shows."""
    cells = {(row.format, f"{row.method}, {row.model}"): _cell(row) for row in table.itertuples()}
    names, columns = ([*dict.fromkeys(key[i] for key in cells)] for i in range(2))
    columns.sort(key=lambda column: column.partition(", ")[2], reverse=True)
    rows = [[name, *(cells.get((name, column), "not measured") for column in columns)] for name in names]
    return pd.DataFrame(rows, columns=["format", *columns])


def _cell(row: Any) -> str:
    if row.comes_back == NOT_APPLICABLE:
        return NOT_APPLICABLE
    points = [f"{round(float(value)) + 0:d}" for value in (row.points, row.points_low, row.points_high)]
    # Adding nothing to a rounded number takes a minus off zero.
    nats = [f"{round(float(value), 1) + 0.0:.1f}" for value in (row.nats, row.nats_low, row.nats_high)]
    shown = (f"{value} [{low}, {high}] {unit}" for (value, low, high), unit in ((points, "points"), (nats, "nats")))
    return f"{row.comes_back}: {', '.join(shown)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/comes_back"), help="what is measured, to go on from")
    parser.add_argument("--methods", nargs="*", default=list(TITLES))
    parser.add_argument("--formats", nargs="*", default=[], help="all that somebody ships where not given")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    table = table_of(options.runs, options.methods, options.formats, options.work)
    table.to_csv(options.out, index=False, float_format="%.4f")
    print(by_format(table).to_string(index=False), flush=True)
    print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
