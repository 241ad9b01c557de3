// The page: which pictures, in which order.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const IS_PAIR = RUNS.length > 1;
const main = document.getElementById("main");

function part(id, title, note) {
  const made = el("section", { id }, el("h2", {}, title), note ? el("p", { class: "note" }, note) : null);
  const grid = el("div", { class: "grid" });
  made.append(grid);
  main.append(made);
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  return grid;
}

const fact = (value, name) => (value === null || value === undefined ? null : el("div", { class: "fact" }, el("b", {}, value), el("span", {}, name)));
const lastOf = (run, key) => { const all = run.curves[key]; return all && all.length ? all[all.length - 1][1] : null; };
const shown = (value) => (value === null ? null : short(value));

function head(run, index) {
  const box = el("div", { class: "runhead" });
  if (IS_PAIR) box.append(el("div", { class: "runname" }, el("span", { style: `color:${RUN_COLOR[index]}` }, `■ ${run.name}`)));
  box.append(el("p", { class: "path" }, run.path));
  const tflop = run.median_tflop_per_s_per_rank;
  box.append(el("div", { class: "facts" },
    fact(grouped(run.num_steps), "steps"),
    fact(run.consumed_tokens === null ? null : short(run.consumed_tokens), "tokens seen"),
    fact(shown(lastOf(run, "lm_loss")), "last training loss, nats a token"),
    fact(shown(lastOf(run, "validation/val_loss")), "last validation loss, nats a token"),
    fact(shown(lastOf(run, "validation/bits_per_byte")), "validation bits a byte"),
    fact(run.median_tokens_per_s === null ? null : grouped(run.median_tokens_per_s), "tokens/s (median)"),
    fact(tflop === null ? null : short(tflop), "model TFLOP/s a rank (median)"),
    fact(run.world_size, "ranks")));
  return box;
}

function resumes() {
  return RUNS.flatMap((run, index) => run.events.filter((one) => one.what === "resume" && one.source === "run").map((one) => [one.step, IS_PAIR ? RUN_COLOR[index] : "#6e7781"]));
}

// One curve of each run, in one picture; more: further keys drawn dashed with dots.
function curveCard(title, note, keys, options) {
  const series = RUNS.flatMap((run, index) => keys.map(([key, name, isDotted], at) => ({
    name: IS_PAIR ? `${run.name}, ${name}` : name,
    color: IS_PAIR ? RUN_COLOR[index] : SERIES[at % SERIES.length],
    dash: IS_PAIR && at ? "6 3" : "",
    dots: isDotted && (run.curves[key] || []).length < 60,
    points: run.curves[key],
  }))).filter((one) => one.points);
  if (!series.length) return null;
  if (options.baseline) series.push(...baselines(series, options.baseline));
  const box = card(title, note, options.wide);
  if (series.length > 1) box.append(legend(series.map((one) => [one.color, one.name, one.dash]), true));
  box.append(lines(series, { ...options, resumes: resumes() }));
  return box;
}

// The unigram baseline of each run as a level over all steps of the picture.
function baselines(series, key) {
  const steps = series.flatMap((one) => one.points.map(([step]) => step));
  const ends = [Math.min(...steps), Math.max(...steps)];
  return RUNS.flatMap((run, index) => (run.unigram && run.unigram[key] ? [{
    name: IS_PAIR ? `${run.name}, unigram baseline` : "unigram baseline",
    color: IS_PAIR ? RUN_COLOR[index] : "#6e7781",
    dash: "2 4",
    points: ends.map((step) => [step, run.unigram[key]]),
  }] : []));
}

function samplePart() {
  if (RUNS.every((run) => !run.sample)) return;
  const grid = part("sample", "Sample");
  forRuns(grid, "What the model wrote", "", { has: (run) => Boolean(run.sample), draw: (run) => el("pre", { class: "sample" }, run.sample), wide: () => true }, "No sample.txt.");
}

function domainCard() {
  const prefix = "validation/domain/";
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.curves)))].filter((key) => key.startsWith(prefix));
  if (!names.length || names.length > 16) return null;
  const keys = names.map((key) => [key, key.slice(prefix.length), true]);
  return curveCard("Validation loss of each domain", "", keys, { y: "nats a token" });
}

function curvesPart() {
  const grid = part("loss", "Loss");
  const all = [
    curveCard("Loss", "Cross entropy of the next token. Dots are evaluations.", [["lm_loss", "training"], ["validation/val_loss", "validation", true], ["test/val_loss", "test", true]], { y: "nats a token", wide: true, height: 330, baseline: "nats_per_token" }),
    curveCard("Learning rate", "", [["learning_rate", "learning rate"]], { y: "learning rate" }),
    curveCard("Gradient norm", "Before clipping.", [["grad_norm", "gradient norm"]], { y: "L2 norm", log: true }),
    curveCard("Validation, bits a byte", "Comparable between tokenizers.", [["validation/bits_per_byte", "bits a byte", true]], { y: "bits a byte", baseline: "bits_per_byte" }),
    domainCard(),
    curveCard("Tokens a second", "", [["tokens_per_s", "tokens a second"]], { y: "tokens/s" }),
  ];
  grid.append(...all.filter(Boolean));
}

