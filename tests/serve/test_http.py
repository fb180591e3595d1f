"""The server as its clients see it: the openai client, plain requests, what is refused and how, limits, disconnects, metrics."""
import asyncio
import base64
import json
import re
import time

import httpx
import jsonschema
import numpy as np
import pytest
import serving

from llmjax import decode

openai = pytest.importorskip("openai")
HEAD = {"authorization": "Bearer k-ann"}
SAY = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def web():
    made = serving.Web(serving.make_model(context=512))
    yield made
    made.close()


@pytest.fixture(scope="module")
def api(web):
    return openai.OpenAI(base_url=web.base + "/v1", api_key="k-ann", max_retries=0, timeout=120)


def post(web, path, body, headers=HEAD, **more):
    return httpx.post(web.base + path, headers=headers, timeout=120, **({"json": body} if isinstance(body, dict) else {"content": body}), **more)


def offline(web, prompt, limit=8, **knobs):
    ids = web.service.tokenizer.encode(prompt, add_special_tokens=True)
    return decode.generate(web.engine.model, web.engine.params, web.service.tokenizer, [prompt], max_new_tokens=limit, **knobs)[0], len(ids)


def test_completions(web, api):
    text, count = offline(web, "Hello")
    got = api.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=0, logprobs=2)
    assert got.choices[0].text == text and got.usage.prompt_tokens == count and got.choices[0].finish_reason in ("stop", "length")
    told = got.choices[0].logprobs
    assert len(told.tokens) == got.usage.completion_tokens == len(told.token_logprobs) and all(x <= 0 for x in told.token_logprobs) and all(len(t) >= 1 for t in told.top_logprobs)
    two = api.completions.create(model="tiny", prompt=["Hello", "Hi"], max_tokens=8, temperature=0, n=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == two.choices[1].text == text
    pieces = list(api.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == text and pieces[-1].usage.completion_tokens == got.usage.completion_tokens
    drawn = [api.completions.create(model="tiny", prompt="Hello", max_tokens=8, temperature=1, seed=5, n=2) for _ in range(2)]
    expected = decode.generate(web.engine.model, web.engine.params, web.service.tokenizer, ["Hello"], max_new_tokens=8, temperature=1.0, seed=5, n=2)[0]
    assert [[c.text for c in d.choices] for d in drawn] == [expected, expected]


def test_chat_whole_and_streamed(api):
    whole = api.chat.completions.create(model="tiny", messages=SAY, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3)
    assert whole.choices[0].message.role == "assistant" and len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in whole.choices[0].logprobs.content)
    chunks = list(api.chat.completions.create(model="tiny", messages=SAY, temperature=0, max_tokens=12, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    parts = api.chat.completions.create(model="alias", messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}]}, *SAY], max_completion_tokens=3, n=2, seed=1)
    assert len(parts.choices) == 2


SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 130}}, "required": ["name", "age"],
          "additionalProperties": False}


def test_structured_output(api):
    whole = 0
    for seed in range(3):
        form = {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}
        got = api.chat.completions.create(model="tiny", messages=SAY, temperature=1.3, seed=seed, max_tokens=150, response_format=form)
        whole += got.choices[0].finish_reason == "stop"
        if got.choices[0].finish_reason == "stop":
            jsonschema.validate(json.loads(got.choices[0].message.content), SCHEMA)
    assert whole, "none came to its end"
    one = api.chat.completions.create(model="tiny", messages=SAY, max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert one.choices[0].message.content in ("yes", "no") and one.choices[0].finish_reason == "stop"


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3]}}, "required": ["a", "b"],
                                                                                               "additionalProperties": False}}}]


