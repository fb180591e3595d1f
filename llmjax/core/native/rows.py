"""The product of a few rows with a matrix: the columns in chunks, each worked through in tiles, some rows times some columns, whose sums stay in registers while a loop goes along D and widens
BLOCK weights of each column at a time."""
from collections.abc import Sequence
from typing import Any

from llmjax.core.native import BLOCK
from llmjax.core.native.code import WIDEN, WIDTH, byte, constant, function, integers, nothing, number, pointer, same, single, vector, word
from llmjax.core.native.team import Team

TILES = ((8, 3), (4, 4), (2, 4), (1, 4))       # rows and columns of a tile: many rows share the widening of a weight, many columns the reading of a row; for 32 registers of WIDTH numbers,
FEW_TILES = ((3, 2), (2, 2), (1, 4))           # and for a quarter of that (AVX2, NEON)
AHEAD = 2304               # bytes that are fetched ahead of their use: 6.8 -> 13.5 GB/s of int8 on one core of a Xeon of 2023
CHUNK = 1 << 16            # bytes of the matrix in a chunk
BYTES = dict(float32=4.0, bfloat16=2.0, int8=1.0, int8_blocks=1.0, uint8=0.5)             # of a weight
SCALED = ("int8", "int8_blocks", "uint8")
WORDS = ("x", "w", "scale", "out", "F", "D", "T", "chunk")


def widened(code, kind, w, scale, row, d, D):
    """w[row, d:d + BLOCK] as two vectors; int8 without the scale of its row."""
    place = code.add(code.mul(row, D), d)
    if kind == "uint8":
        place = code.lshr(place, number(1))
    code.fetch(code.at(code.at(w, place, WIDEN[kind]), AHEAD, byte))
    if kind == "uint8":
        grid = code.lshr(place, number(3))                  # 16 bytes of the matrix, 2 numbers of the grid
        step, offset = (code.every(code.get(scale, code.plus(grid, i), single)) for i in range(2))
        both = code.zext(code.numbers(w, place, byte), integers)
        return [code.multiply_add(code.sitofp(n, vector), step, offset) for n in (code.and_(both, same(15)), code.lshr(both, same(4)))]
    halves = [code.floats(w, code.plus(place, i), kind) for i in (0, WIDTH)]
    if kind != "int8_blocks":
        return halves
    step = code.every(code.get(scale, code.lshr(place, number(5)), single))
    return [code.fmul(v, step) for v in halves]


def tile(module, kind, rows, columns):
    """out[t, f], t in [t0, t0 + rows), f in [f0, f0 + columns)"""
    made, code, (x, w, scale, out, t0, f0, F, D) = function(module, f"tile_{rows}_{columns}", nothing, *[pointer] * 4, *[word] * 4)
    sums = [[code.local(vector, start=constant(0.0)) for _ in range(columns)] for _ in range(rows)]
    with code.loop(number(0), D, BLOCK) as d:
        weights = [widened(code, kind, w, scale, code.plus(f0, c), d, D) for c in range(columns)]
        for r, line in enumerate(sums):
            for half in range(2):
                v = code.numbers(x, code.plus(code.add(code.mul(code.plus(t0, r), D), d), half * WIDTH))
                for s, halves in zip(line, weights):
                    code.store(code.multiply_add(halves[half], v, code.load(s, typ=vector)), s)
    for r, line in enumerate(sums):
        for c, s in enumerate(line):
            y = code.total(code.load(s, typ=vector))
            if kind == "int8":
                y = code.fmul(y, code.get(scale, code.plus(f0, c), single))
            code.store(y, code.at(out, code.add(code.mul(code.plus(t0, r), F), code.plus(f0, c)), single))
    code.ret_void()
    return made


def write(module: Any, kind: str, threads: int, board: int, tiles: Sequence[tuple[int, int]] = TILES) -> None:
    """Writes llmjax_rows_{kind}, an XLA FFI handler: x [T, D] float32, w [F, D] of this kind, its scale where it has one (`core/kept.py`) -> [T, F] float32."""
    team = Team(module, WORDS, threads, board)
    functions = {shape: tile(module, kind, *shape) for high, wide in tiles for shape in ((high, wide), (high, 1))}
    item, code, (job, mine) = function(module, "columns", nothing, pointer, word)
    x, w, scale, out = (code.get(job, team.places[n], pointer) for n in WORDS[:4])
    F, D, T, chunk = (code.get(job, team.places[n]) for n in WORDS[4:])
    start = code.mul(mine, chunk)
    end = code.least(code.add(start, chunk), F)
    first = number(0)
    for high, wide in tiles:                            # all columns of the chunk for some rows, then for the next
        last = code.sub(T, code.urem(code.sub(T, first), number(high)))
        with code.loop(first, last, high) as t0:
            whole = code.sub(end, code.urem(code.sub(end, start), number(wide)))
            for columns, since, until in ((wide, start, whole), (1, whole, end)):
                with code.loop(since, until, columns) as f0:
                    code.call(functions[high, columns], [x, w, scale, out, t0, f0, F, D])
        first = last
    code.ret_void()

    def prepare(code, address, size):
        T, D, F = size(0, 0), size(0, 1), size(1, 0)
        chunk = code.plus(code.and_(code.udiv(number(int(CHUNK / BYTES[kind])), D), number(-4)), 4)
        chunks = code.udiv(code.add(F, code.plus(chunk, -1)), chunk)
        words = dict(x=address(0), w=address(1), scale=address(2 if kind in SCALED else 1), out=address(-1), F=F, D=D, T=T, chunk=chunk)
        return words, chunks, code.plus(chunks, -1)
    team.handler(f"llmjax_rows_{kind}", item, prepare)
