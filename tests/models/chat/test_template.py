"""Chat templates: equal to transformers on real templates, and bounded on hostile ones.

The templates in chat_templates are the published ones of SmolLM2, Qwen2.5, Qwen3 (Apache-2.0) and Phi-3.5
(MIT); those written out here have the shape of Mistral's, Gemma's and Llama 3.1's.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from fakes.throughput.peak import peak_bytes_of
from transformers.utils.chat_template_utils import render_jinja_template

from shoal.models.chat.renderer import MAX_SOURCE_CHARS
from shoal.models.chat.template import ChatTemplate
from shoal.models.children import Limits
from shoal.models.errors import ModelError, TemplateError

PUBLISHED = {
    path.stem: path.read_text() for path in (Path(__file__).parent / "chat_templates").glob("*.jinja")
}

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ message['content'] + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = (messages[0]['content'] if messages[0]['content'] is string
                      else messages[0]['content'][0]['text']) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- set ns = namespace(calls=0) %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {%- set ns.calls = ns.calls + 1 %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {% generation %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
        {% endgeneration %}
    {%- endif %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

TEMPLATES = {**PUBLISHED, "mistral": MISTRAL, "gemma": GEMMA, "llama": LLAMA}

USER = {"role": "user", "content": "Is 1 < 2 & 'so' on? 😀 "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 10**12}}}
    ],
}
RESULT = {"role": "tool", "name": "weather", "content": "sunny"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how <warm> it is",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, USER],
    "same role twice": [USER, USER],
    "tools": [USER, CALL, RESULT, ASSISTANT, USER],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_real_templates_render_as_in_transformers(name: str, conversation: str) -> None:
    template, messages = ChatTemplate(TEMPLATES[name], "<s>", "</s>"), CONVERSATIONS[conversation]
    for tools in (None, TOOLS):
        for options in ({}, {"enable_thinking": False}, {"date_string": "1 Jan 2025"}):
            for prompt in (True, False):
                common = {"tools": tools, "add_generation_prompt": prompt, **options}
                try:
                    theirs = render_jinja_template(
                        conversations=[messages],
                        chat_template=TEMPLATES[name],
                        bos_token="<s>",
                        eos_token="</s>",
                        **common,
                    )[0][0]
                except Exception:
                    with pytest.raises(TemplateError):
                        template.render(messages, **common)
                else:
                    assert template.render(messages, **common) == theirs


def test_a_refusal_by_the_template_is_one_clear_line() -> None:
    with pytest.raises(
        TemplateError, match="refuses this conversation: Conversation roles must alternate"
    ) as caught:
        ChatTemplate(MISTRAL).render([USER, USER])
    assert "\n" not in str(caught.value)


def test_without_a_template_it_is_chatml() -> None:
    text = ChatTemplate(None).render([SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_content_in_parts_reads_as_one_text(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], "<s>", "</s>")
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]}
    ]
    whole = [{"role": "user", "content": "Helloyou" if name == "gemma" else "Hello you"}]  # gemma trims parts
    assert template.render(parts) == template.render(whole)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": object()}],
        ["hello"],
    ],
)
def test_conversations_that_are_none_are_refused(messages: list[object]) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(PUBLISHED["smollm2"]).render(messages)  # type: ignore[arg-type]


SIXTEEN = "{% set x = 'aaaaaaaaaaaaaaaa' %}"
SHARED = (
    "{% set ns = namespace(a=[1], b=[1]) %}"
    "{% for i in range(50) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
MILLION = "{% set x = 'a' * 1000000 %}"
HOSTILE = {
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "text times": "{{ 'a' * 10 ** 9 }}",
    "list times": "{{ [0] * 10 ** 9 }}",
    "squares": "{% set ns = namespace(x=2) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent width": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format nested": "{{ '{0[0]:{0[1]}}'.format([1, 10 ** 9]) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "indent": "{{ 'x' | indent(10 ** 9) }}",
    "json indent": "{{ messages | tojson(indent=10 ** 8) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "lipsum": "{{ lipsum(10 ** 6) }}",
    "doubling ~": SIXTEEN + "{% set x = x ~ x %}" * 60,
    "doubling +": SIXTEEN + "{% set x = x + x %}" * 60,
    "doubling block": SIXTEEN + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling list": "{% set x = [1] %}" + "{% set x = x + x %}" * 60,
    "replace": MILLION + "{{ x.replace('a', x) }}",
    "replace filter": MILLION + "{{ x | replace('a', x) }}",
    "join": MILLION + "{{ x.join(range(99999)) }}",
    "join filter": MILLION + "{{ range(99999) | join(x) }}",
    "translate": MILLION + "{{ x.translate({97: x}) }}",
    "slices": MILLION + "{% for i in range(99999) %}{{ x[1:] }}{% endfor %}",
    "output": MILLION + "{% for i in range(99) %}{{ x }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "include": "{% include 'x' %}",
    "percent": "{{ '%1000000000s' % 'x' }}",
    "centred": "{{ 'x'.center(10 ** 10) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(10 ** 7) }}",
    "zeros": "{{ '1'.zfill(10 ** 10) }}",
    "joined lists": MILLION + "{{ [x] * 4000 | length }}{{ x | list | join(x) }}",
    "batches": "{{ range(9) | batch(10 ** 9, 'x') | list }}",
    "slices of nothing": "{{ [] | slice(10 ** 9) | list }}",
    "attributes": "{{ {'a': 'x' * 10 ** 8} | xmlattr }}",
    "bytes": "{{ ('a' * 10 ** 7).encode('utf-32') }}",
    "tuple keys": "{{ {('a',) * 10 ** 8: 1} }}",
    "whole numbers": "{{ 7 ** (10 ** 6) }}",
    "long numbers": "{{ " + "9" * 900_000 + " }}",
    "printed": SHARED + "{{ ns.a | pprint }}",
    "nested as JSON": SHARED + "{{ ns.a | tojson }}",
    "nested as text": SHARED + "{{ ns.a }}",
    "undefined": "{{ nothing.x }}",
    "division": "{{ 1 / 0 }}",
    "lines": "{{ raise_exception('a\\nb') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_early_in_one_clear_line(name: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(HOSTILE[name], max_render_s=60).render([USER])
    assert "\n" not in str(caught.value)
    assert "in time" not in str(caught.value)  # they end at a size


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n < 40 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}",
        "{% for i in range(99999) %}{% set y = range(9999) | list | sort %}{% endfor %}",
        SHARED + "{{ ns.a == ns.b }}",
        SHARED + "{{ ns.a in [ns.b] }}",
        SHARED + "{{ [ns.a, ns.b] | sort }}",
        SHARED + "{{ [ns.a, ns.b] | max }}",
        "{{ range(99999) | map('string') | map('list') | map('sort') | list | sum(start=[]) }}",
        "{% for i in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
        "{{ (7 ** (10 ** 8)) % 3 }}",
        "{{ 10 ** (10 ** 10) }}",
        MILLION + "{{ x | wordwrap(1, true, x) }}",
        "{{ messages | tojson }}" * 30_000,
        "{{ [" + "1," * 400_000 + "] }}",
        "{{ " + " ~ ".join(["a"] * 100_000) + " }}",
    ],
)
def test_endless_templates_are_stopped_by_the_clock(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError, match="did not end in time"):
        ChatTemplate(source, max_render_s=0.1).render([USER])
    assert time.monotonic() - started < Limits.slack_s - 5


@pytest.mark.parametrize(
    "source",
    ["{{ '{x}'.format_map({'x': 1}) }}", "{{ strftime_now('%999999d')[:0] }}", "{{ 'ab' | center(9) }}"],
)
def test_what_takes_little_is_allowed(source: str) -> None:
    theirs = render_jinja_template(conversations=[[USER]], chat_template=source)[0][0]
    assert ChatTemplate(source).render([USER]) == theirs


def test_a_template_that_was_stopped_hurts_no_other_rendering() -> None:
    slow = ChatTemplate(
        SHARED + "{% if messages | length > 1 %}{{ ns.a == ns.b }}{% endif %}ok", max_render_s=2
    )
    other = ChatTemplate(MISTRAL)
    failures: list[str] = []

    def attack() -> None:
        try:
            slow.render([USER, USER])
        except ModelError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=attack) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert "Is 1 < 2" in other.render([USER])
    assert not failures, "it has waited for them"
    for thread in threads:
        thread.join()
    assert len(failures) == 4
    assert slow.render([USER]) == "ok"


def test_messages_name_the_model() -> None:
    for source in ("{{ nothing.x }}", "{{ 'x' * 10 ** 9 }}", "{{ raise_exception('no') }}"):
        with pytest.raises(TemplateError, match=r"the chat template of tiny\.gguf"):
            ChatTemplate(source, of="tiny.gguf").render([USER])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% nonsense %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"]
)
def test_malformed_templates_are_refused_when_read(source: str) -> None:
    with pytest.raises(TemplateError, match="malformed"):
        ChatTemplate(source)


def test_a_template_of_megabytes_is_refused() -> None:
    with pytest.raises(TemplateError, match=f"at most {MAX_SOURCE_CHARS}"):
        ChatTemplate("x" * (MAX_SOURCE_CHARS + 1))


def test_what_is_not_ascii_goes_to_the_template_as_utf_8() -> None:
    """Its escapes would take three times as much, and there are copies of them."""
    template, text = ChatTemplate("{{ messages[0].content }}"), "\u0441\u043b\u043e\u0432\u043e" * 400_000
    assert template.render([{"role": "user", "content": "x"}]) == "x"  # the child is there
    made: list[str] = []
    peak = peak_bytes_of(lambda: made.append(template.render([{"role": "user", "content": text}])))
    assert made == [text]
    assert peak < 6 * len(text.encode())


def test_lone_surrogates_and_large_numbers_reach_the_template() -> None:
    said = {"role": "user", "content": "a\ud83d", "number": 1 << 70}
    rendered = ChatTemplate("{{ messages[0].content }}{{ messages[0].number }}").render([said])
    assert rendered == f"a\ud83d{1 << 70}"
