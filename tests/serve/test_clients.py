"""Clients people have, unchanged, and schemathesis with the server's own document."""
import json

import pytest
import serving

SAY = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def web():
    from llmjax.serve.service import Limits
    made = serving.Web(serving.make_model(context=512), keys=(("ann", "k-ann"),), limits=Limits(timeout=20))
    yield made
    made.close()


def test_langchain(web):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(base_url=web.base + "/v1", api_key="k-ann", model="tiny", temperature=0, max_tokens=8, max_retries=0)
    whole = chat.invoke("hi")
    assert whole.usage_metadata["output_tokens"] <= 8 and "".join(c.content for c in chat.stream("hi")) == whole.content
    tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}}}
    called = chat.bind(max_tokens=150).bind_tools([tool], tool_choice="add").invoke("hi")
    assert called.tool_calls[0]["name"] == "add" and called.tool_calls[0]["args"]["a"] in (1, 2)
    vectors = langchain.OpenAIEmbeddings(base_url=web.base + "/v1", api_key="k-ann", model="tiny", check_embedding_ctx_length=False, max_retries=0)
    assert len(vectors.embed_documents(["a", "b"])) == 2 and len(vectors.embed_query("a")) == 32


def test_litellm(web):
    litellm = pytest.importorskip("litellm")
    known = dict(model="openai/tiny", api_base=web.base + "/v1", api_key="k-ann", messages=SAY, temperature=0, max_tokens=8, num_retries=0)
    whole = litellm.completion(**known)
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**known, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**known, "api_key": "wrong"})


def test_instructor(web):
    instructor, openai = pytest.importorskip("instructor"), pytest.importorskip("openai")
    from typing import Literal

    import pydantic

    class Pet(pydantic.BaseModel):
        kind: Literal["cat", "dog"]
        age: Literal[1, 2, 3]
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA if hasattr(instructor.Mode, "JSON_SCHEMA") else instructor.Mode.TOOLS):
        client = instructor.from_openai(openai.OpenAI(base_url=web.base + "/v1", api_key="k-ann", max_retries=0), mode=mode)
        pet = client.chat.completions.create(model="tiny", response_model=Pet, messages=SAY, max_tokens=200, max_retries=1, temperature=1, seed=1)
        assert pet.kind in ("cat", "dog") and pet.age in (1, 2, 3)


def test_schemathesis_finds_no_server_error(web):
    schemathesis, hypothesis = pytest.importorskip("schemathesis"), pytest.importorskip("hypothesis")
    import httpx
    document = httpx.get(web.base + "/openapi.json").json()
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document)))
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
        def check(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body, dict) and case.body.get(name):
                    case.body[name] = min(case.body[name], 4)
            got = case.call(base_url=web.base, headers={"authorization": "Bearer k-ann"}, timeout=60)
            seen.add(got.status_code)
            assert got.status_code < 500, (case.path, got.status_code, got.text[:200])
            if got.status_code == 200 and "json" in got.headers["content-type"][0]:
                case.validate_response(got, checks=[schemathesis.checks.response_schema_conformance] if hasattr(schemathesis, "checks") and hasattr(schemathesis.checks, "response_schema_conformance") else [])
        check()
    assert {200, 400} <= seen
