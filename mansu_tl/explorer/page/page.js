"use strict";
(async function () {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  if (!window.DecompressionStream) {
    document.getElementById("hint").textContent = "This browser is too old for this page: it has no DecompressionStream.";
    return;
  }
  const data = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const state = Object.assign({ part: "" }, data.start);
  const element = (id) => document.getElementById(id);
  const items = new Map(data.items.map((item) => [item.name, item]));
  const stages = () => ["|", `${state.method}|`, `${state.method}|${state.quantizer}`];
  const config = (name) => ({
    displaylogo: false, responsive: true, showSendToCloud: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { filename: name, scale: 2 },
  });
  // plotly keeps and changes what it is given.
  const copy = (figure) => JSON.parse(JSON.stringify(figure));
  const number = (value) => Number(value.toPrecision(3)).toString().replace("-", "−");

  function draw(id, figure) {
    figure.layout.template = data.template;
    Plotly.react(id, figure.data, figure.layout, config(id));
  }

  function options(select, entries, value) {
    select.replaceChildren(...entries.map(([key, text]) => {
      const option = document.createElement("option");
      option.value = key;
      option.textContent = text;
      return option;
    }));
    select.value = value;
  }

  function table(rows, heads) {
    const out = document.createElement("table");
    if (heads) {
      const head = out.insertRow();
      for (const text of heads) head.append(Object.assign(document.createElement("th"), { textContent: text }));
    }
    for (const cells of rows) {
      const row = out.insertRow();
      for (const cell of cells) {
        const place = row.insertCell();
        if (typeof cell === "number") place.className = "number";
        if (cell instanceof Node) { place.className = "words"; place.append(cell); }
        else place.textContent = typeof cell === "number" ? cell.toFixed(2).replace("-", "−") : cell;
      }
    }
    return out;
  }

  function words(tokens, others, answer) {
    const out = document.createDocumentFragment();
    tokens.forEach((token, i) => {
      const different = token !== others[i];
      const part = document.createElement(different ? "b" : "span");
      part.textContent = token;
      out.append(part, " ");
    });
    const last = document.createElement("b");
    last.textContent = answer;
    out.append("→ ", last);
    return out;
  }

  function showPair() {
    const pair = data.pairs.find((each) => each.number === state.pair);
    element("prompts").replaceChildren(table([
      ["clean", words(pair.clean, pair.corrupt, pair.answer)],
      ["corrupt", words(pair.corrupt, pair.clean, pair.rival)],
    ]));
    element("answers").replaceChildren(table(
      stages().map((stage) => {
        const [chance, difference, likeliest] = data.answers[stage].rows[state.pair];
        const token = document.createElement("span");
        token.textContent = likeliest;
        return [data.answers[stage].title, 100 * chance, difference, token];
      }),
      ["clean prompt asked of", "probability of the answer, %", "logit difference", "most likely token"],
    ));
  }

  function item(mark) {
    if (!Array.isArray(mark)) return null;
    const name = typeof mark[1] === "string" ? `${mark[0]} → ${mark[1]}` : mark[0];
    return items.has(name) ? name : null;
  }

  function ring() {
    const graph = element("graph");
    const places = [[[], []], [[], []], [[], []]];
    const rings = [];
    graph.data.forEach((trace, i) => {
      if (trace.name === "selected") rings.push(i);
      if (!trace.customdata) return;
      const panel = Number((trace.xaxis || "x").slice(1) || 1) - 1;
      trace.customdata.forEach((mark, k) => {
        if (item(mark) === state.item) { places[panel][0].push(trace.x[k]); places[panel][1].push(trace.y[k]); }
      });
    });
    Plotly.restyle(graph, { x: places.map((p) => p[0]), y: places.map((p) => p[1]) }, rings);
  }

  function showCircuit() {
    const key = `${state.method}|${state.quantizer}|${state.size}`;
    draw("graph", copy(data.graphs[key]));
    draw("edges", copy(data.scatters[key]));
    const [, edges, faithful] = data.sizes.find((each) => each[0] === state.size);
    element("size-text").textContent =
      `${state.size} selected, ${edges} on a path, faithfulness ${faithful.toFixed(2).replace("-", "−")}`;
    const curve = copy(data.curve);
    const line = curve.layout.shapes[curve.layout.shapes.length - 1];
    line.x0 = line.x1 = state.size;
    curve.layout.title.text = curve.layout.title.text.replace(
      /Faithfulness \S+ at \d+/, `Faithfulness ${faithful.toFixed(2).replace("-", "−")} at ${state.size}`);
    draw("curve", curve);
    ring();
  }

  function showScores() {
    const figure = copy(data.scores[`${state.method}|${state.quantizer}`]);
    const found = stages().map((stage) => data.values[stage][state.item]);
    const [pairs, chosen, means] = figure.data;
    const count = found[0].pairs.length;
    pairs.x = found.flatMap((each) => each.pairs);
    chosen.x = found.map((each) => each.pairs[state.pair]);
    chosen.y = found.map((each, row) => pairs.y[row * count + state.pair]);
    chosen.customdata = found.map((each, row) => pairs.customdata[row * count + state.pair]);
    means.x = found.map((each) => each.mean[0]);
    means.text = found.map((each) => `<b>${number(each.mean[0])}</b>`);
    means.error_x.array = found.map((each) => Math.max(0, each.mean[2] - each.mean[0]));
    means.error_x.arrayminus = found.map((each) => Math.max(0, each.mean[0] - each.mean[1]));
    means.customdata = found.map((each) => each.mean.slice(1));
    const kind = items.get(state.item).edge ? "edge" : state.item === "logits" ? "all edges into logits" : "all edges out of it";
    figure.layout.title.text = figure.layout.title.text.replace(/<b>.*?<\/b>/, `<b>${state.item}: score (${kind})</b>`);
    draw("scores", figure);
  }

  function showAttention() {
    const head = items.get(state.item).head;
    element("attention").hidden = !head;
    element("attention-text").textContent = head ? "" :
      `${state.item} has no attention pattern of its own; choose a head, or an edge into or out of one.`;
    if (!head) return;
    const figure = copy(data.attention[`${state.method}|${state.quantizer}|${state.pair}`]);
    stages().forEach((stage, i) => { figure.data[i].z = data.patterns[stage][state.pair][head]; });
    figure.layout.title.text = figure.layout.title.text.replace(/<b>\S+ on (.*?)( \(shares [^)]*\))?<\/b>/, `<b>${head} on $1</b>`);
    draw("attention", figure);
  }

  function showWeights() {
    const figure = data.rulers[`${state.method}|${state.quantizer}|${state.part}`];
    const text = !state.part ? `${state.item} has no weights that quantization touches; choose a head, an MLP, or an edge between them.`
      : figure.message || "";
    element("weights-text").textContent = text;
    element("weights").hidden = Boolean(text);
    if (!text) draw("weights", copy(figure));
  }

  function showItem() {
    const parts = items.get(state.item).parts;
    const edited = (part) => data.rulers[`${state.method}|${state.quantizer}|${part}`].edited;
    if (!parts.includes(state.part)) state.part = [...parts].sort((a, b) => edited(b) - edited(a))[0] || "";
    options(element("part"), parts.map((part) => [part, `${part}: ${edited(part)} edited`]), state.part);
    element("item").value = state.item;
    showScores();
    showAttention();
    showWeights();
  }

  function showAll() {
    showPair();
    showCircuit();
    showItem();
  }

  function chooseItem(name) {
    state.item = name;
    state.part = "";
    ring();
    showItem();
  }

  options(element("method"), data.methods, state.method);
  options(element("quantizer"), data.quantizers.map((name) => [name, name]), state.quantizer);
  options(element("pair"), data.pairs.map((pair) => [pair.number, `${pair.number}: ${pair.label}`]), state.pair);
  options(element("item"), data.items.map((each) => [each.name, each.name]), state.item);
  const sizes = data.sizes.map((each) => each[0]);
  element("size").max = sizes.length - 1;
  element("size").value = sizes.indexOf(state.size);
  element("method").addEventListener("change", (e) => { state.method = e.target.value; showAll(); });
  element("quantizer").addEventListener("change", (e) => { state.quantizer = e.target.value; showAll(); });
  element("pair").addEventListener("change", (e) => { state.pair = Number(e.target.value); showPair(); showItem(); });
  element("item").addEventListener("change", (e) => chooseItem(e.target.value));
  element("part").addEventListener("change", (e) => { state.part = e.target.value; showWeights(); });
  element("size").addEventListener("input", (e) => { state.size = sizes[Number(e.target.value)]; showCircuit(); });
  showAll();
  element("graph").on("plotly_click", (event) => {
    const name = item(event.points[0].customdata);
    if (name) chooseItem(name);
  });
  document.body.dataset.ready = "yes";
})();
