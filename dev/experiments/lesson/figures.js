// The lesson's figures. Each is built from the data in the page by a function of the theme, so that it can be drawn again when the theme changes.
"use strict";
const D = JSON.parse(document.getElementById("lesson-data").textContent);
const reduced = matchMedia("(prefers-reduced-motion: reduce)").matches;
const figures = {};                 // name: a function that returns {data, layout}
const state = { on: new Set(D.norms), step: 0, heat: D.norms.includes("post") ? "post" : D.norms[0], removed: D.redundancy.norms[0], hops: D.hops.norms[0], L: 64 };

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => innerWidth < 600;
const label = norm => D.labels[norm] || norm;
const bold = norm => (norm === "keel" || norm === "post") ? 3 : 1.8;

// What all figures have in common.
function layout(more = {}) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, ticks: "", exponentformat: "power" };
  const { xaxis, yaxis, ...rest } = more;
  for (const a of [xaxis, yaxis]) if (a && typeof a.title === "string") a.title = { text: a.title, standoff: 12, font: { size: 13 } };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: narrow() ? 44 : 58, r: 12, t: 8, b: 44 }, showlegend: false, hovermode: "closest",
    font: { family: css("--sans"), size: 12.5, color: css("--soft") }, hoverlabel: { font: { family: css("--sans") } }, dragmode: false,
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest };
}
const line = (norm, x, y, more = {}) => ({ x, y, mode: "lines", name: label(norm), line: { color: D.colours[norm], width: bold(norm) }, hovertemplate: "%{y:.3g}<extra>" + label(norm) + "</extra>", ...more });
const range = n => Array.from({ length: n }, (_, i) => i);
const shown = () => D.norms.filter(norm => state.on.has(norm));

function limits(values, least) {  // of a log axis, as exponents
  const found = values.filter(v => v > 0);
  return [Math.max(Math.log10(Math.min(...found)) - 0.3, least), Math.log10(Math.max(...found)) + 0.3];
}
const flowLimits = limits(D.norms.flatMap(norm => D.gradient.dx[norm].flat()), -16);
const shortcutLimits = limits(D.norms.flatMap(norm => D.gradient.shortcut[norm].flat()), -16);

function overDepth(table, exponents, title) {
  const x = range(D.gradient.L);
  return { data: shown().map(norm => line(norm, x, table[norm][state.step])),
    layout: layout({ xaxis: { title: "sub-layer", range: [0, D.gradient.L - 1] }, yaxis: { type: "log", range: exponents, title: narrow() ? "" : title } }) };
}
figures.flow = () => overDepth(D.gradient.dx, flowLimits, "‖dL/dx‖");
figures.shortcut = () => overDepth(D.gradient.shortcut, shortcutLimits, "product of gains to the top");

figures.heat = () => {
  const steps = D.gradient.steps.map(String), low = flowLimits[0], z = range(D.gradient.L).map(l => D.gradient.dx[state.heat].map(row => Math.log10(Math.max(row[l], 1e-30))));
  return { data: [{ type: "heatmap", x: steps, y: range(D.gradient.L), z, zmin: Math.ceil(low), zmax: Math.ceil(flowLimits[1]),
      colorscale: [[0, "#0d1b2a"], [0.35, "#1b4965"], [0.6, "#1283b0"], [0.8, "#7fc8d8"], [1, "#fdf6d8"]],
      colorbar: { thickness: 10, outlinewidth: 0, tickprefix: "10<sup>", ticksuffix: "</sup>", title: "" },
      hovertemplate: "step %{x}, sub-layer %{y}: 10<sup>%{z:.1f}</sup><extra>" + label(state.heat) + "</extra>" }],
    layout: layout({ xaxis: { type: "category", title: "step", showgrid: false }, yaxis: { title: narrow() ? "" : "sub-layer", showgrid: false } }) };
};

figures.loss = () => ({ data: shown().map(norm => line(norm, range(D.loss[norm].length).map(i => i + 1), D.loss[norm])),
  layout: layout({ xaxis: { title: "step" }, yaxis: { title: narrow() ? "" : "training loss, nats" } }) });

