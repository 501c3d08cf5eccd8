// Recipes and evaluations as tables.

function table(heads, rows, numbers = []) {
  const cell = (tag, value, index) => el(tag, { class: numbers.includes(index) ? "number" : "" }, value === null || value === undefined ? "–" : value);
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads.map((head, index) => cell("th", head, index)))),
    el("tbody", {}, rows.map(row => el("tr", { class: row.mark ? "differs" : "" }, row.cells.map((value, index) => cell("td", value, index)))))));
}

function showRecipes(main) {
  const { runs, recipes } = page.content;
  const cells = row => [el("code", {}, row.key), ...row.values.map(value => (value === null ? null : el("code", {}, value)))];
  const heads = ["key", ...runs.map(run => run.name)];
  if (runs.length > 1) {
    const different = recipes.filter(row => row.differs);
    main.append(el("h2", {}, "Differences"), different.length ? table(heads, different.map(row => ({ cells: cells(row) }))) : el("p", { class: "note" }, "The recipes are equal."));
  }
  main.append(el("h2", {}, runs.length > 1 ? "All keys" : "Recipe"), table(heads, recipes.map(row => ({ cells: cells(row), mark: row.differs }))));
}

const interval = figures => (figures && figures.low !== undefined && figures.low !== null ? `${percent(figures.low)} to ${percent(figures.high)}` : "–");

function showEvaluations(main) {
  const { evaluations, runs } = page.content;
  const rows = evaluations.map(each => ({ cells: [runs[each.run].name, each.evaluate?.reward ?? each.reward, percent(each.accuracy), interval(each), number(each.num_graded)] }));
  main.append(el("h2", {}, "Accuracy"), table(["evaluation", "reward", "accuracy", "95 % interval", "prompts"], rows, [2, 3, 4]));
  showSamples(main);
  showBudgets(main);
  const sources = evaluations.flatMap(each => Object.entries(each.sources ?? {}).map(([name, figures]) => ({ cells: [runs[each.run].name, name, percent(figures.accuracy), interval(figures), number(figures.num_graded)] })));
  if (sources.length) main.append(el("h2", {}, "By source"), table(["evaluation", "source", "accuracy", "95 % interval", "prompts"], sources, [2, 3, 4]));
  const rewards = evaluations.flatMap(each => Object.entries(each.rewards ?? {}).map(([name, figures]) => ({ cells: [runs[each.run].name, name, number(figures.mean), figures.low === null ? "–" : `${number(figures.low)} to ${number(figures.high)}`, number(figures.num_graded)] })));
  if (rewards.length) main.append(el("h2", {}, "Mean rewards"), table(["evaluation", "reward", "mean", "95 % interval", "answers"], rows.length ? rewards : [], [2, 3, 4]));
}

// avg@k, pass@k and maj@k over k: rates of one set of samples.
function showSamples(main) {
  const { evaluations, runs } = page.content;
  const kinds = [["avg_at", "avg"], ["pass_at", "pass"], ["maj_at", "maj"]];
  const lines = evaluations.flatMap(each => kinds.filter(([key]) => Object.keys(each[key] ?? {}).length > 1).map(([key, name]) => ({ run: each.run, name: `${name}@k`, points: Object.entries(each[key]).map(([k, value]) => [Number(k), value]) })));
  if (!lines.length) return;
  main.append(el("h2", {}, "Several answers"), pointChart("Rate over the number of answers k", "k", lines));
}

function showBudgets(main) {
  const { evaluations, runs } = page.content;
  const with_budgets = evaluations.filter(each => (each.budgets ?? []).length);
  if (!with_budgets.length) return;
  const names = { accuracy: "accuracy", maj: "majority vote" };
  const lines = with_budgets.flatMap(each => Object.keys(names).filter(key => each.budgets.every(point => figure(point, key))).map(key => ({
    run: each.run, name: names[key], points: each.budgets.map(point => [point.thinking_tokens, figure(point, key).accuracy, figure(point, key).low, figure(point, key).high]) })));
  const rows = with_budgets.flatMap(each => each.budgets.map(point => ({ cells: [runs[each.run].name, number(point.reasoning_budget), number(point.thinking_tokens), percent(point.accuracy), interval(point), point.maj ? percent(point.maj.accuracy) : null] })));
  main.append(el("h2", {}, "Accuracy against thinking"), pointChart("Accuracy by thinking tokens", "mean thinking tokens", lines),
    table(["evaluation", "budget", "thinking tokens", "accuracy", "95 % interval", "majority vote"], rows, [1, 2, 3, 4, 5]));
}
const figure = (point, key) => (key === "accuracy" ? point : point[key]);

function pointChart(title, xName, lines) {
  const card = el("section", { class: "chart" }, el("div", { class: "head" }, el("h3", {}, title)), el("div", { class: "key" }), el("div", { class: "plot" }));
  const several = page.content.runs.length > 1, names = [...new Set(lines.map(line => line.name))];
  const drawPoints = () => {
    const panel = { lines, unit: "%", kind: "lines" };
    const data = lines.map(line => {
      const shown = look(panel, line), scaled = index => line.points.map(point => 100 * point[index]);
      const bars = line.points[0].length > 2 ? { error_y: { type: "data", symmetric: false, array: line.points.map(p => 100 * (p[3] - p[1])), arrayminus: line.points.map(p => 100 * (p[1] - p[2])), color: withAlpha(shown.color, 0.6), thickness: 1.2, width: 3 } } : {};
      return { x: line.points.map(point => point[0]), y: scaled(1), mode: "lines+markers", name: escapeLabel(lineLabel(panel, line)), marker: { size: 7, color: shown.color }, line: { color: shown.color, dash: shown.dash, width: 1.8 }, hovertemplate: "%{y:.1f} %", ...bars };
    });
    const base = layout(panel);
    card.querySelector(".key").replaceChildren(...lines.map(line => el("span", {}, sample(look(panel, line)), lineLabel(panel, line))));
    Plotly.react(card.querySelector(".plot"), data, { ...base, xaxis: { ...base.xaxis, title: { ...base.xaxis.title, text: xName } } }, { displaylogo: false, responsive: true, displayModeBar: false });
    resized.observe(card.querySelector(".plot"));
  };
  card.redraw = drawPoints;
  requestAnimationFrame(drawPoints);
  return el("div", { class: "charts single" }, card);
}
