// The first view: what the policy does by checks that no judge makes, then rewards, time, tokens and sharing.

const RATES = [
  ["safety/harmful_refused", "harmful tasks refused, no harm done", "green"],
  ["safety/injection_harm", "injected tasks: attack succeeded", "red"],
  ["safety/benign_done", "benign tasks completed", "blue"],
  ["safety/injected_done", "injected tasks completed", "sky"],
  ["safety/benign_refused", "benign tasks refused", "orange"],
  ["rollout/format_valid", "valid format", "grey"],
];

const CHARTS = [
  { title: "What it does: harm", note: "Training rollouts; checked by the environment, no judge involved.", format: percent, low: 0, high: 1, smooth: true,
    metrics: [["safety/harmful_refused", "harmful refused", "green"], ["safety/injection_harm", "injection harm", "red"], ["safety/benign_refused", "benign refused", "orange"]] },
  { title: "What it does: completion", note: "An agent that does nothing harms nobody: read it beside harm.", format: percent, low: 0, high: 1, smooth: true,
    metrics: [["safety/benign_done", "benign done", "blue"], ["safety/injected_done", "injected done", "sky"], ["rollout/format_valid", "valid format", "grey"]] },
  { title: "Held out", note: "Greedy, on tasks that training never sees: before, during and after.", format: percent, low: 0, high: 1, heldout: true },
  { title: "The learned gate", note: "Share of steps with a safety check, and of safety tokens among all generated.", format: percent, low: 0, high: 1, smooth: true,
    metrics: [["rollout/gate_rate_harmful", "harmful", "green"], ["rollout/gate_rate_injected", "injected", "red"], ["rollout/gate_rate_benign", "benign", "blue"], ["rollout/safety_token_share", "safety tokens", "grey"]] },
  { title: "Learning from demonstrations", note: "A cold start: nats a trained token.", low: 0, smooth: true,
    metrics: [["policy/nll", "nats a token", "blue"], ["heldout/nll", "held out", "orange"]] },
  { title: "Reward parts", note: "r_align has a fixed mean: what one rollout wins, another loses.", low: 0, smooth: true,
    metrics: [["reward/align", "r_align", "purple"], ["reward/format", "r_fmt", "blue"], ["reward/length_penalty", "p_len", "orange"]] },
  { title: "Signal", note: "Groups of ties teach nothing; the spread of R drives the advantages.", low: 0, smooth: true,
    metrics: [["reward/tied_groups_frac", "groups of ties", "grey"], ["reward/total_std", "spread of R", "purple"], ["judge/flip_rate", "orders disagree", "orange"], ["judge/intransitive_frac", "intransitive triples", "red"]] },
  { title: "Time", note: "Seconds a step.", stacked: true,
    metrics: [["time/rollout_s", "roll out", "blue"], ["time/judge_s", "judge", "orange"], ["time/update_s", "update", "green"], ["time/checkpoint_s", "checkpoint", "grey"]] },
  { title: "Token budget", note: "Mean tokens of a rollout, by part; only plan, check and action are trained.", stacked: true, budget: true },
  { title: "Sharing", note: "Tokens of the step's rollouts over distinct ones, and what that can save in arithmetic.", format: (v) => `${number(v)}\u00d7`,
    metrics: [["tree/sharing", "raw / unique", "blue"], ["tree/ideal_speedup", "arithmetic ideal", "grey"]] },
  { title: "Prefix cache", note: "Prompt tokens that the engine did not compute, against what the prefix tree allows.", format: percent,
    metrics: [["tree/engine_prefix_hit", "hit", "blue"], ["tree/engine_prefix_hit_ideal", "ideal", "grey"]] },
  { title: "Policy", metrics: [["policy/kl", "KL to the reference", "blue"], ["policy/entropy", "entropy", "green"], ["policy/clip_frac", "clipped", "orange"]] },
  { title: "Gradient norm", metrics: [["optim/grad_norm", "norm before clipping", "blue"]] },
];

const BUDGET = [["prompt", "prompt", "prompt"], ["plan", "plan", "plan"], ["check", "check", "check"], ["action", "action", "action"], ["observation", "observation", "observation"]];
const TONES = ["blue", "orange", "green", "purple", "red", "sky", "grey"];

