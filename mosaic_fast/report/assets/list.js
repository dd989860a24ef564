// The list of trajectories: filtered, sorted, and drawn only where it is seen.

const ROW = 54;  // pixels, as in page.css

const FILTERS = ["run", "status", "kind", "from", "to", "outcome", "check", "q", "sort"];
const OUTCOMES = { harm: ["harm done", (e) => e.flags & HARM], safe: ["no harm", (e) => !(e.flags & HARM)], done: ["task done, no harm", (e) => e.flags & DONE], undone: ["not done, or harm", (e) => !(e.flags & DONE)] };
const CHECKS = { yes: ["with a check", (e) => e.flags & CHECKED], no: ["without a check", (e) => !(e.flags & CHECKED)], forked: ["forked", (e) => e.flags & FORKED], misformed: ["tags misplaced", (e) => e.flags & MISFORMED] };
const SORTS = {
  step: ["by step", null],
  worst: ["lowest reward", (a, b) => (a.reward ?? 0) - (b.reward ?? 0)],
  best: ["highest reward", (a, b) => (b.reward ?? 0) - (a.reward ?? 0)],
  advantage: ["largest |advantage|", (a, b) => Math.abs(b.advantage ?? 0) - Math.abs(a.advantage ?? 0)],
  long: ["most tokens", (a, b) => b.tokens - a.tokens],
};

const listed = (text) => new Set((text ?? "").split(",").filter(Boolean));

function filtered(runs, state) {
  const statuses = listed(state.status), kinds = listed(state.kind), words = (state.q ?? "").toLowerCase().trim();
  const from = state.from ? +state.from : -Infinity, to = state.to ? +state.to : Infinity;
  const outcome = OUTCOMES[state.outcome]?.[1], check = CHECKS[state.check]?.[1];
  const found = [];
  for (const run of runs) {
    if (state.run && state.run !== run.letter) continue;
    for (const entry of run.rollouts) {
      const group = run.groups[entry.group];
      if (group.step < from || group.step > to) continue;
      if (statuses.size && !statuses.has(entry.status)) continue;
      if (kinds.size && !kinds.has(group.kind)) continue;
      if (outcome && !outcome(entry)) continue;
      if (check && !check(entry)) continue;
      if (words && !group.request.toLowerCase().includes(words) && !group.task.toLowerCase().includes(words)) continue;
      found.push(entry);
    }
  }
  const order = SORTS[state.sort]?.[1];
  return order ? found.sort(order) : found;
}

const STATUS_SIGNS = { answered: "\u25cf", refused: "\u25a0", truncated: "\u25d0", malformed: "\u2715" };
const statusSign = (status) => el("span", { class: `status status-${status in STATUS_SIGNS ? status : "other"}` }, `${STATUS_SIGNS[status] ?? "\u25cb"} ${visible(status)}`);

function outcomeTags(entry) {
  return [
    entry.flags & HARM ? el("span", { class: "tag harm" }, "harm") : null,
    entry.flags & DONE ? el("span", { class: "tag done" }, "done") : null,
    entry.flags & CHECKED ? el("span", { class: "tag checked" }, "check") : null,
    entry.flags & FORKED ? el("span", { class: "tag" }, "fork") : null,
    entry.flags & MISFORMED ? el("span", { class: "tag harm" }, "tags") : null,
  ];
}

function counted(runs, value) {
  const counts = new Map();
  for (const run of runs) for (const entry of run.rollouts) counts.set(value(run, entry), (counts.get(value(run, entry)) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]);
}

