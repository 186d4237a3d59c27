"""Lines with intervals: faithfulness by size, relearning by step, probes and erasure depth by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit import FaithfulnessCurve
from mansu_tl.errors import MansuError
from mansu_tl.plots.panels import (
    PERCENT,
    Panel,
    distinct,
    legend_below,
    new_panel,
    series_styles,
    whiskers,
)  # fmt: skip
from mansu_tl.plots.theme import fixed, new_figure, number, plain, theme_named
from mansu_tl.verification import ErasureDepth, Probes, Relearning

_MEASURES = {"multiple_choice": "multiple choice, %", "cloze": "cloze, %", "log_odds": "log-odds, nats"}


def faithfulness_curves(
    curves: Mapping[str, FaithfulnessCurve],
    *,
    target: float | int | None = 0.85,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw faithfulness against the number of edges, one line a way to score or select, and the random control.

    Args:
        curves: by name; the grey band spans their random circuits, lowest to highest.
        target: a faithfulness to be reached, drawn as a line.

    Raises:
        MansuError: none given, or a curve without a size above 0.
    """
    look = theme_named(theme)
    if not curves:
        raise MansuError("faithfulness curves: none given; pass at least one result of faithfulness_curve()")
    how_to_read = (
        "Share of the metric's clean-corrupt difference that a circuit keeps, every other edge carrying its ablated "
        "value. Grey: random circuits of the same size."
    )
    panel = new_panel(look, title or "How few edges carry the behaviour", how_to_read, 500)
    looks, in_legend = series_styles(list(curves), look), True
    for name, curve in curves.items():
        sizes = np.array(curve.sizes)
        some = np.flatnonzero(sizes > 0)
        if not len(some):
            raise MansuError(f"faithfulness curves: {name!r} has no size above 0; measure larger circuits")
        x, control = sizes[some].tolist(), curve.control.cpu().numpy()[:, some]
        if len(control):
            panel.band(x, control.min(0).tolist(), control.max(0).tolist(), look.neutral, "random")
            panel.mark(
                x, control.mean(0).tolist(), "random edges", hover="%{x:,} random edges: %{y:.3f}", group="random",
                legend=in_legend, line={"color": look.muted, "width": 1.8, "dash": "dot"},
            )  # fmt: skip
            in_legend = False
        panel.series(
            x, curve.faithfulness.cpu().numpy()[some].tolist(), f"{plain(name)} (area {fixed(curve.cpr, 2)})", looks[name],
            hover=f"{plain(name)}<br>%{{x:,}} edges (%{{customdata[1]:.2g}} %), %{{customdata[0]:,}} after pruning"
            "<br>faithfulness %{y:.3f}",
            data=[[curve.edges[i], 100 * curve.sizes[i] / curve.n_edges] for i in some],
        )  # fmt: skip
    panel.level(1.0, width=1, dash="solid")
    if target is not None:
        panel.level(target, f"target {number(target)}", width=1)
    ticks = {"dtick": 1, "minor": {"ticks": "outside", "ticklen": 2}}
    panel.x(type="log", title_text="edges selected (log scale)", **ticks)
    panel.y(title_text="faithfulness", zeroline=True)
    legend_below(panel.figure)
    return panel.figure


