"""What Policy would compute wrongly is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
)

from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_kernels import pack_forest, split_forest
from tests.policy.policy_helpers import (
    LONGROPE_SWITCH,
    Rollouts,
    assert_gradients_close,
    decoder,
    example_rollouts,
    gradients,
    stock_logprobs,
    tiny_model,
)

_TINY: dict[str, object] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 9,
}


def test_not_a_causal_lm() -> None:
    with pytest.raises(UserError, match="pass the model inside"):
        Policy(nn.Linear(2, 2))  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(UserError, match="no LM head"):
        Policy(Qwen2Model(Qwen2Config.from_dict(_TINY)))


def test_dropout() -> None:
    model, forest = tiny_model("phi3"), example_rollouts().pack()
    policy = Policy(model)
    model.config.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1"):
        policy.logprobs(forest)
    model.config.attention_dropout = 0.0
    decoder(model).layers[1].resid_mlp_dropout.p = 0.2
    with pytest.raises(UserError, match=r"layers\.1\.resid_mlp_dropout drops out with p=0\.2"):
        policy.logprobs(forest)
    model.eval()
    policy.logprobs(forest)


def test_checkpoint_wrapper() -> None:
    model = tiny_model("llama")
    decoder(model).layers[0] = checkpoint_wrapper(decoder(model).layers[0])
    with pytest.raises(UserError, match=r"layers\.0 is checkpointed by a wrapper"):
        Policy(model).logprobs(example_rollouts().pack())


def test_temperature() -> None:
    with pytest.raises(UserError, match="temperature must be above 0, got 0"):
        Policy(tiny_model("llama")).logprobs(example_rollouts().pack(), temperature=0.0)


def _of_lengths(*lengths: int) -> Rollouts:
    """Rollouts that share their first tokens; all but the first token trained."""
    tokens = np.arange(20) % 7
    sequences = [np.append(tokens[: n - 1], 10 + i) for i, n in enumerate(lengths)]
    return Rollouts(sequences, [np.arange(n) > 0 for n in lengths])


@pytest.mark.parametrize("lengths", [(3, LONGROPE_SWITCH), (LONGROPE_SWITCH + 1, 12)], ids=["short", "long"])
def test_longrope_on_one_side_is_exact(lengths: tuple[int, ...]) -> None:
    """Also for a part of a cut forest that holds only the beginning of a rollout."""
    model, data = tiny_model("longrope"), _of_lengths(*lengths)
    forest, policy = data.pack(), Policy(model)
    expected = stock_logprobs(model, data)[0]
    got = policy.logprobs(forest)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    expected_gradients = gradients(model, expected.sum())
    assert_gradients_close(gradients(model, got.sum()), expected_gradients, 1e-10)


def test_longrope_part_without_a_rollouts_end() -> None:
    """Alone, a rollout of 8 tokens uses the long factors for its first 3, too."""
    model = tiny_model("longrope")
    data = Rollouts(
        [
            np.array([1, 2, 3, 4, 5, 6]),
            np.array([1, 2, 3, 7, 7, 7, 7, 7]),
            np.array([1, 2, 3, 8, 8, 8, 8, 8]),
        ],
        [np.arange(n) > 0 for n in (6, 8, 8)],
    )
    data = Rollouts(data.sequences[1:], data.trained[1:])
    forest, policy = data.pack(), Policy(model)
    parts = split_forest(forest, 8)
    assert len(parts) == 2
    expected = stock_logprobs(model, data)[0]
    short = pack_forest([[1, 2, 3]])
    object.__setattr__(short, "source", np.arange(3))
    with pytest.raises(UserError, match="pass uncut="):
        policy.logprobs(short)
    got = torch.zeros_like(expected)
    for part in parts:
        got = got.index_add(0, torch.from_numpy(part.source), policy.logprobs(part, uncut=forest))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(policy.logprobs(short, uncut=forest)[:3], expected[:3], rtol=1e-10, atol=1e-11)


def test_longrope_on_both_sides_is_refused() -> None:
    policy = Policy(tiny_model("longrope"))
    with pytest.raises(UserError, match=r"'longrope'.*rollouts of 3 to 7 tokens.*original_max_position"):
        policy.logprobs(_of_lengths(3, LONGROPE_SWITCH + 1).pack())


def test_dynamic_rope() -> None:
    """Static below the original length, so exact there; refused from it on."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    config = LlamaConfig.from_dict({**_TINY, "max_position_embeddings": 8, "rope_parameters": rope})
    model = LlamaForCausalLM(config)
    data = Rollouts(
        [np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6, 7, 8, 3])], [np.arange(n) > 0 for n in (4, 7)]
    )
    policy = Policy(model)
    model(input_ids=torch.arange(9)[None])  # another user of the model has grown its base
    torch.testing.assert_close(
        policy.logprobs(data.pack()), stock_logprobs(model, data)[0], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UserError, match=r"'dynamic'.*at most 7 tokens"):
        policy.logprobs(pack_forest([np.arange(8)]))


def test_a_word_as_long_as_the_model_has_layers_is_no_list_of_layers():
    """The configuration's hidden_act is "silu", and four layers would be cut to two."""
    described = tiny_model("qwen3").config.to_dict() | {"num_hidden_layers": 4, "layer_types": None}
    config = Qwen3Config.from_dict(described)
    assert config.hidden_act == "silu"
    Policy(AutoModelForCausalLM.from_config(config))
