"""The figures of comparisons, verification and patching: what is drawn is what was measured."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pandas.io.formats.style import Styler
from plotly.subplots import make_subplots

from mansu_tl import plots
from mansu_tl.circuit import Circuit
from mansu_tl.circuit.curve import FaithfulnessCurve
from mansu_tl.errors import MansuError
from mansu_tl.patching import PatchingResult
from mansu_tl.patching.nodes import NodeScores
from mansu_tl.plots import heatmaps
from mansu_tl.plots.circuit_look import FAINT
from mansu_tl.plots.export import Drawing
from mansu_tl.plots.labels import label_points
from mansu_tl.plots.layered import bundled, path, place
from mansu_tl.plots.ordering import crossings, untangled
from mansu_tl.plots.panels import Panel, series_styles
from mansu_tl.plots.theme import fixed, number, theme_named
from mansu_tl.quantization import grid_of
from mansu_tl.quantization.statistics import predicted_flips
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.verification import Budget, CircuitStages, Divergence, LogitLens, RelearningBudgets
from mansu_tl.verification.depth import ErasureDepth
from mansu_tl.verification.probes import Probes
from mansu_tl.verification.relearning import RelearningCurve
from mansu_tl.verification.resistance import Relearning
from tests.test_plots import (
    EVIL,
    THEMES,
    cells,
    circuit_of,
    divergence_of,
    gaps,
    needs_browser,
    scores_of,
    shades,
    statistics_of,
    strings,
)

FACTS = ("a", "a", "b", "b", "c", "c", "d", "d")


# --- results, made up ---


def curve_of(
    label: str, level: float, rate: float = 3e-4, attack: str = "split 0", kind: str = "facts"
) -> RelearningCurve:
    draw = torch.rand(3, 3, len(FACTS), generator=torch.Generator().manual_seed(len(label) + len(attack)))
    values = (draw < level).float()
    values[2] = 4 * draw[2] - 2
    prior = torch.full_like(values, 0.1)
    return RelearningCurve(label, attack, kind, rate, 0, (0, 10, 50), values, prior, torch.zeros(3), FACTS)


def relearning_of(name: str = "edited") -> Relearning:
    curves = [
        curve_of(label, level, rate, attack)
        for label, level in ((name, 0.4), ("never", 0.2))
        for rate in (3e-4, 1e-3)
        for attack in ("split 0", "split 1!")
    ]
    return Relearning((*curves, curve_of(name, 0.3, kind="text", attack="text")), "never")


def budgets_of(name: str = "edited") -> RelearningBudgets:
    curves = relearning_of(name).curves
    budgets = tuple(Budget("forget facts" if "0" in c.attack else name, 0, c.learning_rate, 0) for c in curves)
    return RelearningBudgets(budgets, curves, "never")


def probes_of(label: str, level: float = 0.5) -> Probes:
    draw = torch.rand(3, len(FACTS), generator=torch.Generator().manual_seed(3))
    return Probes(label, ("embed", "L0", "L1"), draw < level, 0.5 * draw, torch.ones(3), FACTS, 0.25)


def depth_of(label: str, factor: float = 0.5) -> ErasureDepth:
    never = torch.rand(2, len(FACTS), generator=torch.Generator().manual_seed(5)) + 1
    clean = torch.ones(len(FACTS))
    return ErasureDepth(label, ("L0", "L1"), clean, never, factor * never, 0.05, "all", "choice_log_odds", FACTS)


def gaps_of(name: str = "NPO", quantizer: str = "nf4") -> pd.DataFrame:
    rows = [
        (method, which, before, before - 0.5, before + 0.5, after, after - 1.5, after + 1.5)
        for method, before, after in (("MANSU", 25.5, 23.5), (name, 30.5, 96.5))
        for which in (quantizer, "int8")
        if (method, which) != ("MANSU", "int8")
    ]
    names = [f"{key}{end}" for key in ("before", "after") for end in ("", "_low", "_high")]
    frame = pd.DataFrame(rows, columns=["method", "quantizer", *names])
    gap = frame["after"] - frame["before"]
    return frame.assign(gap_low=gap - 1, gap_high=gap + 1, seeds=2)


def settings_of(name: str = "a") -> pd.DataFrame:
    frame = pd.DataFrame({"setting": [name, "b", "c", "d"], "method": ["M", "M", "N", name]})
    frame["forget"], frame["drop"], frame["kept"] = [20.0, 25.0, 30.0, 31.0], [5.0, 1.0, 2.0, 1.0], [1.0, 9.0, 3.0, 4.0]
    frame["forget_low"], frame["forget_high"] = frame["forget"] - 1, frame["forget"] + 2
    return frame


def sweep_of(name: str = "floor") -> pd.DataFrame:
    rows = [
        (setting, value, "MC, %", 10.0 * i + 2, 10.0 * i, 10.0 * i + 5, 3)
        for setting, values in (
            ("rate", (1e-4, 1e-3, 1e-2)),
            ("depth", (1, 2, 3)),
            ("null", (0.0, 0.99, 0.999)),
            (name, ("no", "yes")),
        )
        for i, value in enumerate(values)
    ]
    names = ["hyperparameter", "value", "measure", "result", "result_low", "result_high", "seeds"]
    return pd.DataFrame(rows, columns=names)


def returned_of(name: str = "MANSU") -> pd.DataFrame:
    rows = [
        (name, name, name, "yes", 60.0),
        ("nf4", name, "NPO", "no", 1.0),
        ("fp4", name, "NPO", "not applicable", float("nan")),
    ]
    frame = pd.DataFrame(rows, columns=["format", "model", "method", "comes_back", "points"])
    return frame.assign(points_low=frame["points"] - 1, points_high=frame["points"] + 1)


def plane_of(name: str = "MANSU") -> pd.DataFrame:
    rows = [
        (name, "", 1.0, 20.0),
        (name, "nf4", 1.05, 21.0),
        ("NPO", "", 0.9, 30.0),
        ("NPO", "nf4", 0.05, 99.0),
        ("never", None, 1.0, 24.0),
    ]
    frame = pd.DataFrame(rows, columns=["label", "quantizer", "cad", "accuracy"])
    return frame.assign(cad_low=frame["cad"] - 0.1, cad_high=frame["cad"] + 0.2)


def methods_of(name: str = "MANSU") -> pd.DataFrame:
    rows = [
        (base, method, prop, level, level - 4.8, level + 4.8, bound, 5, "pass" if level < 10 else "fail: inverted")
        for base in ("pocket", "other")
        for method, level in ((name, 5.0), ("NPO", 25.0))
        for prop, bound in (("forget MC", "<= 5"), ("CAD", "0.95 to 5"))
        if (base, method, prop) != ("other", "NPO", "CAD")
    ]
    names = ["base", "method", "property", "value", "low", "high", "bound", "seeds", "verdict"]
    return pd.DataFrame(rows, columns=names)


def weights_of() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of four NF4 blocks: the second edited by a bin, the third by a hair."""
    grid, w = grid_of("nf4"), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    after, width = w.clone(), grid.width(w)
    inner = ~grid.absmax_mask(w) & (w.abs() < 0.6 * w.abs().amax(1, keepdim=True))
    after[1][inner[1]] += 1.01 * width[1][inner[1]]
    after[2] += 1e-7 * inner[2]
    return w, after


