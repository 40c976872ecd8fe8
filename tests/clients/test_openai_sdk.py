"""The `openai` Python SDK against infold: every call a user of the SDK makes within this server's scope."""

import asyncio
import concurrent.futures
import json
import time

import openai
import pytest

from conftest import ALIAS, MODEL, infold_server

MESSAGES = [{"role": "user", "content": "Hello, world!"}]
GOLDEN = json.loads((infold_server.FIXTURES / "golden" / "tiny-qwen2.json").read_text())["prompts"]


def chat(client, **options):
    return client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 8, **options})


def complete(client, **options):
    return client.completions.create(**{"model": MODEL, "prompt": "The river", "max_tokens": 8, **options})


# Models


def test_models_lists_every_served_name(client):
    models = client.models.list().data
    assert [card.id for card in models] == [MODEL, ALIAS]
    assert models[0].object == "model"
    assert models[0].model_dump()["max_model_len"] == 512


def test_model_is_retrieved_by_name(client):
    assert client.models.retrieve(MODEL).id == MODEL


def test_retrieving_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


# Chat


def test_chat_answers(client):
    answer = chat(client, temperature=0)
    choice = answer.choices[0]
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == MODEL
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.finish_reason in ("length", "stop")
    usage = answer.usage
    assert usage.completion_tokens <= 8 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_alias_answers_with_the_first_name(client):
    assert chat(client, model=ALIAS).model == MODEL


def test_max_completion_tokens_limits(client):
    answer = chat(client, max_tokens=openai.omit, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_chat_stream_equals_the_whole_answer(client):
    options = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk for chunk in chunks if chunk.usage] == chunks[-1:]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(delta.delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage_has_none(client):
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_sdk_stream_helper_accumulates(client):
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0) as stream:
        for _ in stream:
            pass
        # `get_final_completion` refuses answers that max_tokens cut off.
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == chat(client, temperature=0).choices[0].message.content


def test_chat_logprobs_name_the_drawn_token_first(client):
    answer = chat(client, temperature=0, logprobs=True, top_logprobs=5, max_tokens=6)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)


def test_n_gives_as_many_choices(client):
    answer = chat(client, n=3, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_streamed_n_interleaves_all_choices(client):
    text = {}
    for chunk in chat(client, n=2, stream=True, temperature=1.0, seed=5):
        for choice in chunk.choices:
            text[choice.index] = text.get(choice.index, "") + (choice.delta.content or "")
    whole = chat(client, n=2, temperature=1.0, seed=5)
    assert text == {choice.index: choice.message.content for choice in whole.choices}


def test_seed_repeats(client):
    options = {"temperature": 1.0, "top_p": 1.0, "extra_body": {"top_k": 0}}
    first, second = (chat(client, seed=7, **options).choices[0].message.content for _ in range(2))
    other = chat(client, seed=8, **options).choices[0].message.content
    assert first == second != other


def test_unicode_goes_in_and_valid_text_comes_out(client):
    content = "小姐，别的秀女都在求中选。你是谁? 🦀 é Ω"
    answer = chat(client, messages=[{"role": "user", "content": content}], max_tokens=48, temperature=0)
    assert answer.choices[0].message.content.encode().decode() == answer.choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in chat(client, messages=[{"role": "user", "content": content}], max_tokens=48, temperature=0, stream=True)
    ]
    assert "".join(pieces) == answer.choices[0].message.content


def test_content_parts_of_text_are_joined(client):
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world!"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}], temperature=0)
    assert answer.choices[0].message.content is not None


# Completions


def test_completion_answers(client):
    answer = complete(client, temperature=0)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert isinstance(answer.choices[0].text, str) and answer.usage.completion_tokens <= 8


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{len(golden['prompt_token_ids'])}-tokens")
def test_token_prompt_gives_the_golden_logprobs(client, golden):
    answer = complete(
        client, prompt=golden["prompt_token_ids"], temperature=0, logprobs=1, max_tokens=40,
        extra_body={"ignore_eos": True, "return_token_ids": True, "repetition_penalty": 1.0},
    )
    assert answer.choices[0].model_dump()["token_ids"] == golden["greedy_token_ids"]
    got = answer.choices[0].logprobs.token_logprobs
    assert got == pytest.approx(golden["greedy_logprobs"], abs=1e-4)


