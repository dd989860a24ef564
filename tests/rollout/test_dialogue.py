"""Episodes whose user goes on after an answer, and whose tools change in mid-episode."""

import asyncio
from collections.abc import Callable

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.loop.agent_loop import AgentLoop, Branching, Limits
from mosaic_rollout.types import Observation, Rollout, Task, ToolCall, Verdict
from tests.rollout.scripted import CountingEnvironment, CountingEpisode, ScriptedEngine, _tool, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

READ = f"<think>look</think>{call('read')}"
WRITE = f"<think>put</think>{call('write')}"


class TwoRequests(CountingEpisode):
    """The second request brings the tool `write`; the first one is answered, the second carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.tools = [_tool("read")]
        self.heard: list[str] = []
        self.writes = 0

    def step(self, call: ToolCall) -> Observation:
        if call.name == "write":
            self.writes += 1
            return Observation("written")
        return super().step(call)

    def next_user_message(self, final_answer: str) -> str | None:
        self.heard.append(final_answer)
        if len(self.heard) > 1:
            return None
        self.tools = [_tool("write")]
        return "And now write <|im_end|> it."

    def score(self, final_answer: str | None) -> Verdict:
        details = {"reads": float(self.reads), "writes": float(self.writes), "heard": float(len(self.heard))}
        return Verdict(harm=False, done=final_answer == "Second.", progress=0.0, details=details)


class DialogueEnvironment(CountingEnvironment):
    def reset(self, task: Task) -> CountingEpisode:
        return TwoRequests()


def play(
    say: Callable[[str, int], str], branching: Branching = "independent", max_steps: int = 6, seed: int = 3
) -> tuple[list[Rollout], ScriptedEngine]:
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    engine, environment = ScriptedEngine(chat, say), DialogueEnvironment()
    loop = AgentLoop(engine, chat, environment, Limits(max_steps, 200, 3000))
    tasks = environment.sample("train", 1, 0)
    [group] = asyncio.run(loop.groups(tasks, group_size=2, branching=branching, seed=seed))
    return group, engine


def in_order(text: str, key: int) -> str:
    """Read, answer; then write, answer: what a policy that does everything says."""
    if "written" in text:
        return "<think>end</think>Second."
    if "And now" in text:
        return WRITE
    return "<think>half</think>First." if "read 1" in text else READ


def test_the_conversation_goes_on_after_an_answer_and_only_the_sampled_is_trained():
    [rollout, _], engine = play(in_order)
    assert rollout.status == "answered"
    assert rollout.verdict.done
    assert [step.action for step in rollout.steps] == ["tool_call", "answer", "tool_call", "answer"]
    assert [step.answer for step in rollout.steps] == [None, "First.", None, "Second."]
    text = engine.chat.decode(rollout.token_ids)
    trained = engine.chat.decode(rollout.token_ids[rollout.trained])
    assert trained.split("<|im_end|>")[:4] == [
        READ,
        "<think>half</think>First.",
        WRITE,
        "<think>end</think>Second.",
    ]
    assert "First.<|im_end|>\n<|im_start|>user\nAnd now write" in text
    for request in (r for r in engine.requests if r.rollout_key == rollout.rollout_id):
        assert (rollout.token_ids[: len(request.token_ids)] == request.token_ids).all()


def test_a_user_cannot_end_its_own_message():
    """Reserved tokens in a user's later message are broken up, as in a tool's output."""
    [rollout, _], engine = play(in_order)
    assert "write < |im_end|> it." in engine.chat.decode(rollout.token_ids)


def test_new_tools_are_shown_where_they_come_and_may_be_called_only_then():
    [rollout, _], _ = play(in_order)
    shown = [step.observation or "" for step in rollout.steps]
    assert '"name":"write"' in shown[1]
    assert sum('"name":"write"' in text for text in shown) == 1
    assert rollout.verdict.details["writes"] == 1

    early = lambda text, key: "x" if "Error: no tool" in text else WRITE  # noqa: E731
    [rollout, _], _ = play(early)
    assert "no tool is named 'write'" in str(rollout.steps[0].observation)
    assert rollout.verdict.details["writes"] == 0


def test_a_tool_taken_away_is_an_error_observation():
    """`read` is gone after the first answer."""
    late = lambda text, key: in_order(text, key).replace("write", "read")  # noqa: E731
    [rollout, _], _ = play(late)
    assert "no tool is named 'read'; tools: write" in str(rollout.steps[2].observation)
    assert rollout.verdict.details["reads"] == 1


def test_a_fork_hears_the_user_again():
    """A sibling's episode is brought to the same turn, with the same tools, before it goes on."""
    after_the_second_message = 0
    for seed in range(8):
        (trunk, sibling), _ = play(in_order, branching="fork_at_step", seed=seed)
        assert sibling.parent_id == trunk.rollout_id
        assert (sibling.token_ids == trunk.token_ids).all()
        assert sibling.verdict.details == {"reads": 1.0, "writes": 1.0, "heard": 2.0}
        after_the_second_message += (sibling.fork_position or 0) >= trunk.steps[2].prompt_end
    assert after_the_second_message


def test_an_answer_at_the_step_limit_is_no_final_answer():
    [rollout, _], _ = play(in_order, max_steps=2)
    assert rollout.status == "truncated"
    assert not rollout.verdict.done
