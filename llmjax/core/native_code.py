"""The product of a few rows with a matrix in the words of LLVM (`llvmlite.ir`): what `native.py` compiles.

A call of XLA's becomes a job: the columns in chunks, which the calling thread and helpers from XLA's pool take one after the other. A chunk is worked through in tiles, some rows times some
columns, whose sums stay in registers while a loop goes along D and widens BLOCK weights of each column at a time.

To wake a thread of the pool takes some 50 microseconds, half of them the caller's: as much as a small product. So a helper that has done its part looks out for the next job for a while, at one
place, `posted`; the caller puts its job there while some helper is `idle`, and asks the pool only for others. Whoever holds a job, the place included, is counted in it, and the last to let go
frees it.
"""
import contextlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

WIDTH = 16                 # numbers in a vector; LLVM splits it where a processor's are shorter
TILES = ((8, 3), (4, 4), (2, 4), (1, 4))       # rows and columns of a tile: many rows share the widening of a weight, many columns the reading of a row; for 32 registers of WIDTH numbers,
FEW_TILES = ((3, 2), (2, 2), (1, 4))           # and for a quarter of that (AVX2, NEON)
AHEAD = 2304               # bytes that are fetched ahead of their use: 6.8 -> 13.5 GB/s of int8 on one core of a Xeon of 2023
CHUNK = 1 << 16            # bytes of the matrix in a chunk
PATIENCE = 8000            # looks before an idle helper goes back to the pool: 0.1 ms on a Xeon of 2023, as long as the attention between two products
BYTES = dict(float32=4.0, bfloat16=2.0, int8=1.0, int8_blocks=1.0, uint8=0.5)             # of a weight
SCALED = ("int8", "int8_blocks", "uint8")

JOB = dict((name, i) for i, name in enumerate(("x", "w", "scale", "out", "F", "D", "T", "chunk", "chunks", "next", "done", "holders", "request")))      # the words of a job
FRAME = dict(extension=1, api=2, context=3, arguments=9, results=14)         # words of XLA_FFI_CallFrame (xla/ffi/api/c_api.h, XLA FFI 0.1 and later)
BUFFER = dict(data=3, sizes=5)                                               # words of XLA_FFI_Buffer
API = dict(destroy=8, schedule=17)                                           # words of XLA_FFI_Api: XLA_FFI_Error_Destroy, XLA_FFI_ThreadPool_Schedule

word, byte, index, single, pointer, nothing = ir.IntType(64), ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.PointerType(), ir.VoidType()
vector, integers = ir.VectorType(single, WIDTH), ir.VectorType(index, WIDTH)
null = ir.Constant(pointer, None)


def number(n: int) -> Any:
    return ir.Constant(word, n)


def same(n: int) -> Any:
    """A vector of integers n"""
    return ir.Constant(integers, [n] * WIDTH)


class Code(ir.IRBuilder):
    """An IRBuilder that knows loops and addresses."""

    def at(self, base, place, type=word):
        """The address of element `place` of an array at `base`"""
        return self.gep(base, [place if isinstance(place, ir.Value) else number(place)], source_etype=type)

    def get(self, base, place, type=word):
        return self.load(self.at(base, place, type), typ=type)

    def plus(self, a, n):
        return self.add(a, number(n))

    def add_to(self, base, place, n):
        """Adds n to a word, as one step for all threads -> what it was"""
        return self.atomic_rmw("add", self.at(base, place), number(n), "seq_cst")

    def given(self, address):
        """if address != null: (a context)"""
        return self.if_then(self.icmp_unsigned("!=", self.ptrtoint(address, word), number(0)))

    def put(self, place, job):
        """Puts a job, or null, at `place` -> what stood there"""
        return self.inttoptr(self.atomic_rmw("xchg", self.at(place, 0), self.ptrtoint(job, word), "seq_cst"), pointer)

    def least(self, a, b):
        return self.select(self.icmp_signed("<", a, b), a, b)

    @contextlib.contextmanager
    def loop(self, start, end, step: int) -> Iterator[Any]:
        """for i in range(start, end, step)"""
        with self.goto_entry_block():
            counter = self.alloca(word)
        self.store(start, counter)
        head, body, after = (self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        i = self.load(counter, typ=word)
        self.cbranch(self.icmp_signed("<", i, end), body, after)
        self.position_at_end(body)
        yield i
        self.store(self.plus(i, step), counter)
        self.branch(head)
        self.position_at_end(after)

    def numbers(self, base, place, type):
        """WIDTH numbers of `type` from element `place` on"""
        return self.load(self.at(base, place, type), align=1, typ=ir.VectorType(type, WIDTH))

    def every(self, value):
        """A vector with `value` in each place"""
        first = self.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(index, 0))
        return self.shuffle_vector(first, first, same(0))

    def total(self, v):
        """The sum of a vector, half onto half, so that its order is always the same"""
        for count in (WIDTH >> i for i in range(1, WIDTH.bit_length())):
            low, high = (ir.Constant(ir.VectorType(index, count), list(range(start, start + count))) for start in (0, count))
            v = self.fadd(self.shuffle_vector(v, v, low), self.shuffle_vector(v, v, high))
        return self.extract_element(v, ir.Constant(index, 0))