def test_list_of_prompts_answers_each_in_order(client):
    prompts = ["The river", "The stone", "A lamp"]
    answer = complete(client, prompt=prompts, temperature=0, n=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [complete(client, prompt=prompt, temperature=0).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone


def test_prompts_times_n_are_numbered_by_prompt(client):
    answer = complete(client, prompt=["The river", "The stone"], n=2, temperature=1.0, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_echo_returns_prompt_and_its_logprobs(client):
    answer = complete(client, prompt="The river", echo=True, logprobs=2, temperature=0, max_tokens=4)
    choice = answer.choices[0]
    assert choice.text.startswith("The river")
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    assert len(logprobs.tokens) == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)


def test_echo_alone_scores_the_prompt(client):
    golden = GOLDEN[3]
    answer = complete(client, prompt=golden["prompt_token_ids"], echo=True, logprobs=1, max_tokens=0, temperature=0)
    got = answer.choices[0].logprobs.token_logprobs
    assert got[0] is None and got[1:] == pytest.approx(golden["prompt_logprobs"][1:], abs=1e-4)
    assert answer.usage.completion_tokens == 0


def test_completion_stream_equals_the_whole_answer(client):
    options = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))
    whole = complete(client, **options)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_stop_string_ends_the_text_before_it(client):
    options = {"temperature": 0, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    text = complete(client, **options).choices[0].text
    stop = next(text[i : i + 2] for i in range(8, len(text) - 2) if "\ufffd" not in text[i : i + 2])
    cut = text[: text.index(stop)]
    stopped = complete(client, stop=[stop], **options).choices[0]
    assert stopped.text == cut and stopped.finish_reason == "stop"
    assert stopped.model_dump()["stop_reason"] == stop
    kept = complete(client, stop=stop, temperature=0, max_tokens=40,
                    extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
    assert kept.choices[0].text == cut + stop
    streamed = "".join(c.choices[0].text for c in complete(client, stop=[stop], stream=True, **options) if c.choices)
    assert streamed == cut


def test_stop_token_id_ends(client):
    golden = GOLDEN[2]
    stop_id = golden["greedy_token_ids"][4]
    answer = complete(
        client, prompt=golden["prompt_token_ids"], temperature=0, max_tokens=40,
        extra_body={"stop_token_ids": [stop_id], "ignore_eos": True, "repetition_penalty": 1.0},
    )
    first = golden["greedy_token_ids"].index(stop_id)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == first + 1


def test_logit_bias_forces_a_token(client):
    answer = complete(client, temperature=0, max_tokens=3, logit_bias={"65": 100},
                      extra_body={"return_token_ids": True, "repetition_penalty": 1.0})
    assert answer.choices[0].model_dump()["token_ids"] == [65, 65, 65]


# Errors


def test_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4o")
    assert caught.value.body["message"] == "The model `gpt-4o` does not exist."
    assert caught.value.body["param"] == "model" and caught.value.body["code"] == 404


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 3.0},
        {"temperature": -0.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"n": 0},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"stream_options": {"include_usage": True}},
        {"messages": "no list"},
        {"messages": [{"role": "user"}, "text"]},
        {"temperature": "hot"},
        {"logit_bias": {"100000": 1.0}},
        {"extra_body": {"min_p": 2.0}},
        {"extra_body": {"repetition_penalty": 0.0}},
        {"extra_body": {"min_tokens": 9}},
    ],
    ids=str,
)
def test_bad_parameters_are_400(client, options):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.status_code == 400 and caught.value.body["message"]


def test_prompt_longer_than_the_model_is_400(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=[65] * 600)
    assert "maximum context length is 512 tokens" in caught.value.body["message"]


def test_prompt_and_output_longer_than_the_model_is_400(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=600)
    assert "maximum context length is 512 tokens" in caught.value.body["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ],
    ids=str,
)
def test_what_is_not_served_yet_is_refused_not_ignored(client, options):
    with pytest.raises(openai.BadRequestError):
        chat(client, **options)


# Many clients


def test_concurrent_requests_answer_as_alone(client):
    prompts = [f"Request {i}: the river" for i in range(24)]
    alone = [complete(client, prompt=prompt, temperature=0, max_tokens=12).choices[0].text for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda p: complete(client, prompt=p, temperature=0, max_tokens=12).choices[0].text, prompts))
    assert together == alone


def test_async_client_streams_side_by_side(server):
    async def one(client, seed):
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=12, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed % 4) for seed in range(16)))

    texts = asyncio.run(all_of_them())
    assert [texts[i] for i in range(4)] * 4 == texts


def test_disconnect_frees_the_sequence(client, server):
    stream = chat(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while server.metrics()["infold:num_requests_running"] > 0:
        assert time.monotonic() < deadline, "the sequence still runs 10 s after its client left"
        time.sleep(0.05)
