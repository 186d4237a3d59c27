"""Figures and report: what is drawn is what was measured, and nothing that comes from outside is executed."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pandas.io.formats.style import Styler
from plotly.colors import sample_colorscale

from mansu_tl import plots
from mansu_tl.circuit import Circuit, EdgeScores, Graph
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching import PatchingResult
from mansu_tl.plots.export import Drawing, browser
from mansu_tl.plots.layered import path, place
from mansu_tl.plots.theme import fixed, number, plain, theme_named
from mansu_tl.quantization.statistics import UpdateStatistics
from mansu_tl.study.page import Section, write_report
from mansu_tl.verification import Certificate, Divergence, Scorecard
from mansu_tl.verification.certificate import CertificateRow
from mansu_tl.verification.scorecard import Row

EVIL = "</script><script>document.title='owned'</script>&amp;$x$"
THEMES = ("light", "dark")
needs_browser = pytest.mark.skipif(browser() is None, reason="no Chromium, Chrome or Edge on this machine")


# --- results, made up ---


def graph_of(layers: int, heads: int, kv: int, parallel: bool = False) -> Graph:
    writers, readers = ["embed"], []
    for i in range(layers):
        writers += [f"L{i}H{h}" for h in range(heads)] + [f"MLP{i}"]
        readers += [f"L{i}H{h}.q" for h in range(heads)]
        readers += [f"L{i}KV{h}.{part}" for part in "kv" for h in range(kv)] + [f"MLP{i}.in"]
    names = (tuple(writers), (*readers, "logits"))
    return Graph.of(Anatomy("llama", layers, heads, kv, 8, 32, 48, parallel, False, *names, frozenset()))


def scores_of(layers: int = 4, heads: int = 4, kv: int = 2, seed: int = 2, tail: float = 2.0) -> EdgeScores:
    graph = graph_of(layers, heads, kv)
    draw = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    tensor = draw.sign() * draw.abs() ** tail * 0.1 * graph.exists
    return EdgeScores(
        tensor,
        graph.writers,
        graph.readers,
        graph.exists,
        "eap-ig",
        "midpoint",
        5,
        "logit_difference",
        9.0,
        -8.0,
        0.04,
        "x",
    )


def circuit_of(n: int = 120, **options: float | int) -> Circuit:
    return Circuit.top(scores_of(**options), n, 0.87)


def divergence_of(label: str, factor: float, n: int = 40) -> Divergence:
    frame = circuit_of().to_dataframe().head(n)
    a = torch.tensor(frame["score"].tolist())
    b = factor * a + 0.01 * torch.randn(len(a), generator=torch.Generator().manual_seed(1))
    value = 1 - (a @ b / (a @ a)).item()
    names = (tuple(frame["writer"]), tuple(frame["reader"]))
    return Divergence(value, (value - 0.1, value + 0.05), 0.4, (0.3, 0.5), a, b, *names, label)


def patches(columns: tuple[str, ...], direction: str = "denoising") -> PatchingResult:
    tensor = torch.linspace(-0.4, 1.2, 3 * len(columns)).reshape(3, -1)
    facts = ("layer", "position", "residual stream", direction, "logit_difference", 9.0, -8.0)
    return PatchingResult(tensor, ("0", "1", "2"), columns, *facts)


def statistics_of(flips: bool = True) -> UpdateStatistics:
    edges = torch.linspace(-8, 2, 101, dtype=torch.float64)
    counts = torch.zeros(100, dtype=torch.int64)
    counts[50:82] = torch.arange(32) * 10 + 1
    flipped = (counts.double() * torch.minimum(torch.ones(100), 10 ** edges[1:])).long() * flips
    positions = torch.zeros(41, dtype=torch.int64)
    positions[20] = 9000

    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    n, moved = counts.sum()[None], flipped.sum()[None]
    none = torch.tensor([0])
    return UpdateStatistics(
        "nf4", ("w",), n + 5, n, moved, none, none + 140, none, one(3), one(40), 40.0, one(1), one(1), one(1), edges,
        counts, flipped, torch.linspace(0, 1, 42, dtype=torch.float64), positions,
    )  # fmt: skip


def row(
    prop: str, measure: str, quantizer: str, value: float, passed: bool, control: float = 100.0, low: float = 1.0
) -> Row:
    high = low if math.isnan(low) else value + 1.0
    return Row(prop, measure, quantizer, value, low, high, control, "un-edited", "<= 30", passed)


def card_of(title: str, control: float = 100.0) -> Scorecard:
    rows = (
        row("forgetting", "forget MC, %", "", 24.96, True, control),
        row("forgetting", "forget MC, %", "nf4", 66.6, False, control),
        row("structural erasure", "CAD", "nf4", 1.0904, True, 0.006, math.nan),
    )
    return Scorecard(title, rows)


def certificate_of(quantizer: str = "nf4", kept: int = 0) -> Certificate:
    rows = (CertificateRow("layers.0.v.weight", "bfloat16", 4096, 80, 80 - kept, 0, 0, 64, 0),)
    return Certificate(quantizer, 64, "bfloat16", "a", "b", "x", "y", 811520, 753664, rows, (), (), {"torch": "2.13"})


def gaps_of() -> pd.DataFrame:
    rows = [
        ("NPO", "resident", 30.0, 100.0, "nf4"),
        ("MANSU", "resident", 25.0, 25.0, "nf4"),
        ("NPO", "ordinary", 44.0, 43.0, "nf4"),
    ]
    return pd.DataFrame(rows, columns=["method", "base", "before", "after", "quantizer"])


def all_figures(name: str = "model", theme: str = "light") -> dict[str, Drawing]:
    """Every figure, with `name` wherever a user's text can get in."""
    circuit, statistics = replace(circuit_of(), how=name), replace(statistics_of(), quantizer=name)
    scores = replace(scores_of(), metric=name)
    patch = replace(patches((name, "the", "the", "\n", " Paris")), metric=name)
    table = gaps_of().assign(method=[name, "MANSU", name], base=[name, name, "ordinary"])
    card = replace(card_of(name), rows=tuple(replace(r, measure=name, control_name=name) for r in card_of("a").rows))
    look = {"theme": theme}
    return {
        "circuit": plots.circuit(circuit, replace(circuit_of(80, seed=1), how=name), **look),
        "edge_matrix": plots.edge_matrix(scores, **look),
        "patching": plots.patching(patch, **look),
        "bins": plots.bins(statistics, **look),
        "circuit_divergence": plots.circuit_divergence(
            [divergence_of(name, 0.1)], {name: divergence_of("b", 1.0)}, **look
        ),
        "divergence_scatter": plots.divergence_scatter(divergence_of(name, -0.1), **look),
        "scorecard": plots.scorecard(card, **look),
        "scorecards": plots.scorecard([card, card_of("other")], **look),
        "certificate": plots.certificate(replace(certificate_of(), quantizer=name), **look),
        "ptq_gap": plots.ptq_gap(table, chance=25, measure=name, **look),
        "titled": plots.patching(patch, title=name, **look),
    }


