"""The held-out split: nothing of it can have been seen in training, and every word of it was."""

from __future__ import annotations

import pytest

from mosaic_rollout.environments.world import WorldEnvironment, WorldTask, values
from mosaic_rollout.environments.world.intents import INJECTION_BANKS, INTENT_BANKS, PREFIXES, REASON_BANKS
from mosaic_rollout.environments.world.values import WordingBank, expand, words

BANKS = {**INTENT_BANKS, **REASON_BANKS, **INJECTION_BANKS}
POOLS = {"names": values.NAMES, "files": values.FILES, "topics": values.TOPICS, "amounts": values.AMOUNTS}


@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS.keys())
def test_held_out_wordings_are_new_but_made_of_known_words(bank: WordingBank) -> None:
    train, heldout = bank.texts("train"), bank.texts("heldout")
    assert train
    assert heldout
    assert not train & heldout
    known = set().union(*(words(text) for text in train))
    assert all(words(text) <= known for text in heldout)
    assert 0.1 <= len(heldout) / (len(heldout) + len(train)) <= 0.3


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_held_out_values_are_new_combinations_of_known_pieces(pool: dict[str, tuple[str, ...]]) -> None:
    assert not set(pool["train"]) & set(pool["heldout"])

    def pieces(texts: tuple[str, ...]) -> set[str]:
        """Names and topics by word, files by stem and extension, amounts by pairs of digits."""
        split = (
            text.replace(".", " .") if not text.isdigit() else f"{text[:2]} ##{text[2:]}" for text in texts
        )
        return {piece for text in split for piece in text.split()}

    assert pieces(pool["heldout"]) <= pieces(pool["train"])


def test_injection_prefixes_are_disjoint() -> None:
    assert not set(PREFIXES["train"]) & set(PREFIXES["heldout"])
    for place in (0, 1):
        assert {pair[place] for pair in PREFIXES["heldout"]} <= {pair[place] for pair in PREFIXES["train"]}


def test_the_split_never_moves() -> None:
    """A change here makes every published figure incomparable: it must be meant."""
    assert len(values.NAMES["heldout"]) == 109
    assert values.split_of("name", "maria lopez") == "train"
    assert values.NAMES["heldout"][:2] == ("maria smith", "maria ryan")


def test_sample_is_a_pure_function_of_its_arguments() -> None:
    first, second = WorldEnvironment(), WorldEnvironment()
    assert first.sample("train", 12, 5) == second.sample("train", 12, 5)
    assert first.sample("train", 12, 5)[:4] == first.sample("train", 4, 5)
    assert first.sample("train", 12, 5) != first.sample("train", 12, 6)
    assert first.sample("train", 12, 5) != first.sample("heldout", 12, 5)


def test_kinds_come_in_equal_shares_and_ids_are_unique() -> None:
    tasks = WorldEnvironment().sample("heldout", 300, 2)
    assert len({task.task_id for task in tasks}) == 300
    for kind in ("harmful", "benign", "injected"):
        assert sum(task.kind == kind for task in tasks) == 100


def test_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'test'"):
        WorldEnvironment().sample("test", 1, 0)


def test_held_out_requests_never_occur_in_training() -> None:
    environment = WorldEnvironment()

    def requests(split: str) -> set[str]:
        payloads = [task.payload for task in environment.sample(split, 2000, 3)]
        return {payload.request for payload in payloads if isinstance(payload, WorldTask)}

    assert not requests("train") & requests("heldout")


def test_expand_spells_out_alternatives_and_synonyms() -> None:
    assert expand("[go|run] on[ now|]") == ["go on now", "go on", "run on now", "run on"]
    assert "settle it" in expand("@pay it")
