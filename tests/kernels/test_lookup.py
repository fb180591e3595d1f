"""Rows of a table on a mesh beside autodiff of indexing: values and gradients, and what crosses the wires."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.core import make_mesh, quantize_int8
from llmjax.kernels import lookup

V, D, B, T = 64, 32, 8, 12


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.random.normal(keys[0], (V, D)), jax.random.randint(keys[1], (B, T), 0, 9), jax.random.normal(keys[2], (B, T, D))      # few rows, each met often


def loss(table, ids, g):
    return (lookup(table, ids, jnp.bfloat16).astype(jnp.float32) * g).sum()


@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(data=8), dict(fsdp=2, sequence=2, tensor=2)], ids=lambda a: "x".join(a))
def test_a_mesh_changes_nothing(axes):
    table, ids, g = arrays()
    wanted = jax.value_and_grad(lambda table: (table[ids].astype(jnp.bfloat16).astype(jnp.float32) * g).sum())(table)
    mesh = make_mesh(**({"data": 1} | axes))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        value, grad = jax.jit(jax.value_and_grad(loss))(put(table, "tensor", "fsdp"), put(ids, ("data", "fsdp"), "sequence"), put(g, ("data", "fsdp"), "sequence"))
    assert value == pytest.approx(float(wanted[0]), rel=1e-5) and grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, wanted[1], atol=1e-5 * np.abs(wanted[1]).max())            # the same 16-bit numbers, added up in float32 in another order


def test_the_gradient_crosses_in_16_bits():
    table, ids, g = arrays()
    mesh = make_mesh(fsdp=8, data=1)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, PartitionSpec(None, "fsdp"))).lower(table, ids, g).as_text()
    pinned = [line for line in text.splitlines() if "sharding_constraint" in line and f"{B}x{T}x{D}x" in line]
    assert pinned and all("bf16" in line for line in pinned) and "optimization_barrier" in text


def test_leaves_and_one_device_are_as_before():
    table, ids, g = arrays()
    assert jnp.array_equal(lookup(table, ids, jnp.bfloat16), table[ids].astype(jnp.bfloat16))
    assert lookup(quantize_int8(table, (1,)), ids, jnp.bfloat16).shape == (B, T, D)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(table, ids, g))
    assert "optimization_barrier" not in jaxpr and "custom_vjp" not in jaxpr
