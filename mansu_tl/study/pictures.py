"""Which pictures there are, each drawn from files that are kept: a study's, a comparison's table, and two benchmarks'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

from mansu_tl import plots
from mansu_tl.circuit import Circuit, EdgeScores, FaithfulnessCurve
from mansu_tl.patching import PatchingResult
from mansu_tl.patching.nodes import NodeScores
from mansu_tl.plots.export import Drawing
from mansu_tl.quantization import UpdateStatistics, grid_of
from mansu_tl.quantization.statistics import predicted_flips
from mansu_tl.study.figures import figures as comparison_figures
from mansu_tl.study.kept import Kept
from mansu_tl.study.table import read_table
from mansu_tl.unlearning import MansuSettings
from mansu_tl.unlearning.registry import method_title
from mansu_tl.verification import Certificate, CircuitStages, ErasureDepth, Probes, Relearning, Scorecard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESULTS, TABLES, COMPARE = "results", "tables", "compare"
_RUN = "mansu-tl demo && mansu-tl figures --results runs/demo"
_COMPARE = "mansu-tl compare --full"
Draw = Callable[[str], Drawing]
_ALL_DRAWN, _DRAWN = 120, 80  # edges of a circuit that are all drawn; edges drawn of a larger one
_RETURNED = 0.5  # of CAD: a circuit that is back
_TEXTS = tomllib.loads(Path(__file__).with_name("pictures.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Attributes:
        name: of its file, without suffix.
        sentence: what it shows.
        source: the file or files it is drawn from, relative to the gallery.
        command: what made them.
        draw: the figure in a theme.
        heading, text: in a study's report; "" where it is not shown there.
    """

    name: str
    sentence: str
    source: str
    command: str
    draw: Draw
    heading: str = ""
    text: str = ""


def pictures(folder: Path) -> list[Picture]:
    """Every picture for which `folder` has the files: `results/` of a study, `tables/`, and `compare/`."""
    out: list[Picture] = []
    if (folder / RESULTS / "study.json").is_file():
        out += study_pictures(Kept(folder / RESULTS))
    out += list(_tables(folder / TABLES))
    if (folder / COMPARE / "measures.csv").is_file():
        out += list(_comparison(folder / COMPARE / "measures.csv"))
    return out


def study_pictures(kept: Kept) -> list[Picture]:
    """The pictures of a study whose files are there: not every task has a never-trained model."""
    out = []
    parts = [f"methods/{method}/cad_{name}.safetensors" for method in kept.shown for name in ("full", kept.first)]
    always = {"main": kept.main, "baseline": kept.baseline, "first": kept.first, "every_cad": ", ".join(parts)}
    for name, (listed, named, draw) in _draws(kept).items():
        about = _TEXTS[listed]
        files = about["source"].format(**always, **named).split(", ")
        if all(map(kept.has, files)):
            at = ", ".join(f"{RESULTS}/{file}" for file in files)
            out.append(
                Picture(name, about["sentence"], at, _RUN, draw, about.get("heading", ""), about.get("text", ""))
            )
    return out


