"""`dot` on every kind of leaf is the contraction with the dense weight it stands for; leaves compose and pass through jit, grad and scan."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import Int8, Lora, Rows, add_lora, dense, dot, dots, join, quantize_int8, take
from llmjax.core.labels import parse
from llmjax.core.leaves import lora_equations

CASES = [("btd,dnh->btnh", "embed -> heads head_dim", (12, 3, 4), (2, 5, 12)), ("btnh,nhd->btd", "heads head_dim -> embed", (3, 4, 12), (2, 5, 3, 4)),
         ("td,df->tf", "embed -> mlp", (12, 6), (5, 12)), ("etd,edf->etf", "expert | embed -> mlp", (2, 12, 6), (2, 5, 12))]


def lora(w, label):
    leaf = add_lora(jax.random.key(1), w, label.dims("inputs"), label.dims("outputs"), 3, alpha=6.0)
    return Lora(leaf.w, leaf.a, jax.random.normal(jax.random.key(2), leaf.b.shape), leaf.alpha)


def rows(w, inputs):
    """w [in…, out…] as Rows; inputs 0: a table that is also the head"""
    return Rows(w.reshape(np.prod(w.shape[:inputs]), -1).T if inputs else w, None, w.shape, inputs, w.dtype)


KINDS = {
    "lora": lora,
    "int8": lambda w, label: quantize_int8(w, label.dims("inputs")),
    "qlora": lambda w, label: lora(quantize_int8(w, label.dims("inputs")), label),
    "rows": lambda w, label: rows(w, len(label.inputs)),
}


@pytest.mark.parametrize("case, kind", itertools.product(CASES, KINDS), ids=str)
def test_dot_is_the_dense_contraction(case, kind):
    equation, text, shape, x_shape = case
    label = parse(text)
    if kind == "rows" and label.batch:
        pytest.skip("rows are of one matrix")
    w, x = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(3), x_shape)
    leaf = KINDS[kind](w, label)
    assert tuple(leaf.shape) == shape and leaf.ndim == len(shape) and dense(leaf).shape == shape
    got = jax.jit(lambda x, leaf: dot(equation, x, leaf))(x, leaf)
    np.testing.assert_allclose(got, jnp.einsum(equation, x, dense(leaf), precision="highest"), atol=3e-5)      # float32 sums in another order
    if kind == "rows":
        np.testing.assert_array_equal(dense(leaf), w)
    if kind == "int8":
        step = np.abs(np.asarray(w)).max(label.dims("inputs"), keepdims=True) / 127
        assert leaf.q.dtype == jnp.int8 and (np.abs(np.asarray(dense(leaf)) - np.asarray(w)) <= step / 2 + 1e-6).all()


def test_a_fresh_lora_changes_nothing_and_its_gradient_reaches_b_alone():
    w, x = jax.random.normal(jax.random.key(0), (12, 6)), jax.random.normal(jax.random.key(1), (5, 12))
    leaf = add_lora(jax.random.key(2), w, (0,), (1,), 4)
    np.testing.assert_array_equal(dot("td,df->tf", x, leaf), dot("td,df->tf", x, w))
    grad = jax.grad(lambda leaf: jnp.square(dot("td,df->tf", x, leaf)).sum())(leaf)
    assert float(jnp.abs(grad.a).max()) == 0 and float(jnp.abs(grad.b).max()) > 0


def test_stacked_leaves_are_sliced_by_scan():
    w = jax.random.normal(jax.random.key(0), (3, 8, 8))
    label = parse("layer | embed -> mlp")
    x = jax.random.normal(jax.random.key(1), (4, 8))
    for leaf in (quantize_int8(w, label.dims("inputs")), lora(w, label)):
        y, _ = jax.lax.scan(lambda x, one: (dot("td,df->tf", x, one), None), x, leaf)
        want = x
        for one in dense(leaf):
            want = want @ one
        np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4)      # values of order 100 after three products


def test_joined_weights_are_one_product():
    """Three weights of one input, two axes in or one; what each makes is what it would make alone."""
    for equation, first, shapes, x_shape in (("btd,dnh->btnh", 1, [(12, 3, 4), (12, 1, 4), (12, 2, 4)], (2, 5, 12)), ("tdh,dhf->tf", 2, [(3, 4, 6), (3, 4, 2)], (5, 3, 4))):
        ws = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        x, leaves = jax.random.normal(jax.random.key(9), x_shape), join([rows(w, first) for w in ws])
        assert [leaf.shape for leaf in leaves] == shapes and len(jax.tree.leaves(leaves)) == 1
        product = functools.partial(dots, equation)
        assert str(jax.make_jaxpr(product)(x, leaves)).count("dot_general") == 1
        for got, w in zip(jax.jit(product)(x, leaves), ws):
            np.testing.assert_allclose(got, jnp.einsum(equation, x, w, precision="highest"), atol=3e-5)
        np.testing.assert_array_equal(dense(leaves[0]), ws[0])
    with pytest.raises(TypeError, match="dots"):
        dot("td,df->tf", x, leaves[0])
    with pytest.raises(TypeError, match="another"):
        dense(leaves[1])


def test_a_table_is_read_as_a_head_too():
    table, x = jax.random.normal(jax.random.key(0), (10, 6)), jax.random.normal(jax.random.key(1), (2, 3, 6))
    np.testing.assert_allclose(dot("btd,vd->btv", x, rows(table, 0)), x @ table.T, atol=1e-5)


def test_take_reads_rows_of_every_kind():
    table, ids = jax.random.normal(jax.random.key(0), (10, 6)), jnp.asarray([[1, 9], [0, 1]])
    label = parse("vocab -> embed")
    for leaf in (table, quantize_int8(table, (0,)), quantize_int8(table, (1,)), lora(table, label), rows(table, 0)):
        np.testing.assert_allclose(take(leaf, ids, jnp.float32), dense(leaf)[ids], atol=1e-5)


def test_equations():
    assert lora_equations("btd,dnh->btnh", 2, 3, 3) == ("btd,dz->btz", "btz,znh->btnh")
    assert lora_equations("etd,edf->etf", 3, 3, 3) == ("etd,edz->etz", "etz,ezf->etf")


def test_one_row_in_bfloat16_is_padded_not_changed():
    w, x = jax.random.normal(jax.random.key(0), (12, 6)).astype(jnp.bfloat16), jax.random.normal(jax.random.key(1), (1, 12)).astype(jnp.bfloat16)
    leaf = rows(w, 1)
    assert dot("td,df->tf", x, leaf).shape == (1, 6) and isinstance(quantize_int8(w, (0,)), Int8)
    np.testing.assert_allclose(dot("td,df->tf", x, leaf).astype(jnp.float32), (x.astype(jnp.float32) @ w.astype(jnp.float32)), rtol=1e-2, atol=1e-2)      # 8 bits


def test_one_row_of_16_bit_numbers_does_not_convert_the_weight():
    """A head read for one token: as the first of two rows, and the table is nowhere made anew in float32."""
    x, table = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(((1, 1, 64), (512, 64))))
    one = jax.jit(functools.partial(dot, "btd,vd->btv", out_dtype=jnp.float32))
    wanted = dot("btd,vd->btv", jnp.concatenate([x, x]), table, out_dtype=jnp.float32)[:1]
    np.testing.assert_allclose(one(x, table), wanted, rtol=1e-6)
    assert "f32[512,64]" not in one.lower(x, table).compile().as_text()
