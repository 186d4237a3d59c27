// The circuit on a canvas, one panel a model: layers upward, heads side by side, the MLP behind them.
const LOOK = {
  paper: "#FFFFFF", band: "#F3F4F6", ink: "#1B1F24", muted: "#5B6470", neutral: "#9AA2AC", chosen: "#CC79A7", pin: "#009E73",
  positive: "#0072B2", positiveSoft: "#56B4E9", negative: "#D55E00", negativeSoft: "#E69F00",
};
const WIDTHS = [1.1, 1.6, 2.4, 4.2, 7.0];
const DASHES = { q: [1.5, 3], k: [6, 3], v: [], mlp: [], logits: [] };
const STAND_OUT = 60, ALL_STAND_OUT = 120; // of more edges than this, so many stand out
const POINTS = 18; // of an edge, where the mouse finds it
const FONT = 'Inter, "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", sans-serif';

function parsed(name) {
  if (name === "embed") return { layer: -1 };
  if (name === "logits") return { layer: Infinity };
  const [, mlp, layer, kind, index] = /^(MLP|L)(\d+)(?:(H|KV)(\d+))?/.exec(name);
  return { layer: Number(layer), mlp: mlp === "MLP", kv: kind === "KV", index: Number(index) };
}

function kindOf(reader) {
  if (reader === "logits") return "logits";
  const side = reader.slice(reader.lastIndexOf(".") + 1);
  return side === "in" ? "mlp" : side;
}

// The writers whose output a reader can change.
function behind(reader, groups) {
  if (reader === "logits") return ["logits"];
  const name = reader.slice(0, reader.lastIndexOf("."));
  const { layer, kv, index } = parsed(name);
  if (!kv) return [name];
  return Array.from({ length: groups }, (_, i) => `L${layer}H${index * groups + i}`);
}

