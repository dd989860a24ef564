"""The cost model: work counted as plainly as possible, coefficients in and out, the plan they choose."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_fast.errors import UserError
from mosaic_fast.learner.execution import CostModel, Execution, load_cost_model, save_cost_model
from mosaic_fast.learner.execution.cost import cost_model_of_run, keep_cost_model, work_of
from mosaic_kernels import PackedForest, pack_forest
from tests.policy.policy_helpers import CONFIGS, Rollouts, rollouts


@pytest.mark.parametrize("case", ["qwen3-window", "llama"])
@settings(max_examples=20)
@given(data=rollouts(), slack=st.integers(0, 4), plan=st.sampled_from(["tree", "cut", "kept", "flat"]))
def test_work_is_counted_node_by_node(case: str, data: Rollouts, slack: int, plan: str) -> None:
    forest, config = data.pack(), CONFIGS[case]
    budget = max((len(s) for s in data.sequences), default=1) + slack or 1
    if plan == "tree":
        budget = max(budget, forest.num_nodes)
    parts = Execution(budget, 1.0, config, plan=plan).schedule(forest).parts
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    head_dim, hidden = config.head_dim, config.hidden_size
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linear = attention = head = held = weights = 0
    for part in parts:
        weights += config.num_hidden_layers * 2 * hidden * (query + key_value)  # q and o, k and v
        weights += config.num_hidden_layers * 3 * hidden * config.intermediate_size
        weights += hidden * config.vocab_size
        owner = part.forest
        nodes = range(owner.num_nodes) if part.nodes is None else part.nodes.tolist()
        rows = {int(owner.parent[owner.node_index[t]]) for t in np.flatnonzero(owner.trained)} & set(nodes)
        for layer, kind in enumerate(kinds):
            for node in nodes:
                linear += 2 * hidden * key_value
                if layer == len(kinds) - 1 and node not in rows:
                    continue
                linear += 2 * hidden * query + 3 * hidden * config.intermediate_size
                seen = int(owner.positions[node]) + 1
                window = config.sliding_window if kind == "sliding_attention" else seen
                attention += 2 * query * min(seen, window)
            if part.parent >= 0:
                held += 2 * key_value * int(owner.positions[nodes[0]])
        head += hidden * config.vocab_size * len(rows)
    expected = (linear, attention, head, len(parts) * len(kinds), held, weights)
    assert astuple(work_of(parts, config)) == expected


def one_prompt(shared: int, rollouts_of: int, own: int) -> PackedForest:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 9999, shared)
    sequences = [np.append(prompt, rng.integers(0, 9999, own)) for _ in range(rollouts_of)]
    return pack_forest(sequences, [np.arange(shared + own) >= max(1, shared)] * rollouts_of)


def chosen(forest: PackedForest, budget: int, **coefficients: float) -> str:
    cost = CostModel(
        **{"linear": 1.0, "attention": 0, "head": 0, "layer_calls": 0, "kept": 0, **coefficients}
    )
    return Execution(budget, 1.0, CONFIGS["llama"], cost).schedule(forest).plan


def test_choices() -> None:
    """Each plan where it belongs, by coefficients that make one kind of work matter."""
    assert chosen(one_prompt(20, 6, 5), 64) == "tree"
    assert chosen(one_prompt(0, 6, 20), 200) == "tree"  # nothing shared: the same forwards as flat
    assert chosen(one_prompt(20, 6, 5), 32) == "kept"  # twice the forest's budget
    assert chosen(one_prompt(20, 6, 5), 32, layer_calls=1e6) == "cut"  # a forward is worth more than tokens
    assert chosen(one_prompt(20, 6, 5), 32, kept=1e6) == "cut"
    assert chosen(one_prompt(20, 6, 5), 32, weights=1e6) == "cut"
    # One token shared by two rollouts of 21: two forwards flat, three if it is held.
    assert chosen(one_prompt(1, 2, 20), 21, layer_calls=1e6) in ("cut", "flat")


def test_predictions_are_figures() -> None:
    forest = one_prompt(20, 6, 5)
    execution = Execution(32, 1.0, CONFIGS["llama"])
    schedule, figures = execution.schedule(forest), execution.figures()
    assert figures[f"tree/plan_{schedule.plan}"] == 1.0
    assert sum(figures[f"tree/plan_{name}"] for name in ("tree", "flat", "cut", "kept")) == 1.0
    assert figures["tree/predicted_s"] == min(schedule.predicted_s.values())
    assert figures["tree/predicted_kept_s"] == schedule.predicted_s["kept"] > 0
    assert "time/tree_pass_s" not in figures  # nothing has run


def test_files(tmp_path: Path) -> None:
    cost = CostModel(1e-11, 2e-11, 3e-11, 1e-3, 0.0)
    save_cost_model(cost, tmp_path / "mine.toml", "a test")
    assert load_cost_model(str(tmp_path / "mine.toml")) == cost
    assert all(value > 0 for value in astuple(load_cost_model("default")))
    # A run keeps what it began with, whatever becomes of the configured file.
    assert cost_model_of_run(tmp_path, str(tmp_path / "mine.toml")) == cost
    (tmp_path / "five.toml").write_text(  # `held` is what `kept` was called
        "[seconds_per_unit]\nlinear = 1\nattention = 2\nhead = 3\nlayer_calls = 4\nheld = 5"
    )
    assert load_cost_model(str(tmp_path / "five.toml")) == CostModel(1, 2, 3, 4, 5, weights=0)
    keep_cost_model(cost, tmp_path)
    keep_cost_model(load_cost_model("default"), tmp_path)
    assert cost_model_of_run(tmp_path, str(tmp_path / "absent.toml")) == cost


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[seconds_per_unit]\nlinear = 1", "must hold linear, attention, head, layer_calls, kept"),
        ("linear = ", "not valid TOML"),
        (
            "[seconds_per_unit]\nlinear=-1\nattention=1\nhead=1\nlayer_calls=1\nkept=1",
            "linear must be a number",
        ),
        (
            "[seconds_per_unit]\nlinear=0\nattention=0\nhead=0\nlayer_calls=0\nkept=0",
            "every coefficient is 0",
        ),
        ("seconds_per_unit = 3", "must hold"),
    ],
)
def test_a_bad_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "cost.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_cost_model(str(tmp_path / "cost.toml"))


def test_a_missing_file_says_how_to_get_one() -> None:
    with pytest.raises(
        UserError, match=r"no file absent\.toml; python -m mosaic_fast\.learner\.calibrate --out absent"
    ):
        load_cost_model("absent.toml")
