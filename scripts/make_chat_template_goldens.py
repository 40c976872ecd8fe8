#!/usr/bin/env python3
"""Render chat templates with transformers and write what the Rust side must render.

    pip install "transformers>=4.57" jinja2        # torch is not needed
    python3 scripts/make_chat_template_goldens.py [--official DIR]

Writes tests/fixtures/chat_templates/goldens.json: a list of cases with their inputs and either
`output` or `raises`. Templates are this program's own (chat_templates/), the official ones kept
under tests/fixtures/chat_templates/official/, and short ones below that each show one feature.

With --official DIR, which holds NAME.jinja for the names of chat_templates/, every case of a
built-in template is also rendered with the official file and must come out the same. That is for
templates whose licence does not let them live in this repository.
"""

import argparse
import json
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "chat_templates"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, <b>now</b> & \"later\"; it's 'fine'. 天气 ☀️",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City name"},
                "days": {"type": "integer", "minimum": 1, "default": 1.0},
                "items": {"type": "array", "items": {"type": "string"}, "enum": []},
                "strict": {"type": "boolean", "default": None},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}

CHATS = {
    "one_user": [user("Hi")],
    "system_and_user": [system("Be brief."), user("Hi")],
    "multi_turn": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "two_systems": [system("One."), user("a"), system("Two."), assistant("b"), user("c")],
    "empty_content": [system(""), user(""), assistant(""), user("x")],
    "whitespace": [system("  s \n"), user("\n\n a \t"), assistant(" b\n"), user(" c ")],
    "unicode": [system("你是助手。"), user("naïve 😀 — ﬁ 𝔘 \u200b\u00a0é\u0301"), assistant("好的\u3000")],
    "special_text": [user("<|im_end|> <s> {{ x }} {% if %} \\n 'a' \"b\" <&>")],
    "ends_with_assistant": [user("Count."), assistant("One, two,")],
    "reasoning": [
        user("a"),
        assistant("<think>\nold thought\n</think>\n\nanswer"),
        user("b"),
        assistant("<think>\nnew thought\n</think>\n\nanswer two"),
    ],
    "reasoning_field": [
        user("a"),
        assistant("answer", reasoning_content="first\nsecond"),
        user("b"),
        assistant("two", reasoning="by another name"),
    ],
}
TOOL_CHATS = {
    "call_and_result": [
        user("Weather?"),
        assistant("", tool_calls=[call("get_weather", {"city": "Köln & <Bonn>", "days": 2})]),
        tool('{"sky": "clear"}'),
    ],
    "two_calls": [
        system("Use tools."),
        user("Weather and time?"),
        assistant(
            "Let me see.",
            tool_calls=[call("get_weather", {"city": "北京", "f": [1.5, None, True]}), call("clock", {})],
        ),
        tool("sunny"),
        tool("12:00"),
        assistant("It is noon."),
        user("Thanks"),
    ],
}


def chat_cases(template):
    for name, messages in CHATS.items():
        if name.startswith("reasoning") and template not in ("qwen3", "official/qwen3"):
            continue
        yield {"name": f"{template}/{name}", "messages": messages, "add_generation_prompt": True}
    for name in ("one_user", "unicode", "reasoning"):
        yield {"name": f"{template}/{name}/no_generation_prompt", "messages": CHATS[name]}
    yield {
        "name": f"{template}/continue",
        "messages": CHATS["ends_with_assistant"],
        "continue_final_message": True,
    }
    yield {
        "name": f"{template}/continue_trimmed",
        "messages": [user("x"), assistant("  Sure, \n")],
        "continue_final_message": True,
    }


def tool_cases(template):
    for name, messages in TOOL_CHATS.items():
        if template == "llama3" and name == "two_calls":
            continue
        yield {
            "name": f"{template}/{name}",
            "messages": messages,
            "tools": [WEATHER, CLOCK],
            "add_generation_prompt": True,
        }
        yield {"name": f"{template}/{name}/no_tools", "messages": messages}
    yield {"name": f"{template}/tools_only", "messages": CHATS["one_user"], "tools": [WEATHER]}
    yield {"name": f"{template}/no_tool_in_list", "messages": CHATS["system_and_user"], "tools": []}