class Writer:
    """Writes one kind's functions into a module."""

    def __init__(self, kind: str, block: int, threads: int, tiles: Sequence[tuple[int, int]]):
        self.kind, self.block, self.threads, self.tiles, self.module = kind, block, threads, tiles, ir.Module(f"llmjax_{kind}")
        outside = lambda name, result, *kinds: ir.Function(self.module, ir.FunctionType(result, kinds), name)
        self.multiply_add = outside(f"llvm.fma.v{WIDTH}f32", vector, vector, vector, vector)
        self.fetch = outside("llvm.prefetch.p0", nothing, pointer, index, index, index)
        arm = platform.machine().lower() in ("arm64", "aarch64")
        breath = outside("llvm.aarch64.hint", nothing, index) if arm else outside("llvm.x86.sse2.pause", nothing)
        self.breath, self.breaths = breath, [ir.Constant(index, 1)] if arm else []         # the processor's own word for "I am waiting"
        self.posted, self.idle = (self.shared(name) for name in ("posted", "idle"))
        self.malloc, self.free, self.give_way = outside("malloc", pointer, word), outside("free", nothing, pointer), outside("sched_yield", index)

    def shared(self, name):
        """A word that all threads see, 0 at first"""
        made = ir.GlobalVariable(self.module, word, name)
        made.initializer, made.linkage = number(0), "internal"
        return made

    def function(self, name, result, *kinds, local=True):
        """-> (a new function, a Code at its start, its arguments)"""
        made = ir.Function(self.module, ir.FunctionType(result, kinds), name)
        made.linkage = "internal" if local else "external"
        return made, Code(made.append_basic_block()), made.args

    def widened(self, code, w, scale, row, d, D):
        """w[row, d:d + block] as two vectors; int8 without the scale of its row."""
        type = single if self.kind == "float32" else ir.IntType(int(8 * max(BYTES[self.kind], 1)))
        place = code.add(code.mul(row, D), d)
        if self.kind == "uint8":
            place = code.lshr(place, number(1))
        code.call(self.fetch, [code.at(code.at(w, place, type), AHEAD, byte), *(ir.Constant(index, i) for i in (0, 3, 1))])       # to read, soon again, data
        if self.kind == "uint8":
            grid = code.lshr(place, number(3))                  # 16 bytes of the matrix, 2 numbers of the grid
            step, offset = (code.every(code.get(scale, code.plus(grid, i), single)) for i in range(2))
            both = code.zext(code.numbers(w, place, type), integers)
            return [code.call(self.multiply_add, [code.sitofp(n, vector), step, offset]) for n in (code.and_(both, same(15)), code.lshr(both, same(4)))]
        halves = [code.numbers(w, code.plus(place, i), type) for i in (0, WIDTH)]
        if self.kind == "bfloat16":
            return [code.bitcast(code.shl(code.zext(v, integers), same(16)), vector) for v in halves]
        if self.kind == "float32":
            return halves
        floats = [code.sitofp(code.sext(v, integers), vector) for v in halves]
        if self.kind == "int8":
            return floats
        step = code.every(code.get(scale, code.lshr(place, number(5)), single))
        return [code.fmul(v, step) for v in floats]

    def tile(self, rows, columns):
        """out[t, f], t in [t0, t0 + rows), f in [f0, f0 + columns)"""
        made, code, (x, w, scale, out, t0, f0, F, D) = self.function(f"tile_{rows}_{columns}", nothing, *[pointer] * 4, *[word] * 4)
        sums = [[code.alloca(vector) for _ in range(columns)] for _ in range(rows)]
        for line in sums:
            for s in line:
                code.store(ir.Constant(vector, [0.0] * WIDTH), s)
        with code.loop(number(0), D, self.block) as d:
            weights = [self.widened(code, w, scale, code.plus(f0, c), d, D) for c in range(columns)]
            for r, line in enumerate(sums):
                for half in range(2):
                    v = code.numbers(x, code.plus(code.add(code.mul(code.plus(t0, r), D), d), half * WIDTH), single)
                    for s, halves in zip(line, weights):
                        code.store(code.call(self.multiply_add, [halves[half], v, code.load(s, typ=vector)]), s)
        for r, line in enumerate(sums):
            for c, s in enumerate(line):
                y = code.total(code.load(s, typ=vector))
                if self.kind == "int8":
                    y = code.fmul(y, code.get(scale, code.plus(f0, c), single))
                code.store(y, code.at(out, code.add(code.mul(code.plus(t0, r), F), code.plus(f0, c)), single))
        code.ret_void()
        return made

    def work(self):
        """Take chunks of columns until none is left; in a chunk all columns for some rows, then for the next."""
        tiles = {shape: self.tile(*shape) for high, wide in self.tiles for shape in ((high, wide), (high, 1))}
        made, code, (job,) = self.function("work", nothing, pointer)
        x, w, scale, out = (code.get(job, JOB[n], pointer) for n in ("x", "w", "scale", "out"))
        F, D, T, chunk, chunks = (code.get(job, JOB[n]) for n in ("F", "D", "T", "chunk", "chunks"))
        again, take, over = (code.append_basic_block() for _ in range(3))
        code.branch(again)
        code.position_at_end(again)
        mine = code.add_to(job, JOB["next"], 1)
        code.cbranch(code.icmp_signed("<", mine, chunks), take, over)
        code.position_at_end(take)
        start = code.mul(mine, chunk)
        end = code.least(code.add(start, chunk), F)
        first = number(0)
        for high, wide in self.tiles:
            last = code.sub(T, code.urem(code.sub(T, first), number(high)))
            with code.loop(first, last, high) as t0:
                whole = code.sub(end, code.urem(code.sub(end, start), number(wide)))
                for columns, since, until in ((wide, start, whole), (1, whole, end)):
                    with code.loop(since, until, columns) as f0:
                        code.call(tiles[high, columns], [x, w, scale, out, t0, f0, F, D])
            first = last
        code.add_to(job, JOB["done"], 1)
        code.branch(again)
        code.position_at_end(over)
        code.ret_void()
        return made

    def leave(self):
        """Let go of a job: the last to do so frees it, for a helper may come when all is done."""
        made, code, (job,) = self.function("leave", nothing, pointer)
        with code.if_then(code.icmp_signed("==", code.add_to(job, JOB["holders"], -1), number(1))):
            code.call(self.free, [job])
        code.ret_void()
        return made

    def post(self, leave):
        """Put a job where idle helpers look; what stood there is let go, for its caller does without."""
        made, code, (job,) = self.function("post", nothing, pointer)
        code.add_to(job, JOB["holders"], 1)
        before = code.put(self.posted, job)
        with code.given(before):
            code.call(leave, [before])
        code.ret_void()
        return made

    def help(self, work, leave, post):
        """What a helper does: its part of a job, then of others that come while it looks out for them."""
        made, code, (job,) = self.function("help", nothing, pointer)
        looks = code.alloca(word)
        code.call(work, [job])
        code.call(leave, [job])
        code.add_to(self.idle, 0, 1)
        code.store(number(0), looks)
        look, found, over = (code.append_basic_block() for _ in range(3))
        code.branch(look)
        code.position_at_end(look)
        code.call(self.breath, self.breaths)
        seen = code.plus(code.load(looks, typ=word), 1)
        code.store(seen, looks)
        there = code.icmp_unsigned("!=", code.load_atomic(self.posted, "acquire", 8, typ=word), number(0))
        late = code.icmp_signed(">", seen, number(PATIENCE))
        code.cbranch(code.or_(there, late), found, look)
        code.position_at_end(found)                                       # or no longer idle: a job that was posted just now is not left lying
        others = code.plus(code.add_to(self.idle, 0, -1), -1)
        next = code.put(self.posted, null)
        with code.given(next):
            started = code.load_atomic(code.at(next, JOB["next"]), "monotonic", 8, typ=word)
            more = code.icmp_signed("<", started, code.get(next, JOB["chunks"]))
            with code.if_then(code.and_(more, code.icmp_signed(">", others, number(0)))):
                code.call(post, [next])
            code.call(work, [next])
            code.call(leave, [next])
            code.store(number(0), looks)
        rest = code.append_basic_block()
        code.cbranch(code.icmp_signed(">", code.load(looks, typ=word), number(PATIENCE)), over, rest)
        code.position_at_end(rest)
        code.add_to(self.idle, 0, 1)
        code.branch(look)
        code.position_at_end(over)
        code.ret_void()
        return made

    def handler(self):
        """What XLA calls: share the columns out, ask for helpers, work along, wait for the chunks that they took."""
        work, leave = self.work(), self.leave()
        post = self.post(leave)
        help = self.help(work, leave, post)
        _, code, (frame,) = self.function(f"llmjax_rows_{self.kind}", pointer, pointer, local=False)
        extension = code.get(frame, FRAME["extension"], pointer)
        with code.given(extension):                                       # XLA asks, once, which version of its interface this is written for
            code.store(number(1 << 32), code.at(code.get(extension, 3, pointer), 3))       # two numbers of 32 bits: 0 and 1, little end first
            code.ret(null)
        arguments, results, api, context = (code.get(frame, FRAME[n], pointer) for n in ("arguments", "results", "api", "context"))
        buffers = dict(x=code.get(arguments, 0, pointer), w=code.get(arguments, 1, pointer), out=code.get(results, 0, pointer))
        buffers["scale"] = code.get(arguments, 2, pointer) if self.kind in SCALED else buffers["w"]
        size = lambda name, i: code.get(code.get(buffers[name], BUFFER["sizes"], pointer), i)
        T, D, F = size("x", 0), size("x", 1), size("w", 0)
        chunk = code.plus(code.and_(code.udiv(number(int(CHUNK / BYTES[self.kind])), D), number(-4)), 4)
        chunks = code.udiv(code.add(F, code.plus(chunk, -1)), chunk)
        helpers = code.least(code.plus(chunks, -1), number(self.threads - 1))
        job = code.call(self.malloc, [number(8 * (len(JOB) + 4))])
        words = {name: code.get(buffer, BUFFER["data"], pointer) for name, buffer in buffers.items()}
        words.update(F=F, D=D, T=T, chunk=chunk, chunks=chunks, next=number(0), done=number(0), holders=number(1))
        for name, value in words.items():
            code.store(value, code.at(job, JOB[name]))
        request = code.at(job, JOB["request"])

        def ask(what, result, *values):
            """One of XLA's own functions, with a structure of its size, no extension, and `values`"""
            for i, value in enumerate((number(8 * (2 + len(values))), null, *values)):
                code.store(value, code.at(request, i))
            return code.call(code.get(api, API[what], ir.FunctionType(result, [pointer]).as_pointer()), [request])
        idle = code.load_atomic(self.idle, "monotonic", 8, typ=word)
        with code.if_then(code.and_(code.icmp_signed(">", idle, number(0)), code.icmp_signed(">", helpers, number(0)))):
            code.call(post, [job])
        with code.loop(idle, helpers, 1):
            code.add_to(job, JOB["holders"], 1)
            failed = ask("schedule", pointer, context, help, job)
            with code.given(failed):                                      # no threads to be had: this one does it all
                ask("destroy", nothing, failed)
                code.call(leave, [job])
        code.call(work, [job])
        again, wait, over = (code.append_basic_block() for _ in range(3))
        code.branch(again)
        code.position_at_end(again)
        done = code.load_atomic(code.at(job, JOB["done"]), "acquire", 8, typ=word)
        code.cbranch(code.icmp_signed("<", done, chunks), wait, over)
        code.position_at_end(wait)
        code.call(self.give_way, [])
        code.branch(again)
        code.position_at_end(over)
        taken = code.extract_value(code.cmpxchg(self.posted, code.ptrtoint(job, word), number(0), "seq_cst"), 1)
        with code.if_then(taken):                                         # still posted: nobody came
            code.call(leave, [job])
        code.call(leave, [job])
        code.ret(null)


def module(kind: str, block: int, threads: int, tiles: Sequence[tuple[int, int]] = TILES) -> Any:
    """The module of LLVM's with llmjax_rows_{kind}, an XLA FFI handler, for `threads` threads."""
    writer = Writer(kind, block, threads, tiles)
    writer.handler()
    return writer.module