def _draws(kept: Kept) -> dict[str, tuple[str, dict[str, str], Draw]]:
    """By name: the entry of `pictures.toml`, what else its source names, and the drawing."""
    title, model, main = kept.titles[kept.main], kept.facts["model"], kept.main
    cad, load = kept.divergence, kept.load

    def edges(name: str = "scores") -> EdgeScores:
        return load(EdgeScores, f"{name}.safetensors")

    def nodes(name: str) -> NodeScores:
        return load(NodeScores, f"{name}.safetensors")

    def sweep(name: str) -> PatchingResult:
        return load(PatchingResult, f"{name}.safetensors")

    def card(method: str) -> Scorecard:
        return load(Scorecard, f"methods/{method}/scorecard.safetensors")

    draws: dict[str, Draw] = {
        "ptq_gap": partial(_gap, kept),
        "circuit": lambda t: plots.circuit(kept.circuit(), title=f"The forget circuit of {model}", theme=t),
        "circuit_layers": lambda t: plots.circuit_layers(kept.circuit(), theme=t),
        "circuit_all": lambda t: plots.circuit(
            Circuit.top(edges(), int(edges().exists.sum())), title=f"Every edge of {model}", theme=t
        ),
        "circuit_stages": partial(_stages, kept),
        "edge_matrix": lambda t: plots.edge_matrix(edges(), theme=t),
        "node_scores": lambda t: plots.node_scores(nodes("nodes"), theme=t),
        "head_scores": lambda t: plots.head_scores(nodes("nodes"), theme=t),
        "token_scores": lambda t: plots.token_scores(
            edges("tokens"), list(kept.packed("attention.safetensors", "Attention")[1]["tokens"]), theme=t
        ),
        "attention": partial(_attention, kept),
        "patching": lambda t: plots.patching(sweep("patching"), theme=t),
        "patching_heads": lambda t: plots.patching(sweep("heads"), theme=t),
        "attribution_exact": lambda t: plots.attribution_scatter(nodes("nodes_linear"), sweep("heads"), theme=t),
        "faithfulness": lambda t: plots.faithfulness_curves(
            {(curve := load(FaithfulnessCurve, "curve.safetensors")).method: curve}, theme=t
        ),
        "ruler": partial(_ruler, kept),
        "bins_mansu": partial(_bins, kept, f"methods/{main}/updates.safetensors", title),
    }
    erasure: dict[str, Draw] = {
        "depths": lambda t: plots.cad_by_depth(kept.depths(), theme=t),
        "divergence": lambda t: plots.circuit_divergence(kept.divergences(), kept.references(), theme=t),
        "edges_before_after": lambda t: plots.divergence_scatter(
            cad(main, kept.first), title=f"Every edge of the circuit: {cad(main, kept.first).label}", theme=t
        ),
        "divergence_plane": partial(_plane, kept),
        "divergence_by_layer": lambda t: plots.divergence_by_layer(
            {each.label: each for method in kept.shown for each in (cad(method, ""), cad(method, kept.first))},
            title=_circuits_back(kept),
            theme=t,
        ),
        "relearning": lambda t: plots.relearning(
            load(Relearning, "relearning.safetensors"), chance=kept.facts["chance"], theme=t
        ),
        "probes": partial(_probes, kept),
        "erasure_depth": lambda t: plots.erasure_depth(load(ErasureDepth, "depth.safetensors"), theme=t),
        "scorecard": lambda t: plots.scorecard(card(main), theme=t),
        "scorecards": lambda t: plots.scorecard([card(method) for method in kept.titles], theme=t),
        "certificate": lambda t: plots.certificate(load(Certificate, f"methods/{main}/certificate.json"), theme=t),
    }
    first: dict[str, Any]
    last: dict[str, Any]
    first, last = ({name: (name, {}, draw) for name, draw in part.items()} for part in (draws, erasure))
    return first | _of_baseline(kept) | last


def _of_baseline(kept: Kept) -> dict[str, tuple[str, dict[str, str], Draw]]:
    """Where the updates of a method without a floor land, on every base."""
    if kept.baseline is None:
        return {}
    title, others = kept.titles[kept.baseline], kept.facts["also"]
    parts = {kept.facts["model"]: f"methods/{kept.baseline}/updates.safetensors"}
    parts |= {other: f"also/{other}/{kept.baseline}/updates.safetensors" for other in others}
    draws = {base: partial(_bins, kept, part, f"{title} on {base}") for base, part in parts.items()}
    labelled = {f"{title} on {base}": part for base, part in parts.items()}
    return {
        "bins_baseline": ("bins_baseline", {}, draws[kept.facts["model"]]),
        **{f"bins_{other}": ("bins_other", {"other": other}, draws[other]) for other in others},
        "dither": ("dither", {"every_baseline": ", ".join(parts.values())}, partial(_dither, kept, labelled)),
    }


def _bins(kept: Kept, part: str, title: str, theme: str) -> go.Figure:
    return plots.bins(kept.load(UpdateStatistics, part), title=f"Where the updates land: {title}", theme=theme)


def _dither(kept: Kept, parts: Mapping[str, str], theme: str) -> go.Figure:
    measured = {label: kept.load(UpdateStatistics, part) for label, part in parts.items()}
    return plots.dither({label: predicted_flips(each) for label, each in measured.items()}, measured, theme=theme)


def _ruler(kept: Kept, theme: str) -> go.Figure:
    tensors, facts = kept.packed("ruled.safetensors", "Ruled")
    name = f"{facts['name']}, its {len(tensors['before'])} most edited rows"
    return plots.ruler(tensors["before"], tensors["after"], grid_of(facts["grid"]), name=name, theme=theme)


def _gap(kept: Kept, theme: str) -> go.Figure:
    table = kept.value("summary.csv")
    rows = pd.DataFrame(
        {
            "method": [kept.titles.get(method, method) for method in table["method"]],
            "base": table["model"],
            "before": table["forget_MC"],
            "after": [row[f"forget_MC_{row['quantizer']}"] for _, row in table.iterrows()],
            "quantizer": table["quantizer"],
        }
    )
    return plots.ptq_gap(rows, chance=kept.facts["chance"], measure="forget multiple choice, %", theme=theme)


