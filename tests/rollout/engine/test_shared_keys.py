"""Decoding reads the keys that rows share once, and gives what each row alone would."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosaic_rollout.engine import rows, shared_keys
from mosaic_rollout.engine.shared_keys import Cut, SharedKeys, cuts_of
from mosaic_rollout.types import Request
from tests.rollout.engine.helpers import (
    generate,
    local_engine,
    random_tokens,
    request,
    stock_logprobs,
    tiny_model,
)

few_tokens = st.lists(st.integers(0, 1), min_size=0, max_size=7)
prefixes_of_rows = st.lists(few_tokens.map(lambda tokens: np.array(tokens, np.int64)), min_size=1, max_size=9)


def cost_of(depths: list[int], prefixes: list[np.ndarray], product: float, calls: float) -> float:
    """Of levels that end at these depths, beyond every row reading all of its keys."""
    total, start = 0.0, 0
    for end in depths:
        sizes: dict[bytes, int] = {}
        for prefix in prefixes:
            sizes[prefix[:end].tobytes()] = sizes.get(prefix[:end].tobytes(), 0) + 1
        padded = len(sizes) * max(sizes.values()) - len(prefixes)
        total += (len(sizes) + padded * product - len(prefixes)) * (end - start) + calls
        start = end
    return total


@given(prefixes_of_rows, st.sampled_from([0, 2, 9]), st.sampled_from([1, 4]))
def test_levels_are_the_cheapest_by_count(
    prefixes: list[np.ndarray], calls: int, queries_per_key: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_keys, "CALLS_BYTES", calls)
        cuts = cuts_of(prefixes, key_bytes=1, queries_per_key=queries_per_key)
    start = 0
    for cut in cuts:
        assert cut.start == start < cut.end
        assert sorted(row for group in cut.groups for row in group) == list(range(len(prefixes)))
        heads = [{prefixes[row][: cut.end].tobytes() for row in group} for group in cut.groups]
        assert all(len(head) == 1 for head in heads)
        assert len({bytes_ for head in heads for bytes_ in head}) == len(cut.groups)
        start = cut.end
    shortest = min(len(prefix) for prefix in prefixes)
    product = queries_per_key / 8
    every = (list(some) for n in range(shortest + 1) for some in combinations(range(1, shortest + 1), n))
    least = min(cost_of(depths, prefixes, product, calls) for depths in every)
    assert cost_of([cut.end for cut in cuts], prefixes, product, calls) == pytest.approx(least)


@settings(max_examples=30)
@given(prefixes_of_rows, st.sampled_from([(1, 1), (2, 3)]), st.integers(0, 2**31), st.booleans())
def test_levels_attend_as_every_row_alone(
    prefixes: list[np.ndarray], heads: tuple[int, int], seed: int, equal: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    key_heads, queries = heads
    of_token: dict[bytes, Tensor] = {}

    def key_of(prefix: np.ndarray, at: int) -> Tensor:
        """A cached key and value depend on the tokens before, and on nothing else."""
        name = prefix[: at + 1].tobytes()
        if name not in of_token:
            of_token[name] = torch.randn(key_heads, 2, 4, generator=random, dtype=torch.float64)
        return of_token[name]

    own = [2 if equal else 1 + row % 3 for row in range(len(prefixes))]
    longest = max(len(prefix) for prefix in prefixes)
    lengths = [
        (longest if equal else len(prefix)) + count for prefix, count in zip(prefixes, own, strict=True)
    ]
    stored = torch.randn(
        2, 1, len(prefixes), key_heads, max(lengths), 4, generator=random, dtype=torch.float64
    )
    for row, prefix in enumerate(prefixes):
        for at in range(len(prefix)):
            stored[:, 0, row, :, at] = key_of(prefix, at).transpose(0, 1)
    keys, values = stored
    query = torch.randn(len(prefixes), key_heads, queries, 4, generator=random, dtype=torch.float64)
    hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)[:, None, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_keys, "CALLS_BYTES", 0)
        shared = SharedKeys(cuts_of(prefixes, key_bytes=1, queries_per_key=queries), keys, values)
    rest = None if equal else mask[..., shared.end :]
    attended = shared.attend(0, query, keys[0], values[0], rest, scale=0.3)
    expected = (0.3 * query @ keys[0].mT + mask).softmax(-1) @ values[0]
    torch.testing.assert_close(attended, expected, rtol=0, atol=1e-12)


def agents() -> list[Request]:
    """Two groups of siblings behind common tokens, and one that shares the first of them only."""
    common = random_tokens(12, 0)
    tasks = [np.concatenate([common, random_tokens(6, 1)]), np.concatenate([common, random_tokens(9, 2)])]
    prompts = [np.concatenate([task, random_tokens(n, 10 + n)]) for task in tasks for n in (2, 3, 5)]
    prompts.append(np.concatenate([common[:7], random_tokens(20, 3)]))
    return [request(prompt, 4 + 3 * key, key=key) for key, prompt in enumerate(prompts)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_window"])
def test_sampled_with_shared_keys_is_the_stock_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows enter and leave, lengths differ, and levels are made of whatever is there."""
    monkeypatch.setattr(shared_keys, "CALLS_BYTES", 0)
    made: list[Cut] = []
    choose = rows.cuts_of

    def spy(*args: object, **options: object) -> list[Cut]:
        made.extend(cuts := choose(*args, **options))  # pyrefly: ignore
        return cuts

    monkeypatch.setattr(rows, "cuts_of", spy)
    model = tiny_model(family)
    engine = local_engine(model, max_batch=5)
    asked = agents()
    for _ in range(2):
        for one, completion in zip(asked, generate(engine, asked), strict=True):
            stock = stock_logprobs(model, one, completion)
            np.testing.assert_allclose(completion.logprobs, stock, rtol=0, atol=5e-7)
    assert {len(cut.groups) > 1 for cut in made} == {False, True}
