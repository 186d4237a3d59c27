"""The report of a study: which figures, in which order, and two plain sentences for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from mansu_tl import plots
from mansu_tl.models import orient
from mansu_tl.quantization import AsymmetricGrid, Grid, quantizer
from mansu_tl.report import Section, write_report
from mansu_tl.study import MethodResult, Study
from mansu_tl.unlearning import headline, method_title
from mansu_tl.verification import Bounds, Divergence
from mansu_tl.verification.saved_model import SavedModel


def write_study_report(study: Study, *, png: bool = False) -> Path:
    """Write `report.html` into the study's folder, and with `png` every figure into its `figures/`.

    Raises:
        MansuError: `png` is asked for and there is no browser to draw with.
    """
    figures = study_figures(study)
    if png:
        plots.write_images({study.folder / "figures" / f"{name}.png": figure for name, figure in figures.items()})
    sections = [Section(heading, text, figures[name]) for name, heading, text in _TEXTS if name in figures]
    sections[0:0] = [Section("What was found", _verdict(study), table=study.summary().round(2))]
    sections.append(Section("Every number", _TABLE_TEXT, table=_all_rows(study), folded=True))
    return write_report(
        study.folder / "report.html",
        title=f"Unlearning {study.config.task} in {study.name}",
        sections=sections,
        environment=study.environment,
    )


def study_figures(study: Study) -> dict[str, go.Figure]:
    """Every figure of a study by name, in the report's order."""
    cards = {method: result.card for method, result in study.results.items()}
    first = study.config.quantizers[0]
    main = headline(study.results)
    mansu = study.results[main]
    baseline = next((r for m, r in study.results.items() if m != main), None)
    figures = {
        "ptq_gap": plots.ptq_gap(_gap_rows(study), chance=_chance(study), measure="forget multiple choice, %"),
        "circuit": plots.circuit(study.circuit, title=f"The forget circuit of {study.name}"),
        "patching": plots.patching(study.patching),
        "edge_matrix": plots.edge_matrix(study.scores),
        "circuit_stages": plots.circuit_stages(
            study.circuit,
            {d.label: d for d in (mansu.divergences[""], mansu.divergences[first])},
            title=f"What became of the circuit: {mansu.card.title}",
        ),
        "divergence": plots.circuit_divergence(_divergences(study), study.references, bound=Bounds().divergence),
        "edges_before_after": plots.divergence_scatter(
            mansu.divergences[first], title=f"Every edge of the circuit: {mansu.divergences[first].label}"
        ),
        "bins_mansu": plots.bins(mansu.statistics, title=f"Where the updates land: {mansu.card.title}"),
    }
    if baseline is not None:
        figures["bins_baseline"] = plots.bins(
            baseline.statistics, title=f"Where the updates land: {baseline.card.title}"
        )
    for name, other in study.also.items():
        result = next((r for m, r in other.results.items() if m != main), None)
        if result is not None:
            figures[f"bins_{name}"] = plots.bins(
                result.statistics, title=f"Where the updates land: {result.card.title}"
            )
            break
    figures["scorecard"] = plots.scorecard(list(cards.values()) if len(cards) > 1 else next(iter(cards.values())))
    if mansu.certificate is not None:
        figures["certificate"] = plots.certificate(mansu.certificate)
    on_ruler = _ruler(study, mansu)
    if on_ruler is not None:
        figures["ruler"] = on_ruler
    return figures


def _ruler(study: Study, result: MethodResult) -> go.Figure | None:
    """The matrix with most edited weights, as the saved folders hold it; None where nothing was saved or has a ruler."""
    name = max(result.edit.indices, key=lambda n: len(result.edit.indices[n]), default=None)
    grids = (quantizer(q) for q in study.config.quantizers)
    # An asymmetric grid's codes lie elsewhere in every block.
    grid = next((g for g in grids if isinstance(g, Grid) and not isinstance(g, AsymmetricGrid)), None)
    if result.folder is None or name is None or grid is None:
        return None
    before, after = (SavedModel(folder) for folder in (study.folder / "model" / "original", result.folder))
    if name not in before.linear:
        return None
    old, new = (orient(model.tensor(name), before.linear[name]) for model in (before, after))
    return plots.ruler(old, new, grid, name=name.removesuffix(".weight"))


