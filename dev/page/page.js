// page.js: the race: its settings, a worker for each model, what they answer, and the page around them.
"use strict";

const D = JSON.parse(document.getElementById("page-data").textContent);
const el = id => document.getElementById(id);
const element = (tag, attributes = {}, ...inside) => {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  e.append(...inside);
  return e;
};
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;

// ---------------------------------------------------------------------------------------------------------
// Settings: what the controls say, and the address with them

const RATES = [-4, -3, -2].flatMap(e => [1, 1.5, 2, 3, 5, 7].map(m => m * 10 ** e)).concat(0.1).map(r => +r.toPrecision(2));
const ALPHAS = [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 0];  // 0: the placement's own
const DEFAULTS = { norms: ["keel", "post"], L: 64, C: 32, T: 64, B: 4, lr: 5e-3, alpha: 0, warmup: 10, steps: 1000, seed: 1337, every: 100 };
let settings = { ...DEFAULTS };
let text = null;  // {name, bytes} of the reader's own; null: the trainer's sources

// Settings from the address, such as #norms=post,keel&L=64; what is not possible is left at its default, and told.
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1)), wrong = [], s = { ...DEFAULTS };
  for (const [name, value] of given) {
    const input = el(name), number = Number(value);
    if (name === "norms") {
      const norms = D.norms.filter(norm => value.split(",").includes(norm));
      if (norms.length && norms.length === value.split(",").length) s.norms = norms;
      else wrong.push(`norms=${value}`);
    } else if (name === "stop") continue;
    else if (!Object.hasOwn(DEFAULTS, name) || value === "" || !Number.isFinite(number)) wrong.push(`${name}=${value}`);
    else if (name === "lr" ? RATES.includes(number) : name === "alpha" ? ALPHAS.includes(number) : input.tagName === "SELECT" ? [...input.options].some(o => o.value === value)
      : number >= input.min && number <= input.max && Number.isInteger(number / (input.step || 1))) s[name] = number;
    else wrong.push(`${name}=${value}`);
  }
  s.warmup = Math.min(s.warmup, s.steps);
  if (wrong.length) warn(`The address: expected settings that the controls have, found ${wrong.join(", ")}; left at the default.`);
  const stop = Number(given.get("stop"));
  return { s, stop: Number.isInteger(stop) && stop >= 1 && stop <= STOPS.length ? stop - 1 : null };
}

function writeAddress() {
  const changed = Object.keys(DEFAULTS).filter(name => String(settings[name]) !== String(DEFAULTS[name]));
  const words = changed.map(name => `${name}=${settings[name]}`).concat(tour.at !== null ? [`stop=${tour.at + 1}`] : []);
  history.replaceState(null, "", "#" + words.join("&"));
}

function showSettings() {
  for (const norm of D.norms) el("norm-" + norm).setAttribute("aria-pressed", settings.norms.includes(norm));
  for (const name of ["L", "C", "T", "B", "warmup", "steps", "seed", "every"]) el(name).value = settings[name];
  el("lr").value = RATES.indexOf(settings.lr);
  el("alpha").value = ALPHAS.indexOf(settings.alpha);
  el("L-is").textContent = settings.L;
  el("C-is").textContent = settings.C;
  el("lr-is").textContent = settings.lr;
  const weighed = settings.norms.filter(norm => D.alpha.includes(norm));
  el("alpha").disabled = !weighed.length;
  const own = weighed.includes("deepnorm") ? "each one’s own" : `own: L = ${settings.L}`, whose = weighed.map(norm => D.labels[norm]).join(", ");
  el("alpha-is").textContent = weighed.length ? `${settings.alpha || own} (${whose})` : "none of these has one";
  for (const [id, value] of [["lr", settings.lr], ["alpha", el("alpha-is").textContent]]) el(id).setAttribute("aria-valuetext", value);
  el("text-is").textContent = text ? `${text.name}, ${text.bytes.length} bytes` : "the trainer’s own sources";
  el("own").hidden = !text;
  el("commands").textContent = [...settings.norms.map(norm => commandLine(norm).map(shellWord).join(" ")),
    `-e SAVED.bin -b ${settings.B} -x 0${text ? " -i " + shellWord(text.name) : ""}  # its validation loss; with more steps it trains on`,
  ].map(flags => "./train_keel_cpu " + flags).join("\n");
}

