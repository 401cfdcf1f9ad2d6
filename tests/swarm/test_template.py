from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from swarm import template as templates
from swarm.errors import BadInput
from swarm.template import MOST_CHARACTERS, Parts, render_chat

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <kind> & 'brief'. Ünï 🎉"},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {
        "role": "assistant",
        "content": "4",
        "tool_calls": [{"name": "add", "arguments": {"a": "<é>"}}],
    },
    {"role": "user", "content": "And 3 + 3?"},
]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "arguments": {}}}]

TEMPLATES = {
    "chatml": """{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}""",
    "llama": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- date_string ~ ": " ~ system_message }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages if message.content %}
    {{- loop.index0 ~ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}""",
    "qwen": """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro show(message) %}[{{ message.role }}]{% if message.tool_calls %}
{%- for call in message.tool_calls %}{{ call.arguments | tojson }}{% endfor %}{% endif %}
{%- endmacro %}
{%- for message in messages %}{{ show(message) }}{% generation %}{{ message.content }}
{% endgeneration %}{% endfor %}{{ ns.last * 2 }}{{ 'ab' * 3 }}{{ dict(a=1) }}{{ none }}""",
}


def render(template: str, **more: Any) -> str:
    return render_chat(template, MESSAGES, special_tokens=SPECIAL, **more)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("variables", [{}, {"date_string": "today", "eos_token": "<end>"}], ids=str)
def test_a_chat_is_rendered_as_transformers_renders_it(
    template: str,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> None:
    theirs, _ = render_jinja_template(
        [MESSAGES],
        chat_template=template,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        **{**SPECIAL, **variables},
    )
    ours = render(
        template, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
    )
    assert [ours] == theirs


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(BadInput, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ unknown.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages | nofilter }}",
        "{{ strftime_now(7) }}",
        "{{ [1] | tojson(indent={}) }}",
        "{% include 'other' %}",
        "{{ 'x'.encode('nothing') }}",
        "{% macro deep() %}{{ deep() }}{% endmacro %}{{ deep() }}",
    ],
)
def test_a_broken_template_is_bad_input(template: str) -> None:
    with pytest.raises(BadInput, match="chat template"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ self.__init__.__globals__.x }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ lipsum(n=99999999) }}",
        "{{ range.__self__.globals }}",
    ],
)
def test_a_template_reaches_nothing_outside(template: str) -> None:
    with pytest.raises(BadInput):
        render(template)


GROW = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% set x = range(400) | list %}"
        "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set x = range(400) | list %}"
        "{% for a in x %}{% for b in x if false %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}" + "x" * 10_000 + "{% endfor %}",
        GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        GROW + "{% set ns.x = ns.x * 3 %}{% endfor %}",
        GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        f"{{{{ 'x' * {MOST_CHARACTERS + 1} }}}}",
        "{{ 3 * ([1] * 99999999) }}",
        "{{ 10 ** 10 ** 10 }}",
    ],
    ids=range(11),
)
def test_a_template_that_runs_or_writes_without_end_is_stopped(template: str) -> None:
    with pytest.raises(BadInput, match=r"more than|too high"):
        render(template)


def test_a_template_cannot_replace_what_counts_its_steps() -> None:
    with pytest.raises(BadInput, match="steps"):
        render(
            "{% set step = 1 %}{% set environment = 1 %}{% set x = range(400) | list %}"
            "{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
            variables={"step": 1, "environment": 2},
        )


def test_a_long_conversation_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    for template in TEMPLATES.values():
        assert "word" in render_chat(template, messages, special_tokens=SPECIAL)


PARTED = [{"role": "user", "content": Parts(["one", "two"])}, {"role": "user", "content": "three"}]
LOOPS = {
    "attribute": "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}"
    "{% endfor %}",
    "filter": "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}({{ p['text'] }})"
    "{% endfor %}{% endif %}{% endfor %}",
    "name": "{% for m in messages %}{% set c = m.content %}{% set d = c %}{% if d is string %}"
    "{{ d }}{% else %}{% for p in d %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}",
    "macro": "{% macro show(c, more) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}"
    "({{ p.text }}){% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content, 1) }}{% endfor %}",
}


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS.keys())
def test_parts_are_parts_to_a_template_that_loops_over_them(template: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    plain = [{"role": "user", "content": parts}, {"role": "user", "content": "three"}]
    theirs, _ = render_jinja_template([plain], chat_template=template)
    assert [render_chat(template, PARTED, special_tokens={})] == theirs
    assert "(one)(two)" in theirs[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }};{% endfor %}",
        "{% for m in messages %}{% set c = m['content'] | trim %}{{ c }};{% endfor %}",
        "{% for m in messages %}{% for l in m.content.split('-') %}{{ l }};{% endfor %}"
        "{% endfor %}",
    ],
)
def test_parts_are_a_text_to_every_other_template(template: str) -> None:
    assert render_chat(template, PARTED, special_tokens={}) == "one\ntwo;three;"


@pytest.mark.parametrize(("knows", "role"), [(False, "system"), (True, "developer")])
def test_a_developer_speaks_as_the_system_where_a_template_knows_none(
    knows: bool, role: str
) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{% endfor %}" + "{# developer #}" * knows
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    assert render_chat(template, messages, special_tokens={}) == f"[{role}][user]"
    assert messages[0]["role"] == "developer"


def test_documents_reach_the_template_as_those_given_to_transformers_do() -> None:
    template = (
        "{% if documents %}{% for d in documents %}{{ d.title }}{% endfor %}{% else %}-{% endif %}"
    )
    documents = [{"title": "A", "text": "a"}, {"title": "B", "text": "b"}]
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, documents=documents)
    assert [render(template, variables={"documents": documents})] == theirs == ["AB"]
    assert render(template) == "-"


def test_a_chain_of_names_for_the_content_is_followed_in_one_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = "".join(f"{{% set a{n} = a{n + 1} %}}" for n in range(300))
    loop = "{% set a300 = messages[0].content %}{% for part in a0 %}{% endfor %}"
    seen: list[str] = []
    monkeypatch.setattr(templates, "_note", lambda goes_on, given, to: seen.append(to))
    tree = templates._Environment().parse(names + loop)
    assert not templates._loops_over_content(tree)
    assert len(seen) == 301  # each is looked at once, however they depend on each other
    monkeypatch.undo()
    assert templates._loops_over_content(tree)
