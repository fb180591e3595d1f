"""Prompts given back with their log-probabilities (echo), and answers kept for questions that mean nearly the same."""
import asyncio
import json

import httpx
import numpy as np
import pytest
import serving

from llmjax import decode
from llmjax.serve import chat
from llmjax.serve.protocol import ChatRequest
from llmjax.serve.semantic import SemanticStore

HEAD = {"authorization": "Bearer k-ann"}


@pytest.fixture(scope="module")
def web():
    web = serving.Web(serving.make_model(context=512))
    yield web
    web.close()


def post(web, path, body, headers=HEAD):
    return httpx.post(web.base + path, json=body, headers=headers, timeout=120)


def test_echo_is_decode_score(web):
    tokenizer = web.service.tokenizer
    body = dict(model="tiny", prompt="Hello there", max_tokens=6, temperature=0, logprobs=2)
    plain = post(web, "/v1/completions", body).json()["choices"][0]
    got = post(web, "/v1/completions", {**body, "echo": True}).json()["choices"][0]
    assert got["text"] == "Hello there" + plain["text"] and got["finish_reason"] == plain["finish_reason"]
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    score, = decode.score(web.engine.model, web.engine.params, None, [ids], alternatives=2)
    told, n = got["logprobs"], len(ids)
    assert told["tokens"] == [tokenizer.token_bytes(i).decode() for i in ids] + plain["logprobs"]["tokens"]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    np.testing.assert_allclose(told["token_logprobs"][1:n], score.logprobs[1:], atol=1e-5)      # the same program on another batch
    assert told["token_logprobs"][n:] == plain["logprobs"]["token_logprobs"]
    for place, best in list(enumerate(score.alternatives))[1:]:
        seen = told["top_logprobs"][place]
        assert set(seen) >= {told["tokens"][place]} and len(seen) <= 3 and abs(max(seen.values()) - best[0][1]) < 1e-5
    assert told["text_offset"] == np.cumsum([0, *map(len, told["tokens"])])[:-1].tolist()
    again = post(web, "/v1/completions", {**body, "prompt": [ids, ids[:4]], "echo": True, "n": 2}).json()["choices"]
    assert [c["text"][:4] for c in again] == ["Hell"] * 4 and again[0]["text"] == got["text"] and len(again[2]["logprobs"]["token_logprobs"]) > 4
    alone = post(web, "/v1/completions", {**body, "echo": True, "max_tokens": 0}).json()
    assert alone["choices"][0]["text"] == "Hello there" and alone["choices"][0]["finish_reason"] == "length" and alone["usage"]["completion_tokens"] == 0
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"][:n]
    refused = post(web, "/v1/completions", {**body, "max_tokens": 0})
    assert refused.status_code == 400 and "max_tokens=0" in refused.json()["error"]["message"]
    lines = post(web, "/v1/completions", {**body, "echo": True, "stream": True}).text.split("\n\n")
    chunks = [json.loads(x[6:])["choices"][0] for x in lines if x.startswith("data: {")]
    assert "".join(c["text"] for c in chunks) == got["text"] and [t for c in chunks if c["logprobs"] for t in c["logprobs"]["tokens"]] == told["tokens"]
    assert [t for c in chunks if c["logprobs"] for t in c["logprobs"]["text_offset"]] == told["text_offset"]


class Words:
    """An encoder whose vectors are letter counts: texts of the same letters mean the same."""
    context = 64

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    async def __call__(self, rows):
        found = np.array([np.bincount(row, minlength=300) for row in rows], np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_questions_that_mean_the_same(web):
    seen = []
    store = web.service.semantic = SemanticStore(Words(web.service.tokenizer), 0.95, 3, seen.append)
    try:
        def say(text, headers=HEAD, before=(), **more):
            body = dict(model="tiny", messages=[*before, {"role": "user", "content": text}], **{"max_tokens": 6, "temperature": 0, **more})
            got = post(web, "/v1/chat/completions", body, headers)
            return got.headers.get("x-llmjax-cache"), got
        first, kept = say("what is the capital of france")
        near, again = say("the capital of france is what")
        assert first is None and near.startswith("semantic 1.0") and seen == [False, True]
        assert again.json()["choices"][0]["message"] == kept.json()["choices"][0]["message"]
        assert say("who wrote the play hamlet")[0] is None, "another question"
        system = [{"role": "system", "content": "be rude"}]
        for different in (dict(before=system), dict(headers={"authorization": "Bearer k-ben"}), dict(max_tokens=5), dict(top_p=0.5), dict(temperature=1, seed=1)):
            assert say("the capital of france is what", **different)[0] is None, different
        assert len(store.kept) == 3 == sum(map(len, store.places.values())), "the oldest have gone"
        count = len(seen)
        assert say("the capital of france is what", temperature=1.0)[0] is None and len(seen) == count, "what is drawn anew each time is neither looked up nor kept"
        assert say("sum of 12 and 3")[0] is None and say("sum of 13 and 2")[0] is None, "numbers are no shades of meaning"
        assert say("of sum 12 and 3", stream=True)[0].startswith("semantic") and say("x" * 200)[0] is None and len(store.kept) == 3, "what the encoder cannot read is not kept"
        whole = dict(model="tiny", prompt="alpha beta", max_tokens=4, temperature=0)
        assert "x-llmjax-cache" not in post(web, "/v1/completions", whole).headers
        assert post(web, "/v1/completions", {**whole, "prompt": "beta alpha"}).headers["x-llmjax-cache"].startswith("semantic")
    finally:
        web.service.semantic = None


def test_without_a_limit_the_length_of_the_question_does_not_matter(web):
    """What is left of the context is the limit then; it differs from question to question."""
    def key(text, **more):
        body = ChatRequest(model="tiny", messages=[{"role": "user", "content": text}], temperature=0.0, **more)
        asked = asyncio.run(chat.question(web.service, body, "ann"))
        return asked.limit, SemanticStore.key(asked)
    (first, one), (second, other) = key("what is it"), key("what is it then")
    assert first != second and one == other != key("what is it", max_tokens=9)[1]


def test_with_the_models_own_embeddings(web):
    store = web.service.semantic = SemanticStore(web.service.embedder, 0.9999)
    try:
        body = dict(model="tiny", prompt="The very same words", max_tokens=4, temperature=0)
        texts = [post(web, "/v1/completions", body) for _ in range(2)]
        assert texts[1].headers["x-llmjax-cache"] == "semantic 1.0000" and texts[0].json()["choices"] == texts[1].json()["choices"] and len(store.kept) == 1
        assert "x-llmjax-cache" not in post(web, "/v1/completions", {**body, "prompt": "Entirely different"}).headers
    finally:
        web.service.semantic = None