def nodes_of(metric: str = "logit_difference") -> NodeScores:
    names = scores_of().writers
    values = torch.linspace(-1, 2, len(names))[torch.randperm(len(names), generator=torch.Generator().manual_seed(1))]
    by_position = torch.zeros(4, len(names))
    by_position[1], by_position[2, 3] = values, -5.0
    return NodeScores(values, names, "clean", metric, per_position=by_position, positions=("0", "1", "2", "3"))


def lens_of(label: str = "edited") -> LogitLens:
    """Embed knows nothing, L0 half, L1 everything."""
    right = torch.tensor([[False] * 8, [True, False] * 4, [True] * 8])
    odds = torch.linspace(-2, 6, 24).reshape(3, 8)
    return LogitLens(label, ("embed", "L0", "L1"), right, right, odds, FACTS, 0.25)


def heads_of(**changes: Any) -> PatchingResult:
    tensor = torch.linspace(-0.2, 1, 16).reshape(4, 4)
    names = (tuple("0123"), ("H0", "H1", "H2", "H3"))
    facts = ("layer", "head", "head outputs", "denoising", "logit_difference", 9.0, -1.0)
    return replace(PatchingResult(tensor, *names, *facts), **changes)


def curves_of() -> FaithfulnessCurve:
    values, control = torch.tensor([0.0, 0.5, 0.9, 1.0]), torch.tensor([[0, 0.0, 0.1, 1.0], [0, 0.2, 0.3, 1.0]])
    return FaithfulnessCurve(
        values, control, (0, 10, 40, 100), (0.0, 0.1, 0.4, 1.0), (0, 8, 38, 100), 100, "eap", "m", "corrupt"
    )


def all_figures(name: str, theme: str) -> dict[str, Drawing]:
    """Every figure, with `name` wherever a user's text can get in."""
    look = {"theme": theme}
    divergence = replace(divergence_of(name, 0.1, 120), label=name)
    circuit = replace(circuit_of(), how=name)
    return {
        "relearning": plots.relearning(relearning_of(name), chance=25, **look),
        "relearning_budgets": plots.relearning_budgets(budgets_of(name), **look),
        "probes": plots.probes([probes_of(name), probes_of("never")], reference=name, **look),
        "erasure_depth": plots.erasure_depth(replace(depth_of(name), metric=name), **look),
        "frontier": plots.frontier(
            settings_of(name).rename(columns={"drop": name}), "forget", name, group="method", default=name, **look
        ),
        "sensitivity": plots.sensitivity(sweep_of(name).assign(measure=name), defaults={name: "no"}, **look),
        "ptq_gaps": plots.ptq_gap(gaps_of(name, name), panels="quantizer", chance=25, measure=name, **look),
        "gap_matrix": plots.gap_matrix(gaps_of(name, name), measure=name, **look),
        "comes_back": plots.comes_back(returned_of(name), **look),
        "dither": plots.dither({name: predicted_flips(statistics_of())}, {name: statistics_of()}, **look),
        "divergence_plane": plots.divergence_plane(plane_of(name).replace("nf4", name), measure=name, **look),
        "divergence_by_layer": plots.divergence_by_layer({name: divergence}, **look),
        "methods_table": plots.methods_table(
            methods_of(name).replace("CAD", name).replace("pocket", name).replace("<= 5", name), **look
        ),
        "ruler": plots.ruler(*weights_of(), grid_of("nf4"), name=name, **look),
        "circuit_layers": plots.circuit_layers(circuit, **look),
        "circuit_stages": plots.circuit_stages(circuit, {name: divergence}, **look),
        "node_scores": plots.node_scores(replace(nodes_of(name), writers=(name, *nodes_of().writers[1:])), **look),
        "head_scores": plots.head_scores(nodes_of(name), **look),
        "direct_logit_attribution": plots.direct_logit_attribution(replace(scores_of(), metric=name), **look),
        "logit_lens": plots.logit_lens(lens_of(name), **look),
        "token_scores": plots.token_scores(nodes_of(name), ["<bos>", name, name, "x"], **look),
        "attribution_scatter": plots.attribution_scatter(
            pd.DataFrame({"name": [name, "b"], "exact": [1.0, 2.0], "attribution": [1.0, 2.0], "kind": [name, name]}),
            **look,
        ),
        "attention_patterns": plots.attention_patterns(torch.eye(2)[None], [name, "b"], [name], **look),
        "faithfulness_curves": plots.faithfulness_curves({name: curves_of()}, **look),
        "titled": plots.gap_matrix(gaps_of(), title=name, **look),
    }


def named(figure: go.Figure, name: str) -> list[Any]:
    """The traces of that name."""
    return [trace for trace in figure.data if trace.name == name]


# --- everything ---


@pytest.mark.parametrize("theme", THEMES)
def test_no_figure_lets_markup_through(theme: str) -> None:
    for name, figure in all_figures(EVIL, theme).items():
        texts = [figure.to_html()] if isinstance(figure, Styler) else strings(json.loads(figure.to_json()))
        if isinstance(figure, Styler):
            texts = [text.replace("$x$", "") for text in texts]  # no formula is read into a table
        assert not [text for text in texts if "<script" in text or "</script" in text or "$x$" in text], name
        assert any("&lt;script&gt;" in text for text in texts), name


def test_themes_differ_and_every_figure_has_a_title_and_a_height() -> None:
    light, dark = (all_figures("model", theme) for theme in THEMES)
    assert light.pop("methods_table").to_html() != dark.pop("methods_table").to_html()
    for name in light:
        assert light[name].layout.template.layout.paper_bgcolor != dark[name].layout.template.layout.paper_bgcolor
        assert light[name].layout.title.text.startswith("<b>")
        assert 200 < light[name].layout.height < 1500
        assert light[name].layout.height == dark[name].layout.height


@needs_browser
def test_figures_can_be_drawn(tmp_path: Any) -> None:
    figures = all_figures("model", "light")
    chosen = {tmp_path / f"{name}.png": figures[name] for name in ("ruler", "circuit_stages", "relearning")}
    for written in plots.write_images(chosen, scale=1):
        assert written.stat().st_size > 8000


def seen_without_green(colour: str) -> np.ndarray:
    """A colour as deuteranopia shows it, in linear light (Machado et al. 2009, severity 1)."""
    light = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    shown = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    return np.clip(np.array(shown) @ linear, 0, 1)


def lightness(linear: np.ndarray) -> float:
    """CIE L*, 0 to 100: what grey print shows."""
    y = float(np.array([0.2126, 0.7152, 0.0722]) @ linear)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("theme", THEMES)