def strings(value: object) -> list[str]:
    """All strings of a JSON value, values and keys."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def cells(table: Styler) -> list[list[str]]:
    """A table's rows, header first."""
    return [list(table.data.columns), *table.data.to_numpy().tolist()]


def shades(table: Styler) -> list[list[bool | None]]:
    """Whether each cell is coloured as passed or as failed."""
    look = theme_named("light")
    colours = {look.passed: True, look.failed: False}
    styles = table._compute().ctx
    rows, columns = table.data.shape
    found = [[dict(styles[i, j]).get("background-color") for j in range(columns)] for i in range(rows)]
    return [[colours.get(colour) for colour in row] for row in found]


# --- circuit ---


def middles(figure: go.Figure) -> dict[tuple[str, str], tuple[float, str, float, float]]:
    """Edges as the hover points tell them: score, text and position."""
    points = [t for t in figure.data if t.name and t.name.startswith("edges into")]
    rows = [(d, x, y) for t in points for d, x, y in zip(t.customdata, t.x, t.y, strict=True)]
    assert len({(d[0], d[1]) for d, _, _ in rows}) == len(rows)
    return {(d[0], d[1]): (d[2], d[3], x, y) for d, x, y in rows}


def gaps(trace: go.Scatter) -> int:
    """How many edges a trace of many has: a gap behind each."""
    return int(np.isnan(np.asarray(trace.x, float)).sum())


def lines(figure: go.Figure) -> list[go.Scatter]:
    return [
        t
        for t in figure.data
        if t.mode == "lines" and t.legendgroup in ("q", "k", "v", "mlp", "logits") and len(t.x) > 1
    ]


