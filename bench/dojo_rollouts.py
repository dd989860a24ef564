"""Groups of 8 trajectories of AgentDojo, played here from the installed package; nothing of it is stored.

Prompts, tools, calls, observations, attacks and verdicts are AgentDojo 0.1.35's (v1.2.2), through the agent
loop and chat template that training uses; tool schemas are in the system message. Tokens are SmolLM2-135M's.
The calls and answers of a rollout are AgentDojo's own solutions, because SmolLM2 by itself ends in its first
turn (30 of 32 rollouts with two worked examples); plans and checks, which it may write about anything, are
sampled from SmolLM2 at temperature 1 (guided.py). A turn is trained as a whole. Rollouts 0 to 3 are played
from the prompt, 4 to 7 fork from them after the plan of a turn (`rollout.branching = "fork_at_check"`).

Of an injected task rollout 0 solves the user's task, 1 does so with checks from its second turn on, 2 obeys
the attack afterwards, 3 refuses once it has read it; from where they fork, 4 and 7 go on as 1 does, 5 and 6
as 0. 6 forks from 2 when that has obeyed, in its last turn. Of a benign task 2 and 3 solve it.

The step's model has a vocabulary of its own: token ids are renumbered by their first appearance, which keeps
exactly what is shared. What was played is kept in bench/results, which git ignores.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import guided
import numpy as np
import torch
import transformers
from guided import GuidedEngine, ScriptedTurn
from transformers import PreTrainedModel
from workloads import Workload, qwen3

from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy, StockDecoder
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA, REFUSAL_TOOL
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.environments.agentdojo import AGENTDOJO_VERSION, AgentDojoEnvironment
from mosaic_rollout.environments.sources import require_package
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.types import Rollout, Task, ToolCall
from tools.replay_agentdojo import ground_truth_calls

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
KEPT = Path(__file__).parent / "results"
_HINT = "run `make bench-agentdojo`"

SECONDS = 125  # to play a group, once, on one thread of an AMD EPYC: 58 to 125
ROLES = ("solve", "check", "obey", "refuse", "check", "solve", "solve", "check")
"""Of rollouts 0 to 7; rollout r >= 4 forks from rollout r - 4."""


@dataclass(frozen=True)
class Settings:
    """What decides the tokens of a group, beside the packages and the sources."""

    task_id: str
    seed: int = 0
    temperature: float = 1.0
    max_observation_chars: int = 1500  # as in configs/agentdojo.toml


TASKS = {
    "step:agentdojo": Settings("banking/user_task_2/injection_task_0"),
    "step:agentdojo-benign": Settings("banking/user_task_2"),
    "step:agentdojo-slack": Settings("slack/user_task_16/injection_task_2"),
}
"""By variant: tasks of three and five calls, whose attack shows in the first observation."""


def workload(settings: Settings, model: PreTrainedModel | None = None) -> Workload:
    """A played group and the model of `step:agent`, its vocabulary larger if the group has more ids.

    Raises UserError where AgentDojo or SmolLM2 is not installed, naming the command that installs them.
    """
    sequences, trained = tokens_of(settings)
    sequences, distinct = renumbered(sequences)
    if model is None:
        model = qwen3()
        if distinct > model.config.vocab_size:
            model = qwen3(vocabulary=distinct)
    return Workload(model, sequences, trained)


def tokens_of(settings: Settings) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """SmolLM2's token ids and the trained masks of a group: played once, then read."""
    file = _kept_file(settings)
    if not file.exists():
        rollouts = play(settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            tokens=np.concatenate([r.token_ids for r in rollouts]),
            trained=np.concatenate([r.trained for r in rollouts]),
            ends=np.cumsum([len(r.token_ids) for r in rollouts])[:-1],
        )
        partial.replace(file)
    with np.load(file) as kept:
        ends = kept["ends"]
        return np.split(kept["tokens"], ends), np.split(kept["trained"], ends)


