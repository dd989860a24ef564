"""reward.parts and reward.advantage: what is left out, what a user adds, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from mosaic_fast.config import REWARD_PARTS, Config, RewardConfig
from mosaic_fast.errors import UserError
from mosaic_fast.preferences.reward import build_reward, group_reward
from mosaic_fast.run.metrics import reward_figures
from tests.preferences.rollouts import saying

OWN = "tests.preferences.own_rewards:"
GROUP = [saying("a"), saying("b")]
FIRST_WINS = np.array([[0.5, 1.0], [0.0, 0.5]])


def test_the_default_is_the_papers_reward():
    config = RewardConfig(length_target=1.0)
    found = build_reward(config).reward(GROUP, FIRST_WINS)
    assert (found.total == group_reward(GROUP, FIRST_WINS, 1.0).total).all()
    assert config.parts == REWARD_PARTS


def test_parts_are_left_out_and_added():
    preferences = FIRST_WINS.copy()
    rule = build_reward(RewardConfig(parts=("align", f"{OWN}halves"), length_target=1.0))
    reward = rule.reward(GROUP, preferences)
    assert reward.total.tolist() == [1.0, 0.5]
    assert not reward.format.any()
    assert not reward.length_penalty.any()
    assert (preferences == FIRST_WINS).all()
    assert reward_figures([reward])["reward/halves"] == 0.25
    assert not reward.by_length_alone


def test_a_users_part_breaks_a_tie_of_judge_and_format():
    rule = build_reward(RewardConfig(parts=("align", "format", "length", f"{OWN}halves"), std_epsilon=0.0))
    reward = rule.reward(GROUP, np.full((2, 2), 0.5))
    assert not reward.tied
    assert not reward.by_length_alone
    assert rule.advantages(GROUP, reward).tolist() == [-1.0, 1.0]


def test_an_advantage_of_the_users_own():
    rule = build_reward(RewardConfig(parts=("align",), advantage=f"{OWN}signs"))
    assert rule.advantages(GROUP, rule.reward(GROUP, FIRST_WINS)).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("few", r"reward\.parts: few: want one number for each of 2 rollouts, each finite, got \[1\.0\]"),
        ("nan", r"reward\.parts: nan: want one number for each of 2 rollouts, each finite"),
        ("raises", r"raises failed: ZeroDivisionError: no rollouts \(.*own_rewards\.py, line \d+\)"),
    ],
)
def test_what_a_part_gives_is_looked_at(name: str, words: str):
    rule = build_reward(RewardConfig(parts=(OWN + name,)))
    with pytest.raises(UserError, match=words) as error:
        rule.reward(GROUP, FIRST_WINS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"parts": ["aligns"]}, "'aligns' is none of align, format, length, nor your own"),
        ({"parts": []}, "at least 1 item"),
        ({"parts": ["align", "align"]}, "the name 'align' is taken"),
        ({"parts": [f"{OWN}total"]}, "the name 'total' is taken"),
        ({"parts": ["a:x", "b:x"]}, "the name 'x' is taken"),
        ({"advantage": "groups"}, "neither 'group' nor your own"),
        ({"advantage": "a:b", "divide_by_std": True}, "divide_by_std has no meaning"),
    ],
)
def test_a_mistake_is_named(values: dict[str, object], words: str):
    with pytest.raises(ValidationError, match=words):
        RewardConfig.model_validate(values)


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"reward\.advantage .* has no class 'nothing'"):
        build_reward(RewardConfig(advantage=f"{OWN}nothing"))


def test_a_resolved_configuration_with_an_own_advantage_is_valid():
    config = Config(reward=RewardConfig(advantage=f"{OWN}signs")).resolved()
    assert config.reward.divide_by_std is None
    assert Config.model_validate(config.model_dump()) == config