@pytest.mark.parametrize("options", [{}, {"layers": 12, "heads": 12, "kv": 12}, {"layers": 3, "heads": 8, "kv": 1}])
def test_circuit_shows_every_edge_with_its_score(options: dict[str, int]) -> None:
    circuit = circuit_of(500 if options.get("layers") == 12 else 90, tail=1.3, **options)
    figure = plots.circuit(circuit)
    shown = middles(figure)
    frame = circuit.to_dataframe()
    assert {pair: v[0] for pair, v in shown.items()} == {(r.writer, r.reader): r.score for r in frame.itertuples()}
    for (writer, reader), (score, text, _, _) in shown.items():
        assert writer in text
        assert reader in text
        assert number(score) in text
        assert ("supports" in text) == (score >= 0)
    assert sum(gaps(t) for t in lines(figure)) == circuit.n_edges
    assert len(figure.data) < 120


def test_circuit_widths_and_colours_follow_the_scores() -> None:
    circuit = circuit_of()
    frame = circuit.to_dataframe()
    top = frame["score"].abs().max()
    drawn: Counter[tuple[float, str]] = Counter()
    for trace in lines(plots.circuit(circuit)):
        drawn[trace.line.width, trace.line.color] += gaps(trace)
    by_width = Counter({w: sum(n for (width, _), n in drawn.items() if width == w) for w, _ in drawn})
    widths = sorted(by_width)
    assert by_width[widths[-1]] == (frame["score"].abs() > top / 2).sum()
    assert by_width[widths[-2]] == ((frame["score"].abs() <= top / 2) & (frame["score"].abs() > top / 4)).sum()
    blues = sum(n for (_, colour), n in drawn.items() if int(colour[5:7], 16) > int(colour[1:3], 16))
    assert blues == (frame["score"] >= 0).sum() != (frame["score"] < 0).sum()
    dashes = {trace.legendgroup: trace.line.dash for trace in lines(plots.circuit(circuit))}
    assert len({dashes["q"], dashes["k"], dashes["v"]}) == 3


def test_circuit_nodes_are_those_with_edges_and_carry_their_sums() -> None:
    circuit = circuit_of(60)
    graph = circuit.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    drawn = {d[0]: (d[1], d[2]) for t in plots.circuit(circuit).data if t.name == "nodes" for d in t.customdata}
    # A head that only shares a KV head with one of the circuit sends nothing: a dead end, not drawn.
    assert set(drawn) == {name for name in graph.nodes if graph.out_degree(name) or name == "logits"}
    assert len(drawn) < len(graph.nodes)
    assert set(drawn) < {*circuit.writers, "logits"}
    for name, (received, sent) in drawn.items():
        assert received == pytest.approx(sum(d["score"] for _, _, d in graph.in_edges(name, data=True)), abs=1e-5)
        # An edge into a KV head counts once as sent, however many heads share it.
        out = {(name, d["reader"]): d["score"] for _, _, d in graph.out_edges(name, data=True)}
        assert sent == pytest.approx(sum(out.values()), abs=1e-5)