def test_a_demanded_tool_is_called(api):
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        got = api.chat.completions.create(model="tiny", messages=SAY, tools=TOOLS, tool_choice=choice, temperature=1, seed=2, max_tokens=120, parallel_tool_calls=False)
        call = got.choices[0].message.tool_calls[0]
        assert got.choices[0].finish_reason == "tool_calls" and call.function.name == "add" and json.loads(call.function.arguments)["b"] == 3
    chunks = list(api.chat.completions.create(model="tiny", messages=SAY, tools=TOOLS, tool_choice="required", temperature=1, seed=2, max_tokens=120, parallel_tool_calls=False, stream=True))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert deltas[0].index == 0 and deltas[0].function.name == "add" and json.loads("".join(d.function.arguments for d in deltas)) and chunks[-1].choices[0].finish_reason == "tool_calls"
    back = [*SAY, got.choices[0].message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    assert api.chat.completions.create(model="tiny", messages=back, tools=TOOLS, max_tokens=4).usage.completion_tokens <= 4


def test_responses_and_messages(web, api):
    whole = api.chat.completions.create(model="tiny", messages=SAY, temperature=0, max_tokens=8).choices[0].message.content
    made = api.responses.create(model="tiny", input="hi", temperature=0, max_output_tokens=8)
    assert made.output_text == whole and made.status in ("completed", "incomplete") and made.usage.output_tokens <= 8
    with api.responses.stream(model="tiny", input="hi", temperature=0, max_output_tokens=8) as events:
        seen = list(events)
    assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == whole and seen[0].type == "response.created" and seen[-1].type in ("response.completed", "response.incomplete")
    body = dict(model="tiny", messages=SAY, max_tokens=8, temperature=0)
    got = post(web, "/v1/messages", body, {"x-api-key": "k-ben", "anthropic-version": "2023-06-01"}).json()
    assert got["type"] == "message" and "".join(b.get("text", "") for b in got["content"]) == whole and got["stop_reason"] in ("end_turn", "max_tokens")
    lines = post(web, "/v1/messages", {**body, "stream": True}).text.split("\n\n")
    events = [(re.match(r"event: (\S+)", x)[1], json.loads(x.split("data: ", 1)[1])) for x in lines if x.strip()]
    assert next(n for n, _ in events) == "message_start" and [n for n, _ in events][-1] == "message_stop"
    assert "".join(d["delta"]["text"] for n, d in events if n == "content_block_delta") == whole
    wrong = post(web, "/v1/messages", {**body, "max_tokens": 0})
    assert wrong.status_code == 400 and wrong.json()["type"] == "error" and wrong.json()["error"]["type"] == "invalid_request_error"


def test_embeddings_and_tokens(web, api):
    texts = ["a cat", "tax law", "a"]
    got = api.embeddings.create(model="tiny", input=texts)                                      # the client asks for base64
    plain = api.embeddings.create(model="tiny", input=texts, encoding_format="float")
    expected = decode.embed(web.engine.model, web.engine.params, web.service.tokenizer, texts)
    np.testing.assert_allclose([d.embedding for d in got.data], expected, atol=1e-6)
    np.testing.assert_allclose([d.embedding for d in plain.data], expected, atol=1e-6)
    raw = post(web, "/v1/embeddings", dict(model="tiny", input="a cat", encoding_format="base64")).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), expected[0], atol=1e-6)
    ids = post(web, "/tokenize", dict(prompt="Hé", return_token_strs=True)).json()
    assert ids["tokens"] == web.service.tokenizer.encode("Hé", add_special_tokens=True) and ids["count"] == 3 == len(ids["token_strs"])
    assert post(web, "/detokenize", dict(tokens=ids["tokens"])).json()["prompt"] == "Hé"
    chat = post(web, "/tokenize", dict(messages=SAY)).json()["tokens"]
    assert web.service.tokenizer.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


