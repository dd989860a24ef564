"""The local engine's log-probs are those of the model's own forward, to 1e-5 in fp32; or it says why not.

Recurrences, whose sums round more, are held to 1e-6 in fp64.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.setup.engine_proof import prove_engine
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.engine.adapter import DecoderOf
from tests.families.families import PROVED, RECURRENT, VOCAB, config_of, model_of, shown, wholly_fp64
from tests.rollout.engine.helpers import generate, request, stock_logprobs

NOT_SERVED = {"gemma4_text": "same heads and head size in all layers"}


@pytest.mark.parametrize("family", shown(PROVED))
def test_logprobs_of_samples(family: str) -> None:
    exact = family in RECURRENT
    model = model_of(config_of(family), torch.float64 if exact else torch.float32)
    if family in NOT_SERVED:
        with pytest.raises(UserError, match=rf"{NOT_SERVED[family]}.*use engine.kind = 'sglang'"):
            prove_engine(model)
        return
    decoder_of, _ = prove_engine(model)
    with wholly_fp64() if exact else nullcontext():
        compare(model, decoder_of, 1e-6 if exact else 1e-5)


def compare(model: PreTrainedModel, decoder_of: DecoderOf, tolerance: float) -> None:
    """Prompts that share prefixes, one that ends inside another among them, cold and from the cache."""
    engine = LocalEngine(model, decoder_of=decoder_of, prefill_chunk_tokens=8)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 30)
    prompts = [tokens[:12], np.append(tokens[:12], [1, 2, 3]), tokens[:5], np.append(tokens[:7], 4)]
    asked = [request(prompt, 9, key=key) for key, prompt in enumerate(prompts)]
    for _ in range(2):  # cold, then from the cache
        for one, completion in zip(asked, generate(engine, asked), strict=True):
            expected = stock_logprobs(model.eval(), one, completion)
            np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=tolerance)
            model.train()