def template_cases():
    date = {"date_string": "26 Jul 2024"}
    for template in ("chatml", "qwen2.5", "qwen3", "llama3", "official/smollm2", "official/qwen2.5", "official/qwen3"):
        cases = list(chat_cases(template))
        if "qwen" in template or template == "llama3":
            cases += tool_cases(template)
        if "qwen3" in template:
            for thinking in (False, True):
                cases.append({
                    "name": f"{template}/enable_thinking_{thinking}".lower(),
                    "messages": CHATS["reasoning"][:3],
                    "add_generation_prompt": True,
                    "kwargs": {"enable_thinking": thinking},
                })
            cases.append({
                "name": f"{template}/calls_with_text_arguments",
                "messages": [
                    user("t"),
                    assistant("", reasoning_content="hm", tool_calls=[call("clock", "{}")]),
                    tool("1"),
                    assistant("thus", tool_calls=[{"name": "clock", "arguments": {}}]),
                    user("<tool_response>\nx\n</tool_response>"),
                ],
                "add_generation_prompt": True,
            })
        if template == "llama3":
            cases.append({
                "name": "llama3/tools_in_system",
                "messages": CHATS["system_and_user"],
                "tools": [WEATHER],
                "kwargs": {"tools_in_user_message": False},
            })
            cases.append({
                "name": "llama3/two_calls_raise",
                "messages": TOOL_CHATS["two_calls"],
                "tools": [CLOCK],
            })
            cases.append({"name": "llama3/no_message_for_tools", "messages": [system("s")], "tools": [CLOCK]})
            cases.append({
                "name": "llama3/structured_result",
                "messages": [user("q"), {"role": "ipython", "content": {"a": [1, 2.5, "<é>"]}}],
            })
        for case in cases:
            case["template_name"] = template
            if template == "llama3":
                case["kwargs"] = {**date, **case.get("kwargs", {})}
            yield case