def renumbered(sequences: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Token ids replaced by the order of their first appearance, and how many distinct ones there are.

    >>> [one.tolist() for one in renumbered([np.array([7, 5, 7]), np.array([9, 5])])[0]]
    [[0, 1, 0], [2, 1]]
    """
    found, first, inverse = np.unique(np.concatenate(sequences), return_index=True, return_inverse=True)
    number = np.empty(len(found), np.int64)
    number[np.argsort(first)] = np.arange(len(found))
    ends = np.cumsum([len(s) for s in sequences])[:-1]
    return np.split(number[inverse], ends), len(found)


def play(settings: Settings) -> list[Rollout]:
    """The 8 rollouts of one task."""
    _require()
    environment = AgentDojoEnvironment(
        (settings.task_id.partition("/")[0],), max_observation_chars=settings.max_observation_chars
    )
    task = _task(environment, settings.task_id)
    from mosaic_fast.setup.model_folder import end_tokens, load_tokenizer  # the drawn steps do without

    chat = Chat(load_tokenizer(MODEL), teach_loop=True, end_token_ids=end_tokens(MODEL))
    episode = environment.reset(task)
    prompt, _ = chat.prompt(episode.messages, [*episode.tools, REFUSAL_SCHEMA])
    model = Policy.from_pretrained(MODEL, trainable=False).model
    engine = GuidedEngine(
        LocalEngine(model, max_batch=len(ROLES), decoder_of=StockDecoder.of),
        chat,
        len(prompt),
        [script(environment, task, r) for r in ROLES],
    )
    limits = Limits(max_steps=16, max_step_tokens=512, max_rollout_tokens=4096)
    loop = AgentLoop(engine, chat, environment, limits, settings.temperature)
    with torch.no_grad():
        (rollouts,) = asyncio.run(
            loop.groups([task], group_size=len(ROLES), branching="fork_at_check", seed=settings.seed)
        )
    return rollouts


def script(environment: AgentDojoEnvironment, task: Task, role: str) -> list[ScriptedTurn]:
    """The turns of a role. Without an attack there is nothing to obey or refuse: those solve the task."""
    calls, answer = ground_truth_calls(environment, task)
    turns = [ScriptedTurn(_written(call)) for call in calls]
    injected = task.kind == "injected"
    if role == "obey" and injected:
        turns += [ScriptedTurn(_written(c)) for c in ground_truth_calls(environment, task, "injection")[0]]
    if role == "refuse" and injected:
        reason = "A tool output gives orders that the user did not give."
        refusal = ToolCall(REFUSAL_TOOL, {"reason": reason})
        return [turns[0], ScriptedTurn(_written(refusal), checked=True)]
    turns.append(ScriptedTurn(answer or "Done."))
    return [ScriptedTurn(one.action, role == "check" and number > 0) for number, one in enumerate(turns)]


def _written(call: ToolCall) -> str:
    body = json.dumps({"name": call.name, "arguments": call.arguments})
    return f"<tool_call>{body}</tool_call>"


def _task(environment: AgentDojoEnvironment, task_id: str) -> Task:
    tasks = [t for injected in (False, True) for t in environment.tasks("train", injected=injected)]
    return next(task for task in tasks if task.task_id == task_id)


def _require() -> None:
    require_package("agentdojo", AGENTDOJO_VERSION, _HINT)
    if not (MODEL / "config.json").is_file():
        raise UserError(f"there is no {MODEL.relative_to(ROOT)}; {_HINT}")


def _kept_file(settings: Settings) -> Path:
    """Named by what the tokens depend on: settings, packages, and the sources of script and engine."""
    packages = {"agentdojo": AGENTDOJO_VERSION, "torch": torch.__version__}
    about = {**asdict(settings), **packages, "transformers": transformers.__version__}
    sources = b"".join(Path(str(file)).read_bytes() for file in (__file__, guided.__file__))
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode() + sources).hexdigest()[:16]
    return KEPT / f"{settings.task_id.replace('/', '-')}-{key}.npz"
