// The group of a trajectory: its prefix tree, its preference matrix, and why each pair was decided.

const GLYPHS = { better: "\u25b2", tie: "=", worse: "\u25bc" };
const outcome = (p) => (p > 0.5 ? "better" : p < 0.5 ? "worse" : "tie");

function reasonOf(body, i, j) {
  return body.reasons[i]?.[j] || body.reasons[j]?.[i] || "";
}

function pairLine(run, group, body, i, j) {
  const p = body.preferences[i][j], word = outcome(p), [a, b] = [group.members[i], group.members[j]];
  const verb = { better: "is better than", tie: "ties with", worse: "is worse than" }[word];
  return el("li", { class: `pair pair-${word}` },
    el("span", { class: "glyph", "aria-hidden": "true" }, GLYPHS[word]), el("b", {}, `#${a.id} ${verb} #${b.id}`),
    [0, 0.5, 1].includes(p) ? null : el("small", {}, ` P = ${number(p)}`),
    el("span", { class: "why" }, visible(reasonOf(body, i, j)) || "the judge left no reason"));
}

function matrix(run, group, body, current, choose) {
  if (!body.preferences) return el("p", { class: "note" }, "No preference matrix: a member of the group could not be read.");
  const pair = el("ul", { class: "pairs", id: "pairs" });
  const others = group.members.map((_, j) => j).filter((j) => j !== current);
  const all = () => pair.replaceChildren(...others.map((j) => pairLine(run, group, body, current, j)));
  all();
  const cell = (i, j) => {
    if (i === j) return el("td", { class: "self" });
    const word = outcome(body.preferences[i][j]);
    const only = (event) => {
      const pressed = event.currentTarget.getAttribute("aria-pressed") === "true";
      for (const other of event.currentTarget.closest("table").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
      event.currentTarget.setAttribute("aria-pressed", String(!pressed));
      if (pressed) all(); else pair.replaceChildren(pairLine(run, group, body, i, j));
    };
    return el("td", { class: `pair-${word}` }, el("button", { type: "button", "data-pair": `${i},${j}`, "aria-pressed": "false", title: `#${group.members[i].id} against #${group.members[j].id}: ${word}`, onclick: only }, GLYPHS[word]));
  };
  const reward = (i, key) => number(body.rollouts[i].reward[key]);
  const parts = [...REWARD_PARTS, ...ownParts(body.rollouts[0].reward)];
  const first = (k) => (k ? null : "gap");
  return [
    el("div", { class: "scroll" }, el("table", { class: "matrix" },
      el("thead", {}, el("tr", {}, el("th", {}), group.members.map((m) => el("th", {}, `#${m.id}`)), parts.map((part, k) => el("th", { class: first(k) }, visible(part))), el("th", {}, "R"), el("th", {}, "adv."))),
      el("tbody", {}, group.members.map((m, i) => el("tr", { class: i === current ? "current" : null },
        el("th", { scope: "row" }, el("button", { type: "button", class: "link", onclick: () => choose(m) }, `#${m.id}`)),
        group.members.map((_, j) => cell(i, j)),
        parts.map((part, k) => el("td", { class: first(k) }, reward(i, part))), el("td", {}, el("b", {}, reward(i, "total"))), el("td", {}, signed(body.rollouts[i].advantage))))))),
    el("p", { class: "note" }, "A row against a column: \u25b2 better, = tie, \u25bc worse. Press a cell for its reason."),
    pair,
  ];
}

// Token position -> x. The shared prompt is squeezed where it would leave no room for what differs.
function tokenScale(length, prompt, width) {
  const share = Math.min(prompt / length, 0.16), rest = Math.max(1, length - prompt);
  return (token) => (token <= prompt ? (prompt ? (token / prompt) * share * width : 0) : (share + ((token - prompt) / rest) * (1 - share)) * width);
}

function prefixTree(group, body, current, choose) {
  const tree = body.tree;
  if (!tree.length) return el("p", { class: "note" }, "No prefix tree: the token ids of this group could not be read.");
  const lane = 24, left = 2, width = 410;
  const length = Math.max(...tree.map((s) => s.end)), prompt = Math.min(...body.rollouts.map((r) => r.steps[0]?.span[0] ?? r.tokens));
  const x = (token) => left + tokenScale(length, prompt, width)(token);
  const below = tree.map(() => []);
  tree.forEach((segment, i) => { if (segment.parent >= 0) below[segment.parent].push(i); });
  const rows = [], y = [];
  const place = (i) => {
    const ends = tree[i].members.filter((m) => !below[i].some((c) => tree[c].members.includes(m)));
    if (ends.length) rows.push({ segment: i, members: ends });
    const own = ends.length ? [rows.length - 1] : [];
    const heights = [...own, ...below[i].map(place)];
    return (y[i] = heights.reduce((a, b) => a + b, 0) / heights.length);
  };
  tree.forEach((segment, i) => { if (segment.parent < 0) place(i); });
  const label = 72 + 30 * Math.max(...rows.map((row) => row.members.length));
  const top = (value) => 16 + value * lane;
  const height = 16 + rows.length * lane;
  const canvas = svg("svg", { viewBox: `0 0 ${left + width + label} ${height}`, class: "tree", role: "img", "aria-label": "Prefix tree of the group" });
  const parts = body.rollouts.map(partsOf);
  tree.forEach((segment, i) => {
    const mine = segment.members.includes(current) ? " mine" : "";
    if (segment.parent >= 0) canvas.append(svg("path", { d: `M${x(segment.start)} ${top(y[segment.parent])}V${top(y[i])}`, class: `fork${mine}` }));
  });
  tree.forEach((segment, i) => {
    const mine = segment.members.includes(current) ? " mine" : "";
    for (const [start, end, part] of parts[segment.members[0]]) {
      const a = Math.max(start, segment.start), b = Math.min(end, segment.end);
      if (b > a) canvas.append(svg("rect", { x: x(a), y: top(y[i]) - 5, width: Math.max(0.8, x(b) - x(a)), height: 10, class: `bar part-${part}${mine}` },
        svg("title", {}, `${part}, tokens ${a}\u2013${b}, ${segment.members.map((m) => `#${group.members[m].id}`).join(" ")}`)));
    }
  });
  body.rollouts.forEach((rollout, m) => {
    if (rollout.fork_position === null) return;
    const i = tree.findIndex((s) => s.members.includes(m) && s.start <= rollout.fork_position && rollout.fork_position <= s.end);
    if (i >= 0) canvas.append(svg("path", { d: `M${x(rollout.fork_position)} ${top(y[i]) - 6}l-4 -6h8z`, class: "fork-mark" }, svg("title", {}, `#${rollout.rollout_id} was forked here from #${rollout.parent_id}`)));
  });
  for (const { segment, members } of rows) {
    const at = x(tree[segment].end) + 6;
    canvas.append(svg("text", { x: at, y: top(y[segment]) + 4, class: "leaf" }, members.map((m, k) => {
      const entry = group.members[m];
      return svg("tspan", { class: m === current ? "mine" : null, "data-leaf": entry.id, onclick: () => choose(entry) }, `${k ? " " : ""}#${entry.id} ${k === members.length - 1 ? visible(entry.status) : ""}`);
    })));
  }
  const forks = tree.filter((s) => s.step !== null);
  return [
    el("div", { class: "keys" }, ["prompt", "plan", "check", "action", "refusal", "observation"].map((part) => el("span", { class: `key part-${part}` }, part)), body.rollouts.some((r) => r.fork_position !== null) ? el("span", { class: "key fork-key" }, "\u25be forked here") : null),
    el("div", { class: "scroll" }, canvas),
    forks.length ? el("details", { class: "forks" }, el("summary", {}, `What parts them (${forks.length} branches)`), el("ul", {}, forks.map((s) => el("li", {},
      el("b", {}, s.members.map((m) => `#${group.members[m].id}`).join(" ")), el("span", { class: `key part-${s.part}` }, `${s.part}, step ${s.step + 1}`), el("code", {}, visible(s.text) || "(ends here)"))))) : null,
  ];
}

function groupPanel(run, group, body, entry, choose) {
  const raw = body.rollouts.reduce((sum, r) => sum + r.tokens, 0), unique = body.tree.reduce((sum, s) => sum + s.end - s.start, 0);
  return el("aside", { class: "group" },
    el("h3", {}, `Group of ${group.members.length}`, unique ? el("small", {}, `${raw.toLocaleString("en-US")} tokens, ${unique.toLocaleString("en-US")} distinct: ${(raw / unique).toFixed(1)}\u00d7 shared`) : null),
    prefixTree(group, body, entry.place, choose),
    matrix(run, group, body, entry.place, choose));
}
