"""Environments as users of `verifiers` write them."""

import verifiers as vf  # type: ignore[import-not-found]
from datasets import Dataset  # type: ignore[import-not-found]

ROWS = [{"question": f"How much is item {i}?", "answer": str(i * 10), "info": {"n": i}} for i in range(10)]


async def price(item: int) -> str:
    """Look a price up.

    Args:
        item: Number of the item.
    """
    if item > 9:
        raise ValueError("there is no such item")
    return str(item * 10)


def right(completion: vf.Messages, answer: str) -> float:
    """1 for the right price as the last word, -1 where the policy says a bad word."""
    text = str(completion[-1].content) if completion else ""
    return -1.0 if "damn" in text else float(text.endswith(answer))


def load_environment() -> vf.Environment:
    """Tools, then an answer."""
    rubric = vf.Rubric(funcs=[right])
    return vf.ToolEnv(
        tools=[price], dataset=Dataset.from_list(ROWS), rubric=rubric, system_prompt="Be exact."
    )


class Insisting(vf.MultiTurnEnv):
    """A user who asks twice."""

    async def env_response(self, messages: vf.Messages, state: vf.State, **kwargs: object) -> vf.Messages:
        return [vf.UserMessage(content="Are you sure?")]

    @vf.stop
    async def asked_twice(self, state: vf.State) -> bool:
        return len(state["trajectory"]) >= 2


def load_dialogue() -> vf.Environment:
    rows, rubric = Dataset.from_list(ROWS), vf.Rubric(funcs=[right])
    return Insisting(dataset=rows, eval_dataset=Dataset.from_list(ROWS[:5]), rubric=rubric)


def load_broken() -> vf.Environment:
    raise RuntimeError("no such thing")
