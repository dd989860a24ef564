"""The local engine shown to sample what the model gives: before its first sample, on the model in small.

Prompts that share prefixes are continued, cold and from the cache, and the log-probs of what was sampled are
compared with the model's own forward over the whole sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy, StockDecoder
from mosaic_fast.policy.admission import LOGPROB_LIMIT, Trial, alone, kind_of, proof_rollouts
from mosaic_fast.policy.small_copy import WINDOW, small_copy
from mosaic_rollout.engine.adapter import CausalModel, DecoderOf
from mosaic_rollout.engine.scheduler import Job, Scheduler
from mosaic_rollout.types import Completion, Request, SamplingParams

_NEW_TOKENS = WINDOW + 1
_PROVED: dict[tuple[object, ...], tuple[DecoderOf, tuple[Trial, ...]]] = {}


def prove_engine(model: PreTrainedModel) -> tuple[DecoderOf, tuple[Trial, ...]]:
    """How the engine may run the model: without calling its modules where that is right, else with them.

    UserError where the engine's log-probs are not the model's either way.
    """
    stock = StockDecoder.of(model) is not None
    key = (*kind_of(model), stock)
    if key not in _PROVED:
        _PROVED[key] = _prove(model, stock)
    return _PROVED[key]


def _prove(model: PreTrainedModel, stock: bool) -> tuple[DecoderOf, tuple[Trial, ...]]:
    copy = small_copy(model)
    ways: list[tuple[str, DecoderOf]] = [("local engine", modules_only)]
    if stock:
        ways.insert(0, ("local engine, without modules", StockDecoder.of))
    trials: list[Trial] = []
    for what, decoder_of in ways:
        trials.append(_compared(copy, what, decoder_of))
        if trials[-1].passed:
            return decoder_of, tuple(trials)
    last = trials[-1]
    raise UserError(
        f"engine.kind: the local engine cannot sample from {type(model).__name__}: "
        f"{last.reason or f'its log-probs are off by {last.logprobs:.1e}'}; use engine.kind = 'sglang'"
    )


def proof_rows(policy: Policy, config: Config) -> list[dict[str, object]]:
    """The table of what a run has shown of its model before its first step, for proof.json."""
    trials = policy.admission.trials
    if config.engine.kind == "local":
        trials += prove_engine(policy.model)[1]
    return [trial.row() for trial in trials]


def modules_only(model: PreTrainedModel) -> None:
    """No decoder: the engine calls the model's modules."""


def _compared(model: PreTrainedModel, what: str, decoder_of: DecoderOf) -> Trial:
    """Log-probs of sampled tokens against the model's own forward."""
    try:
        sampled = _sampled(model, decoder_of)
    except Exception as error:  # noqa: BLE001  a family's own code can break anywhere
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Trial(what, "float32", np.inf, 0.0, LOGPROB_LIMIT, 0.0, " ".join(reason.split())[:200])
    model.eval()  # as the engine has it
    with torch.no_grad():
        expected = alone(model, [sequence for sequence, _ in sampled])
    far, start = 0.0, 0
    for sequence, completion in sampled:
        start += len(sequence)
        own = expected[start - len(completion.logprobs) : start].cpu().numpy()
        far = max(far, float(np.abs(own - completion.logprobs).max()))
    return Trial(what, "float32", far, 0.0, LOGPROB_LIMIT, 0.0)


def _sampled(
    model: PreTrainedModel, decoder_of: DecoderOf
) -> list[tuple[np.ndarray, Completion]]:  # sequence [L], its end
    """Each prompt continued twice, the second time from the cache."""
    scheduler = Scheduler(
        CausalModel(model, decoder_of), max_batch=8, max_cached_tokens=4096, prefill_chunk_tokens=2 * WINDOW
    )
    found: list[tuple[np.ndarray, Completion]] = []
    for seed in (0, 1):
        for number, prompt in enumerate(proof_rollouts(model)[::3]):
            asked = Request(prompt, SamplingParams(max_new_tokens=_NEW_TOKENS), seed, number)
            scheduler.waiting.append(
                Job(
                    asked,
                    lambda done, prompt=prompt: found.append((np.append(prompt, done.token_ids), done)),
                    lambda: False,
                )
            )
        while scheduler.busy:
            scheduler.step()
    return found
