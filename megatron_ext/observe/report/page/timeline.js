// One step, a row a rank: forward and backward of each micro-batch, waiting, collectives.

const LIGHT = { forward: ["#0072b2", "#4a9fd4", "#00476f"], backward: ["#009e73", "#4cc3a1", "#00614a"] };
const ROW = 26;
const SMALL = 10;
const spanColor = (kind, chunk) => (LIGHT[kind] ? LIGHT[kind][(chunk || 0) % 3] : (KIND[kind] || KIND.other)[0]);

function rowsOf(spans) {
  const keys = new Map();
  for (const [rank, row] of spans) keys.set(`${rank}/${row}`, [rank, row]);
  let y = 26;
  const found = [...keys.values()].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  return found.map(([rank, row]) => {
    if (row === 0) y += 8;
    const placed = { rank, row, y, height: row === 0 ? ROW : SMALL };
    y += placed.height + 2;
    return placed;
  });
}

function spanText([rank, row, kind, start, length, micro, chunk, name]) {
  const lines = [`rank ${rank}, ${KIND[kind] ? KIND[kind][1] : kind}${row ? ` (${name}, from call to wait)` : ""}`];
  if (micro !== null) lines.push(`micro-batch ${micro}, model chunk ${chunk}`);
  else if (!row && name !== kind) lines.push(name);
  lines.push(`from ${seconds(start / 1000)} for ${seconds(length / 1000)}`);
  return lines.join("\n");
}

function timeline(trace) {
  const rows = rowsOf(trace.spans);
  const rowAt = new Map(rows.map((one) => [`${one.rank}/${one.row}`, one]));
  const last = Math.max(...trace.spans.map((one) => one[3] + one[4]));
  const [left, width] = [92, 1160];
  const height = rows[rows.length - 1].y + rows[rows.length - 1].height + 6;
  const canvas = el("canvas", { width: width * 2, height: height * 2, role: "img", "aria-label": "what each rank did when", class: "timeline" });
  canvas.style.width = "100%";
  canvas.style.aspectRatio = `${width} / ${height}`;
  const pen = canvas.getContext("2d");
  let [from, to] = [0, last];
  const x = (ms) => left + ((ms - from) / (to - from)) * (width - left - 8);
  function box(one) {
    const row = rowAt.get(`${one[0]}/${one[1]}`);
    const isInside = one[1] === 0 && (one[2] === "all_to_all" || one[2] === "collectives");
    const x0 = Math.max(left, x(one[3]));
    return { x0, x1: Math.min(width - 8, x(one[3] + one[4])), y: isInside ? row.y + row.height - 8 : row.y, height: isInside ? 8 : row.height };
  }
  function drawAxis() {
    pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    for (const ms of ticks(from, to, 10)) {
      pen.fillStyle = "#e7ebef";
      pen.fillRect(x(ms), 20, 1, height);
      pen.fillStyle = "#57606a";
      pen.textAlign = "center";
      pen.fillText(`${trim(ms.toPrecision(5))} ms`, Math.min(width - 26, x(ms)), 13);
    }
    pen.textAlign = "right";
    for (const row of rows) {
      pen.fillStyle = row.row ? "#57606a" : "#1b1f24";
      pen.font = row.row ? "10px system-ui, 'DejaVu Sans', sans-serif" : "600 13px system-ui, 'DejaVu Sans', sans-serif";
      if (row.row < 2) pen.fillText(row.row ? "collectives" : `rank ${row.rank}`, left - 9, row.y + row.height / 2 + 4);
    }
  }
  function draw() {
    pen.setTransform(2, 0, 0, 2, 0, 0);
    pen.clearRect(0, 0, width, height);
    drawAxis();
    const inner = ["all_to_all", "collectives"];
    const order = (one) => (one[1] === 0 && inner.includes(one[2]) ? 1 : 0);
    for (const one of [...trace.spans].sort((a, b) => order(a) - order(b))) {
      if (one[3] + one[4] < from || one[3] > to) continue;
      const { x0, x1, y, height: tall } = box(one);
      const wide = Math.max(0.6, x1 - x0);
      pen.fillStyle = spanColor(one[2], one[6]);
      pen.fillRect(x0, y, wide, tall);
      if (LIGHT[one[2]]) {
        pen.strokeStyle = "#ffffff";
        pen.lineWidth = 1;
        pen.strokeRect(x0, y, wide, tall);
      }
      if (LIGHT[one[2]] && wide > 22) {
        pen.font = "600 12px system-ui, 'DejaVu Sans', sans-serif";
        pen.textAlign = "center";
        pen.fillStyle = "#ffffff";
        pen.fillText(one[7], x0 + wide / 2, y + 13);
      }
    }
  }
  const at = (event) => {
    const frameBox = canvas.getBoundingClientRect();
    return [((event.clientX - frameBox.left) / frameBox.width) * width, ((event.clientY - frameBox.top) / frameBox.height) * height];
  };
  let startX = null;
  const toMs = (px) => from + ((px - left) / (width - left - 8)) * (to - from);
  canvas.addEventListener("mousedown", (event) => { startX = at(event)[0]; });
  canvas.addEventListener("mouseup", (event) => {
    const endX = at(event)[0];
    if (startX !== null && Math.abs(endX - startX) > 6) {
      const [a, b] = [toMs(Math.min(startX, endX)), toMs(Math.max(startX, endX))];
      [from, to] = [Math.max(0, a), Math.min(last, b)];
      draw();
    }
    startX = null;
  });
  const whole = () => { [from, to] = [0, last]; draw(); };
  canvas.addEventListener("dblclick", whole);
  canvas.addEventListener("mousemove", (event) => {
    const [px, py] = at(event);
    let found = null;
    for (const one of trace.spans) {
      const shape = box(one);
      if (px >= shape.x0 - 1 && px <= shape.x1 + 1 && py >= shape.y && py <= shape.y + shape.height && (!found || one[4] < found[4])) found = one;
    }
    if (found) showTip(event, spanText(found));
    else hideTip();
  });
  canvas.addEventListener("mouseleave", hideTip);
  draw();
  return el("div", {}, el("div", { class: "control" }, el("button", { type: "button", onclick: whole }, "Whole step"), el("span", { class: "note" }, "Drag over the picture to look closer.")), canvas);
}

function idleShares(trace) {
  const last = Math.max(...trace.spans.map((one) => one[3] + one[4]));
  const shares = new Map();
  for (const [rank, row, kind, , length] of trace.spans) {
    if (row !== 0) continue;
    const one = shares.get(rank) || { pipeline_wait: 0, all_to_all: 0 };
    if (kind in one) one[kind] += length / last;
    shares.set(rank, one);
  }
  const percent = (share) => `${Math.round(share * 100)}%`;
  return [...shares].sort((a, b) => a[0] - b[0]).slice(0, 8).map(([rank, one]) => `rank ${rank}: waits for stages ${percent(one.pipeline_wait)}, all-to-all ${percent(one.all_to_all)}`).join("; ");
}