@pytest.mark.parametrize(("heads", "kv", "parallel"), [(4, 4, False), (4, 2, False), (6, 1, False), (4, 4, True)])
def test_every_edge_of_a_graph_can_be_drawn_and_runs_upward(heads: int, kv: int, parallel: bool) -> None:
    graph = graph_of(3, heads, kv, parallel)
    edges = [(graph.writers[i], graph.readers[j]) for i, j in graph.exists.nonzero().tolist()]
    placement = place(graph.writers, edges, heads // kv)
    reached = {}
    for writer, reader in edges:
        xs, ys = path(placement, writer, reader)
        assert (np.diff(ys) > 0).all()
        assert abs(xs[0] - placement.nodes[writer][0]) < 0.01
        assert 0 < ys[0] - placement.nodes[writer][1] < 0.2
        reached.setdefault(reader, set()).add((round(xs[-1], 6), round(ys[-1], 6)))
    # Every reader has entries of its own; an MLP one more for each head of its layer.
    entries = [point for points in reached.values() for point in points]
    assert len(set(entries)) == len(entries)
    wanted = {r: 1 + heads * (r.startswith("MLP") and not parallel) for r in graph.readers}
    assert {reader: len(points) for reader, points in reached.items()} == wanted
    heads_drawn = [p for name, p in placement.nodes.items() if name.startswith("L1H")]
    assert [x for x, _ in heads_drawn] == sorted(x for x, _ in heads_drawn)
    levels = [placement.nodes[f"L{i}H0"][1] for i in range(3)]
    assert placement.nodes["embed"][1] < levels[0] < levels[1] < levels[2] < placement.nodes["logits"][1]


def test_circuit_beside_a_reference() -> None:
    small, large = circuit_of(40), circuit_of(120)
    figure = plots.circuit(small, large)
    ghosts = [t for t in figure.data if t.legendgroup == "reference" and len(t.x) > 1]
    missing = set(large.edges) - set(small.edges)
    assert gaps(ghosts[0]) == len(missing) > 0
    other = {(r.writer, r.reader): r.score for r in large.to_dataframe().itertuples()}
    for pair, (_, text, _, _) in middles(figure).items():
        assert f"in the reference: {number(other.get(pair, math.nan))}" in text
    with pytest.raises(MansuError, match="different shape"):
        plots.circuit(small, circuit_of(40, layers=2))


def test_circuit_without_edges_names_the_way_out() -> None:
    empty = replace(circuit_of(), mask=torch.zeros_like(circuit_of().mask))
    with pytest.raises(MansuError, match="no edge to draw; select more edges"):
        plots.circuit(empty)


def test_a_circuit_that_is_no_path_is_drawn() -> None:
    rest = circuit_of(120) - circuit_of(40)
    assert set(middles(plots.circuit(rest))) == set(rest.edges)


def test_unknown_theme() -> None:
    with pytest.raises(MansuError, match="theme 'sepia': unknown; choose one of light, dark"):
        plots.circuit(circuit_of(), theme="sepia")


# --- heat maps ---


@pytest.mark.parametrize("layers", [2, 12])
def test_edge_matrix_is_the_tensor(layers: int) -> None:
    scores = scores_of(layers=layers)
    figure = plots.edge_matrix(scores)
    heat = figure.data[0]
    z = np.asarray(heat.z, dtype=np.float32)
    assert np.array_equal(np.isnan(z), ~scores.exists.numpy())
    assert np.array_equal(z[scores.exists.numpy()], scores.tensor[scores.exists].numpy())
    assert (heat.zmin, heat.zmax) == (-heat.zmax, pytest.approx(scores.tensor.abs().max().item()))
    assert list(heat.x) == list(scores.readers)
    assert list(heat.y) == list(scores.writers)
    if layers == 2:
        marked = np.asarray(heat.text) == "−"
        assert marked.any()
        assert (z[marked] < 0).all()
    assert len(figure.layout.xaxis.tickvals) == len(figure.layout.xaxis.ticktext) <= 48


def test_edge_matrix_colours_go_with_the_root_and_centre_on_zero() -> None:
    scale = [list(stop) for stop in plots.edge_matrix(scores_of()).data[0].colorscale]
    places = [stop[0] for stop in scale]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 1)

    def rgb(value: float) -> np.ndarray:
        """The colour of a score given as a share of the largest."""
        text = sample_colorscale(scale, [0.5 + value / 2])[0]
        return np.array([float(n) for n in re.findall(r"[\d.]+", text)])

    assert rgb(0) == pytest.approx([255, 255, 255], abs=0.5)
    for sign in (-1, 1):
        way = np.linalg.norm(rgb(sign) - rgb(0))
        for share in (0.04, 0.25, 0.64):
            assert np.linalg.norm(rgb(sign * share) - rgb(0)) / way == pytest.approx(math.sqrt(share), abs=0.05)


def test_patching_is_the_tensor_and_keeps_tokens_apart() -> None:
    result = patches(("the", EVIL, "the", " x", "\n"))
    figure = plots.patching(result)
    heat = figure.data[0]
    assert np.array_equal(np.asarray(heat.z, dtype=np.float32), result.tensor.numpy())
    assert heat.zmax == -heat.zmin >= 1.2
    labels = list(figure.layout.xaxis.ticktext)
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3, 4]
    assert [html.unescape(label) for label in labels] == ["the", EVIL, "the", " x", "\\n"]
    assert heat.text[0][0] == "−0.40"
    assert "restored" in figure.layout.title.text
    assert "destroyed" in plots.patching(patches(("a",), "noising")).layout.title.text
    with pytest.raises(MansuError, match="no cell"):
        plots.patching(replace(result, tensor=torch.zeros(0, 0), rows=(), columns=()))