const shellWord = w => /^[\w.,/+-]+$/.test(w) ? w : `'${w.replaceAll("'", "'\\''")}'`;

function commandLine(norm, file = text?.name) {
  const s = settings;
  const words = ["--norm", norm, "-L", s.L, "-C", s.C, "-H", Math.max(1, s.C / 16), "-t", s.T, "-b", s.B,
    "-l", s.lr, "-u", s.warmup, "-x", s.steps, "--seed", s.seed];
  if (s.alpha && D.alpha.includes(norm)) words.push("-a", s.alpha);
  if (file) words.push("-i", file);
  return words.map(String);
}

function change(name, value) {
  settings[name] = value;
  settings.warmup = Math.min(settings.warmup, settings.steps);
  showSettings();
  clearTimeout(change.timer);
  change.timer = setTimeout(() => startRace(running ? Infinity : 1), 250);
}

// ---------------------------------------------------------------------------------------------------------
// The race: a worker a model. The page lets none run more than LEAD steps ahead of the slowest.

const LEAD = 2;
const GHOSTS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];  // steps whose curve over depth stays
let racers = [];
let running = false, limit = 0;  // whether steps are asked for, and up to which

const moduleBytes = Uint8Array.from(atob(D.wasm), c => c.charCodeAt(0));
const compiled = WebAssembly.compile(moduleBytes);
const workerAddress = URL.createObjectURL(new Blob([el("worker").textContent], { type: "text/javascript" }));

const live = () => racers.filter(r => r.state === "ready");
const steps = () => Math.max(0, ...racers.map(r => r.step));

function startRace(until, keepAlert = false) {
  clearTimeout(change.timer);
  for (const r of racers) end(r);
  if (!keepAlert) warn("");
  const files = text ? { [text.file]: text.bytes } : D.files;
  racers = settings.norms.map(norm => ({
    norm, worker: new Worker(workerAddress), state: "starting", step: 0, asked: 0, stopping: 0,
    loss: [], depth: [], times: [], memory: 0, run: null, sample: "" }));
  for (const r of racers) {
    r.worker.onmessage = event => r.state !== "ended" && answers[event.data.kind](r, event.data);
    r.worker.onerror = event => fail(r, event.message || "its worker ended");
    const words = commandLine(r.norm, text?.file), every = settings.every;
    compiled.then(module => r.worker.postMessage({ kind: "create", module, files, words, every }));
  }
  limits.flow = limits.product = attention.asked = null;
  running = until > 0, limit = until;
  writeAddress();
  showRacers();
  redraw();
}

function goOn() {
  const lives = live(), slowest = Math.min(...lives.map(r => r.step));
  for (const r of lives) {
    const until = Math.min(limit, slowest + LEAD, settings.steps);
    if (until > r.asked) r.worker.postMessage({ kind: "run", until: r.asked = until });
  }
  if (racers.every(r => r.state !== "starting") && lives.every(r => r.step >= Math.min(limit, settings.steps))) running = false;
  showState();
}

function end(r) {
  clearTimeout(r.stopping);
  r.worker.terminate();
  r.state = "ended";
}
function fail(r, words) {
  end(r);
  r.note = words;
  warn(`${D.labels[r.norm]}: ${words}`);
  goOn();
}