function circuitGraph(box, facts, act) {
  const base = box.querySelector(".base"), over = box.querySelector(".over"), label = box.querySelector(".tip");
  const { layers, heads, groups } = facts;
  let panels = [], drawn = [], view = { marks: {} }, width = 0, height = 0, hovered = null;

  function resize() {
    const box_ = box.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    width = Math.max(200, box_.width);
    height = Math.max(280, box_.height);
    for (const canvas of [base, over]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
  }

  // --- where things are
  function geometry(index) {
    const left = 30, gap = 14, top = 46, bottom = 26;
    const each = (width - left - gap * (panels.length - 1) - 6) / panels.length;
    const x0 = left + index * (each + gap), column = each / (heads + 2.7), row = (height - top - bottom) / (layers + 1.9);
    const radius = Math.max(2.5, Math.min(column * 0.4, row * 0.3, 15));
    return {
      x0, each, column, row, radius, top, bottom,
      x: (c) => x0 + (c + 0.75) * column,
      y: (l) => height - bottom - (l + 1.25) * row,
    };
  }

  function place(g, name) {
    const group = view.groups.find((each) => each.name === name);
    if (group) {
      const places = group.members.map((member) => spot(member));
      const mean = (k) => places.reduce((sum, each) => sum + each[k], 0) / places.length;
      return [g.x(mean(0)), g.y(mean(1))];
    }
    const [c, l] = spot(name);
    return [g.x(c), g.y(l)];
  }

  function spot(name) {
    const middle = Math.floor(heads / 2) - 0.5;
    if (name === "embed") return [middle, -0.95];
    if (name === "logits") return [middle, layers + 0.25];
    const { layer, mlp, index } = parsed(name);
    return mlp ? [heads + 0.35, layer + 0.42] : [index, layer];
  }

  // Where edges enter a reader: below its node, or at the bar of a KV head that several heads share.
  function entry(g, edge) {
    const port = { q: -0.5, k: 0, v: 0.5 }[edge.kind] || 0;
    if (edge.bar) {
      const { layer, index } = parsed(edge.bar);
      return [g.x(index * groups + (groups - 1) / 2) + port * g.radius, g.y(layer - 0.33)];
    }
    const [x, y] = place(g, edge.target);
    return [x + port * g.radius, y + g.radius];
  }

  // A cubic curve that leaves its writer upward and enters its reader from below.
  function curve(g, edge) {
    const [x0, above] = place(g, edge.source), y0 = above - g.radius;
    const [x1, y1] = entry(g, edge);
    const rise = y0 - y1, lift = Math.max(0.45 * Math.abs(rise), 0.1 * g.row);
    if (edge.kind === "mlp" && rise < 0.7 * g.row && edge.source !== "embed") {
      const height_ = y1 - g.radius * (1.7 - (x0 - g.x0) / g.each), end = x1 - 0.7 * g.radius;
      return [x0, y0, x0, height_, x0 + 0.4 * (end - x0), height_, end, height_];
    }
    // Right above one another: to the right, so that it does not run through what lies between, the farther the longer.
    const bow = Math.abs(x1 - x0) < 0.6 * g.column && rise > g.row ? g.column * Math.min(2.1, 0.45 + 1.7 * (rise / (layers * g.row))) : 0;
    return [x0, y0, x0 + bow, y0 - lift, x1 + bow, y1 + lift, x1, y1];
  }

  function along(c, t) {
    const u = 1 - t, a = u * u * u, b = 3 * u * u * t, d = 3 * u * t * t, e = t * t * t;
    return [a * c[0] + b * c[2] + d * c[4] + e * c[6], a * c[1] + b * c[3] + d * c[5] + e * c[7]];
  }

  // --- drawing
  function colour(edge, score) {
    const soft = "qkv".includes(edge.kind);
    return score >= 0 ? (soft ? LOOK.positiveSoft : LOOK.positive) : soft ? LOOK.negativeSoft : LOOK.negative;
  }

  function draw() {
    const ctx = base.getContext("2d");
    ctx.clearRect(0, 0, width, height);
    if (!view.edges) return;
    const top = Math.max(1e-12, ...panels.map((panel) => panel.top));
    drawn = [];
    panels.forEach((panel, i) => {
      const g = geometry(i);
      bands(ctx, g, i);
      const strong = view.edges.length <= ALL_STAND_OUT ? view.edges.length : STAND_OUT;
      const faint = Math.max(0.1, Math.min(0.5, 60 / Math.max(1, view.edges.length - strong)));
      const scale = Math.min(1, Math.max(0.55, g.radius / 11));
      const curves = view.edges.map((edge) => curve(g, edge));
      const ranked = view.edges.map((edge, k) => [Math.abs(panel.score(edge)), k]).sort((a, b) => a[0] - b[0]);
      ranked.forEach(([size, k], rank) => {
        const edge = view.edges[k], c = curves[k], score = panel.score(edge);
        const front = rank >= ranked.length - strong;
        const step = WIDTHS.findIndex((_, n) => size > top / 2 ** (n + 1));
        ctx.lineWidth = front ? WIDTHS[step < 0 ? 0 : WIDTHS.length - 1 - step] * scale : 0.7;
        ctx.globalAlpha = front ? 0.85 : faint;
        ctx.strokeStyle = colour(edge, score);
        ctx.setLineDash(front ? DASHES[edge.kind] : []);
        ctx.beginPath();
        ctx.moveTo(c[0], c[1]);
        ctx.bezierCurveTo(...c.slice(2));
        ctx.stroke();
        if (front && score < 0 && size > top / 32) ring(ctx, along(c, 0.5), colour(edge, score), 2.5 + 2 * scale);
      });
      ctx.globalAlpha = 1;
      ctx.setLineDash([]);
      const nodes = nodesOf(ctx, g);
      title(ctx, g, panel);
      drawn.push({ g, curves, nodes, grid: null });
    });
    mark();
  }

  function ring(ctx, [x, y], stroke, size) {
    ctx.save();
    ctx.setLineDash([]);
    ctx.globalAlpha = 1;
    ctx.lineWidth = 1.4;
    ctx.fillStyle = LOOK.paper;
    ctx.beginPath();
    ctx.arc(x, y, size, 0, 7);
    ctx.fill();
    ctx.strokeStyle = stroke;
    ctx.stroke();
    ctx.restore();
  }

  function bands(ctx, g, index) {
    ctx.fillStyle = LOOK.band;
    for (let layer = 0; layer < layers; layer += 2) ctx.fillRect(g.x0, g.y(layer + 0.6), g.each, g.row);
    ctx.fillStyle = LOOK.muted;
    ctx.font = `11px ${FONT}`;
    if (index === 0) {
      ctx.textAlign = "right";
      ctx.textBaseline = "middle";
      const every = Math.max(1, Math.ceil(13 / g.row));
      for (let layer = 0; layer < layers; layer += every) ctx.fillText(`L${layer}`, g.x0 - 5, g.y(layer));
    }
    if (g.radius < 9) {
      ctx.textAlign = "center";
      ctx.textBaseline = "alphabetic";
      const every = Math.ceil(24 / g.column);
      for (let head = 0; head < heads; head += every) ctx.fillText(`H${head}`, g.x(head), height - 5);
      ctx.fillText("MLP", g.x(heads + 0.35), height - 5);
    }
  }

  function title(ctx, g, panel) {
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.fillStyle = LOOK.ink;
    ctx.font = `600 13px ${FONT}`;
    ctx.fillText(fitted(ctx, panel.title, g.each), g.x0, 16);
    ctx.fillStyle = LOOK.muted;
    ctx.font = `12px ${FONT}`;
    ctx.fillText(fitted(ctx, panel.note, g.each), g.x0, 33);
  }

  function fitted(ctx, text, room) {
    if (ctx.measureText(text).width <= room) return text;
    let cut = text;
    while (cut && ctx.measureText(`${cut}…`).width > room) cut = cut.slice(0, -1);
    return `${cut}…`;
  }

  function nodesOf(ctx, g) {
    const out = [];
    const bars = new Set(view.edges.map((edge) => edge.bar).filter(Boolean));
    ctx.strokeStyle = LOOK.muted;
    for (const bar of bars) {
      const { layer, index } = parsed(bar), y = g.y(layer - 0.33);
      ctx.lineWidth = Math.max(2, g.radius / 4);
      ctx.beginPath();
      ctx.moveTo(g.x(index * groups) - g.radius, y);
      ctx.lineTo(g.x(index * groups + groups - 1) + g.radius, y);
      ctx.stroke();
      ctx.lineWidth = 1;
      for (let i = 0; i < groups; i++) {
        const head = `L${layer}H${index * groups + i}`;
        if (!view.nodes.has(head)) continue;
        const [x, below] = place(g, head);
        ctx.beginPath();
        ctx.moveTo(x, y);
        ctx.lineTo(x, below + g.radius);
        ctx.stroke();
      }
    }
    for (const [name, live] of view.nodes) {
      const [x, y] = place(g, name);
      const group = view.groups.some((each) => each.name === name);
      const square = !group && !/H\d/.test(name), end = name === "embed" || name === "logits";
      const r = live ? g.radius : Math.max(2, g.radius * 0.45);
      const shown = group ? name : end ? name : parsed(name).mlp ? "MLP" : `H${parsed(name).index}`;
      ctx.font = `${Math.max(9, Math.min(12, g.radius * 0.85))}px ${FONT}`;
      const half = group ? Math.max(r, ctx.measureText(shown).width / 2 + 5) : parsed(name).mlp && g.radius >= 9 ? r * 1.25 : r;
      ctx.fillStyle = group ? LOOK.band : LOOK.paper;
      ctx.strokeStyle = live ? LOOK.ink : LOOK.neutral;
      ctx.lineWidth = live ? 1.4 : 0.8;
      ctx.beginPath();
      if (group || square) ctx.rect(x - half, y - r, 2 * half, 2 * r);
      else ctx.arc(x, y, r, 0, 7);
      ctx.fill();
      ctx.stroke();
      ctx.fillStyle = LOOK.ink;
      ctx.textAlign = "center";
      ctx.textBaseline = "middle";
      if (end) { ctx.textAlign = "left"; ctx.fillText(name, x + r + 4, y); }
      else if (group || (live && g.radius >= 9)) ctx.fillText(shown, x, y + 0.5);
      out.push({ name, x, y, r: Math.max(r, 5), half: Math.max(half, 5) });
    }
    return out;
  }

  // --- what is marked: the chosen, the pinned, what is switched off, what the mouse is on
  function mark() {
    const ctx = over.getContext("2d");
    ctx.clearRect(0, 0, width, height);
    for (const panel of drawn) {
      const lit = (item, stroke, wide) => {
        const node = panel.nodes.find((each) => each.name === item);
        ctx.strokeStyle = stroke;
        ctx.lineWidth = wide;
        if (node) {
          ctx.beginPath();
          if (node.half > node.r * 1.2) ctx.rect(node.x - node.half - 4, node.y - node.r - 4, 2 * node.half + 8, 2 * node.r + 8);
          else ctx.arc(node.x, node.y, node.r + 4, 0, 7);
          ctx.stroke();
          return;
        }
        const k = view.index.get(item);
        if (k === undefined) return;
        const c = panel.curves[k];
        ctx.globalAlpha = 0.55;
        ctx.lineWidth = wide + 4;
        ctx.beginPath();
        ctx.moveTo(c[0], c[1]);
        ctx.bezierCurveTo(...c.slice(2));
        ctx.stroke();
        ctx.globalAlpha = 1;
        ring(ctx, along(c, 0.5), stroke, 5);
      };
      for (const item of view.marks.pinned || []) lit(item, LOOK.pin, 2.2);
      if (view.marks.chosen) lit(view.marks.chosen, LOOK.chosen, 3);
      if (hovered) lit(hovered, LOOK.ink, 1.2);
      for (const item of view.marks.off || []) cross(ctx, panel, item);
    }
  }

  function cross(ctx, panel, item) {
    const node = panel.nodes.find((each) => each.name === item), k = view.index.get(item);
    if (!node && k === undefined) return;
    const [x, y] = node ? [node.x, node.y] : along(panel.curves[k], 0.5), r = node ? node.r : 6;
    ctx.strokeStyle = "#B00020";
    ctx.lineWidth = 2.4;
    ctx.beginPath();
    ctx.moveTo(x - r, y - r);
    ctx.lineTo(x + r, y + r);
    ctx.moveTo(x + r, y - r);
    ctx.lineTo(x - r, y + r);
    ctx.stroke();
  }

  // --- the mouse
  // Points along every edge, sorted by the cell of the panel that they lie in.
  const CELL = 12, STEP = 9;
  function gridOf(panel) {
    if (panel.grid) return panel.grid;
    const { curves } = panel, across = Math.ceil(width / CELL) + 2, cells = across * (Math.ceil(height / CELL) + 2);
    const counts = curves.map((c) => Math.max(2, Math.ceil((1.15 * (Math.abs(c[6] - c[0]) + Math.abs(c[7] - c[1]))) / STEP)));
    const total = counts.reduce((sum, n) => sum + n + 1, 0);
    const xs = new Float32Array(total), ys = new Float32Array(total), edge = new Int32Array(total), cell = new Int32Array(total);
    const start = new Int32Array(cells + 1), order = new Int32Array(total);
    let at = 0;
    curves.forEach((c, k) => {
      for (let n = 0; n <= counts[k]; n++) {
        const [x, y] = along(c, n / counts[k]);
        xs[at] = x; ys[at] = y; edge[at] = k;
        cell[at] = Math.max(0, Math.min(cells - 1, Math.floor(y / CELL) * across + Math.floor(x / CELL)));
        start[cell[at++] + 1] += 1;
      }
    });
    for (let i = 0; i < cells; i++) start[i + 1] += start[i];
    const next = start.slice();
    for (let i = 0; i < total; i++) order[next[cell[i]]++] = i;
    panel.grid = { xs, ys, edge, start, order, across, cells };
    return panel.grid;
  }

  function distance(c, x, y) {
    let best = Infinity, [px, py] = along(c, 0);
    for (let n = 1; n <= 2 * POINTS; n++) {
      const [qx, qy] = along(c, n / (2 * POINTS)), dx = qx - px, dy = qy - py;
      const t = Math.max(0, Math.min(1, ((x - px) * dx + (y - py) * dy) / (dx * dx + dy * dy || 1)));
      best = Math.min(best, Math.hypot(x - px - t * dx, y - py - t * dy));
      px = qx; py = qy;
    }
    return best;
  }

  // The node under the mouse, else the nearest edge, of edges about as near the stronger one.
  function find(x, y) {
    const at = drawn.findIndex(({ g }) => x >= g.x0 - 8 && x <= g.x0 + g.each + 8);
    if (at < 0) return null;
    const panel = drawn[at];
    const node = panel.nodes.find((n) => Math.abs(x - n.x) <= n.half + 1 && Math.abs(y - n.y) <= n.r + 1);
    if (node) return { item: node.name, panel: at };
    const grid = gridOf(panel), near = new Map(), cx = Math.floor(x / CELL), cy = Math.floor(y / CELL);
    for (let row = cy - 1; row <= cy + 1; row++) {
      const first = row * grid.across + cx - 1;
      if (first < 0 || first + 3 > grid.cells) continue;
      for (let i = grid.start[first]; i < grid.start[first + 3]; i++) {
        const p = grid.order[i], d = Math.hypot(grid.xs[p] - x, grid.ys[p] - y);
        if (d < 6 + STEP && !(near.get(grid.edge[p]) <= d)) near.set(grid.edge[p], d);
      }
    }
    const rank = ([k, d]) => d - Math.min(4, 4 * panels[at].share(view.edges[k]));
    let best = 6, found = null;
    for (const [k] of [...near].sort((a, b) => rank(a) - rank(b)).slice(0, 24)) {
      const d = distance(panel.curves[k], x, y) - Math.min(3, 3 * panels[at].share(view.edges[k]));
      if (d < best) { best = d; found = k; }
    }
    return found === null ? null : { item: view.edges[found].name, panel: at };
  }

  function moved(event) {
    const box_ = over.getBoundingClientRect(), x = event.clientX - box_.left, y = event.clientY - box_.top;
    const found = view.edges ? find(x, y) : null;
    const item = found && found.item;
    over.style.cursor = item ? "pointer" : "default";
    if (item !== hovered) { hovered = item; mark(); }
    label.hidden = !item;
    if (!item) return null;
    label.textContent = act.tell(item, found.panel);
    const room = label.getBoundingClientRect();
    label.style.left = `${Math.max(0, Math.min(x + 14, width - room.width - 4))}px`;
    label.style.top = `${y + 18 + room.height > height ? y - room.height - 10 : y + 18}px`;
    return item;
  }
  over.addEventListener("mousemove", moved);
  over.addEventListener("mouseleave", () => { hovered = null; label.hidden = true; mark(); });
  over.addEventListener("click", (event) => {
    const item = moved(event);
    if (item) act.click(item, event.shiftKey || event.ctrlKey || event.metaKey);
  });
  new ResizeObserver(() => { resize(); draw(); }).observe(box);
  resize();

  return {
    // panels: [{title, note, score(edge), share(edge), top}]; shown: {edges, nodes (name → whether it has a drawn edge), groups, marks}
    show(newPanels, shown) {
      panels = newPanels;
      view = { ...shown, index: new Map(shown.edges.map((edge, k) => [edge.name, k])) };
      hovered = null;
      label.hidden = true;
      draw();
    },
    marks(marks) { view.marks = marks; mark(); },
    // Where an item is on the page, in a panel.
    where(item, panel = 0) {
      const found = drawn[panel], box_ = over.getBoundingClientRect();
      const node = found.nodes.find((each) => each.name === item);
      if (node) return [box_.left + node.x, box_.top + node.y];
      const k = view.index.get(item);
      if (k === undefined) return null;
      for (const t of [0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8]) {
        const [x, y] = along(found.curves[k], t), hit = find(x, y);
        if (hit && hit.item === item) return [box_.left + x, box_.top + y];
      }
      const [x, y] = along(found.curves[k], 0.5);
      return [box_.left + x, box_.top + y];
    },
    get items() { return view.edges ? { edges: view.edges.map((e) => e.name), nodes: [...view.nodes.keys()] } : null; },
  };
}
