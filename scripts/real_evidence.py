"""Evidence on a pretrained model: MANSU against baselines of as many trials, chosen on other facts than they are judged on.

    python scripts/real_evidence.py tasks OUT --relation FILE --relation FILE --far FILE --far FILE
    python scripts/real_evidence.py run OUT --device cuda --workers 6      goes on where it stopped
    python scripts/real_evidence.py run OUT --trials figures/tables/real_trials.csv   chooses from trials that were run
    python scripts/real_evidence.py run OUT --by-depth                     reads every edit of a test task by depth too
    python scripts/real_evidence.py table OUT      OUT/real_trials.csv, OUT/real_test.csv and OUT/real_cad_draws.csv

Facts are split three ways. Those of the task "validation" choose each method's settings and are in no other task. Those of
the tasks 0, 1, 2 (drawn from what is left, a seed each) are unlearned with the settings chosen and reported. Of the near
facts of every task a part is trained on and a part is only asked; those are the near facts of CAD by depth. Relations are
files as LRE has them (arXiv 2308.09124).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from importlib import resources
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch

import mansu_tl as mtl
from mansu_tl.building import Relation, build_task
from mansu_tl.circuit import Circuit
from mansu_tl.data import PromptPairs, Questions
from mansu_tl.study.shipping import ship
from mansu_tl.unlearning.registry import settings_of
from mansu_tl.verification import DepthReader, ask

PARTS = ("validation", "0", "1", "2")
FORGET, NEAR, KEPT_BACK, FAR = 24, 60, 40, 20
# Wordings that no method sees, beside those of the relation's file.
OTHER = {
    "landmark in country": "The country where {} is found is",
    "person native language": "The mother tongue of {} is",
}
GRIDS = ("nf4", "gguf-q4_0", "int4-g64")
TRIALS: dict[str, list[dict[str, Any]]] = {
    "mansu-closed": [
        {"quantizer": "+".join(("gguf", *GRIDS)), "null_space": 20.0},
        {"quantizer": "+".join(("gguf", *GRIDS)), "null_space": 50.0},
        {"quantizer": "+".join(("gguf", *GRIDS)), "null_space": 120.0},
        {"quantizer": "gguf", "null_space": 50.0},
    ],
    **{
        name: [
            {"learning_rate": 1e-5, "retain_weight": 1.0, "near_share": 0.25},
            {"learning_rate": 3e-5, "retain_weight": 1.0, "near_share": 0.25},
            {"learning_rate": 3e-5, "retain_weight": 5.0, "near_share": 0.5},
            {"learning_rate": 1e-5, "retain_weight": 30.0, "near_share": 0.5},
        ]
        for name in ("graddiff", "npo", "simnpo", "rmu")
    },
}  # fmt: skip
# By what the settings are chosen: what the method leaves of what is to go and takes of what is to stay, in both forms.
CHOSEN_IN = ("stored", "shipped")
TO_GO, TO_STAY = ("forget", "forget, other words"), ("near, kept back",)
SETTINGS = ("learning_rate", "retain_weight", "near_share", "quantizer", "null_space")


def tasks(options: argparse.Namespace) -> None:
    """Write the tasks of every relation."""
    options.out.mkdir(parents=True, exist_ok=True)
    model = mtl.load(options.model, device=options.device)
    openings = json.loads((resources.files("mansu_tl.data") / "facts" / "openings.json").read_text(encoding="utf-8"))
    text = [f"{a} {b[0]}".rstrip() for a, b in zip(openings, ask(model, openings, new_tokens=48).answers, strict=True)]
    far = [Relation.read(path) for path in options.far]
    for path in options.relation:
        relation, taken = Relation.read(path), frozenset[str]()
        for part in PARTS:
            left = replace(relation, facts=tuple(fact for fact in relation.facts if fact[0] not in taken))
            built = build_task(
                model, left, far, facts=FORGET, near=NEAR + KEPT_BACK, far_facts=FAR, text=text,
                seed=0 if part == "validation" else int(part),
            )  # fmt: skip
            rows = built.rows()
            near = list(dict.fromkeys(row["fact"] for row in rows if row["set"] == "near"))
            # A relation of which fewer near facts are known keeps the same share of them back.
            back = set(near[round(len(near) * NEAR / (NEAR + KEPT_BACK)) :])
            for row in rows:
                # Held out are not only wordings: of these facts no wording is trained on.
                row["held_out"] = row.get("held_out", False) or row.get("fact") in back
            if part == "validation":
                used = [i for i, kind in enumerate(built.used_as) if kind in ("forget", "near")]
                taken = frozenset(built.subject[i] for i in used)
            place = options.out / f"{path.stem}-{part}.json"
            place.write_text(json.dumps({"rows": rows, "kept_back": sorted(back), "relation": relation.name}))
            print(place, built, flush=True)


def read(place: Path, model: Any, device: str) -> tuple[Any, dict[str, Questions]]:
    """A task, and what is asked of it."""
    found = json.loads(place.read_text())
    rows = [{k: v for k, v in row.items() if k != "held_out" or row["set"] != "text"} for row in found["rows"]]
    task = mtl.load_task(rows, tokenizer=model, name=place.stem)
    back, asked = set(found["kept_back"]), {}
    for kind, questions in task.questions.items():
        for name, wanted in ((kind, False), ("near, kept back", True)):
            at = [i for i, fact in enumerate(questions.facts) if (fact in back) == wanted]
            if at and name not in asked:
                asked[name] = questions[at]
    wording = OTHER.get(found["relation"])
    for kind in ("forget", "near") if wording else ():
        own = [row for row in rows if row["set"] == kind and not row["held_out"]]
        start = own[0]["clean"].index(own[0]["fact"].split(": ", 1)[1])
        assert start == 0, own[0]
        subjects = [row["fact"].split(": ", 1)[1] for row in own]
        more = [
            {**row, "clean": wording.format(name), "corrupt": None, "subject": name, "corruption": "zero"}
            for row, name in zip(own, subjects, strict=True)
        ]
        asked[f"{kind}, other words"] = _asked(model, more)
    return task, asked


def _asked(model: Any, rows: list[dict[str, Any]]) -> Questions:
    pairs = mtl.data.PromptPairs.from_text(
        model, [row["clean"] for row in rows], None, [row["answer"] for row in rows], [row["distractors"] for row in rows],
        subjects=[row["subject"] for row in rows], corruption="zero", facts=[row["fact"] for row in rows],
    )  # fmt: skip
    return Questions.of_pairs(pairs)


def near_of(model: Any, place: Path) -> PromptPairs:
    """The near facts that were kept back, each in its first wording."""
    found = json.loads(place.read_text())
    back, rows = set(found["kept_back"]), dict[str, dict[str, Any]]()
    for row in found["rows"]:
        if row["set"] == "near" and row["fact"] in back:
            rows.setdefault(row["fact"], row)
    return PromptPairs.from_text(
        model, [row["clean"] for row in rows.values()], [row["corrupt"] for row in rows.values()],
        [row["answer"] for row in rows.values()], [row["distractors"] for row in rows.values()], facts=list(rows),
    )  # fmt: skip


def by_depth(model: Any, task: Any, place: Path, forms: dict[str, Any]) -> dict[str, Any]:
    """CAD by depth of an edit, as stored and in the file."""
    if place.stem != _HERE.get("read"):
        _HERE.update(read=place.stem, reader=DepthReader(model, task.forget_pairs, near_of(model, place)))
    out = {}
    for form in CHOSEN_IN:
        found = _HERE["reader"].read(forms[form], label=form)
        rows = found.to_dataframe().drop(columns=["label", "near_cad_low", "near_cad_high"])
        rows["judged"] = [i == found.judged for i in range(len(found.layers))]
        out[form] = {
            "layers": rows.to_dict("list"),
            "verdict": found.verdict().name,
            "why": found.verdict().why,
            "facts_gone": float(found.facts_gone),
            "opposition": float(found.opposition),
        }
    return out


_HERE: dict[str, Any] = {}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One circuit, or one edit in every form, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    start, out, device = time.monotonic(), Path(job["out"]), job["device"]
    if "model" not in _HERE:
        _HERE["model"] = mtl.load(job["model"], device=device)
    model, name = _HERE["model"], job["task"]
    task, asked = read(out / f"{name}.json", model, device)
    place = out / f"{name}.circuit.safetensors"
    if job["method"] == "circuit":
        circuit = mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.85)
        circuit.save(place)
        return {**job, "edges": circuit.n_edges, "seconds": time.monotonic() - start}
    facts: dict[str, Any] = {}
    edited = model
    if job["method"] != "original":
        short = {} if job["method"] == "mansu-closed" else {"max_steps": 60, "check_every": 2, "retain_batch": 16}
        settings = settings_of(job["method"], {**short, **job["settings"]})
        more = {"circuit": Circuit.load(place)} if job["method"] == "mansu-closed" else {}
        edit = mtl.unlearn(model, task, job["method"], settings=settings, seed=job["seed"], **more)
        facts = {"edit seconds": time.monotonic() - start, "weights": edit.n_weights}
        edited = edit.apply(model)
    forms = {"stored": edited}
    scores = {}
    if job["method"] != "original":
        with tempfile.TemporaryDirectory() as folder:
            file = ship(edit, model, Path(folder, "model.gguf"))
            forms["shipped"] = mtl.load(file, tokenizer=model.tokenizer, device=device)
    for form in job["forms"]:
        if form not in forms and form != "shipped":
            forms[form] = mtl.quantize(edited, form)
    for form, one in forms.items():
        kinds = asked if form in CHOSEN_IN else (*TO_GO, *TO_STAY)
        found = {kind: mtl.accuracy(one, asked[kind]) for kind in kinds if kind in asked}
        scores[form] = {
            kind: {
                "mc": each.multiple_choice.int().tolist(),
                "cloze": each.cloze.int().tolist(),
                "log_odds": [round(x, 4) for x in each.log_odds.tolist()],
            }
            for kind, each in found.items()
        }
    if job["by_depth"] and "shipped" in forms and not name.endswith("validation"):
        facts["by depth"] = by_depth(model, task, out / f"{name}.json", forms)
    return {**job, **facts, "scores": scores, "seconds": time.monotonic() - start}


def mean(scores: dict[str, Any], form: str, kind: str, what: str) -> float:
    """The mean of one score."""
    values = scores[form][kind][what]
    return sum(values) / len(values)


def regret(trial: pd.DataFrame, original: pd.DataFrame) -> float:
    """The mean share left of what is to go plus the mean share lost of what is to stay, over forms and scores.

    Shares of what the original has above chance; a score of which it has nothing is left out.
    """
    before, left, lost = original[original.form == "stored"].set_index("questions"), [], []
    for one in trial.itertuples():
        for what, chance in (("mc_percent", 25.0), ("cloze_percent", 0.0)):
            known = float(before.loc[one.questions, what]) - chance
            if known > 0:
                share = max(0.0, float(getattr(one, what)) - chance) / known
                (lost if one.questions in TO_STAY else left).append(
                    max(0.0, 1 - share) if one.questions in TO_STAY else share
                )
    return sum(left) / len(left) + sum(lost) / len(lost)


def run(options: argparse.Namespace) -> None:
    """Circuits, trials on validation, then what was chosen on every test task; each result is one line of results.jsonl."""
    results = options.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = pd.read_csv(options.trials, dtype=str).fillna("") if options.trials else pd.DataFrame()
    names = sorted(place.stem for place in options.out.glob("*.json") if place.stem.rsplit("-", 1)[-1] in PARTS)
    if options.relations:
        names = [name for name in names if name.rsplit("-", 1)[0] in options.relations]
    end = time.monotonic() + options.seconds
    common = {
        "out": str(options.out), "device": options.device, "threads": options.threads, "model": options.model, "settings": {},
        "by_depth": options.by_depth,
    }  # fmt: skip
    keys = ("task", "method", "settings", "seed")
    started = {json.dumps([one[key] for key in keys], sort_keys=True) for one in done}
    for one in known.to_dict("records"):
        if one["method"] in ("original", *TRIALS):
            job = [f"{one['relation']}-validation", one["method"], settings_in(one), 0]
            started.add(json.dumps(job, sort_keys=True))

    def jobs() -> list[dict[str, Any]]:
        """What can be started, the most wanted first."""
        found = []
        circuits = {place.name.split(".")[0] for place in options.out.glob("*.circuit.safetensors")}
        table = pd.concat([known, validation(done)])
        for name in sorted(names, key=lambda name: PARTS.index(name.rsplit("-", 1)[-1])):
            relation, part = name.rsplit("-", 1)
            found.append({**common, "task": name, "method": "circuit", "seed": 0, "forms": []})
            found.append({**common, "task": name, "method": "original", "seed": 0, "forms": GRIDS})
            for method, trials in TRIALS.items():
                if method == "mansu-closed" and name not in circuits:
                    continue
                seed, forms = (0, ()) if part == "validation" else (int(part), GRIDS)
                if part == "validation":
                    chosen = [] if method in options.chosen else trials
                else:
                    best = options.chosen.get(method) or choose(table, relation, method)
                    chosen = [] if best is None else [best]
                found += [
                    {**common, "task": name, "method": method, "settings": one, "seed": seed, "forms": forms}
                    for one in chosen
                ]
        # What others wait for comes first, then one test task after another.
        found.sort(key=lambda job: (job["method"] != "circuit", PARTS.index(job["task"].rsplit("-", 1)[-1])))
        wanted = [job for job in found if not options.methods or job["method"] in options.methods]
        return [job for job in wanted if json.dumps([job[key] for key in keys], sort_keys=True) not in started]

    def left() -> list[dict[str, Any]]:
        return jobs() if time.monotonic() < end else []

    for found in pooled(
        work,
        left,
        lambda job: json.dumps([job[key] for key in keys], sort_keys=True),
        started,
        options.workers,
        results,
    ):
        done.append(found)
        line = {
            k: v
            for k, v in found.items()
            if k in ("task", "method", "settings", "edges", "weights", "edit seconds", "seconds")
        }
        scores = found.get("scores", {})
        if scores:
            line |= {
                f"{kind} {form}": "/".join(f"{100 * mean(scores, form, kind, what):.0f}" for what in ("mc", "cloze"))
                for form in scores
                for kind in ("forget", "forget, other words", "near, kept back")
                if kind in scores[form]
            }  # fmt: skip
        print(f"{time.monotonic() - end + options.seconds:6.1f}", json.dumps(line), flush=True)


def pooled(
    one: Callable[[dict[str, Any]], dict[str, Any]],
    left: Callable[[], list[dict[str, Any]]],
    key: Callable[[dict[str, Any]], str],
    started: set[str],
    workers: int,
    results: Path,
) -> Iterator[dict[str, Any]]:
    """Run jobs in processes of their own; each result is a line of a file, then given back. One that fails is told.

    Args:
        one: runs a job.
        left: what can be started now, the most wanted first; asked again after every result.
        key: by what a job is known.
        started: the keys of those that were started before; grows.
        results: where results are added.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, results.open("a") as file:
        running: dict[Any, dict[str, Any]] = {}
        while True:
            for job in left()[: workers - len(running)]:
                started.add(key(job))
                running[pool.submit(one, job)] = job
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                try:
                    found = future.result()
                except Exception as error:
                    print("failed", key(job), repr(error)[:300], flush=True)
                    traceback.print_exception(error, limit=-3)
                    continue
                file.write(json.dumps(found) + "\n")
                file.flush()
                yield found


