// Flags with their origin, flags that differ, events.

const ORIGINS = ["flag", "file", "environment"];
const isAsked = (origin) => ORIGINS.some((one) => origin.startsWith(one));

function table(heads, rows) {
  const body = el("tbody", {}, ...rows);
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))), body));
}
const cell = (text, kind = "") => el("td", { class: kind }, text === null || text === undefined ? "" : String(text));

function flagTable(flags) {
  const rows = flags.map((one) => {
    const row = el("tr", { class: isAsked(one.origin) ? "asked" : "" }, cell(one.section, "quiet"), cell(one.flag), cell(one.value, "value"), cell(one.origin, "origin"));
    row.text = `${one.section} ${one.flag} ${one.value} ${one.origin}`.toLowerCase();
    row.asked = isAsked(one.origin);
    return row;
  });
  const search = el("input", { class: "search", type: "search", placeholder: "find a flag", "aria-label": "find a flag" });
  const all = el("input", { type: "checkbox", id: `all${Math.random().toString(36).slice(2)}` });
  const show = () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) row.hidden = !(wanted ? row.text.includes(wanted) : all.checked || row.asked);
  };
  search.addEventListener("input", show);
  all.addEventListener("change", show);
  show();
  const asked = rows.filter((row) => row.asked).length;
  return el("div", {}, el("div", { class: "control" }, search, el("label", {}, all, ` also the ${rows.length - asked} defaults and derived values`)), table(["section", "flag", "value", "origin"], rows));
}

function differenceTable(differing, names) {
  if (!differing.length) return missing("Both runs have the same flags (places apart).");
  const rows = differing.map((one) => el("tr", {}, cell(one.section, "quiet"), cell(one.flag), cell(one.a, "value"), cell(one.a_origin, "origin"), cell(one.b, "value"), cell(one.b_origin, "origin")));
  return table(["section", "flag", names[0], "origin", names[1], "origin"], rows);
}

function clock(unix) {
  if (!unix) return "";
  const at = new Date(unix * 1000);
  const two = (value) => String(value).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

function eventTable(events) {
  const isBad = (what) => /^(exit|error|critical|fail|failed|stop|quarantined)/.test(what);
  const rows = [...events].reverse().map((one) => el("tr", { class: isBad(one.what) ? "bad" : "" }, cell(clock(one.time), "quiet"), cell(one.step === null ? "" : grouped(one.step), "num"), cell(one.source, "quiet"), cell(one.what), cell(one.text, "details")));
  return table(["time", "step", "source", "what", "details"], rows);
}
