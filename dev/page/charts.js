// charts.js: what the page draws, on canvases. A chart is a function of its numbers and is drawn whole each time.
"use strict";

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const superscript = n => String(n).replace(/./g, c => ({ "-": "⁻" })[c] || "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
// 0.123, 4.5·10⁻⁷
function numberText(x) {
  if (!Number.isFinite(x)) return "–";
  if (x === 0 || (Math.abs(x) >= 1e-3 && Math.abs(x) < 1e5)) return String(+x.toPrecision(3)).replace("-", "−");
  const [mantissa, exponent] = x.toExponential(1).split("e");
  return `${mantissa.replace("-", "−")}·10${superscript(+exponent)}`;
}

const numberHtml = x => numberText(x).replace(/[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+/, c => `<sup>${c.replace(/./g, d => "−0123456789"["⁻⁰¹²³⁴⁵⁶⁷⁸⁹".indexOf(d)])}</sup>`);

// The canvas's context at the screen's resolution, cleared, and its size in CSS pixels.
function fresh(canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  return { g, width, height };
}

// About n round numbers from a to b.
function ticks(a, b, n) {
  const rough = Math.max(b - a, 1e-9) / n, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough);
  return Array.from({ length: Math.floor(b / step) - Math.ceil(a / step) + 1 }, (_, i) => (Math.ceil(a / step) + i) * step);
}

// Lines over x. chart: x, y: [from, to]; log: y's are exponents of 10; lines: {x0, y, colour, dash, width, opacity, label}
// with y an array whose i-th element stands at x0 + i; xTitle; at: the x whose values the labels show, or null.
function drawLines(canvas, chart) {
  const { g, width, height } = fresh(canvas);
  const named = chart.lines.filter(line => line.label);
  g.font = `12px ${css("--sans")}`;
  const margin = { left: 40, right: Math.max(12, ...named.map(line => g.measureText(line.label).width + 12)), top: 8, bottom: 34 };
  const w = width - margin.left - margin.right, h = height - margin.top - margin.bottom;
  const px = x => margin.left + (x - chart.x[0]) / Math.max(chart.x[1] - chart.x[0], 1e-9) * w;
  const py = y => margin.top + h - (y - chart.y[0]) / Math.max(chart.y[1] - chart.y[0], 1e-9) * h;
  g.fillStyle = css("--soft");
  g.strokeStyle = css("--grid");
  g.lineWidth = 1;
  g.textBaseline = "middle";
  g.textAlign = "right";
  for (const y of ticks(...chart.y, h / 45)) {
    if (chart.log && !Number.isInteger(y)) continue;
    g.beginPath(), g.moveTo(margin.left, py(y)), g.lineTo(margin.left + w, py(y)), g.stroke();
    g.fillText(chart.log ? "10" + superscript(y) : +y.toPrecision(6), margin.left - 6, py(y));
  }
  g.textBaseline = "top";
  g.textAlign = "center";
  for (const x of ticks(...chart.x, w / 70)) if (Number.isInteger(x)) g.fillText(x, px(x), margin.top + h + 4);
  g.textAlign = "right";
  g.fillText(chart.xTitle, margin.left + w, margin.top + h + 18);
  g.save();
  g.beginPath(), g.rect(margin.left, margin.top - 2, w, h + 4), g.clip();
  g.lineJoin = "round";
  for (const line of chart.lines) {
    g.globalAlpha = line.opacity ?? 1;
    g.strokeStyle = line.colour;
    g.lineWidth = line.width ?? 2;
    g.setLineDash(line.dash ?? []);
    g.beginPath();
    let drawing = false;
    for (let i = 0; i < line.y.length; i++) {
      if (!Number.isFinite(line.y[i])) { drawing = false; continue; }
      g[drawing ? "lineTo" : "moveTo"](px(line.x0 + i), py(line.y[i]));
      drawing = true;
    }
    g.stroke();
    if (line.y.length === 1) g.beginPath(), g.arc(px(line.x0), py(line.y[0]), 3, 0, 7), g.stroke();
  }
  g.restore();
  g.globalAlpha = 1;
  g.setLineDash([]);
  const inside = chart.at !== null && chart.at >= chart.x[0] && chart.at <= chart.x[1];
  if (inside) {
    g.strokeStyle = css("--soft");
    g.beginPath(), g.moveTo(px(chart.at), margin.top), g.lineTo(px(chart.at), margin.top + h), g.stroke();
    g.textAlign = px(chart.at) > margin.left + w / 2 ? "right" : "left";
    g.fillStyle = css("--ink");
    g.fillText(` ${chart.xTitle.split(" ")[0]} ${chart.at} `, px(chart.at), margin.top);
  }
  // Labels at the lines' ends, moved apart; with a pointer on the chart their values there.
  const labels = named.map(line => {
    const i = inside ? chart.at - line.x0 : line.y.findLastIndex(Number.isFinite), y = line.y[i];
    return { text: inside ? numberText(chart.log ? 10 ** y : y) : line.label, colour: line.colour, y: Number.isFinite(y) ? Math.min(Math.max(py(y), margin.top), margin.top + h) : margin.top + h };
  }).sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + 14);
  let most = margin.top + h + 4;
  for (const label of labels.reverse()) most = (label.y = Math.min(label.y, most)) - 14;
  g.textAlign = "left";
  g.textBaseline = "middle";
  for (const label of labels) g.fillStyle = label.colour, g.fillText(label.text, margin.left + w + 7, label.y);
  canvas.scale = { from: margin.left, width: w, x: chart.x };  // for the pointer
}

// From dark to light in lightness too, so that every eye orders them: 0 to 1.
const HEAT = [[0, 13, 27, 42], [0.35, 27, 73, 101], [0.6, 18, 131, 176], [0.8, 127, 200, 216], [1, 253, 246, 216]];
const heatTable = Array.from({ length: 256 }, (_, i) => {
  const t = i / 255, k = Math.max(1, HEAT.findIndex(row => row[0] >= t)), [a, b] = [HEAT[k - 1], HEAT[k]], s = (t - a[0]) / (b[0] - a[0]);
  return [1, 2, 3].map(c => a[c] + s * (b[c] - a[c]));
});

// value(column, row), row 0 at the bottom: 0 to 1, or no number for nothing. Each canvas pixel takes the nearest value.
function drawHeat(canvas, columns, rows, value) {
  const { g } = fresh(canvas), image = g.createImageData(canvas.width, canvas.height);
  for (let y = 0, at = 0; y < canvas.height; y++) {
    const row = rows - 1 - Math.floor(y * rows / canvas.height);
    for (let x = 0; x < canvas.width; x++, at += 4) {
      const v = value(Math.floor(x * columns / canvas.width), row);
      if (!(v >= 0 || v < 0)) continue;  // NaN, undefined
      const colour = heatTable[Math.round(255 * Math.min(Math.max(v, 0), 1))];
      image.data[at] = colour[0], image.data[at + 1] = colour[1], image.data[at + 2] = colour[2], image.data[at + 3] = 255;
    }
  }
  g.putImageData(image, 0, 0);
}
