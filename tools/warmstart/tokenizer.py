"""The embedded tokenizer: whole words, the pieces of slot values, and the fixed parts of a JSON call.

A token stands for the same piece wherever it occurs, in a request or between quotes, which is what makes
copying learnable. Spaces are not tokens: the decoder puts them back, and restores every text of the world.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mosaic_rollout.chat.grammar import REFUSAL_TOOL, TAGS
from mosaic_rollout.environments.world import intents, script, tasks, values
from mosaic_rollout.environments.world.environment import TOOL_ARGUMENTS

PAD, UNKNOWN, END_OF_TURN = "<|pad|>", "<|unk|>", "<|im_end|>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
SPECIAL_TOKENS = (PAD, UNKNOWN, END_OF_TURN, SYSTEM, USER, ASSISTANT, TOOL, *TAGS, CALL_OPEN, CALL_CLOSE)
PUNCTUATION = tuple(".,:;?!'\"(){}[]-")
TOOL_OUTPUTS = (
    "found: nothing. sent. paid. posted. deleted. no such file. no such tool. wrong arguments. wrong amount. "
    "file text: invoice: for home address tools"
)
ARGUMENTS = {**{name: tuple(keys) for name, keys in TOOL_ARGUMENTS.items()}, REFUSAL_TOOL: ("reason",)}

CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' -%}
{%- if system or tools -%}
<|system|>{{ system }}{{ ' ' if system and tools else '' }}
{%- if tools -%}
tools: {% for tool in tools -%}
{%- set function = tool['function'] if 'function' in tool else tool -%}
{{ function['name'] }}({{ function['parameters']['properties'].keys() | join(', ') }})
{{- '.' if loop.last else ', ' }}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endif -%}
{%- for message in messages if message['role'] != 'system' -%}
<|{{ message['role'] }}|>{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] if 'function' in call else call -%}
<tool_call>{"name":{{ function['name'] | tojson }},"arguments":
{{- function['arguments'] | tojson(separators=(',', ':')) }}}</tool_call>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def json_chunks() -> list[str]:
    """The fixed parts of compact calls, each a token of its own."""
    first = [f'","arguments":{{"{keys[0]}":"' for keys in ARGUMENTS.values()]
    later = [f'","{key}":"' for keys in ARGUMENTS.values() for key in keys[1:]]
    return list(dict.fromkeys(['{"name":"', *first, *later, '"}}']))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, a function of the world's tables alone; loadable by AutoTokenizer once saved."""
    chunks = json_chunks()
    pieces = [*(f"##{tail}" for tail in (*values.AMOUNT_TAILS, *values.FILE_EXTENSIONS))]
    vocabulary = [*SPECIAL_TOKENS, *chunks, *PUNCTUATION, *sorted(set(_words())), *pieces]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Lowercase()
    fixed = "|".join(re.escape(chunk) for chunk in sorted(chunks, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{fixed}|[a-z0-9_]+(?:\.[a-z]+)?|\s+|[^\w\s]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # a space before every word
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[^\w])|(?<=[^\w.,:;?!]) "), ""),  # none around other signs
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END_OF_TURN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _words() -> Iterator[str]:
    """Every whole word of the world; held-out wordings add none, by construction."""
    banks = [
        *intents.INTENT_BANKS.values(),
        *intents.REASON_BANKS.values(),
        *intents.INJECTION_BANKS.values(),
    ]
    for bank in banks:
        for text in sorted(bank.texts("train")):
            yield from values.words(re.sub(r"\{\w+\}", " ", text))
    texts = [*tasks.OPENERS, *intents.NOTES, TOOL_OUTPUTS, *values.CHANNELS, *values.CONCERNED]
    texts += [" ".join(pair) for pair in intents.PREFIXES["train"]]
    texts += [*intents.PRIVATE, *intents.PUBLIC, *intents.LURES, *intents.ATTACKS]
    texts += [*script.ACT_NAMES.values(), *script.RISKS.values(), script.NO_RISK, script.ORDER_SEEN]
    texts += ["plan next risk unsafe refuse", script.FINAL_PLAN, script.FINAL_ANSWER]
    for text in texts:
        yield from values.words(text)
    yield from values.FIRST_NAMES + values.LAST_NAMES + values.TOPIC_ADJECTIVES + values.TOPIC_NOUNS
    yield from values.FILE_STEMS + values.AMOUNT_HEADS
    for name, keys in ARGUMENTS.items():
        yield name
        yield from keys
