"""The data contracts of a rollout, in the order they flow: Task -> Request -> Completion -> Step -> Rollout.

A worked example, one rollout of two steps (p prompt, s sampled, o observation):

    token_ids        p p p s s s o o s s        trained   0 0 0 1 1 1 0 0 1 1
    step 0: prompt_end 3, end 6                 step 1: prompt_end 8, end 10
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
Message: TypeAlias = dict[str, JsonValue]
"""An OpenAI chat message: role, content, tool_calls, tool_call_id."""
ToolSchema: TypeAlias = dict[str, JsonValue]
"""An OpenAI tool: {"type": "function", "function": {"name", "description", "parameters"}}."""

TaskKind = Literal["harmful", "benign", "injected"]
Status = Literal["answered", "refused", "truncated", "malformed"]
"""How a rollout ended: final answer, `refusal_tool`, step or token limit, an action that cannot be parsed."""
Action = Literal["tool_call", "refusal", "answer", "malformed"]
"""What a turn of the policy was parsed to; a refusal is a call of `refusal_tool`."""
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Task:
    """One task of an environment. `payload` is the environment's own and never shown to the policy."""

    task_id: str  # unique within environment and split
    kind: TaskKind
    split: str  # "train" or "heldout"
    payload: object = None
    attack: str | None = None  # what words the injected order, where it was chosen for this group


@dataclass(frozen=True)
class ToolCall:
    """A call the policy made, already parsed: arguments is a JSON object."""

    name: str
    arguments: dict[str, JsonValue]


@dataclass(frozen=True)
class Observation:
    """What a tool call returned. `is_error` marks a tool that raised or refused its arguments."""

    content: str
    is_error: bool = False


@dataclass(frozen=True)
class Verdict:
    """What an environment's own checker says of a finished episode.

    `harm`: a harmful side effect happened (an injection followed counts, even with wrong arguments).
    `done`: the user's task is complete. `progress` in [0, 1]: share of it completed (1 when done).
    """

    harm: bool
    done: bool
    progress: float
    details: Mapping[str, float] = field(default_factory=dict)  # more of the checker, logged as is


class Episode(Protocol):
    """One task being acted on: its messages, its tools (they may change in mid-episode), its state.

    Tools that are new after a step are shown to the policy below the text that follows the step.
    """

    messages: Sequence[Message]  # system (may be absent) and user messages that open the episode
    tools: Sequence[ToolSchema]  # without refusal_tool: that one belongs to the agent loop

    def step(self, call: ToolCall) -> Observation:
        """Run one tool call. A tool that raises becomes an error observation; it never raises itself."""
        ...

    def score(self, final_answer: str | None) -> Verdict:
        """Judge the episode as it stands; `final_answer` is None unless the policy gave one."""
        ...


@runtime_checkable
class Dialogue(Protocol):
    """An episode whose user goes on after an answer; one without this method ends with the first answer."""

    def next_user_message(self, final_answer: str) -> str | None:
        """What the user says after an answer; None: nothing more, the answer was the final one."""
        ...


@dataclass(frozen=True)
class Move:
    """One turn of a demonstration: what the agent thinks, and its one action, a call or an answer.

    A refusal is a call of `refusal_tool`. A plan or check of None may be written by the rewriting.
    """

    plan: str | None = None
    check: str | None = None
    call: ToolCall | None = None
    answer: str | None = None
    trained: bool = True  # False: the turn is context only


Moves: TypeAlias = "Sequence[Move] | Generator[Move, str, None]"
"""A demonstration's turns; a generator is sent what the policy is shown after each."""


@runtime_checkable
class Demonstrates(Protocol):
    """An episode that can show how its task is done well."""

    def demonstrate(self) -> Moves:
        """The turns of an agent that does the task, or refuses it where it should be refused."""
        ...


class Environment(Protocol):
    """A source of tasks and episodes."""

    name: str

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split, a pure function of (split, count, seed)."""
        ...

    def reset(self, task: Task) -> Episode:
        """A fresh episode; every rollout of a task gets its own."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Training samples from the whole distribution, so top_p is for those who are served."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    stop_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0  # in (0, 1]: of the most probable tokens, so many that they have this mass together


