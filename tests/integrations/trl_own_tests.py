"""TRL's own trainer tests with prefix sharing switched on, without a download: a pytest plugin.

    make test-trl TRL=checkout    # of TRL's repository, whose tests are in no distribution

Every trainer that those tests make shares prefixes, where `share_prefixes` admits it. The small data set that
they load is made by the checkout's own script. In place of the tiny Qwen2 and Qwen3 models of the hub stand
random ones with a tokenizer of bytes; a test that needs another download is skipped. MOSAIC_TRL_ALONE=1
shares nothing: what fails then as well is not the sharing's.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets  # pyrefly: ignore [missing-import]
import pytest
import transformers
import trl  # pyrefly: ignore [missing-import]
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mosaic_fast.errors import UserError
from mosaic_fast.integrations.trl import TRAINERS, Sharing, share_prefixes

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
]
FIRST_SPECIAL = 151_643  # of Qwen's tokenizers: some tests generate an end of turn by its id
FAMILIES = {"Qwen2": "2.5", "Qwen3": ""}
sharings: list[Sharing] = []
refused: list[str] = []


def make_models(hub: Path) -> None:
    """The tiny models as the hub's cache would hold them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = letters + [f"<{index}>" for index in range(len(letters), FIRST_SPECIAL)]  # never read
    words = Tokenizer(models.BPE({text: index for index, text in enumerate(vocabulary)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=SPECIAL[0], eos_token=SPECIAL[2]
    )
    templates = Path(trl.__file__).parent / "chat_templates"
    for family, version in FAMILIES.items():
        tokenizer.chat_template = (templates / f"{family.lower()}{'_5' if version else ''}.jinja").read_text()
        config = getattr(transformers, f"{family}Config")(
            vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=32, max_position_embeddings=32_768,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for kind in ("ForCausalLM", "ForSequenceClassification"):
            name = f"tiny-{family}{kind}" + (f"-{version}" if version else "")
            folder = hub / f"models--trl-internal-testing--{name}"
            (folder / "refs").mkdir(parents=True)
            (folder / "refs" / "main").write_text("0" * 40)
            config.num_labels = 1 if kind != "ForCausalLM" else 2
            model = getattr(transformers, family + kind)(config)
            for one in (model, tokenizer):
                one.save_pretrained(folder / "snapshots" / ("0" * 40))


def zen_of(checkout: Path) -> dict[str, Any]:
    """The configurations of the small data set, from the script that uploads it."""
    found: dict[str, Any] = {}

    def keep(self: Any, _: str, config_name: str = "default", **__: object) -> None:
        found.setdefault(config_name, datasets.DatasetDict()).update(self)

    uploads, arguments = datasets.DatasetDict.push_to_hub, sys.argv
    datasets.DatasetDict.push_to_hub = keep
    sys.argv = ["generate_zen_dataset.py", "--push_to_hub"]
    try:
        runpy.run_path(str(checkout / "scripts" / "generate_zen_dataset.py"), run_name="__main__")
    finally:
        datasets.DatasetDict.push_to_hub, sys.argv = uploads, arguments
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Before TRL's tests are imported, which take `load_dataset` by name."""
    hub = Path(tempfile.mkdtemp(prefix="trl-hub-"))
    make_models(hub)
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_CACHE = transformers.utils.hub.constants.HF_HUB_CACHE = str(hub)
    zen = zen_of(Path.cwd())

    def load_dataset(
        path: str, name: str = "default", *, split: str | None = None, streaming: bool = False
    ) -> Any:
        if path != "trl-internal-testing/zen":
            pytest.skip(f"{path} is a download")
        data = zen[name]
        if split is None:
            return data
        part, _, end = split.rstrip("]").partition("[:")
        data = data[part].select(range(int(end))) if end else data[part]
        return data.to_iterable_dataset() if streaming else data

    datasets.load_dataset = load_dataset
    if not os.environ.get("MOSAIC_TRL_ALONE"):
        for name in TRAINERS:
            _share_in(getattr(trl, name))


def _share_in(trainer: Any) -> None:
    made = trainer.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        try:
            sharings.append(share_prefixes(self))
        except UserError as error:
            refused.append(str(error))

    trainer.__init__ = init


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that would download more is skipped, not failed."""
    report = yield
    cause = call.excinfo.value if call.excinfo else None
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and report.failed:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "Skipped: it needs a download")
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how much was really shared."""
    forwards, rows, computed = (
        sum(getattr(one, name) for one in sharings) for name in ("forwards", "row_tokens", "computed_tokens")
    )
    left = sum((one.left_to_trl for one in sharings), Sharing().left_to_trl)
    terminalreporter.write_line(
        f"{len(sharings)} trainers shared prefixes: {forwards} forwards, {rows} tokens, {computed} computed"
    )
    for reason, count in left.items():
        terminalreporter.write_line(f"{count} forwards left to TRL: {reason}")
    for reason in sorted(set(refused)):
        terminalreporter.write_line(f"{refused.count(reason)} trainers refused: {reason}")
