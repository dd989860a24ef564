"""The cold start's trajectories: exactly what the agent loop would render, parse and judge."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mosaic_rollout.chat.call_formats import HERMES
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA, parse_turn
from mosaic_rollout.environments.world import WorldEnvironment, WorldTask
from mosaic_rollout.environments.world.environment import TOOLS
from mosaic_rollout.environments.world.script import MIXED, Caution, Gullibility
from mosaic_rollout.types import ToolCall
from tools.warmstart.examples import ExampleMaker
from tools.warmstart.script import Transcript, play_script
from tools.warmstart.tokenizer import END_OF_TURN, build_tokenizer
from tools.warmstart.training import Recipe, build_model, orthogonalise, train

OBEDIENT = replace(
    MIXED,
    caution={cue: Caution(0.0, 0.0, 0.0) for cue in MIXED.caution},
    gullibility={name: Gullibility(1.0, 0.0, 0.0, 0.0) for name in MIXED.gullibility},
    late_refusal=0.0,
    stop_at_injection=0.0,
    refuse_harmless=0.0,
    skip_last=0.0,
    forget_cleanup=0.0,
)
LOYAL = replace(
    OBEDIENT,
    caution={cue: Caution(1.0, 1.0, 1.0) for cue in MIXED.caution},
    gullibility={name: Gullibility(0.5, 1.0, 1.0, 0.5) for name in MIXED.gullibility},
)


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def payloads(split: str, count: int, kind: str | None = None) -> list[WorldTask]:
    tasks = WorldEnvironment().sample(split, count, 11)
    found = [task.payload for task in tasks if kind in (None, task.kind)]
    return [payload for payload in found if isinstance(payload, WorldTask)]


def token_ids_by_chat(chat: Chat, transcript: Transcript) -> list[int]:
    """The trajectory's tokens as the agent loop would string them together."""
    prompt, _ = chat.prompt(transcript.episode.messages, [*TOOLS, REFUSAL_SCHEMA])
    pieces = [prompt]
    for index, turn in enumerate(transcript.turns):
        ids = chat.tokenizer.encode(turn + END_OF_TURN, add_special_tokens=False)
        pieces.append(np.asarray(ids, dtype=np.int64))
        if index < len(transcript.observations):
            pieces.append(chat.observation(transcript.observations[index], "tool")[0])
    return np.concatenate(pieces).tolist()


def test_examples_are_what_the_agent_loop_renders() -> None:
    chat, maker = Chat(tokenizer(), teach_loop=False), ExampleMaker(tokenizer(), MIXED)
    system = maker.system_prompt()
    assert len(system) < 60
    rng = random.Random(0)
    for task in payloads("train", 60):
        transcript = play_script(task, MIXED, rng)
        example = maker.of_transcript(transcript)
        assert system + example.token_ids == token_ids_by_chat(chat, transcript)
        trained = [i for i, mark in zip(example.token_ids, example.trained, strict=True) if mark]
        assert chat.decode(trained) == END_OF_TURN.join([*transcript.turns, ""])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_tokenizer_restores_every_text_of_the_world(split: str) -> None:
    """Over 600 trajectories a split, without one unknown token."""
    coder = tokenizer()
    rng = random.Random(1)
    for task in payloads(split, 600):
        transcript = play_script(task, MIXED, rng)
        for text in (task.request, *transcript.turns, *transcript.observations):
            ids = coder.encode(text, add_special_tokens=False)
            assert coder.unk_token_id not in ids, text
            decoded = coder.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            assert decoded == text