def choose(trials: pd.DataFrame, relation: str, method: str) -> dict[str, Any] | None:
    """The trial of least regret on a relation's validation task, once all its trials are there."""
    here = trials[(trials.relation == relation) & trials.questions.isin([*TO_GO, *TO_STAY])]
    original = here[here.method == "original"]
    found = [
        (settings_in(one.iloc[0].to_dict()), one) for _, one in here[here.method == method].groupby(list(SETTINGS))
    ]
    if len(found) < len(TRIALS[method]) or not len(original):
        return None
    return min(found, key=lambda each: regret(each[1], original))[0]


def settings_in(row: dict[str, Any]) -> dict[str, Any]:
    """The settings that a row of the table of trials names."""
    named = {name: row[name] for name in SETTINGS if row[name] != ""}
    return {name: value if name == "quantizer" else float(value) for name, value in named.items()}


def validation(done: list[dict[str, Any]]) -> pd.DataFrame:
    """The trials on validation as a tidy table, in percent."""
    rows = []
    for one in done:
        relation, part = one["task"].rsplit("-", 1)
        for form, kind in product(one.get("scores", {}), (*TO_GO, *TO_STAY)):
            if part == "validation" and form in CHOSEN_IN and kind in one["scores"][form]:
                found = {what: f"{100 * mean(one['scores'], form, kind, what):.0f}" for what in ("mc", "cloze")}
                settings = {name: str(one["settings"].get(name, "")) for name in SETTINGS}
                rows.append(
                    {"relation": relation, "method": one["method"], **settings, "form": form, "questions": kind,
                     "mc_percent": found["mc"], "cloze_percent": found["cloze"], "weights": str(one.get("weights", "")),
                     "edit_seconds": str(round(one["edit seconds"], 1)) if "edit seconds" in one else ""}
                )  # fmt: skip
    columns = (
        "relation",
        "method",
        *SETTINGS,
        "form",
        "questions",
        "mc_percent",
        "cloze_percent",
        "weights",
        "edit_seconds",
    )
    return pd.DataFrame(rows, columns=columns)