figures.alpha = () => {
  const x = range(121).map(i => 10 ** (i / 30)), L = state.L, product = a => Math.exp(-L / 2 * Math.log1p(1 / (a * a))), marks = [["1", 1], ["√L", Math.sqrt(L)], ["L", L]];
  return { data: [
      { x, y: x.map(product), mode: "lines", line: { color: css("--accent"), width: 3 }, hovertemplate: "α = %{x:.3g}: %{y:.3g}<extra></extra>" },
      { x: marks.map(m => m[1]), y: marks.map(m => product(m[1])), mode: "markers+text", text: marks.map(m => `α = ${m[0]}: ${product(m[1]).toPrecision(3)}`), textposition: ["top right", "middle right", "bottom right"],
        marker: { size: 10, color: [D.colours.post, D.colours.deepnorm, D.colours.keel] }, textfont: { color: css("--ink") }, hoverinfo: "skip", cliponaxis: false }],
    layout: layout({ xaxis: { type: "log", title: "α", range: [-0.05, 4], dtick: 1 }, yaxis: { range: [-0.06, 1.06], title: narrow() ? "" : "product over L sub-layers" } }) };
};

figures.road = () => ({ data: D.road.map(form => ({ x: range(form.loss.length).map(i => i + 1), y: form.loss, mode: "lines", name: form.name,
    line: { color: form.colour, width: form.name === "KEEL" ? 3 : 1.8, dash: form.dash }, hovertemplate: "%{y:.3f}<extra>" + form.name + "</extra>" })),
  layout: layout({ xaxis: { title: "step" }, yaxis: { title: narrow() ? "" : "training loss, nats", range: D.road_range } }) });

figures.highway = () => ({ data: D.highway.map(way => ({ x: way.L, y: way.error, mode: "lines+markers", name: way.name, line: { color: D.colours[way.colour], width: 2.6 }, marker: { size: 8 },
    hovertemplate: "L = %{x}: %{y:.2%}<extra></extra>" })),
  layout: layout({ xaxis: { type: "log", title: "sub-layers L", tickvals: D.highway[0].L }, yaxis: { type: "log", tickvals: [1e-3, 1e-2, 1e-1, 1], ticktext: ["0.1 %", "1 %", "10 %", "100 %"] } }) });

figures.maxlr = () => {
  const names = D.maxlr.map(row => label(row.norm)), colours = D.maxlr.map(row => D.colours[row.norm]);
  const until = (what, name, symbol, opacity) => ({ mode: "markers", name, x: names, y: D.maxlr.map(row => row[what].mean), opacity, marker: { color: colours, size: 14, symbol }, hovertemplate: "%{y:.3g}<extra>%{x}, " + name + "</extra>",
    error_y: { type: "data", symmetric: false, array: D.maxlr.map(row => row[what].highest - row[what].mean), arrayminus: D.maxlr.map(row => row[what].mean - row[what].lowest), color: css("--soft"), thickness: 1.4, width: 5 } });
  return { data: [until("gains", "gains until", "circle", 1), until("holds", "holds until", "square", 0.55),
      { mode: "markers", name: "the paper, 64 layers", x: names, y: D.maxlr.map(row => row.paper), marker: { color: css("--paper"), size: 13, line: { color: colours, width: 3 } }, hovertemplate: "%{y:.3g}<extra>%{x}, the paper</extra>" }],
    layout: layout({ xaxis: { type: "category", showgrid: false, tickangle: narrow() ? -50 : 0 }, yaxis: { type: "log", dtick: 1, title: narrow() ? "" : "learning rate" } }) };
};

figures.ramp = () => ({ data: D.ramp.map(run => line(run.norm, run.lr, run.loss)), layout: layout({ xaxis: { title: "learning rate, rising with the steps" }, yaxis: { title: narrow() ? "" : "loss, nats", range: D.ramp_range } }) });

