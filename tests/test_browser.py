"""Pages in a real headless browser without a network: they load without complaint, answer to the mouse, and run no text."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.circuit.graph import writers_behind
from mansu_tl.explorer import Explorer, ExplorerServer
from mansu_tl.study.page import Section, write_report
from mansu_tl.verification import CadByDepth
from tests.browser import Tab, opened
from tests.tiny_study import EVIL, crossing_edit, tiny_case

NUMBER = r"score [−]?\d"


def erased_by_depth(label: str, layers: int) -> CadByDepth:
    """Six forget pairs whose evidence goes layer by layer, and near ones whose does not."""
    own, left = torch.ones(layers + 1, 6), torch.linspace(1, 0, layers + 1)[:, None].expand(-1, 6)
    writers = ("embed", *(f"{part}{i}" for i in range(layers) for part in ("A", "MLP")))
    terms, groups = torch.ones(len(writers), 6), torch.arange(6) // 2
    return CadByDepth(
        label=label,
        layers=("embed", *(f"L{i}" for i in range(layers))),
        writers=writers,
        read=0,
        original=own,
        other=left.contiguous(),
        near_original=own,
        near_other=own,
        terms_original=terms,
        terms_other=terms,
        grafted=left > 0.2,
        groups=groups,
        near_groups=groups,
        edges=(),
        edges_original=torch.zeros(6, 0),
        edges_other=torch.zeros(6, 0),
    )


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    """One in whose prompts, answers, labels and method names tags hide."""
    model, task = tiny_case(evil=True)
    edits = {"mansu": crossing_edit(model), EVIL[1]: crossing_edit(model, 11)}
    scores = mtl.edge_attribution(model, task.forget_pairs, steps=1)
    circuit = next(c for n in range(5, 300) if (c := Circuit.top(scores, n)).n_edges >= 12)
    depth = [erased_by_depth("MANSU", model.cfg.n_layers)]
    found = Explorer(model, task, edits, scores=scores, circuit=circuit, steps=1, depth=depth)
    found.select(item="L1H2")
    return found


@pytest.fixture(scope="module")
def page(explorer, tmp_path_factory):
    """It as a file, with two sizes."""
    chosen = [explorer.selection.size, explorer.results.sizes[-1]]
    return explorer, explorer.save_html(tmp_path_factory.mktemp("page") / "explorer.html", pairs=[0, 3], sizes=chosen)


@pytest.fixture(scope="module")
def served(explorer):
    """It with its models behind the page."""
    with ExplorerServer(explorer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield explorer, server.address
        server.shutdown()
        thread.join()


def ready(tab: Tab) -> None:
    tab.page.locator("body[data-ready=yes]").wait_for(timeout=60_000)


def quiet(tab: Tab) -> None:
    """It has complained of nothing, run no text, and asked for nothing from elsewhere."""
    assert (tab.errors, tab.dialogs, tab.requests) == ([], [], [])


def place(tab: Tab, name: str, panel: int = 0) -> list[float]:
    """Where an edge or node of the graph is on the page."""
    settled(tab)
    return tab.page.evaluate("([name, panel]) => window.explorer.graph.where(name, panel)", [name, panel])


def settled(tab: Tab) -> None:
    """Wait until everything that was asked for is on the page, and drawn in its place."""
    tab.page.wait_for_function("window.explorer.busy === 0", timeout=60_000)
    tab.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def title(tab: Tab, plot: str) -> str:
    return tab.page.locator(f"{plot} .gtitle").text_content()


def choose(tab: Tab, name: str) -> None:
    tab.page.locator("#item").fill(name)
    tab.page.locator("#item").press("Enter")
    settled(tab)


def test_the_page_answers_to_every_control(page) -> None:
    explorer, path = page
    with opened(path) as tab:
        ready(tab)
        strongest = explorer.results.circuit(explorer.selection.size).edges[0]
        name = " → ".join(strongest)
        for panel in range(3):
            tab.page.mouse.move(*place(tab, name, panel))
            shown = tab.page.locator(".tip").text_content()
            assert shown.startswith(name)
            assert re.search(NUMBER, shown)
        tab.page.mouse.click(*place(tab, name))
        assert tab.page.locator("#chosen-name").text_content() == name
        tab.page.mouse.click(*place(tab, "embed", 1))
        settled(tab)
        assert tab.page.locator("#chosen-name").text_content() == "embed"
        assert "embed has no attention" in tab.page.locator("#attention-text").text_content()
        assert "embed has no weights" in tab.page.locator("#weights-text").text_content()
        choose(tab, "L9H9")
        assert 'There is no node "L9H9"' in tab.page.locator("#status").text_content()
        choose(tab, "L1H2")
        assert tab.page.locator("#chosen-name").text_content() == "L1H2"
        assert title(tab, "#attention").startswith("L1H2 on pair 0")
        before = tab.page.evaluate("document.querySelector('#attention').data[0].z")
        tab.page.locator("#pair").select_option("3")
        tab.page.wait_for_function(
            "before => JSON.stringify(document.querySelector('#attention').data[0].z) !== JSON.stringify(before)",
            arg=before,
        )
        slider = tab.page.locator("#size")
        slider.focus()
        slider.press("End")
        settled(tab)
        largest = explorer.results.circuit(explorer.results.sizes[-1]).n_edges
        assert f"{largest} on a path" in tab.page.locator("#size-text").text_content()
        assert "faithfulness" in tab.page.locator("#size-text").text_content()
        tab.page.locator("#method").select_option(EVIL[1])
        settled(tab)
        assert EVIL[1] in tab.page.locator("#chosen-table").inner_text()
        for each in ("size", "edges", "depth"):
            tab.page.locator(f"[data-tab={each}]").click()
            settled(tab)
        assert title(tab, "#depth").startswith("CAD by depth")
        verdict = explorer.depth[0].verdict()
        assert f"{verdict.name} – {verdict.why}" in tab.page.locator("#verdict").text_content()
        quiet(tab)


def drawn(tab: Tab) -> int:
    return int(tab.page.locator("body").get_attribute("data-drawn"))


def test_what_is_drawn_and_what_is_hidden(page) -> None:
    explorer, path = page
    total = explorer.results.circuit(explorer.selection.size).n_edges
    edges = explorer.results.circuit(explorer.selection.size).edges
    with opened(path) as tab:
        ready(tab)
        assert drawn(tab) == total
        assert "Nothing is hidden" in tab.page.locator("#hidden").text_content()
        slider = tab.page.locator("#most")
        slider.focus()
        slider.press("Home")
        assert drawn(tab) == 5
        text = tab.page.locator("#hidden").text_content()
        assert f"Drawn: 5 of {total} edges" in text
        assert f"{total - 5} weaker than" in text
        slider.press("End")
        tab.page.locator("#kinds input").nth(3).uncheck()
        into_mlps = sum(reader.startswith("MLP") for _, reader in edges)
        assert drawn(tab) == total - into_mlps
        assert f"{into_mlps} of a kind or sign that is off" in tab.page.locator("#hidden").text_content()
        tab.page.locator("#kinds input").nth(3).check()
        tab.page.locator("#to").select_option("0")
        assert drawn(tab) == sum(reader.startswith(("L0", "MLP0")) for _, reader in edges)
        tab.page.locator("#to").select_option("2")
        choose(tab, " → ".join(edges[0]))
        tab.page.locator("#around").select_option("through")
        assert 1 <= drawn(tab) <= total
        tab.page.locator("#around").select_option("all")
        tab.page.locator("#merge").check()
        assert "bundles" in tab.page.locator("#hidden").text_content()
        quiet(tab)


def test_nodes_are_pinned_and_grouped(page) -> None:
    explorer, path = page
    circuit = explorer.results.circuit(explorer.selection.size)
    heads = [name for name in circuit.nodes if "H" in name][:2]
    with opened(path) as tab:
        ready(tab)
        for name in heads:
            tab.page.keyboard.down("Shift")
            tab.page.mouse.click(*place(tab, name))
            tab.page.keyboard.up("Shift")
        assert tab.page.locator("#pins .chip").count() == 2
        tab.page.get_by_text("group these nodes").click()
        assert tab.page.locator("#chosen-name").text_content() == "group 1"
        edges = circuit.to_dataframe()
        inside = [bool({*writers_behind(reader, circuit.kv_groups)} & {*heads}) for reader in edges["reader"]]
        sent = edges["score"][edges["writer"].isin(heads) & ~pd.Series(inside, index=edges.index)].sum()
        shown = tab.page.locator("#chosen-table tr").nth(2).locator("td").nth(1).inner_text()
        assert float(shown.replace("−", "-")) == pytest.approx(sent, rel=0.01, abs=1e-3)
        assert "group 1" in tab.page.evaluate("window.explorer.graph.items.nodes")
        tab.page.locator("#pins .chip").get_by_label("remove").first.click()
        assert "group 1" not in tab.page.evaluate("window.explorer.graph.items.nodes")
        quiet(tab)


def test_a_file_without_a_model_says_so(page) -> None:
    _, path = page
    with opened(path) as tab:
        ready(tab)
        tab.page.locator("[data-tab=ask]").click()
        assert tab.hidden("#ask")
        assert tab.hidden("#switch")
        for name in ("#said-text", "#switched-text"):
            assert "no model behind it" in tab.page.locator(name).text_content()
        quiet(tab)


def test_a_page_with_its_models_asks_them(served) -> None:
    explorer, address = served
    with opened(address) as tab:
        ready(tab)
        tab.page.locator("[data-tab=ask]").click()
        tab.page.locator("#ask button").click()
        tab.page.locator("#said-text", has_text="the prompt is empty").wait_for()
        tab.page.locator("#prompt").fill("w7 w20 w30")
        tab.page.locator("#ask button").click()
        tab.page.locator("#said td").first.wait_for()
        cells = tab.page.locator("#said tr td:nth-child(2)").all_text_contents()
        assert cells == list(explorer.ask("w7 w20 w30", 6).answers[0])
        choose(tab, "L0H1")
        tab.page.locator("#off").dispatch_event("click")
        assert tab.page.locator("#offs .chip").count() == 1
        tab.page.locator("#switch button").click()
        tab.page.locator("#switched td").first.wait_for()
        want = explorer.switch_off("L0H1").probability
        for row, values in enumerate(want.tolist()):
            shown = tab.page.locator("#switched tr").nth(row + 1).locator("td").nth(2).inner_text().split(" → ")
            assert [float(each) for each in shown] == pytest.approx([100 * v for v in values], abs=0.006)
        tab.page.locator("#asked").select_option("own")
        tab.page.locator("#switch button").click()
        tab.page.locator("#switched-text", has_text="no counterfactual").wait_for()
        assert "\n" not in tab.page.locator("#switched-text").text_content()
        tab.page.locator("#alone").check()
        pair_scores = explorer.results.edge_scores(("", ""), explorer.selection.size, 0)
        tab.page.mouse.move(*place(tab, " → ".join(explorer.results.circuit(explorer.selection.size).edges[0])))
        value = re.search(r"score (\S+)", tab.page.locator(".tip").text_content())[1]
        assert float(value.replace("−", "-")) == pytest.approx(float(pair_scores[0]), rel=0.01)
        quiet(tab)


def test_the_page_shows_the_numbers_of_the_explorer(page) -> None:
    explorer, path = page
    with opened(path) as tab:
        ready(tab)
        for item in ("L1H2", explorer.results.circuit(explorer.selection.size).edges[2]):
            explorer.select(item=item, pair=3)
            name = item if isinstance(item, str) else " → ".join(item)
            tab.page.locator("#pair").select_option("3")
            choose(tab, name)
            drawn_scores = explorer.figure("scores").data
            chosen, means = tab.page.evaluate("[1, 2].map(t => document.querySelector('#scores').data[t].x)")
            assert chosen == pytest.approx(list(drawn_scores[1].x), rel=1e-3, abs=1e-6)
            assert means == pytest.approx(list(drawn_scores[2].x), rel=1e-3, abs=1e-6)
            head = explorer.figure("attention").data[2].z
            shown = tab.page.evaluate("document.querySelector('#attention').data[2].z")
            for row, wanted in zip(shown, head, strict=True):
                known = [v for v in row if v is not None]
                assert known == pytest.approx(list(wanted[: len(known)]), abs=1e-3)
            part = tab.page.locator("#part").input_value()
            explorer.select(part=part)
            title_ = tab.page.evaluate("document.querySelector('#weights').layout.title.text")
            assert title_ == explorer.figure("weights").layout.title.text.partition("<br>")[0]
        table = tab.page.locator("#answers td").all_text_contents()
        wanted = explorer.answers()["probability of the answer, %"]
        assert [float(table[i]) for i in (1, 5, 9)] == pytest.approx(list(wanted), abs=0.006)
        explorer.select(item="L1H2", pair=0)
        quiet(tab)


def test_tags_in_prompts_are_shown_as_text_and_never_run(page) -> None:
    _, path = page
    with opened(path) as tab:
        ready(tab)
        tab.page.locator("[data-tab=ask]").click()
        shown = tab.page.locator("#prompts").inner_text()
        assert EVIL[0] in shown
        assert EVIL[1] in shown
        assert tab.page.locator("#pair option").first.text_content().count(EVIL[0]) == 1
        assert tab.page.evaluate("document.querySelectorAll('img').length") == 0
        tab.page.locator("[data-tab=chosen]").click()
        assert EVIL[0] in tab.hover("#scores", 0, 0)
        assert EVIL[0] in " ".join(tab.page.locator("#attention .xtick").all_text_contents())
        quiet(tab)


def test_the_report_answers_to_the_mouse_and_runs_no_text(explorer, tmp_path) -> None:
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