def _stages(kept: Kept, theme: str) -> go.Figure:
    """The leading method's circuit and the first other one's."""
    stages = {"edited": "", f"edited, then {kept.first}": kept.first}
    found = {
        kept.titles[method]: {stage: kept.divergence(method, name) for stage, name in stages.items()}
        for method in kept.shown
    }
    circuit = kept.circuit()
    few = None if circuit.n_edges <= _ALL_DRAWN else _DRAWN
    return plots.circuit_stages(circuit, found, strongest=few, title=_circuits_back(kept), theme=theme)


def _circuits_back(kept: Kept) -> str | None:
    """Whose circuit the first quantizer gives back, and whose it does not."""
    back = {
        kept.titles[method]: kept.divergence(method, "").value - kept.divergence(method, kept.first).value > _RETURNED
        for method in kept.shown
    }
    returned, gone = ([name for name, came in back.items() if came is which] for which in (True, False))
    if not returned or not gone:
        return None
    return f"With {kept.first} the circuit of {' and '.join(returned)} is back, that of {' and '.join(gone)} is not"


def _attention(kept: Kept, theme: str) -> go.Figure:
    tensors, facts = kept.packed("attention.safetensors", "Attention")
    frame = kept.circuit().to_dataframe()
    sent = frame.assign(size=frame["score"].abs()).groupby("writer")["size"].sum()
    heads = [name for name in sent.sort_values(ascending=False).index if "H" in name][:8]
    patterns = torch.stack([tensors[name[1:].partition("H")[0]][int(name.partition("H")[2])] for name in heads])
    return plots.attention_patterns(patterns, facts["tokens"], heads, theme=theme)


def _plane(kept: Kept, theme: str) -> go.Figure:
    table, rows = kept.value("summary.csv"), []
    for _, row in table.loc[table["model"] == kept.facts["model"]].iterrows():
        for name, key in (("", "forget_MC"), (row["quantizer"], f"forget_MC_{row['quantizer']}")):
            cad = kept.divergence(row["method"], name)
            rows.append((kept.titles[row["method"]], name, cad.value, row[key], *cad.interval))
    names = ["label", "quantizer", "cad", "accuracy", "cad_low", "cad_high"]
    return plots.divergence_plane(pd.DataFrame(rows, columns=names), theme=theme)


def _probes(kept: Kept, theme: str) -> go.Figure:
    names = iter(f"probes/{i}.safetensors" for i in range(9))
    probes = [kept.load(Probes, name) for name in names if kept.has(name)]
    reference = next((each.label for each in probes if each.label == "never trained"), None)
    return plots.probes(probes, reference=reference, theme=theme)


# What made the tables that no benchmark made.
_SCRIPTS = {
    "real_trials": "python scripts/real_evidence.py",
    "real_stages": (
        "make demo-real && python scripts/real_stages.py runs/demo-real --out figures/tables/real_stages.safetensors"
    ),
    "comes_back": (
        "make demo demo-real && python scripts/comes_back.py runs/demo runs/demo-real --out figures/tables/comes_back.csv"
    ),
    "real_cad_draws": "python scripts/real_evidence.py run OUT --by-depth",
    "real_cad": "make demo-real && python scripts/real_cad.py runs/demo-real --out figures/tables/real_cad.csv",
}
# What a file of results calls a model, a method and a form, and what a figure does.
_MODELS = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3"}
_RELATIONS = {"landmark_in_country": "landmarks", "person_native_language": "languages"}
_FORMS = {"stored": "as stored", "shipped": "in the file"}
_MOVED = 15.0  # points: settings that move no result by so much are not drawn
_RESISTANCE = "relearning excess at lr 1e-3, points"
_FORGET, _LOST = "forget MC, %", "kept sets, cloze points lost"


