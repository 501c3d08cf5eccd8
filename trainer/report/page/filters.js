// The choice of completions: filters and order, over columns of numbers; a search also unpacks the texts.

function fits(state) {
  const { groups, completions } = page.content.rollouts;
  const bound = key => (state[key] === undefined || state[key] === "" || Number.isNaN(Number(state[key])) ? null : Number(state[key]));
  const from = bound("from"), to = bound("to"), low = bound("low"), high = bound("high");
  const values = column(state.by || "reward");
  return index => {
    const group = completions.group[index];
    if (state.run !== undefined && groups.run[group] !== Number(state.run)) return false;
    if (state.source !== undefined && groups.source[group] !== state.source) return false;
    if (state.finish !== undefined && completions.finish[index] !== state.finish) return false;
    if (state.failed === "yes" && !completions.failed[index]) return false;
    if (state.failed === "no" && completions.failed[index]) return false;
    const step = groups.step[group];
    if (from !== null && !(step !== null && step >= from)) return false;
    if (to !== null && !(step !== null && step <= to)) return false;
    if (low !== null && !(values[index] !== null && values[index] >= low)) return false;
    if (high !== null && !(values[index] !== null && values[index] <= high)) return false;
    return true;
  };
}

// The values of a column: the step, a total, or a reward by its name, as "rewards/NAME".
function column(name) {
  const { groups, completions, rewards } = page.content.rollouts;
  if (name === "step" || name === "budget") return completions.group.map(group => groups[name][group]);
  if (name.startsWith("rewards/")) return rewards[name.slice(8)] || [];
  return completions[name] || [];
}

function choose(state) {
  const { completions } = page.content.rollouts;
  const fit = fits(state);
  const chosen = [];
  for (let index = 0; index < completions.group.length; index++) if (fit(index)) chosen.push(index);
  return state.sort ? order(chosen, state) : chosen;
}

// Completions without the value come last in both directions.
function order(chosen, state) {
  const values = column(state.sort), sign = state.dir === "up" ? 1 : -1;
  return chosen.sort((a, b) => {
    const x = values[a] ?? null, y = values[b] ?? null;
    if (x === null || y === null) return x === y ? a - b : x === null ? 1 : -1;
    return x === y ? a - b : sign * (x < y ? -1 : 1);
  });
}

// The chosen completions whose text, prompt or gold answer holds the words; `isStale` ends a search that is overtaken.
async function search(chosen, words, progress, isStale) {
  const { groups, completions } = page.content.rollouts;
  const wanted = words.toLowerCase(), wantedOf = new Map(), found = new Set();
  for (const index of chosen) {
    const number = groups.chunk[completions.group[index]];
    if (!wantedOf.has(number)) wantedOf.set(number, []);
    wantedOf.get(number).push(index);
  }
  let done = 0;
  for (const [number, members] of wantedOf) {
    const entries = await unpack(`chunk-${number}`);
    if (isStale()) return null;
    const holds = new Map();
    for (const index of members) {
      const group = completions.group[index], entry = entries[groups.slot[group]];
      if (!holds.has(group)) holds.set(group, `${entry.prompt}\n${goldText(entry.gold)}`.toLowerCase().includes(wanted));
      if (holds.get(group) || entry.texts[index - groups.first[group]].toLowerCase().includes(wanted)) found.add(index);
    }
    done += 1;
    if (done % 8 === 0) progress(done / wantedOf.size);
  }
  return chosen.filter(index => found.has(index));
}

const goldText = gold => (gold === null || gold === undefined ? "" : typeof gold === "string" ? gold : JSON.stringify(gold));