function column(run, name) {
  const steps = run.metrics.step ?? [], values = run.metrics[name] ?? [];
  return steps.map((step, i) => [step, values[i]]).filter(([, value]) => value !== null && value !== undefined);
}

// The evaluations before and after training are points of the curve too, unless one was made at that very step.
function heldoutPoints(run, name) {
  const points = new Map(column(run, `heldout/${name}`)), { before, after, steps } = run.summary;
  if (before?.[name] !== undefined && !points.has(0)) points.set(0, before[name]);
  if (after?.[name] !== undefined && steps) points.set(steps, after[name]);
  return [...points].sort((a, b) => a[0] - b[0]);
}

// A user's parts of the reward, module:function in the configuration, each with a metric of the function's name.
function ownRewards(runs) {
  const named = new Set(runs.flatMap((run) => run.config["reward.parts"] ?? []).filter((part) => part.includes(":")));
  return [...named].map((part, i) => {
    const name = part.split(":").pop();
    return [`reward/${name}`, visible(name), TONES[(i + 2) % TONES.length]];
  });
}

function seriesOf(spec, runs) {
  const letter = (run) => (runs.length > 1 ? run.letter : null);
  if (spec.budget) {
    return runs.slice(0, 1).flatMap((run) => BUDGET.map(([, label, tone], i) => (
      { label, tone, run: 0, points: run.budget.map((row) => [row[0], row[i + 1]]) })));
  }
  if (spec.heldout) {
    return RATES.flatMap(([name, , tone]) => runs.map((run) => (
      { label: name.split("/")[1].replaceAll("_", " "), letter: letter(run), tone, run: run.number, points: heldoutPoints(run, name), dots: true })));
  }
  const chosen = spec.stacked ? runs.slice(0, 1) : runs;
  const metrics = spec.title === "Reward parts" ? [...spec.metrics, ...ownRewards(runs)] : spec.metrics;
  return metrics.flatMap(([name, label, tone]) => chosen.map((run) => (
    { label, letter: letter(run), tone, run: run.number, points: column(run, name), smooth: spec.smooth })));
}

function drawChart(spec, runs) {
  if (runs.length === 1 || !spec.stacked) return [chart({ ...spec, series: seriesOf(spec, runs) })];
  return runs.map((run) => chart({ ...spec, title: `${spec.title}, run ${run.letter}`, series: seriesOf(spec, [run]) }));
}

function overview(runs) {
  return el("div", { class: "overview" },
    runs.map((run) => runHead(run, runs.length > 1)),
    heldoutTable(runs),
    el("section", { class: "charts", "aria-label": "Curves" }, CHARTS.flatMap((spec) => drawChart(spec, runs))),
    everyMetric(runs),
    configTable(runs));
}

function runHead(run, lettered) {
  const s = run.summary, steps = run.metrics.step ?? [];
  const facts = [
    `${steps.length} step${steps.length === 1 ? "" : "s"}`,
    run.rollouts.length ? `${run.rollouts.length.toLocaleString("en-US")} trajectories` : null,
    s.seed !== undefined ? `seed ${s.seed}` : null,
    s.train_s !== undefined ? `${number(s.train_s)} s of training` : null,
    run.config["model.path"] ? `model ${run.config["model.path"]}` : null,
    run.config["rollout.branching"] ?? null,
    run.config["judge.name"] ? `judge ${run.config["judge.name"]}` : null,
  ];
  return el("section", { class: "run-head" },
    el("h2", {}, lettered ? el("span", { class: `letter letter-${run.letter}` }, run.letter) : null, visible(run.name)),
    el("p", { class: "facts" }, facts.filter(Boolean).map((fact) => el("span", {}, visible(fact)))),
    run.notes.length ? el("ul", { class: "notes" }, run.notes.map((note) => el("li", {}, visible(note)))) : null);
}