# --- updates ---


def test_bins_show_counts_flips_and_rest_positions() -> None:
    statistics = statistics_of()
    figure = plots.bins(statistics)
    changed, flipped, share, dither, rest = figure.data
    assert np.array_equal(changed.y, statistics.ratio_counts)
    assert np.array_equal(flipped.y, statistics.ratio_flipped)
    at = {round(float(x), 6): float(y) for x, y in zip(share.x, share.y, strict=True)}
    for i in statistics.ratio_counts.nonzero()[:, 0].tolist():
        middle = (statistics.ratio_edges[i] + statistics.ratio_edges[i + 1]).item() / 2
        expected = 100 * statistics.ratio_flipped[i].item() / statistics.ratio_counts[i].item()
        assert at[round(middle, 6)] == pytest.approx(expected)
    assert np.asarray(dither.y) == pytest.approx(np.minimum(100, 100 * 10 ** np.asarray(dither.x)))
    assert rest.y[20] == 100
    total = statistics.to_dataframe().iloc[-1]
    assert number(100 * total["share"]) in figure.layout.title.text
    assert f"{int(total['weights']):,}" in figure.layout.title.text


def test_bins_of_no_change() -> None:
    nothing = replace(statistics_of(), ratio_counts=torch.zeros(100, dtype=torch.int64))
    with pytest.raises(MansuError, match="changed no weight"):
        plots.bins(nothing)
    assert plots.bins(statistics_of(flips=False)).data[1].y.sum() == 0


# --- divergences ---


def test_divergence_bars_carry_values_intervals_and_references() -> None:
    models = [divergence_of("MANSU", -0.1), divergence_of("NPO", 0.99)]
    noise = divergence_of("noise", 1.0)
    figure = plots.circuit_divergence(models, {"noise floor": noise}, bound=0.8)
    bars, references, masses = figure.data
    assert list(bars.x) == [d.value for d in models]
    assert list(references.x) == [noise.value]
    assert references.marker.pattern.shape
    assert not bars.marker.pattern.shape
    for i, d in enumerate(models):
        assert d.value + bars.error_x.array[i] == pytest.approx(d.interval[1])
        assert d.value - bars.error_x.arrayminus[i] == pytest.approx(d.interval[0])
    assert list(masses.x) == [d.mass_loss for d in (*models, noise)]
    assert [re.sub("</?i>", "", t) for t in figure.layout.yaxis.ticktext] == ["MANSU", "NPO", "noise floor"]
    assert {s.x0 for s in figure.layout.shapes} == {0, 0.8, 1}
    assert all(
        figure.layout.xaxis.range[0] < d.interval[0] < d.interval[1] < figure.layout.xaxis.range[1] for d in models
    )
    named = plots.circuit_divergence({"a": models[0], "b": models[0]})
    assert list(named.layout.yaxis.ticktext) == ["a", "b"]


def test_divergence_errors() -> None:
    with pytest.raises(MansuError, match="none given"):
        plots.circuit_divergence([])
    with pytest.raises(MansuError, match="same label"):
        plots.circuit_divergence([divergence_of("a", 1.0), divergence_of("a", 0.0)])
    empty = replace(divergence_of("a", 1.0), original=torch.zeros(0), other=torch.zeros(0), writers=(), readers=())
    with pytest.raises(MansuError, match="'a': it has no edge"):
        plots.divergence_scatter(empty)


def test_divergence_scatter_has_every_edge_once() -> None:
    divergence = divergence_of("MANSU", 0.3)
    figure = plots.divergence_scatter(divergence)
    found = {
        (d[0], d[1]): (x, y)
        for t in figure.data
        if t.mode == "markers"
        for d, x, y in zip(t.customdata, t.x, t.y, strict=True)
    }
    assert found == {(r.writer, r.reader): (r.original, r.other) for r in divergence.edges.itertuples()}
    slopes = {t.name: t.y[1] / t.x[1] for t in figure.data if t.mode == "lines"}
    assert slopes == {"intact": 1, "gone": 0, "inverted": -1}


# --- tables ---