const answers = {
  created(r, { run }) {
    r.state = "ready";
    r.run = run;
    if (text) text.before = null, text.taken = true;
    r.columns = run.columns.split(",").slice(3);  // behind step, sublayer and kind
    goOn();
    redraw();
  },
  refused(r, { asked, text: words }) {
    if (text) words = words.replaceAll(text.file, text.name);
    if (asked === "attention") return;
    if (asked === "created" && text && !text.taken) {  // the file before it stays
      const name = text.name;
      text = text.before;
      showSettings();
      warn(`${name} is refused: ${words}`);
      startRace(1, true);
    } else if (asked === "sample" || asked === "saved") warn(`${D.labels[r.norm]}: ${words}`);
    else fail(r, words);
  },
  step(r, { step, values, memory }) {
    r.step = step, r.memory = memory;
    r.loss.push(values[0]);
    const at = name => 4 + r.columns.indexOf(name), column = name => Float32Array.from({ length: r.run.L }, (_, l) => values[at(name) + l * r.columns.length]);
    const dx = column("dx_norm"), heat = dx.map(v => 1 + Math.log10(v / dx.at(-1)) / 12);
    r.depth.push(values.length > 4 ? { dx, heat, product: column("shortcut_gain_to_top"), same: column("same_x") } : null);
    r.times.push(performance.now());
    if (step === Math.min(limit, settings.steps) && !(settings.every && step % settings.every === 0)) r.worker.postMessage({ kind: "sample" });
    goOn();
    redraw();
  },
  stopped(r, { step }) {
    clearTimeout(r.stopping);
    r.stopping = 0;
    r.asked = step;
    if (limit) limit = Math.max(limit, step);  // of a pause: the step at work went past it
    goOn();
  },
  sample(r, { text: words, step }) {
    r.sample = words, r.sampledAt = step;
    redraw();
  },
  attention(r, { values }) {
    r.attention = values;
    attention.waiting = false;
    redraw();
  },
  saved(r, { step, bytes, loss }) {
    const name = `${r.norm}_L${r.run.L}_C${r.run.C}_step${step}.bin`;
    const a = element("a", { download: name, href: URL.createObjectURL(new Blob([bytes])) });
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 60000);
    say(`Saved ${name}; its validation loss is ${loss.toPrecision(9)}.`);
  },
};

function run(until) {
  if (!live().length) return startRace(until);
  if (live().every(r => r.step >= settings.steps)) return say(`The race has its ${settings.steps} steps; give it more, or reset it.`);
  running = true, limit = until;
  goOn();
}
// Those behind come up to the one ahead.
function pause() {
  running = false, limit = steps();
  for (const r of live()) r.worker.postMessage({ kind: "stop" });
  showState();
}
// After the step at work; where that takes over 200 ms its worker ends.
function stop() {
  running = false, limit = 0;
  for (const r of racers) {
    if (r.state === "ended" || r.stopping || (r.state === "ready" && r.asked === r.step)) continue;
    r.worker.postMessage({ kind: "stop" });
    r.stopping = setTimeout(() => { fail(r, "was stopped in the middle of a step, and is gone; reset starts again"); }, 200);
  }
  showState();
}
const save = r => r.worker.postMessage({ kind: "save" });

// ---------------------------------------------------------------------------------------------------------
// What is measured

const last = r => r.depth.findLast(Boolean);  // the probe's figures of the last step that was finite

// Of the last step: gradient at sub-layer 2 over the last one's, and so on. NaN where there is nothing yet.
function facts(r) {
  const d = last(r), low = Math.min(2, settings.L - 1), times = r.times.slice(-40);
  return {
    ratio: d ? d.dx[low] / d.dx.at(-1) : NaN,
    product: d ? d.product[low] : NaN,
    same: d ? mean(Array.from(d.same)) : NaN,
    born: r.depth[0] ? mean(Array.from(r.depth[0].same)) : NaN,
    loss: r.loss.length ? mean(r.loss.slice(-10)) : NaN,
    rate: times.length > 2 ? (times.length - 1) * 1000 / (times.at(-1) - times[0]) : NaN,
  };
}
const shortcut = alpha => alpha / Math.sqrt(alpha * alpha + 1);
function fact(name) {
  const [of, what] = name.split(".");
  if (name === "estimate") return 2 ** (-(settings.L - 2) / 2);
  if (name === "limit") return shortcut(settings.L) ** (settings.L - 2);
  if (name === "entropy") return racers.find(r => r.run)?.run.entropy ?? NaN;
  const r = racers.find(r => r.norm === of);
  return r ? facts(r)[what] : NaN;
}