def _tables(folder: Path) -> Iterator[Picture]:
    for name, table, sentence, draw in (
        (
            "frontier", "frontier",
            "MANSU's defaults and their neighbours on the validation third of `pocket`'s questions, seed 0: resistance to "
            "relearning, with intervals over facts, against what held-out retention costs.", _frontier,
        ),
        (
            "sensitivity_attacker", "frontier",
            "What the settings that defend against relearning change, one at a time.", _attacker,
        ),
        ("sensitivity", "sensitivity", "What one setting of MANSU at a time changes.", _sensitivity),
        (
            "shipped", "real_trials",
            "A pretrained model (SmolLM2-135M) after unlearning, in full precision and in the GGUF file that it is shipped "
            "in; of every method's trials the one that forgot most in full precision.", _shipped,
        ),
        (
            "cad_by_depth", "real_cad",
            "How much of the answer's evidence each layer of SmolLM2-135M has lost after unlearning landmarks, as the "
            "original reads it, in full precision and in the GGUF file.", _cad_by_depth,
        ),
        (
            "cad_by_depth_draws", "real_cad_draws",
            "CAD by depth over draws of facts, of two relations and two models, in full precision and in the file.",
            _cad_by_depth_draws,
        ),
        (
            "grafting", "real_cad",
            "How many landmarks SmolLM2-135M still chooses after unlearning once the original's layers are put back behind "
            "one of them, in full precision and in the GGUF file.", _grafting,
        ),
        (
            "comes_back", "comes_back",
            "What every format that somebody ships brings back of the facts that four audited models forgot; the verdict is "
            "the audit's.", _comes_back,
        ),
    ):  # fmt: skip
        path = folder / f"{table}.csv"
        if path.is_file():
            made = f"python -m tests.benchmarks.{table} --out figures/{TABLES}/{table}.csv"
            made = _SCRIPTS.get(table, made)
            yield Picture(name, sentence, f"{TABLES}/{table}.csv", made, partial(_drawn_from, draw, path))

    path = folder / "real_stages.safetensors"
    if path.is_file():
        sentence = (
            "The circuit of 24 landmarks in SmolLM2-135M: original, edited, and shipped as Q4_1, after GradDiff and after "
            "MANSU, in one layout and scale; the strongest edges of the original, their scores recomputed in every model."
        )
        source = f"{TABLES}/{path.name}"
        yield Picture("circuit_stages_real", sentence, source, _SCRIPTS["real_stages"], partial(_real_stages, path))


def _real_stages(path: Path, theme: str) -> go.Figure:
    stages = CircuitStages.load(path)
    by = stages.to_dataframe().groupby("row", sort=False)["cad"]
    came_back = by.first() - by.last() > _RETURNED
    back, gone = (" and ".join(f"{row}'s" for row in by.first().index[came_back == which]) for which in (True, False))
    found = f"in the file {back} circuit is back, {gone} is not" if back and gone else "the circuit, edited and shipped"
    title = f"SmolLM2-135M: {found}"
    return plots.circuit_stages(stages, strongest=_DRAWN, title=title, theme=theme)


def _drawn_from(draw: Callable[[pd.DataFrame, str], go.Figure], path: Path, theme: str) -> go.Figure:
    return draw(pd.read_csv(path, dtype={"value": str}, keep_default_na=False), theme)


def _frontier(frame: pd.DataFrame, theme: str) -> go.Figure:
    values = frame["value"].str.removesuffix(".0").replace({"False": "off", "True": "on"})
    changed = frame["hyperparameter"] + " " + values
    frame = frame.assign(setting=changed.where(frame["hyperparameter"] != "default", "MANSU"))
    title = "Resistance against retention: the defaults and their neighbours"
    cost = "held-out retain cloze drop, points"
    return plots.frontier(frame, cost, _RESISTANCE, default="MANSU", title=title, theme=theme)


def _attacker(frame: pd.DataFrame, theme: str) -> go.Figure:
    tidy = frame.melt(["hyperparameter", "value"], [_RESISTANCE, _FORGET, _LOST], "measure", "result")
    return _one_at_a_time(tidy, MansuSettings(), "What the defence against relearning costs (pocket)", None, theme)


def _shipped(frame: pd.DataFrame, theme: str) -> go.Figure:
    """Before and after the file of each method's trial that forgot most."""
    keys = ["relation", "method", "learning_rate", "retain_weight", "near_share", "quantizer", "null_space"]
    asked = frame.loc[(frame["questions"] == "forget") & (frame["method"] != "original")]
    wide = asked.pivot(index=keys, columns="form", values="mc_percent").reset_index()
    best = wide.loc[wide.groupby(["relation", "method"], sort=False)["stored"].idxmin()]
    rows = pd.DataFrame(
        {
            "method": [method_title(name) for name in best["method"]],
            "relation": best["relation"].str.replace("_", " "),
            "quantizer": "the file",
            "before": best["stored"],
            "after": best["shipped"],
        }
    )
    title = "In the file that is shipped, every baseline's facts are back: SmolLM2-135M"
    measure = "forget multiple choice, %"
    return plots.ptq_gap(rows, panels="relation", chance=25.0, measure=measure, title=title, theme=theme)


def _cad_by_depth(frame: pd.DataFrame, theme: str) -> go.Figure:
    title = "MANSU erases before the fact is read, GradDiff cuts it off there, and the file gives it back: SmolLM2-135M"
    return plots.cad_by_depth(frame, title=title, theme=theme)


