// Tables of numbers as colours: rows x columns on a canvas, labels around it, hover.

function colorBar(top, label, isByte) {
  const picture = svg("svg", { viewBox: "0 0 300 40", style: "width:300px;margin-top:4px", role: "img", "aria-label": label });
  for (let i = 0; i < 120; i++) picture.append(svg("rect", { x: 4 + i * 2, y: 2, width: 2.2, height: 12, fill: viridis(i / 119) }));
  const marksAt = ticks(0, top, 4);
  for (const value of marksAt) picture.append(svg("text", { class: "label", x: 4 + (value / top) * 240, y: 29, "text-anchor": value ? "middle" : "start" }, short(value)));
  picture.append(svg("text", { class: "label", x: 250, y: 12 }, isByte ? "and more" : ""));
  return el("div", {}, picture, el("div", { class: "note" }, label));
}

// values(row, column) -> number or null; options: rows, columns (names), top, size, xName, yName, describe, crossesZero
function heatmap(options) {
  const { rows, columns, top } = options;
  const cellX = Math.max(2, Math.min(options.maxCell || 34, Math.floor((options.width || 520) / columns.length)));
  const cellY = Math.max(3, Math.min(options.maxCell || 34, Math.floor((options.height || 420) / rows.length)));
  const [left, bottom] = [options.left || 58, 40];
  const [width, height] = [cellX * columns.length, cellY * rows.length];
  const canvas = el("canvas", { width: (left + width + 12) * 2, height: (height + bottom + 4) * 2, role: "img", "aria-label": `${options.yName} by ${options.xName}` });
  canvas.style.width = `${left + width + 12}px`;
  canvas.style.height = `${height + bottom + 4}px`;
  const pen = canvas.getContext("2d");
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) * (left + width + 12) / box.width - left) / cellX);
    const row = Math.floor(((event.clientY - box.top) * (height + bottom + 4) / box.height - 2) / cellY);
    return row >= 0 && row < rows.length && column >= 0 && column < columns.length ? [row, column] : null;
  };
  function label(text, x, y, align) {
    pen.textAlign = align;
    pen.fillText(text, x, y);
  }
  function axes() {
    pen.fillStyle = "#57606a";
    pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    const everyRow = Math.ceil(15 / cellY);
    rows.forEach((name, row) => { if (row % everyRow === 0) label(name, left - 8, 2 + row * cellY + cellY / 2 + 4, "right"); });
    const widest = Math.max(...columns.map((name) => String(name).length));
    const everyColumn = Math.ceil((widest * 8 + 8) / cellX);
    columns.forEach((name, column) => { if (column % everyColumn === 0) label(name, left + column * cellX + cellX / 2, height + 18, "center"); });
    label(options.xName, left + width / 2, height + 36, "center");
    pen.save();
    pen.translate(13, 2 + height / 2);
    pen.rotate(-Math.PI / 2);
    label(options.yName, 0, 0, "center");
    pen.restore();
  }
  function draw(values) {
    canvas.values = values;
    pen.setTransform(2, 0, 0, 2, 0, 0);
    pen.clearRect(0, 0, left + width + 12, height + bottom + 4);
    axes();
    const gap = Math.min(cellX, cellY) > 7 ? 1 : 0;
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < columns.length; column++) {
        const value = values(row, column);
        const [x, y] = [left + column * cellX, 2 + row * cellY];
        pen.fillStyle = value === null ? "#e7ebef" : viridis(value / top);
        pen.fillRect(x, y, cellX - gap, cellY - gap);
        if (options.crossesZero && value === 0 && Math.min(cellX, cellY) >= 5) cross(x, y);
      }
    }
  }
  function cross(x, y) {
    pen.strokeStyle = "#ffffff";
    pen.lineWidth = 1.4;
    const inset = Math.min(cellX, cellY) * 0.28;
    pen.beginPath();
    pen.moveTo(x + inset, y + inset);
    pen.lineTo(x + cellX - inset, y + cellY - inset);
    pen.moveTo(x + cellX - inset, y + inset);
    pen.lineTo(x + inset, y + cellY - inset);
    pen.stroke();
  }
  canvas.addEventListener("mousemove", (event) => {
    const found = place(event);
    if (found && canvas.values) showTip(event, options.describe(...found, canvas.values(...found)));
    else hideTip();
  });
  canvas.addEventListener("mouseleave", hideTip);
  return { canvas, draw };
}

function load(value) {
  if (value === 0) return "no token";
  return `${value >= NOT_MORE / PER_EVEN ? "5.1 or more" : value.toFixed(2)} × an even load`;
}

// A slider over intervals: calls draw(index).
function slider(steps, draw, name) {
  const out = el("output", { "data-name": name });
  const input = el("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": `step of ${name}` });
  const show = () => { out.textContent = `step ${grouped(steps[input.value])}`; draw(Number(input.value)); };
  input.addEventListener("input", show);
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const play = el("button", { type: "button" }, "Play");
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(input.value) === steps.length - 1) input.value = 0;
    play.textContent = "Stop";
    timer = setInterval(() => {
      if (Number(input.value) >= steps.length - 1) { stop(); return; }
      input.value = Number(input.value) + 1;
      show();
    }, 180);
  });
  show();
  const parts = steps.length > 1 ? [play, input, out] : [out];
  return el("div", { class: "control" }, ...parts);
}