// One box for each run: side by side when two are compared.
function forRuns(grid, title, note, makePart, whenMissing, isWide) {
  if (RUNS.every((run) => makePart.has(run) === false) && !whenMissing) return;
  for (const run of RUNS) {
    const box = card(IS_PAIR ? `${title}: ${run.name}` : title, note, isWide || (!IS_PAIR && makePart.wide && makePart.wide(run)));
    box.append(makePart.has(run) ? makePart.draw(run) : missing(whenMissing || "This run has not recorded it."));
    grid.append(box);
  }
}

const EVEN_BAR = "load of an expert; 1 is an even load";
function loadMap(run) {
  const { layers, experts, steps } = run.routing;
  const values = unpack(run.routing.maps);
  const size = layers.length * experts;
  let at = 0;
  const map = heatmap({
    rows: layers, columns: [...Array(experts).keys()], top: 3, crossesZero: true,
    width: IS_PAIR || run.routing.experts <= 12 ? 440 : 1040, maxCell: 46, xName: "expert", yName: "layer",
    describe: (row, column, value) => `layer ${layers[row]}, expert ${column}\n${load(value)}\nstep ${grouped(steps[at])}`,
  });
  const control = slider(steps, (index) => { at = index; map.draw((row, column) => values[index * size + row * experts + column] / PER_EVEN); }, "expert load");
  return el("div", {}, control, map.canvas, colorBar(3, `${EVEN_BAR}, × marks an expert without a token`, true));
}

function domainMaps(run) {
  const { layers, experts } = run.routing;
  const { names, steps } = run.routing.domains;
  const values = unpack(run.routing.domains.maps);
  const size = layers.length * experts;
  const isNarrow = IS_PAIR || experts * names.length <= 16;
  const room = isNarrow ? 420 / Math.min(names.length, experts > 16 ? 1 : 2) - 40 : experts > 150 ? 1040 : Math.max(230, Math.min(1040, 1100 / Math.min(names.length, 3) - 90));
  let at = 0;
  const maps = names.map((name, domain) => heatmap({
    rows: layers, columns: [...Array(experts).keys()], top: 3, crossesZero: true, width: room, height: 300, xName: "expert", yName: "layer",
    describe: (row, column, value) => `${name}: layer ${layers[row]}, expert ${column}\n${load(value)} of this domain\nstep ${grouped(steps[at])}`,
  }));
  const draw = (index) => {
    at = index;
    maps.forEach((map, domain) => map.draw((row, column) => values[((index * names.length + domain) * size) + row * experts + column] / PER_EVEN));
  };
  const figures = maps.map((map, domain) => el("figure", {}, el("figcaption", {}, names[domain]), map.canvas));
  return el("div", {}, slider(steps, draw, "domain maps"), el("div", { class: "maps" }, ...figures), colorBar(3, "load of an expert by the tokens of this domain; 1 is an even load", true));
}

function nmiCurves(run) {
  const { nmi, nmi_steps } = run.routing.domains;
  const series = run.routing.layers.map((layer, row) => ({ name: `layer ${layer}`, color: viridis(0.85 * row / Math.max(1, run.routing.layers.length - 1)), points: nmi.map((one, at) => [nmi_steps[at], one[row]]) }));
  return el("div", {}, series.length <= 12 ? legend(series.map((one) => [one.color, one.name]), true) : el("p", { class: "note" }, "dark: first layer, bright: last layer"), lines(series, { y: "normalised mutual information", resumes: resumes() }));
}

function pairMap(run) {
  const { layers, maps, step } = run.routing.coselection;
  const experts = run.routing.experts;
  const values = unpack(maps);
  const map = heatmap({
    rows: [...Array(experts).keys()], columns: [...Array(experts).keys()], top: 3, width: 380, height: 380, maxCell: 30, xName: "expert", yName: "expert",
    describe: (row, column, value) => (row === column ? `expert ${row}` : `experts ${row} and ${column}: chosen together\n${value.toFixed(2)} × the mean pair`),
  });
  const draw = () => map.draw((row, column) => (row === column ? null : values[Number(select.value) * experts * experts + row * experts + column] / PER_EVEN));
  const select = el("select", { "aria-label": "layer", onchange: draw }, ...layers.map((layer, at) => el("option", { value: at }, `layer ${layer}`)));
  draw();
  return el("div", {}, el("div", { class: "control" }, select, el("span", { class: "note" }, `step ${grouped(step)}`)), map.canvas, colorBar(3, "how often a token chose both; 1 is the mean pair", true));
}