def test_scorecard_prints_values_and_verdicts_as_marks() -> None:
    table = plots.scorecard(card_of("MANSU"))
    header, *rows = cells(table)
    assert header == ["property", "measure", "precision", "bound", "control", "MANSU"]
    assert rows == [
        ["forgetting", "forget MC, %", "full", "≤ 30", "100.0 (un-edited)", "✓ 25.0 [1.0, 26.0]"],
        ["", "forget MC, %", "nf4", "≤ 30", "100.0 (un-edited)", "✗ 66.6 [1.0, 67.6]"],
        ["structural erasure", "CAD", "nf4", "≤ 30", "0.006 (un-edited)", "✓ 1.090"],
    ]
    assert [row[-1] for row in shades(table)] == [True, False, True]
    assert not any(passed is not None for row in shades(table) for passed in row[:-1])
    assert "MANSU: 2 of 3 rows pass" in table.to_html()


def test_a_row_may_be_left_unjudged() -> None:
    first, second, third = card_of("a").rows
    rows = (replace(first, note="not judgeable: few facts", passed=False), second, replace(third, passed=True))
    table = plots.scorecard(Scorecard("a", rows))
    assert [row[-1][0] for row in cells(table)[1:]] == ["·", "✗", "✓"]
    assert [row[-1] for row in shades(table)] == [None, False, True]
    assert "a: 1 of 3 rows pass, 1 not judgeable" in table.to_html()


def test_scorecards_side_by_side() -> None:
    first, second = card_of("MANSU"), card_of("NPO")
    second = replace(second, rows=(*second.rows[:2], row("forgetting", "forget MC, %", "fp4", 12.0, True)))
    header, *rows = cells(plots.scorecard([first, second]))
    assert header == ["property", "measure", "precision", "bound", "control", "MANSU", "NPO"]
    assert [r[2] for r in rows] == ["full", "nf4", "fp4", "nf4"]
    assert rows[0][-2:] == ["✓ 25.0 [1.0, 26.0]", "✓ 25.0 [1.0, 26.0]"]
    assert rows[2][-2:] == ["–", "✓ 12.0 [1.0, 13.0]"]
    assert rows[3][-2:] == ["✓ 1.090", "–"]
    header, *rows = cells(plots.scorecard([first, card_of("NPO", control=98.0)]))
    assert header[4:] == ["MANSU", "MANSU, control", "NPO", "NPO, control"]
    assert (rows[0][5], rows[0][7]) == ("100.0", "98.0")


def test_scorecard_errors() -> None:
    with pytest.raises(MansuError, match="none given"):
        plots.scorecard([])
    with pytest.raises(MansuError, match="not distinct"):
        plots.scorecard([card_of("a"), card_of("a")])
    with pytest.raises(MansuError, match="'a': it has no row"):
        plots.scorecard(replace(card_of("a"), rows=()))


def test_certificate_prints_what_was_found() -> None:
    good, bad = certificate_of(), certificate_of("fp4", kept=1)
    assert good.passed
    assert not bad.passed
    header, *rows = cells(plots.certificate([good, bad]))
    table = {r[0]: r[1:] for r in rows}
    assert header == ["check", "required", "nf4, bfloat16", "fp4, bfloat16"]
    assert table["edited weights whose code changed"] == ["100 %", "✓ 100 %", "✗ 98.75 %"]
    assert table["other weights whose code changed"] == ["0", "✓ 0", "✓ 0"]
    assert table["faults in all"] == ["0", "✓ 0", f"✗ {len(bad.faults)}"]
    assert table["verdict"] == ["✓ pass", "✓ pass", "✗ fail"]
    rounded = replace(bad, rows=(replace(bad.rows[0], weights=10**9, edited=10**9, edited_codes_changed=10**9 - 1),))
    assert cells(plots.certificate(rounded))[4][2] == "✗ < 100 %"
    assert [row[-1] for row in shades(plots.certificate(bad))] == [None] * 3 + [False, True, True, True, False, False]
    with pytest.raises(MansuError, match="none given"):
        plots.certificate([])


# --- PTQ gap ---


