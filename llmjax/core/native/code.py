"""Words to write machine code with: an `llvmlite.ir` builder that knows loops, addresses and vectors of WIDTH numbers."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

from llmjax.core.native import WIDTH

WIDEN = dict(float32=ir.FloatType(), bfloat16=ir.IntType(16), int8=ir.IntType(8), int8_blocks=ir.IntType(8), uint8=ir.IntType(8))         # how numbers of a kind lie in memory
MAGIC = 1.5 * 2**23                          # a float32 plus this is rounded to a whole number
POLYNOMIAL = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1

word, byte, index, single, pointer, nothing = ir.IntType(64), ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.PointerType(), ir.VoidType()
vector, integers = ir.VectorType(single, WIDTH), ir.VectorType(index, WIDTH)
null = ir.Constant(pointer, None)


def number(n: int) -> Any:
    return ir.Constant(word, n)


def same(n: int) -> Any:
    """A vector of integers n"""
    return ir.Constant(integers, [n] * WIDTH)


def constant(x: float) -> Any:
    """A vector of numbers x"""
    return ir.Constant(vector, [x] * WIDTH)


def function(module: Any, name: str, result: Any, *kinds: Any, local: bool = True) -> tuple[Any, "Code", Any]:
    """-> (a new function, a Code at its start, its arguments)"""
    made = ir.Function(module, ir.FunctionType(result, kinds), name)
    made.linkage = "internal" if local else "external"
    return made, Code(made.append_basic_block()), made.args


def outside(module: Any, name: str, result: Any, *kinds: Any) -> Any:
    """A function that others define: LLVM, the C library"""
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, kinds), name)


class Code(ir.IRBuilder):
    def at(self, base, place, type=word):
        """The address of element `place` of an array at `base`"""
        return self.gep(base, [place if isinstance(place, ir.Value) else number(place)], source_etype=type)

    def get(self, base, place, type=word):
        return self.load(self.at(base, place, type), typ=type)

    def set(self, value, base, place, type=word):
        self.store(value, self.at(base, place, type))

    def plus(self, a, n):
        return self.add(a, number(n))

    def count(self, place, n):
        """Adds n to a word, as one step for all threads -> what it was"""
        return self.atomic_rmw("add", place, number(n), "seq_cst")

    def given(self, address):
        """if address != null: (a context)"""
        return self.if_then(self.icmp_unsigned("!=", self.ptrtoint(address, word), number(0)))

    def put(self, place, job):
        """Puts a job, or null, at `place` -> what stood there"""
        return self.inttoptr(self.atomic_rmw("xchg", place, self.ptrtoint(job, word), "seq_cst"), pointer)

    def least(self, a, b):
        return self.select(self.icmp_signed("<", a, b), a, b)

    @contextlib.contextmanager
    def loop(self, start, end, step: int) -> Iterator[Any]:
        """for i in range(start, end, step)"""
        counter = self.local(word)
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

    def local(self, type, count=None, start=None):
        """The address of a variable of this call's, or of an array; `start` is stored there."""
        with self.goto_entry_block():
            place = self.alloca(type, count)
        if start is not None:
            self.store(start, place)
        return place

    def numbers(self, base, place, type=single):
        """WIDTH numbers of `type` from element `place` on"""
        return self.load(self.at(base, place, type), align=1, typ=ir.VectorType(type, WIDTH))

    def keep(self, v, base, place):
        """Stores a vector from element `place` of an array of float32 on"""
        self.store(v, self.at(base, place, single), align=4)

    def floats(self, base, place, kind: str):
        """WIDTH numbers from element `place` on as float32; of 8 bits as the whole numbers that they are"""
        v = self.numbers(base, place, WIDEN[kind])
        if kind == "bfloat16":
            return self.bitcast(self.shl(self.zext(v, integers), same(16)), vector)
        return v if kind == "float32" else self.sitofp(self.sext(v, integers), vector)

    def fetch(self, address):
        """Asks for what lies there, to be read soon"""
        self.call(outside(self.module, "llvm.prefetch.p0", nothing, pointer, index, index, index), [address, *(ir.Constant(index, i) for i in (0, 3, 1))])       # to read, again, data

    def every(self, value):
        """A vector with `value` in each place"""
        first = self.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(index, 0))
        return self.shuffle_vector(first, first, same(0))

    def multiply_add(self, a, b, c):
        """a b + c, rounded once"""
        return self.call(outside(self.module, f"llvm.fma.v{WIDTH}f32", vector, vector, vector, vector), [a, b, c])

    def greater(self, a, b):
        return self.select(self.fcmp_ordered(">", a, b), a, b)

    def folded(self, v, operation: Callable[[Any, Any], Any]):
        """All numbers of a vector as one, half onto half, so that the order is always the same"""
        for count in (WIDTH >> i for i in range(1, WIDTH.bit_length())):
            v = operation(*(self.shuffle_vector(v, v, ir.Constant(ir.VectorType(index, count), list(range(start, start + count)))) for start in (0, count)))
        return self.extract_element(v, ir.Constant(index, 0))

    def total(self, v):
        return self.folded(v, self.fadd)

    def totals(self, vectors):
        """The sums of WIDTH vectors as one vector: with each step half as many vectors, which hold twice as many sums of half as many parts"""
        size = WIDTH
        while len(vectors) > 1:
            size //= 2
            low = [i for i in range(2 * WIDTH) if i // size % 2 == 0]                     # of a and b as one row: the even ones of their pieces, then the odd
            high = [i + size for i in low]
            vectors = [self.fadd(*(self.shuffle_vector(a, b, ir.Constant(integers, which)) for which in (low, high))) for a, b in zip(vectors[::2], vectors[1::2])]
        return vectors[0]

    def exponential(self, x):
        """e^x of a vector of numbers that are 0 or less, to 2 units of the last place; 0 below -87. The polynomial is that of the Cephes library's expf."""
        shifted = self.multiply_add(x, constant(1.44269504088896341), constant(MAGIC))
        n = self.fsub(shifted, constant(MAGIC))
        r = self.multiply_add(n, constant(-0.693359375), x)
        r = self.multiply_add(n, constant(2.12194440e-4), r)
        y = constant(POLYNOMIAL[0])
        for c in POLYNOMIAL[1:]:
            y = self.multiply_add(y, r, constant(c))
        y = self.fadd(self.multiply_add(y, self.fmul(r, r), r), constant(1.0))
        power = self.bitcast(self.shl(self.add(self.bitcast(shifted, integers), same(127)), same(23)), vector)           # 2^n: n stands in the last bits of `shifted`
        return self.select(self.fcmp_ordered("<", x, constant(-87.0)), constant(0.0), self.fmul(y, power))

