// The list of completions, page by page, and the sheet of one group.

const PER_PAGE = 25;
const list = { chosen: [], first: 0, turn: 0 };

function choices(label, key, options, wide) {
  const select = el("select", { onchange: event => change({ [key]: event.target.value }) },
    el("option", { value: "" }, "all"), options.map(([value, text]) => el("option", { value }, text)));
  select.value = page.state[key] ?? "";
  return el("label", wide ? { class: "wide" } : {}, label, select);
}
function field(key, attributes) {
  return el("input", { value: page.state[key] ?? "", onchange: event => change({ [key]: event.target.value.trim() }), ...attributes });
}
function change(changes) {
  writeState(changes);
  list.first = 0;
  applyFilters();
}

function showRollouts(main) {
  const { groups, completions, rewards, total } = page.content.rollouts;
  const shown = completions.group.length;
  if (!shown) {
    main.append(el("p", { class: "note" }, "There are no completions: stages sft and reward sample none."));
    return;
  }
  const distinct = values => [...new Set(values)].sort();
  const columns = [["reward", "reward"], ...Object.keys(rewards).map(name => [`rewards/${name}`, name]), ["advantage", "advantage"], ["tokens", "tokens"], ["kl", "KL"]]
    .filter(([key]) => column(key).some(value => value !== null && value !== undefined));
  const sources = distinct(groups.source).filter(Boolean), runs = distinct(groups.run);
  const filters = el("div", { class: "filters" },
    el("label", { class: "wide" }, "Text search", field("q", { type: "search", placeholder: "in prompt, gold answer and completion" })),
    runs.length > 1 ? choices("Run", "run", runs.map(index => [index, page.content.runs[index].name])) : null,
    groups.step.some(step => step !== null) ? el("label", {}, "Steps", el("span", { class: "pair" }, field("from", { inputmode: "numeric", placeholder: "from", "aria-label": "from step" }), field("to", { inputmode: "numeric", placeholder: "to", "aria-label": "to step" }))) : null,
    sources.length > 1 ? choices("Source", "source", sources.map(name => [name, name])) : null,
    choices("Finish reason", "finish", distinct(completions.finish).map(name => [name, name])),
    choices("Rewards that failed", "failed", [["yes", "some failed"], ["no", "none failed"]]),
    el("label", { class: "wide" }, "Values", el("span", { class: "pair" }, valueChoice(columns), field("low", { inputmode: "decimal", placeholder: "from", "aria-label": "from value" }), field("high", { inputmode: "decimal", placeholder: "to", "aria-label": "to value" }))),
    el("label", {}, "Sort by", sortChoice(columns)),
    el("label", {}, "Order", directionChoice()));
  const sample = shown < total ? el("p", { class: "note", id: "sample" }, `An even sample: ${shown.toLocaleString("en-US")} of ${total.toLocaleString("en-US")} completions, whole groups of the whole run. The file rollouts.jsonl has all.`) : null;
  main.append(filters, sample ?? "", el("div", { class: "pager", id: "pager" }), el("div", { class: "scroll" }, el("table", { id: "list" })));
  list.columns = columns;
  list.first = Number(page.state.at || 0);
  applyFilters();
}
function valueChoice(columns) {
  const select = el("select", { "aria-label": "value", onchange: event => change({ by: event.target.value }) }, columns.map(([value, text]) => el("option", { value }, text)));
  select.value = page.state.by ?? columns[0]?.[0] ?? "";
  return select;
}
function sortChoice(columns) {
  const select = el("select", { onchange: event => change({ sort: event.target.value }) }, el("option", { value: "" }, "order of the run"), [["step", "step"], ...columns].map(([value, text]) => el("option", { value }, text)));
  select.value = page.state.sort ?? "";
  return select;
}
function directionChoice() {
  const select = el("select", { onchange: event => change({ dir: event.target.value }) }, el("option", { value: "" }, "highest first"), el("option", { value: "up" }, "lowest first"));
  select.value = page.state.dir ?? "";
  return select;
}