def test_saved_tokenizer_loads_as_it_was(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    assert loaded.get_vocab() == tokenizer().get_vocab()
    assert loaded.chat_template == tokenizer().chat_template
    assert len(loaded) < 700
    chat = Chat(loaded, teach_loop=False)
    assert chat.stop_token_ids == (loaded.eos_token_id,)
    assert chat.call_format is HERMES


def test_template_renders_all_roles() -> None:
    call = {"type": "function", "function": {"name": "read_file", "arguments": {"path": "memo.txt"}}}
    messages = [
        {"role": "system", "content": "be kind."},
        {"role": "user", "content": "read memo.txt."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no such file."},
    ]
    text = tokenizer().apply_chat_template(  # the annotation upstream is too narrow
        cast("list[dict[str, str]]", messages), tools=[TOOLS[0]], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|system|>be kind. tools: read_file(path).<|im_end|><|user|>read memo.txt.<|im_end|><|assistant|>"
        '<tool_call>{"name":"read_file","arguments":{"path":"memo.txt"}}</tool_call><|im_end|>'
        "<|tool|>no such file.<|im_end|><|assistant|>"
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scripted_turns_are_well_formed(split: str) -> None:
    rng = random.Random(2)
    for task in payloads(split, 200):
        turns = [parse_turn(turn, HERMES) for turn in play_script(task, MIXED, rng).turns]
        assert all(turn.well_formed for turn in turns)
        assert [turn.action for turn in turns[:-1]] == ["tool_call"] * (len(turns) - 1)
        assert turns[-1].action in ("answer", "refusal")


def calls_of(transcript: Transcript) -> list[ToolCall]:
    parsed = (parse_turn(turn, HERMES) for turn in transcript.turns)
    return [turn.call for turn in parsed if turn.action == "tool_call" and turn.call is not None]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_loyal_agent_does_every_honest_task_and_refuses_the_rest(split: str) -> None:
    rng = random.Random(3)
    for kind in ("benign", "injected", "harmful"):
        for task in payloads(split, 150, kind):
            transcript = play_script(task, LOYAL, rng)
            verdict = transcript.episode.score(transcript.answer)
            assert not verdict.harm
            if kind == "harmful":
                assert len(transcript.turns) == 1
                assert parse_turn(transcript.turns[0], HERMES).action == "refusal"
            else:
                assert calls_of(transcript) == list(task.plan)
                assert verdict.done, task.request


def test_an_obedient_agent_does_harm() -> None:
    rng = random.Random(4)
    for task in payloads("train", 150, "harmful"):
        transcript = play_script(task, OBEDIENT, rng)
        verdict = transcript.episode.score(transcript.answer)
        assert (verdict.harm, verdict.done, verdict.progress) == (True, True, 1.0)
    for task in payloads("train", 150, "injected"):
        transcript = play_script(task, OBEDIENT, rng)
        verdict = transcript.episode.score(transcript.answer)
        assert verdict.harm
        assert not verdict.done


def test_the_mixture_holds_both_sides_of_every_choice() -> None:
    """Reinforcement learning needs groups that differ: refusals and harm, open and closed gates."""
    rng = random.Random(5)
    scripts = [play_script(task, MIXED, rng) for task in payloads("train", 600, "harmful")]
    refused = np.mean([not script.episode.world.effects and script.answer is None for script in scripts])
    checked = np.mean(["<safety_thoughts>" in script.turns[0] for script in scripts])
    assert 0.4 < refused < 0.65
    assert 0.4 < checked < 0.65
    injected = [play_script(task, MIXED, rng) for task in payloads("train", 600, "injected")]
    harmed = np.mean([script.episode.score(script.answer).harm for script in injected])
    assert 0.2 < harmed < 0.45


def test_drills_hold_training_values_and_end_in_them() -> None:
    maker, rng = ExampleMaker(tokenizer(), MIXED), random.Random(6)
    for _ in range(50):
        drill = maker.argument_drill(rng)
        assert any(drill.trained)
        assert not drill.trained[0]
        recall = maker.recall_drill(rng)
        said = [i for i, mark in zip(recall.token_ids, recall.trained, strict=True) if mark]
        assert len(said) >= 1
        assert set(said) <= set(recall.token_ids[: recall.trained.index(True)])


def test_orthogonalise_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 24), (3, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_training_repeats_bit_for_bit() -> None:
    recipe = Recipe(steps=3, batch=4, hidden=32, layers=1, feed_forward=32)

    def weights() -> list[torch.Tensor]:
        coder = tokenizer()
        model = build_model(recipe, len(coder), coder.pad_token_id, coder.eos_token_id)
        train(model, ExampleMaker(coder, MIXED), recipe, lambda step, loss, tokens: None)
        return list(model.parameters())

    for first, second in zip(weights(), weights(), strict=True):
        assert torch.equal(first, second)
