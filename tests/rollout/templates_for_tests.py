"""More templates in the shapes of families, and tokenizers with ways of their own with white space."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .families_for_tests import LLAMA3, PHI4, QWEN3_THINKING, QWEN25

_ALTERNATES = """\
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant take turns') }}
{%- endif -%}
{%- endfor -%}
"""

# The answer stands between spaces, the system message within the user's first, and tools are not known.
LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
{%- set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('take turns') }}{%- endif -%}
{%- set said = (first if loop.first else '') + message.content -%}
{%- if message.role == 'user' -%}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + said.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""

# No system role, strict turns, the assistant under another name.
GEMMA = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    + _ALTERNATES
    + """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
)

# Roles on lines of their own; at the conversation's end the end of text, where nothing is to follow.
PHI3 = """\
{%- for message in messages -%}
{%- if message.role in ['system', 'user', 'assistant'] -%}
{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""

# Ids of nine letters; an output only after a call; the tools before the user's last message.
MISTRAL = """\
{{- bos_token -}}
{%- set last = namespace(user=0) -%}
{%- for message in messages if message.role == 'user' -%}{%- set last.user = message -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if tools and message == last.user -%}
{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls -%}
{{ '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls -%}
{%- if call.id | length != 9 -%}{{ raise_exception('ids have nine letters') }}{%- endif -%}
{{ {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
{%- endfor -%}
{{ ']' + eos_token }}
{%- elif message.role == 'tool' -%}
{%- if not messages[loop.index0 - 1].tool_calls -%}
{{ raise_exception('an output without a call') }}{%- endif -%}
{{ '[TOOL_RESULTS] ' + ({'content': message.content, 'call_id': message.tool_call_id} | tojson) }}
{{- '[/TOOL_RESULTS]' }}
{%- elif message.role == 'system' -%}{{ '[INST] ' + message.content + '[/INST]' }}
{%- else -%}{{ ' ' + message.content + eos_token }}{%- endif -%}
{%- endfor -%}"""

# Two templates by name; the one without tools writes a tool's message as any other.
_NAMED_PLAIN = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
NAMED = {"default": _NAMED_PLAIN, "tool_use": QWEN25}

# Asks for the date, and shows what a tool returned as JSON.
DATED = LLAMA3.replace(
    "{{- bos_token -}}", "{{- bos_token -}}Today is {{ strftime_now('%d %b %Y') }}."
).replace(
    "ipython<|end_header_id|>\n\n{{ message.content }}",
    "ipython<|end_header_id|>\n\n{{ message.content | tojson }}",
)

# Arguments are text already, and a message that calls has no content.
TEXT_ARGUMENTS = QWEN25.replace(
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}",
    "{{ '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments + '}' }}",
)

TEMPLATES: dict[str, str | dict[str, str]] = {
    "qwen2.5": QWEN25,
    "qwen3-thinking": QWEN3_THINKING,
    "phi-4": PHI4,
    "llama-3": LLAMA3,
    "llama-2": LLAMA2,
    "gemma": GEMMA,
    "phi-3": PHI3,
    "mistral": MISTRAL,
    "named": NAMED,
    "dated": DATED,
    "text arguments": TEXT_ARGUMENTS,
}
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
_MARKS = re.compile(
    r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]|</?tool_(?:call|response)>|</?think>"
)
_ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
_MERGES = (">Ċ", "</", "ĊĊ", "}Ċ", "th", "><", "Ġ<", '"}', "ĠĠ", "er")
KINDS = ("bytes", "swallows after", "swallows before", "prefix space", "compatible letters")


def tokenizer(template: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind with the marks of a template as tokens.

    bytes: BPE with merges over marks' ends. swallows after, before: its marks take the white space there with
    them. prefix space: SentencePiece's, which every stretch of text begins with. compatible letters: NFKC,
    and marks are looked for in what it makes of a text.
    """
    found = TEMPLATES[template]
    texts = [found] if isinstance(found, str) else list(found.values())
    marks = list(dict.fromkeys(["<s>", "</s>", *(mark for text in texts for mark in _MARKS.findall(text))]))
    marks += [role for role in _ROLES if template == "phi-3"]
    if kind == "prefix space":
        raw = _sentence_pieces()
    else:
        raw = _bytes()
    if kind == "compatible letters":
        raw.normalizer = normalizers.NFKC()
    raw.add_special_tokens(
        [
            AddedToken(
                mark,
                special=not mark.startswith(("<tool", "</tool", "<think", "</think")),
                normalized=kind == "compatible letters",
                rstrip=kind == "swallows after",
                lstrip=kind == "swallows before",
            )
            for mark in marks
        ]
    )
    end = next((end for end in _ENDS if end in "".join(texts) and template != "phi-3"), "</s>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>" if kind == "prefix space" else None,
    )
    fast.chat_template = found
    return fast


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *_MERGES]))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[(merge[0], merge[1]) for merge in _MERGES]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def _sentence_pieces() -> Tokenizer:
    letters = [chr(code) for code in range(32, 127)] + ["\n", "\t", "▁", "é"]
    merges = ["▁a", "><", "▁▁", "er", "\n\n"]
    vocab = {token: i for i, token in enumerate(["<unk>", *letters, *merges])}
    raw = Tokenizer(
        models.BPE(vocab=vocab, merges=[(m[0], m[1]) for m in merges], unk_token="<unk>", fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return raw
