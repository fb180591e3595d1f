"""Adapters that requests ask for by name: each row its own, in one batch, as if it were alone; names that are not there; prefixes that are not shared."""
import concurrent.futures

import httpx
import pytest
import serving

import llmjax
from llmjax import decode
from llmjax.core import ConfigError
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
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      max_position_embeddings=256, initializer_range=0.4, eos_token_id=258, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(path / "base")
    for name, options in OPTIONS.items():
        model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(path / "base"), peft.LoraConfig(**options))
        with torch.no_grad():
            for p in (p for n, p in model.named_parameters() if "lora_" in n):
                p.copy_(torch.randn(p.shape) * 0.3)
        model.save_pretrained(path / name)
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