CHAT = dict(model="tiny", messages=SAY)
REFUSED = [
    ("no key", CHAT, {}, 401, "API key"), ("unknown key", CHAT, {"authorization": "Bearer x"}, 401, "not known"), ("unknown model", {**CHAT, "model": "gpt-9"}, HEAD, 404, "tiny"),
    ("no messages", dict(model="tiny"), HEAD, 400, "messages: is missing"), ("empty messages", {**CHAT, "messages": []}, HEAD, 400, "messages"),
    ("temperature", {**CHAT, "temperature": -1}, HEAD, 400, "temperature=-1"), ("a text for a number", {**CHAT, "temperature": "1"}, HEAD, 400, "temperature"),
    ("top_p", {**CHAT, "top_p": 7}, HEAD, 400, "top_p=7"), ("n", {**CHAT, "n": 100000}, HEAD, 400, "n=100000"), ("max_tokens", {**CHAT, "max_tokens": -5}, HEAD, 400, "max_tokens=-5"),
    ("role", {**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, HEAD, 400, "role='wizard'"), ("unknown field", {**CHAT, "temprature": 1}, HEAD, 400, "did you mean 'temperature'"),
    ("image", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, HEAD, 400, "content"),
    ("not JSON", b"{", HEAD, 400, "not JSON"), ("broken UTF-8", b'{"model":"\xff\xfe"}', HEAD, 400, "not JSON"), ("a list", b"[]", HEAD, 400, ""), ("nothing", b"", HEAD, 400, "not JSON"),
    ("half a surrogate", b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', HEAD, 400, ""), ("deep", b'{"model":' + b"[" * 100000, HEAD, 400, ""),
    ("long prompt", {**CHAT, "messages": [{"role": "user", "content": "word " * 500}]}, HEAD, 400, "tokens there is room for"),
    ("too many new", {**CHAT, "max_tokens": 4000}, HEAD, 400, "max_tokens=4000"),
    ("large body", {**CHAT, "messages": [{"role": "user", "content": "x" * 11_000_000}]}, HEAD, 413, "more than"),
    ("NaN", b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}', HEAD, 400, ""),
    ("bad schema", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}}, HEAD, 400, "response_format"),
    ("no schema fits", {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "minimum": 5, "maximum": 4}}}}, HEAD, 400, "response_format"),
    ("foreign bias", {**CHAT, "logit_bias": {"99999": 1}}, HEAD, 400, "logit_bias"),
    ("tool that is not there", {**CHAT, "tool_choice": {"type": "function", "function": {"name": "f"}}}, HEAD, 400, "tool"),
    ("store", {**CHAT, "store": True}, HEAD, 400, "store"),
    ("stream_options", {**CHAT, "stream_options": {"include_usage": True}}, HEAD, 400, "stream"), ("stop", {**CHAT, "stop": [""]}, HEAD, 400, "stop")]


@pytest.mark.parametrize("name, body, headers, status, words", REFUSED, ids=[r[0] for r in REFUSED])
def test_refusals_are_openai_shaped(web, name, body, headers, status, words):
    got = post(web, "/v1/chat/completions", body, headers)
    error = got.json()["error"]
    assert got.status_code == status and words in error["message"] and set(error) == {"message", "type", "param", "code"} and "Traceback" not in got.text and "\n" not in error["message"], error


def test_paths_and_methods(web):
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405),
                                 ("/v1/models/tiny", "GET", 200), ("/v1/models/other", "GET", 404), ("/health", "GET", 200), ("/ready", "GET", 200)):
        got = httpx.request(method, web.base + path, headers=HEAD)
        assert got.status_code == status and (status == 200 or got.json()["error"]["message"]), path
    assert post(web, "/v1/completions", b"x", {**HEAD, "content-type": "text/plain"}).status_code == 415
    assert httpx.get(web.base + "/health").status_code == 200 and httpx.get(web.base + "/v1/models").status_code == 401


def pages(web):
    return float(re.search(r"^llmjax_cache_pages_used (\S+)$", httpx.get(web.base + "/metrics").text, re.M)[1])


def test_who_goes_away_leaves_nothing_behind(web):
    web.engine.delay = 0.02

    async def leave(stream):
        async with httpx.AsyncClient() as client:
            body = dict(model="tiny", prompt="Hello there", max_tokens=200, ignore_eos=True, stream=stream)
            try:
                async with asyncio.timeout(0.5), client.stream("POST", web.base + "/v1/completions", json=body, headers=HEAD, timeout=60) as got:
                    async for _ in got.aiter_lines():
                        await asyncio.sleep(5)
            except TimeoutError:
                pass

    async def several():
        await asyncio.gather(*(leave(i % 2 == 0) for i in range(6)))
    try:
        before = web.engine.waiting
        asyncio.run(several())
        until = time.monotonic() + 10
        while (web.engine.waiting > before or pages(web)) and time.monotonic() < until:
            time.sleep(0.05)
        assert web.engine.waiting == before and pages(web) == 0
    finally:
        web.engine.delay = 0.0