async function applyFilters() {
  const turn = ++list.turn, isStale = () => turn !== list.turn;
  let chosen = choose(page.state);
  if (page.state.q) {
    const progress = part => document.getElementById("pager").replaceChildren(el("span", { class: "count" }, `Searching: ${Math.round(100 * part)} %`));
    progress(0);
    chosen = await search(chosen, page.state.q, progress, isStale);
    if (chosen === null || isStale()) return;
  }
  list.chosen = chosen;
  await showPage(isStale);
}

async function showPage(isStale) {
  const { groups, completions } = page.content.rollouts;
  const shown = list.chosen.slice(list.first, list.first + PER_PAGE);
  const last = Math.min(list.first + PER_PAGE, list.chosen.length);
  const turnTo = first => { list.first = first; writeState({ at: first || null }); showPage(() => false); };
  const entries = await Promise.all(shown.map(async index => (await chunk(groups.chunk[completions.group[index]]))[groups.slot[completions.group[index]]]));
  if (isStale() || !document.getElementById("pager")) return;
  document.getElementById("pager").replaceChildren(
    el("span", { class: "count", id: "count" }, list.chosen.length ? `${list.first + 1}–${last} of ${list.chosen.length.toLocaleString("en-US")} completions` : "No completion fits the filters."),
    el("button", { class: "plain", disabled: list.first === 0, onclick: () => turnTo(Math.max(0, list.first - PER_PAGE)) }, "Previous"),
    el("button", { class: "plain", disabled: last >= list.chosen.length, onclick: () => turnTo(list.first + PER_PAGE) }, "Next"));
  const several = page.content.runs.length > 1, hasSteps = groups.step.some(step => step !== null);
  const heads = [several ? "run" : null, hasSteps ? "step" : null, "completion", ...list.columns.map(([, text]) => text), "finish"].filter(Boolean);
  const body = shown.map((index, position) => rolloutRow(index, entries[position], several, hasSteps));
  document.getElementById("list").replaceChildren(
    el("thead", {}, el("tr", {}, heads.map(text => el("th", { class: ["run", "completion", "finish"].includes(text) ? "" : "number" }, text)))), el("tbody", {}, body));
  document.body.dataset.rows = list.chosen.length;
}

function rolloutRow(index, entry, several, hasSteps) {
  const { groups, completions } = page.content.rollouts;
  const group = completions.group[index], text = entry.texts[index - groups.first[group]];
  const open = () => { location.hash = `#rollouts?${new URLSearchParams({ ...page.state, group, member: index })}`; };
  return el("tr", { class: "open", tabindex: 0, onclick: open, onkeydown: event => { if (event.key === "Enter") open(); } },
    several ? el("td", {}, el("span", { class: "dot", style: `background:${color(groups.run[group])}` }), page.content.runs[groups.run[group]].name) : null,
    hasSteps ? el("td", { class: "number" }, groups.step[group] === null ? "–" : String(groups.step[group])) : null,
    el("td", { class: "text" }, el("div", { class: "clamp note" }, marked(lastTurn(entry.prompt))), el("div", { class: "clamp" }, marked(preview(text)))),
    list.columns.map(([key]) => el("td", { class: "number" }, key === "advantage" ? signed(column(key)[index]) : number(column(key)[index]))),
    el("td", {}, completions.finish[index] ? el("span", { class: completions.finish[index] === "length" ? "badge bad" : "badge" }, completions.finish[index]) : null,
      completions.failed[index] ? el("span", { class: "badge bad" }, "reward failed") : null));
}

// The text around the first hit of the search, or its beginning; the hits marked.
function preview(text) {
  const at = page.state.q ? text.toLowerCase().indexOf(page.state.q.toLowerCase()) : -1;
  const from = Math.max(0, at - 60);
  return (from ? "…" : "") + text.slice(from, from + 400);
}
function lastTurn(prompt) {
  const turns = prompt.replace(/\s*<sep>\s*assistant:\s*$/, "").split("<sep>");
  return preview(turns[turns.length - 1].trim().replace(/^human:\s*/, ""));
}
function marked(text) {
  const words = (page.state.q || "").toLowerCase();
  if (!words) return [text];
  const parts = [], lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(words); at >= 0; at = lower.indexOf(words, from)) {
    parts.push(text.slice(from, at), el("mark", {}, text.slice(at, at + words.length)));
    from = at + words.length;
  }
  return [...parts, text.slice(from)];
}

