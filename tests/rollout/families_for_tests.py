"""Small tokenizers with the families' special tokens, and templates of the structure theirs have."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_QWEN_OPENING = """\
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Functions you may use:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Write a call as JSON inside <tool_call></tool_call>.<|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
"""
_QWEN_CALLS = """\
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>
{%- endfor -%}
"""
_QWEN_OUTPUT = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
<|im_end|>
{% endif %}"""

QWEN25 = (
    _QWEN_OPENING
    + """\
{%- for message in messages -%}
{%- if message.role == 'tool' -%}"""
    + _QWEN_OUTPUT
    + """\
{%- elif message.role != 'system' -%}
<|im_start|>{{ message.role }}
{{ message.content }}"""
    + _QWEN_CALLS
    + """<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}"""
)

# Thoughts are shown after the last message of a user and left out before it; a turn begins inside of them.
QWEN3_THINKING = (
    _QWEN_OPENING
    + """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}"""
    + _QWEN_OUTPUT
    + """\
{%- elif message.role == 'assistant' -%}
{%- set said = message.content.split('</think>') -%}
<|im_start|>assistant
{% if loop.index0 > last.user -%}
<think>
{{ said[0].replace('<think>', '').strip('\\n') if said | length > 1 else '' }}
</think>

{% endif -%}
{{ said[-1].lstrip('\\n') }}"""
    + _QWEN_CALLS
    + """<|im_end|>
{% elif message.role == 'user' -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% endif %}"""
)

# Knows neither tools nor their outputs: a message of another role is left out without a word.
PHI4 = """\
{%- for message in messages -%}
{%- if message.role in ['system', 'user', 'assistant'] -%}
<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant<|im_sep|>{%- endif -%}"""

# Refuses more than one call a message; a call is one bare JSON object.
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ message.content }}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if tools and loop.first %}Functions: {{ tools | tojson }}
{% endif %}{{ message.content }}
{%- if message.tool_calls -%}
{%- if message.tool_calls | length != 1 -%}{{ raise_exception('one call a message') }}{%- endif -%}
{%- set function = message.tool_calls[0].function -%}
{"name": "{{ function.name }}", "parameters": {{ function.arguments | tojson }}}
{%- endif -%}
<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


@dataclass(frozen=True)
class Family:
    """What of a family's tokenizer matters to a conversation."""

    template: str
    special: tuple[str, ...]  # the first one ends a turn
    added: tuple[str, ...] = ()  # tokens of their own that are ordinary text to a decoder
    bos: str | None = None
    thinks_in_prompt: bool = False
    has_tools: bool = True  # whether the template writes tools, calls and outputs

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level BPE with a few merges across the tags' ends, as the families' vocabularies have."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [(">", "Ċ"), ("<", "/"), ("Ċ", "Ċ"), ("}", "Ċ"), ("t", "h")]
        vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=self.special[0], bos_token=self.bos
        )
        fast.add_special_tokens({"additional_special_tokens": list(self.special[1:])})
        fast.add_tokens([AddedToken(text, normalized=False) for text in self.added])
        fast.chat_template = self.template
        return fast


_CALL_TAGS = ("<tool_call>", "</tool_call>")
FAMILIES = {
    "qwen2.5": Family(QWEN25, ("<|im_end|>", "<|im_start|>", "<|endoftext|>"), _CALL_TAGS),
    "qwen3-thinking": Family(
        QWEN3_THINKING,
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        (*_CALL_TAGS, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        thinks_in_prompt=True,
    ),
    "phi-4": Family(PHI4, ("<|im_end|>", "<|im_start|>", "<|im_sep|>", "<|endoftext|>"), has_tools=False),
    "llama-3": Family(
        LLAMA3,
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
    ),
}
