"""Adapters that requests ask for by name: each row its own, in one batch, as if it were alone; names that are not there; prefixes that are not shared."""
import concurrent.futures
import contextlib
import dataclasses as dc
import os
import shutil
import ssl
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import serving
from tiny_models import free_port

import llmjax
from llmjax import decode
from llmjax.core import ConfigError
from llmjax.decode.speculative import NGram
from llmjax.serve import Observer, drafts
from llmjax.serve.adapters import parse

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
HEAD = {"authorization": "Bearer k-ann"}
OPTIONS = {"first": dict(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "second": dict(r=4, lora_alpha=8, target_modules=["k_proj", "o_proj", "up_proj", "down_proj"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("adapters"), serving.make_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=-(-tokenizer.vocab_size // 8) * 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=256, initializer_range=0.4, eos_token_id=258, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(path / "base")
    for name, options in OPTIONS.items():
        model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(path / "base"), peft.LoraConfig(**options))
        with torch.no_grad():
            for p in (p for n, p in model.named_parameters() if "lora_" in n):
                p.copy_(torch.randn(p.shape) * 0.3)
        model.save_pretrained(path / name)
    tokenizer.save(path / "base")
    return path


@pytest.fixture(scope="module")
def made(folder):
    """{name: (model, params)}: each adapter loaded for itself, and the base."""
    return {name: llmjax.load(folder / "base", dtype="float32", adapter=path)[:2] for name, path in (("tiny", None), *((n, folder / n) for n in OPTIONS))}


@pytest.fixture(scope="module")
def web(folder, made):
    web = serving.Web((*made["tiny"], serving.make_tokenizer()), adapters={name: folder / name for name in OPTIONS})
    yield web
    web.close()


def ask(web, name, prompt="Once upon a time there was", limit=12, path="/v1/completions", **more):
    body = dict(model=name, max_tokens=limit, temperature=0, **({"prompt": prompt} if path == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}), **more)
    return httpx.post(web.base + path, json=body, headers=HEAD, timeout=120)


def test_each_row_as_if_it_were_alone(web, made):
    """Three models in one batch over the same prompt of several pages: what one has left in the cache, another must not find."""
    tokenizer, prompt = web.service.tokenizer, "Once upon a time there was"
    expected = {name: decode.generate(*pair, tokenizer, [prompt], max_new_tokens=12)[0] for name, pair in made.items()}
    assert len(set(expected.values())) == 3
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        for _ in range(2):
            names = [*made] * 3
            assert [got.json()["choices"][0]["text"] for got in pool.map(lambda name: ask(web, name, prompt), names)] == [expected[name] for name in names]
    assert ask(web, "first", prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16, "its own prefix it finds"


def test_guessed_tokens_are_judged_by_the_row_s_own_adapter(folder, made, monkeypatch):
    """Each row is guessed what the base model would say: right for the base's row, seldom for the others, whose text stays their own."""
    tokenizer, ids = serving.make_tokenizer(), list(range(40, 65))
    expected = {name: decode.generate(*pair, None, [ids], max_new_tokens=16, stop=[])[0] for name, pair in made.items()}
    whole = ids + expected["tiny"]
    monkeypatch.setattr(drafts, "lookup", lambda text, longest, count: whole[len(text):len(text) + count])
    count: dict[int, int] = {}

    class Count(Observer):
        def judged(self, guesses, right):
            count[len(count)] = right
    alone = serving.Alone((*made["tiny"], tokenizer), dc.replace(serving.SMALL, rows=8, speculate=NGram(5)), observer=Count(), adapters={name: folder / name for name in OPTIONS})
    try:
        asked = {name: alone.ask(ids, 16, adapter=None if name == "tiny" else name) for name in [*made]}
        assert {name: alone.wait(request)[0] for name, request in asked.items()} == expected
        assert len(set(map(tuple, expected.values()))) == 3 and sum(count.values()) >= 8, "the guesses of the base's row were taken"
    finally:
        alone.close()


def test_every_endpoint_takes_their_names(web, made):
    tokenizer = web.service.tokenizer
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = decode.generate(*made["second"], None, [tokenizer.encode(chat)], max_new_tokens=8)[0]
    whole = ask(web, "second", "hi", 8, "/v1/chat/completions").json()
    assert whole["model"] == "second" and whole["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
    other = httpx.post(web.base + "/v1/responses", json=dict(model="second", input="hi", temperature=0, max_output_tokens=8), headers=HEAD, timeout=60).json()
    assert other["output"][0]["content"][0]["text"] == whole["choices"][0]["message"]["content"]
    third = ask(web, "second", "hi", 8, "/v1/messages").json()
    assert third["content"][0]["text"] == whole["choices"][0]["message"]["content"] and third["model"] == "second"
    cards = {m["id"]: m for m in httpx.get(web.base + "/v1/models", headers=HEAD).json()["data"]}
    assert cards["first"]["parent"] == "tiny" == cards["second"]["parent"] and cards["tiny"]["parent"] is None


def test_names_that_are_not_loaded(web):
    got = ask(web, "third")
    assert got.status_code == 404 and got.json()["error"]["code"] == "model_not_found" and "first, second" in got.json()["error"]["message"]
    refused = httpx.post(web.base + "/v1/embeddings", json=dict(model="first", input="x"), headers=HEAD)
    assert refused.status_code == 400 and "without adapters" in refused.json()["error"]["message"]
    for given, words in ((["x"], "name=path"), (["a=1", "a=2"], "'a' is taken"), (["tiny=1"], "'tiny' is taken"), (["=1"], "name=path")):
        with pytest.raises(ConfigError, match=words):
            parse(given, ("tiny",))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the certificate is made with openssl")
def test_the_command_with_everything(folder, tmp_path):
    """llmjax serve over TLS, two devices, int8 weights, an adapter, another model's embeddings, limits: as one device has it, offline."""
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    command = [sys.executable, "-m", "llmjax", "serve", f"--model={folder / 'base'}", "--name=tiny", f"--port={port}", "--dtype=float32", "--quantize=int8", "--tensor=2", "--rows=2",
               f"--adapter=second={folder / 'second'}", f"--embedding-model={folder / 'base'}", f"--tls-cert={certificate}", f"--tls-key={key}", "--semantic-cache=0.999", "--rate=1000/min",
               "--concurrency=4", "--cors-origin=*"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""})
    trusted = ssl.create_default_context(cafile=certificate)
    try:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=120, headers={"origin": "https://a.example"}) as client:
            until, ready = time.monotonic() + 400, False
            while not ready and time.monotonic() < until and process.poll() is None:
                time.sleep(0.3)
                with contextlib.suppress(httpx.HTTPError):
                    ready = client.get("/ready").status_code == 200
            assert ready, (tmp_path / "log").read_text()[-2000:]
            body = dict(prompt="Once upon a time", max_tokens=8, temperature=0)
            for name, adapter in (("tiny", None), ("second", folder / "second")):
                model, params, tokenizer = llmjax.load(folder / "base", dtype="float32", quantize="int8", adapter=adapter)
                expected = decode.generate(model, params, tokenizer, [body["prompt"]], max_new_tokens=8)[0]
                got = client.post("/v1/completions", json={**body, "model": name})
                assert got.json()["choices"][0]["text"] == expected and got.headers["access-control-allow-origin"] == "*", name
            assert client.post("/v1/completions", json={**body, "model": "second"}).headers["x-llmjax-cache"] == "semantic 1.0000"
            echo = client.post("/v1/completions", json={**body, "model": "second", "echo": True, "logprobs": 0, "max_tokens": 0}).json()["choices"][0]["logprobs"]["token_logprobs"]
            score, = decode.score(model, params, tokenizer, [body["prompt"]])
            np.testing.assert_allclose(echo[1:], score.logprobs[1:], atol=1e-3)                  # int8 activations on one device, float on two
            plain, weights, _ = llmjax.load(folder / "base", dtype="float32")
            vector = client.post("/v1/embeddings", json=dict(model="tiny", input="a cat")).json()["data"][0]["embedding"]
            np.testing.assert_allclose(vector, decode.embed(plain, weights, tokenizer, ["a cat"])[0], atol=1e-5)
            assert 'store="semantic"} 1.0' in client.get("/metrics").text.replace('result="hit",', "")
        with pytest.raises(httpx.ConnectError, match="(?i)certificate"):
            httpx.get(f"https://127.0.0.1:{port}/health")
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
