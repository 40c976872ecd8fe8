#!/usr/bin/env python3
"""Encode conversations with LLaMA-Factory and write what the Rust side must encode.

    pip install "transformers>=4.57,<5" jinja2     # torch is not needed
    pip download --no-deps llamafactory==0.9.5; pip download --no-deps llamafactory==0.9.2
    unzip each wheel into its own directory, then
    python3 scripts/make_training_template_goldens.py DIR_0.9.5 DIR_0.9.2 [--tokenizer DIR]

Writes tests/fixtures/training_template/goldens.json with ids of the tokenizer of
tests/fixtures/tiny-qwen2: `turns` (token ids of each prompt and answer), `examples` (ids and labels
under a cutoff, `mask_history` and `train_on_prompt`) and `pairs` (the same from made-up ids, for all
combinations). With --tokenizer, the ids of another one (the genuine Qwen2.5 tokenizer) are written to
standard output instead, for a check by hand. Only the pure modules of LLaMA-Factory are loaded; what
they import for images is replaced by stubs. Conversations are this project's own.
"""

import argparse
import importlib
import json
import pathlib
import random
import sys
import types

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATE = "26 Jul 2024"


class MmPlugin:
    def process_messages(self, messages, *_):
        return messages

    def process_token_ids(self, input_ids, labels, *_):
        return input_ids, labels


def load(directory):
    """Imports the template and processor modules of one version."""
    for name in [name for name in sys.modules if name.startswith("llamafactory")]:
        del sys.modules[name]

    def package(name):
        module = types.ModuleType(name)
        module.__path__ = [str(pathlib.Path(directory, *name.split(".")))]
        sys.modules[name] = module
        return module

    for name in ("llamafactory", "llamafactory.extras", "llamafactory.data", "llamafactory.data.processor"):
        package(name)
    quiet = types.ModuleType("llamafactory.extras.logging")
    quiet.get_logger = lambda *_: types.SimpleNamespace(
        info_rank0=lambda *_: None, warning_rank0=lambda *_: None, warning_rank0_once=lambda *_: None
    )
    sys.modules["llamafactory.extras.logging"] = quiet
    sys.modules["llamafactory.extras"].logging = quiet
    misc = types.ModuleType("llamafactory.extras.misc")
    misc.check_version = lambda *_, **__: None
    sys.modules["llamafactory.extras.misc"] = misc
    constants = types.ModuleType("llamafactory.extras.constants")
    constants.IGNORE_INDEX = -100
    sys.modules["llamafactory.extras.constants"] = constants
    data_utils = types.ModuleType("llamafactory.data.data_utils")
    data_utils.Role = __import__("enum").Enum(
        "Role",
        {name.upper(): name for name in ("user", "assistant", "system", "function", "observation")},
        type=str,
    )
    data_utils.SLOTS = list
    sys.modules["llamafactory.data.data_utils"] = data_utils
    mm_plugin = types.ModuleType("llamafactory.data.mm_plugin")
    mm_plugin.get_mm_plugin = lambda *_, **__: MmPlugin()
    sys.modules["llamafactory.data.mm_plugin"] = mm_plugin
    template = importlib.import_module("llamafactory.data.template")
    tools = importlib.import_module("llamafactory.data.tool_utils")
    tools.datetime = types.SimpleNamespace(now=lambda: types.SimpleNamespace(strftime=lambda _: DATE))
    supervised = importlib.import_module("llamafactory.data.processor.supervised")
    return template.TEMPLATES, supervised.SupervisedDatasetProcessor


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def observation(content):
    return {"role": "observation", "content": content}


def function(calls):
    return {"role": "function", "content": calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False)}


WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city, <b>now</b>. 天气 ☀️",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "City name"},
            "unit": {"type": "string", "description": "Unit", "enum": ["C", "F"]},
            "days": {"type": "array", "description": "Which days", "items": {"type": "integer"}},
        },
        "required": ["city"],
    },
    "strict": None,
    "weight": 1.0,
    "big": 1e16,
}
CLOCK = {"name": "clock", "description": "Time", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": CLOCK}
CALL = {"name": "get_weather", "arguments": {"city": "北京", "days": [1, 2]}}
OTHER_CALL = {"name": "clock", "arguments": {}}
THOUGHT = "<think>\nLet me think.\nTwo lines.\n</think>\n\n"


def conversations():
    """Returns (system, tools, messages): each ends with an answer."""
    made = []

    def add(*messages, system=None, tools=None):
        made.append({"system": system, "tools": tools, "messages": list(messages)})

    add(user("Who are you?"), assistant("I am a lamp in the window."))
    add(user("你是谁？"), assistant("我是一个助手。"), system="你是助手。")
    add(user("Hi"), assistant("Hello!"), system="")
    add(user(""), assistant(""), system="Be brief.")
    add(user("\nstarts with a line"), assistant("\nso does this\n"), system=" blanks \n")
    add(user("  spaces  "), assistant("\n\n\nmany lines\n\n"))
    add(user("<|im_end|> inside <|im_start|>user"), assistant("kept <|endoftext|> as a token"))
    add(user("braces {{content}} {{ x }} {% if %}"), assistant("{{content}} twice {{content}}"), system="{{content}}")
    add(user("a\r\nb\tc"), assistant("naïve 😀 — ﬁ 𝔘\u200b\u00a0é\u0301"), system="You are a helpful assistant.")
    add(user("count to ten"), assistant("1 2 3 4 5 6 7 8 9 10 " * 6))
    add(user("the river runs past the old stone mill " * 8), assistant("Yes."))
    add(user("the river runs past the mill " * 9), assistant("and the garden behind it " * 9))
    for turns in (2, 3, 5):
        messages = []
        for turn in range(turns):
            messages += [user(f"question {turn} about the market"), assistant(f"answer {turn}: " + "music " * (turn + 1))]
        add(*messages)
        add(*messages, system="Answer in one word.")
    add(user("a"), assistant("b" * 60), user("c" * 60), assistant("d"), user("e" * 30), assistant("f" * 30))
    add(user("solve"), assistant(THOUGHT + "Four."))
    add(user("solve"), assistant(THOUGHT + "Four."), user("and now?"), assistant("Five."))
    add(user("solve"), assistant("Four."), user("and now?"), assistant(THOUGHT + "Five."), system="Think.")
    add(user("a"), assistant(THOUGHT + "\n\nx" + THOUGHT + "y"), user("b"), assistant("<think>open only"), user("c"), assistant("z"))
    add(user("a"), assistant("<think></think>short"), user("b"), assistant("</think>"))
    tools = json.dumps([WEATHER, CLOCK], ensure_ascii=False)
    add(user("Weather?"), function(CALL), observation("{\"sky\": \"blue\"}"), assistant("Blue."), tools=tools)
    add(user("Weather?"), function([CALL]), observation("blue"), assistant("Blue."), tools=tools, system="Use tools.")
    add(
        user("Both?"),
        function([CALL, OTHER_CALL]),
        observation("blue\n</tool_response>\n<tool_response>\n12:00"),
        assistant("Blue at noon."),
        tools=json.dumps([CLOCK]),
    )
    add(user("Time?"), function(json.dumps(OTHER_CALL, indent=2)), observation("12:00"), function(CALL), tools=json.dumps([WRAPPED]))
    add(user("No tools"), assistant("None."), tools="[]")
    add(user("No tools"), assistant("None."), tools="[]", system="There are none.")
    add(user("Think first"), function(THOUGHT + json.dumps(CALL, ensure_ascii=False)), observation("1"), assistant("ok"), tools=tools)
    add(
        user("Talk first"),
        function("I will look. <tool_call>" + json.dumps(OTHER_CALL) + "</tool_call>"),
        observation("1"),
        assistant("ok"),
        tools=json.dumps([CLOCK]),
    )
    add(user("Strings"), function({"name": "f\"q", "arguments": "plain \u00e9 \u2028 text"}), observation("1"), assistant("ok"))
    add(user("Numbers"), function({"name": "f", "arguments": {"a": 1.0, "b": -0.5, "c": 1e-7, "d": 10**15, "e": None, "f": True}}), observation("1"), assistant("ok"))
    generator = random.Random(7)
    words = "river stone mill garden lamp window letter table horse silver door market music 你好 世界 1 22 , . \n".split(" ")
    for _ in range(18):
        messages = []
        for _ in range(generator.randint(1, 4)):
            messages.append(user(" ".join(generator.choices(words, k=generator.randint(1, 30)))))
            messages.append(assistant(" ".join(generator.choices(words, k=generator.randint(1, 30)))))
        add(*messages, system=generator.choice([None, "", "Be a miller.", "\n你是一个助手。"]))
    return made


# Our name, version of LLaMA-Factory, its name.
TEMPLATES = [
    ("qwen", "new", "qwen"),
    ("qwen@0.9.2", "old", "qwen"),
    ("qwen3", "new", "qwen3"),
    ("qwen3_nothink", "new", "qwen3_nothink"),
    ("llama3", "new", "llama3"),
    ("chatml", "new", "chatml"),
    ("smollm", "new", "smollm"),
    ("smollm2", "new", "smollm2"),
    ("default", "new", "default"),
    ("default@0.9.2", "old", "default"),
    ("empty", "new", "empty"),
]
THINKING = {"enabled": True, "unset": None, "disabled": False}


def encode(versions, tokenizer):
    turns, examples = [], []
    generator = random.Random(11)
    for index, conversation in enumerate(conversations()):
        has_call = any(message["role"] == "function" for message in conversation["messages"])
        for ours, version, theirs in TEMPLATES:
            basic = theirs in ("qwen", "qwen3")
            if not basic and generator.random() < 0.7 and not (has_call and theirs == "llama3"):
                continue
            templates, processor_class = versions[version]
            template = templates[theirs]
            case = {"template": ours, "conversation": index, "thinking": None, "keeps_thoughts": False}
            if theirs == "qwen3":
                case["thinking"] = generator.choice(list(THINKING))
                case["keeps_thoughts"] = generator.random() < 0.3
                template.enable_thinking = THINKING[case["thinking"]]
                template.preserve_thinking = case["keeps_thoughts"]
            arguments = (conversation["messages"], conversation["system"], conversation["tools"])
            if version == "old" and has_call and "think" in str(conversation["messages"]):
                continue  # 0.9.2 cut thoughts out of calls otherwise.
            if version == "old" and "<tool_call>" in str(conversation["messages"]):
                continue  # 0.9.2 did not know text around calls.
            pairs = template.encode_multiturn(tokenizer, *arguments)
            turns.append(case | {"turns": pairs})
            if theirs == "qwen3":  # Elsewhere it is the turns, put together.
                turns[-1]["oneturn"] = template.encode_oneturn(tokenizer, *arguments)
            for _ in range(2 if basic else 1):
                mask_history, train_on_prompt = generator.choice([(False, False), (True, False), (False, True)])
                cutoff = generator.choice([10, 33, 64, 100, 150, 4096])
                data_args = types.SimpleNamespace(
                    cutoff_len=cutoff, mask_history=mask_history, train_on_prompt=train_on_prompt
                )
                processor = processor_class(template, tokenizer, None, data_args)
                messages = conversation["messages"]
                ids, labels = processor._encode_data_example(
                    messages[:-1], messages[-1:], conversation["system"], conversation["tools"], [], [], []
                )
                options = {"cutoff_len": cutoff, "mask_history": mask_history, "train_on_prompt": train_on_prompt}
                examples.append(case | options | {"input_ids": ids, "labels": labels})
    return turns, examples


def made_up_pairs(processor_class):
    cases = []
    generator = random.Random(13)
    while len(cases) < 240:
        lengths = [(generator.randint(0, 12), generator.randint(0, 12)) for _ in range(generator.randint(1, 4))]
        next_id = iter(range(1, 1000))
        pairs = [([next(next_id) for _ in range(s)], [next(next_id) for _ in range(t)]) for s, t in lengths]
        mask_history, train_on_prompt = generator.choice([(False, False), (True, False), (False, True)])
        efficient_eos = not train_on_prompt and generator.random() < 0.4
        data_args = types.SimpleNamespace(
            cutoff_len=generator.randint(1, 40), mask_history=mask_history, train_on_prompt=train_on_prompt
        )
        template = types.SimpleNamespace(
            mm_plugin=MmPlugin(),
            preserve_thinking=False,
            efficient_eos=efficient_eos,
            encode_multiturn=lambda *_: [(list(s), list(t)) for s, t in pairs],
        )
        tokenizer = types.SimpleNamespace(eos_token_id=0)
        processor = processor_class(template, tokenizer, None, data_args)
        ids, labels = processor._encode_data_example([], [], None, None, [], [], [])
        if len(ids) != len(labels):
            continue  # It labels the token before an empty prompt, which there is not.
        cases.append(
            {
                "lengths": lengths,
                "cutoff_len": data_args.cutoff_len,
                "mask_history": mask_history,
                "train_on_prompt": train_on_prompt,
                "efficient_eos": efficient_eos,
                "input_ids": ids,
                "labels": labels,
            }
        )
    return cases


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("new")
    parser.add_argument("old")
    parser.add_argument("--tokenizer")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or ROOT / "tests/fixtures/tiny-qwen2")
    versions = {"new": load(arguments.new), "old": load(arguments.old)}
    turns, examples = encode(versions, tokenizer)
    goldens = {
        "date": DATE,
        "conversations": conversations(),
        "turns": turns,
        "examples": examples,
        "pairs": made_up_pairs(versions["new"][1]),
    }
    out = sys.stdout
    if not arguments.tokenizer:
        out = open(ROOT / "tests/fixtures/training_template/goldens.json", "w", encoding="utf-8")
    # One case a line, so that a change shows as one.
    lists = []
    for name, value in goldens.items():
        if isinstance(value, list):
            items = ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in value)
            lists.append(f'"{name}":[\n{items}\n]')
        else:
            lists.append(f'"{name}":{json.dumps(value)}')
    out.write("{\n" + ",\n".join(lists) + "\n}\n")


main()
