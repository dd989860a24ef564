"""Padded and packed rows become forests, and what is computed on these lies where the rows have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosaic_fast.errors import UserError
from mosaic_fast.integrations import row_logprobs
from mosaic_fast.integrations.rows import IGNORED, forest_of_rows
from mosaic_fast.integrations.siblings import SiblingSampler, regrouped
from tests.policy.policy_helpers import (
    Rollouts,
    assert_gradients_close,
    fp64_model,
    gradients,
    loss_weights,
    rollouts,
    stock_logprobs,
)

PADDING = 3  # a token as any other, so that it is told by the mask alone


def padded(data: Rollouts, left: list[int]) -> dict[str, Tensor]:
    """A batch as TRL's collators make it, `left` tokens of padding before each row and some behind."""
    width = max((n + len(s) for n, s in zip(left, data.sequences, strict=True)), default=0) + 1
    ids = torch.full((len(left), width), PADDING)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (start, sequence, trained) in enumerate(zip(left, data.sequences, data.trained, strict=True)):
        of_row = slice(start, start + len(sequence))
        ids[row, of_row], mask[row, of_row] = torch.from_numpy(sequence), 1
        labels[row, of_row] = torch.from_numpy(np.where(trained, sequence, IGNORED))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@settings(max_examples=8, deadline=None)
@given(data=rollouts(), draw=st.data())
def test_rows_are_scored_as_each_is_alone(data: Rollouts, draw: st.DataObject) -> None:
    left = [draw.draw(st.integers(0, 3)) for _ in data.sequences]
    batch, model = padded(data, left), fp64_model("qwen3")
    expected = stock_logprobs(model, data)[0]
    weights = loss_weights(len(expected))[0]
    wanted = gradients(model, (weights * expected).sum())
    found = row_logprobs(model, **batch)
    assert found.shape == (len(left), batch["input_ids"].shape[1] - 1)
    real = batch["attention_mask"][:, 1:] != 0
    assert not found[~real].any()
    # The first column is not scored; where it is a token, its rollout has a zero there.
    joined = torch.cat([found.new_zeros(len(left), 1), found], dim=1)[batch["attention_mask"] != 0]
    torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-11)
    assert_gradients_close(gradients(model, (weights * joined).sum()), wanted, 1e-10)


@settings(max_examples=8, deadline=None)
@given(data=rollouts())
def test_packed_documents_are_rows(data: Rollouts) -> None:
    kept = [index for index, s in enumerate(data.sequences) if len(s)]
    if not kept:
        return
    data = Rollouts([data.sequences[i] for i in kept], [data.trained[i] for i in kept])
    tokens, trained = np.concatenate(data.sequences), np.concatenate(data.trained)
    found = row_logprobs(
        fp64_model("qwen3"),
        torch.from_numpy(tokens)[None],
        torch.from_numpy(np.where(trained, tokens, IGNORED))[None],
        position_ids=torch.cat([torch.arange(len(s)) for s in data.sequences])[None],
    )
    expected = stock_logprobs(fp64_model("qwen3"), data)[0]
    torch.testing.assert_close(found[0], expected[1:], rtol=1e-10, atol=1e-11)


def test_a_prefix_that_padding_moved_is_shared() -> None:
    data = Rollouts([np.array([5, 6, 7]), np.array([5, 6, 8])], [np.array([False, True, True])] * 2)
    rows = forest_of_rows(**padded(data, [1, 0]))
    assert rows.forest.num_nodes == 4
    assert rows.places.tolist() == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_mask": [[1, 0, 1, 1]]}, "hides tokens in the middle"),
        ({"attention_mask": [[1, 1, 1, 0]]}, "a token that attention_mask hides is scored"),
        ({"attention_mask": [[0, 0, 1, 1]]}, "the first token of a row or document"),
        ({"attention_mask": [[[1, 1, 1, 1]]]}, "attention_mask is"),
        ({"labels": [[-100, -100, 9, 8]]}, "labels differ from the tokens"),
        (
            {"attention_mask": [[1, 1, 1, 1]], "position_ids": [[0, 1, 0, 1]]},
            "position_ids jump inside a row",
        ),
        ({"position_ids": [[0, 1, 0, 1]]}, "the first token of a row or document"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids has 1 dimensions"),
    ],
)
def test_what_is_no_row_of_tokens_is_refused(change: dict[str, list[object]], said: str) -> None:
    batch = {"input_ids": [[5, 6, 7, 8]], "labels": [[-100, -100, 7, 8]], **change}
    with pytest.raises(UserError, match=said):
        forest_of_rows(**{name: torch.tensor(values) for name, values in batch.items()})


def test_siblings_meet_in_a_batch_and_every_row_comes_once_an_epoch() -> None:
    rows = [[prompt, own] for own in range(4) for prompt in range(5)] + [[9, 9, 9]]
    sampler = SiblingSampler(rows, 4, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert sorted(drawn) == list(range(len(rows)))
        assert len(sampler) == len(rows)
        for start in range(0, 20, 4):
            assert len({rows[index][0] for index in drawn[start : start + 4]}) == 1
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    assert epochs[0] == epochs[2]


def test_generated_rows_of_a_prompt_are_put_side_by_side() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    prompts, rows = torch.arange(12)[order] % 3, order
    batches = [
        {
            "prompt_ids": p[:, None],
            "completion_ids": r[:, None],
            "texts": r.tolist(),
            "count": 7,
            "none": None,
        }
        for p, r in zip(prompts.split(4), rows.split(4), strict=True)
    ]
    found = regrouped(batches)
    assert sorted(row for batch in found for row in batch["texts"]) == list(range(12))
    assert [batch["prompt_ids"].unique().numel() for batch in found] == [1, 1, 1]
    assert found[0]["prompt_ids"][0] == prompts[0]  # prompts stay in the order that was drawn
    for batch in found:
        assert batch["completion_ids"][:, 0].tolist() == batch["texts"]
        assert batch["completion_ids"].remainder(3).equal(batch["prompt_ids"])
        assert batch["count"] == 7
        assert batch["none"] is None
