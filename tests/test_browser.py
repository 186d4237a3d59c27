"""Pages in a real headless browser without a network: they load without complaint, answer to the mouse, and run no text."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd
import pytest

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.explorer import Explorer
from mansu_tl.study.page import Section, write_report
from tests.browser import Tab, opened
from tests.tiny_study import EVIL, crossing_edit, tiny_case

NUMBER = r"score [−]?\d"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """An explorer in whose prompts, answers, labels and method names tags hide."""
    model, task = tiny_case(evil=True)
    explorer = Explorer(model, task, {"mansu": crossing_edit(model), EVIL[1]: crossing_edit(model, 11)}, steps=1)
    chosen = [n for n in explorer.results.sizes if explorer.results.circuit(n).n_edges][-2:]
    explorer.select(size=chosen[0], item="L1H2")
    return explorer, explorer.save_html(tmp_path_factory.mktemp("page") / "explorer.html", pairs=[0, 3], sizes=chosen)


def ready(tab: Tab) -> None:
    tab.page.locator("body[data-ready=yes]").wait_for(timeout=60_000)


def quiet(tab: Tab) -> None:
    """It has complained of nothing, run no text, and asked for nothing from elsewhere."""
    assert (tab.errors, tab.dialogs, tab.requests) == ([], [], [])


def marks(tab: Tab, kind: str) -> tuple[int, int, str]:
    """A trace and point of the graph that stand for an edge or a node, and the item's name."""
    script = """kind => {
      const graph = document.querySelector("#graph");
      for (let t = 0; t < graph.data.length; t++)
        for (let i = 0; i < (graph.data[t].customdata || []).length; i++) {
          const mark = graph.data[t].customdata[i];
          const edge = typeof mark[1] === "string";
          if (kind === "edge" && edge) return [t, i, mark[0] + " → " + mark[1]];
          if (kind === "node" && mark[0] === "MLP0" && !edge) return [t, i, mark[0]];
        }
    }"""
    return tuple(tab.page.evaluate(script, kind))


def title(tab: Tab, plot: str) -> str:
    return tab.page.locator(f"{plot} .gtitle").text_content()


def test_the_explorers_page_answers_to_every_control(page) -> None:
    explorer, path = page
    with opened(path) as tab:
        ready(tab)
        assert title(tab, "#scores").startswith("L1H2: score")
        trace, point, name = marks(tab, "edge")
        assert re.search(NUMBER, tab.hover("#graph", trace, point))
        tab.click("#graph", trace, point)
        tab.page.wait_for_function("name => document.querySelector('#item').value === name", arg=name)
        assert title(tab, "#scores").startswith(f"{name}: score")
        rings = "() => document.querySelector('#graph').data.filter(t => t.name === 'selected').map(t => t.x.length)"
        assert tab.page.evaluate(rings) == [1, 1, 1]
        trace, point, name = marks(tab, "node")
        tab.click("#graph", trace, point)
        assert title(tab, "#scores").startswith("MLP0: score")
        assert "MLP0 has no attention" in tab.page.locator("#attention-text").text_content()
        assert tab.hidden("#graph") == 0
        tab.page.locator("#graph .legendtoggle").first.click()
        tab.page.wait_for_function("document.querySelector('#graph')._fullData.some(t => t.visible === 'legendonly')")
        tab.page.locator("#item").select_option("L1H2")
        before = tab.page.evaluate("document.querySelector('#attention').data[0].z")
        tab.page.locator("#pair").select_option("3")
        assert tab.page.evaluate("document.querySelector('#attention').data[0].z") != before
        slider = tab.page.locator("#size")
        slider.focus()
        slider.press("End")
        largest = explorer.results.circuit(explorer.results.sizes[-1]).n_edges
        assert f"Circuit of {largest} edges" in title(tab, "#graph")
        assert f"{largest} on a path" in tab.page.locator("#size-text").text_content()
        tab.page.locator("#method").select_option(EVIL[1])
        assert EVIL[1] in tab.page.locator("#graph .annotation-text").all_text_contents()[1]
        quiet(tab)


def test_the_page_shows_the_numbers_of_the_explorer(page) -> None:
    explorer, path = page
    with opened(path) as tab:
        ready(tab)
        for item in ("L1H2", explorer.results.circuit(explorer.results.sizes[-1]).edges[2]):
            explorer.select(item=item, pair=3)
            name = item if isinstance(item, str) else " → ".join(item)
            tab.page.locator("#pair").select_option("3")
            tab.page.locator("#item").select_option(name)
            live = explorer.figure("scores").data
            shown = tab.page.evaluate("document.querySelector('#scores').data.map(t => t.x)")
            for trace in range(3):
                assert shown[trace] == pytest.approx(list(live[trace].x), rel=1e-3, abs=1e-6)
            head = explorer.figure("attention").data[2].z
            shown = tab.page.evaluate("document.querySelector('#attention').data[2].z")
            assert [v for row in shown for v in row if v is not None] == pytest.approx(
                [v for row in head for v in row if v is not None], abs=1e-3
            )
            weights = explorer.figure("weights")
            part = explorer.part()
            tab.page.locator("#part").select_option(part)
            shown = tab.page.evaluate("document.querySelector('#weights').layout.title.text")
            assert shown == weights.layout.title.text
        table = tab.page.locator("#answers td").all_text_contents()
        wanted = explorer.answers()["probability of the answer, %"]
        assert [float(table[i]) for i in (1, 5, 9)] == pytest.approx(list(wanted), abs=0.006)
        quiet(tab)