_TEXTS = (
    ("ptq_gap", "Does quantization bring it back?",
     "Every method was stopped when the forget set was at chance in full precision; the filled mark is the same model "
     "in 4 bits. A mark to the right of its ring is knowledge that came back."),
    ("circuit", "The circuit that holds the knowledge",
     "Edges are scored with EAP-IG on clean/corrupt pairs and the smallest top-n set that reproduces the target share "
     "of the logit difference is kept, every other edge carrying its corrupt value. Blue edges support the answer, "
     "orange ones work against it."),
    ("patching", "Where the knowledge enters",
     "One activation of the corrupt run at a time is replaced by its clean value, and the share of the logit difference "
     "that returns is shown. These are exact interventions, not estimates."),
    ("edge_matrix", "All edge scores",
     "One cell for every edge that exists, writers upward, readers across. The circuit is a selection of these."),
    ("divergence", "Erased, or only suppressed?",
     "CAD compares the circuit's edge scores before and after: 0 is an intact mechanism, 1 is none left, above 1 is an "
     "inverted one. The hatched bars are the references: quantization alone, a filter on the output, and a model that "
     "never learnt the facts."),
    ("circuit_stages", "What became of the circuit",
     "The same edges in the original, after the edit, and after quantization, in one layout and with one scale of widths. "
     "What has gone thin is gone; what has turned orange with a ring now works against the answer."),
    ("edges_before_after", "Edge by edge",
     "Each mark is one edge of the circuit, its score in the original model across and in the edited, quantized model "
     "up. Marks on the diagonal are untouched, marks on the horizontal line are gone."),
    ("bins_mansu", "Large enough to count",
     "Each edited weight's change is compared with the width of its quantization bin, and the share whose code changed "
     "is drawn over it. MANSU's floor makes every edited weight cross into another code."),
    ("ruler", "The weights on the quantizer's ruler",
     "The matrix with most edited weights, as the saved models hold it: every edited weight is followed from where it was to "
     "where it is and on to the code that it is rounded to. The slider steps from block to block."),
    ("bins_baseline", "Too small to count",
     "The same picture for a gradient baseline on the same base: almost every update is far smaller than a bin. On weights "
     "that rest on the quantizer's own grid such an update is rounded away whole, so the original model returns."),
    ("bins_pocket-fp", "The same baseline on ordinary weights",
     "Here the weights lie anywhere inside their bins, so a small update still pushes a proportionate share of them over "
     "a boundary, each by a whole bin: rounding acts as dither and the update arrives on average. This is why baselines "
     "may survive quantization on this base, and why the ratio of update to bin width does not by itself predict recovery."),
    ("scorecard", "Scorecard",
     "The four properties at once, each row with its bound and the un-edited model as control. Intervals are taken over "
     "facts, so several wordings of one fact count once."),
    ("certificate", "Certificate",
     "Recomputed by bitsandbytes from the two saved folders. It speaks of codes under this quantizer, block size and "
     "dtype, never of behaviour."),
)  # fmt: skip

_TABLE_TEXT = (
    "Every row of every scorecard. An empty quantizer means full precision; the control is the un-edited model under the "
    "same quantizer."
)


def _verdict(study: Study) -> str:
    parts = []
    for name, one in {study.name: study, **study.also}.items():
        back = [
            f"{method_title(m)} ({r.card.value('forget MC, %'):.0f} to {r.card.value('forget MC, %', q):.0f} %)"
            for m, r in one.results.items()
            for q in one.config.quantizers
            if r.card.value("forget MC, points", q) >= 10
        ]
        kept = [method_title(m) for m, r in one.results.items() if r.card.passed]
        parts.append(
            f"On {name}, quantization brings knowledge back for {', '.join(back) if back else 'no method'}; "
            f"{', '.join(kept) if kept else 'no method'} passes every row of its scorecard."
        )
    random = study.random_faithfulness
    parts.append(
        f"The circuit has {study.circuit.n_edges} of {int(study.scores.exists.sum())} edges and faithfulness "
        f"{study.circuit.faithfulness:.2f}; {len(random)} random circuits of that size reach at most {max(random):.2f}. "
        f"EAP-IG's completeness residual is {100 * study.scores.relative_residual:.1f} % of the metric's change."
    )
    return " ".join(parts)


def _gap_rows(study: Study) -> pd.DataFrame:
    rows = []
    for base, one in {study.name: study, **study.also}.items():
        for method, result in one.results.items():
            for q in one.config.quantizers:
                before, after = result.card.value("forget MC, %"), result.card.value("forget MC, %", q)
                rows.append(
                    {"method": method_title(method), "base": base, "before": before, "after": after, "quantizer": q}
                )
    return pd.DataFrame(rows)


def _divergences(study: Study) -> Mapping[str, Divergence]:
    return {
        f"{method_title(method)}, {q or 'full precision'}": divergence
        for method, result in study.results.items()
        for q, divergence in result.divergences.items()
    }


def _all_rows(study: Study) -> pd.DataFrame:
    frames = []
    for one in (study, *study.also.values()):
        for result in one.results.values():
            frame = result.card.to_dataframe()
            frame.insert(0, "scorecard", result.card.title)
            frames.append(frame.round(3))
    return pd.concat(frames, ignore_index=True)


def _chance(study: Study) -> float:
    card = next(iter(study.results.values())).card
    return next(row.chance for row in card.rows if row.measure == "forget MC, %" and row.chance is not None)