// ---------------------------------------------------------------------------------------------------------
// Drawing: at most 33 times a second, in one go

const limits = { flow: null, product: null };  // exponents that an axis keeps during a race
const pointers = {};                           // chart -> x under the pointer or the arrow keys
const drawings = { count: 0, last: 0, asked: false };

function redraw() {
  if (drawings.asked) return;
  drawings.asked = true;
  const wait = Math.max(0, drawings.last + 30 - performance.now());
  setTimeout(() => requestAnimationFrame(draw), wait);
}

const thick = norm => norm === "keel" || norm === "post" ? 2.6 : 2;
const line = (r, y, more = {}) => ({ x0: 0, y, colour: D.colours[r.norm], dash: D.dashes[r.norm], width: thick(r.norm), label: D.labels[r.norm], ...more });
const log10 = values => Array.from(values, v => v > 0 ? Math.log10(v) : NaN);

// Exponents around the lines that only widen while a race goes on.
function widen(name, lines) {
  const found = lines.flatMap(l => l.y).filter(Number.isFinite), old = limits[name] ?? [Infinity, -Infinity];
  limits[name] = found.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], old);
  const [a, b] = limits[name];
  return a <= b ? [Math.floor(a - 0.2), Math.ceil(b + 0.2)] : [-1, 1];
}
// A loss that is no number, of a step that was skipped, counts as the one before it.
function runningMean(losses) {
  const n = Math.max(1, Math.round(losses.length / 25)), values = [];
  for (const v of losses) values.push(Number.isFinite(v) ? v : values.at(-1) ?? NaN);
  let sum = 0;
  return values.map((v, i) => { sum += v - (i >= n ? values[i - n] : 0); return sum / Math.min(i + 1, n); });
}

const charts = {
  loss() {
    const n = Math.max(2, steps()), floor = fact("entropy") || 3, means = racers.map(r => runningMean(r.loss));
    const later = means.flatMap(m => m.slice(Math.floor(m.length / 20))).filter(Number.isFinite);  // the first steps' losses may leave at the top
    const lines = racers.flatMap((r, i) => [line(r, r.loss, { x0: 1, opacity: 0.25, width: 1, label: "", dash: [] }), line(r, means[i], { x0: 1 })]);
    lines.unshift({ x0: 1, y: Array(n).fill(floor), colour: css("--soft"), dash: [3, 4], width: 1, label: "bytes" });
    return { x: [1, n], y: [Math.min(...later, floor) - 0.2, Math.min(Math.max(...later, floor + 0.5), floor + 4) + 0.2], lines, xTitle: "step" };
  },
  flow() {
    const lines = [];
    for (const r of racers) {
      const past = GHOSTS.filter(s => s < r.step && r.depth[s - 1]);
      past.forEach((s, i) => lines.push(line(r, log10(r.depth[s - 1].dx), { opacity: 0.12 + 0.3 * (i + 1) / past.length, width: 1, label: "", dash: [] })));
      if (last(r)) lines.push(line(r, log10(last(r).dx)));
    }
    return { log: true, x: [0, settings.L - 1], y: widen("flow", lines), lines, xTitle: "sub-layer l" };
  },
  product() {
    const lines = racers.filter(last).map(r => line(r, log10(last(r).product)));
    const y = widen("product", lines), over = f => Array.from({ length: settings.L }, (_, l) => Math.log10(f(settings.L - l)));
    lines.unshift({ x0: 0, y: over(n => 2 ** (-n / 2)), colour: css("--soft"), dash: [3, 4], width: 1.5, label: "paper’s" });
    if (settings.norms.includes("keel"))
      lines.unshift({ x0: 0, y: over(n => shortcut(settings.alpha || settings.L) ** n), colour: css("--soft"), dash: [1, 3], width: 1.5, label: "limit" });
    return { log: true, x: [0, settings.L - 1], y: [Math.min(y[0], -3), y[1]], lines, xTitle: "sub-layer l" };
  },
  same() {
    const lines = racers.filter(last).map(r => line(r, Array.from(last(r).same)));
    return { x: [0, settings.L - 1], y: [0, 1.02], lines, xTitle: "sub-layer l" };
  },
};

