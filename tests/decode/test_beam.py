"""Beam search token for token that of transformers, for a decoder and an encoder-decoder; diverse groups and contrastive search against their published rules in NumPy."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import decode, pretrained
from llmjax.core import Attention, Compute, ConfigError, Layer, Mlp, ModelConfig, Rope
from llmjax.models import Decoder, init_params

V = 40
PROMPTS = [[5, 6, 7, 8], [9, 3], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers' model, ours): a Llama and a T5 with peaked answers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                                                   max_position_embeddings=64, initializer_range=0.3, eos_token_id=2, bos_token_id=1))
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
                                                                       initializer_factor=1.5, eos_token_id=1, pad_token_id=0))
    found = {}
    for name, model in (("llama", llama), ("t5", t5)):
        folder = tmp_path_factory.mktemp(name)
        model.eval().save_pretrained(folder)
        found[name] = (model, *pretrained.load(folder, dtype="float32")[:2])
    return found


@pytest.mark.parametrize("name, knobs, same", [
    ("llama", dict(beams=4, max_new_tokens=12), {}), ("llama", dict(beams=3, max_new_tokens=12, length_penalty=0.3, early_stopping=True, stop=[2, 7, 9]), dict(eos_token_id=[2, 7, 9])),
    ("llama", dict(beams=4, max_new_tokens=12, length_penalty=0.6, early_stopping="never", stop=[2, 7, 25, 31]), dict(eos_token_id=[2, 7, 25, 31])),
    ("llama", dict(beams=3, max_new_tokens=12, length_penalty=-1.0, stop=[2, 7], repetition_penalty=1.5, bad_words=[[8], [3, 4]], min_tokens=4),
     dict(eos_token_id=[2, 7], repetition_penalty=1.5, bad_words_ids=[[8], [3, 4]], min_new_tokens=4)),
    ("t5", dict(beams=4, max_new_tokens=10, stop=[1, 5, 6]), dict(eos_token_id=[1, 5, 6]))])
def test_beams_are_transformers(made, name, knobs, same):
    import torch
    theirs, model, params = made[name]
    got = decode.beam_search(model, params, None, PROMPTS, n=2, **knobs)
    ends = set(same.get("eos_token_id", [2 if name == "llama" else 1]))
    ours = dict(num_beams=knobs["beams"], max_new_tokens=knobs["max_new_tokens"], length_penalty=knobs.get("length_penalty", 1.0), early_stopping=knobs.get("early_stopping", False))
    finishes = set()
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            want = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt)), dtype=torch.long), do_sample=False, num_return_sequences=2, pad_token_id=0,
                                   return_dict_in_generate=True, output_scores=True, **ours, **same)
        for c, ids, score in zip(got[2 * i:2 * i + 2], want.sequences.tolist(), want.sequences_scores.tolist()):
            ids = ids[len(prompt):] if name == "llama" else ids[1:]
            end = next((k for k, x in enumerate(ids) if x in ends), len(ids))
            assert c.ids == ids[:end] and c.finish == ("end" if end < len(ids) else "length")
            assert abs(c.score - score) < 2e-4
            finishes.add(c.finish)
    if name == "llama" and "stop" in knobs:
        assert "end" in finishes, "no text ends: the rules for finished beams were not tried"


def test_beams_are_the_same_alone_and_among_others(made):
    _, model, params = made["llama"]
    knobs = dict(beams=4, max_new_tokens=12, stop=[2, 7, 9])
    together = decode.beam_search(model, params, None, PROMPTS, **knobs)
    assert [c.ids for c in together] == [decode.beam_search(model, params, None, [p], **knobs)[0].ids for p in PROMPTS]
    greedy = decode.complete(model, params, None, PROMPTS, max_new_tokens=12, stop=[2, 7, 9])
    assert [c.ids for c in decode.beam_search(model, params, None, PROMPTS, **{**knobs, "beams": 1, "early_stopping": True})] == [c.ids for c in greedy]


def test_an_encoder_decoder_speculates(made):
    """T5's greedy text with guesses copied from its source, of its first layer, and of itself: token for token the plain one."""
    _, model, params = made["t5"]
    knobs = dict(max_new_tokens=10, stop=[5])
    plain = decode.complete(model, params, None, PROMPTS, **knobs)
    for draft in (decode.NGram(3, 2), decode.EarlyExit(1, 2), decode.DraftModel(model, params, 2)):
        assert [c.ids for c in decode.complete(model, params, None, PROMPTS, draft=draft, **knobs)] == [c.ids for c in plain]


