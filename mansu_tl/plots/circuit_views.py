"""Other views of a circuit: side by side at several stages, and added up layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from mansu_tl.circuit import Circuit
from mansu_tl.circuit.graph import layer_of, reader_kind
from mansu_tl.errors import MansuError
from mansu_tl.plots.circuit_graph import draw_panel, pairs_of, require_edges, require_same_graph, thinned, units_of
from mansu_tl.plots.circuit_look import draw_legend, emphasised
from mansu_tl.plots.layered import place
from mansu_tl.plots.panels import Panel, new_panel
from mansu_tl.plots.theme import Theme, fixed, new_figure, plain, theme_named
from mansu_tl.verification import CircuitStages, Divergence

# Pixels a layer, of few layers and of more; of all rows together at most, so that a slide holds them; of a panel's title.
_FEW_LAYERS, _PITCH, _HIGHEST, _TITLE = 6, (100, 72), 500, 56
_FADED = 64  # times smaller than the widest: grey


class _Stage(NamedTuple):
    """A panel: its name, a note below it, and its edges with their scores."""

    name: str
    note: str
    frame: pd.DataFrame


def circuit_stages(
    circuit: Circuit | CircuitStages,
    stages: Mapping[str, Divergence] | Mapping[str, Circuit] | Mapping[str, Mapping[str, Divergence]] | None = None,
    *,
    first: str = "original",
    strongest: int | None = None,
    title: str | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a circuit and what became of it side by side, in one layout and with one scale of widths and colours.

    Signs and marks as in `circuit`. With divergences every panel has the same edges, each as wide as its score there;
    with circuits (rediscovered after an edit, say) every panel has its own. Several rows, one a method, each begin with
    the original.

    Args:
        circuit: the original's, or `CircuitStages`, which has the stages in it.
        stages: by name, results of `circuit_divergence` for this circuit, or circuits of the same graph; of several rows,
            by row and name.
        first: name of the first panel.
        strongest: draw so many edges, those of largest |score| in the original; by default all. With circuits all.

    Raises:
        MansuError: no stage, a circuit without edges, a divergence of another circuit, a circuit of another graph, or a
            number of edges below 1.
    """
    look = theme_named(theme)
    if strongest is not None and strongest < 1:
        raise MansuError(f"circuit stages: strongest={strongest}; draw 1 edge or more")
    if isinstance(circuit, CircuitStages):
        gathered = circuit
    else:
        rows: dict[str, Any] = dict(stages or {})
        if first in rows:
            raise MansuError(f"circuit stages: two panels are called {first!r}; rename one")
        if rows and all(isinstance(each, Circuit) for each in rows.values()):
            return _drawn(look, [_own_edges(circuit, rows, first)], circuit.writers, circuit.kv_groups, "", title)
        nested = all(isinstance(each, Mapping) for each in rows.values())
        gathered = CircuitStages.of(circuit, rows if nested else {"": rows})
    drawn = min(strongest or len(gathered.writers), len(gathered.writers))
    share = fixed(100 * gathered.share(drawn), 0)
    few = f"The {drawn:,} strongest of {gathered.n_edges:,} edges, {share} % of all |score| in the original. "
    grid = _rescored(gathered, first, drawn)
    # Where a number is given all of them stand out; else the strongest do, of a large circuit.
    emphasis = None if strongest is None else drawn
    few = few if drawn < gathered.n_edges else ""
    return _drawn(look, grid, gathered.nodes, gathered.kv_groups, few, title, emphasis)


def _rescored(stages: CircuitStages, first: str, drawn: int) -> list[list[_Stage]]:
    """The circuit's edges with every model's scores, row by row, each behind the original."""
    original = _Stage(first, f"{stages.n_edges:,} edges", stages.edges(0, drawn))
    grid: dict[str, list[_Stage]] = {}
    for model, (row, name, cad) in enumerate(zip(stages.rows, stages.stages, stages.cad, strict=True), 1):
        shown = f"{row}: {name}" if row else name
        grid.setdefault(row, [original]).append(_Stage(shown, f"CAD {fixed(cad, 2)}", stages.edges(model, drawn)))
    return list(grid.values())


def _own_edges(circuit: Circuit, stages: Mapping[str, Circuit], first: str) -> list[_Stage]:
    """Every circuit with its own edges."""
    out = [_Stage(first, f"{circuit.n_edges:,} edges", require_edges(circuit)[["writer", "reader", "score"]])]
    for name, stage in stages.items():
        faithful = "" if math.isnan(stage.faithfulness) else f", faithfulness {fixed(stage.faithfulness, 2)}"
        out.append(_Stage(name, f"{stage.n_edges:,} edges{faithful}", _of_graph(circuit, stage)))
    return out


