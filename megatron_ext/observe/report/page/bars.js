// Stacked bars: where time and memory go, over steps and over ranks.

// columns: names along x; parts: [{name, color, values}], seconds, or with options.bytes bytes;
// options: y, x, format, hint, high (of two runs side by side the higher, so that they compare)
function stacked(columns, parts, options) {
  const width = options.wide ? 1160 : 570;
  const height = options.height || 280;
  const box = { left: 84, right: width - 14, top: 12, bottom: height - 46 };
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.y });
  const totals = columns.map((_, at) => parts.reduce((sum, part) => sum + (part.values[at] || 0), 0));
  const high = (options.high || Math.max(...totals)) * 1.05 || 1;
  const y = (value) => box.bottom - (value / high) * (box.bottom - box.top);
  const slot = (box.right - box.left) / columns.length;
  const bar = Math.min(64, Math.max(1, slot * (columns.length > 60 ? 1 : 0.78)));
  const middle = (at) => box.left + slot * (at + 0.5);
  const axis = options.bytes ? { ticks: byteTicks(high), y: options.y, format: options.format } : timeAxis(high, options.y);
  frame(picture, box, (v) => v, y, [], axis.ticks, { x: options.x, y: axis.y, format: axis.format });
  const everyColumn = Math.ceil((Math.max(...columns.map((c) => String(c).length)) * 8 + 10) / slot);
  columns.forEach((name, at) => {
    if (at % everyColumn === 0) picture.append(svg("text", { class: "label", x: middle(at), y: box.bottom + 18, "text-anchor": "middle" }, String(name)));
    let base = 0;
    for (const part of parts) {
      const value = part.values[at] || 0;
      if (value > 0) {
        picture.append(svg("rect", { x: middle(at) - bar / 2, y: y(base + value), width: bar, height: Math.max(0.3, y(base) - y(base + value)), fill: part.color }));
      }
      base += value;
    }
    const target = svg("rect", { x: box.left + slot * at, y: box.top, width: slot, height: box.bottom - box.top, fill: "transparent" });
    target.addEventListener("mousemove", (event) => {
      const rows = parts.filter((part) => part.values[at]).map((part) => `${part.name}: ${options.format(part.values[at])}${part.more ? part.more(at) : ""}`);
      showTip(event, [`${options.hint || options.x} ${name}`, ...rows.reverse(), `together: ${options.format(totals[at])}`].join("\n"));
    });
    target.addEventListener("mouseleave", hideTip);
    picture.append(target);
  });
  return picture;
}

// One unit for a whole axis of seconds, named once: [s, ms or us], ticks in it, and its name.
function timeAxis(high, name) {
  const [unit, size] = high >= 1 ? ["s", 1] : high >= 1e-3 ? ["ms", 1e-3] : ["µs", 1e-6];
  const marked = ticks(0, high / size, 5).map((one) => one * size);
  return { ticks: marked, y: `${name} (${unit})`, format: (value) => trim((value / size).toPrecision(4)) };
}

function byteTicks(high) {
  const unit = 1024 ** Math.max(0, Math.floor(Math.log(high / 2) / Math.log(1024)));
  return ticks(0, high / unit, 5).map((one) => one * unit);
}

const highest = (ofRun) => Math.max(0, ...RUNS.flatMap(ofRun));
const sumsOver = (time) => time.steps.map((_, at) => time.mean.reduce((sum, row) => sum + (row[at] || 0), 0));

function timeOverSteps(time) {
  const high = highest((run) => (run.time ? sumsOver(run.time) : []));
  const parts = time.kinds.map((kind, at) => ({
    name: KIND[kind][1],
    color: KIND[kind][0],
    values: time.mean[at],
    more: (i) => (time.worst[at][i] ? `, worst rank ${seconds(time.worst[at][i])}` : ""),
  }));
  return stacked(time.steps.map(grouped), parts, { y: "time of a step, mean over ranks", x: "step", format: seconds, wide: !IS_PAIR, high });
}

function timeOfRanks(ranks) {
  const at = (name) => ranks.columns.indexOf(name);
  const kinds = Object.keys(KIND).filter((kind) => at(kind) >= 0);
  const parts = kinds.map((kind) => ({ name: KIND[kind][1], color: KIND[kind][0], values: ranks.rows.map((row) => row[at(kind)]) }));
  const inside = (row) => kinds.reduce((sum, kind) => sum + (kind === "save" ? 0 : row[at(kind)]), 0);
  parts.push({ name: KIND.other[1], color: KIND.other[0], values: ranks.rows.map((row) => Math.max(0, row[at("step")] - inside(row))) });
  const high = highest((run) => (run.ranks ? run.ranks.rows.map((row) => Math.max(row[at("step")] + row[at("save")], inside(row))) : []));
  return stacked(ranks.numbers, parts, { high, y: "time of a step", x: "rank", hint: "rank", format: seconds });
}

const MEMORY = [["weights", "#0072b2"], ["gradients", "#009e73"], ["optimizer", "#56b4e9"]];
const MEMORY_REST = "the rest at the peak: activations, buffers, program";
function memoryOfRanks(ranks) {
  const at = (name) => ranks.columns.indexOf(`memory_${name}`);
  const parts = MEMORY.map(([name, color]) => ({ name, color, values: ranks.rows.map((row) => row[at(name)]) }));
  const held = (row) => MEMORY.reduce((sum, [name]) => sum + row[at(name)], 0);
  parts.push({ name: MEMORY_REST, color: "#c3cad1", values: ranks.rows.map((row) => Math.max(0, row[at("peak")] - held(row))) });
  const high = highest((run) => (run.ranks ? run.ranks.rows.map((row) => Math.max(row[at("peak")], held(row))) : []));
  return stacked(ranks.numbers, parts, { high, y: "memory", x: "rank", hint: "rank", format: bytes, bytes: true });
}
