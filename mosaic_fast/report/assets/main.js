// The address says what is shown: #view=trajectories&run=A&at=3.7&status=refused. Everything follows from it.

const state = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function go(changes, { push = false } = {}) {
  const next = { ...state(), ...changes };
  const hash = new URLSearchParams(Object.entries(next).filter(([, value]) => value !== "" && value !== null && value !== undefined));
  history[push ? "pushState" : "replaceState"](null, "", `#${hash}`);
  render();
}

let runs = [];
let views = {};

// The entry an address names: `at` is step.rollout, `of` the letter of its run.
function entryAt(current) {
  const run = runs.find((one) => one.letter === (current.of || "A")) ?? runs[0];
  return run.named.get(current.at ?? "") ?? null;
}

// The same task in the other run, at the same step if it was drawn there, else at the nearest one.
function counterpart(entry) {
  const run = runs[entry.run], other = runs[1 - entry.run], { step, task } = run.groups[entry.group];
  const same = other.groups.filter((group) => group.task === task).sort((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step));
  return same.length ? same[0].members[Math.min(entry.place, same[0].members.length - 1)] : null;
}

const open = (entry) => go({ view: "trajectories", at: `${runs[entry.run].groups[entry.group].step}.${entry.id}`, of: runs.length > 1 ? runs[entry.run].letter : "" }, { push: true });

async function pane(entry, choose) {
  const run = runs[entry.run], group = run.groups[entry.group], body = await bodyOf(run, group), rollout = body.rollouts[entry.place];
  return el("article", { class: "pane" }, rolloutHead(run, group, entry, rollout, runs.length > 1),
    el("div", { class: "columns" }, conversation(body, rollout), groupPanel(run, group, body, entry, choose)));
}

// What is shown before anything was chosen: a rollout of the latest group whose members did both harm and none,
// else whose members ended differently.
function instructive(entries) {
  let best = null, most = -1;
  for (const entry of entries) {
    const { members, step } = runs[entry.run].groups[entry.group];
    const kinds = (of) => new Set(members.map(of)).size > 1 ? 1 : 0;
    const score = (2 * kinds((one) => one.flags & 1) + kinds((one) => one.status)) * 1e9 + step;
    if (score > most) { best = entry; most = score; }
  }
  return best;
}

let drawn = 0;

async function showDetail(detail, entry, current) {
  const turn = ++drawn;
  if (!entry) { detail.replaceChildren(el("p", { class: "empty" }, runs.some((run) => run.rollouts.length) ? "Choose a trajectory: click, or j and k." : "This run has no trajectories.")); return; }
  const beside = runs.length > 1 && current.beside === "1";
  const second = beside ? counterpart(entry) : null;
  const panes = [await pane(entry, open)];
  if (second) panes.push(await pane(second, open));
  else if (beside) panes.push(el("p", { class: "empty" }, `Run ${runs[1 - entry.run].letter} has no rollout of this task.`));
  if (turn !== drawn) return;  // another trajectory was chosen meanwhile
  const bar = el("div", { class: "detail-bar" },
    el("button", { type: "button", class: "quiet back", onclick: () => go({ at: "", of: "" }, { push: true }) }, "\u2190 list"),
    runs.length > 1 ? el("button", { type: "button", class: "chip", id: "beside", "aria-pressed": String(beside), onclick: () => go({ beside: beside ? "" : "1" }) }, "side by side") : null);
  const stays = detail.dataset.at === `${entry.run}.${entry.index}`;
  const scroll = stays ? detail.scrollTop : 0;
  detail.dataset.at = `${entry.run}.${entry.index}`;
  detail.replaceChildren(bar, el("div", { class: beside ? "panes two" : "panes" }, panes));
  detail.scrollTop = scroll;
}

function browser() {
  const bar = filterBar(runs, state, (changes) => go(changes));
  const count = el("p", { class: "count", id: "count", role: "status" });
  const list = new VirtualList(runs, open);
  const detail = el("div", { class: "detail", id: "detail", tabindex: -1 });
  const node = el("div", { class: "browser" }, el("div", { class: "side" }, bar, count, list.node), detail);
  let shown = null;
  return { node, list, bar, show(current) {
    const key = FILTERS.map((name) => current[name] ?? "").join("\u0000");
    const entry = entryAt(current);
    if (key !== shown) { list.entries = filtered(runs, current); list.node.scrollTop = 0; shown = key; }
    list.show(list.entries, entry);
    list.reveal();
    showFilters(bar, current);
    const total = runs.reduce((sum, run) => sum + run.rollouts.length, 0);
    count.textContent = `${list.entries.length.toLocaleString("en-US")} of ${total.toLocaleString("en-US")} trajectories`;
    node.classList.toggle("reading", Boolean(entry));
    return showDetail(detail, entry ?? instructive(list.entries), current);
  } };
}

function render() {
  const current = state(), trajectories = current.view === "trajectories";
  const main = byId("main");
  if (trajectories) views.browser ??= browser(); else views.overview ??= overview(runs);
  const node = trajectories ? views.browser.node : views.overview;
  if (main.firstChild !== node) main.replaceChildren(node);
  document.body.classList.toggle("wide", trajectories);
  byId("tab-overview").setAttribute("aria-current", trajectories ? "false" : "page");
  byId("tab-trajectories").setAttribute("aria-current", trajectories ? "page" : "false");
  if (trajectories) views.browser.show(current).catch(fail);
}

const KEYS = [["j  k", "next, previous trajectory"], ["[  ]", "previous, next rollout of the group"], ["/", "search"], ["s", "two runs side by side"], ["o  t", "overview, trajectories"], ["Esc", "back to the list"], ["?", "this help"]];

function shortcuts(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const current = state(), entry = entryAt(current), trajectories = current.view === "trajectories";
  const sibling = (by) => { if (entry) { const { members } = runs[entry.run].groups[entry.group]; open(members[(entry.place + by + members.length) % members.length]); } };
  const actions = {
    o: () => go({ view: "overview" }, { push: true }),
    t: () => go({ view: "trajectories" }, { push: true }),
    "?": () => byId("help").showModal(),
    ...(trajectories ? {
      j: () => views.browser.list.move(1), k: () => views.browser.list.move(-1),
      "[": () => sibling(-1), "]": () => sibling(1),
      "/": () => views.browser.bar.querySelector("[data-filter=q]").focus(),
      s: () => { if (runs.length > 1) go({ beside: current.beside === "1" ? "" : "1" }); },
      Escape: () => go({ at: "", of: "" }, { push: true }),
    } : {}),
  };
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
}

function fail(error) {
  byId("main").replaceChildren(el("p", { class: "empty" }, `The page cannot be read: ${error.message}. It needs a browser of 2023 or later, and the whole file.`));
}

async function start() {
  runs = (await unpack("index")).map(readRun);
  const name = runs.map((run) => visible(run.name)).join(" and ");
  document.title = `${name} \u2013 mosaic_fast`;
  byId("title").replaceChildren("mosaic_fast ", el("small", {}, name));
  byId("help").append(el("h2", {}, "Keyboard"), el("dl", {}, KEYS.map(([keys, what]) => [el("dt", {}, el("kbd", {}, keys)), el("dd", {}, what)])),
    el("form", { method: "dialog" }, el("button", {}, "close")));
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  for (const view of ["overview", "trajectories"]) {
    byId(`tab-${view}`).addEventListener("click", (event) => { event.preventDefault(); go({ view }, { push: true }); });
  }
  addEventListener("popstate", render);
  addEventListener("hashchange", render);
  addEventListener("keydown", shortcuts);
  render();
}

start().catch(fail);