@dataclass(frozen=True)
class Request:
    """One generation: continue `token_ids`.

    Random draws are keyed by (seed, rollout_key, position), so batch composition changes a token only where
    rounding does. Position is the index in the whole sequence of the token being drawn.
    """

    token_ids: np.ndarray  # [L] int64, L >= 1
    sampling: SamplingParams
    seed: int
    rollout_key: int  # non-negative, unique to a rollout within a step
    group_key: int = 0  # requests that share a long prefix bear the same, so that one server gets them all
    watch: Callable[[int, float], bool] | None = None
    """Told each token but the stop token, with its log-prob, once it is sampled; True: the completion ends
    there. An engine may leave it out: a local one calls it, SGLang's does not."""


@dataclass(frozen=True)
class Completion:
    """What an engine sampled for one request."""

    token_ids: np.ndarray  # [N] int64, the stop token included
    logprobs: np.ndarray  # [N] float32, at the sampling temperature (greedy: temperature 1)
    finish_reason: FinishReason
    cached_tokens: int  # of the request's tokens, those whose keys and values were not computed for it
    prompt_tokens: int  # length of the request
    policy_version: int  # of the weights that made the last token


class Engine(Protocol):
    """Serves the policy. One implementation in process (LocalEngine), one over HTTP (SGLang)."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Sample one completion a request. Concurrent calls are batched together."""
        ...

    async def update_weights(self, version: int) -> None:
        """Serve the trainer's current weights as `version`; the prefix cache is emptied."""
        ...

    async def flush(self) -> None:
        """Empty the prefix cache."""
        ...


class ManagedEngine(Engine, Protocol):
    """An engine as its owner sees it."""

    async def release(self) -> None:
        """Generation is over until the next update_weights: give back what the trainer may need."""
        ...

    def close(self) -> None:
        """End whatever the engine has started. It cannot be used again."""
        ...


@dataclass(frozen=True)
class Step:
    """One turn of the policy: a span of the rollout's tokens and what they were parsed to."""

    prompt_end: int  # tokens [prompt_end, end) were sampled
    end: int
    text: str  # the sampled text
    plan: str | None
    check: str | None  # None: the gate stayed closed
    action: Action
    call: ToolCall | None  # the tool call, where action is tool_call or refusal
    answer: str | None
    observation: str | None  # a tool's output, the user's word after an answer; None at the last step
    safety_tokens: int  # sampled tokens inside <safety_thoughts>, its tags included
    well_formed: bool  # every tag in place
    check_start: int | None = None  # index of the first token after the plan, where fork_at_check forks;
    # where the vocabulary merges the plan's last character with a check's first, that of the merged token


@dataclass(frozen=True)
class Gate:
    """The decision to open the check, taken both ways by rollouts that share what comes before it.

    They are the trunk, whose decision was its own, and siblings of which one side was given the tag and the
    other was drawn until it did not begin with it.
    """

    trunk_id: int  # the rollout whose gate it is
    position: int  # index of the first token after the plan
    tag: tuple[int, ...]  # token ids that open the check
    opened: bool  # whether this rollout goes on with the tag


@dataclass(frozen=True)
class Rollout:
    """One trajectory, as sampled. L tokens."""

    rollout_id: int  # unique within a training step
    group_id: int  # rollouts of one task in one training step
    task: Task
    token_ids: np.ndarray  # [L] int64
    trained: np.ndarray  # [L] bool, True where the policy sampled the token
    rollout_logprobs: np.ndarray  # [L] float32, 0 where not sampled
    steps: tuple[Step, ...]
    status: Status
    verdict: Verdict
    messages: tuple[Message, ...]  # the opening messages as the environment gave them, for judges
    policy_version: int  # of the weights that made the last sampled token
    prompt_tokens: int  # summed over requests
    cached_tokens: int  # summed over requests
    parent_id: int | None = None  # rollout it was forked from
    fork_position: int | None = None  # its tokens before this index were sampled by an ancestor
    gate: Gate | None = None  # the gate that its group contrasts; the tag's log-probs are no engine's then
    tool_errors: int = 0  # calls that came back as an error observation
    shown_messages: tuple[Message, ...] = ()  # the opening messages as the template was given them
    shown_tools: tuple[ToolSchema, ...] = ()  # with them, refusal_tool among them
    fork_refused: bool = False  # it was to be a fork, but its environment did not repeat its trunk's course
    contexts: tuple[int, ...] = ()
    """Of an agent that is a program: where its tokens begin anew. Each part is a sequence by itself: an
    episode may compact its conversation, branch it or hold several. A token that was sampled is trained in
    one of them, and is context in the others."""

    @property
    def generated_tokens(self) -> int:
        return int(self.trained.sum())
