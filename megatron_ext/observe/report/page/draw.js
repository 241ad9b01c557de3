// Elements, scales, number formats, colours, the hover box.

// Okabe and Ito's colours, safe for all kinds of colour vision.
const KIND = {
  data: ["#f0e442", "data"],
  forward: ["#0072b2", "forward"],
  backward: ["#009e73", "backward"],
  all_to_all: ["#e69f00", "all-to-all"],
  pipeline_wait: ["#dfe3e8", "pipeline wait"],
  collectives: ["#cc79a7", "other collectives"],
  optimizer: ["#56b4e9", "optimizer"],
  save: ["#d55e00", "save (blocking)"],
  other: ["#8c959f", "the rest"],
};
const RUN_COLOR = ["#0072b2", "#d55e00"];
const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c959f"];
const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121],
  [109, 205, 89], [180, 222, 44], [253, 231, 37],
];

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function viridis(share) {
  const at = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const mix = VIRIDIS[low].map((one, i) => Math.round(one + (VIRIDIS[low + 1][i] - one) * (at - low)));
  return `rgb(${mix.join(",")})`;
}

// 1234567 -> 1.23M; 0.000321 -> 3.21e-4
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not finite";
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return trim((value / (name === "k" ? 1e3 : unit)).toPrecision(3)) + name;
  }
  if (size < 1e-3) return value.toExponential(2).replace("e-", "e-");
  return trim(value.toPrecision(4));
}
const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);
const grouped = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ",");

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${trim((value * 1e6).toPrecision(3))} µs`;
  if (value < 1) return `${trim((value * 1e3).toPrecision(3))} ms`;
  return `${trim(value.toPrecision(3))} s`;
}

function bytes(value) {
  for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= unit) return `${trim((value / unit).toPrecision(3))} ${name}`;
  }
  return `${value} B`;
}

function ticks(low, high, count) {
  const span = high - low || 1;
  const raw = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= raw) || 10 * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) {
    found.push(Math.abs(at) < step * 1e-6 ? 0 : Number(at.toPrecision(10)));
  }
  return found;
}
const wholeTicks = (low, high, count) => ticks(low, high, count).filter((one) => Number.isInteger(one));

const tip = document.getElementById("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(innerHeight - box.height - 4, event.clientY + 14))}px`;
}
const hideTip = () => { tip.hidden = true; };

function legend(entries, isRule = false) {
  const look = (color, dash) => (isRule ? `border-top:3px ${dash ? "dashed" : "solid"} ${color}` : `background:${color}`);
  return el("div", { class: "legend" }, ...entries.map(([color, name, dash]) =>
    el("span", {}, el("i", { class: isRule ? "rule" : "", style: look(color, dash) }), name)));
}

function card(title, note, isWide = false) {
  const made = el("div", { class: isWide ? "card wide" : "card" }, el("h3", {}, title));
  if (note) made.append(el("p", { class: "note" }, note));
  return made;
}
const missing = (text) => el("p", { class: "missing" }, text);

// Bytes of base64 -> numbers in units of an even load.
function unpack(text) {
  const raw = atob(text);
  const found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
}
const PER_EVEN = 50;
const NOT_MORE = 255;