def relearning(
    result: Relearning,
    *,
    measures: Sequence[str] = ("multiple_choice", "cloze"),
    kind: str = "facts",
    excess: bool = False,
    chance: float | int | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw what each model answers while an attacker fine-tunes it, one column a learning rate, one row a measure.

    Bands are 95 % intervals over facts, the attack's splits taken together; the never-trained model is dotted and grey.
    What lies above it has come back; what it reaches itself can be learnt from the attack alone.

    Args:
        result: curves of several models under the same attacks.
        measures: of "multiple_choice", "cloze" and "log_odds".
        kind: attacks on "facts" or with unrelated "text".
        excess: subtract each model's own prior on names that it has never seen.
        chance: multiple choice by guessing, in percent, drawn as a line.

    Raises:
        MansuError: no curve of this kind, no measure or one that does not exist, or curves without a common step.
    """
    look = theme_named(theme)
    if not measures:
        raise MansuError("relearning: no measure to draw; name one of multiple_choice, cloze, log_odds")
    tables = {measure: result.by_step(measure, kind, excess=excess) for measure in measures}
    table = tables[measures[0]]
    rates, steps = sorted(set(table["learning_rate"])), sorted(set(table["step"]))
    looks = series_styles(list(dict.fromkeys(table["label"])), look, [result.reference])
    what = "above the model's own prior" if excess else "asked about facts that are not in the attack"
    trained = "a few forget facts" if kind == "facts" else "unrelated text"
    how_to_read = f"Forget questions, {what}. Bands: 95 % intervals over facts. " + (
        f"Above the dotted line ({result.reference}) = knowledge that came back." if result.reference else ""
    )
    grid: dict[str, Any] = {
        "rows": len(measures),
        "cols": len(rates),
        "horizontal_spacing": 0.04,
        "vertical_spacing": 0.07,
    }
    grid |= {"shared_xaxes": True, "shared_yaxes": True}
    grid["subplot_titles"] = [f"attack at learning rate {rate:g}" for rate in rates]
    figure = new_figure(
        look, title or f"What fine-tuning on {trained} brings back", how_to_read, 190 + 235 * len(measures), **grid
    )
    x = np.log2(1 + np.array(steps)).tolist()
    lowest = table.groupby("label")["learning_rate"].min()
    for (col, rate), (row, measure) in product(enumerate(rates, 1), enumerate(measures, 1)):
        here = tables[measure][tables[measure]["learning_rate"] == rate]
        for label, part in here.groupby("label", sort=False):
            style, name = looks[label], plain(label)
            panel = Panel(figure, look, row, col, first=bool(row == 1 and rate == lowest[label]))
            low, high = part["low"].tolist(), part["high"].tolist()
            panel.band(x, low, high, style.colour, name)
            hover = f"{name}<br>{_MEASURES[measure]} after %{{customdata[0]}} steps: "
            hover += "%{y:.1f} [%{customdata[1]:.1f}, %{customdata[2]:.1f}]"
            data = [list(each) for each in zip(steps, low, high, strict=True)]
            panel.series(x, part["mean"].tolist(), name, style, hover=hover, data=data, group=name)
        panel = Panel(figure, look, row, col)
        if chance is not None and measure == "multiple_choice" and not excess:
            panel.level(chance)
            if col == len(rates):
                panel.note(x[-1], chance, f"chance {number(chance)}", xanchor="right", yanchor="bottom")
        if measure != "log_odds" and not excess:
            panel.y(**PERCENT)
    for row, measure in enumerate(measures, 1):
        axis = f"{_MEASURES[measure].replace(', %', ', points')} above prior" if excess else _MEASURES[measure]
        figure.update_yaxes(title_text=axis, row=row, col=1)
    figure.update_xaxes(tickvals=x, ticktext=[str(step) for step in steps], showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="fine-tuning steps (log scale)", row=len(measures))
    legend_below(figure, 88, 24)
    return figure


def probes(
    results: Probes | Sequence[Probes], *, reference: str | None = None, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw by layer how often a linear probe reads the right answer out of the residual stream.

    Bands are 95 % intervals over facts. The reference (a model that never learnt the facts) is dotted and grey; the
    shaded strip spans what probes reach that are fitted to shuffled answers; the dashed line is guessing.

    Raises:
        MansuError: none given, two of one label, different layers, or a reference that is none of them.
    """
    look = theme_named(theme)
    several = [results] if isinstance(results, Probes) else list(results)
    labels = distinct("probes", [each.label for each in several])
    if reference is not None and reference not in labels:
        raise MansuError(f"probes: reference {reference!r} is none of {', '.join(labels)}; probe it too")
    tables = [each.to_dataframe() for each in several]
    layers = _layers(tables[0])
    if any(_layers(table) != layers for table in tables):
        raise MansuError("probes: the results were taken at different layers; compare models of one shape")
    how_to_read = (
        "Linear probes of the residual stream at the prompt's last token, asked about facts that they were not fitted "
        "on. Bands: 95 % intervals over facts; grey strip: probes fitted to shuffled answers."
    )
    panel = new_panel(look, title or "Can the answer still be read from inside?", how_to_read, 500)
    x = list(range(len(layers)))
    shuffled = pd.concat(tables).groupby(level=0)
    low, high = shuffled["shuffled_low"].min().tolist(), shuffled["shuffled_high"].max().tolist()
    panel.band(x, low, high, look.neutral, "shuffled answers")
    looks = series_styles(labels, look, [] if reference is None else [reference])
    for label, table in zip(labels, tables, strict=True):
        style, name = looks[label], plain(label)
        panel.band(x, table["interval_low"].tolist(), table["interval_high"].tolist(), style.colour, name)
        panel.series(
            x, table["accuracy"].tolist(), name, style, group=name,
            data=table[["layer", "interval_low", "interval_high", "shuffled"]].to_numpy().tolist(),
            hover=f"{name}, after %{{customdata[0]}}<br>%{{y:.1f}} % [%{{customdata[1]:.1f}}, %{{customdata[2]:.1f}}]<br>"
            "fitted to shuffled answers %{customdata[3]:.1f} %",
        )  # fmt: skip
    chance = 100 * several[0].chance
    panel.level(chance, f"chance {number(chance)} %")
    panel.x(tickvals=x, ticktext=layers, title_text="stream after", showgrid=False, zeroline=False)
    panel.y(title_text="probe accuracy, %", **PERCENT)
    legend_below(panel.figure)
    return panel.figure


def erasure_depth(
    results: ErasureDepth | Sequence[ErasureDepth], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw by layer how much the original's answer suffers when its stream comes from an edited model.

    The never-trained model's stream is the reference (dotted): an edited model that reaches its line at every layer
    holds no more than a model that never learnt. Bands are 95 % intervals over facts; at the right the depth score.

    Raises:
        MansuError: none given, two of one label, or other layers, metrics or never-trained models.
    """
    look = theme_named(theme)
    several = [results] if isinstance(results, ErasureDepth) else list(results)
    labels = distinct("erasure depth", [each.label for each in several])
    tables = [each.to_dataframe() for each in several]
    layers, never = _layers(tables[0]), tables[0]["never_drop"].to_numpy(float)
    for each, table in zip(several, tables, strict=True):
        same = _layers(table) == layers and each.metric == several[0].metric
        if not same or abs(table["never_drop"].to_numpy(float) - never).max() > 1e-4 * (1 + abs(never).max()):
            raise MansuError(
                f"erasure depth: {each.label!r} was measured against another reference than {labels[0]!r}; use one "
                "never-trained model, metric and set of pairs"
            )
    metric = several[0].metric.replace("_", " ")
    how_to_read = (
        f"Left: loss of {metric} in the original when its residual stream ({several[0].positions} positions)"
        " is taken from another model. Right: the share of it that the never-trained model's stream costs."
    )
    grid = {"rows": 1, "cols": 2, "column_widths": [0.66, 0.34], "horizontal_spacing": 0.15}
    figure = new_figure(look, title or "How deep does the forgetting go?", how_to_read, 480, **grid)
    left, right = Panel(figure, look, 1, 1), Panel(figure, look, 1, 2)
    x, looks = list(range(len(layers))), series_styles(labels, look)
    left.mark(
        x, never.tolist(), "never trained", "lines+markers", data=layers,
        hover="never trained, after %{customdata}<br>drop %{y:.3f}",
        line={"color": look.muted, "width": 2.2, "dash": "dot"}, marker={"symbol": "circle-open", "size": 8},
    )  # fmt: skip
    for at, (each, table) in enumerate(zip(several, tables, strict=True)):
        style, name = looks[each.label], plain(each.label)
        left.band(x, table["edited_low"].tolist(), table["edited_high"].tolist(), style.colour, name)
        left.series(
            x, table["edited_drop"].tolist(), name, style, group=name,
            data=table[["layer", "edited_low", "edited_high"]].to_numpy().tolist(),
            hover=f"{name}, after %{{customdata[0]}}<br>drop %{{y:.3f}} [%{{customdata[1]:.3f}}, %{{customdata[2]:.3f}}]",
        )  # fmt: skip
        low, high = each.interval
        right.mark(
            [each.value], [at], name, "markers+text", group=name, legend=False, data=[[low, high]],
            hover=f"{name}<br>depth %{{x:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]",
            marker={"symbol": style.symbol, "size": 12, "color": style.colour}, text=[fixed(each.value, 2)],
            textposition="top center", error_x=whiskers([each.value], [low], [high], style.colour),
        )  # fmt: skip
    right.level(0.0, "as in the original", upright=True, width=1, dash="solid")
    right.level(1.0, "as if never learnt", upright=True, width=1, dash="solid")
    left.x(tickvals=x, ticktext=layers, title_text="stream after", showgrid=False, zeroline=False)
    left.y(title_text=f"drop of {plain(metric)}", rangemode="tozero")
    right.x(title_text="erasure depth", range=[-0.2, 1.2], zeroline=False)
    right.rows(labels, showgrid=False)
    legend_below(figure, 104, 5)
    return figure


def _layers(table: pd.DataFrame) -> list[str]:
    """The names of the layers, escaped."""
    return [plain(name) for name in table["layer"]]
