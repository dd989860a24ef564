"""The tokens that end a turn by a model's folder: all that `generate` and a server would stop at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mosaic_fast.errors import UserError


def end_tokens(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json and of config.json, a number or a list of them in either.

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
