// The run's data: an index in memory, bodies of groups unpacked a chunk at a time.

async function unpack(id) {
  const packed = atob(byId(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const HARM = 1, DONE = 2, CHECKED = 4, FORKED = 8, MISFORMED = 16;

// One entry of the list a rollout. `group` is the place of its group in run.groups.
function readRun(raw, number) {
  const groups = raw.groups.map(([step, task, kind, request, chunk, place]) => ({
    step, task, kind, request: visible(request), chunk, place, members: [],
  }));
  const rollouts = raw.rollouts.map(([group, place, id, status, flags, reward, advantage, tokens, steps], index) => {
    const entry = { run: number, index, group, place, id, status, flags, reward, advantage, tokens, steps };
    groups[group].members.push(entry);
    return entry;
  });
  const named = new Map(rollouts.map((entry) => [`${groups[entry.group].step}.${entry.id}`, entry]));
  return { ...raw, number, groups, rollouts, named, letter: "AB"[number] };
}

const KEPT_CHUNKS = 12;
const chunks = new Map();

function bodyOf(run, group) {
  const id = `chunk-${run.number}-${group.chunk}`;
  const found = chunks.get(id) ?? unpack(id);
  chunks.delete(id);
  chunks.set(id, found);
  if (chunks.size > KEPT_CHUNKS) chunks.delete(chunks.keys().next().value);
  return found.then((bodies) => bodies[group.place]);
}

// Tokens of a rollout as [start, end, part], in order.
function partsOf(rollout) {
  const parts = [];
  let before = 0, kind = "prompt";
  const add = (start, end, part) => { if (end > start) parts.push([start, end, part]); };
  for (const step of rollout.steps) {
    const [start, end] = step.span;
    const check = Math.min(Math.max(step.check_start ?? start, start), end);
    const action = Math.min(check + step.safety_tokens, end);
    add(before, start, kind);
    add(start, check, "plan");
    add(check, action, "check");
    add(action, end, step.action === "refusal" ? "refusal" : "action");
    before = end;
    kind = "observation";
  }
  add(before, rollout.tokens, kind);
  return parts;
}