def _drawn(
    look: Theme,
    grid: list[list[_Stage]],
    nodes: tuple[str, ...],
    kv_groups: int,
    few: str,
    title: str | None,
    emphasis: int | None = None,
) -> go.Figure:
    """Rows of panels. All have the widths of the largest |score| in any."""
    everything = pd.concat([stage.frame for row in grid for stage in row], ignore_index=True)
    top, across = float(everything["score"].abs().max()), max(map(len, grid))
    if (
        few
    ):  # of a large circuit one edge may carry ten times the next: the widest class takes in a twentieth of the edges
        top = min(top, 2 * float(grid[0][0].frame["score"].abs().quantile(0.95)))
    faded = top / _FADED
    placements = [[place(nodes, pairs_of(stage.frame), kv_groups) for stage in row] for row in grid]
    layers = placements[0][0].n_layers
    usual = _PITCH[0] if layers <= _FEW_LAYERS else _PITCH[1]
    pitch = min(float(usual), _HIGHEST / len(grid) / (layers + 1.25))
    how_to_read = (
        few + "One layout and scale for all panels: width is |score|, blue supports the answer, orange with a ring "
    )
    how_to_read += "opposes it."
    named = [f"<b>{plain(each.name)}</b><br>{plain(each.note)}" for row in grid for each in _filled(row, across)]
    height = 150 + len(grid) * (pitch * units_of(layers, pitch) + _TITLE)
    gap = _TITLE / (height - 190) if len(grid) > 1 else 0
    figure = new_figure(
        look, title or "What became of the circuit", how_to_read, height, rows=len(grid), cols=across, shared_yaxes=True,
        horizontal_spacing=0.015, vertical_spacing=gap, subplot_titles=named,
    )  # fmt: skip
    for row, (here, places) in enumerate(zip(grid, placements, strict=True), 1):
        for col, (stage, placement) in enumerate(zip(here, places, strict=True), 1):
            panel = Panel(figure, look, row, col)
            draw_panel(
                panel,
                stage.frame,
                placement,
                kv_groups,
                top,
                emphasis=emphasis,
                panels=across,
                pitch=pitch,
                faded=faded,
            )
    whole = emphasis is not None or all(emphasised(stage.frame, None).all() for row in grid for stage in row)
    every = len(everything) if whole else None
    draw_legend(Panel(figure, look), everything, top, emphasis=every, thin=thinned(pitch), faded=faded)
    margin = {"t": figure.layout.margin.t + 40}
    figure.update_layout(margin=margin, legend={"orientation": "v", "font": {"size": 11}})
    return figure


def _filled(row: list[_Stage], across: int) -> list[_Stage]:
    return row + [_Stage("", "", row[0].frame)] * (across - len(row))


def circuit_layers(circuit: Circuit, *, title: str | None = None, theme: str = "light") -> go.Figure:
    """Draw a circuit with the heads of each layer as one part, every bundle of edges as one arrow with its summed score.

    Queries, keys and values stay apart; marks as in `circuit`. Supporting and opposing edges of a bundle cancel.

    Raises:
        MansuError: the circuit has no edge.
    """
    look = theme_named(theme)
    grouped = _summed_by_layer(require_edges(circuit))
    writers = tuple(dict.fromkeys(_part(name) for name in circuit.writers))
    heads = [name for name in writers if name.endswith("H0")]
    # In four columns of which the heads take the second, so that they stand beside the trunk and their inputs close by.
    spare = [f"L0H{i}" for i in range(1, 4)]
    placement = place((*writers, *spare), pairs_of(grouped), 1, dict.fromkeys(heads, 1))
    how_to_read = (
        f"Heads of a layer as one part, scores of all edges between two parts added up: {len(grouped)} bundles. "
        f"{circuit.how[:1].upper()}{circuit.how[1:]}."
    )
    panel = new_panel(
        look, title or f"{circuit.n_edges} edges, layer by layer", how_to_read, 190 + 100 * (placement.n_layers + 1.25)
    )
    top = float(grouped["score"].abs().max())
    draw_panel(panel, grouped, placement, 1, top, labels=dict.fromkeys(heads, "heads"))
    draw_legend(panel, grouped, top)
    return panel.figure


def _summed_by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores added up between parts: columns writer and reader (layer i's heads are LiH0) and score."""
    parts = frame.assign(
        writer=[_part(str(name)) for name in frame["writer"]], reader=[_reader(str(name)) for name in frame["reader"]]
    )
    return parts.groupby(["writer", "reader"], sort=False)["score"].sum().reset_index()


def _part(writer: str) -> str:
    return f"L{layer_of(writer)}H0" if "H" in writer else writer


def _reader(reader: str) -> str:
    kind = reader_kind(reader)
    return reader if kind not in "qkv" else f"L{layer_of(reader)}{'H' if kind == 'q' else 'KV'}0.{kind}"


def _of_graph(circuit: Circuit, stage: Circuit) -> pd.DataFrame:
    require_same_graph(circuit, stage)
    frame = stage.to_dataframe()
    if frame.empty:
        raise MansuError("circuit stages: a circuit without an edge cannot be drawn; leave it out")
    return frame[["writer", "reader", "score"]]
