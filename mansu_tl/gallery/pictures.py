"""Which pictures the gallery has, each drawn from files that are kept beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

from mansu_tl import plots
from mansu_tl.circuit import Circuit, EdgeScores, FaithfulnessCurve
from mansu_tl.comparison import figures as comparison_figures
from mansu_tl.patching import PatchingResult
from mansu_tl.patching.nodes import NodeScores
from mansu_tl.quantization import UpdateStatistics, grid_of
from mansu_tl.quantization.statistics import predicted_flips
from mansu_tl.results.files import read_packed
from mansu_tl.unlearning import MansuSettings, headline
from mansu_tl.verification import Bounds, Certificate, Divergence, ErasureDepth, Probes, Relearning, Scorecard

RESULTS, TABLES, COMPARE = "results", "tables", "compare"
_RUN = "mansu-tl demo && mansu-tl figures --results runs/demo"
_COMPARE = "mansu-tl compare --full"


@dataclass(frozen=True)
class Picture:
    """One picture of the gallery.

    Attributes:
        name: of its file, without suffix.
        sentence: what it shows.
        source: the file or files it is drawn from, relative to the gallery.
        command: what made them.
        draw: the figure in a theme.
    """

    name: str
    sentence: str
    source: str
    command: str
    draw: Callable[[str], go.Figure]


def pictures(folder: Path) -> list[Picture]:
    """Every picture for which `folder` has the files: `results/` of a study, `tables/`, and `compare/`."""
    out: list[Picture] = []
    if (folder / RESULTS / "study.json").is_file():
        out += list(_Study(folder / RESULTS).pictures())
    out += list(_tables(folder / TABLES))
    if (folder / COMPARE / "measures.csv").is_file():
        out += list(_comparison(folder / COMPARE / "measures.csv"))
    return out


class _Study:
    """Pictures of one study's results; each reads its own files when it is drawn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        self.titles: dict[str, str] = self.facts["methods"]
        self.first: str = self.facts["quantizers"][0]
        self.chance: float = self.facts["chance"]
        self.mansu = headline(self.titles)
        self.baseline = next((m for m in self.titles if m != self.mansu), None)

    def pictures(self) -> Iterator[Picture]:
        for name, source, sentence, draw in self._all():
            # The pictures of a study are those whose files it has: not every task has a never-trained model.
            if all((self.folder / part).exists() for part in source.split(", ")):
                at = ", ".join(f"{RESULTS}/{part}" for part in source.split(", "))
                yield Picture(name, sentence, at, _RUN, draw)

    def _all(self) -> Iterator[tuple[str, str, str, Callable[[str], go.Figure]]]:
        mine = f"methods/{self.mansu}"
        yield (
            "ptq_gap", "summary.csv",
            "Forget accuracy of every method before (ring) and after (filled) quantization: a mark that moves right is "
            "knowledge that came back.", self._gap,
        )  # fmt: skip
        yield (
            "circuit", "circuit.safetensors",
            "The forget circuit: the smallest top-n set of edges that reproduces the target share of the logit difference.",
            lambda t: plots.circuit(self._circuit(), title=f"The forget circuit of {self.facts['model']}", theme=t),
        )  # fmt: skip
        yield (
            "circuit_layers", "circuit.safetensors",
            "The same circuit, its heads added up layer by layer: the road of the knowledge at a glance.",
            lambda t: plots.circuit_layers(self._circuit(), theme=t),
        )  # fmt: skip
        yield (
            "circuit_all", "scores.safetensors",
            "Every edge of the model: the 60 strongest stand out, the others are a faint layer bundled by where they go.",
            lambda t: plots.circuit(self._everything(), title=f"Every edge of {self.facts['model']}", theme=t),
        )  # fmt: skip
        yield (
            "circuit_stages", f"circuit.safetensors, {mine}/cad_full.safetensors, {mine}/cad_{self.first}.safetensors",
            "The circuit's edges in the original, after the edit, and after the edit and quantization, on one scale.",
            self._stages,
        )  # fmt: skip
        yield (
            "edge_matrix", "scores.safetensors",
            "The score of every edge that exists, writers upward, readers across; the circuit is a selection of these.",
            lambda t: plots.edge_matrix(EdgeScores.load(self.folder / "scores.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "node_scores", "nodes.safetensors", "What each head and MLP is worth to the answer.",
            lambda t: plots.node_scores(NodeScores.load(self.folder / "nodes.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "head_scores", "nodes.safetensors", "The same by layer and head.",
            lambda t: plots.head_scores(NodeScores.load(self.folder / "nodes.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "token_scores", "tokens.safetensors, attention.safetensors",
            "Where in the prompt the answer is carried: scores of the strongest nodes over the prompt's own tokens.",
            lambda t: plots.token_scores(EdgeScores.load(self.folder / "tokens.safetensors"), self._tokens(), theme=t),
        )  # fmt: skip
        yield (
            "attention", "attention.safetensors, circuit.safetensors",
            "What the circuit's heads look at in one prompt.", self._attention,
        )  # fmt: skip
        yield (
            "patching", "patching.safetensors",
            "Exact activation patching of the residual stream by layer and position: where the knowledge enters.",
            lambda t: plots.patching(PatchingResult.load(self.folder / "patching.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "patching_heads", "heads.safetensors", "Exact activation patching of every head's output.",
            lambda t: plots.patching(PatchingResult.load(self.folder / "heads.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "attribution_exact", "nodes_linear.safetensors, heads.safetensors",
            "The linear estimate of every head's effect (attribution patching) against the exact one.", self._scatter,
        )  # fmt: skip
        yield (
            "faithfulness", "curve.safetensors",
            "Faithfulness of circuits of growing size, measured by exact edge patching, beside random circuits.",
            self._faithfulness,
        )  # fmt: skip
        yield (
            "ruler", "ruled.safetensors",
            "The weights of one quantization block on the quantizer's codes, before and after the edit (a slider steps on).",
            self._ruler,
        )  # fmt: skip
        yield from self._updates()
        yield from self._erasure(mine)

    def _updates(self) -> Iterator[tuple[str, str, str, Callable[[str], go.Figure]]]:
        yield (
            "bins_mansu", f"methods/{self.mansu}/updates.safetensors",
            "Where weights rest inside their bins, and the size of the edit's updates in bins: every edited weight crosses.",
            partial(self._bins, f"methods/{self.mansu}", self.titles[self.mansu]),
        )  # fmt: skip
        if self.baseline is None:
            return
        title, models = self.titles[self.baseline], [self.facts["model"], *self.facts["also"]]
        yield (
            "bins_baseline", f"methods/{self.baseline}/updates.safetensors",
            "The same for a gradient baseline on the same base: updates far smaller than a bin are rounded away.",
            partial(self._bins, f"methods/{self.baseline}", f"{title} on {models[0]}"),
        )  # fmt: skip
        parts = [f"methods/{self.baseline}/updates.safetensors"]
        for other in self.facts["also"]:
            parts.append(f"also/{other}/{self.baseline}/updates.safetensors")
            yield (
                f"bins_{other}", parts[-1],
                "The same baseline on another base: where weights lie anywhere in their bins, rounding works as dither.",
                partial(self._bins, f"also/{other}/{self.baseline}", f"{title} on {other}"),
            )  # fmt: skip
        yield (
            "dither", ", ".join(parts),
            "Share of codes that change against the size of the update, predicted from where the weights rest and measured.",
            lambda t: self._dither(dict(zip([f"{title} on {m}" for m in models], parts, strict=True)), t),
        )  # fmt: skip

    def _erasure(self, mine: str) -> Iterator[tuple[str, str, str, Callable[[str], go.Figure]]]:
        yield (
            "divergence", "methods, references",
            "CAD of every method in full precision and quantized, with intervals over facts and references (hatched).",
            lambda t: plots.circuit_divergence(
                self._divergences(), self._references(), bound=Bounds().divergence, theme=t
            ),
        )  # fmt: skip
        yield (
            "edges_before_after", f"{mine}/cad_{self.first}.safetensors",
            "Every edge of the circuit, its score in the original across and in the edited, quantized model up.",
            self._before_after,
        )  # fmt: skip
        yield (
            "divergence_plane", "summary.csv, methods",
            "Forget accuracy against CAD: retained, suppressed, erased or damaged; arrows lead from full precision to NF4.",
            self._plane,
        )  # fmt: skip
        yield (
            "divergence_by_layer", f"{mine}/cad_full.safetensors, {mine}/cad_{self.first}.safetensors",
            "Which layers CAD comes from.",
            lambda t: plots.divergence_by_layer(
                {d.label: d for d in (self._cad(self.mansu, ""), self._cad(self.mansu, self.first))}, theme=t
            ),
        )  # fmt: skip
        yield (
            "relearning", "relearning.safetensors",
            "Fine-tuning on twelve of the facts: how much of the others comes back, beside a model that never knew them.",
            lambda t: plots.relearning(Relearning.load(self.folder / "relearning.safetensors"), chance=self.chance, theme=t),
        )  # fmt: skip
        yield (
            "probes", "probes", "Linear probes for the answer, layer by layer, against shuffled labels.", self._probes,
        )  # fmt: skip
        yield (
            "erasure_depth", "depth.safetensors",
            "Streams of the edited and the never-trained model patched into the original: where the fact is still written.",
            lambda t: plots.erasure_depth(ErasureDepth.load(self.folder / "depth.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "scorecard", f"{mine}/scorecard.safetensors", "The four properties at once, each row with its bound and control.",
            lambda t: plots.scorecard(Scorecard.load(self.folder / mine / "scorecard.safetensors"), theme=t),
        )  # fmt: skip
        yield (
            "scorecards", "methods", "The scorecards of all methods side by side.",
            lambda t: plots.scorecard(
                [Scorecard.load(self.folder / f"methods/{m}/scorecard.safetensors") for m in self.titles], theme=t
            ),
        )  # fmt: skip
        yield (
            "certificate", f"{mine}/certificate.json", "The certificate, recomputed by bitsandbytes from the saved folders.",
            lambda t: plots.certificate(Certificate.load(self.folder / mine / "certificate.json"), theme=t),
        )  # fmt: skip

    def _circuit(self) -> Circuit:
        return Circuit.load(self.folder / "circuit.safetensors")

    def _everything(self) -> Circuit:
        scores = EdgeScores.load(self.folder / "scores.safetensors")
        return Circuit.top(scores, int(scores.exists.sum()))

    def _cad(self, method: str, quantizer: str) -> Divergence:
        return Divergence.load(self.folder / f"methods/{method}/cad_{quantizer or 'full'}.safetensors")

    def _divergences(self) -> dict[str, Divergence]:
        quantizers = ("", *self.facts["quantizers"])
        return {
            f"{title}, {q or 'full precision'}": self._cad(m, q) for m, title in self.titles.items() for q in quantizers
        }

    def _references(self) -> dict[str, Divergence]:
        names = enumerate(self.facts["references"])
        return {name: Divergence.load(self.folder / f"references/{i}.safetensors") for i, name in names}

    def _gap(self, theme: str) -> go.Figure:
        table = pd.read_csv(self.folder / "summary.csv")
        rows = [
            {
                "method": self.titles.get(row["method"], row["method"]),
                "base": row["model"],
                "before": row["forget_MC"],
                "after": row[f"forget_MC_{row['quantizer']}"],
                "quantizer": row["quantizer"],
            }
            for _, row in table.iterrows()
        ]
        return plots.ptq_gap(pd.DataFrame(rows), chance=self.chance, measure="forget multiple choice, %", theme=theme)

    def _stages(self, theme: str) -> go.Figure:
        title = self.titles[self.mansu]
        stages = {title: self._cad(self.mansu, ""), f"{title} + {self.first}": self._cad(self.mansu, self.first)}
        return plots.circuit_stages(self._circuit(), stages, theme=theme)

    def _tokens(self) -> list[str]:
        return list(read_packed(self.folder / "attention.safetensors", "Attention")[1]["tokens"])

    def _attention(self, theme: str) -> go.Figure:
        tensors, facts = read_packed(self.folder / "attention.safetensors", "Attention")
        frame = self._circuit().to_dataframe()
        sent = frame.assign(size=frame["score"].abs()).groupby("writer")["size"].sum()
        heads = [name for name in sent.sort_values(ascending=False).index if "H" in name][:8]
        patterns = torch.stack([tensors[name[1:].partition("H")[0]][int(name.partition("H")[2])] for name in heads])
        return plots.attention_patterns(patterns, facts["tokens"], heads, theme=theme)

    def _scatter(self, theme: str) -> go.Figure:
        nodes, heads = self.folder / "nodes_linear.safetensors", self.folder / "heads.safetensors"
        return plots.attribution_scatter(NodeScores.load(nodes), PatchingResult.load(heads), theme=theme)

    def _faithfulness(self, theme: str) -> go.Figure:
        curve = FaithfulnessCurve.load(self.folder / "curve.safetensors")
        return plots.faithfulness_curves({curve.method: curve}, theme=theme)

    def _ruler(self, theme: str) -> go.Figure:
        tensors, facts = read_packed(self.folder / "ruled.safetensors", "Ruled")
        before, after = tensors["before"], tensors["after"]
        name = f"{facts['name']}, its {len(before)} most edited rows"
        return plots.ruler(before, after, grid_of(facts["grid"]), name=name, theme=theme)

    def _bins(self, part: str, title: str, theme: str) -> go.Figure:
        statistics = UpdateStatistics.load(self.folder / part / "updates.safetensors")
        return plots.bins(statistics, title=f"Where the updates land: {title}", theme=theme)

    def _dither(self, parts: dict[str, str], theme: str) -> go.Figure:
        found = {name: UpdateStatistics.load(self.folder / part) for name, part in parts.items()}
        return plots.dither({name: predicted_flips(each) for name, each in found.items()}, found, theme=theme)

    def _before_after(self, theme: str) -> go.Figure:
        divergence = self._cad(self.mansu, self.first)
        return plots.divergence_scatter(divergence, title=f"Every edge of the circuit: {divergence.label}", theme=theme)

    def _plane(self, theme: str) -> go.Figure:
        table = pd.read_csv(self.folder / "summary.csv")
        rows = []
        for _, row in table.loc[table["model"] == self.facts["model"]].iterrows():
            for q, key in (("", "forget_MC"), (row["quantizer"], f"forget_MC_{row['quantizer']}")):
                cad = self._cad(row["method"], q)
                label, (low, high) = self.titles[row["method"]], cad.interval
                rows.append((label, q, cad.value, row[key], low, high))
        names = ["label", "quantizer", "cad", "accuracy", "cad_low", "cad_high"]
        return plots.divergence_plane(pd.DataFrame(rows, columns=names), theme=theme)

    def _probes(self, theme: str) -> go.Figure:
        found = [Probes.load(path) for path in sorted((self.folder / "probes").glob("*.safetensors"))]
        reference = next((p.label for p in found if p.label == "never trained"), None)
        return plots.probes(found, reference=reference, theme=theme)


def _tables(folder: Path) -> Iterator[Picture]:
    if (folder / "frontier.csv").is_file():
        made = f"python -m tests.benchmarks.frontier --out figures/{TABLES}/frontier.csv"
        yield Picture(
            "frontier",
            "MANSU's defaults and their neighbours on the validation third of `pocket`'s questions, seed 0: resistance to "
            "relearning, with intervals over facts, against what held-out retention costs.",
            f"{TABLES}/frontier.csv",
            made,
            lambda t: _frontier(folder / "frontier.csv", t),
        )
        yield Picture(
            "sensitivity_attacker",
            "What the settings that defend against relearning change, one at a time.",
            f"{TABLES}/frontier.csv",
            made,
            lambda t: _attacker(folder / "frontier.csv", t),
        )
    if (folder / "sensitivity.csv").is_file():
        yield Picture(
            "sensitivity",
            "What one setting of MANSU at a time changes.",
            f"{TABLES}/sensitivity.csv",
            f"python -m tests.benchmarks.sensitivity --out figures/{TABLES}/sensitivity.csv",
            lambda t: _sensitivity(folder / "sensitivity.csv", t),
        )


_RESISTANCE = "relearning excess at lr 1e-3, points"
_FORGET, _LOST = "forget MC, %", "kept sets, cloze points lost"


def _frontier(path: Path, theme: str) -> go.Figure:
    frame, cost = pd.read_csv(path, dtype={"value": str}, keep_default_na=False), "held-out retain cloze drop, points"
    changed = (
        frame["hyperparameter"] + " " + frame["value"].str.removesuffix(".0").replace({"False": "off", "True": "on"})
    )
    frame["setting"] = changed.where(frame["hyperparameter"] != "default", "MANSU")
    return plots.frontier(
        frame, cost, _RESISTANCE, default="MANSU", title="Resistance against retention: the defaults and their neighbours",
        theme=theme,
    )  # fmt: skip


def _attacker(path: Path, theme: str) -> go.Figure:
    frame = pd.read_csv(path, dtype={"value": str}, keep_default_na=False)
    tidy = frame.melt(["hyperparameter", "value"], [_RESISTANCE, _FORGET, _LOST], "measure", "result")
    return _one_at_a_time(tidy, MansuSettings(), "What the defence against relearning costs (pocket)", None, theme)


def _sensitivity(path: Path, theme: str) -> go.Figure:
    """What is in percent; CAD and the edited share stay in the table, on another scale."""
    frame = pd.read_csv(path, dtype={"value": str}, keep_default_na=False)
    frame = frame.loc[frame["measure"].isin([_FORGET, _LOST])]
    title = "How much each setting matters (light settings, pocket)"
    return _one_at_a_time(frame, MansuSettings.light(), title, 30.0, theme)


def _one_at_a_time(
    frame: pd.DataFrame, settings: MansuSettings, title: str, bound: float | None, theme: str
) -> go.Figure:
    """Every hyperparameter's panel gets the default's own result."""
    varied = frame.loc[frame["hyperparameter"] != "default"]
    base = frame.loc[frame["hyperparameter"] == "default"]
    defaults = {str(name): _drawn(str(getattr(settings, str(name)))) for name in varied["hyperparameter"].unique()}
    varied = varied.assign(value=varied["value"].map(_drawn))
    rows = [base.assign(hyperparameter=name, value=value) for name, value in defaults.items()]
    table = pd.concat([varied, *rows], ignore_index=True)
    table["order"] = pd.to_numeric(table["value"], errors="coerce")
    table = table.sort_values(["hyperparameter", "order"], kind="stable")
    return plots.sensitivity(table, defaults=defaults, bound=bound, title=title, theme=theme)


def _drawn(value: str) -> float | str:
    """A number to scale; a switch in words."""
    return {"True": "on", "False": "off"}.get(value) or float(value)


_COMPARED = {
    "gaps": "Forget accuracy before and after each quantizer, by method, over seeds.",
    "quantizers": "MANSU's forget accuracy before and after every quantizer, over seeds.",
    "plane": "Forget accuracy against CAD, by method, in full precision and quantized.",
    "frontier": "Resistance to relearning against what retention costs, by method.",
    "ablations": "MANSU with one part changed: resistance and forgetting against what retention costs, intervals over seeds.",
    "methods": "All methods, ablations and controls against all properties, with intervals over seeds and bounds.",
}


class _Compared:
    """A comparison's figures, drawn once a theme."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self.drawn: dict[str, dict[str, go.Figure]] = {}

    def __call__(self, name: str, theme: str) -> go.Figure:
        return self.every(theme)[name]

    def every(self, theme: str = "light") -> dict[str, go.Figure]:
        if theme not in self.drawn:
            self.drawn[theme] = comparison_figures(self.table, theme=theme)
        return self.drawn[theme]


def _comparison(path: Path) -> Iterator[Picture]:
    # An empty quantizer is full precision, an empty number none.
    numbers = {key: ["", "NaN"] for key in ("value", "low", "high", "control")}
    compared = _Compared(pd.read_csv(path, keep_default_na=False, na_values=numbers))
    for name in compared.every():
        yield Picture(
            f"compare_{name}",
            _COMPARED[name.rpartition("_")[2]],
            f"{COMPARE}/{path.name}",
            _COMPARE,
            partial(compared, name),
        )