def test_colours_that_mean_something_differ_in_grey_or_without_green(theme: str) -> None:
    """Pairs that a figure tells apart by colour: far apart in lightness, or in what deuteranopia leaves of them."""
    look = theme_named(theme)
    # What passes and what fails have marks of their own in every table.
    pairs = [*zip(look.supporting, look.opposing, strict=True), look.diverging[::2]]
    pairs += [(tones[i], tones[i + 1]) for tones in (look.supporting, look.opposing) for i in range(2)]
    for a, b in pairs:
        apart = float(np.abs(seen_without_green(a) - seen_without_green(b)).max())
        assert apart > 0.08 or abs(lightness(seen_without_green(a)) - lightness(seen_without_green(b))) > 12, (a, b)
    for tones in (
        look.supporting,
        look.opposing,
    ):  # the inputs of attention, of MLPs and of the logits, in grey print too
        steps = [lightness(seen_without_green(tone)) for tone in tones]
        assert min(abs(p - q) for i, p in enumerate(steps) for q in steps[:i]) > 8, steps
    # Series differ by mark or dash where their colours are alike.
    styles = list(series_styles([*"abcdefghijklmno"], look).values())
    alike = [
        (p, q) for i, p in enumerate(styles) for q in styles[:i]
        if np.abs(seen_without_green(p.colour) - seen_without_green(q.colour)).max() < 0.05
    ]  # fmt: skip
    assert all((p.symbol, p.dash) != (q.symbol, q.dash) for p, q in alike)


def test_styles_differ_in_colour_and_mark_and_references_are_grey() -> None:
    look = theme_named("light")
    styles = series_styles([*"abcdefgh", "never"], look, ["never"])
    assert len({(s.colour, s.symbol) for s in styles.values()}) == 9
    assert len({s.symbol for s in list(styles.values())[:8]}) == 8
    assert (styles["never"].colour, styles["never"].dash) == (look.muted, "dot")


# --- verification ---


def test_relearning_draws_means_and_intervals_of_all_splits_together() -> None:
    result = relearning_of()
    figure = plots.relearning(result, chance=25)
    lines = [t for t in named(figure, "edited") if t.mode == "lines+markers"]
    assert len(lines) == 4  # two rates, two measures
    assert sum(t.showlegend is not False for t in lines) == 1
    mine = [c for c in result.curves if c.label == "edited" and c.kind == "facts" and c.learning_rate == 3e-4]
    answers = torch.cat([c.values[0, 2].double() for c in mine])
    low, high = interval_over_facts(answers, [*FACTS, *FACTS])
    assert lines[0].y[2] == pytest.approx(100 * answers.mean().item())
    assert list(lines[0].customdata[2]) == pytest.approx([50, 100 * low, 100 * high])
    band = named(figure, "edited, band")[0]
    assert 100 * high in [pytest.approx(v) for v in band.y]
    above = plots.relearning(result, excess=True, measures=("multiple_choice",))
    assert named(above, "edited")[1].y[2] == pytest.approx(100 * (answers.mean().item() - 0.1))
    assert named(figure, "never")[1].line.dash == "dot"
    assert len(plots.relearning(result, kind="text").layout.annotations) == 1  # one rate


def test_relearning_errors() -> None:
    result = relearning_of()
    for options, message in (
        ({"kind": "noise"}, "no curve of kind 'noise'; it has facts, text"),
        ({"measures": ()}, "no measure to draw"),
        ({"measures": ("bleu",)}, "bleu"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.relearning(result, **options)
    other = replace(curve_of("x", 0.5), steps=(1, 2, 3))
    with pytest.raises(MansuError, match="share no step"):
        plots.relearning(Relearning((curve_of("edited", 0.1), other)))


def test_probes_draw_accuracies_reference_and_chance() -> None:
    results = [probes_of("edited", 0.3), probes_of("never", 0.6)]
    figure = plots.probes(results, reference="never")
    for each in results:
        line = next(t for t in named(figure, each.label) if t.mode == "lines+markers")
        assert list(line.y) == pytest.approx((100 * each.right.double().mean(1)).tolist())
    assert any("chance 25" in (a.text or "") for a in figure.layout.annotations)
    for wrong, message in (
        ([], "none given"),
        ([probes_of("a"), probes_of("a")], "not distinct"),
        ([probes_of("a"), replace(probes_of("b"), layers=("embed", "L0", "L9"))], "different layers"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.probes(wrong)
    with pytest.raises(MansuError, match="reference 'x' is none of edited"):
        plots.probes(results, reference="x")


def test_erasure_depth_draws_drops_and_scores() -> None:
    results = [depth_of("edited", 0.5), depth_of("other", 0.9)]
    figure = plots.erasure_depth(results)
    never = named(figure, "never trained")[0]
    assert list(never.y) == pytest.approx(results[0].never.double().mean(1).tolist())
    line = next(t for t in named(figure, "other") if t.mode == "lines+markers")
    assert list(line.y) == pytest.approx([0.9 * v for v in never.y])
    points = [t for t in figure.data if t.mode == "markers+text"]
    assert [t.x[0] for t in points] == pytest.approx([0.5, 0.9])
    assert [t.text[0] for t in points] == ["0.50", "0.90"]
    with pytest.raises(MansuError, match="another reference"):
        plots.erasure_depth([results[0], replace(results[1], never=2 * results[1].never)])


# --- comparisons ---


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12), st.booleans())
def test_pareto_is_what_no_other_point_beats(points: list[tuple[int, int]], up: bool) -> None:
    frame = pd.DataFrame(points, columns=["x", "y"]).astype(float)
    front = plots.pareto(frame, "x", "y", ["y"] if up else [])
    sign = -1 if up else 1
    wanted = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in points)
    ]
    assert sorted(front.index) == wanted
    assert front["x"].is_monotonic_increasing


def test_frontier_joins_pareto_points_and_rings_the_default() -> None:
    figure = plots.frontier(settings_of(), "forget", ["drop", "kept"], group="method", default="b", higher_is_better=["kept"],
                            bounds={"forget": 28.0, "drop": 2.0})  # fmt: skip
    fronts = named(figure, "not beaten in both")
    assert [d[0] for d in fronts[0].customdata] == ["a", "b"]
    assert [d[0] for d in fronts[1].customdata] == ["a", "b"]
    rings = named(figure, "default: b")
    assert [(t.x[0], t.y[0]) for t in rings] == [(25.0, 1.0), (25.0, 9.0)]
    points = [t for t in figure.data if t.mode == "markers" and t.customdata is not None]
    assert sorted(d[0] for t in points for d in t.customdata) == sorted(2 * ["a", "b", "c", "d"])
    assert list(points[0].error_x.array) == [2.0, 2.0]
    box = figure.layout.shapes[0]
    assert (box.x1, box.y1) == (28.0, 2.0)
    assert "left and down or up" in figure.layout.title.text
    assert [t.line.shape for t in fronts] == ["hv", "vh"]


