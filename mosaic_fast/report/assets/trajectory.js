// One trajectory, read from top to bottom: plan, check, action and observation told apart by name, line and colour.

const LONG = 2400;  // characters above which a text is cut until asked for

function prose(text, className) {
  const whole = visible(text), node = el("div", { class: className });
  if (whole.length <= LONG) { node.append(whole); return node; }
  const rest = whole.length - LONG;
  node.append(whole.slice(0, LONG), "\u2026 ", el("button", { type: "button", class: "quiet", onclick: () => node.replaceChildren(whole) }, `show ${rest.toLocaleString("en-US")} more characters`));
  return node;
}

const block = (part, label, ...content) => el("section", { class: `block part-${part}` }, el("h4", {}, label), content);

function messageBlock(message) {
  const role = visible(message.role ?? "message");
  const content = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? message, null, 1);
  if (role === "system") return el("details", { class: "block part-prompt" }, el("summary", {}, `system, ${content.length.toLocaleString("en-US")} characters`), prose(content, "text"));
  return block("prompt", role, prose(content, "text"));
}

function argumentsTable(call) {
  const entries = Object.entries(call.arguments ?? {});
  return el("div", { class: "call" }, el("code", { class: "tool" }, visible(call.name)),
    entries.length ? el("dl", {}, entries.map(([key, value]) => [el("dt", {}, visible(key)), el("dd", {}, prose(typeof value === "string" ? value : JSON.stringify(value, null, 1), "mono"))])) : el("span", { class: "note" }, "no arguments"));
}

function actionBlock(step) {
  if (step.action === "refusal") return block("refusal", "refusal", prose(step.call?.arguments?.reason ?? "", "text"));
  if (step.action === "tool_call" && step.call) return block("action", "action: tool call", argumentsTable(step.call));
  if (step.action === "answer") return block("action", "action: final answer", prose(step.answer ?? "", "text"));
  return block("malformed", "malformed: no action could be read", prose(step.text, "mono"));
}

function stepBlocks(step, number) {
  return el("li", { class: "step" },
    el("div", { class: "step-head" }, el("span", {}, `step ${number}`), el("span", {}, `tokens ${step.span[0]}\u2013${step.span[1]}`),
      step.check === null ? el("span", {}, "gate closed") : el("span", { class: "gate-open" }, "gate open"),
      step.well_formed ? null : el("span", { class: "tag harm" }, "tags misplaced")),
    step.plan === null ? null : block("plan", "plan", prose(step.plan, "text")),
    step.check === null ? null : block("check", "safety check", prose(step.check, "text")),
    actionBlock(step),
    step.observation === null ? null : block("observation", "observation, not trained", prose(step.observation, "mono")),
    el("details", { class: "raw" }, el("summary", {}, "as sampled"), prose(step.text, "mono")));
}

function toolsBlock(tools) {
  if (!tools.length) return null;
  const names = tools.map((tool) => String(tool?.function?.name ?? "?")).join(", ");
  return el("details", { class: "block part-prompt" }, el("summary", {}, visible(`tools: ${names}`)),
    prose(tools.map((tool) => JSON.stringify(tool, null, 1)).join("\n"), "mono"));
}

function conversation(body, rollout) {
  return el("ol", { class: "conversation" },
    el("li", { class: "step" }, toolsBlock(body.tools ?? []), body.messages.map(messageBlock)),
    rollout.steps.map((step, i) => stepBlocks(step, i + 1)));
}

const REWARD_PARTS = ["r_align", "r_fmt", "p_len"];
const ownParts = (reward) => Object.keys(reward).filter((name) => name !== "total" && !REWARD_PARTS.includes(name));

function rolloutHead(run, group, entry, rollout, lettered) {
  const fact = (name, value, title) => el("div", { title: title ?? null }, el("dt", {}, name), el("dd", {}, value));
  const reward = rollout.reward, own = ownParts(reward);
  return el("header", { class: "rollout-head" },
    el("h2", {}, lettered ? el("span", { class: `letter letter-${run.letter}` }, run.letter) : null, `Step ${group.step}, rollout ${entry.id}`),
    el("div", { class: "badges" }, statusSign(entry.status), el("span", { class: "tag kind" }, visible(group.kind)), outcomeTags(entry)),
    el("dl", { class: "numbers" },
      fact("R", number(reward.total), ["r_align + r_fmt \u2212 p_len", ...own].join(" + ")), [...REWARD_PARTS, ...own].map((part) => fact(visible(part), number(reward[part]))),
      fact("advantage", signed(rollout.advantage)), fact("progress", percent(rollout.progress)),
      fact("generated", `${entry.tokens} of ${rollout.tokens} tokens`),
      rollout.parent_id === null ? null : fact("forked", `from #${rollout.parent_id} at token ${rollout.fork_position}`),
      Object.entries(rollout.details ?? {}).map(([name, value]) => fact(visible(name).replaceAll("_", " "), typeof value === "number" ? number(value) : visible(JSON.stringify(value))))),
    el("p", { class: "task" }, visible(group.task)));
}
