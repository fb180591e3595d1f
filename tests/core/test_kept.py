"""Rows in every form, multiplied by our own machine code: against float64, against XLA's products, bit for bit whatever stands beside; and the form that `narrowest` finds for what the
`gguf` package quantised."""
import ctypes
import platform
import threading

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import native
from llmjax.core.kept import narrowest, times, widen
from llmjax.core.native import team

random = np.random.default_rng(0)
FORMS = ("float32", "bfloat16", "int8", "int8_blocks", "uint8")


def kept(form, F, D, size=1.0):
    """(w, scale) of a random matrix in a form"""
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape) * size, jnp.float32)
    if form in ("float32", "bfloat16"):
        return normal(F, D).astype(form), None
    if form == "uint8":
        return jnp.asarray(random.integers(0, 256, (F, D // 2)), jnp.uint8), normal(F, D // 32, 2)
    return jnp.asarray(random.integers(-127, 128, (F, D)), jnp.int8), normal(F) if form == "int8" else normal(F, D // 32)


@pytest.fixture(scope="module")
def product():
    assert native.available()
    return jax.jit(native.few_rows)


@pytest.mark.parametrize("size", [0.02, 5.0])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_number_of_rows(product, form, size):
    """One tile and several, columns that end within a tile, matrices of one chunk and of many."""
    for F, D, counts in ((7, 32, (1, 2, 3, 5, 13)), (1, 96, (1, 4)), (1001, 416, (1, 6, 31))):
        w, scale = kept(form, F, D, size)
        exact = np.asarray(widen(w, scale), np.float64)
        for rows in counts:
            x = random.standard_normal((rows, D)).astype(np.float32)
            # a float32 sum of D products, each rounded once: far below D roundings of the sum of magnitudes
            np.testing.assert_allclose(product(x, w, scale), x.astype(np.float64) @ exact.T, rtol=0, atol=3e-7 * (np.abs(x).astype(np.float64) @ np.abs(exact).T).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_number_depends_on_its_row_and_column_alone(product, form):
    w, scale = kept(form, 700, 256)
    x = random.standard_normal((31, 256)).astype(np.float32)
    whole = np.asarray(product(x, w, scale))
    for start, stop in ((0, 1), (3, 5), (7, 10), (11, 15), (12, 30)):
        np.testing.assert_array_equal(product(x[start:stop], w, scale), whole[start:stop])
    np.testing.assert_array_equal(product(x, w[5:12], None if scale is None else scale[5:12]), whole[:, 5:12])


def test_threads_do_not_disturb_each_other(product):
    """Eight callers at once, on a pool of as many threads as there are cores: each asks for helpers that may come when its work is done."""
    cases = [(random.standard_normal((1 + i % 3, 512)).astype(np.float32), *kept(FORMS[i % 5], 1500, 512)) for i in range(8)]
    wanted = [np.asarray(product(*case)) for case in cases]
    wrong = []

    def call(i):
        for _ in range(60):
            if not np.array_equal(product(*cases[i]), wanted[i]):
                wrong.append(i)
    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong and not any(t.is_alive() for t in threads)


def called(schedule, destroy=lambda request: None, processor=None):
    """-> a function (x, w [F, D] float32) that calls the machine code for four threads as XLA does, with another's pool: `schedule(request)` answers 0 or the address of an error."""
    kinds = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p), ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    functions = [kind(f) for kind, f in zip(kinds, (schedule, destroy))]
    words = lambda *values: (ctypes.c_int64 * len(values))(*values)
    board = words(*[0] * team.BOARD)
    engine = native.compiled("rows_float32", 4, ctypes.addressof(board), processor)
    handler = kinds[0](engine.get_function_address("llmjax_rows_float32"))
    table = [0] * 24
    table[team.API["schedule"]], table[team.API["destroy"]] = (ctypes.cast(f, ctypes.c_void_p).value for f in functions)
    table = words(*table)

    def call(x, w):
        out = np.zeros((len(x), len(w)), np.float32)
        sizes = [words(*a.shape) for a in (x, w, out)]
        buffers = [words(48, 0, 11, a.ctypes.data, 2, ctypes.addressof(n)) for a, n in zip((x, w, out), sizes)]
        arguments, results = words(*map(ctypes.addressof, buffers[:2])), words(ctypes.addressof(buffers[2]))
        frame = words(0, 0, ctypes.addressof(table), 0, 3, 0, 0, 2, 0, ctypes.addressof(arguments), 0, 0, 1, 0, ctypes.addressof(results))
        assert not handler(ctypes.addressof(frame))
        return out
    call.kept = engine, functions, board
    return call


def test_without_threads_it_does_all_itself():
    """XLA has no pool for us: the request is answered with an error, which is given back, and the caller works alone."""
    asked = []
    call = called(lambda _: asked.append("schedule") or 1, lambda request: asked.append(("destroy", ctypes.cast(request, ctypes.POINTER(ctypes.c_int64))[2])))
    x, w = (random.standard_normal((n, 512)).astype(np.float32) for n in (2, 300))
    np.testing.assert_allclose(call(x, w), x @ w.T, atol=1e-3)
    assert asked == ["schedule", ("destroy", 1)] * 3


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of another kind")
def test_a_processor_with_fewer_registers():
    """The same sums on AVX2, in other tiles."""
    call, wide = called(lambda _: 1, processor="haswell"), called(lambda _: 1)
    for rows in (1, 2, 3, 7):
        x, w = (random.standard_normal((n, 256)).astype(np.float32) for n in (rows, 101))
        np.testing.assert_array_equal(call(x, w), wide(x, w))


def test_helpers_of_several_callers():
    """Two callers and three helpers each, on threads of their own: helpers that come late, that find the next job posted, and that pass it on to each other."""
    running = []

    def schedule(request):
        task, job = ctypes.cast(request, ctypes.POINTER(ctypes.c_int64))[3:5]
        running.append(threading.Thread(target=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(task), args=(job,)))
        running[-1].start()
    call = called(schedule)
    wrong = []

    def caller(seed):
        own = np.random.default_rng(seed)
        x, w = (own.standard_normal((n, 512)).astype(np.float32) for n in (3, 900))
        wanted = call(x, w)
        np.testing.assert_allclose(wanted, x @ w.T, atol=1e-3)
        for _ in range(300):
            if not np.array_equal(call(x, w), wanted):
                wrong.append(seed)
    callers = [threading.Thread(target=caller, args=(seed,)) for seed in (1, 2)]
    for t in callers:
        t.start()
    for t in callers:
        t.join(60)
    for t in running:
        t.join(60)
    assert not wrong and len(running) >= 3 and not any(t.is_alive() for t in callers + running)


@pytest.mark.parametrize("form", FORMS)
def test_xla_gives_the_same_where_it_takes_over(form, monkeypatch):
    """Many rows, and machines without the machine code."""
    w, scale = kept(form, 40, 64, 0.1)
    many = jnp.asarray(random.standard_normal((300, 64)), jnp.float32)
    exact = np.asarray(many, np.float64) @ np.asarray(widen(w, scale), np.float64).T
    room = 2e-4 * np.abs(exact).max() if form == "int8" else 2e-6 * np.abs(exact).max()          # int8 by channels: activations of 15 bits
    np.testing.assert_allclose(times(many, w, scale), exact, rtol=0, atol=room)
    monkeypatch.setattr(native, "available", lambda: False)
    for rows in (1, 3):
        np.testing.assert_allclose(times(many[:rows], w, scale), exact[:rows], rtol=0, atol=room)
        half = times(many[:rows].astype(jnp.bfloat16), w, scale)
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(half, exact[:rows], rtol=0, atol=1e-1 * np.abs(exact).max())     # eight bits


def quantised(kind, w):
    kind = getattr(gguf.GGMLQuantizationType, kind)
    return gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)


@pytest.mark.parametrize("kind, form", [("Q4_0", "uint8"), ("Q4_1", "uint8"), ("Q8_0", "int8"), ("BF16", "bfloat16"), ("F32", "float32"), ("Q5_1", "float32")])
def test_a_file_of_few_bits_is_read_in_few_bits(kind, form):
    w = random.standard_normal((200, 96)).astype(np.float32) * np.exp(random.standard_normal((200, 1)).astype(np.float32) * 3)
    w[3] = 0
    w[4, :32] = 0.25
    given = jnp.asarray(quantised(kind, w))
    numbers, scale = narrowest(given)
    assert numbers.dtype == form
    np.testing.assert_array_equal(widen(numbers, scale).astype(jnp.float32), given)


def test_one_number_beside_the_grid_is_not_lost():
    w = quantised("Q4_1", random.standard_normal((200, 64)).astype(np.float32))
    w[150, 5] += 1e-4
    numbers, scale = narrowest(jnp.asarray(w))
    assert numbers.dtype == jnp.float32 and scale is None
    w[150, 5] = np.nan
    assert narrowest(jnp.asarray(w))[0].dtype == jnp.float32
    w = w[:, :40]
    assert narrowest(jnp.asarray(w))[0].dtype == jnp.float32          # no whole blocks
