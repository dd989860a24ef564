"""[sft]: what `python -m mosaic_fast.sft` learns from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mosaic_fast.config.section import Count, CountOrZero, Section


class SftConfig(Section):
    """The cold start, `python -m mosaic_fast.sft`: supervised learning on what an agent did well."""

    conversations: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """JSON Lines files, a conversation a line: OpenAI's messages and tools (docs/quickstart.md)."""
    heldout_conversations: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Such files that are not learnt from, but predicted: before, after, and every env.eval_every steps."""
    demonstrations: CountOrZero = 0
    """Training tasks of env.name that its own solutions demonstrate; all it has, if there are fewer."""
    per_step: Count = 16
    """Conversations a training step."""
    rewriting: Literal["loop_v1", "none"] = "loop_v1"
    """loop_v1: write plans and checks that a conversation lacks (docs/method.md); none: train it as it is."""
    plans: Literal["template", "llm"] = "template"
    """loop_v1: what writes them: fixed sentences, or the model that judge.endpoint and judge.model name."""
    checked_tools: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """template: tools before whose calls a check is written, those that change what cannot be undone."""

    @property
    def is_set(self) -> bool:
        """Whether there is anything to learn from."""
        return bool(self.conversations or self.demonstrations)

    @model_validator(mode="after")
    def _contradictions(self) -> SftConfig:
        if self.rewriting == "none" and (self.plans != "template" or self.checked_tools):
            raise ValueError("sft.plans and sft.checked_tools need sft.rewriting = 'loop_v1'; leave them out")
        if self.plans == "llm" and self.checked_tools:
            raise ValueError("sft.checked_tools needs sft.plans = 'template': with 'llm' the model decides")
        return self