function draw() {
  drawings.asked = false, drawings.last = performance.now(), drawings.count++;
  for (const name in charts) drawLines(el(name), { ...charts[name](), at: pointers[name] ?? null });
  for (const r of racers) {
    const canvas = el("heat-" + r.norm), columns = Math.max(steps(), 60), L = r.run?.L ?? 1;
    if (canvas) drawHeat(canvas, columns, L, (c, l) => r.depth[c]?.heat[l]);
  }
  showRacers();
  showFacts();
  showReading();
}

const attention = { waiting: false, last: 0 };
function showReading() {
  const r = racers.find(r => r.norm === el("who").value);
  for (const r of racers) {
    const pre = el("sample-" + r.norm);
    if (pre && r.sample && pre.textContent !== r.sample) pre.textContent = r.sample, pre.previousSibling.lastChild.textContent = ` at step ${r.sampledAt}`;
  }
  if (!r?.run) return;
  const T = r.run.T, p = (query, key) => key > query ? NaN : Math.sqrt(r.attention[query * T + key]);
  if (r.attention && attention.drawn !== r.attention) drawHeat(el("attention"), T, T, (key, row) => p(T - 1 - row, key));
  attention.drawn = r.attention;
  const asks = [r.norm, r.step, el("sublayer").value, el("head").value].join();
  if (r.state !== "ready" || r.step === 0 || asks === attention.asked || attention.waiting || performance.now() - attention.last < 300) {
    if (asks !== attention.asked && r.step > 0 && !attention.later) attention.later = setTimeout(() => { attention.later = 0; redraw(); }, 320);
    return;
  }
  attention.asked = asks, attention.waiting = true, attention.last = performance.now();
  setTimeout(() => { attention.waiting = false; }, 2000);  // a worker that has ended does not answer
  r.worker.postMessage({ kind: "attention", sublayer: +el("sublayer").value, head: +el("head").value });
}

// ---------------------------------------------------------------------------------------------------------
// Words and tables

const warn = words => { el("alert").textContent = words; el("alert").hidden = !words; };
const say = words => { el("state").textContent = words; };

function showState() {
  const going = running && live().some(r => r.step < Math.min(limit, settings.steps)), megabytes = racers.reduce((sum, r) => sum + r.memory, 0) / 2 ** 20;
  el("go").textContent = going ? "❚❚ pause" : "▶ run";
  el("go").setAttribute("aria-pressed", going);
  el("stop").disabled = !going;
  const words = racers.some(r => r.state === "starting") ? "starting" : going ? "running" : !live().length ? "ended" : steps() >= settings.steps ? `finished, step ${steps()}` : `waiting at step ${steps()}`;
  if (!going || el("state").dataset.words !== words) say(words + (megabytes ? ` · ${megabytes.toFixed(0)} MB of memory` : ""));
  el("state").dataset.words = words;
}

const stroke = norm => `<svg class="stroke" viewBox="0 0 34 8" aria-hidden="true"><path d="M0 4H34" stroke="${D.colours[norm]}" stroke-width="3" stroke-dasharray="${D.dashes[norm].join(" ") || "none"}"/></svg>`;