function versus(points, ticks) {
  return { data: points.map(p => ({ x: p.x, y: p.loss, mode: "lines+markers", name: label(p.norm), line: { color: D.colours[p.norm], width: 2.6 }, marker: { size: 8 },
      text: p.lr.map(lr => "best at " + lr), hovertemplate: "%{y:.3f}, %{text}<extra>" + label(p.norm) + "</extra>" })),
    layout: layout({ xaxis: { type: "category", title: ticks }, yaxis: { title: narrow() ? "" : "validation loss, nats" } }) };
}
figures.depth = () => versus(D.depth, "sub-layers");
figures.wide = () => versus(D.wide, "sub-layers × channels");

figures.redundancy = () => {
  const lost = D.redundancy.lost[state.removed], scale = v => Math.sign(v) * Math.log10(1 + Math.abs(v) / 0.003), ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1, 10, 100, 1000];
  return { data: [{ type: "bar", x: range(lost.length), y: lost.map(scale), customdata: lost, marker: { color: D.colours[state.removed], opacity: range(lost.length).map(l => l % 2 ? 0.55 : 1) },
      text: range(lost.length).map(l => l % 2 ? "feed-forward" : "attention"), textposition: "none", hovertemplate: "sub-layer %{x}, %{text}: %{customdata:.3g}<extra></extra>" }],
    layout: layout({ bargap: 0.12, xaxis: { title: "sub-layer removed" }, yaxis: { title: narrow() ? "" : "perplexity lost", range: D.redundancy.range.map(scale), tickvals: ticks.map(scale), ticktext: ticks.map(String), zeroline: true, zerolinecolor: css("--soft") } }) };
};

figures.hops = () => {
  const z = D.hops.end[state.hops], depths = D.hops.L.map(L => "L = " + L);
  return { data: [{ type: "heatmap", x: D.hops.lookups, y: depths, z, zmin: 0, zmax: 1, xgap: 3, ygap: 3, showscale: false, colorscale: [[0, css("--grid")], [1, D.colours[state.hops]]],
      hovertemplate: "%{y}, lookups %{x}: %{z:.1%}<extra>" + label(state.hops) + "</extra>" }],
    layout: layout({ xaxis: { title: "lookups needed", type: "category", showgrid: false }, yaxis: { type: "category", showgrid: false },
      annotations: z.flatMap((row, i) => row.map((v, j) => ({ x: j, y: i, text: v === null ? "" : Math.round(100 * v) + " %", showarrow: false, font: { size: 14, color: v > 0.5 ? "#fff" : css("--ink") } }))) }) };
};
figures.learning = () => ({ data: D.hops.training[state.hops].map((y, k) => ({ x: D.hops.steps, y, mode: "lines+markers", name: `${k + 1} lookup${k ? "s" : ""}`, marker: { size: 4 },
      line: { color: D.colours[state.hops], width: 2.6, dash: ["solid", "dash", "dot"][k % 3] }, opacity: 1 - 0.5 * k / D.hops.lookups.length, hovertemplate: "step %{x}: %{y:.1%}<extra>" + `${k + 1} lookup${k ? "s" : ""}` + "</extra>" })),
  layout: layout({ xaxis: { title: "step" }, yaxis: { title: narrow() ? "" : "answers right", tickformat: ".0%", range: [0, 1.03] },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: D.hops.chance, y1: D.hops.chance, line: { color: css("--soft"), width: 1, dash: "dot" } }] }) });

// ---------------------------------------------------------------------------------------------------------
// Drawing and controls

function draw(...names) {
  return Promise.all(names.map(name => {
    const { data, layout } = figures[name]();
    drawLegend(name, data);
    return Plotly.react("plot-" + name, data, layout, { displayModeBar: false, responsive: true, scrollZoom: false });
  }));
}

// Set by the browser, which wraps it better than Plotly does.
function drawLegend(name, data) {
  const box = document.getElementById("legend-" + name);
  if (!box) return;
  const names = new Map(data.map(t => [t.name, t]));
  box.replaceChildren(...[...names].map(([text, t]) => {
    const colour = t.line ? t.line.color : css("--soft"), dash = t.line && t.line.dash && t.line.dash !== "solid";
    return element("span", {}, element("i", { style: `border-top: 3px ${dash ? (t.line.dash === "dot" ? "dotted" : "dashed") : "solid"} ${colour}` }), text);
  }));
}

