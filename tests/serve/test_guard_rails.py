"""What stands around requests: browsers of other sites, limits per key, the watchdog, readers that do not read."""
import asyncio
import concurrent.futures
import dataclasses as dc
import json
import time

import httpx
import pytest
import serving

from llmjax import decode
from llmjax.serve.guard import Rates

ANN, BEN = ({"authorization": f"Bearer k-{name}"} for name in ("ann", "ben"))
BODY = dict(model="tiny", prompt="Hello", max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def web():
    web = serving.Web(serving.make_model(), origins=("https://a.example",))
    yield web
    web.close()


def post(web, body=BODY, headers=ANN, path="/v1/completions"):
    return httpx.post(web.base + path, json=body, headers=headers, timeout=60)


def test_pages_of_other_sites(web):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    before = httpx.options(web.base + "/v1/completions", headers={"origin": "https://a.example", **asked})
    assert before.status_code == 204 and before.headers["access-control-allow-origin"] == "https://a.example" and "POST" in before.headers["access-control-allow-methods"]
    assert before.headers["access-control-allow-headers"] == asked["access-control-request-headers"] and before.headers["vary"] == "origin"
    assert post(web, headers={**ANN, "origin": "https://a.example"}).headers["access-control-allow-origin"] == "https://a.example"
    refused = post(web, headers={"origin": "https://a.example"})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://a.example", "a page gets to read why"
    for got in (httpx.options(web.base + "/v1/completions", headers={"origin": "https://b.example", **asked}), post(web, headers={**ANN, "origin": "https://b.example"}), post(web)):
        assert "access-control-allow-origin" not in got.headers


def test_requests_per_time_and_key(web):
    web.app.rates = Rates((3, 1.5))
    try:
        got = [post(web) for _ in range(4)]
        assert [x.status_code for x in got[:3]] == [200] * 3
        last = got[3] if got[3].status_code == 429 else next(x for x in (post(web) for _ in range(20)) if x.status_code == 429)
        error = last.json()["error"]
        assert error["code"] == "rate_limit_exceeded" and error["type"] == "rate_limit_error" and 1 <= int(last.headers["retry-after"]) <= 2
        assert post(web, headers=BEN).status_code == 200, "another key has its own"
        assert httpx.get(web.base + "/health").status_code == 200
        time.sleep(int(last.headers["retry-after"]))
        assert post(web).status_code == 200
    finally:
        web.app.rates = Rates()


def test_requests_of_a_key_that_run_together(web):
    web.app.rates, web.engine.delay = Rates(None, 2), 0.05
    long = {**BODY, "max_tokens": 30, "ignore_eos": True}
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(post, web, long) for _ in range(2)]
            until = time.monotonic() + 20
            while web.app.rates.running["ann"] < 2 and time.monotonic() < until:
                time.sleep(0.01)
            third = post(web)
            assert third.status_code == 429 and third.json()["error"]["code"] == "concurrency_limit" and third.headers["retry-after"] == "1"
            assert post(web, headers=BEN).status_code == 200
            assert [x.result().status_code for x in running] == [200, 200]
        assert post(web).status_code == 200 and not web.app.rates.running
    finally:
        web.app.rates, web.engine.delay = Rates(), 0.0


def test_the_watchdog(web):
    """An engine that does not move while there is something to do fails /health; one with nothing to do does not."""
    stall, web.service.stall = web.service.stall, 0.4
    try:
        time.sleep(0.6)
        assert httpx.get(web.base + "/health").status_code == 200
        web.engine.delay = 2.0
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(post, web, {**BODY, "max_tokens": 1})
            seen, until = [], time.monotonic() + 15
            while 503 not in seen and time.monotonic() < until:
                got = httpx.get(web.base + "/health")
                seen.append(got.status_code)
                time.sleep(0.05)
            assert seen[-1] == 503 and got.json()["detail"]["stalled_seconds"] >= 0.4
            web.engine.delay = 0.0
            assert asked.result().status_code == 200
        assert httpx.get(web.base + "/health").status_code == 200
    finally:
        web.service.stall, web.engine.delay = stall, 0.0


def test_a_reader_that_does_not_read(web):
    """It is let go after `patience`, its pages with it, and others are served meanwhile. What waits for it is at most its own answer."""
    limits, web.service.limits = web.service.limits, dc.replace(web.service.limits, patience=0.5)
    body, sent = json.dumps({**BODY, "max_tokens": 200, "ignore_eos": True, "stream": True}).encode(), []
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": [(b"authorization", b"Bearer k-ann")], "client": ("127.0.0.1", 1)}

    async def slow():
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return given.pop() if given else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if len(sent) > 3:
                await asyncio.Event().wait()
        other = asyncio.to_thread(post, web, {**BODY, "prompt": "Once upon", "max_tokens": 20})
        began = time.monotonic()
        _, got = await asyncio.gather(web.app(scope, receive, send), other)
        return time.monotonic() - began, got
    web.engine.delay = 0.01
    try:
        seconds, got = asyncio.run(slow())
        expected = decode.generate(web.engine.model, web.engine.params, web.service.tokenizer, ["Once upon"], max_new_tokens=20)[0]
        assert got.json()["choices"][0]["text"] == expected and len(sent) == 4 and seconds < 30
        until = time.monotonic() + 10
        while (web.engine.waiting or web.engine.pages.used) and time.monotonic() < until:
            time.sleep(0.02)
        assert not web.engine.waiting and not web.engine.pages.used
    finally:
        web.service.limits, web.engine.delay = limits, 0.0