function showRacers() {
  const body = el("racers").tBodies[0], names = [...racers.map(r => r.norm), settings.L, settings.C].join();
  if (body.dataset.names !== names) {
    body.dataset.names = names;
    body.replaceChildren(...racers.map(({ norm }) => {
      const row = element("tr", { id: "row-" + norm });
      row.innerHTML = `<th scope="row">${stroke(norm)}${D.labels[norm]}</th>` + "<td class=number></td>".repeat(5) + "<td></td>";
      const button = element("button", { type: "button", class: "text", "aria-label": `save the model of ${D.labels[norm]}` }, "save");
      button.onclick = () => save(racers.find(r => r.norm === norm));
      row.lastChild.append(button);
      return row;
    }));
    el("heats").replaceChildren(...racers.map(({ norm }) => element("figure", {}, element("figcaption", {}, D.labels[norm]), element("canvas", { id: "heat-" + norm, role: "img" }))));
    el("samples").replaceChildren(element("p", { class: "caption" }, "100 bytes that each model writes after a line’s end."), ...racers.flatMap(({ norm }) => [element("p", {}, D.labels[norm], element("span")), element("pre", { id: "sample-" + norm })]));
    el("who").replaceChildren(...racers.map(({ norm }) => element("option", { value: norm }, D.labels[norm])));
    if (settings.norms.includes("post")) el("who").value = "post";
    el("sublayer").max = settings.L - 2;
    el("sublayer").value = Math.min(settings.L - 2, 2 * Math.round(settings.L / 4));
    el("head").replaceChildren(...Array.from({ length: Math.max(1, settings.C / 16) }, (_, h) => element("option", { value: h }, h)));
    el("sublayer-is").textContent = el("sublayer").value;
  }
  for (const r of racers) {
    const f = facts(r), row = el("row-" + r.norm);
    [r.step, numberHtml(f.loss), numberHtml(f.ratio), numberHtml(f.same), r.note ? "stopped" : numberText(f.rate)].forEach((value, i) => put(row.cells[i + 1], String(value)));
    row.querySelector("button").disabled = r.state !== "ready" || r.step === 0;
  }
}

// Writes what has changed alone: the browser lays out again what is written.
function put(e, html) {
  if (e.written !== html) e.innerHTML = e.written = html;
}

// What a chart shows, in words, for who cannot see it: on the canvases, every 2 s.
function describe() {
  const each = what => racers.map(r => `${D.labels[r.norm]} ${numberText(facts(r)[what])}`).join(", ");
  el("loss").setAttribute("aria-label", `Loss over ${steps()} steps; means of the last ten: ${each("loss")}`);
  el("flow").setAttribute("aria-label", `Norm of the gradient over ${settings.L} sub-layers at step ${steps()}; sub-layer 2 over the last: ${each("ratio")}`);
  el("product").setAttribute("aria-label", `Product of the shortcut’s gains from sub-layer 2 to the last: ${each("product")}`);
  el("same").setAttribute("aria-label", `Share of x that all positions have in common, mean over the sub-layers: ${each("same")}`);
  for (const r of racers) el("heat-" + r.norm)?.setAttribute("aria-label", `${D.labels[r.norm]}: gradient over depth and ${r.step} steps; sub-layer 2 has ${numberText(facts(r).ratio)} of the last one’s`);
  el("attention").setAttribute("aria-label", `Attention of ${el("who").selectedOptions[0]?.textContent}, sub-layer ${el("sublayer").value}, head ${el("head").value}`);
}
setInterval(describe, 2000);

// ---------------------------------------------------------------------------------------------------------
// The tour

const tour = { at: 0, settings: "" };  // settings: those that the stop has set