async function showGroup(group, member) {
  const { groups, completions, rewards } = page.content.rollouts;
  if (!(group >= 0 && group < groups.run.length)) return;
  const entry = (await chunk(groups.chunk[group]))[groups.slot[group]];
  const first = groups.first[group];
  const where = [page.content.runs[groups.run[group]].name, groups.step[group] === null ? null : `step ${groups.step[group]}`,
    groups.budget[group] === null ? null : `reasoning budget ${groups.budget[group]}`, groups.source[group] || null, groups.row[group]].filter(Boolean).join(" · ");
  const close = () => { writeState({ group: null, member: null }); sheet.close(); };
  const turn = step => { location.hash = `#rollouts?${new URLSearchParams({ ...page.state, group: group + step, member: "" })}`; };
  const cards = entry.texts.map((text, position) => memberCard(text, entry.errors[position], first + position, position, member));
  const sheet = el("dialog", { id: "group", oncancel: event => { event.preventDefault(); close(); } },
    el("div", { class: "sheet" },
      el("div", { class: "top" }, el("div", {}, el("h3", {}, `${entry.texts.length === 1 ? "One completion" : `${entry.texts.length} completions`} of one prompt`), el("p", { class: "note" }, where)),
        el("div", { class: "pager" }, el("button", { class: "plain", disabled: group === 0, onclick: () => turn(-1) }, "Previous"), el("button", { class: "plain", disabled: group + 1 === groups.run.length, onclick: () => turn(1) }, "Next"), el("button", { class: "plain", onclick: close, autofocus: true }, "Close"))),
      el("div", { class: "body" },
        el("div", { class: "texts" }, el("div", { class: "block" }, el("h3", {}, "Prompt"), el("pre", {}, marked(entry.prompt))),
          el("div", { class: "block" }, el("h3", {}, "Gold answer"), el("pre", {}, entry.gold === null || entry.gold === undefined ? "The row has none." : marked(goldText(entry.gold))))),
        el("div", { class: "members" }, cards))));
  document.getElementById("group")?.remove();
  document.body.append(sheet);
  sheet.showModal();
  sheet.querySelector(".chosen")?.scrollIntoView({ inline: "nearest", block: "nearest" });
}

function memberCard(text, errors, index, position, member) {
  const { completions, rewards } = page.content.rollouts;
  const values = Object.entries(rewards).filter(([name, of]) => of[index] !== null || errors[name] !== undefined);
  const advantage = completions.advantage[index];
  const rows = values.flatMap(([name, of]) => [el("dt", {}, name), el("dd", { class: errors[name] ? "bad" : "" }, errors[name] ? "failed" : number(of[index]))]);
  if (completions.kl[index] !== null) rows.push(el("dt", {}, "KL, nats"), el("dd", {}, number(completions.kl[index])));
  return el("article", { class: index === Number(member) ? "block member chosen" : "block member" },
    el("div", { class: "row" },
      completions.reward[index] === null ? el("span", { class: "total" }, `#${position + 1}`) : el("span", { class: "total", title: "total reward" }, number(completions.reward[index])),
      advantage === null ? null : el("span", { class: advantage > 0 ? "good" : advantage < 0 ? "bad" : "" }, `advantage ${signed(advantage)}`)),
    el("dl", {}, rows, el("dt", {}, "tokens"), el("dd", {}, number(completions.tokens[index])), el("dt", {}, "finish"), el("dd", {}, completions.finish[index] || "–")),
    Object.entries(errors).map(([name, error]) => el("p", { class: "note bad" }, `${name}: ${error}`)),
    completionText(text));
}

// The reasoning folded, the answer open. A completion that never closes its reasoning is all reasoning.
function completionText(text) {
  const found = /^\s*<reasoning>([\s\S]*?)(<\/reasoning>|$)/.exec(text);
  if (!found) return [el("pre", {}, marked(text))];
  const isClosed = found[2] !== "";
  const fold = el("details", { open: !isClosed || undefined }, el("summary", {}, isClosed ? "Reasoning" : "Reasoning, never closed"), el("pre", {}, marked(found[1].trim())));
  return [fold, isClosed ? el("pre", {}, marked(text.slice(found[0].length).trim())) : null];
}