def test_ptq_gap_draws_before_and_after() -> None:
    rows = gaps_of()
    figure = plots.ptq_gap(rows, chance=25)
    before = [x for t in figure.data if t.name == "full precision" for x in t.x]
    after = [x for t in figure.data if t.name == "quantized" for x in t.x]
    assert before == rows["before"].tolist()
    assert after == rows["after"].tolist()
    assert list(figure.layout.yaxis.ticktext) == ["NPO", "MANSU"]
    assert next(list(t.x) for t in figure.data if t.name == "came back") == [30, 100, None]
    texts = {a.text for a in figure.layout.annotations}
    assert {"+70.0", "0.0", "−1.0", "base: resident", "base: ordinary"} <= texts
    assert [list(t.x) for t in figure.data if t.name.startswith("chance")] == [[25, 25]] * 2
    assert [t.showlegend is not False for t in figure.data if t.name.startswith("chance")] == [True, False]
    both = pd.concat([rows, rows.assign(quantizer="fp4")])
    assert "NPO, fp4" in plots.ptq_gap(both).layout.yaxis.ticktext


def test_ptq_gap_errors() -> None:
    with pytest.raises(MansuError, match="no column base, after"):
        plots.ptq_gap(gaps_of().drop(columns=["base", "after"]))
    with pytest.raises(MansuError, match="no row"):
        plots.ptq_gap(gaps_of().iloc[:0])


# --- text ---


@given(st.text())
def test_plain_text_comes_back_and_holds_nothing_that_plotly_reads(text: str) -> None:
    shown = plain(text)
    assert not set("<>$\n\r\t") & set(shown)
    # Every & begins an entity of ours, so that what plotly decodes is the text again.
    assert re.sub("&(amp|lt|gt|#36);", "", shown).count("&") == 0
    visible = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    decoded = re.sub("&(amp|lt|gt|#36);", lambda m: {"amp": "&", "lt": "<", "gt": ">", "#36": "$"}[m[1]], shown)
    assert decoded == visible


def test_numbers_for_reading() -> None:
    assert [number(x) for x in (0.12345, -2, math.nan, 0)] == ["0.123", "−2", "–", "0"]
    assert [fixed(x, 1) for x in (-0.04, 99.96, -1.25, math.nan)] == ["0.0", "100.0", "−1.2", "–"]


@pytest.mark.parametrize("theme", THEMES)
def test_no_figure_lets_markup_through(theme: str) -> None:
    for name, figure in all_figures(EVIL, theme).items():
        if isinstance(figure, Styler):
            texts = [figure.to_html()]
        else:
            texts = strings(json.loads(figure.to_json()))
            assert not [t for t in texts if "$x$" in t], name
        assert not [t for t in texts if "<script" in t or "</script" in t], name
        assert any("&lt;script&gt;" in t for t in texts), name


def test_the_themes_differ_in_their_ground() -> None:
    grounds = {plots.bins(statistics_of(), theme=theme).layout.template.layout.paper_bgcolor for theme in THEMES}
    assert len(grounds) == 2


# --- report ---


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._inside = tag
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)


def write_everything(path: Path) -> Path:
    sections = [Section(f"{name} {EVIL}", f"One. {EVIL}", figure) for name, figure in all_figures(EVIL).items()]
    table = pd.DataFrame({EVIL: [EVIL, None], "n": [1234567, 2], "x": [0.123456, math.nan], "ok": [True, False]})
    sections.append(Section("table", "First paragraph.\n\nSecond paragraph.", table=table))
    return write_report(
        path, title=f"Title {EVIL}", sections=sections, environment={EVIL: EVIL, "seed": 7}, summary=f"Sum {EVIL}"
    )


def test_report_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    path = write_everything(tmp_path / "out" / "report.html")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    drawings = list(all_figures().values())
    n_sections, n_figures = len(drawings), sum(not isinstance(each, Styler) for each in drawings)
    assert sum("plotly.js v" in s for s in page.scripts) == 1
    assert sum("Plotly.newPlot" in s and "plotly.js v" not in s for s in page.scripts) == n_figures
    assert page.tags["script"] == n_figures + 2
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert page.tags["section"] == n_sections + 2
    shown = " ".join(page.texts)
    for wanted in (
        f"Title {EVIL}",
        f"Sum {EVIL}",
        f"circuit {EVIL}",
        "1,234,567",
        "0.1235",
        "–",
        "✓ yes",
        "✗ no",
        "seed",
    ):
        assert wanted in shown
    assert '"showSendToCloud": false' in text
    for at, each in enumerate(drawings, 1):
        assert f'id="{"T_" if isinstance(each, Styler) else ""}figure-{at}"' in text