function showStop() {
  el("stops").querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", i === tour.at));
  const stop = STOPS[tour.at], named = { alpha: "α", lr: "rate" };
  el("tour-title").textContent = `${tour.at + 1}. ${stop.name[0].toUpperCase()}${stop.name.slice(1)}`;
  el("tour-text").innerHTML = stop.text
    .replace(/\{line (\w+)\}/g, (_, name) => D.links[name])
    .replace(/\{try (\w+)=([\d.]+)\}/g, (_, name, value) => `<button type="button" data-try="${name}=${value}">${named[name]} = ${value}</button>`)
    .replace(/\{([\w.]+)\}/g, '<output data-fact="$1">–</output>')
    .replace(/\{look (\w+): ([^{}]*)\}/g, '<button type="button" class="text" data-look="$1">$2</button>');
  for (const name in charts) el(name).parentElement.classList.toggle("look", name === stop.look);
  el("back").disabled = tour.at === 0;
  el("next").disabled = tour.at === STOPS.length - 1;
}
function goTo(at) {
  tour.at = at;
  settings = { ...DEFAULTS, seed: settings.seed, every: settings.every, ...STOPS[at].settings };
  settings.norms = D.norms.filter(norm => settings.norms.includes(norm));
  tour.settings = JSON.stringify(settings);
  showStop();
  showSettings();
  return startRace(STOPS[at].until);
}
// The stop's numbers are those of its own settings up to its step; of another race the table tells.
function showFacts() {
  const own = tour.settings === JSON.stringify(settings) && !text, until = STOPS[tour.at].until;
  if (own && steps() <= until)
    for (const output of document.querySelectorAll("[data-fact]")) put(output, numberHtml(fact(output.dataset.fact)));
  const first = JSON.parse(tour.settings || "{}"), changed = Object.keys(DEFAULTS).filter(name => String(settings[name]) !== String(first[name]));
  el("tour-note").hidden = own && steps() <= until;
  el("tour-note").textContent = own ? `The race has gone on to step ${steps()}; the numbers above are of step ${until}.`
    : `The race is another one now (${changed.map(name => name === "norms" ? settings.norms.map(norm => D.labels[norm]).join(", ") : name === "alpha" ? `α ${settings.alpha || "its own"}` : `${name} ${settings[name]}`).concat(text ? [text.name] : []).join(", ")}); what is said above is of this stop’s own. The table has the new numbers.`;
}

// ---------------------------------------------------------------------------------------------------------
// Controls

for (const norm of D.norms) {
  const b = element("button", { type: "button", id: "norm-" + norm, "aria-pressed": false });
  b.innerHTML = stroke(norm) + D.labels[norm];
  b.onclick = () => {
    const norms = D.norms.filter(n => settings.norms.includes(n) !== (n === norm));
    if (norms.length) change("norms", norms);
  };
  el("norms").append(b);
}
el("lr").max = RATES.length - 1;
el("alpha").max = ALPHAS.length - 1;
for (const name of ["L", "C"]) el(name).oninput = event => change(name, +event.target.value);
el("lr").oninput = event => change("lr", RATES[event.target.value]);
el("alpha").oninput = event => change("alpha", ALPHAS[event.target.value]);
for (const name of ["T", "B", "warmup", "steps", "seed", "every"])
  el(name).onchange = event => event.target.checkValidity() ? change(name, +event.target.value) : (event.target.reportValidity(), showSettings());
el("settings").onsubmit = event => event.preventDefault();

el("go").onclick = () => el("go").getAttribute("aria-pressed") === "true" ? pause() : run(Infinity);
el("one").onclick = () => run(steps() + 1);
el("stop").onclick = stop;
el("reset").onclick = () => startRace(1);
el("link").onclick = () => {
  writeAddress();
  (navigator.clipboard?.writeText(location.href) ?? Promise.reject()).then(() => say("The link with all settings is on the clipboard."), () => say("The address has all settings; copy it from there."));
};
STOPS.forEach((stop, i) => {
  const b = element("button", { type: "button", class: "plain" }, `${i + 1} ${stop.name}`);
  b.onclick = () => goTo(i);
  el("stops").append(b);
});
el("back").onclick = () => goTo(tour.at - 1);
el("next").onclick = () => goTo(tour.at + 1);
el("again").onclick = () => goTo(tour.at);
for (const id of ["who", "sublayer", "head"]) el(id).oninput = () => { el("sublayer-is").textContent = el("sublayer").value; redraw(); };

