// Curves over steps: axes, resumes, hover.

function extent(series, at) {
  let low = Infinity;
  let high = -Infinity;
  for (const one of series) {
    for (const point of one.points) {
      if (point[at] === null) continue;
      low = Math.min(low, point[at]);
      high = Math.max(high, point[at]);
    }
  }
  return low > high ? [0, 1] : [low, high];
}

// The first steps of a run must not flatten the rest: a log scale where the values ask for it.
function valueScale(series, isLog, top, bottom) {
  let [low, high] = extent(series, 1);
  if (isLog && low > 0) {
    const [from, to] = [Math.log10(low) - 0.03, Math.log10(high) + 0.03];
    const y = (value) => bottom - ((Math.log10(value) - from) / (to - from || 1)) * (bottom - top);
    const marks = [];
    for (let p = Math.floor(from); p <= Math.ceil(to); p++) {
      for (const m of to - from > 2 ? [1] : [1, 2, 5]) marks.push(m * 10 ** p);
    }
    return [y, marks.filter((v) => v >= 10 ** from && v <= 10 ** to)];
  }
  if (low >= 0 && low < high * 0.4) low = 0;
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  const [from, to] = [low === 0 ? 0 : low - pad, high + pad];
  return [(value) => bottom - ((value - from) / (to - from)) * (bottom - top), ticks(from, to, 5)];
}

function frame(picture, box, x, y, xTicks, yTicks, names) {
  for (const value of yTicks) {
    picture.append(svg("line", { class: "gridline", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
    picture.append(svg("text", { class: "label", x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, names.format(value)));
  }
  for (const value of xTicks) {
    picture.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4 }));
    picture.append(svg("text", { class: "label", x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, grouped(value)));
  }
  picture.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  picture.append(svg("text", { class: "label", x: (box.left + box.right) / 2, y: box.bottom + 36, "text-anchor": "middle" }, names.x));
  const middle = (box.top + box.bottom) / 2;
  picture.append(svg("text", { class: "label", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, names.y));
}

function pathOf(points, x, y) {
  let text = "";
  let isDown = false;
  for (const [step, value] of points) {
    if (value === null) { isDown = false; continue; }
    text += `${isDown ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`;
    isDown = true;
  }
  return text;
}

function nearest(points, step) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
  }
  return best;
}

// Where "resumed" stands: resumes of which two labels would overlap share one, behind the last of
// them, or before the first where the plot ends. resumes: [[step, color]]; returns [{x, text, color}],
// x is the text's left end.
function resumeLabels(resumes, x, box) {
  const wide = (text) => 7.6 * text.length;
  const groups = [];
  for (const [step, color] of [...resumes].sort((a, b) => a[0] - b[0])) {
    const last = groups[groups.length - 1];
    if (last && x(step) - last.to < wide("resumed ×99") + 8) {
      Object.assign(last, { to: x(step), count: last.count + 1, color: last.color === color ? color : "#6e7781" });
    } else {
      groups.push({ from: x(step), to: x(step), color, count: 1 });
    }
  }
  const named = groups.map(({ from, to, color, count }) => {
    const text = count > 1 ? `resumed ×${count}` : "resumed";
    const fits = to + 4 + wide(text) <= box.right;
    return { text, color, x: fits ? to + 4 : Math.max(box.left, from - 4 - wide(text)) };
  });
  return named.filter((one, at) => at === named.length - 1 || one.x + wide(one.text) <= named[at + 1].x);
}

function marks(picture, box, x, resumes) {
  const inside = resumes.filter(([step]) => x(step) >= box.left - 0.5 && x(step) <= box.right + 0.5);
  for (const [step, color] of inside) {
    picture.append(svg("line", { class: "mark", x1: x(step), x2: x(step), y1: box.top, y2: box.bottom, style: `stroke:${color}` }));
  }
  for (const one of resumeLabels(inside, x, box)) {
    picture.append(svg("text", { class: "resumed", x: one.x, y: box.top + 10, style: `fill:${one.color}` }, one.text));
  }
}

// series: [{name, color, points: [[step, value]], dash, dots}]; options: y, format, log, resumes, wide
function lines(series, options) {
  const shown = series.filter((one) => one.points && one.points.length);
  if (!shown.length) return missing("no values");
  const width = options.wide ? 1160 : 570;
  const height = options.height || 270;
  const box = { left: 84, right: width - 14, top: 12, bottom: height - 46 };
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${options.y} over steps` });
  const [first, last] = extent(shown, 0);
  const x = (step) => (last === first ? (box.left + box.right) / 2 : box.left + ((step - first) / (last - first)) * (box.right - box.left));
  const [y, yTicks] = valueScale(shown, options.log, box.top, box.bottom);
  const format = options.format || short;
  const xTicks = last === first ? [first] : wholeTicks(first, last, options.wide ? 10 : 6);
  const isLog = options.log && extent(shown, 1)[0] > 0;
  frame(picture, box, x, y, xTicks, yTicks, { x: "step", y: isLog ? `${options.y}, log scale` : options.y, format });
  marks(picture, box, x, options.resumes || []);
  for (const one of shown) {
    const style = `stroke:${one.color};${one.dash ? `stroke-dasharray:${one.dash}` : ""}`;
    picture.append(svg("path", { class: "curve", d: pathOf(one.points, x, y), style }));
    const dots = one.dots || one.points.length === 1 ? one.points : [];
    for (const [step, value] of dots) {
      if (value !== null) picture.append(svg("circle", { cx: x(step), cy: y(value), r: 3.6, style: `fill:${one.color};stroke:#fff;stroke-width:1` }));
    }
    for (const [step, value] of one.points) {
      if (value === null) picture.append(svg("text", { x: x(step), y: box.bottom - 4, "text-anchor": "middle", style: "fill:#d55e00;font-weight:700" }, "×"));
    }
  }
  const cursor = svg("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  picture.append(cursor);
  picture.addEventListener("mousemove", (event) => {
    const frameBox = picture.getBoundingClientRect();
    const step = first + (((event.clientX - frameBox.left) / frameBox.width) * width - box.left) / (box.right - box.left) * (last - first);
    const main = nearest(shown[0].points, step);
    cursor.setAttribute("x1", x(main[0]));
    cursor.setAttribute("x2", x(main[0]));
    cursor.setAttribute("visibility", "visible");
    const values = shown.map((one) => {
      const point = nearest(one.points, main[0]);
      const at = point[0] === main[0] ? "" : `  (step ${grouped(point[0])})`;
      return `${one.name}: ${format(point[1])}${at}`;
    });
    showTip(event, [`step ${grouped(main[0])}`, ...values].join("\n"));
  });
  picture.addEventListener("mouseleave", () => { hideTip(); cursor.setAttribute("visibility", "hidden"); });
  return picture;
}
