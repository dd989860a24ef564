"""What cannot be run on a forest is refused with the part that differs, and why."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy, admission, forward
from mosaic_fast.policy.admission import admit
from tests.families.families import REFUSED, config_of, model_of, shown
from tests.policy.policy_helpers import tiny_model


@pytest.mark.parametrize("family", shown(REFUSED))
def test_a_family_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(UserError) as refused:
        Policy(model_of(config_of(family), torch.float32))
    said = str(refused.value)
    assert "cannot be trained on a forest exactly" in said
    assert REFUSED[family][1] in said
    assert len(said.splitlines()) == 1


def test_a_way_that_differs_is_not_taken() -> None:
    """SmolLM3 has layers that do not rotate: taken apart as Llama's they would, so they are called whole."""
    admission = admit(model_of(config_of("smollm3"), torch.float32))
    assert admission.way == "layers"
    apart, whole = admission.trials
    assert not apart.passed
    assert apart.logprobs > 0.01
    assert whole.passed


def test_half_precision_is_held_to_what_the_models_own_forward_loses() -> None:
    model: PreTrainedModel = tiny_model("qwen3", torch.bfloat16)
    single, half = admit(model).trials
    assert (single.dtype, half.dtype) == ("float32", "bfloat16")
    assert single.logprobs < 1e-5 < half.logprobs < half.logprob_limit


def test_a_rewritten_layer_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers taken apart give something else, they are called whole."""
    stock = forward.run_layer

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return 1.01 * stock(*args, **kwargs)  # pyrefly: ignore [bad-argument-type]

    monkeypatch.setattr(forward, "run_layer", wrong)
    monkeypatch.setattr(admission, "_ADMITTED", {})
    assert admit(tiny_model("qwen3", torch.float32)).way == "layers"


def test_random_generators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_ADMITTED", {})
    model = tiny_model("qwen3", torch.float32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    admit(model)
    assert torch.equal(torch.get_rng_state(), before)