def test(done: list[dict[str, Any]]) -> pd.DataFrame:
    """What was chosen, on the test tasks: every score of every form by seed, in percent, log-odds as means in nats."""
    rows = []
    for one in done:
        relation, part = one["task"].rsplit("-", 1)
        if part == "validation":
            continue
        for form, kinds in one.get("scores", {}).items():
            for kind in kinds:
                settings = {name: str(one["settings"].get(name, "")) for name in SETTINGS}
                found = {what: mean(one["scores"], form, kind, what) for what in ("mc", "cloze", "log_odds")}
                rows.append(
                    {"relation": relation, "seed": part, "method": one["method"], **settings, "form": form,
                     "questions": kind, "asked": len(kinds[kind]["mc"]), "mc_percent": f"{100 * found['mc']:.1f}",
                     "cloze_percent": f"{100 * found['cloze']:.1f}", "log_odds": f"{found['log_odds']:.3f}",
                     "weights": str(one.get("weights", ""))}
                )  # fmt: skip
    return pd.DataFrame(rows)


def depths(done: list[dict[str, Any]]) -> pd.DataFrame:
    """CAD by depth of every edit that was read: a row a layer and form. What decides stands in the judged layer's alone."""
    parts = [
        pd.DataFrame(read["layers"]).assign(
            model=one["model"], task=one["task"], method=one["method"], form=form,
            **{name: read[name] for name in ("verdict", "facts_gone", "opposition")},
        )
        for one in done
        for form, read in one.get("by depth", {}).items()
    ]  # fmt: skip
    if not parts:
        return pd.DataFrame()
    found = pd.concat(parts, ignore_index=True)
    decides = ["specificity", "specificity_low", "specificity_high", "verdict", "facts_gone", "opposition"]
    found[decides] = found[decides].where(found["judged"])
    return found