def tiny(seed=0):
    model = Decoder(ModelConfig(V, 32, cycle=(Layer(Attention(2, 1, 16, Rope()), Mlp(48)),), repeats=2, tied=True, context=64), Compute("float32"))
    return model, jax.tree.map(lambda x: 3 * x, init_params(model, jax.random.key(seed)))


def forward(model, params, texts, method=None):
    """[n, length, D or V] of texts of one length, few enough shapes compiled."""
    count, length = len(texts), len(texts[0])
    tokens = np.zeros((8, 32), np.int32)
    tokens[:count, :length] = texts
    out, _ = model.apply({"params": params}, jnp.asarray(tokens), None, jnp.asarray((np.arange(32)[None] < length) * np.ones((8, 1)), jnp.int32), **({"method": method} if method else {}))
    return np.asarray(out[:count, :length], np.float64)


def groups_by_hand(model, params, prompt, groups, beams, diversity, steps):
    """Vijayakumar et al. 2016, algorithm 1, without end tokens: every group's beam step fines tokens that earlier groups took at the same place."""
    kept = [[((), 0.0)] for _ in range(groups)]
    for _ in range(steps):
        taken = np.zeros(V)
        for g in range(groups):
            candidates = []
            for ids, score in kept[g]:
                logits = forward(model, params, [[*prompt, *ids]])[0, -1]
                logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max() - diversity * taken
                candidates += [((*ids, t), score + logprobs[t]) for t in range(V)]
            kept[g] = sorted(candidates, key=lambda c: -c[1])[:beams]
            for ids, _ in kept[g]:
                taken[ids[-1]] += 1
    return sorted((c for g in kept for c in g), key=lambda c: -c[1])


def test_diverse_groups():
    model, params = tiny()
    prompt = [5, 6, 7]
    want = groups_by_hand(model, params, prompt, 2, 2, 1.5, 4)
    got = decode.beam_search(model, params, None, [prompt], beams=4, groups=2, diversity=1.5, n=4, max_new_tokens=4, stop=[], length_penalty=0.0)
    assert [tuple(c.ids) for c in got] == [ids for ids, _ in want]
    np.testing.assert_allclose([c.score for c in got], [s for _, s in want], atol=2e-4)
    plain = groups_by_hand(model, params, prompt, 1, 4, 0.0, 4)
    assert {tuple(c.ids) for c in got} != {ids for ids, _ in plain}, "the fine makes no difference here"


def test_contrastive_search_is_its_formula():
    model, params = tiny(1)
    prompts, alpha, k = [[5, 6, 7, 8, 9], [3, 4]], 0.6, 4
    got = decode.contrastive_search(model, params, None, prompts, top_k=k, penalty_alpha=alpha, max_new_tokens=8, stop=[])
    changed = 0
    for prompt, c in zip(prompts, got):
        ids = list(prompt)
        for _ in range(8):
            logits = forward(model, params, [ids])[0, -1]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            candidates = np.argsort(-p)[:k]
            features = forward(model, params, [[*ids, int(v)] for v in candidates], "features")
            features /= np.linalg.norm(features, axis=-1, keepdims=True)
            likeness = np.einsum("kd,kld->kl", features[:, -1], features[:, :-1]).max(-1)
            chosen = int(np.argmax((1 - alpha) * p[candidates] - alpha * likeness))
            changed += chosen != 0
            ids.append(int(candidates[chosen]))
        assert c.ids == ids[len(prompt):]
    assert changed > 2, "the penalty changes nothing here"
    greedy = decode.generate(model, params, None, prompts, max_new_tokens=8, stop=[])
    assert [c.ids for c in decode.contrastive_search(model, params, None, prompts, top_k=k, penalty_alpha=0.0, max_new_tokens=8, stop=[])] == greedy


@pytest.mark.parametrize("search, knobs, word", [
    ("beam_search", dict(beams=0), "beams=0"), ("beam_search", dict(beams=4, groups=3), "multiple of groups=3"), ("beam_search", dict(beams=2, n=3), "n=3"),
    ("beam_search", dict(diversity=1.0), "groups"),
    ("beam_search", dict(early_stopping="soon"), "early_stopping='soon'"), ("beam_search", dict(temperature=1.0), "draws nothing"), ("beam_search", dict(bogus=1), "no such knob"),
    ("contrastive_search", dict(top_k=V + 1), f"1 to {V}"), ("contrastive_search", dict(penalty_alpha=2), "penalty_alpha=2")])
def test_bad_searches_are_named(search, knobs, word):
    with pytest.raises(ConfigError, match=word):
        getattr(decode, search)(*tiny(), None, [[5]], **knobs)
