"""Experts against a loop over tokens in NumPy; the load-balance loss against transformers'."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import Compute, Layout, MixtureOfExperts
from llmjax.core.model_config import Groups
from llmjax.models.mixture_of_experts import Experts
from llmjax.objectives.language import router_statistics

D = 16


def run(spec, x, segments=None, experts="auto"):
    module = Experts(spec, Compute("float32", experts=experts), Layout())
    params = jax.tree.map(lambda b: b.value, module.init(jax.random.key(0), x, None)["params"], is_leaf=lambda b: hasattr(b, "label"))
    y, said = jax.jit(lambda p, x: module.apply({"params": p}, x, segments, mutable=["aux"]))(params, x)
    return jax.tree.map(np.asarray, params), np.asarray(y), said


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3])
def test_against_a_loop_over_tokens(renormalize, top_k):
    x = jax.random.normal(jax.random.key(1), (2, 9, D))
    spec = MixtureOfExperts(5, top_k, 12, renormalize=renormalize, scale=1.5, shared=20, shared_gate=True)
    p, y, _ = run(spec, x)
    silu = lambda a: a / (1 + np.exp(-a))
    for token, got in zip(np.asarray(x).reshape(-1, D), y.reshape(-1, D)):
        logits = token @ p["router"]
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        chosen = np.argsort(-weights)[:top_k]
        gates = weights[chosen] / (weights[chosen].sum() if renormalize else 1)
        want = sum(1.5 * g * ((silu(token @ p["gate"][e]) * (token @ p["up"][e])) @ p["down"][e]) for g, e in zip(gates, chosen))
        shared = (silu(token @ p["shared"]["gate"]) * (token @ p["shared"]["up"])) @ p["shared"]["down"]
        want = want + shared / (1 + np.exp(-(token @ p["shared_gate"])))
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_sigmoid_router_with_groups_is_transformers():
    """DeepSeek-V3's router, whose bias only chooses: the same experts and gates for every token."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(hidden_size=D, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True))
    x = jax.random.normal(jax.random.key(4), (2, 40, D))
    spec = MixtureOfExperts(12, 3, 8, score="sigmoid", groups=Groups(4, 2, by=2), selection_bias=True, scale=2.5)
    module = Experts(spec, Compute("float32"), Layout())
    params = run(spec, x)[0]
    params["selection_bias"] = np.asarray(jax.random.normal(jax.random.key(5), (12,))) * 0.3
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(params["router"].T))
        theirs.e_score_correction_bias.copy_(torch.tensor(params["selection_bias"]))
        _, weights, indices = theirs(torch.tensor(np.asarray(x)))
    gates, chosen = (y.reshape(80, 3) for y in module.apply({"params": params}, x, None, method="route"))
    mine, other = (np.argsort(np.asarray(i), -1) for i in (chosen, indices))
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(chosen), mine, -1), np.take_along_axis(np.asarray(indices), other, -1))
    np.testing.assert_allclose(np.take_along_axis(np.asarray(gates), mine, -1), np.take_along_axis(np.asarray(weights), other, -1), rtol=1e-5)
    free = Experts(MixtureOfExperts(12, 3, 8, score="sigmoid", selection_bias=True, scale=2.5), Compute("float32"), Layout()).apply({"params": params}, x, None, method="route")[1].reshape(80, 3)
    assert (np.sort(np.asarray(free), -1) != np.sort(np.asarray(chosen), -1)).any(), "the groups never mattered"


def test_a_capacity_drops_who_comes_late():
    """Against a loop over the tokens with a counter per expert: 40 tokens with two choices of four experts, ten places each (an even share is 20)."""
    spec, x = MixtureOfExperts(4, 2, 8), jax.random.normal(jax.random.key(6), (2, 20, D))
    params, whole, _ = run(spec, x)
    module = Experts(spec, Compute("float32", capacity=0.5), Layout())
    y, said = module.apply({"params": params}, x, None, mutable=["aux"])
    gates, chosen = (np.asarray(a).reshape(40, 2) for a in module.apply({"params": params}, x, None, method="route"))
    rows, want, places, dropped = np.asarray(x).reshape(40, D), np.zeros((40, D)), np.full(4, 10), 0
    for m in range(40):
        for gate, e in zip(gates[m], chosen[m]):
            if places[e] == 0:
                dropped += 1
                continue
            places[e] -= 1
            g, u = (rows[m] @ np.asarray(params[name][e], np.float64) for name in ("gate", "up"))
            want[m] += gate * ((g / (1 + np.exp(-g)) * u) @ np.asarray(params["down"][e], np.float64))
    assert dropped == 40 == float(said["aux"]["dropped"][0]) and np.abs(np.asarray(y).reshape(40, D) - want).max() < 1e-5 and np.abs(np.asarray(y - whole)).max() > 1e-2


def test_balance_loss_is_transformers():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    x = jax.random.normal(jax.random.key(2), (2, 11, D))
    segments = jnp.asarray(np.arange(11) < 8, jnp.int32)[None].repeat(2, 0)
    for used in (None, segments):
        p, _, said = run(MixtureOfExperts(4, 2, 8), x, used)
        logits = torch.tensor(np.asarray(x).reshape(-1, D) @ p["router"])
        theirs = float(load_balancing_loss_func((logits,), 4, 2, None if used is None else torch.tensor(np.asarray(used))))
        found = router_statistics(said)
        assert float(found["balance_loss"]) == pytest.approx(theirs, rel=1e-5)
        keep = np.ones(22, bool) if used is None else np.asarray(used).reshape(-1) > 0
        z = np.log(np.exp(logits.numpy()).sum(-1))[keep]
        assert float(found["router_z_loss"]) == pytest.approx((z ** 2).mean(), rel=1e-5)
        assert 1.0 <= float(found["expert_imbalance"]) <= 4.0