def test_tags_in_prompts_are_shown_as_text_and_never_run(page) -> None:
    _, path = page
    with opened(path) as tab:
        ready(tab)
        shown = tab.page.locator("#prompts").inner_text()
        assert EVIL[0] in shown
        assert EVIL[1] in shown
        assert tab.page.locator("#pair option").first.text_content().count(EVIL[0]) == 1
        assert tab.page.evaluate("document.querySelectorAll('img').length") == 0
        assert EVIL[0] in tab.hover("#scores", 0, 0)
        assert EVIL[0] in " ".join(tab.page.locator("#attention .xtick").all_text_contents())
        quiet(tab)


def test_the_report_answers_to_the_mouse_and_runs_no_text(page, tmp_path) -> None:
    explorer, _ = page
    explorer.select(item="L1H2", pair=0)
    frame = pd.DataFrame({EVIL[0]: [EVIL[1]], "value": [1.5]})
    parts = [
        Section(EVIL[0], f"{EVIL[1]} is text", explorer.figure(name))
        for name in ("graph", "edges", "attention", "weights")
    ]
    parts.append(Section("Table", "", table=frame, folded=True))
    path = write_report(tmp_path / "report.html", title=EVIL[0], sections=parts, environment={EVIL[1]: EVIL[0]})
    assert path.read_text(encoding="utf-8").count("plotly.js v") == 1
    with opened(path) as tab:
        tab.page.locator("#figure-4 .main-svg").first.wait_for(timeout=60_000)
        assert tab.page.title() == EVIL[0]
        assert EVIL[1] in tab.page.locator("#part-1").inner_text()
        trace = tab.page.evaluate(
            "document.querySelector('#figure-1').data.findIndex(t => t.customdata && typeof t.customdata[0][1] === 'string')"
        )
        assert re.search(NUMBER, tab.hover("#figure-1", trace, 0))
        tab.page.locator("#figure-2 .legendtoggle").first.click()
        tab.page.wait_for_function(
            "document.querySelector('#figure-2')._fullData.some(t => t.visible === 'legendonly')"
        )
        assert not tab.page.locator("#part-5 td").first.is_visible()
        tab.page.locator("#part-5 summary").click()
        assert tab.page.locator("#part-5 td").first.inner_text() == EVIL[1]
        assert tab.page.evaluate("document.querySelectorAll('img').length") == 0
        quiet(tab)


@pytest.mark.slow
def test_five_hundred_edges_stay_responsive(tmp_path, record_property) -> None:
    model, task = tiny_case(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    scores = mtl.edge_attribution(model, task.forget_pairs, steps=1)
    circuit = next(c for n in range(500, 900) if (c := Circuit.top(scores, n)).n_edges >= 500)
    other = replace(circuit, scores=-circuit.scores)
    figure = mtl.plots.circuit_stages(circuit, {"edited": other, "edited, nf4": other})
    path = write_report(tmp_path / "large.html", title="large", sections=[Section("Graph", "", figure)], environment={})
    redraw = """() => new Promise(done => {
      const graph = document.querySelector("#figure-1"), copy = JSON.parse(JSON.stringify([graph.data, graph.layout]));
      const start = performance.now();
      Plotly.react(graph, ...copy);
      requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
    })"""
    watch = """() => {
      const graph = document.querySelector("#figure-1"), box = graph.getBoundingClientRect();
      graph.addEventListener("mousemove", () => { window.moved = performance.now(); }, true);
      graph.on("plotly_hover", () => { window.hovered = performance.now() - window.moved; });
    }"""
    with opened(path) as tab:
        tab.page.locator("#figure-1 .main-svg").first.wait_for(timeout=60_000)
        milliseconds = tab.page.evaluate(redraw)
        trace = tab.page.evaluate(
            "document.querySelector('#figure-1').data.findIndex(t => t.customdata && typeof t.customdata[0][1] === 'string')"
        )
        tab.page.evaluate(watch)
        assert re.search(NUMBER, tab.hover("#figure-1", trace, 0))
        wait = tab.page.evaluate("window.hovered")
        record_property("redraw_ms", milliseconds)
        record_property("hover_ms", wait)
        print(f"{circuit.n_edges} edges in each of three panels: redraw {milliseconds:.0f} ms, hover {wait:.0f} ms")
        # Generous, since tests share their machine: what takes this long is broken, not slow.
        assert milliseconds < 20_000
        assert wait < 5_000
        quiet(tab)
