// The plots beside the graph.
const SIGNS = (value) => String(value).replace("-", "−");
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : SIGNS(Number(value.toPrecision(digits))));
const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : SIGNS(value.toFixed(digits)).replace(/^−(0(\.0*)?)$/, "$1"));
const ESCAPED = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;", "\n": "\\n", "\r": "\\r", "\t": "\\t" };
// Plotly reads tags into texts; here every text is shown as it is.
const plain = (text) => String(text).replace(/[&<>$\n\r\t]/g, (c) => ESCAPED[c]);

function plotter(template, library) {
  const config = (name) => ({
    displaylogo: false, responsive: true, showSendToCloud: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { filename: name, scale: 2 },
  });
  const small = { margin: { l: 52, r: 14, t: 34, b: 42 }, hovermode: "closest", font: { size: 11 } };

  function draw(id, data, layout) {
    library();
    const title = layout.title ? { text: `<b>${layout.title}</b>`, font: { size: 13 }, pad: { t: 8, l: 2 } } : undefined;
    return Plotly.react(id, data, { ...small, ...layout, title, template }, config(id));
  }

  // A figure of the library's; how it is to be read is too long for a line here, and is handed back.
  function figure(id, found) {
    library();
    const copy = JSON.parse(JSON.stringify(found)), [first, ...rest] = copy.layout.title.text.split("<br>");
    copy.layout.title = { ...copy.layout.title, text: first, font: { size: 13 }, pad: { t: 8, l: 2 } };
    copy.layout.margin = { ...copy.layout.margin, t: copy.layout.margin.t - 23 * rest.length - 14, l: 60, r: 14 };
    for (const note of copy.layout.annotations || []) note.font = { ...note.font, size: 11 };
    Plotly.react(id, copy.data, { ...copy.layout, template }, config(id));
    return rest.join(" ").replace(/<[^>]+>/g, "").replace(/&amp;/g, "&");
  }

  // An item's score on every pair, one row a model, with the mean and its interval.
  function scores(id, { rows, labels, chosen, metric }) {
    const spread = (i) => 0.24 * (2 * ((i * 0.6180339887) % 1) - 1);
    const pairs = { x: [], y: [], text: [] }, one = { x: [], y: [], text: [] };
    const mean = { x: [], y: [], more: [], less: [], text: [], told: [] };
    rows.forEach(({ values, name }, row) => {
      values.pairs.forEach((value, i) => {
        const into = i === chosen ? one : pairs;
        into.x.push(value);
        into.y.push(row + spread(i));
        into.text.push(plain(labels[i]));
      });
      const [m, low, high] = values.mean;
      mean.x.push(m);
      mean.y.push(row);
      mean.more.push(Math.max(0, high - m));
      mean.less.push(Math.max(0, m - low));
      mean.text.push(`<b>${number(m)}</b>`);
      mean.told.push(`${plain(name)}<br>mean ${number(m)} [${number(low)}, ${number(high)}], 95 % interval over facts`);
    });
    const hover = "%{text}<br>score %{x:.3g}<extra></extra>";
    return draw(id, [
      { ...pairs, type: "scatter", mode: "markers", name: "one pair", hovertemplate: hover,
        marker: { size: 5, color: LOOK.positiveSoft, opacity: 0.55 } },
      { ...one, type: "scatter", mode: "markers", name: "the chosen pair", hovertemplate: hover,
        marker: { size: 10, symbol: "diamond-open", color: LOOK.negative, line: { width: 2 } } },
      { x: mean.x, y: mean.y, text: mean.text, customdata: mean.told, type: "scatter", mode: "markers+text", name: "mean over pairs",
        textposition: "top center", cliponaxis: false, hovertemplate: "%{customdata}<extra></extra>",
        marker: { symbol: "line-ns", size: 20, color: LOOK.ink, line: { width: 3, color: LOOK.ink } },
        error_x: { type: "data", symmetric: false, array: mean.more, arrayminus: mean.less, color: LOOK.ink, thickness: 1.6 } },
    ], {
      title: "Score on every pair", height: 90 + 56 * rows.length, showlegend: false,
      xaxis: { title: { text: `score, ${plain(metric)} (nats)` }, zeroline: true, zerolinecolor: LOOK.muted },
      yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map(({ name }) => plain(name)), range: [rows.length - 0.4, -0.6],
        showgrid: false, automargin: true },
    });
  }

  function attention(id, { rows, tokens, head, pair }) {
    const axis = (i) => (i ? String(i + 1) : "");
    const shown = tokens.map((token, i) => `${i}: ${plain(token)}`), ticks = tokens.map((_, i) => i);
    const layout = { title: `${head} on pair ${pair}: share of attention`, height: 290, margin: { l: 30, r: 10, t: 52, b: 60 }, annotations: [] };
    const gap = 0.03, each = (1 - gap * (rows.length - 1)) / rows.length;
    const data = rows.map(({ pattern, name }, i) => {
      layout[`xaxis${axis(i)}`] = { domain: [i * (each + gap), i * (each + gap) + each], tickvals: ticks,
        ticktext: tokens.map(plain), tickangle: -60, showgrid: false, anchor: `y${axis(i)}`, tickfont: { size: 9 } };
      layout[`yaxis${axis(i)}`] = { autorange: "reversed", tickvals: ticks, ticktext: tokens.map(plain), showticklabels: i === 0,
        automargin: i === 0, showgrid: false, anchor: `x${axis(i)}`, tickfont: { size: 9 } };
      layout.annotations.push({ text: plain(name), showarrow: false, xref: "paper", yref: "paper", x: i * (each + gap) + each / 2, xanchor: "center", y: 1.09,
        font: { size: 11 } });
      return { type: "heatmap", z: pattern.map((row) => tokens.map((_, k) => (k < row.length ? row[k] : null))), zmin: 0, zmax: 1,
        xaxis: `x${axis(i)}`, yaxis: `y${axis(i)}`, showscale: false, hoverongaps: false, xgap: 1, ygap: 1,
        colorscale: [[0, "#F3F4F6"], [1, LOOK.positive]], customdata: shown.map((q) => shown.map((k) => `${q}<br>looks at ${k}`)),
        hovertemplate: "%{customdata}<br>%{z:.1%}<extra></extra>" };
    });
    return draw(id, data, layout);
  }

  function curve(id, { found, size, faithful }) {
    const line = (y, name, color, dash) => ({ x: found.sizes, y, name, type: "scatter", mode: "lines+markers", line: { color, dash, width: 2.4 },
      hovertemplate: `${name}<br>%{x} edges: %{y:.2f}<extra></extra>` });
    const data = [line(found.faithfulness, "largest |score|", LOOK.positive, "solid")];
    if (found.random.length) data.push(line(found.random, "random edges", LOOK.muted, "dot"));
    const ticks = found.sizes.reduce((out, n) => (out.length && n < 1.5 * out.at(-1) ? out : [...out, n]), []);
    return draw(id, data, {
      title: `Faithfulness ${fixed(faithful)} at ${size} edges selected`, height: 330,
      xaxis: { type: "log", title: { text: "edges selected" }, tickvals: ticks }, yaxis: { title: { text: "faithfulness" } },
      legend: { orientation: "h", y: -0.2 },
      shapes: [{ type: "line", x0: size, x1: size, yref: "paper", y0: 0, y1: 1, line: { color: LOOK.chosen, width: 3 } },
        { type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: LOOK.muted, width: 1, dash: "dot" } }],
    });
  }

  const LINES = [["#0072B2", "solid"], ["#D55E00", "dash"], ["#009E73", "dot"], ["#CC79A7", "dashdot"], ["#B8860B", "longdash"]];
  // CAD against depth, forget facts above and near ones below.
  function depth(id, results) {
    const x = results[0].layers.map((_, i) => i), every = Math.max(1, Math.round(x.length / 11)), data = [];
    const band = (color) => `rgba(${[1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16)).join(",")},0.14)`;
    let ends = [-0.12, 1.12];
    results.forEach((each, k) => {
      const [color, dash] = LINES[k % LINES.length];
      for (const [what, axis] of [["cad", ""], ["near_cad", "2"]]) {
        const low = each[`${what}_low`], high = each[`${what}_high`];
        ends = [Math.min(ends[0], ...low.map((v) => (v ?? 0) - 0.1)), Math.max(ends[1], ...high.map((v) => (v ?? 0) + 0.1))];
        data.push({ x: [...x, ...[...x].reverse()], y: [...high, ...[...low].reverse()], yaxis: `y${axis}`, type: "scatter", fill: "toself", mode: "lines",
          fillcolor: band(color), line: { width: 0 }, legendgroup: each.label, showlegend: false, hoverinfo: "skip" });
        data.push({ x, y: each[what], yaxis: `y${axis}`, type: "scatter", mode: "lines+markers", name: plain(each.label), legendgroup: each.label,
          showlegend: !axis, line: { color, dash, width: 2.4 }, marker: { size: 5 },
          customdata: x.map((i) => [each.layers[i], number(low[i]), number(high[i]), fixed(each.grafted_percent[i], 0)]),
          hovertemplate: `${plain(each.label)}, behind %{customdata[0]}<br>CAD %{y:.2f} [%{customdata[1]}, %{customdata[2]}]<br>`
            + "the original's layers from here on choose %{customdata[3]} % of the forget answers<extra></extra>" });
      }
    });
    const level = (y, yref) => ({ type: "line", xref: "paper", x0: 0, x1: 1, yref, y0: y, y1: y, line: { color: LOOK.muted, width: 1, dash: "dot" } });
    const upright = (v, color, dash) => ({ type: "line", x0: v, x1: v, yref: "paper", y0: 0, y1: 1, line: { color, width: 1.2, dash } });
    const note = (text, y) => ({ text, showarrow: false, xref: "paper", yref: "paper", x: 0, y, xanchor: "left", font: { size: 11, color: LOOK.muted } });
    return draw(id, data, {
      title: "CAD by depth: 0 = still there, 1 = gone", height: 520, margin: { l: 52, r: 14, t: 54, b: 90 },
      xaxis: { tickvals: x.filter((i) => i % every === 0), ticktext: results[0].layers.filter((_, i) => i % every === 0), title: { text: "stream behind" },
        anchor: "y2", showgrid: false },
      yaxis: { domain: [0.55, 1], range: ends, title: { text: "CAD" } }, yaxis2: { domain: [0, 0.45], range: ends, title: { text: "CAD" } },
      legend: { orientation: "h", y: -0.13 },
      shapes: [level(1, "y"), level(1, "y2"), upright(results[0].read, LOOK.ink, "dash"), upright(results[0].judged, LOOK.chosen, "solid")],
      annotations: [note("facts to be forgotten (dashed: the fact is read here; pink: judged)", 1.06), note("near facts, to be kept", 0.49)],
    });
  }

  // The drawn edges' scores after against before.
  function edges(id, { points, names, titles, chosen }) {
    const size = Math.max(1e-9, ...points.flatMap(([a, b]) => [Math.abs(a), Math.abs(b)])) * 1.08;
    const at = names.indexOf(chosen);
    const data = [{ x: points.map((p) => p[0]), y: points.map((p) => p[1]), text: names, type: "scatter", mode: "markers",
      marker: { size: 6, color: LOOK.positive, opacity: 0.55 }, hovertemplate: "%{text}<br>before %{x:.3g}, after %{y:.3g}<extra></extra>" }];
    if (at >= 0) {
      data.push({ x: [points[at][0]], y: [points[at][1]], type: "scatter", mode: "markers", hoverinfo: "skip",
        marker: { size: 14, symbol: "circle-open", color: LOOK.chosen, line: { width: 3 } } });
    }
    return draw(id, data, {
      title: "The drawn edges, before and after", height: 430, showlegend: false,
      xaxis: { title: { text: `score in the ${plain(titles[0])}` }, range: [-size, size] },
      yaxis: { title: { text: `score in ${plain(titles[1])}` }, range: [-size, size] },
      shapes: [{ type: "line", x0: -size, x1: size, y0: -size, y1: size, line: { color: LOOK.muted, width: 1, dash: "dot" } }],
    });
  }
  return { scores, attention, curve, depth, edges, figure };
}