function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  e.append(...children);
  return e;
}
const controls = name => document.getElementById("controls-" + name);

// A button for each placement. Several may be on (the lines of a figure), or exactly one (the heat map).
const followers = { flow: ["flow", "shortcut", "loss"], shortcut: ["flow", "shortcut", "loss"], loss: ["flow", "shortcut", "loss"] };
function placementButtons(name) {
  const box = controls(name);
  for (const norm of D.norms) {
    const b = element("button", { type: "button", "data-norm": norm, "aria-pressed": true, style: `--chip: ${D.colours[norm]}` }, element("i"), label(norm));
    b.onclick = () => {
      state.on.has(norm) ? state.on.delete(norm) : state.on.add(norm);
      document.querySelectorAll(`[data-many] button[data-norm=${norm}]`).forEach(other => other.setAttribute("aria-pressed", state.on.has(norm)));
      draw(...followers[name]);
    };
    box.append(b);
  }
}
function oneOf(name, norms, key, ...others) {
  const box = controls(name);
  for (const norm of norms) {
    const b = element("button", { type: "button", "data-norm": norm, "aria-pressed": state[key] === norm, style: `--chip: ${D.colours[norm]}` }, element("i"), label(norm));
    b.onclick = () => {
      state[key] = norm;
      box.querySelectorAll("button").forEach(other => other.setAttribute("aria-pressed", other === b));
      draw(name, ...others);
    };
    box.append(b);
  }
}

// One slider over the training steps, shown at both figures that it moves.
function setStep(i) {
  state.step = i;
  for (const name of ["flow", "shortcut"]) {
    document.getElementById("step-" + name).value = i;
    document.getElementById("step-" + name + "-is").textContent = D.gradient.steps[i] === 1 ? "new model" : "step " + D.gradient.steps[i];
  }
  return draw("flow", "shortcut");
}
function stepSlider(name) {
  const box = document.getElementById("slider-" + name);
  const input = element("input", { type: "range", id: "step-" + name, min: 0, max: D.gradient.steps.length - 1, value: 0, "aria-label": "training step" });
  const play = element("button", { type: "button", class: "plain", id: "play-" + name, "aria-pressed": false }, "▶ play");
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.setAttribute("aria-pressed", false); play.textContent = "▶ play"; };
  input.oninput = () => { stop(); setStep(+input.value); };
  play.onclick = () => {
    if (timer) return stop();
    if (state.step === D.gradient.steps.length - 1) setStep(0);
    play.setAttribute("aria-pressed", true);
    play.textContent = "❚❚ pause";
    timer = setInterval(() => { setStep(state.step + 1); if (state.step === D.gradient.steps.length - 1) stop(); }, reduced ? 900 : 350);
  };
  box.append(play, input, element("output", { id: "step-" + name + "-is" }));
}
function depthSlider() {
  const input = element("input", { type: "range", id: "depth-alpha", min: 1, max: 10, value: Math.log2(state.L), "aria-label": "sub-layers" }), out = element("output", {}, "L = " + state.L);
  input.oninput = () => { state.L = 2 ** +input.value; out.textContent = "L = " + state.L; draw("alpha"); };
  document.getElementById("slider-alpha").append(input, out);
}

for (const name of ["flow", "shortcut", "loss"]) placementButtons(name);
for (const name of ["flow", "shortcut"]) stepSlider(name);
oneOf("heat", D.norms, "heat");
oneOf("redundancy", D.redundancy.norms, "removed");
oneOf("hops", D.hops.norms, "hops", "learning");
depthSlider();
const all = Object.keys(figures);
setStep(0).then(() => draw(...all)).then(() => { document.documentElement.dataset.drawn = all.length; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(...all));
let wasNarrow = narrow();
addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); draw(...all); } });