def table(options: argparse.Namespace) -> None:
    """The tables, from what has been run."""
    done = [json.loads(line) for line in (options.out / "results.jsonl").read_text().splitlines()]
    known = pd.read_csv(options.trials, dtype=str).fillna("") if options.trials else None
    pd.concat([known, validation(done)]).drop_duplicates().to_csv(options.out / "real_trials.csv", index=False)
    test(done).to_csv(options.out / "real_test.csv", index=False)
    if len(read := depths(done)):
        read.to_csv(options.out / "real_cad_draws.csv", index=False, float_format=_short)


def _short(value: float) -> str:
    """Three decimals, without zeros behind them."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _chosen(text: str) -> tuple[str, dict[str, Any]]:
    method, _, settings = text.partition("=")
    return method, json.loads(settings)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tasks", "run", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--relation", type=Path, action="append", default=[])
    parser.add_argument("--far", type=Path, action="append", default=[])
    parser.add_argument("--relations", action="append", default=[], help="only these, by file name without .json")
    parser.add_argument(
        "--methods", action="append", default=[], help="only these, and circuit and original as methods"
    )
    parser.add_argument("--trials", type=Path, help="a real_trials.csv of trials that were run before")
    parser.add_argument(
        "--chosen", type=_chosen, action="append", default=[], metavar="METHOD=JSON", help="settings chosen elsewhere"
    )
    parser.add_argument("--by-depth", action="store_true", help="read every edit of a test task by depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so many")
    options = parser.parse_args()
    options.chosen = dict(options.chosen)
    {"tasks": tasks, "run": run, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