def test_mixed_load_gives_everyone_their_own(web):
    """48 requests, a fifth of them dropped: every greedy answer is the one given alone."""
    prompts = ["Hello", "Once upon a time", "def f(x):", "The sea"]
    alone = {p: offline(web, p, 10)[0] for p in prompts}

    async def run():
        api = openai.AsyncOpenAI(base_url=web.base + "/v1", api_key="k-ann", max_retries=0, timeout=120)
        gate = asyncio.Semaphore(16)

        async def one(i):
            async with gate:
                if i % 5 == 0:
                    stream = await api.completions.create(model="tiny", prompt=prompts[i % 4], max_tokens=60, temperature=0.9, stream=True)
                    async for _ in stream:
                        break
                    await stream.close()
                    return True
                got = await api.completions.create(model="tiny", prompt=prompts[i % 4], max_tokens=10, temperature=0)
                return got.choices[0].text == alone[prompts[i % 4]]
        return await asyncio.gather(*(one(i) for i in range(48)))
    assert all(asyncio.run(run()))
    until = time.monotonic() + 10
    while pages(web) and time.monotonic() < until:
        time.sleep(0.05)
    assert pages(web) == 0
    text = httpx.get(web.base + "/metrics").text
    for name in ("llmjax_time_to_first_token_seconds_count", "llmjax_prefix_hit_tokens_total", "llmjax_generated_tokens_total", "llmjax_batch_rows_count", "llmjax_http_requests_total"):
        assert re.search(rf"^{name}(\{{.*\}})? [0-9.e+]+$", text, re.M), name


def test_a_deadline_and_a_full_queue(web):
    web.engine.delay, limits = 0.05, web.service.limits
    import dataclasses as dc
    try:
        web.service.limits = dc.replace(limits, timeout=0.5)
        late = post(web, "/v1/completions", dict(model="tiny", prompt="Hello", max_tokens=200, ignore_eos=True))
        assert late.status_code == 504 and "out of time" in late.json()["error"]["message"]
        many = post(web, "/v1/completions", dict(model="tiny", prompt=["Hello"] * 100, max_tokens=2))
        assert many.status_code == 429 and int(many.headers["retry-after"]) >= 1 and many.json()["error"]["code"] == "queue_full"
    finally:
        web.engine.delay, web.service.limits = 0.0, limits


def test_answers_that_are_kept(web):
    from llmjax.serve.answers import Store
    seen = []
    web.service.store = Store(2, seen.append)
    try:
        body = dict(model="tiny", prompt="Once more", max_tokens=6, temperature=1.0, seed=4, n=2)
        first, again = (post(web, "/v1/completions", body).json() for _ in range(2))
        assert seen == [False, True] and [c["text"] for c in first["choices"]] == [c["text"] for c in again["choices"]] and first["usage"]["total_tokens"] == again["usage"]["total_tokens"]
        streamed = post(web, "/v1/completions", {**body, "n": 1, "temperature": 0, "stream": True}).text
        assert seen[-1] is False and "data: [DONE]" in streamed
        assert post(web, "/v1/completions", {**body, "n": 1, "temperature": 0, "stream": True}).text.count("data: ") == streamed.count("data: ") and seen[-1] is True
        post(web, "/v1/completions", body, {"authorization": "Bearer k-ben"})
        assert seen[-1] is False, "another key's answers are its own"
        greedy = {**{k: v for k, v in body.items() if k != "seed"}, "temperature": 0}
        assert [post(web, "/v1/completions", greedy).headers.get("x-llmjax-cache") for _ in range(2)] == [None, "exact"], "nothing is drawn: no seed is needed"
        count = len(seen)
        post(web, "/v1/completions", {k: v for k, v in body.items() if k != "seed"})
        assert len(seen) == count, "what is drawn anew each time is not kept"
    finally:
        web.service.store = None


def test_no_prompt_and_no_key_in_the_log(web, caplog):
    with caplog.at_level("INFO", logger="llmjax.serve"):
        post(web, "/v1/completions?secret=k-ann", dict(model="tiny", prompt="my secret prompt", max_tokens=2))
        time.sleep(0.1)
    from llmjax.serve.guard import JsonLines
    text = "\n".join(JsonLines().format(r) for r in caplog.records)
    line = json.loads(text.splitlines()[-1])
    assert line["event"] == "request" and line["status"] == 200 and line["owner"] == "ann" and "secret" not in text and "k-ann" not in text


def test_the_page_and_the_document(web):
    page = httpx.get(web.base + "/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:)?//", page.text) and 'name="viewport"' in page.text and 'lang="en"' in page.text
    for i in set(re.findall(r'\$\("([\w]+)"\)', page.text)):
        assert f'id="{i}"' in page.text, i
    document = httpx.get(web.base + "/openapi.json").json()
    assert document["openapi"].startswith("3.1") and {"/v1/chat/completions", "/v1/embeddings", "/v1/messages"} <= set(document["paths"])
    got = post(web, "/v1/chat/completions", {**CHAT, "max_tokens": 3}).json()
    jsonschema.validate(got, {"$ref": "#/components/schemas/ChatReply", "components": document["components"]})