// Wilson score interval, 95%.
function wilson(hits, total) {
  const z = 1.96, p = hits / total, scale = 1 + (z * z) / total;
  const centre = (p + (z * z) / (2 * total)) / scale;
  const half = (z / scale) * Math.sqrt((p * (1 - p)) / total + (z * z) / (4 * total * total));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

function heldoutTable(runs) {
  const columns = runs.flatMap((run) => ["before", "after"].map((when) => (
    { run, when, counts: run.summary.counts?.[when] ?? {}, values: run.summary[when] ?? {} }))).filter((c) => Object.keys(c.values).length);
  if (!columns.length) return null;
  const title = (c) => (runs.length > 1 ? `${c.run.letter} ${c.when}` : c.when);
  const cell = (c, name, tone) => {
    const { counts, values, when } = c;
    const value = values[name];
    if (value === undefined || value === null) return el("td", { "data-column": title(c) }, "\u2013");
    const interval = counts[name] ? wilson(...counts[name]) : null;
    const at = (v) => 4 + 112 * v;
    return el("td", { "data-column": title(c) },
      svg("svg", { viewBox: "0 0 120 14", width: 120, height: 14, class: "range", "aria-hidden": "true" },
        svg("line", { x1: 4, x2: 116, y1: 7, y2: 7, class: "grid" }),
        interval ? svg("line", { x1: at(interval[0]), x2: at(interval[1]), y1: 7, y2: 7, class: `line tone-${tone}` }) : null,
        svg("circle", { cx: at(value), cy: 7, r: 4, class: `dot tone-${tone}${when === "before" ? " hollow" : ""}` })),
      el("b", {}, percent(value)),
      interval ? el("small", {}, `${percent(interval[0])}\u2013${percent(interval[1])}`) : null);
  };
  const rows = RATES.filter(([name]) => columns.some((c) => name in c.values));
  const tasks = runs[0].summary.eval_tasks;
  return el("section", { class: "card" },
    el("h3", {}, "Held-out tasks, greedy"),
    el("p", { class: "note" }, `${tasks ? `${tasks} tasks that training never sees; ` : ""}checked by the environment, no judge involved. 95% Wilson intervals.`),
    el("div", { class: "scroll" }, el("table", { class: columns.length > 2 ? "heldout four" : "heldout" },
      el("thead", {}, el("tr", {}, el("th", {}), columns.map((c) => el("th", {}, title(c))))),
      el("tbody", {}, rows.map(([name, label, tone]) => el("tr", {}, el("th", { scope: "row" }, label), columns.map((c) => cell(c, name, tone))))))));
}

// Every metric there is, drawn when asked for: also those this page has no words for.
function everyMetric(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name !== "step").sort();
  if (!names.length) return null;
  const grid = el("div", { class: "charts" });
  const search = el("input", { type: "search", placeholder: "for example tree/ or entropy", "aria-label": "Filter metrics" });
  const draw = () => grid.replaceChildren(...names.filter((name) => name.includes(search.value.trim())).slice(0, 60).map((name) => chart({
    title: visible(name), series: runs.map((run, i) => ({ label: runs.length > 1 ? run.letter : "value", letter: null, tone: TONES[i], run: run.number, points: column(run, name) })),
  })).filter(Boolean));
  search.addEventListener("input", draw);
  return el("details", { class: "card", ontoggle: (event) => { if (event.target.open && !grid.childElementCount) draw(); } },
    el("summary", {}, `Every metric (${names.length})`), search, grid);
}

function configTable(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  if (!keys.length) return null;
  const written = (value) => (value === undefined ? "\u2013" : visible(typeof value === "string" ? value : JSON.stringify(value)));
  const differs = (key) => runs.length > 1 && new Set(runs.map((run) => written(run.config[key]))).size > 1;
  return el("details", { class: "card", open: runs.length > 1 && keys.some(differs) },
    el("summary", {}, runs.length > 1 ? `Configuration (${keys.filter(differs).length} values differ)` : "Configuration"),
    el("div", { class: "scroll" }, el("table", { class: "config" },
      el("tbody", {}, [...keys.filter(differs), ...keys.filter((key) => !differs(key))].map((key) => el("tr", { class: differs(key) ? "differs" : null },
        el("th", { scope: "row" }, visible(key)), runs.map((run) => el("td", {}, written(run.config[key])))))))));
}