function violationMap(run) {
  const { steps, rows } = run.violations;
  const isMoe = rows.map((row) => row.some((value) => value > 0));
  const kept = rows.map((row, at) => [at, row]).filter(([at]) => isMoe[at]);
  if (!kept.length) return missing("no layer with experts");
  const top = Math.max(0.5, ...kept.flatMap(([, row]) => row));
  const map = heatmap({
    rows: kept.map(([at]) => at + 1), columns: steps.map(grouped), top, width: IS_PAIR ? 440 : 1040, height: 260, maxCell: 24, xName: "step", yName: "layer",
    describe: (row, column, value) => `layer ${kept[row][0] + 1}, step ${grouped(steps[column])}\nMaxVio ${value.toFixed(3)}`,
  });
  map.draw((row, column) => kept[row][1][column]);
  return el("div", {}, map.canvas, colorBar(top, "MaxVio: load of the busiest expert / mean load - 1; 0 is an even load", false));
}

function expertsPart() {
  if (RUNS.every((run) => !run.routing && !run.violations)) return;
  const grid = part("experts", "Experts");
  const domains = (run) => Boolean(run.routing && run.routing.domains);
  forRuns(grid, "Load of each expert", "Move the slider through the training.", { has: (run) => Boolean(run.routing), draw: loadMap, wide: (run) => Boolean(run.routing && run.routing.experts > 12) }, "No routing.jsonl: train with --log-routing-interval.");
  forRuns(grid, "Which domain uses which expert", "", { has: domains, draw: domainMaps, wide: (run) => domains(run) && run.routing.experts * run.routing.domains.names.length > 16 }, "", false);
  forRuns(grid, "How much an expert says about the domain", "0: experts know no domain; 1: the expert tells the domain.", { has: (run) => domains(run) && run.routing.domains.nmi.length > 0, draw: nmiCurves }, "");
  forRuns(grid, "Experts chosen together", "", { has: (run) => Boolean(run.routing && run.routing.coselection), draw: pairMap }, "");
  forRuns(grid, "Imbalance of each layer", "", { has: (run) => Boolean(run.violations), draw: violationMap, wide: () => true }, "");
  const balance = [
    curveCard("Balance loss", "Divided by its coefficient; 1 is an even load.", [["load_balancing_loss", "balance loss"]], { y: "loss / coefficient" }),
    curveCard("Mean MaxVio and dead experts", "", [["max_violation", "MaxVio, mean over layers"], ["num_dead_experts", "experts without a token"]], { y: "MaxVio; experts" }),
  ];
  grid.append(...balance.filter(Boolean));
}

function costPart() {
  const grid = part("time", "Time and memory");
  const kinds = legend(Object.values(KIND));
  forRuns(grid, "Where the time of a step goes", "Parts do not overlap: forward and backward are without the collectives and waits inside them.", { has: (run) => Boolean(run.time), draw: (run) => el("div", {}, kinds.cloneNode(true), timeOverSteps(run.time)), wide: () => true }, "These records have no time split.");
  forRuns(grid, "Time of each rank", "Mean over the last --log-interval.", { has: (run) => Boolean(run.ranks), draw: (run) => timeOfRanks(run.ranks) }, "");
  forRuns(grid, "Memory of each rank", "", { has: (run) => Boolean(run.ranks), draw: (run) => el("div", {}, legend([...MEMORY.map(([name, color]) => [color, name]), ["#c3cad1", MEMORY_REST]]), memoryOfRanks(run.ranks)) }, "");
}

function tracePart() {
  const grid = part("pipeline", "Pipeline");
  const kinds = legend([[LIGHT.forward[0], "forward (chunk 0; lighter: 1)"], [LIGHT.backward[0], "backward (chunk 0; lighter: 1)"], ...["pipeline_wait", "all_to_all", "collectives", "optimizer", "data", "save"].map((kind) => KIND[kind])]);
  forRuns(grid, "One step, rank by rank", "F3 is the forward pass of micro-batch 3, B3 its backward pass. White is time in none of these.", {
    has: (run) => Boolean(run.trace && run.trace.spans.length), wide: () => true,
    draw: (run) => el("div", {}, kinds.cloneNode(true), el("p", { class: "note" }, `Step ${grouped(run.trace.step)}. ${idleShares(run.trace)}`), timeline(run.trace), run.trace.left_out ? el("p", { class: "note" }, `${grouped(run.trace.left_out)} shortest spans are not drawn.`) : null),
  }, "No trace: train with --trace-schedule STEP.", true);
}

function tablesPart() {
  const grid = part("flags", "Flags and events");
  if (IS_PAIR) {
    const box = card("Flags that differ", "", true);
    box.append(differenceTable(DATA.differing, RUNS.map((run) => run.name)));
    grid.append(box);
  }
  forRuns(grid, "Configuration", "Where each value comes from.", { has: (run) => run.flags.length > 0, draw: (run) => flagTable(run.flags), wide: () => true }, "No config.yaml.");
  forRuns(grid, "Events", "Starts, checkpoints, warnings, health, exits; the newest first.", { has: (run) => run.events.length > 0, draw: (run) => eventTable(run.events), wide: () => true }, "Nothing was recorded.");
}

const title = document.getElementById("head");
title.append(el("h1", {}, IS_PAIR ? `${RUNS[0].name} and ${RUNS[1].name}` : RUNS[0].name), ...RUNS.map(head), el("p", { class: "note" }, `Page made ${DATA.made}.`));
curvesPart();
samplePart();
expertsPart();
costPart();
tracePart();
tablesPart();
