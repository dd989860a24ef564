"""Every token that a model's folder names as an end ends a turn, in training and in evaluation."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.errors import UserError
from mosaic_fast.policy.checkpoint import save_model
from mosaic_fast.setup.build import build_chat, build_setup
from mosaic_fast.setup.model_folder import end_tokens, load_tokenizer


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 2}, (2, 5)),
        ({"eos_token_id": 5}, {"eos_token_id": [2, 3]}, (5, 2, 3)),
        (None, {"eos_token_id": [4, 3]}, (4, 3)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({}, {}, ()),
        ({"eos_token_id": [9]}, {"vocab_size": 10}, (9,)),
        (None, {"text_config": {"vocab_size": 10}, "eos_token_id": 3}, (3,)),
    ],
)
def test_a_number_or_a_list_in_either_file(
    generation: dict[str, object] | None,
    config: dict[str, object],
    expected: tuple[int, ...],
    tmp_path: Path,
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_tokens(tmp_path) == expected


@pytest.mark.parametrize("named", [10, [2, 10], -1, "2", True, [None, 2.0], [[2]]])
def test_what_is_no_token_is_refused_with_its_file(named: object, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id .* from 0 to 9"):
        end_tokens(tmp_path)


def test_a_folder_without_the_files_names_none_and_a_damaged_one_is_named(tmp_path: Path):
    assert end_tokens(tmp_path) == ()
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json is not valid JSON"):
        end_tokens(tmp_path)


def test_training_and_evaluation_stop_at_them_and_a_checkpoint_keeps_them(
    model_folder: Path, options: list[str], tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 11]}))
    config = parse_train_arguments([*options, "--run-dir", str(tmp_path / "run")])[0]
    setup = build_setup(config, folder)
    assert set(setup.loop.chat.stop_token_ids) == {2, 7, 11}
    for taught in (True, False):
        rollout = config.rollout.model_copy(update={"teach_loop": taught})
        chat = build_chat(load_tokenizer(folder), folder, rollout)
        assert set(chat.stop_token_ids) == {2, 7, 11}
        assert chat.turn_text([20, 7]) == chat.turn_text([20, 2]) == chat.decode([20])
    save_model(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "saved")
    assert end_tokens(tmp_path / "saved") == end_tokens(folder)
