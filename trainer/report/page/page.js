// The page: header, tabs and theme.

const TABS = {
  curves: { title: "Curves", show: showCharts, has: content => content.panels.length > 0 || !content.evaluations.length },
  evaluations: { title: "Evaluations", show: showEvaluations, has: content => content.evaluations.length > 0 },
  rollouts: { title: "Completions", show: showRollouts, has: content => content.rollouts.total > 0 },
  recipe: { title: "Recipe", show: showRecipes, has: () => true },
};

function showHeader() {
  const { runs, written } = page.content;
  const theme = el("button", { class: "plain", onclick: () => setTheme(isDark() ? "light" : "dark") }, "Light / dark");
  const when = new Date(1000 * written).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  document.getElementById("header").replaceChildren(
    el("div", { class: "top" }, el("div", {}, el("h1", {}, runs.length === 1 ? runs[0].name : `${runs.length} ${runs.every(run => run.stage === "evaluate") ? "evaluations" : "runs"}`), el("p", { class: "note" }, `rekatrain report, written ${when}`)), theme),
    el("div", { class: runs.length > 3 ? "runs many" : "runs" }, runs.map(runCard)));
}

function runCard(run, index) {
  const progress = run.step === null ? (run.stage === "evaluate" ? "evaluation" : `${run.stage}, no step yet`)
    : `${run.stage}, step ${run.step}${run.max_steps > 0 ? ` of ${run.max_steps}` : ""}${run.seconds ? `, ${duration(run.seconds)}` : ""}`;
  const evaluation = page.content.evaluations.find(each => each.run === index);
  const tiles = [...run.tiles];
  if (evaluation) tiles.push({ title: evaluation.evaluate?.reward ?? "accuracy", value: evaluation.accuracy, is_fraction: true, note: interval(evaluation) });
  const shown = (tile, value) => (tile.is_fraction ? percent(value) : number(value));
  return el("section", { class: "run" },
    el("div", {}, el("div", { class: "name" }, el("span", { class: "dot", style: `background:${color(index)}` }), run.name), el("div", { class: "note" }, progress)),
    el("div", { class: "tiles" }, tiles.map(tile => el("div", { class: "tile" }, el("div", { class: "title" }, tile.title), el("div", { class: "value" }, shown(tile, tile.value)),
      el("div", { class: "best" }, tile.note ?? (tile.best !== undefined ? `best ${shown(tile, tile.best)} at step ${tile.best_step}` : `first ${shown(tile, tile.first)}`))))));
}

function showTabs() {
  const names = Object.keys(TABS).filter(name => TABS[name].has(page.content));
  if (!names.includes(page.tab)) page.tab = names[0];
  document.getElementById("tabs").replaceChildren(...names.map(name => el("button", {
    role: "tab", id: `tab-${name}`, "aria-selected": String(name === page.tab), "aria-controls": "main", onclick: () => { location.hash = `#${name}`; } }, TABS[name].title)));
}

function showTab() {
  showTabs();
  const main = document.getElementById("main");
  main.replaceChildren();
  TABS[page.tab].show(main);
  document.getElementById("group")?.remove();
  if (page.tab === "rollouts" && page.state.group !== undefined) showGroup(Number(page.state.group), page.state.member || null);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  showHeader();
  redraw();
  document.querySelectorAll(".chart").forEach(card => card.redraw?.());
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("loading").textContent = "This browser is too old to unpack the report: use one of 2023 or later.";
    return;
  }
  const wantsDark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = wantsDark.matches ? "dark" : "light";
  const [plotly, content] = await Promise.all([unpackText("plotly"), unpack("content")]);
  page.content = content;
  const script = document.createElement("script");
  script.textContent = plotly;
  document.head.append(script);
  readState();
  showHeader();
  showTab();
  wantsDark.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
  addEventListener("hashchange", () => {
    const tab = page.tab, before = JSON.stringify({ ...page.state, group: 0, member: 0 });
    readState();
    const isSame = tab === page.tab && before === JSON.stringify({ ...page.state, group: 0, member: 0 });
    if (isSame && page.tab === "rollouts" && page.state.group !== undefined) showGroup(Number(page.state.group), page.state.member || null);
    else showTab();
  });
  document.body.dataset.ready = "yes";
}

start();