for (const name in charts) {
  const canvas = el(name), move = x => { pointers[name] = x; redraw(); };
  canvas.onpointermove = event => { const s = canvas.scale; if (s) move(Math.round(s.x[0] + (event.offsetX - s.from) / s.width * (s.x[1] - s.x[0]))); };
  canvas.onpointerleave = canvas.onblur = () => move(null);
  canvas.onkeydown = event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], [from, to] = canvas.scale.x;
    if (by) event.preventDefault(), move(Math.min(Math.max((pointers[name] ?? (by > 0 ? from - 1 : to + 1)) + by, from), to));
  };
}

async function take(file) {
  if (!file) return;
  const name = file.name.replaceAll("/", "_");
  if (file.size > 64 * 2 ** 20) return warn(`${name} is refused: expected at most 64 MiB of text, found ${(file.size / 2 ** 20).toFixed(0)}; give a part of it`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch (error) {
    return warn(`${name} is refused: expected a file, found what cannot be read (${error.message})`);
  }
  text = { name, file: `text/own${name.endsWith(".bin") ? ".bin" : ""}`, bytes, before: text?.taken ? text : text?.before };
  showSettings();
  startRace(1);
}
el("file").onchange = event => { take(event.target.files[0]); event.target.value = ""; };
addEventListener("dragover", event => { event.preventDefault(); el("drop").classList.add("over"); });
addEventListener("dragleave", () => el("drop").classList.remove("over"));
addEventListener("drop", event => { event.preventDefault(); el("drop").classList.remove("over"); take(event.dataTransfer.files[0]); });
el("own").onclick = () => { text = null; showSettings(); startRace(1); };

addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || el("source").open || event.target.closest("select, input:not([type=range])")) return;
  const press = { ".": "one", "r": "reset", "[": "back", "]": "next", " ": event.target.closest("button, summary, a, input") ? null : "go" }[event.key];
  if (press) event.preventDefault(), el(press).click();
});

// A file of the sources at a line.
function openSource(file, number) {
  el("source-name").textContent = `${file}, line ${number}`;
  const code = el("source").querySelector("code");
  code.replaceChildren(...D.files[file].split("\n").flatMap((words, i) => [element("i", {}, String(i + 1).padStart(5) + "  "), i + 1 === number ? element("mark", {}, words + "\n") : words + "\n"]));
  el("source").showModal();
  code.querySelector("mark").scrollIntoView({ block: "center" });
}
el("close").onclick = () => el("source").close();
addEventListener("click", event => {
  const { line, file, look, try: other } = event.target.closest("[data-line], [data-look], [data-try]")?.dataset ?? {};
  if (line) openSource(file, +line);
  if (look) el(look).parentElement.scrollIntoView({ block: "center" });
  if (other) {
    const [name, value] = other.split("=");
    settings = { ...JSON.parse(tour.settings), [name]: +value };
    showSettings();
    startRace(STOPS[tour.at].until);
  }
});

new ResizeObserver(redraw).observe(document.body);
el("knobs").open = innerWidth >= 600;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
function open() {
  warn("");
  const { s, stop: at } = readAddress();
  settings = s;
  tour.at = at ?? 0;
  tour.settings = JSON.stringify({ ...DEFAULTS, ...STOPS[tour.at].settings, norms: D.norms.filter(norm => STOPS[tour.at].settings.norms.includes(norm)), seed: s.seed, every: s.every });
  showStop();
  showSettings();
  startRace(at === null ? 1 : STOPS[at].until, true);
}
addEventListener("hashchange", open);
open();
