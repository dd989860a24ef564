"""Which templates' forms of tool calls are read, and which give way to one that is taught."""

import pytest

from mosaic_rollout.chat import call_formats
from mosaic_rollout.chat.call_formats import (
    FORMATS,
    HERMES,
    LLAMA,
    MISTRAL,
    PHI,
    PYTHONIC,
    QWEN3_CODER,
    XLAM,
    CallFormat,
    detect_call_format,
)
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import parse_turn
from mosaic_rollout.chat.prompts import load_prompt
from mosaic_rollout.types import ToolCall
from tests.rollout.calls_for_tests import schema_of
from tests.rollout.tokenizers_for_tests import PLAIN, byte_tokenizer

each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)

TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
)
_CALL = "{'name': c.function.name, 'arguments': c.function.arguments} | tojson"
_PAIRS = "{% for k, v in c.function.arguments.items() %}"
CALLS: dict[CallFormat, str] = {
    HERMES: "\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>",
    PHI: f"<|tool_call|>[{{{{ {_CALL} }}}}]<|/tool_call|>",
    MISTRAL: f"[TOOL_CALLS][{{{{ {_CALL} }}}}]",
    LLAMA: '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
    XLAM: f"[{{{{ {_CALL} }}}}]",
    PYTHONIC: f"[{{{{ c.function.name }}}}({_PAIRS}{{{{ k }}}}={{{{ v | tojson }}}}"
    "{% if not loop.last %}, {% endif %}{% endfor %})]",
    QWEN3_CODER: f"\n<tool_call>\n<function={{{{ c.function.name }}}}>\n{_PAIRS}<parameter={{{{ k }}}}>\n"
    "{{ v | tojson if v is mapping or (v is sequence and v is not string) else v }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>",
}
TOOL = schema_of(ToolCall("add", {"n": 1}))


def template(calls: str, *, system: bool = True, tools: str = TOOLS) -> str:
    """A template that writes calls so, with a system message or without."""
    refuses = "" if system else "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    body = "{% for c in m.tool_calls or [] %}" + calls + "{% endfor %}<|im_end|>\n{% endfor %}"
    head = "{% for m in messages %}" + refuses + "<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    return tools + head + body + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@each_format
@pytest.mark.parametrize("system", [True, False])
def test_the_form_that_a_template_writes_is_the_one_that_is_read(form: CallFormat, system: bool):
    chat = Chat(byte_tokenizer(template(CALLS[form], system=system)), teach_loop=False)
    assert chat.call_format is form
    text = chat.decode(chat.prompt([{"role": "user", "content": "go"}], [TOOL])[0])
    assert "<|im_start|>tools" in text
    assert "one JSON schema a line" not in text


UNREAD = {
    "another form": "<call>{{ c.function.name }}: {{ c.function.arguments | tojson }}</call>",
    "Hermes' tags": "<tool_call>{{ c.function.name }}\n{{ c.function.arguments | tojson }}</tool_call>",
    "no comma": f"[{{{{ c.function.name }}}}({_PAIRS}{{{{ k }}}}={{{{ v | tojson }}}}{{% endfor %}})]",
    "Python's quotes": '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | list }}}',
    "arguments left out": '<tool_call>{"name": "{{ c.function.name }}"}</tool_call>',
    "another name": f"<tool_call>{{{{ {_CALL.replace('arguments', 'args', 1)} }}}}</tool_call>",
    "texts changed": '<tool_call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson | replace('é', 'e') }}}</tool_call>",
    "all values as texts": '<tool_call>{"name": "{{ c.function.name }}", "arguments": { '
    + _PAIRS
    + '"{{ k }}": {{ v | string | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}}}</tool_call>',
    "quotes not escaped": '<tool_call>{"name": "{{ c.function.name }}", "arguments": { '
    + _PAIRS
    + '"{{ k }}": "{{ v }}"{% if not loop.last %}, {% endif %}{% endfor %}}}</tool_call>',
    "no calls": "",
    "it fails on calls": "{{ raise_exception('no calls') }}",
}


@pytest.mark.parametrize("calls", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("system", [True, False])
def test_a_form_that_is_not_read_gives_way_to_one_that_is_taught(calls: str, system: bool):
    chat = Chat(byte_tokenizer(template(calls, system=system)), teach_loop=False)
    text = chat.decode(chat.prompt([{"role": "user", "content": "go"}], [TOOL])[0])
    assert '<tool_call>{"name": "tool name"' in text
    assert '"add"' in text
    assert "<|im_start|>tools" not in text
    assert chat.call_format is HERMES


def test_what_is_taught_is_what_is_read():
    taught = load_prompt("call_format_v1").format(tools="").splitlines()[-1]
    turn = parse_turn(f"<think>a</think>{taught}", HERMES)
    assert turn.call == ToolCall("tool name", {"argument": "value"})
    assert HERMES.write(ToolCall("tool name", {"argument": "value"})) == taught
    chat = Chat(byte_tokenizer(PLAIN), teach_loop=False)
    assert taught in chat.decode(chat.prompt([{"role": "user", "content": "go"}], [TOOL])[0])


def test_the_module_names_every_format():
    for form in FORMATS:
        assert f"| {form.name} |" in (call_formats.__doc__ or "")
        assert detect_call_format(form.write(ToolCall("f", {"x": "y"}))) is form
