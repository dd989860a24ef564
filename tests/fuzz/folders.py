"""Model folders as they come from others, with one thing in them changed, missing or too many."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mosaic_fast.policy import Policy
from mosaic_fast.setup.model_folder import check_vocabulary, end_tokens, load_tokenizer
from mosaic_rollout.chat import Chat
from mosaic_rollout.errors import UserError
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try
from tests.policy.policy_helpers import CONFIGS
from tools.warmstart.tokenizer import build_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
_ADDED = {
    "adapter_config.json": {"base_model_name_or_path": "some/base"},
    "quantize_config.json": {"bits": 4},
    "chat_template.jinja": None,
}
"""Files that may be put there, with what they hold."""


@contextlib.contextmanager
def _folders(folder: Path) -> Iterator[Try]:
    """Loaded, or refused with the folder's name and in one line: never another error, never broken values."""
    tokenizer = build_tokenizer()
    config = type(CONFIGS["qwen3"]).from_dict(CONFIGS["qwen3"].to_dict() | {"vocab_size": len(tokenizer)})
    for kind, size in (("one", "1GB"), ("shards", "10KB")):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind, max_shard_size=size)
        tokenizer.save_pretrained(folder / kind)
    place, verbosity = folder / "place", logging.get_verbosity()
    logging.set_verbosity_error()

    def attempt(random: Random) -> str:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / random.choice(("one", "shards")), place)
        what = random.choice((_change, _change, _damage, _remove, _add, _point))
        what(random, place)
        try:
            policy = Policy.from_pretrained(
                place, dtype=torch.float32, device=torch.device("cpu"), trainable=False
            )
            known = load_tokenizer(place)
            check_vocabulary(known, policy, place)
            Chat(known, teach_loop=False, end_token_ids=end_tokens(place))
        except UserError as error:
            assert str(place) in str(error) or "model family" in str(error), error
            assert len(str(error)) < 2000
            return "refused"
        assert all(bool(torch.isfinite(x).all()) for x in policy.model.parameters())
        return "accepted"

    try:
        yield attempt
    finally:
        logging.set_verbosity(verbosity)


def _some(random: Random, place: Path, suffix: str = "") -> Path:
    return random.choice(sorted(file for file in place.iterdir() if file.name.endswith(suffix)))


def _change(random: Random, place: Path) -> None:
    """A value of one of its JSON files."""
    file = _some(random, place, ".json")
    content = hostile.written(hostile.changed(random, json.loads(file.read_text(encoding="utf-8"))))
    file.write_text(content, encoding="utf-8", errors="surrogatepass")


def _damage(random: Random, place: Path) -> None:
    file = _some(random, place)
    file.write_bytes(hostile.damaged(random, file.read_bytes()))


def _remove(random: Random, place: Path) -> None:
    _some(random, place).unlink()


def _add(random: Random, place: Path) -> None:
    name, content = random.choice(list(_ADDED.items()))
    text = hostile.text(random) if content is None else json.dumps(hostile.changed(random, content))
    (place / name).write_text(text, encoding="utf-8", errors="surrogatepass")


def _point(random: Random, place: Path) -> None:
    """Git LFS left a pointer."""
    _some(random, place).write_text(POINTER)


FOLDERS = Subject("model folders", 0.03, _folders)