function filterBar(runs, state, change) {
  const chips = (key, options) => el("div", { class: "chips", role: "group", "aria-label": key }, options.map(([value, count]) => {
    const button = el("button", { type: "button", class: "chip", "data-filter": key, "data-value": value, onclick: () => {
      const chosen = listed(state()[key]);
      if (!chosen.delete(value)) chosen.add(value);
      change({ [key]: [...chosen].join(",") });
    } }, visible(value), el("small", {}, count.toLocaleString("en-US")));
    return button;
  }));
  const select = (key, all, options) => el("select", { "data-filter": key, "aria-label": key, onchange: (event) => change({ [key]: event.target.value }) },
    all ? el("option", { value: "" }, all) : null, Object.entries(options).map(([value, [label]]) => el("option", { value }, label)));
  const field = (key, attributes) => el("input", { "data-filter": key, ...attributes, oninput: (event) => change({ [key]: event.target.value.trim() }) });
  return el("div", { class: "filters" },
    field("q", { type: "search", placeholder: "Search requests and task ids  ( / )", "aria-label": "Search" }),
    runs.length > 1 ? chips("run", runs.map((run) => [run.letter, run.rollouts.length])) : null,
    chips("status", counted(runs, (run, entry) => entry.status)),
    chips("kind", counted(runs, (run, entry) => run.groups[entry.group].kind)),
    el("div", { class: "selects" },
      el("label", {}, "step", field("from", { type: "number", min: 0, placeholder: "from", "aria-label": "From step" }), "\u2013", field("to", { type: "number", min: 0, placeholder: "to", "aria-label": "To step" })),
      select("outcome", "any outcome", OUTCOMES), select("check", "any path", CHECKS), select("sort", null, SORTS),
      el("button", { type: "button", class: "quiet", id: "clear", onclick: () => change(Object.fromEntries(FILTERS.map((key) => [key, ""]))) }, "clear")));
}

// The controls show what the address says.
function showFilters(bar, state) {
  for (const control of bar.querySelectorAll("[data-filter]")) {
    const key = control.dataset.filter;
    if (control.tagName === "BUTTON") control.setAttribute("aria-pressed", key === "run" ? state.run === control.dataset.value : listed(state[key]).has(control.dataset.value));
    else if (control !== document.activeElement || control.tagName === "SELECT") control.value = state[key] || (key === "sort" ? "step" : "");
  }
}

class VirtualList {
  constructor(runs, open) {
    this.runs = runs;
    this.entries = [];
    this.selected = null;
    this.rows = el("div", { class: "rows" });
    this.node = el("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "Trajectories", onscroll: () => this.draw() }, this.rows);
    this.open = open;
    this.node.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.floor(this.node.clientHeight / ROW) - 1);
      const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      this.move(by);
    });
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  show(entries, selected) {
    this.entries = entries;
    this.selected = selected;
    this.rows.style.height = `${entries.length * ROW}px`;
    this.draw();
  }

  reveal() {
    const at = this.entries.indexOf(this.selected) * ROW, { scrollTop, clientHeight } = this.node;
    if (at < 0) return;
    if (at < scrollTop || at + ROW > scrollTop + clientHeight) this.node.scrollTop = at - clientHeight / 2 + ROW / 2;
  }

  move(by) {
    if (!this.entries.length) return;
    const at = this.entries.indexOf(this.selected);
    const to = Math.min(this.entries.length - 1, Math.max(0, at + by));
    this.open(this.entries[to]);
  }

  draw() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / ROW) - 4);
    const last = Math.min(this.entries.length, first + Math.ceil(this.node.clientHeight / ROW) + 8);
    this.rows.replaceChildren(...this.entries.slice(first, last).map((entry, i) => this.row(entry, first + i)));
    if (!this.entries.length) this.rows.replaceChildren(el("p", { class: "empty" }, "No trajectory matches the filters."));
  }

  row(entry, at) {
    const group = this.runs[entry.run].groups[entry.group], chosen = entry === this.selected;
    const row = el("div", { class: "row", role: "option", "aria-selected": String(chosen), "data-at": `${group.step}.${entry.id}`, "data-run": this.runs[entry.run].letter, onclick: () => this.open(entry) },
      el("div", { class: "row-head" },
        this.runs.length > 1 ? el("span", { class: `letter letter-${"AB"[entry.run]}` }, "AB"[entry.run]) : null,
        statusSign(entry.status), el("span", { class: "tags" }, outcomeTags(entry)),
        el("span", { class: "where" }, `step ${group.step} \u00b7 #${entry.id}`),
        el("span", { class: "reward", title: "reward R" }, number(entry.reward))),
      el("div", { class: "request" }, el("span", { class: "kind" }, visible(group.kind)), group.request || visible(group.task)));
    row.style.top = `${at * ROW}px`;
    return row;
  }
}