def test_report_errors(tmp_path: Path) -> None:
    with pytest.raises(MansuError, match="it has no section"):
        write_report(tmp_path / "r.html", title="t", sections=[], environment={})
    (tmp_path / "file").write_text("x")
    with pytest.raises(MansuError, match="cannot write there"):
        write_report(tmp_path / "file" / "r.html", title="t", sections=[Section("a", "b")], environment={})
    assert (tmp_path / "file").read_text() == "x"


def test_write_html_loads_nothing(tmp_path: Path) -> None:
    page = Page(plots.write_html(all_figures()["bins"], tmp_path / "a.html", EVIL).read_text(encoding="utf-8"))
    assert all(load.startswith("data:") for load in page.loads)
    assert sum("plotly.js v" in s for s in page.scripts) == 1
    assert EVIL in " ".join(page.texts)
    page = Page(plots.write_html(all_figures()["scorecard"], tmp_path / "b.html", EVIL).read_text(encoding="utf-8"))
    assert all(load.startswith("data:") for load in page.loads)
    assert page.scripts == []  # a table needs none
    assert "✗ 66.600 [1.000, 67.600]" in page.texts


@needs_browser
def test_report_draws_in_a_browser_without_complaint(tmp_path: Path) -> None:
    path = write_everything(tmp_path / "report.html")
    program = browser()
    assert program is not None
    done = subprocess.run(
        [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
    assert "CONSOLE" not in done.stderr
    drawn = done.stdout
    title = re.search(r"<title>(.*?)</title>", drawn, re.DOTALL)
    assert title is not None
    assert html.unescape(title[1]) == f"Title {EVIL}"
    for i, each in enumerate(all_figures().values(), 1):
        if isinstance(each, Styler):
            continue
        part = drawn.split(f'id="figure-{i}"')[1]
        assert 0 <= part.find('class="main-svg"') < part.find("Plotly.newPlot"), i
    assert "Share chart" not in re.sub(r"<script>.*?</script>", "", drawn, flags=re.DOTALL)


# --- images ---


@needs_browser
def test_images_have_the_size_asked_for(tmp_path: Path) -> None:
    figures = all_figures()
    png, svg = tmp_path / "a.png", tmp_path / "sub" / "b.svg"
    written = plots.write_images({png: figures["bins"], svg: figures["ptq_gap"]}, width=500, scale=1.5)
    assert written == [png, svg]
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (750, round(1.5 * figures["bins"].layout.height))
    assert "base: ordinary" in svg.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "b.svg", "sub"]
    plots.write_image(figures["bins"], png, width=300, height=200, scale=1)
    assert struct.unpack(">II", png.read_bytes()[16:24]) == (300, 200)


@needs_browser
def test_a_tables_image_has_all_of_it_and_no_more(tmp_path: Path) -> None:
    short = plots.scorecard(card_of("MANSU"))
    long = plots.scorecard(
        replace(
            card_of("M"),
            rows=tuple(replace(r, measure=f"measure {i}, %") for i in range(60) for r in card_of("M").rows[:1]),
        )
    )
    paths = [tmp_path / name for name in ("short.png", "twice.png", "long.png", "short.pdf", "short.jpg")]
    plots.write_images({paths[0]: short, paths[2]: long, paths[3]: short, paths[4]: short}, scale=1)
    plots.write_image(short, paths[1], scale=2)
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in paths[:3]]
    assert 300 < sizes[0][0] < 1000
    assert 100 < sizes[0][1] < 300
    assert sizes[1] == pytest.approx([2 * n for n in sizes[0]], abs=2)
    assert sizes[2][1] > 60 * 20
    assert paths[3].read_bytes().startswith(b"%PDF")
    assert paths[4].read_bytes().startswith(b"\xff\xd8")


def test_image_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = go.Figure()
    with pytest.raises(MansuError, match=r"'\.bmp'; end it in one of \.png"):
        plots.write_image(figure, tmp_path / "a.bmp")
    with pytest.raises(MansuError, match=r"'\.svg'; end it in one of \.png, \.pdf"):
        plots.write_image(plots.scorecard(card_of("a")), tmp_path / "a.svg")
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    with pytest.raises(MansuError, match="BROWSER_PATH=/no/such/browser is no program; install Chromium"):
        plots.write_image(figure, tmp_path / "a.png")
    program = shutil.which("false")
    if program is not None:
        monkeypatch.setenv("BROWSER_PATH", program)
        with pytest.raises(MansuError, match=f"the browser {program} does not start"):
            plots.write_image(figure, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    assert plots.write_images({}) == []
