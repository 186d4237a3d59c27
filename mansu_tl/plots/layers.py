"""Where in depth knowledge can still be found: linear probes, and the original's later layers as readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mansu_tl.errors import MansuError
from mansu_tl.plots.series import add_band, legend_below, series_styles
from mansu_tl.plots.theme import fixed, new_figure, number, plain, styled, theme_named


@runtime_checkable
class ProbesLike(Protocol):
    """What linear probes read from each layer of a model."""

    @property
    def label(self) -> str:
        """Which model."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing, as a share."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer.

        Columns: layer, accuracy, interval_low, interval_high, shuffled, shuffled_low, shuffled_high; in percent.
        """


@runtime_checkable
class ErasureDepthLike(Protocol):
    """Drops of the metric when another model's stream is put into the original."""

    @property
    def label(self) -> str:
        """What the edited model is."""

    @property
    def value(self) -> float:
        """0 = as intact as in the original, 1 = as absent as in a model that never learnt it."""

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""

    @property
    def positions(self) -> str:
        """Where the stream was taken over."""

    @property
    def metric(self) -> str:
        """Name of the metric."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a layer, with columns layer, never_drop, edited_drop, edited_low and edited_high."""


def probes(
    results: ProbesLike | Sequence[ProbesLike],
    *,
    reference: str | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw by layer how often a linear probe reads the right answer out of the residual stream.

    Bands are 95 % intervals over facts. The reference (a model that never learnt the facts) is dotted and grey; the
    shaded strip spans what probes reach that are fitted to shuffled answers; the dashed line is guessing.

    Args:
        results: one a model, probed at the same layers.
        reference: the label of the never-trained model.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: none given, two of one label, different layers, or a reference that is none of them.
    """
    look = theme_named(theme)
    several = [results] if isinstance(results, ProbesLike) else list(results)
    labels = _distinct("probes", [each.label for each in several])
    if reference is not None and reference not in labels:
        raise MansuError(f"probes: reference {reference!r} is none of {', '.join(labels)}; probe it too")
    tables = [each.to_dataframe() for each in several]
    layers = [str(name) for name in tables[0]["layer"]]
    if any([str(name) for name in table["layer"]] != layers for table in tables):
        raise MansuError("probes: the results were taken at different layers; compare models of one shape")
    figure = new_figure(
        look,
        title or "Can the answer still be read from inside?",
        "Linear probes of the residual stream at the prompt's last token, asked about facts that they were not fitted "
        "on. Bands: 95 % intervals over facts; grey strip: probes fitted to shuffled answers.",
        height=500,
    )
    x = list(range(len(layers)))
    low = [min(t["shuffled_low"].iloc[i] for t in tables) for i in x]
    high = [max(t["shuffled_high"].iloc[i] for t in tables) for i in x]
    add_band(figure, x, low, high, look.neutral, "shuffled answers")
    looks = series_styles(labels, look, [] if reference is None else [reference])
    for label, table in zip(labels, tables, strict=True):
        style, name = looks[label], plain(label)
        add_band(figure, x, table["interval_low"].tolist(), table["interval_high"].tolist(), style.colour, name)
        figure.add_scatter(
            x=x,
            y=table["accuracy"].tolist(),
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": style.colour, "width": 2.6, "dash": style.dash},
            marker={"symbol": style.symbol, "size": 9, "line": {"width": 1.4, "color": style.colour}},
            customdata=table[["layer", "interval_low", "interval_high", "shuffled"]].to_numpy().tolist(),
            hovertemplate=f"{name}, after %{{customdata[0]}}<br>%{{y:.1f}} % [%{{customdata[1]:.1f}}, "
            "%{customdata[2]:.1f}]<br>fitted to shuffled answers %{customdata[3]:.1f} %<extra></extra>",
        )
    chance = 100 * several[0].chance
    figure.add_hline(
        y=chance,
        line={"color": look.muted, "width": 1.2, "dash": "dash"},
        annotation_text=f"chance {number(chance)} %",
        annotation_position="bottom right",
        annotation_font={"size": 11, "color": look.muted},
    )
    figure.update_xaxes(
        tickvals=x, ticktext=[plain(name) for name in layers], title_text="stream after", showgrid=False, zeroline=False
    )
    figure.update_yaxes(title_text="probe accuracy, %", range=[-3, 104], tickvals=[0, 25, 50, 75, 100])
    legend_below(figure)
    return figure


def erasure_depth(
    results: ErasureDepthLike | Sequence[ErasureDepthLike], *, title: str | None = None, theme: str = "light"
) -> go.Figure:
    """Draw by layer how much the original's answer suffers when its stream comes from an edited model.

    The never-trained model's stream is the reference (dotted): an edited model that reaches its line at every layer
    holds no more than a model that never learnt. Bands are 95 % intervals over facts; at the right the depth score.

    Args:
        results: one an edited model, against the same never-trained model.
        title: plain text.
        theme: "light" or "dark".

    Raises:
        MansuError: none given, two of one label, or other layers, metrics or never-trained models.
    """
    look = theme_named(theme)
    several = [results] if isinstance(results, ErasureDepthLike) else list(results)
    labels = _distinct("erasure depth", [each.label for each in several])
    tables = [each.to_dataframe() for each in several]
    layers = [str(name) for name in tables[0]["layer"]]
    never = tables[0]["never_drop"].to_numpy(float)
    for each, table in zip(several, tables, strict=True):
        same = [str(name) for name in table["layer"]] == layers and each.metric == several[0].metric
        if not same or abs(table["never_drop"].to_numpy(float) - never).max() > 1e-4 * (1 + abs(never).max()):
            raise MansuError(
                f"erasure depth: {each.label!r} was measured against another reference than {labels[0]!r}; use one "
                "never-trained model, metric and set of pairs"
            )
    metric = several[0].metric.replace("_", " ")
    figure = make_subplots(rows=1, cols=2, column_widths=[0.66, 0.34], horizontal_spacing=0.15)
    styled(
        figure,
        look,
        title or "How deep does the forgetting go?",
        f"Left: loss of {metric} in the original when its residual stream ({several[0].positions} positions)"
        " is taken from another model. Right: the share of it that the never-trained model's stream costs.",
        height=480,
    )
    x = list(range(len(layers)))
    looks = series_styles(labels, look)
    figure.add_scatter(
        x=x,
        y=never.tolist(),
        mode="lines+markers",
        name="never trained",
        line={"color": look.muted, "width": 2.2, "dash": "dot"},
        marker={"symbol": "circle-open", "size": 8},
        customdata=layers,
        hovertemplate="never trained, after %{customdata}<br>drop %{y:.3f}<extra></extra>",
        row=1,
        col=1,
    )
    for label, table in zip(labels, tables, strict=True):
        style, name = looks[label], plain(label)
        add_band(figure, x, table["edited_low"].tolist(), table["edited_high"].tolist(), style.colour, name, 1, 1)
        figure.add_scatter(
            x=x,
            y=table["edited_drop"].tolist(),
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": style.colour, "width": 2.6, "dash": style.dash},
            marker={"symbol": style.symbol, "size": 9},
            customdata=table[["layer", "edited_low", "edited_high"]].to_numpy().tolist(),
            hovertemplate=f"{name}, after %{{customdata[0]}}<br>drop %{{y:.3f}} [%{{customdata[1]:.3f}}, "
            "%{customdata[2]:.3f}]<extra></extra>",
            row=1,
            col=1,
        )
    for at, each in enumerate(several):
        style, (low, high) = looks[each.label], each.interval
        figure.add_scatter(
            x=[each.value],
            y=[at],
            mode="markers+text",
            showlegend=False,
            legendgroup=plain(each.label),
            name=plain(each.label),
            marker={"symbol": style.symbol, "size": 12, "color": style.colour},
            text=[fixed(each.value, 2)],
            textposition="top center",
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, high - each.value)],
                "arrayminus": [max(0.0, each.value - low)],
                "color": style.colour,
                "thickness": 2,
                "width": 5,
            },
            customdata=[[low, high]],
            hovertemplate=f"{plain(each.label)}<br>depth %{{x:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
            "<extra></extra>",
            row=1,
            col=2,
        )
    for end, text in ((0.0, "as in the original"), (1.0, "as if never learnt")):
        figure.add_vline(
            x=end,
            line={"color": look.muted, "width": 1},
            annotation_text=text,
            annotation_position="top",
            annotation_font={"size": 11, "color": look.muted},
            row=1,
            col=2,
        )
    figure.update_xaxes(
        tickvals=x,
        ticktext=[plain(n) for n in layers],
        title_text="stream after",
        showgrid=False,
        zeroline=False,
        col=1,
    )
    figure.update_yaxes(title_text=f"drop of {plain(metric)}", rangemode="tozero", col=1)
    figure.update_xaxes(title_text="erasure depth", range=[-0.2, 1.2], zeroline=False, col=2)
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=[plain(label) for label in labels],
        range=[len(labels) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
        showline=False,
        ticks="",
        col=2,
    )
    legend_below(figure, 104, 112)
    return figure


def _distinct(what: str, labels: list[str]) -> list[str]:
    if not labels:
        raise MansuError(f"{what}: none given; pass at least one result")
    if len(set(labels)) != len(labels):
        raise MansuError(f"{what}: the labels {labels} are not distinct; give each model its own label")
    return labels
