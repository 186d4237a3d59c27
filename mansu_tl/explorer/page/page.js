"use strict";
(async function () {
  const element = (id) => document.getElementById(id);
  const packed = Uint8Array.from(atob(element("data").textContent), (c) => c.charCodeAt(0));
  if (!window.DecompressionStream) {
    element("status").textContent = "This browser is too old for this page: it has no DecompressionStream.";
    return;
  }
  const data = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const live = connection(data.live, data.answers);
  const plots = plotter(data.template, readPlotly);
  const ABSENT = "is not in this file; mansu-tl explore FOLDER and mtl.explore show everything.";
  const NEEDS_MODEL = "This page was saved to a file and has no model behind it: mansu-tl explore FOLDER opens one that has, mtl.explore too.";
  const KINDS = { q: "query (q)", k: "key (k)", v: "value (v)", mlp: "MLP", logits: "logits" };
  const FEW = 150; // edges that are drawn at first

  const writers = new Map(data.writers.map((name, i) => [name, i])), readers = new Set(data.readers);
  const titles = new Map(data.methods);
  const state = { ...data.start, most: null, around: "all", from: -1, to: data.layers, shown: "all", merge: false, tab: "chosen",
    kinds: new Set(Object.keys(KINDS)), signs: new Set(["+", "-"]), pinned: [], off: [], groups: [], part: "" };
  const loaded = { edges: [], byName: new Map(), scores: [], cads: [], drawn: [], shownNodes: new Map() };

  const stages = () => [["", ""], [state.method, ""], [state.method, state.quantizer]];
  const title = ([method, quantizer]) => (method ? [titles.get(method), quantizer].filter(Boolean).join(", ") : "original");
  const pairNow = () => data.pairs.find((each) => each.number === state.pair);
  const isEdge = (name) => name.includes(" → ");
  const groupOf = (name) => state.groups.find((each) => each.name === name);

  // --- small things
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
        if (typeof cell === "number") { place.className = "number"; place.textContent = fixed(cell); }
        else if (cell instanceof Node) { place.className = "words"; place.append(cell); }
        else { place.className = "words"; place.textContent = cell ?? "–"; }
      }
    }
    return out;
  }

  function words(tokens, others, answer) {
    const out = document.createDocumentFragment();
    tokens.forEach((token, i) => {
      const part = document.createElement(token !== others[i] ? "b" : "span");
      part.textContent = token;
      out.append(part, " ");
    });
    out.append("→ ", Object.assign(document.createElement("b"), { textContent: answer }));
    return out;
  }

  function button(text, act, kind = "") {
    const out = Object.assign(document.createElement("button"), { type: "button", textContent: text, className: kind });
    out.addEventListener("click", act);
    return out;
  }

  function chip(name, drop, choose = name) {
    const out = document.createElement("span");
    out.className = "chip";
    const cross = button("×", drop);
    cross.setAttribute("aria-label", `remove ${name}`);
    out.append(button(name, () => chooseItem(choose), "name"), cross);
    return out;
  }

  function status(text, wrong = false) {
    element("status").textContent = text;
    element("status").classList.toggle("error", wrong);
  }

  function say(id, text, wrong = false) {
    element(id).textContent = text;
    element(id).classList.toggle("error", wrong);
  }

  // Why something cannot be shown, in one line.
  function excuse(id, what, problem) {
    if (problem.absent) say(id, `${what} ${ABSENT}`);
    else say(id, problem.message, true);
  }

  // Only what was asked for last is shown.
  const turns = {};
  let busy = 0; // how much is on its way
  async function inTurn(name, id, what, ask, show, hide = () => {}) {
    busy += 1;
    const turn = (turns[name] = (turns[name] || 0) + 1);
    const slow = setTimeout(() => { if (turn === turns[name]) { hide(); say(id, "computing …"); } }, 150);
    try {
      const found = await ask();
      if (turn === turns[name]) { say(id, ""); show(found); }
    } catch (problem) {
      if (turn === turns[name]) { hide(); excuse(id, what, problem); }
    } finally {
      busy -= 1;
      clearTimeout(slow);
    }
  }

  // --- the circuit
  async function readCircuit() {
    busy += 1;
    const turn = (turns.circuit = (turns.circuit || 0) + 1);
    const slow = setTimeout(() => status("computing the circuit's scores …"), 150);
    const pair = state.alone ? state.pair : null;
    try {
      const circuit = await live.get(["circuit", state.size]);
      const scores = await Promise.all(stages().map((stage) => live.get(["scores", ...stage, state.size, pair])));
      if (turn !== turns.circuit) return;
      loaded.edges = circuit.writers.map((w, i) => {
        const writer = data.writers[w], reader = data.readers[circuit.readers[i]], kind = kindOf(reader);
        const three = scores.map((each) => each.scores[i]);
        return { name: `${writer} → ${reader}`, writer, reader, kind, scores: three, weight: Math.max(...three.map(Math.abs)), count: 1 };
      });
      loaded.byName = new Map(loaded.edges.map((edge) => [edge.name, edge]));
      loaded.cads = scores.map((each) => each.cad);
      const count = loaded.edges.length;
      if (state.most === null) state.most = count <= 2 * FEW ? count : FEW;
      status("");
      element("items").replaceChildren(...[...circuitNodes(), ...loaded.edges.slice(0, 300).map((edge) => edge.name)].map((name) =>
        Object.assign(document.createElement("option"), { value: name })));
      showCircuit();
    } catch (problem) {
      if (turn === turns.circuit) status(problem.absent ? `This circuit ${ABSENT}` : problem.message, true);
    } finally {
      busy -= 1;
      clearTimeout(slow);
    }
  }

  function circuitNodes() {
    const seen = new Set();
    for (const edge of loaded.edges) {
      seen.add(edge.writer);
      for (const name of behind(edge.reader, data.groups)) seen.add(name);
    }
    return [...data.writers.filter((name) => seen.has(name)), "logits"];
  }

  // The groups that are in force: those that were made, and with `merge` the heads of every layer.
  function groupsNow() {
    if (!state.merge) return state.groups;
    const out = [], mine = new Set(state.groups.flatMap((group) => group.members));
    for (let layer = 0; layer < data.layers; layer++) {
      const members = Array.from({ length: data.heads }, (_, i) => `L${layer}H${i}`).filter((name) => !mine.has(name));
      if (members.length > 1) out.push({ name: `heads ${layer}`, members, made: true });
    }
    return [...state.groups, ...out];
  }

  // Edges with grouped nodes as one: bundles carry the sum, edges inside a group are left out.
  function bundled(edges, groups) {
    const home = new Map(groups.flatMap((group) => group.members.map((member) => [member, group.name])));
    const out = new Map();
    let inside = 0;
    for (const edge of edges) {
      const source = home.get(edge.writer) || edge.writer;
      const targets = behind(edge.reader, data.groups), homes = new Set(targets.map((name) => home.get(name)));
      const together = homes.size === 1 && [...homes][0];
      const bar = !together && targets.length > 1 ? edge.reader.slice(0, edge.reader.lastIndexOf(".")) : null;
      const target = together || targets[0];
      if (source === target) { inside += 1; continue; }
      const joined = home.has(edge.writer) || together;
      const name = joined ? `${source} → ${bar || target}: ${edge.kind}` : edge.name;
      const found = out.get(name);
      if (found) {
        found.scores = found.scores.map((value, i) => value + edge.scores[i]);
        found.weight = Math.max(...found.scores.map(Math.abs));
        found.count += 1;
        found.parts.push(edge);
      } else {
        out.set(name, { ...edge, name, source, target, bar, parts: [edge], joined: Boolean(joined) });
      }
    }
    return { edges: [...out.values()], inside };
  }

  const ends = (edge) => [edge.source, ...(edge.bar ? behind(edge.reader, data.groups) : [edge.target])];

  // Edges on a path through an item.
  function through(edges, item) {
    const grow = (start, from, to) => {
      const reached = new Set(start), kept = new Set();
      for (let more = true; more;) {
        more = false;
        for (const edge of edges) {
          if (kept.has(edge) || !from(edge).some((name) => reached.has(name))) continue;
          kept.add(edge);
          for (const name of to(edge)) if (!reached.has(name)) { reached.add(name); more = true; }
          more = true;
        }
      }
      return kept;
    };
    const chosen = edges.find((edge) => edge.name === item);
    const up = grow(chosen ? [chosen.source] : [item], (edge) => ends(edge).slice(1), (edge) => [edge.source]);
    const down = grow(chosen ? ends(chosen).slice(1) : [item], (edge) => [edge.source], (edge) => ends(edge).slice(1));
    return new Set([...up, ...down, ...(chosen ? [chosen] : [])]);
  }

  function level(name) {
    return name === "embed" ? -1 : name === "logits" ? data.layers : parsed(name).layer;
  }

  // What is drawn of the circuit, and what is not, by why.
  function chosenEdges() {
    const { edges, inside } = bundled(loaded.edges, groupsNow());
    const hidden = { inside, kind: 0, layer: 0, around: 0, weak: 0, floor: 0 };
    const pinned = new Set(state.pinned);
    let left = edges.filter((edge) => {
      const sign = state.signs.size === 2 || edge.scores.some((value) => state.signs.has(value >= 0 ? "+" : "-"));
      if (!state.kinds.has(edge.kind) || !sign) { hidden.kind += edge.count; return false; }
      if (level(edge.writer) < state.from || level(edge.reader) > state.to) { hidden.layer += edge.count; return false; }
      return true;
    });
    const around = (some) => (state.around === "touching"
      ? new Set(some.filter((edge) => edge.name === state.item || ends(edge).includes(state.item) || touches(edge, state.item)))
      : through(some, state.item));
    const narrow = (some) => {
      const kept = around(some);
      return some.filter((edge) => { if (!kept.has(edge)) hidden.around += edge.count; return kept.has(edge); });
    };
    if (state.around === "touching") left = narrow(left);
    left.sort((a, b) => b.weight - a.weight);
    const strong = [], weak = [];
    left.forEach((edge, rank) => {
      const held = pinned.has(edge.name) || ends(edge).some((name) => pinned.has(name));
      (rank < state.most || held ? strong : weak).push(edge);
    });
    hidden.weak = weak.reduce((sum, edge) => sum + edge.count, 0);
    hidden.floor = weak.length ? weak[0].weight : 0;
    const drawn = state.around === "through" ? narrow(strong) : strong;
    return { drawn, hidden, bundles: edges.length, left: left.length };
  }

  const touches = (edge, item) => isEdge(item) && loaded.byName.has(item)
    && [loaded.byName.get(item).writer, ...behind(loaded.byName.get(item).reader, data.groups)].some((name) => ends(edge).includes(name));

  let graph = null;
  function showCircuit() {
    const { drawn, hidden, left } = chosenEdges();
    const nodes = new Map();
    const groups = groupsNow(), home = new Map(groups.flatMap((group) => group.members.map((member) => [member, group.name])));
    for (const name of circuitNodes()) nodes.set(home.get(name) || name, false);
    for (const edge of drawn) {
      nodes.set(edge.source, true);
      for (const name of ends(edge).slice(1)) nodes.set(home.get(name) || name, true);
    }
    loaded.drawn = drawn;
    loaded.shownNodes = nodes;
    const top = Math.max(1e-12, ...loaded.edges.map((edge) => edge.weight), ...drawn.map((edge) => edge.weight));
    const which = state.shown === "all" ? [0, 1, 2] : [Number(state.shown)];
    const panels = which.map((i) => ({
      title: title(stages()[i]),
      note: i ? cadNote(loaded.cads[i]) : `${loaded.edges.length} edges`,
      score: (edge) => edge.scores[i],
      share: (edge) => Math.abs(edge.scores[i]) / top,
      top,
    }));
    graph.show(panels, { edges: drawn, nodes, groups, marks: marks() });
    // in words
    const whole = loaded.edges.reduce((sum, edge) => sum + edge.weight, 0) || 1;
    const parts = drawn.flatMap((edge) => edge.parts), count = parts.length;
    const share = (100 * parts.reduce((sum, edge) => sum + edge.weight, 0)) / whole;
    const why = [
      [hidden.weak, `weaker than ${number(hidden.floor, 2)}`], [hidden.kind, "of a kind or sign that is off"], [hidden.layer, "in other layers"],
      [hidden.around, "not about the chosen"], [hidden.inside, "inside a group"],
    ].filter(([n]) => n).map(([n, text]) => `${n.toLocaleString("en")} ${text}`);
    const rest = loaded.edges.length - count;
    element("hidden").textContent = `Drawn: ${count.toLocaleString("en")} of ${loaded.edges.length.toLocaleString("en")} edges`
      + `${drawn.length !== count ? ` in ${drawn.length} bundles` : ""}, ${fixed(share, share > 99.9 || share < 1 ? 1 : 0)} % of all |score|. `
      + (rest ? `Hidden: ${rest.toLocaleString("en")} (${why.join(", ")}).` : "Nothing is hidden.")
      + (drawn.length > ALL_STAND_OUT ? ` The ${STAND_OUT} strongest stand out.` : "");
    showMost(left);
    showSize();
    showPins();
    if (state.tab === "edges") showScatter();
    document.body.dataset.drawn = String(count);
  }

  const cadNote = (cad) => (cad ? `CAD ${fixed(cad[0])} [${fixed(cad[1])}, ${fixed(cad[2])}]` : "");
  const marks = () => ({ chosen: state.item, pinned: state.pinned, off: state.off });

  // The slider is logarithmic: 0 = five edges, 100 = all.
  const least = (total) => Math.min(5, total);
  const fromSlider = (value, total) => Math.round(least(total) * (total / least(total)) ** (value / 100));
  function showMost(total) {
    const slider = element("most");
    loaded.total = Math.max(1, total);
    const at = Math.min(state.most, loaded.total), span = Math.log(loaded.total / least(loaded.total));
    if (fromSlider(Number(slider.value), loaded.total) !== at) {
      slider.value = span > 0 ? Math.round((100 * Math.log(Math.max(at, least(loaded.total)) / least(loaded.total))) / span) : 100;
    }
    slider.title = `${at} of ${loaded.total}`;
  }

  function showSize() {
    const [, edges, known] = data.sizes.find((each) => each[0] === state.size);
    const request = ["faithfulness", state.size];
    const text = (value) => `${state.size} selected, ${edges} on a path${value === null ? "" : `, faithfulness ${fixed(value)}`}`;
    element("size-text").textContent = text(known);
    const here = known !== null || live.has(request);
    element("measure").hidden = here || !live.alive;
    if (known === null && here) {
      const size = state.size;
      live.get(request).then((found) => { if (state.size === size) element("size-text").textContent = text(found.faithfulness); }, () => {});
    }
  }

  function showPins() {
    const pins = element("pins");
    pins.replaceChildren();
    if (state.pinned.length) pins.append("Pinned:", ...state.pinned.map((name) => chip(name, () => pin(name))));
    const loose = state.pinned.filter((name) => !isEdge(name) && !groupOf(name) && name !== "embed" && name !== "logits" && writers.has(name)
      && !state.groups.some((group) => group.members.includes(name)));
    if (loose.length > 1) pins.append(button("group these nodes", () => makeGroup(loose)));
    if (state.groups.length) pins.append("Groups:", ...state.groups.map((group) => chip(`${group.name} (${group.members.join(", ")})`, () => dropGroup(group), group.name)));
  }

  function makeGroup(members) {
    let n = 1;
    while (groupOf(`group ${n}`)) n += 1;
    state.groups.push({ name: `group ${n}`, members });
    state.pinned = state.pinned.filter((name) => !members.includes(name));
    chooseItem(`group ${n}`);
    showCircuit();
  }

  function dropGroup(group) {
    state.groups = state.groups.filter((each) => each !== group);
    if (state.item === group.name) chooseItem(group.members[0]);
    showCircuit();
  }

  function pin(name) {
    state.pinned = state.pinned.includes(name) ? state.pinned.filter((each) => each !== name) : [...state.pinned, name];
    showCircuit();
    showButtons();
  }

  function tell(name, panel) {
    const edge = loaded.drawn.find((each) => each.name === name), which = state.shown === "all" ? panel : Number(state.shown);
    if (edge) {
      const value = edge.scores[which];
      const lines = [`${name}${edge.count > 1 ? ` (${edge.count} edges)` : ""}`, `score ${number(value)} (${value >= 0 ? "supports" : "opposes"} the answer)`];
      stages().forEach((stage, i) => { if (i !== which) lines.push(`${title(stage)}: ${number(edge.scores[i])}`); });
      return lines.join("\n");
    }
    const [sent, received] = sums(name);
    const quiet = loaded.shownNodes.get(name) ? "" : "\nits edges are hidden";
    return `${name}\nin ${number(received[which])}, out ${number(sent[which])}${quiet}`;
  }

  // What a node sends and takes in, at every stage, over the whole circuit; of a group without what stays inside.
  function sums(name) {
    const group = groupsNow().find((each) => each.name === name);
    const members = new Set(group ? group.members : [name]), sent = [0, 0, 0], received = [0, 0, 0];
    for (const edge of loaded.edges) {
      const from = members.has(edge.writer), into = behind(edge.reader, data.groups).some((each) => members.has(each));
      if (from && !into) edge.scores.forEach((value, i) => { sent[i] += value; });
      if (into && !from) edge.scores.forEach((value, i) => { received[i] += value; });
    }
    return [sent, received];
  }

  // --- the chosen thing
  function kindOfItem(name) {
    if (groupsNow().some((group) => group.name === name)) return "group";
    if (isEdge(name)) return loaded.drawn.some((edge) => edge.name === name && edge.joined) ? "bundle" : "edge";
    return "node";
  }

  // The head whose attention belongs to an item: of an edge its reader's, else its writer's.
  function headOf(name) {
    if (!isEdge(name)) return /H\d/.test(name) ? name : null;
    const [writer, reader] = name.split(" → ");
    if ("qkv".includes(kindOf(reader))) return behind(reader, data.groups)[0];
    return headOf(writer);
  }

  function showChosen() {
    const name = state.item, kind = kindOfItem(name);
    element("chosen-name").textContent = name;
    element("item").value = kind === "edge" || kind === "node" ? name : "";
    showButtons();
    showChosenTable(name, kind);
    const single = kind === "edge" || kind === "node";
    for (const id of ["scores", "attention", "weights"]) { element(id).hidden = !single; if (!single) say(`${id}-text`, ""); }
    element("part-label").hidden = !single;
    if (!single) { for (const each of ["values", "pattern", "parts", "ruler"]) turns[each] = (turns[each] || 0) + 1; return; }
    showScores(name);
    showAttention(name);
    showParts(name);
  }

  function showChosenTable(name, kind) {
    const place = element("chosen-table"), head = ["", ...stages().map(title)];
    const line = (text, values) => [text, ...values.map((value) => Object.assign(document.createElement("span"), { textContent: number(value) }))];
    const edge = loaded.byName.get(name) || loaded.drawn.find((each) => each.name === name);
    if (kind === "edge" || kind === "bundle") {
      const what = kind === "bundle" && edge ? `sum of ${edge.count} edges` : "score";
      place.replaceChildren(edge ? table([line(what, edge.scores)], head)
        : Object.assign(document.createElement("p"), { className: "message", textContent: "This edge is not in the circuit of this size." }));
    } else {
      const [sent, received] = sums(name);
      place.replaceChildren(table([line("in", received), line("out", sent)], head));
    }
    const parts = kind === "bundle" && edge ? edge.parts : kind === "group" ? null : strongest(name);
    const list = document.createElement("div");
    list.className = "chips";
    if (kind === "group") {
      const group = groupsNow().find((each) => each.name === name);
      list.append("Nodes:", ...group.members.filter((each) => circuitNodes().includes(each)).map((each) => button(each, () => chooseItem(each), "link")));
    } else if (parts && parts.length) {
      const shown = parts.slice(0, 8);
      list.append(kind === "bundle" ? "Of:" : "Strongest edges:", ...shown.map((each) => button(`${each.name} (${number(each.scores[0])})`, () => chooseItem(each.name), "link")));
      if (parts.length > shown.length) list.append(`and ${parts.length - shown.length} more`);
    }
    place.append(list);
  }

  function strongest(name) {
    if (isEdge(name)) return [];
    return loaded.edges.filter((edge) => edge.writer === name || behind(edge.reader, data.groups).includes(name))
      .sort((a, b) => b.weight - a.weight);
  }

  function showButtons() {
    const kind = kindOfItem(state.item);
    element("pin").textContent = state.pinned.includes(state.item) ? "Unpin" : "Pin";
    const able = state.item !== "logits";
    element("off").disabled = !able;
    element("off").title = able ? "" : "logits writes nothing; switch off what it reads";
    element("off").textContent = offNames(state.item).every((name) => state.off.includes(name)) && able ? "Switch on again" : `Switch off${kind === "group" ? " the group" : ""}`;
  }

  // What a chosen thing comes to when it is switched off: nodes and edges of the model.
  function offNames(name) {
    const group = groupsNow().find((each) => each.name === name);
    if (group) return group.members;
    const bundle = loaded.drawn.find((edge) => edge.name === name && edge.joined);
    return bundle ? bundle.parts.map((edge) => edge.name) : [name];
  }

  let patient = false; // whether it was said that scores pair by pair may take their time
  function showScores(name) {
    const rows = stages();
    if (data.slow && !patient && !rows.every((stage) => live.has(["values", ...stage, name])) && live.alive) {
      turns.values = (turns.values || 0) + 1;
      element("scores").hidden = true;
      say("scores-text", "Scores pair by pair take minutes with a model of this size. ");
      element("scores-text").append(button("compute them", () => { patient = true; showScores(name); }));
      return;
    }
    inTurn("values", "scores-text", "Its score pair by pair", () => Promise.all(rows.map((stage) => live.get(["values", ...stage, name]))), (found) => {
      element("scores").hidden = false;
      plots.scores("scores", { rows: found.map((values, i) => ({ values, name: title(rows[i]) })), labels: labelsOf(found[0].pairs.length),
        chosen: state.pair, metric: data.metric });
    }, () => { element("scores").hidden = true; });
  }

  const labelsOf = (count) => Array.from({ length: count }, (_, i) => data.labels[i]);

  function showAttention(name) {
    const head = headOf(name), rows = stages();
    if (!head) {
      turns.pattern = (turns.pattern || 0) + 1;
      element("attention").hidden = true;
      say("attention-text", `${name} has no attention pattern of its own; choose a head, or an edge into or out of one.`);
      return;
    }
    inTurn("pattern", "attention-text", `${head}'s attention`, () => Promise.all(rows.map((stage) => live.get(["pattern", ...stage, state.pair, head]))), (found) => {
      element("attention").hidden = false;
      plots.attention("attention", { rows: found.map(({ pattern }, i) => ({ pattern, name: title(rows[i]) })), tokens: pairNow().clean, head, pair: state.pair });
    }, () => { element("attention").hidden = true; });
  }

  function showParts(name) {
    const hide = () => { element("weights").hidden = true; element("part-label").hidden = true; };
    inTurn("parts", "weights-text", "What it is made of", () => live.get(["parts", state.method, name]), ({ parts }) => {
      if (!parts.length) {
        hide();
        say("weights-text", `${name} has no weights that quantization touches; choose a head, an MLP, or an edge between them.`);
        return;
      }
      element("part-label").hidden = false;
      if (!parts.some(([part]) => part === state.part)) state.part = [...parts].sort((a, b) => b[1] - a[1])[0][0];
      options(element("part"), parts.map(([part, edited]) => [part, `${part}: ${edited.toLocaleString("en")} edited`]), state.part);
      showWeights();
    }, hide);
  }

  function showWeights() {
    inTurn("ruler", "weights-text", "This part's weights", () => live.get(["ruler", state.method, state.quantizer, state.part]), ({ figure }) => {
      element("weights").hidden = false;
      say("weights-text", plots.figure("weights", figure));
    }, () => { element("weights").hidden = true; });
  }

  async function chooseItem(name) {
    const clicked = name === state.item;
    state.item = name;
    state.part = "";
    if (state.around === "all") graph.marks(marks());
    else showCircuit();
    if (!clicked && state.tab !== "ask" && state.tab !== "edges") openTab("chosen");
    showChosen();
    if (state.tab === "edges") showScatter();
    const kind = kindOfItem(name);
    if (kind === "edge" || kind === "node") live.tell({ chosen: { item: name } });
  }

  // An item that was typed.
  function typedItem(text) {
    const parts = text.replace("->", "→").split("→").map((part) => part.trim());
    const name = parts.join(" → ");
    const known = parts.length === 1 ? writers.has(name) || name === "logits" : parts.length === 2 && writers.has(parts[0]) && readers.has(parts[1]);
    if (!known) {
      status(`There is no ${parts.length === 1 ? "node" : "edge"} ${JSON.stringify(text)}; name a node such as L0H1, or an edge such as L0H1 → ${data.readers.at(-2)}.`, true);
      return;
    }
    status("");
    chooseItem(name);
  }

  // --- what the models say
  function showPair() {
    const pair = pairNow();
    element("prompts").replaceChildren(table([
      ["clean", words(pair.clean, pair.corrupt, pair.answer)],
      ["corrupt", words(pair.corrupt, pair.clean, pair.rival)],
    ]));
    const rows = stages();
    inTurn("answers", "answers-text", "What the models say", () => Promise.all(rows.map((stage) => live.get(["answers", ...stage]))), (found) => {
      element("answers").replaceChildren(table(found.map((each, i) => {
        const [chance, difference, likeliest] = each.rows[state.pair];
        return [title(rows[i]), 100 * chance, difference, Object.assign(document.createElement("span"), { textContent: likeliest })];
      }), ["clean prompt asked of", "answer, %", "logit difference", "says"]));
    }, () => element("answers").replaceChildren());
  }

  const likely = (rows) => rows.map(([token, chance]) => `${token.trim() || JSON.stringify(token)} ${fixed(100 * chance, chance < 0.1 ? 1 : 0)} %`).join(", ");

  function ask() {
    const prompt = element("prompt").value, tokens = Number(element("tokens").value);
    inTurn("ask", "said-text", "That", () => live.get(["ask", state.method, state.quantizer, prompt, tokens], false), ({ rows }) => {
      element("said").replaceChildren(table(rows.map((row) => [row.model, row.says, likely(row.likely)]), ["model", "says", "likeliest next tokens"]));
    }, () => element("said").replaceChildren());
  }

  function showOff() {
    const place = element("offs");
    place.replaceChildren();
    if (!state.off.length) place.append("Nothing: choose a node, an edge or a group, and press “Switch off”.");
    else place.append(...state.off.slice(0, 30).map((name) => chip(name, () => { state.off = state.off.filter((each) => each !== name); offChanged(); })));
    if (state.off.length > 30) place.append(`and ${state.off.length - 30} more`);
    if (state.off.length > 1) place.append(button("switch all on", () => { state.off = []; offChanged(); }));
  }

  function offChanged() {
    graph.marks(marks());
    showOff();
    showButtons();
    turns.switch = (turns.switch || 0) + 1;
    element("switched").replaceChildren();
    say("switched-text", "");
  }

  function switchOff() {
    const own = element("asked").value === "own", kind = element("kind").value;
    const request = ["switch", state.method, state.quantizer, state.size, state.off, own ? element("prompt").value : state.pair, element("inside").value, kind,
      own && kind === "corrupt" ? element("counter").value : ""];
    inTurn("switch", "switched-text", "That", () => live.get(request, false), ({ rows }) => {
      const change = ([before, after], form) => {
        const out = document.createElement("span");
        out.append(Object.assign(document.createElement("span"), { className: "was", textContent: `${form(before)} → ` }), form(after));
        return out;
      };
      element("switched").replaceChildren(table(rows.map((row) => [
        row.model, change(row.says, (text) => text), ...(own ? [] : [change(row.probability, (v) => fixed(100 * v)), change(row.difference, (v) => fixed(v))]),
        likely(row.likely[1]),
      ]), ["model", "says, on → off", ...(own ? [] : ["answer, %", "logit difference"]), "likeliest with it off"]));
    }, () => element("switched").replaceChildren());
  }

  function showCounter() {
    element("counter-label").hidden = !(element("asked").value === "own" && element("kind").value === "corrupt");
  }

  // --- depth, size, before and after
  function showDepth() {
    // What is shipped first, then what was edited, then the others.
    const now = stages().map(title);
    const sorted = [...data.depth].sort((a, b) => now.indexOf(b.label) - now.indexOf(a.label));
    const line = (each) => {
      const out = document.createElement("p");
      out.append(`${each.label}: `, Object.assign(document.createElement("b"), { textContent: each.verdict }), ` – ${each.why}`);
      return out;
    };
    element("verdict").hidden = !sorted.length;
    if (!sorted.length) return;
    element("verdict").replaceChildren(...line(sorted[0]).childNodes);
    element("verdicts").replaceChildren(...sorted.map(line));
    if (state.tab === "depth") plots.depth("depth", data.depth);
  }

  function showCurve() {
    inTurn("curve", "curve-text", "The curve", () => live.get(["curve"]), (found) => {
      const known = data.sizes.find((each) => each[0] === state.size)[2];
      const at = found.sizes.indexOf(state.size);
      plots.curve("curve", { found, size: state.size, faithful: known ?? found.faithfulness[at] });
      showSize();
    });
  }

  function showScatter() {
    const which = state.shown === "1" ? 1 : 2;
    element("edges-text").textContent = loaded.drawn.length ? "" : "No edge is drawn.";
    if (loaded.drawn.length) {
      plots.edges("edges", { points: loaded.drawn.map((edge) => [edge.scores[0], edge.scores[which]]), names: loaded.drawn.map((edge) => edge.name),
        titles: ["original", title(stages()[which])], chosen: state.item });
    }
  }

  const TABS = { chosen: "Chosen", ask: "Ask", depth: "CAD by depth", size: "Faithfulness", edges: "Before/after" };
  function openTab(name) {
    state.tab = name;
    for (const each of Object.keys(TABS)) {
      element(`tab-${each}`).hidden = each !== name;
      const tab = element("tabs").querySelector(`[data-tab=${each}]`);
      if (tab) tab.setAttribute("aria-selected", String(each === name));
    }
    if (name === "depth") showDepth();
    if (name === "size") showCurve();
    if (name === "edges") showScatter();
    if (name === "chosen") for (const id of ["scores", "attention", "weights"]) if (element(id).data && !element(id).hidden) Plotly.Plots.resize(id);
  }

  // --- everything anew after a choice
  async function showAll() {
    busy += 1;
    showDepth();
    options(element("shown"), [["all", "all three"], ...stages().map((stage, i) => [String(i), title(stage)])], state.shown);
    await readCircuit();
    await painted();
    showChosen();
    showPair();
    if (state.tab === "size") showCurve();
    busy -= 1;
  }

  // The library of the plots takes a second to read; the graph, which does without, is drawn before.
  function readPlotly() {
    if (window.Plotly) return;
    window.PlotlyConfig = { MathJaxConfig: "local" };
    document.head.append(Object.assign(document.createElement("script"), { textContent: element("plotly").textContent }));
    element("plotly").remove();
  }
  // The graph is on the screen; a page that nobody looks at paints nothing.
  const painted = () => new Promise((done) => {
    setTimeout(done, 300);
    requestAnimationFrame(() => setTimeout(done));
  });

  function room() {
    const top = document.querySelector("main").getBoundingClientRect().top + window.scrollY + 10;
    const below = 30 + 6 + element("footer").offsetHeight; // the tabs, and a little air
    document.documentElement.style.setProperty("--room", `${Math.max(500, window.innerHeight - top - below)}px`);
  }

  function controls() {
    options(element("method"), data.methods, state.method);
    options(element("quantizer"), data.quantizers.map((name) => [name, name]), state.quantizer);
    options(element("pair"), data.pairs.map((pair) => [pair.number, `${pair.number}: ${pair.label}`]), state.pair);
    const sizes = data.sizes.map((each) => each[0]);
    element("size").max = sizes.length - 1;
    element("size").value = sizes.indexOf(state.size);
    element("alone-label").hidden = !live.alive;
    const steps = [[-1, "embed"], ...Array.from({ length: data.layers }, (_, i) => [i, String(i)]), [data.layers, "logits"]];
    options(element("from"), steps.slice(0, -1), -1);
    options(element("to"), steps.slice(1), data.layers);
    element("tabs").replaceChildren(...Object.entries(TABS).filter(([name]) => name !== "depth" || data.depth.length).map(([name, text]) => {
      const tab = button(text, () => openTab(name));
      tab.dataset.tab = name;
      tab.setAttribute("role", "tab");
      return tab;
    }));
    const chosen = (id, act) => element(id).addEventListener("change", (event) => act(event.target));
    const told = (choice) => live.tell({ chosen: choice });
    chosen("method", (e) => { state.method = e.value; told({ method: e.value }); showAll(); });
    chosen("quantizer", (e) => { state.quantizer = e.value; told({ quantizer: e.value }); showAll(); });
    chosen("pair", (e) => {
      state.pair = Number(e.value);
      told({ pair: state.pair });
      showPair();
      if (state.alone) readCircuit().then(showChosen);
      else showChosen();
    });
    chosen("alone", (e) => { state.alone = e.checked; told({ alone: e.checked }); readCircuit().then(showChosen); });
    chosen("item", (e) => typedItem(e.value));
    chosen("part", (e) => { state.part = e.value; showWeights(); });
    chosen("around", (e) => { state.around = e.value; showCircuit(); });
    chosen("from", (e) => { state.from = Number(e.value); showCircuit(); });
    chosen("to", (e) => { state.to = Number(e.value); showCircuit(); });
    chosen("shown", (e) => { state.shown = e.value; showCircuit(); });
    chosen("merge", (e) => {
      state.merge = e.checked;
      if (!e.checked && !circuitHas(state.item)) chooseItem(data.start.item);
      showCircuit();
      showChosen();
    });
    element("size").addEventListener("input", (e) => {
      state.size = sizes[Number(e.target.value)];
      told({ size: state.size });
      readCircuit().then(() => { showChosen(); if (state.tab === "size") showCurve(); });
    });
    element("most").addEventListener("input", (e) => { state.most = fromSlider(Number(e.target.value), loaded.total); showCircuit(); });
    element("measure").addEventListener("click", () => {
      element("measure").hidden = true;
      inTurn("measure", "status", "Faithfulness", () => live.get(["faithfulness", state.size]), () => showSize());
    });
    element("pin").addEventListener("click", () => pin(state.item));
    element("off").addEventListener("click", () => {
      const names = offNames(state.item), off = names.every((name) => state.off.includes(name));
      state.off = off ? state.off.filter((name) => !names.includes(name)) : [...new Set([...state.off, ...names])];
      offChanged();
      if (!off) openTab("ask");
    });
    element("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
    element("switch").addEventListener("submit", (event) => { event.preventDefault(); switchOff(); });
    chosen("asked", showCounter);
    chosen("kind", showCounter);
    showCounter();
    for (const id of live.alive ? [] : ["ask", "switch"]) {
      element(id).hidden = true;
      say(id === "ask" ? "said-text" : "switched-text", NEEDS_MODEL);
    }
    legend();
    live.listen((choice) => {
      Object.assign(state, choice);
      controlsAt(sizes);
      showAll();
    });
    window.addEventListener("resize", room);
    new ResizeObserver(room).observe(document.querySelector("header"));
    room();
  }

  const circuitHas = (name) => groupOf(name) || loaded.byName.has(name) || writers.has(name) || name === "logits";

  function controlsAt(sizes) {
    for (const id of ["method", "quantizer", "pair"]) element(id).value = state[id];
    element("size").value = sizes.indexOf(state.size);
    element("alone").checked = state.alone;
  }

  // The legend is the switch: kinds of readers and signs.
  function legend() {
    const line = (color, width, dash, round) => `<svg width="30" height="10" aria-hidden="true"><path d="M1 5H29" stroke="${color}" stroke-width="${width}" stroke-dasharray="${dash}"/>`
      + `${round ? `<circle cx="15" cy="5" r="3.4" fill="#fff" stroke="${color}" stroke-width="1.4"/>` : ""}</svg>`;
    const entry = (text, picture, set, key) => {
      const out = document.createElement("label"), box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
      box.addEventListener("change", () => { if (box.checked) set.add(key); else set.delete(key); showCircuit(); });
      out.append(box);
      out.insertAdjacentHTML("beforeend", picture);
      out.append(text);
      return out;
    };
    element("kinds").append("Edges into", ...Object.entries(KINDS).map(([kind, text]) =>
      entry(text, line("qkv".includes(kind) ? LOOK.positiveSoft : LOOK.positive, 2.4, DASHES[kind].join(" "), false), state.kinds, kind)),
    "that", entry("support the answer", line(LOOK.positive, 4, "", false), state.signs, "+"),
    entry("oppose it", line(LOOK.negative, 4, "", true), state.signs, "-"));
  }

  data.labels = data.pairs.reduce((out, pair) => { out[pair.number] = pair.label; return out; }, data.names || []);
  graph = circuitGraph(element("graph"), data, { tell, click: (name, more) => { if (more) pin(name); else chooseItem(name); } });
  window.explorer = { graph, state, get busy() { return busy; }, get total() { return loaded.edges.length; } };
  element("footer").textContent = `${live.alive ? "What is not on the page yet is computed by the models behind it." : "Everything here was computed by mansu_tl and is part of this file; nothing is loaded from elsewhere."}`
    + ` Edges carry the mean over all pairs; their width is |score|, in one scale for all panels. Of ${data.total.toLocaleString("en")} edges of the model the circuit has the strongest that lie on a path. Shift-click pins.`;
  controls();
  showOff();
  openTab("chosen");
  await showAll();
  document.body.dataset.ready = "yes";
})();
