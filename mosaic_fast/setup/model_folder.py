"""The folder that `[model]` names: its policy, its tokenizer, and the tokens at which its turns end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mosaic_fast.config import Config
from mosaic_fast.config.hub import model_files
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_fast.policy.checkpoint import in_one_line
from mosaic_fast.policy.folder import refuse_pointer


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that end a turn: all at which `generate` and a server would stop.

    They are `eos_token_id` of generation_config.json and of config.json, a number or a list in either.

    Llama 3.1 names `<|eom_id|>`, after a call, beside `<|eot_id|>`; Qwen names `<|endoftext|>` as well.
    A file that is not there names none. UserError for an id that the model has no logit for.
    """
    config = _read(folder / "config.json")
    inner = config.get("text_config")
    size = _vocabulary(config) or (_vocabulary(inner) if isinstance(inner, dict) else None)
    found: dict[int, None] = {}
    for name, values in (
        ("generation_config.json", _read(folder / "generation_config.json")),
        ("config.json", config),
    ):
        named = values.get("eos_token_id")
        for token in named if isinstance(named, list) else [named]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or token < 0 or (size and token >= size):
                limit = f"from 0 to {size - 1}, the model's vocabulary" if size else "of the vocabulary"
                raise UserError(
                    f"{folder / name}: eos_token_id holds {token!r:.80}, which is no token id {limit}"
                )
            found[token] = None
    return tuple(found)


def _vocabulary(config: Mapping[str, object]) -> int | None:
    size = config.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def _read(file: Path) -> dict[str, object]:
    """A JSON object of a file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object")
    return value


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_folder(path: str, *, weights: bool = True) -> Path:
    """The folder a `model.path` means, downloaded where it is a name on the hub, if asked without weights."""
    if path == "embedded":
        return Path(str(files("mosaic_fast.setup").joinpath("embedded")))
    return model_files(path, weights=weights)


def load_policy(config: Config, weights: Path, *, trainable: bool = True, world: World = ALONE) -> Policy:
    """The policy of a folder, in the configured precision and place; frozen if it is the reference.

    One of several ranks loads it into ordinary memory: `Sharding` moves the rank's part.
    """
    device = torch.device("cpu") if world.size > 1 else device_of(config)
    return Policy.from_pretrained(
        weights,
        dtype=_DTYPES[config.model.dtype],
        device=device,
        trainable=trainable,
        attention=config.model.attention,
        lm_head=config.model.lm_head,
    )


def device_of(config: Config) -> torch.device:
    """The device of `model.device`. The embedded model is faster on a CPU than on a GPU."""
    device = config.model.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and config.model.path != "embedded" else "cpu"
    return torch.device(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. UserError where there is none that can be used."""
    if not folder.is_dir():
        raise UserError(f"model.path: there is no folder {folder}")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  its readers raise everything, plain Exception too
        raise UserError(f"model.path: {folder} has no usable tokenizer ({in_one_line(error)})") from None
    if tokenizer is None:
        raise UserError(f"model.path: {folder} has no tokenizer; put tokenizer.json there")
    _try_tokenizer(tokenizer, folder)
    return tokenizer


def _try_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """UserError for mistakes in a tokenizer's files that show only when it is used, not when it is loaded."""
    unknown, longest = tokenizer.unk_token, tokenizer.model_max_length
    if unknown is not None and unknown not in tokenizer.get_vocab():  # transformers would look for ever
        raise UserError(
            f"model.path: the unk_token of {folder}, {str(unknown)!r:.60}, is not in its tokenizer's "
            "vocabulary: name a token that is there in tokenizer_config.json, or none"
        )
    if not isinstance(longest, int | float):
        raise UserError(
            f"model.path: {folder / 'tokenizer_config.json'}: model_max_length is {longest!r:.60}, no number"
        )
    try:
        tokenizer.decode(tokenizer.encode("a é 漢 😀", add_special_tokens=False))
        read = set(tokenizer.encode("the file", add_special_tokens=False)) - {tokenizer.unk_token_id}
    except Exception as error:  # noqa: BLE001  what it is made of can break any line of it
        raise UserError(f"model.path: {folder} has no usable tokenizer ({in_one_line(error)})") from None
    if not read:  # without a file of its vocabulary, transformers makes one of the special tokens alone
        raise UserError(
            f"model.path: the tokenizer of {folder} knows no ordinary text: its vocabulary is missing; put "
            "the tokenizer.json there that belongs to the model"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, policy: Policy, folder: Path) -> None:
    """UserError where the tokenizer has ids that the model has no embedding for.

    An embedding with more rows than the tokenizer has tokens is padded: the rows beyond are part of the
    policy's distribution, in the engine and in training alike, and stand for no text.
    """
    rows = cast(nn.Embedding, policy.model.get_input_embeddings()).num_embeddings
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        first = min(beyond, key=beyond.__getitem__)
        raise UserError(
            f"model.path: the tokenizer of {folder} has {len(beyond)} tokens beyond the {rows} rows of the "
            f"model's embedding, the first is {first!r:.60} ({beyond[first]}): call "
            f"model.resize_token_embeddings({max(beyond.values()) + 1}) and save the model anew, or take "
            "them out of the tokenizer"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """UserError where the tokenizer saved in a folder is not this one."""
    saved = load_tokenizer(folder)
    template = tokenizer.chat_template
    probe = template if isinstance(template, str) else "The tool said: 42."
    for what, same in (
        ("tokens", saved.get_vocab() == tokenizer.get_vocab()),
        ("chat template", saved.chat_template == template),
        ("way of reading text", saved.encode(probe) == tokenizer.encode(probe)),
    ):
        if not same:
            raise UserError(f"the tokenizer loads with other {what} than it was saved with")