def _cad_by_depth_draws(frame: pd.DataFrame, theme: str) -> go.Figure:
    relation, draw = (frame["task"].str.rpartition("-")[i] for i in (0, 2))
    group = frame["model"].map(_MODELS) + ", " + relation.map(_RELATIONS)
    rows = frame.assign(
        group=group, draw=draw, form=frame["form"].map(_FORMS), method=frame["method"].map(method_title)
    )
    title = "In the file MANSU's edits are as they were, every baseline's facts are back, on every draw"
    return plots.cad_by_depth_draws(rows, title=title, theme=theme)


def _grafting(frame: pd.DataFrame, theme: str) -> go.Figure:
    title = "Out of MANSU's streams the original's later layers read nothing, out of GradDiff's file all: SmolLM2-135M"
    return plots.grafting(frame, chance=25.0, title=title, theme=theme)


def _comes_back(frame: pd.DataFrame, theme: str) -> go.Figure:
    """The finding: in how many of the formats that can be judged each method's facts are back."""
    cells = ["points", "points_low", "points_high"]
    frame = frame.assign(**{name: pd.to_numeric(frame[name], errors="coerce") for name in cells})
    judged = frame.loc[frame["comes_back"].isin(["yes", "no"])]
    back = judged["comes_back"].eq("yes").groupby(judged["method"], sort=False).agg(["sum", "size"])
    found = ", ".join(f"{row.Index}'s in {row.sum} of {row.size}" for row in back.itertuples())
    return plots.comes_back(frame, title=f"Facts that come back in a format, of those judged: {found}", theme=theme)


def _sensitivity(frame: pd.DataFrame, theme: str) -> go.Figure:
    """What is in percent; CAD and the edited share stay in the table, on another scale."""
    frame = frame.loc[frame["measure"].isin([_FORGET, _LOST])]
    found = frame.loc[frame["hyperparameter"] != "default"]
    title = (
        f"The settings that move a result by {_MOVED:g} points or more, of {found['hyperparameter'].nunique()} (pocket)"
    )
    return _one_at_a_time(frame, MansuSettings.light(), title, 30.0, theme, _MOVED)


def _one_at_a_time(
    frame: pd.DataFrame, settings: MansuSettings, title: str, bound: float | None, theme: str, least: float = 0.0
) -> go.Figure:
    """Every hyperparameter's panel gets the default's own result."""
    varied = frame.loc[frame["hyperparameter"] != "default"]
    base = frame.loc[frame["hyperparameter"] == "default"]
    defaults = {str(name): _number(str(getattr(settings, str(name)))) for name in varied["hyperparameter"].unique()}
    varied = varied.assign(value=varied["value"].map(_number))
    rows = [base.assign(hyperparameter=name, value=value) for name, value in defaults.items()]
    table = pd.concat([varied, *rows], ignore_index=True)
    table["order"] = pd.to_numeric(table["value"], errors="coerce")
    table = table.sort_values(["hyperparameter", "order"], kind="stable")
    return plots.sensitivity(table, defaults=defaults, bound=bound, least=least, title=title, theme=theme)


def _number(value: str) -> float | str:
    """A number to scale; a switch in words."""
    return {"True": "on", "False": "off"}.get(value) or float(value)


_COMPARED = {
    "gaps": "Forget accuracy before and after each quantizer, by method, over seeds.",
    "quantizers": "MANSU's forget accuracy before and after every quantizer, over seeds.",
    "plane": "Forget accuracy against CAD, by method, in full precision and quantized; the silent ones larger beside.",
    "frontier": "Resistance to relearning against what retention costs, by method.",
    "ablations": "MANSU with one part changed: resistance and forgetting against what retention costs, intervals over seeds.",
    "methods": "All methods and controls against all properties, means over seeds, and how many are within their bounds; "
    "intervals are in [`tables.md`](compare/tables.md).",
    "parts": "The same of MANSU with one part changed.",
}


def _comparison(path: Path) -> Iterator[Picture]:
    table, drawn = read_table(path), dict[str, dict[str, Drawing]]()

    def draw(name: str, theme: str) -> Drawing:
        if theme not in drawn:
            drawn[theme] = comparison_figures(table, theme=theme)
        return drawn[theme][name]

    draw_first = comparison_figures(table)
    drawn["light"] = draw_first
    for name in draw_first:
        sentence = _COMPARED[name.rpartition("_")[2]]
        yield Picture(f"compare_{name}", sentence, f"{COMPARE}/{path.name}", _COMPARE, partial(draw, name))
