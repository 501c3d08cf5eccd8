// Charts: one card for each panel, drawn when it comes into view.

const charts = { byTime: false, smoothing: 0 };

function smooth(values, weight) {
  let mean = 0, norm = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

const escapeLabel = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const withAlpha = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

// With one run, a color is a line; with several, a color is a run and a dash is a line.
function look(panel, line) {
  const names = [...new Set(panel.lines.map(each => each.name))];
  const several = page.content.runs.length > 1;
  const position = names.indexOf(line.name);
  return { color: color(several ? line.run : position), dash: several ? DASHES[position % DASHES.length] : "solid" };
}

function lineLabel(panel, line) {
  const names = new Set(panel.lines.map(each => each.name));
  const runs = new Set(panel.lines.map(each => each.run));
  const name = page.content.runs[line.run].name;
  if (runs.size === 1) return line.name;
  return names.size === 1 ? name : `${name}: ${line.name}`;
}

function traces(panel) {
  const scale = panel.unit === "%" ? 100 : 1;
  const scaled = values => values.map(value => (value === null ? null : value * scale));
  const isArea = panel.kind === "areas" && new Set(panel.lines.map(line => line.run)).size === 1;
  const result = [];
  for (const line of panel.lines) {
    const shown = look(panel, line);
    const x = charts.byTime ? line.hours : line.steps;
    const label = escapeLabel(lineLabel(panel, line));
    const few = line.values.length <= 40;
    if (isArea) {
      result.push({ x, y: scaled(line.values), name: label, stackgroup: "all", mode: "lines", line: { color: shown.color, width: 1 }, fillcolor: withAlpha(shown.color, 0.55), hovertemplate: "%{y:.3~g}" });
      continue;
    }
    if (line.low) {
      const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      result.push({ ...edge, y: scaled(line.low) }, { ...edge, y: scaled(line.high), fill: "tonexty", fillcolor: withAlpha(shown.color, 0.14) });
    }
    const values = scaled(line.values);
    if (charts.smoothing > 0 && line.values.length > 4)
      result.push({ x, y: values, mode: "lines", line: { color: withAlpha(shown.color, 0.3), width: 1 }, hoverinfo: "skip" });
    result.push({
      x, y: charts.smoothing > 0 && line.values.length > 4 ? smooth(values, charts.smoothing) : values, name: label,
      mode: few ? "lines+markers" : "lines", marker: { size: 4.5, color: shown.color },
      line: { color: shown.color, width: 1.8, dash: shown.dash }, hovertemplate: "%{y:.4~g}",
    });
  }
  return result;
}

function layout(panel) {
  const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line"), tickfont: { size: 11, color: style("--soft") }, automargin: true, fixedrange: false };
  const name = charts.byTime ? "hours" : "step";
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "x unified",
    font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: 12, color: style("--ink") },
    margin: { l: 8, r: 8, t: 8, b: 30 },
    xaxis: { ...axis, title: { text: name, font: { size: 11, color: style("--soft") }, standoff: 4 }, showgrid: false, nticks: 7 },
    yaxis: { ...axis, ticksuffix: panel.unit === "%" ? " %" : "", nticks: 6, rangemode: panel.kind === "areas" ? "tozero" : "normal" },
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { size: 12, color: style("--ink") } },
  };
}

function sample(shown) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const dashes = { solid: "", dash: "6 3", dot: "2 2.5", dashdot: "6 3 2 3", longdash: "9 3", longdashdot: "9 3 2 3" };
  for (const [key, value] of Object.entries({ width: 20, height: 8 })) svg.setAttribute(key, value);
  for (const [key, value] of Object.entries({ x1: 0, x2: 20, y1: 4, y2: 4, stroke: shown.color, "stroke-width": 2.5, "stroke-dasharray": dashes[shown.dash] })) line.setAttribute(key, value);
  svg.append(line);
  return svg;
}

// A chart follows the width of its card, also where the window tells nobody that it has changed.
const resized = new ResizeObserver(entries => {
  for (const { target } of entries) if (target.querySelector(".main-svg")) Plotly.Plots.resize(target);
});

function draw(card) {
  const panel = page.content.panels[card.dataset.index];
  const key = card.querySelector(".key");
  key.replaceChildren(...(panel.lines.length > 1 ? panel.lines.map(line => el("span", {}, sample(look(panel, line)), lineLabel(panel, line))) : []));
  Plotly.react(card.querySelector(".plot"), traces(panel), layout(panel), {
    displaylogo: false, responsive: true, displayModeBar: false, doubleClick: "reset",
  });
  card.dataset.drawn = "yes";
  resized.observe(card.querySelector(".plot"));
}
const redraw = () => document.querySelectorAll(".chart[data-drawn]").forEach(draw);

function showCharts(main) {
  if (!page.content.panels.length) {
    main.append(el("p", { class: "note" }, "No step has been logged yet."));
    return;
  }
  const smoothing = el("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: charts.smoothing, "aria-label": "smoothing",
    oninput: event => { charts.smoothing = Number(event.target.value); redraw(); } });
  const byTime = el("input", { type: "checkbox", onchange: event => { charts.byTime = event.target.checked; redraw(); } });
  byTime.checked = charts.byTime;
  main.append(el("div", { class: "bar" }, el("label", {}, "Smoothing ", smoothing), el("label", {}, byTime, " over hours"),
    el("span", {}, "Drag to zoom; double-click to reset.")));
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  let heading = null, grid = null;
  page.content.panels.forEach((panel, index) => {
    if (panel.heading !== heading) {
      heading = panel.heading;
      grid = el("div", { class: "charts" });
      main.append(el("h2", {}, heading), grid);
    }
    const unit = panel.unit && panel.unit !== "%" ? panel.unit : "";
    const note = [unit, panel.note].filter(Boolean).join("; ");
    const card = el("section", { class: "chart", "data-index": index },
      el("div", { class: "head" }, el("h3", {}, panel.title), el("p", { class: "note" }, note)),
      el("div", { class: "key" }), el("div", { class: "plot" }));
    grid.append(card);
    seen.observe(card);
  });
}