def test_a_name_lies_on_no_line_and_outside_the_ring() -> None:
    def shifts(**options) -> list[tuple[float, float]]:
        frame = pd.DataFrame({"setting": ["a", "b"], "x": [0.0, 10.0], "y": [5.0, 1.0]})
        written = plots.frontier(frame, "x", "y", **options).layout.annotations
        assert [note.text for note in written] == ["a", "b"]
        return [(note.xshift, note.yshift) for note in written]

    free = shifts()
    assert free[0][1] > 7  # above the line that leaves "a" to the right
    ringed = shifts(default="a")
    assert max(abs(ringed[0][0]), abs(ringed[0][1]) - 7) >= 10
    assert ringed[1] == free[1]


def test_frontier_errors() -> None:
    frame = settings_of()
    for args, options, message in (
        (("forget", []), {}, "no column for the vertical axis"),
        (("forget", "depth"), {}, "no column depth"),
        (("forget", "drop"), {"default": "z"}, "default 'z' is no setting"),
        (("forget", "drop"), {"bounds": {"kept": 1.0}}, "'kept' is neither x nor y"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.frontier(frame, *args, **options)
    with pytest.raises(MansuError, match="two rows are called 'b'"):
        plots.frontier(frame.replace("c", "b"), "forget", "drop")
    with pytest.raises(MansuError, match="no setting has both"):
        plots.frontier(frame.assign(drop=math.nan), "forget", "drop")
    with pytest.raises(MansuError, match="no row"):
        plots.frontier(frame.iloc[:0], "forget", "drop")


def test_sensitivity_draws_means_and_ranges_on_a_fitting_scale() -> None:
    figure = plots.sensitivity(sweep_of(), defaults={"rate": 1e-3, "floor": "yes"}, bound=5)
    panels = named(figure, "MC, %")
    assert len(panels) == 4
    for panel in panels:
        assert list(panel.y) == pytest.approx([10.0 * i + 2 for i in range(len(panel.y))])
        assert list(panel.error_y.array) == pytest.approx([3.0] * len(panel.y))
        assert list(panel.error_y.arrayminus) == pytest.approx([2.0] * len(panel.y))
    assert [list(p.x) for p in panels] == [[-4, -3, -2], [1, 2, 3], [0, 1, 2], [0, 1]]
    assert [p.mode for p in panels] == ["lines+markers"] * 3 + ["markers"]
    defaults = [s for s in figure.layout.shapes if s.x0 == s.x1]
    assert [s.x0 for s in defaults] == [-3, 1]
    with pytest.raises(MansuError, match="default for 'momentum'"):
        plots.sensitivity(sweep_of(), defaults={"momentum": 1})
    with pytest.raises(MansuError, match="no column measure"):
        plots.sensitivity(sweep_of().drop(columns="measure"))
    with pytest.raises(MansuError, match="two rows for one value and measure"):
        plots.sensitivity(pd.concat([sweep_of(), sweep_of()]))
    bare = plots.sensitivity(sweep_of()[["hyperparameter", "value", "measure", "result"]])
    assert list(named(bare, "MC, %")[0].error_y.array) == [0.0, 0.0, 0.0]


def test_sensitivity_draws_what_moves_a_result_and_names_the_rest() -> None:
    figure = plots.sensitivity(sweep_of(), least=15)
    assert [a.text for a in figure.layout.annotations] == ["rate", "depth", "null"]
    assert "These move no result by 15: floor." in figure.layout.title.text
    assert len(named(plots.sensitivity(sweep_of(), least=99), "MC, %")) == 4


def test_ptq_gaps_draw_means_ranges_and_gaps() -> None:
    figure = plots.ptq_gap(gaps_of(), panels="quantizer", chance=25)
    before, after = named(figure, "full precision"), named(figure, "quantized")
    assert [list(t.x) for t in before] == [[25.5, 30.5], [30.5]]
    assert [list(t.x) for t in after] == [[23.5, 96.5], [96.5]]
    assert list(after[0].error_x.array) == [1.5, 1.5]
    assert [list(t.y) for t in after] == [[0, 1], [1]]
    texts = [a.text for a in figure.layout.annotations]
    assert texts == ["nf4", "int8", "−2.0", "+66.0", "+66.0"]
    assert list(figure.layout.xaxis.range) == [-4, 122]
    close = plots.ptq_gap(gaps_of()[:1], panels="quantizer", chance=25)
    assert not named(close, "came back")
    assert 15 < close.layout.xaxis.range[0] < 22 < 26 < close.layout.xaxis.range[1] < 35
    assert [list(t.x) for t in named(figure, "came back")] == [[30.5, 96.5, None]] * 2
    assert "Means over 2 seeds" in figure.layout.title.text
    with pytest.raises(MansuError, match="two rows for one method and quantizer"):
        plots.ptq_gap(pd.concat([gaps_of(), gaps_of()]), panels="quantizer")
    with pytest.raises(MansuError, match="no column base"):
        plots.ptq_gap(gaps_of())


def test_gap_matrix_leaves_out_what_was_not_measured() -> None:
    heat = plots.gap_matrix(gaps_of()).data[0]
    assert np.array_equal(heat.z, [[-2.0, np.nan], [66.0, 66.0]], equal_nan=True)
    assert [list(row) for row in heat.text] == [["−2.0", ""], ["+66.0", "+66.0"]]
    assert list(heat.customdata[1][0]) == ["+65.0", "+67.0", 2]


@pytest.mark.parametrize("several", [True, False])
def test_methods_table_prints_value_interval_and_verdict(several: bool) -> None:
    frame = methods_of() if several else methods_of()[lambda f: f["base"] == "pocket"]
    table = plots.methods_table(frame, digits={"CAD": 2})
    header, *rows = cells(table)
    assert header == [*(["base"] if several else []), "method", "forget MC\n≤ 5", "CAD\n0.95 to 5"]
    assert rows[0][-3:] == ["MANSU", "5.0 ✓\n[0.2, 9.8]", "5.00 ✓\n[0.20, 9.80]"]
    assert rows[1][-3:-1] == ["NPO", "25.0 ✗\n[20.2, 29.8]"]
    assert [row[-2:] for row in shades(table)[:2]] == [[True, True], [False, False]]
    if several:
        assert [row[0] for row in rows] == ["pocket", "", "other", ""]
        assert rows[3][-1] == "–"
        assert shades(table)[3][-1] is None
    assert f"{4 if several else 2} of {7 if several else 4}" in table.to_html()
    short = cells(plots.methods_table(frame, intervals=False))
    assert short[0][-1] == "within"
    assert short[1][-2:] == ["5.0 ✓", "2 of 2"]


def test_methods_table_with_one_seed_and_errors() -> None:
    frame = methods_of()[:1].assign(seeds=1, verdict="not judgeable: few facts")
    table = plots.methods_table(frame)
    assert cells(table)[1] == ["MANSU", "5.0\n[0.2, 9.8]"]
    assert "over facts" in table.to_html()
    assert cells(plots.methods_table(frame.assign(low=math.nan)))[1][1] == "5.0"
    assert "Mean over 1 to 5 seeds" in plots.methods_table(pd.concat([frame, methods_of()[1:]])).to_html()
    with pytest.raises(MansuError, match="two rows for one method and property"):
        plots.methods_table(pd.concat([frame, frame]))
    with pytest.raises(MansuError, match="no column property"):
        plots.methods_table(frame.drop(columns="property"))


# --- quantization ---


def test_dither_draws_measured_and_predicted_shares() -> None:
    statistics = statistics_of()
    table = predicted_flips(statistics)
    figure = plots.dither({"pocket": table, "other": table}, {"pocket": statistics, "other": statistics})
    measured = named(figure, "measured")
    assert len(measured) == 2
    assert list(measured[0].y) == pytest.approx((100 * table["measured"].iloc[:-1]).tolist())
    assert list(named(figure, "predicted from where they rest")[0].y) == pytest.approx(
        (100 * table["by_position"].iloc[:-1]).tolist()
    )
    bars = [t for t in figure.data if t.type == "bar"]
    assert sum(bars[0].y) == pytest.approx(100)
    assert any(f"measured {fixed(100 * table['measured'].iloc[-1], 2)} %" in a.text for a in figure.layout.annotations)
    assert len(plots.dither({"pocket": table}).data) == 3
    for args, message in (
        (({},), "none given"),
        (({"a": table}, {"b": statistics}), "name them alike"),
        (({"a": table.drop(columns="uniform")},), "no column uniform"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.dither(*args)


def test_ruler_follows_every_weight_to_its_code() -> None:
    before, after = weights_of()
    grid = grid_of("nf4")
    encoded = grid.encode(before)
    figure = plots.ruler(before, after, grid)
    codes = named(figure, "codes")[0]
    assert list(codes.x) == pytest.approx(grid.levels.tolist())
    steps = figure.layout.sliders[0].steps
    assert [step.label for step in steps] == ["1", "2"]  # the edited blocks
    for step in steps:
        block = int(step.label)
        update, layout, traces = step.args
        assert [figure.data[i].name for i in traces] == ["not edited", "edited, another code", "edited, rounded back"]
        scale = encoded.absmax[block].item()
        changed = before[block] != after[block]
        crossed = changed & (grid.codes(after, encoded.absmax)[block] != encoded.codes[block])
        counts = [(~changed).sum(), crossed.sum(), (changed & ~crossed).sum()]
        drawn = [list(x) for x in update["x"]]
        assert [x.count(None) for x in drawn] == [int(c) for c in counts]
        assert bool(crossed.any()) == (block == 1)
        kind = 1 if block == 1 else 2
        first = int(changed.nonzero()[0])
        value = grid.levels[grid.codes(after, encoded.absmax)[block, first].long()].item()
        assert drawn[kind][:3] == pytest.approx(
            [before[block, first].item() / scale, after[block, first].item() / scale, value], abs=1e-6
        )
        assert f"{int(changed.sum())} edited" in layout["annotations[0].text"]
    shown = [list(figure.data[i].x) for i in traces]
    assert shown == [list(x) for x in steps[0].args[0]["x"]]
    assert "block 1: 64 weights" in figure.layout.annotations[0].text
    assert len(plots.ruler(before, after, grid, blocks=[3]).layout.sliders) == 0


def test_ruler_measures_each_side_by_its_own_scale() -> None:
    before, _ = weights_of()
    after = before.clone()
    top = int(before[1].abs().argmax())
    after[1, top] *= 2  # the block's scale doubles, every other weight's code may change
    figure = plots.ruler(before, after, grid_of("nf4"), blocks=[1])
    sign = 1.0 if before[1, top] > 0 else -1.0
    edited = [v for t in named(figure, "edited, rounded back") for v in t.x]
    assert edited == [sign, sign, sign, None]
    kept = named(figure, "not edited")[0]
    assert kept.x[1] == pytest.approx(kept.x[0] / 2, abs=1e-6)
    assert "then" in figure.layout.annotations[0].text


def test_ruler_errors() -> None:
    before, after = weights_of()
    with pytest.raises(MansuError, match="one matrix before and after"):
        plots.ruler(before, after[:2], grid_of("nf4"))
    with pytest.raises(MansuError, match=r"block 9, the matrix has 4; choose 0\.\.3"):
        plots.ruler(before, after, grid_of("nf4"), blocks=[9])
    with pytest.raises(MansuError, match="no block to draw"):
        plots.ruler(before, after, grid_of("nf4"), blocks=[])
    with pytest.raises(MansuError, match="no fixed codes"):
        plots.ruler(before, after, grid_of("int4-asym-g64"))


# --- circuits ---


def test_divergence_plane_places_models_in_quadrants() -> None:
    figure = plots.divergence_plane(plane_of())
    points = {(t.name, t.customdata[0][0]): (t.x[0], t.y[0], t.marker.color) for t in figure.data}
    assert points["NPO", "nf4"][:2] == (0.05, 99.0)
    assert points["never", "full precision"][2] == points["NPO", "full precision"][2] != points["NPO", "nf4"][2]
    names = {a.text: (a.x, a.y) for a in figure.layout.annotations if a.text}
    assert set(names) == {f"<b>{name}</b>" for name in ("retained", "filtered", "erased or suppressed", "damaged")}
    assert names["<b>retained</b>"][0] < 0.5 < names["<b>erased or suppressed</b>"][0]
    assert names["<b>filtered</b>"][1] < 50 < names["<b>damaged</b>"][1]
    arrows = [a for a in figure.layout.annotations if a.showarrow]
    assert [(a.ax, a.ay, a.x, a.y) for a in arrows] == [(1.0, 20.0, 1.05, 21.0), (0.9, 30.0, 0.05, 99.0)]
    assert figure.data[0].error_x.array[0] == pytest.approx(0.2)
    assert figure.data[0].error_y.array is None
    with pytest.raises(MansuError, match="two rows for quantizer 'nf4'"):
        plots.divergence_plane(pd.concat([plane_of(), plane_of().iloc[1:2]]))


def test_a_crowd_of_silent_models_is_drawn_larger_with_names() -> None:
    crowd = pd.DataFrame({"label": [*"abcdef"], "cad": np.linspace(0.9, 1.1, 6), "accuracy": np.linspace(18, 30, 6)})
    figure = plots.divergence_plane(pd.concat([plane_of(), crowd.assign(quantizer="")], ignore_index=True))
    large = [t for t in figure.data if t.xaxis == "x2"]
    assert {t.name for t in large} == {*"abcdef", "MANSU", "NPO", "never"}
    assert all(t.y[0] < 50 for t in large)
    assert not any(t.showlegend for t in large)
    assert {a.text for a in figure.layout.annotations if a.xref == "x2"} >= {*"abcdef"}
    assert figure.layout.xaxis2.range[0] > 0.5


def test_divergence_by_layer_adds_up_to_the_whole() -> None:
    given_ = {"edited": divergence_of("edited", 0.1, 120), "nf4": divergence_of("nf4", 0.7, 120)}
    figure = plots.divergence_by_layer(given_)
    bars, heat = figure.data
    weight = np.array(bars.y) / 100
    assert weight.sum() == pytest.approx(1)
    assert next(iter(bars.x)) == "embed"
    for row, each in zip(np.array(heat.z), given_.values(), strict=True):
        assert (weight * row).sum() == pytest.approx(each.value, abs=1e-5)
    edges = given_["edited"].edges
    second = edges[edges["writer"].isin(["L1H0", "L1H1", "L1H2", "L1H3", "MLP1"])]
    a, b = second["original"].to_numpy(), second["other"].to_numpy()
    assert np.array(heat.z)[0][list(bars.x).index("layer 1")] == pytest.approx(1 - (a @ b) / (a @ a), abs=1e-6)
    with pytest.raises(MansuError, match="'b' was measured on another circuit"):
        plots.divergence_by_layer({"a": given_["edited"], "b": divergence_of("b", 0.1, 10)})
    with pytest.raises(MansuError, match="none given"):
        plots.divergence_by_layer({})


def edge_points(figure: go.Figure, axis: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Score and place of every edge of a panel."""
    traces = [t for t in figure.data if t.name and t.name.startswith("edges into") and (t.xaxis or "x") == axis]
    return {(d[0], d[1]): (d[2], x, y) for t in traces for d, x, y in zip(t.customdata, t.x, t.y, strict=True)}


def test_circuit_stages_share_edges_layout_and_scale() -> None:
    circuit = circuit_of()
    frame = circuit.to_dataframe()
    a = torch.tensor(frame["score"].tolist())
    names = (tuple(frame["writer"]), tuple(frame["reader"]))
    half = Divergence(0.5, (0.4, 0.6), 0.5, (0.4, 0.6), a, 0.5 * a, *names, "half")
    figure = plots.circuit_stages(circuit, {"edited": half, "turned": replace(half, other=-a, value=2.0)})
    first, second, third = (edge_points(figure, axis) for axis in ("x", "x2", "x3"))
    assert {pair: v[0] for pair, v in first.items()} == {(r.writer, r.reader): r.score for r in frame.itertuples()}
    for pair, (score, x, y) in first.items():
        assert second[pair] == pytest.approx((score / 2, x, y), abs=1e-6)
        assert third[pair][0] == pytest.approx(-score, abs=1e-6)

    def widest(axis: str) -> float:
        drawn = [t for t in figure.data if t.mode == "lines" and t.legendgroup in ("q", "k", "v", "mlp", "logits")]
        return max(t.line.width for t in drawn if len(t.x) > 1 and (t.xaxis or "x") == axis)

    assert widest("x") == widest("x3") > widest("x2")
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [
        f"<b>original</b><br>{circuit.n_edges} edges",
        "<b>edited</b><br>CAD 0.50",
        "<b>turned</b><br>CAD 2.00",
    ]
    assert sum(t.name == "supports the answer" for t in figure.data) == 1


def test_circuit_stages_in_rows_draw_the_strongest_edges_and_grey_what_is_gone(tmp_path: Any) -> None:
    circuit = circuit_of()
    frame = circuit.to_dataframe()
    a = torch.tensor(frame["score"].tolist())
    names = (tuple(frame["writer"]), tuple(frame["reader"]))
    gone = Divergence(1.0, (0.9, 1.1), 1.0, (0.9, 1.0), a, 1e-6 * a, *names, "gone")
    back = replace(gone, value=0.0, other=a)
    rows = {"one": {"edited": gone, "shipped": back}, "two": {"edited": gone, "shipped": gone}}
    stages = CircuitStages.of(circuit, rows, 40)
    again = CircuitStages.load(stages.save(tmp_path / "stages.safetensors"))
    figure = plots.circuit_stages(again, strongest=30)
    strong = set(circuit.edges[:30])
    assert all(set(edge_points(figure, f"x{i}")) == strong for i in ("", 2, 3, 4, 5, 6))
    first = edge_points(figure, "x")
    assert {pair: v[0] for pair, v in edge_points(figure, "x3").items()} == {pair: v[0] for pair, v in first.items()}

    def colours(axis: str) -> set[str]:
        return {t.line.color for t in figure.data if t.mode == "lines" and t.legendgroup in ("q", "k", "v", "mlp", "logits")
                and (t.xaxis or "x") == axis and len(t.x) > 1}  # fmt: skip

    grey = theme_named("light").neutral
    assert colours("x2") == colours("x6") == {grey}
    assert grey not in colours("x") | colours("x3")
    share = a.abs().sort(descending=True).values
    assert stages.share(30) == pytest.approx((share[:30].sum() / share.sum()).item(), rel=1e-5)
    assert f"The 30 strongest of {circuit.n_edges} edges" in figure.layout.title.text
    titles = [note.text for note in figure.layout.annotations]
    assert titles[2] == "<b>one: shipped</b><br>CAD 0.00"
    with pytest.raises(MansuError, match="strongest=0"):
        plots.circuit_stages(again, strongest=0)


def test_circuit_stages_of_circuits_show_their_own_edges() -> None:
    small, large = circuit_of(40), circuit_of(120)
    figure = plots.circuit_stages(large, {"rediscovered": small})
    assert set(edge_points(figure, "x2")) == set(small.edges)
    shared = edge_points(figure, "x")
    for pair, (_, x, y) in edge_points(figure, "x2").items():
        assert shared[pair][1:] == (x, y)
    for stages, message in (
        ({}, "none given"),
        ({"a": circuit_of(40, layers=2)}, "different shape"),
        ({"original": small}, "two panels are called 'original'"),
        ({"a": divergence_of("short", 0.1, 10)}, "'short' was measured on another circuit"),
        ({"a": large - large}, "without an edge"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.circuit_stages(large, stages)
    with pytest.raises(MansuError, match="no edge to draw"):
        plots.circuit_stages(large - large, {"a": small})


def test_circuit_of_500_edges_keeps_the_strong_ones_in_front() -> None:
    circuit = Circuit.top(scores_of(layers=4, heads=8, kv=8, tail=3.0), 550)
    assert circuit.n_edges > 300
    figure = plots.circuit(circuit)
    drawn = [
        t
        for t in figure.data
        if t.mode == "lines" and t.legendgroup in ("q", "k", "v", "mlp", "logits") and len(t.x) > 1
    ]
    assert [t.line.width for t in drawn] == sorted(t.line.width for t in drawn)
    assert drawn[0].opacity < 0.45 < 0.9 < drawn[-1].opacity
    dashes = {t.legendgroup: t.line.dash for t in drawn}
    assert len({dashes["q"], dashes["k"], dashes["v"]}) == 3


def test_faithfulness_curves_draw_sizes_control_and_area() -> None:
    curve = curves_of()
    figure = plots.faithfulness_curves({"eap": curve, "other": replace(curve, control=torch.zeros(0, 4))})
    line = named(figure, f"eap (area {fixed(curve.cpr, 2)})")[0]
    assert list(line.x) == [10, 40, 100]
    assert list(line.y) == pytest.approx([0.5, 0.9, 1.0])
    control = named(figure, "random edges")
    assert len(control) == 1
    assert list(control[0].y) == pytest.approx([0.1, 0.2, 1.0])
    band = named(figure, "random, band")
    assert list(band[0].y) == pytest.approx([0.2, 0.3, 1.0, 1.0, 0.1, 0.0])
    with pytest.raises(MansuError, match="none given"):
        plots.faithfulness_curves({})
    nothing = replace(curve, sizes=(0, 0, 0, 0))
    with pytest.raises(MansuError, match="no size above 0"):
        plots.faithfulness_curves({"a": nothing})


# --- nodes ---


def test_node_scores_are_the_largest_in_order() -> None:
    scores = nodes_of()
    figure = plots.node_scores(scores, most=6)
    shown = {name: value for trace in figure.data for name, value in zip(trace.y, trace.x, strict=True)}
    wanted = sorted(zip(scores.writers, scores.tensor.tolist(), strict=True), key=lambda pair: -abs(pair[1]))[:6]
    assert shown == pytest.approx(dict(wanted))
    assert list(figure.layout.yaxis.categoryarray)[::-1] == [name for name, _ in wanted]
    assert "What each node is worth" in plots.node_scores(scores, most=500).layout.title.text
    with pytest.raises(MansuError, match="most=0"):
        plots.node_scores(scores, most=0)


def test_head_scores_are_placed_by_layer_and_head() -> None:
    scores = nodes_of()
    heat = plots.head_scores(scores).data[0]
    for name, value in zip(scores.writers, scores.tensor.tolist(), strict=True):
        if name != "embed":
            row, column = (int(name[3:]), 4) if name.startswith("MLP") else (int(name[1]), int(name[3]))
            assert heat.z[row][column] == pytest.approx(value)
    assert np.shape(heat.z) == (4, 5)
    with pytest.raises(MansuError, match="no head and no MLP"):
        plots.head_scores(replace(scores, tensor=scores.tensor[:1], writers=("embed",), per_position=None))


def test_direct_logit_attribution_is_the_scores_of_the_edges_into_the_logits() -> None:
    scores = scores_of()
    figure = plots.direct_logit_attribution(scores)
    heat, column = figure.data[0], scores.readers.index("logits")
    for name, value in zip(scores.writers, scores.tensor[:, column].tolist(), strict=True):
        if name != "embed":
            row, at = (int(name[3:]), 4) if name.startswith("MLP") else (int(name[1]), int(name[3]))
            assert heat.z[row][at] == pytest.approx(value)
    whole = float(scores.tensor[:, column].sum())
    assert f"add up to {number(whole, 3)} of {number(17.0, 3)}" in figure.layout.title.text


def test_the_logit_lens_is_drawn_by_layer_with_its_intervals() -> None:
    one = lens_of()
    figure, table = plots.logit_lens([one, lens_of("original")]), one.to_dataframe()
    (line,) = [trace for trace in named(figure, "edited") if trace.mode == "lines+markers"]
    assert list(line.y) == [0, 50, 100]
    assert list(line.customdata[1]) == ["L0", *table.loc[1, ["multiple_choice_low", "multiple_choice_high"]]]
    assert list(figure.layout.xaxis.ticktext) == ["embed", "L0", "L1"]
    odds = plots.logit_lens(one, measure="log_odds")
    assert odds.data[1].y[2] == pytest.approx(one.log_odds[2].mean().item())
    other = replace(one, label="other", layers=("embed", "L0", "L2"))
    for results, options, message in (
        ([], {}, "none given"),
        ([one, one], {}, "two of one label|twice|distinct|'edited'"),
        ([one, other], {}, "'other' has other layers than 'edited'"),
        (one, {"measure": "rank"}, "unknown measure 'rank'; choose one of multiple_choice, cloze, log_odds"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.logit_lens(results, **options)


def test_token_scores_stand_over_the_prompts_tokens() -> None:
    scores = nodes_of()
    figure = plots.token_scores(scores, ["<bos>", "the", "the"], most=3)
    heat = figure.data[0]
    assert np.shape(heat.z) == (3, 3)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;bos&gt;", "the", "the"]
    strongest = int(scores.per_position.abs().amax(0).argmax())
    row = list(figure.layout.yaxis.ticktext).index(scores.writers[strongest])
    assert list(heat.z[row]) == pytest.approx(scores.per_position[:3, strongest].tolist())
    edges = scores_of()
    kept = replace(edges, per_position=torch.stack([edges.tensor, 2 * edges.tensor]), positions=("0", "1"))
    by_edge = plots.token_scores(kept, most=len(edges.writers)).data[0]
    assert np.allclose(np.array(by_edge.z)[:, 1], 2 * edges.node_scores().numpy(), atol=1e-5)
    for options, message in (
        ({"tokens": ["a", "b"]}, "2 tokens for 4 positions"),
        ({"tokens": ["a"] * 5}, "5 tokens for 4 positions"),
        ({"most": 0}, "at least one node"),
    ):
        with pytest.raises(MansuError, match=message):
            plots.token_scores(scores, **options)
    with pytest.raises(MansuError, match="per_position=True"):
        plots.token_scores(replace(scores, per_position=None))


def test_attribution_scatter_puts_estimates_beside_exact_effects() -> None:
    scores, exact = nodes_of(), heads_of()
    figure = plots.attribution_scatter(scores, exact)
    shown = {d[0]: (x, y) for t in figure.data[1:] for d, x, y in zip(t.customdata, t.x, t.y, strict=True)}
    assert len(shown) == 16
    # Shares of a difference of 10.
    assert shown["L2H1"] == pytest.approx((10 * exact.tensor[2, 1].item(), scores["L2H1"]))
    error = np.mean([abs(x - y) for x, y in shown.values()])
    assert f"mean error {number(error)}" in figure.layout.title.text
    for wrong, message in ((None, "pass the exact sweep"), (heads_of(direction="noising"), "noising sweep"),
                           (heads_of(column_axis="position"), "by position")):  # fmt: skip
        with pytest.raises(MansuError, match=message):
            plots.attribution_scatter(scores, wrong)
    with pytest.raises(MansuError, match="no column exact"):
        plots.attribution_scatter(pd.DataFrame({"name": ["a"], "attribution": [1.0]}))


def test_attention_patterns_are_the_tensor_and_leave_out_the_future() -> None:
    patterns = torch.tril(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)))
    figure = plots.attention_patterns(patterns, list("abca"), ["L0H0", "L0H1", "L3H2"])
    assert len(figure.data) == 3
    for trace, wanted in zip(figure.data, patterns.tolist(), strict=True):
        for q, row in enumerate(trace.z):
            assert list(row[: q + 1]) == pytest.approx(wanted[q][: q + 1])
            assert all(v is None for v in row[q + 1 :])
    assert [a.text for a in figure.layout.annotations] == ["L0H0", "L0H1", "L3H2"]
    backward = plots.attention_patterns(torch.full((1, 2, 2), 0.5), ["a", "b"]).data[0]
    assert backward.z[0][1] == 0.5
    with pytest.raises(MansuError, match="3 tokens for patterns of 4 x 4"):
        plots.attention_patterns(patterns, list("abc"))
    with pytest.raises(MansuError, match="3 heads, 1 names"):
        plots.attention_patterns(patterns, list("abcd"), ["a"])


# --- large circuits ---


def test_a_large_circuit_keeps_its_strongest_edges_in_front_and_bundles_the_rest() -> None:
    circuit = Circuit.top(scores_of(layers=4, heads=8, kv=8, tail=0.05), 400)  # near-equal edges
    frame = circuit.to_dataframe()
    for options, most in (({}, 60), ({"emphasis": 10}, 10), ({"emphasis": 0}, 0), ({"emphasis": 999}, len(frame))):
        figure = plots.circuit(circuit, **options)
        lines = [t for t in figure.data if t.mode == "lines" and t.legendgroup in ("q", "k", "v", "mlp", "logits")]
        lines = [t for t in lines if len(t.x) > 1]
        front = sum(gaps(t) for t in lines if t.line.width > FAINT)
        assert front == min(most, len(frame))
        assert sum(gaps(t) for t in lines) == len(frame)
        weaker = [t.name for t in figure.data if t.legendgroup == "faint"]
        if front == len(frame):
            assert not weaker
        else:
            sizes = frame["score"].abs().sort_values(ascending=False)
            share = 100 * sizes.iloc[front:].sum() / sizes.sum()
            assert weaker == [f"{len(frame) - front} edges, {share:.0f} % of all |score|"]
    with pytest.raises(MansuError, match="emphasis=-1"):
        plots.circuit(circuit, emphasis=-1)


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (8, 4), (6, 1)])
def test_bundled_edges_rise_together_from_their_writer_to_their_reader(heads: int, kv: int) -> None:
    circuit = circuit_of(200, layers=4, heads=heads, kv=kv)
    placement = place(circuit.writers, circuit.edges, heads // kv)
    gutters: dict[str, set[float]] = {}
    for writer, reader in circuit.edges:
        (xs, ys), (direct_x, direct_y) = bundled(placement, writer, reader), path(placement, writer, reader)
        assert (np.diff(ys) >= 0).all()
        assert (xs[0], ys[0]) == pytest.approx((direct_x[0], direct_y[0]), abs=1e-3)
        assert (xs[-1], ys[-1]) == pytest.approx((direct_x[-1], direct_y[-1]), abs=1e-3)
        if (xs, ys) != (direct_x, direct_y):
            gutters.setdefault(reader, set()).add(xs[len(xs) // 2])
    assert gutters
    assert all(len(found) == 1 for found in gutters.values())


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (8, 4), (6, 1)])
def test_heads_are_ordered_so_that_fewer_edges_cross(heads: int, kv: int) -> None:
    circuit = circuit_of(60, layers=3, heads=heads, kv=kv)
    groups = heads // kv
    columns = untangled(circuit.writers, circuit.edges, groups)
    assert columns == untangled(circuit.writers, circuit.edges, groups)
    before, after = (crossings(circuit.writers, circuit.edges, groups, order) for order in (None, columns))
    assert after < before
    for layer in range(3):
        mine = [columns[f"L{layer}H{head}"] for head in range(heads)]
        assert sorted(mine) == list(range(heads))
        for group in range(kv):
            block = mine[group * groups : (group + 1) * groups]
            assert max(block) - min(block) == groups - 1
    drawn = {
        d[0]: x
        for t in plots.circuit(circuit, untangle=True).data
        if t.name == "nodes"
        for d, x in zip(t.customdata, t.x, strict=True)
    }
    assert all(x == columns[name] for name, x in drawn.items() if "H" in name)
    plain_order = plots.circuit(circuit)
    drawn = {d[0]: x for t in plain_order.data if t.name == "nodes" for d, x in zip(t.customdata, t.x, strict=True)}
    assert all(x == int(name.partition("H")[2]) for name, x in drawn.items() if "H" in name)


def test_crossings_of_two_edges() -> None:
    writers = ("embed", "L0H0", "L0H1", "MLP0", "L1H0", "L1H1", "MLP1")
    apart = [("L0H0", "L1H0.q"), ("L0H1", "L1H1.q")]
    across = [("L0H0", "L1H1.q"), ("L0H1", "L1H0.q")]
    ends = [("L1H0", "logits"), ("L1H1", "logits")]  # else no head of layer 1 is drawn
    assert crossings(writers, apart + ends, 1) == 0
    assert crossings(writers, across + ends, 1) == 1
    columns = untangled(writers, across + ends, 1)
    assert crossings(writers, across + ends, 1, columns) == 0


def test_layers_add_up_a_circuits_edges() -> None:
    circuit = circuit_of(90)
    frame = circuit.to_dataframe()
    figure = plots.circuit_layers(circuit)
    shown = {pair: score for pair, (score, _, _) in edge_points(figure, "x").items()}
    assert sum(shown.values()) == pytest.approx(frame["score"].sum(), abs=1e-4)
    wanted: dict[tuple[str, str], float] = {}
    for row in frame.itertuples():
        writer = re.sub(r"H\d+", "H0", row.writer)
        reader = re.sub(r"(H|KV)\d+", r"\g<1>0", row.reader)
        wanted[writer, reader] = wanted.get((writer, reader), 0.0) + row.score
    assert shown == pytest.approx(wanted, abs=1e-5)
    labels = [text for t in figure.data if t.name == "nodes" for text in t.text]
    assert "heads" in labels
    with pytest.raises(MansuError, match="no edge to draw"):
        plots.circuit_layers(circuit - circuit)


def test_labels_do_not_lie_on_points_or_each_other() -> None:
    figure = make_subplots(rows=1, cols=1)
    xs, ys = [0.0, 0.5, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 0.501, 1.0]
    panel = Panel(figure, theme_named("light"), 1, 1)
    label_points(panel, xs, ys, ["a", "b", "c" * 60, "d", EVIL], [[0, 1], [0, 1]], (800, 300))
    texts = [a.text for a in figure.layout.annotations]
    assert texts[0] == "a"
    assert len(texts) == len(set(texts)) < 6
    assert not any("<" in text for text in texts)
    assert figure.layout.annotations[-1].xanchor == "right"  # at the right edge


def test_attention_view_falls_back_to_plotly_and_uses_circuitsvis(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = torch.eye(2)[None]
    monkeypatch.setattr(heatmaps, "find_spec", lambda name: None)
    assert isinstance(plots.attention_view(patterns, ["a", "b"]), go.Figure)
    asked: dict[str, Any] = {}
    fake = SimpleNamespace(attention_patterns=lambda **given: asked.update(given) or "widget")
    monkeypatch.setattr(heatmaps, "find_spec", lambda name: object())
    monkeypatch.setattr(heatmaps, "import_module", lambda name: {"circuitsvis.attention": fake}[name])
    assert plots.attention_view(patterns, ["a", "b"]) == "widget"
    assert asked["tokens"] == ["a", "b"]
    assert asked["attention_head_names"] == ["H0"]
    assert torch.equal(asked["attention"], patterns)