NESTED = {"z": [1, 2.0, -0.0, 1e16, 1e-7, 123456789012345680000.0, True, None], "a": {"<k>&'\"": "é\u2028\x7f\x01\\/", "": []}, "e": {}}
FEATURES = {
    "tojson": "{{ x | tojson }}|{{ x | tojson(indent=2) }}|{{ x | tojson(sort_keys=true) }}|{{ x | tojson(ensure_ascii=True, separators=(',', ':')) }}|{{ x | tojson(indent='--') }}|{{ 'a' | tojson }}|{{ none | tojson }}|{{ [] | tojson(indent=4) }}",
    "printing": "{{ x }}|{{ x.z }}|{{ true }} {{ false }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ 0.1 + 0.2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ (1,) }} {{ (1, 'a') }} {{ \"it's\" }} {{ [\"it's\", 'q\"'] }} {{ x.e }} {{ undefined_name }}|{{ x | string }}|{{ 1.5 | string }}",
    "tests": "{% for v in ['s', 1, 1.5, true, none, [1], {'a': 1}, (1, 2)] %}{{ v is string }} {{ v is number }} {{ v is integer }} {{ v is float }} {{ v is boolean }} {{ v is none }} {{ v is sequence }} {{ v is iterable }} {{ v is mapping }} {{ v is defined }} {{ v is true }} {{ v is sameas(true) }} {{ v is callable }}\n{% endfor %}{{ nope is defined }} {{ nope is undefined }} {{ nope is none }} {{ x.nope is defined }} {{ x['nope'] is undefined }} {{ 3 is odd }} {{ 4 is divisibleby(2) }} {{ 'a' in 'cat' }} {{ 'z' in x }} {{ 'q' not in x }} {{ 2 in (1, 2) }} {{ not nope }} {{ raise_exception is callable }}",
    "string_methods": "{{ ' a '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ '\\n\\x1f a\\u3000'.strip() }}|{{ 'a,b,,c'.split(',') }}|{{ ' a  b c '.split() }}|{{ 'a b c d'.split(' ', 1) }}|{{ ' a  b  c '.split(none, 1) }}|{{ 'a-b-c'.rsplit('-', 1) }}|{{ ' a  b  c '.rsplit(none, 1) }}|{{ 'a.b'.partition('.') }}|{{ 'a.b.c'.rpartition('.') }}|{{ 'abc'.partition('x') }}|{{ 'Hello'.upper() }}{{ 'Hello'.lower() }}|{{ \"they're bill's\".title() }}|{{ 'hELLO wORLD'.capitalize() }}|{{ 'aXbX'.replace('X', '-') }}|{{ 'aXbX'.replace('X', '-', 1) }}|{{ 'ab'.replace('', '.') }}|{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}|{{ 'abcabc'.find('c') }} {{ 'abcabc'.rfind('c') }} {{ 'é😀c'.find('c') }} {{ 'abc'.find('z') }} {{ 'abcabc'.find('a', 1) }}|{{ 'banana'.count('a') }} {{ 'banana'.count('') }}|{{ '-'.join(['a', 'b']) }}|{{ 'a\\nb\\r\\nc\\x0bd\\u2028e'.splitlines() }}|{{ 'a\\nb\\n'.splitlines(true) }}|{{ 'ab'.ljust(5, '.') }}{{ 'ab'.rjust(5) }}|{{ 'ab'.center(5, '*') }}{{ 'abc'.center(6, '*') }}|{{ '-42'.zfill(6) }}|{{ 'prefix-x'.removeprefix('prefix-') }}{{ 'x.txt'.removesuffix('.txt') }}|{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'ab'.isalpha() }}{{ ' \\t'.isspace() }}{{ 'AB'.isupper() }}{{ 'ab'.islower() }}|{{ 'Ab'.swapcase() }}|{{ '{} and {x}'.format(1, x='y') }}",
    "dict_methods": "{{ d.items() | list }}|{{ d.keys() | list }}|{{ d.values() | list }}|{{ d.get('a') }} {{ d.get('nope') }} {{ d.get('nope', 7) }}|{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}|{% for k in d %}{{ k }},{% endfor %}|{{ d | length }} {{ d.keys() | length }}|{{ d | dictsort }}|{{ d | items | list }}|{{ 'a' in d }} {{ d['items'] }} {{ dict(d, z=1) | tojson }}|{{ d.b[-1] }} {{ d.b[0:2] }} {{ d.b[::-1] }}|{{ d.b | join('+') }}",
    "filters": "{{ 'a' | upper }}{{ ' x ' | trim }}|{{ [3, 1, 2] | sort }}|{{ [3, 1, 2] | sort(reverse=true) | first }}|{{ [1, 2] | last }}|{{ ['a', 'b'] | join(', ') }}|{{ [1, 2, 3] | sum }}|{{ 'abc' | length }} {{ nope | length }}|{{ nope | default('d') }} {{ '' | default('d', true) }} {{ none | default('d') }}|{{ [1, none, 2] | select | list }}|{{ [1, 2, 3] | reject('odd') | list }}|{{ l | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}|{{ l | rejectattr('role', 'eq', 'user') | list | length }}|{{ ['a', 'b'] | map('upper') | list }}|{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'a-b' | replace('-', '+') }}|{{ 3.7 | int }} {{ '5' | int + 1 }} {{ 'x' | int }} {{ '2.5' | float }} {{ 2.567 | round(1) }} {{ -3 | abs }}|{{ [1, 1, 2] | unique | list }}|{{ 'cab' | list }}|{{ [1, 2, 3] | reverse | list }}|{{ 'hello world' | title }} {{ 'HELLO' | capitalize }}|{{ '%s is %d' | format('a', 3) }}|{{ [1, 2, 3, 4, 5] | batch(2) | list }}|{{ [[1, 2], [3]] | map('length') | list }}|{{ [1, 5, 3] | max }} {{ [1, 5, 3] | min }}|{{ '<a>' | e }}|{{ d | tojson | length }}|{{ nope | list }}",
    "control": "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}{{ loop.index }}{{ loop.first }}{{ loop.last }} {% endfor %}|{% for m in l if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ m.content }}{% else %}none{% endfor %}|{% for m in [] %}x{% else %}empty{% endfor %}|{% set ns = namespace(a=1, b=[]) %}{% for m in l %}{% set ns.a = ns.a + 1 %}{% set ns.b = ns.b + [m.role] %}{% endfor %}{{ ns.a }} {{ ns.b }}|{% for m in l %}{{ loop.previtem.role if not loop.first else '-' }}>{{ m.role }}>{{ loop.nextitem.role if not loop.last else '-' }} {{ loop.cycle('o', 'e') }} {{ loop.revindex0 }};{% endfor %}|{% macro f(a, b='d') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}|{% set t %}block {{ 1 }}{% endset %}{{ t | upper }}|{% macro g() %}<{{ caller() }}>{% endmacro %}{% call g() %}body{% endcall %}|{% filter upper %}abc{% endfilter %}|{% with z = 5 %}{{ z }}{% endwith %}{{ z }}|{% if 1 < 2 < 3 and not (1 > 2) or false %}yes{% elif x %}no{% else %}no{% endif %}|{{ 'a' if nope else 'b' }}{{ 'a' if nope }}|{{ nope or 'or' }} {{ 'x' and 'and' }} {{ 1 and 0 }}|{{ 'a' ~ 1 ~ none ~ true }}|{{ 'ab' * 2 }} {{ [1] * 2 }} {{ [1] + [2] }}|{{ 'a' 'b' }}",
    "slices": "{{ l[0].role }} {{ l[-1].role }} {{ l[1:] | length }} {{ l[:-1] | length }} {{ l[::-1][0].role }} {{ 'héllo'[1:3] }} {{ 'héllo'[-1] }} {{ 'héllo'[::-1] }} {{ 'abc'[5:] }}|{{ l[9] is defined }} {{ l[9:] }} {{ (1, 2, 3)[1:] }}",
    "whitespace": "  {% if true %}\n    a\n  {% endif %}\nb\n\n  {%- if true -%}  \n c \n {%- endif %}\n{# comment #}\nd\n  {{- 1 }}  \n {{ 2 -}} \n e {%+ if true %}f{% endif +%}\n g\n",
    "generation": "{% for m in l %}{% if m.role == 'assistant' %}{% generation %}{% set inner = 'x' %}{{ m.content }}{{ loop.index }}{% endgeneration %}{{ inner is defined }}\n{% else %}{{ m.role }}\n{% endif %}{% endfor %}{%- generation -%} end {%- endgeneration -%}{# {% generation %} #}",
    "raw": "{% raw %}{{ not }} {% rendered %}{% endraw %} {{ '{%' }} {{ \"%}\" }}",
    "escapes": "{{ 'a\\tb\\\\n\\'\\x41\\u00e9' }} {{ 'a\\d' }} {{ \"\\\"\" }} {{ '😀' }}",
    "scoping": "{% set a = 1 %}{% for i in [1, 2] %}{% set a = a + i %}{{ a }}{% endfor %}{{ a }}{% if true %}{% set a = 9 %}{% endif %}{{ a }}",
    "strftime": "{{ strftime_now('%%|plain') }}{{ strftime_now('%Y') | length }}",
    "defaults": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ bos_token }}{{ eos_token }} {{ messages | length }} {{ messages[0].keys() | list }} {{ tools is defined }} {{ nope }}",
    "order": "{{ d | tojson }} {% for k in x %}{{ k }}{% endfor %} {{ {'b': 1, 'a': 2} | tojson }} {{ dict(b=1, a=2) }}",
}
RAISES = {
    "raise": "{{ raise_exception('No ' + 'good: ' ~ 5) }}",
    "undefined_attribute": "{{ nope.attribute }}",
    "undefined_concatenation": "{{ 'a' + nope }}",
    "none_concatenation": "{{ 'a' + none }}",
    "undefined_call": "{{ nope() }}",
    "tojson_undefined": "{{ nope | tojson }}",
    "list_append": "{{ l.append(1) }}",
    "missing_method": "{{ 'a'.nope() }}",
    "unknown_filter": "{{ 'a' | nope }}",
    "unclosed": "{% if x %}",
}


def feature_cases():
    kwargs = {
        "x": NESTED,
        "d": {"b": ["1", "2", "3"], "a": 1.5, "items": "mine"},
        "l": CHATS["multi_turn"],
    }
    for name, source in FEATURES.items():
        yield {"name": f"feature/{name}", "template": source, "messages": CHATS["one_user"], "kwargs": kwargs}
    for name, source in RAISES.items():
        yield {"name": f"raises/{name}", "template": source, "messages": CHATS["one_user"], "kwargs": kwargs}
    yield {
        "name": "feature/documents",
        "template": "{% for d in documents %}{{ d.title }}:{{ d['text'] }};{% endfor %}",
        "messages": [],
        "documents": [{"title": "T", "text": "a"}, {"title": "", "text": "好"}],
    }
    yield {
        "name": "feature/continue_content_blocks",
        "template": "{% for m in messages %}{% for c in m.content %}{{ c.text or c.type }} |{% endfor %}{% endfor %}<end>",
        "messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}]}],
        "continue_final_message": True,
    }
    yield {
        "name": "raises/continue_without_text",
        "template": "{{ messages[0].content }}",
        "messages": [{"role": "assistant", "content": None}],
        "continue_final_message": True,
    }
    yield {
        "name": "raises/continue_dropped",
        "template": "{{ messages[0].content[:2] }}",
        "messages": [assistant("abcdef")],
        "continue_final_message": True,
    }


def source_of(case):
    if "template" in case:
        return case["template"]
    name = case["template_name"]
    path = FIXTURES / f"{name}.jinja" if name.startswith("official/") else ROOT / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def render(source, case):
    (text,), _ = render_jinja_template(
        [case["messages"]],
        tools=case.get("tools"),
        documents=case.get("documents"),
        chat_template=source,
        add_generation_prompt=case.get("add_generation_prompt", False),
        continue_final_message=case.get("continue_final_message", False),
        **{**SPECIAL_TOKENS, **case.get("kwargs", {})},
    )
    return text


def golden(case):
    try:
        return {"output": render(source_of(case), case)}
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError) as error:
        return {"raises": str(error)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", type=Path, help="folder of official templates to compare with")
    arguments = parser.parse_args()
    cases = list(template_cases()) + list(feature_cases())
    for case in cases:
        case.update(golden(case))
        official = arguments.official and arguments.official / f"{case.get('template_name')}.jinja"
        if official and official.exists() and "output" in case:
            got = render(official.read_text(encoding="utf-8"), case)
            assert got == case["output"], f"{case['name']}:\n{case['output']!r}\nofficial:\n{got!r}"
    text = json.dumps(cases, ensure_ascii=False, indent=1)
    (FIXTURES / "goldens.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(cases)} cases, {sum('raises' in case for case in cases)} of them raise")


if __name__ == "__main__":
    main()
