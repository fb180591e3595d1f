"""Attention of a few queries over the keys and values of a cache: each row's slots in parts of PART, whose softmaxes stand apart until all are done and are then put together (as in
FlashDecoding). An item of work is one part for the queries of one kv head: WIDTH scores at a time, their exponentials, and the values times these; slots that nobody sees cost a look at the mask.
"""
from typing import Any

from llvmlite import ir

from llmjax.core.native.code import WIDEN, WIDTH, byte, constant, function, index, nothing, number, outside, pointer, single, vector, word
from llmjax.core.native.team import Team

PART = 256                 # slots
TILE = 4                   # queries whose values are summed at once, and vectors of each: as many sums as half of AVX-512's registers
WAKE = 1 << 16             # bytes of keys and values for which it pays to wake a thread
BYTES = dict(float32=4, bfloat16=2)
LOWEST = float("-inf")
POINTERS = ("q", "k", "v", "table", "see", "sinks", "out", "records")
SIZES = ("T", "N", "H", "width", "K", "kept", "page", "W", "S", "parts")        # kept: numbers of a value as it lies, `width` of which count


def unseen(code, mask, place):
    """-> (a vector of bits: which of WIDTH slots are seen, whether none is)"""
    seen = code.icmp_unsigned("!=", code.numbers(mask, place, byte), ir.Constant(ir.VectorType(byte, WIDTH), [0] * WIDTH))
    return seen, code.icmp_unsigned("==", code.bitcast(seen, ir.IntType(WIDTH)), ir.Constant(ir.IntType(WIDTH), 0))


def scored(module, kind):
    """scores[s] of one query for `count` slots, -inf for those it does not see -> the largest. rows: the addresses of the slots' keys"""
    made, code, (q, rows, mask, count, H, scores) = function(module, "scored", single, pointer, pointer, pointer, word, word, pointer)
    top = code.local(vector, start=constant(LOWEST))
    lines = [code.local(vector) for _ in range(WIDTH)]
    with code.loop(number(0), count, WIDTH) as s:
        seen, none = unseen(code, mask, s)
        with code.if_else(none) as (nobody, somebody):
            with nobody:
                code.keep(constant(LOWEST), scores, s)
            with somebody:
                keys = [code.get(rows, code.plus(s, i), pointer) for i in range(WIDTH)]
                for line in lines:
                    code.store(constant(0.0), line)
                with code.loop(number(0), H, WIDTH) as h:
                    x = code.numbers(q, h)
                    for key, line in zip(keys, lines):
                        code.store(code.multiply_add(x, code.floats(key, h, kind), code.load(line, typ=vector)), line)
                found = code.select(seen, code.totals([code.load(line, typ=vector) for line in lines]), constant(LOWEST))
                code.keep(found, scores, s)
                code.store(code.greater(found, code.load(top, typ=vector)), top)
    code.ret(code.folded(code.load(top, typ=vector), code.greater))
    return made


def finite(code, x):
    """x, or 0 for -inf: so nothing seen gives e^(-inf - 0) = 0, never e^(-inf + inf)"""
    return code.select(code.fcmp_ordered("==", x, ir.Constant(single, LOWEST)), ir.Constant(single, 0.0), x)


def weighed(module):
    """scores [count] become e^(score - top) -> their sum"""
    made, code, (scores, count, top) = function(module, "weighed", single, pointer, word, single)
    top, sums = code.every(finite(code, top)), code.local(vector, start=constant(0.0))
    with code.loop(number(0), count, WIDTH) as s:
        weights = code.exponential(code.fsub(code.numbers(scores, s), top))
        code.keep(weights, scores, s)
        code.store(code.fadd(weights, code.load(sums, typ=vector)), sums)
    code.ret(code.total(code.load(sums, typ=vector)))
    return made


def valued(module, kind, queries, wide):
    """out[g, h:h + wide] = the sum over seen slots of weights[g, s] · value[s, h:h + wide], for `queries` g; rows: the addresses of the slots' values"""
    made, code, (weights, rows, mask, count, h, out, apart) = function(module, f"valued_{queries}_{wide}", nothing, pointer, pointer, pointer, word, word, pointer, word)
    sums = [[code.local(vector, start=constant(0.0)) for _ in range(wide)] for _ in range(queries)]
    with code.loop(number(0), count, WIDTH) as first, code.if_then(code.not_(unseen(code, mask, first)[1])), code.loop(first, code.plus(first, WIDTH), 1) as s:
        here = code.icmp_unsigned("!=", code.get(mask, s, byte), ir.Constant(byte, 0))
        with code.if_then(here):                                # what lies in other slots may be NaN, and 0 · NaN is not 0
            row = code.get(rows, s, pointer)
            values = [code.floats(row, code.plus(h, i * WIDTH), kind) for i in range(wide)]
            for g, line in enumerate(sums):
                weight = code.every(code.get(weights, code.plus(s, g * PART), single))
                for total, value in zip(line, values):
                    code.store(code.multiply_add(weight, value, code.load(total, typ=vector)), total)
    for g, line in enumerate(sums):
        for i, total in enumerate(line):
            code.keep(code.load(total, typ=vector), out, code.add(code.mul(apart, number(g)), code.plus(h, i * WIDTH)))
    code.ret_void()
    return made


def write(module: Any, kind: str, threads: int, board: int) -> None:
    """Writes llmjax_queries_{kind}, an XLA FFI handler; operands and result as in `native.few_queries`."""
    team = Team(module, (*POINTERS, *SIZES), threads, board)
    score, weigh = scored(module, kind), weighed(module)
    tiles = {(g, wide): valued(module, kind, g, wide) for g in range(1, TILE + 1) for wide in (1, TILE)}
    pointers = lambda code, job: [code.get(job, team.places[n], pointer) for n in POINTERS]
    sizes = lambda code, job: [code.get(job, team.places[n]) for n in SIZES]

    def record(code, query, part, parts, width):
        """Where query (b, t, n) keeps a part's largest score, the sum of its exponentials (one vector), and the values times them: an element of `records`"""
        return code.mul(code.add(code.mul(query, parts), part), code.plus(width, WIDTH))

    item, code, (job, mine) = function(module, "part", nothing, pointer, word)
    q, k, v, table, see, *_, records = pointers(code, job)
    T, N, H, width, K, kept, page, W, S, parts = sizes(code, job)
    part, rest = code.urem(mine, parts), code.udiv(mine, parts)
    head, b, G = code.urem(rest, K), code.udiv(rest, K), code.udiv(N, K)
    start = code.mul(part, number(PART))
    count = code.sub(code.least(code.plus(start, PART), S), start)
    keys, values = (code.local(pointer, number(PART)) for _ in range(2))
    block, within = code.local(word, start=code.udiv(start, page)), code.local(word, start=code.urem(start, page))
    with code.loop(number(0), count, 1) as s:                   # where keys and values of these slots begin; of slots beyond the table, which nobody sees, anywhere
        n = code.zext(code.get(table, code.add(code.mul(b, W), code.least(code.load(block, typ=word), code.plus(W, -1))), index), word)
        place = code.add(code.mul(code.add(code.mul(n, page), code.load(within, typ=word)), K), head)
        for rows, base, size in ((keys, k, H), (values, v, kept)):
            code.set(code.at(base, code.mul(place, size), WIDEN[kind]), rows, s, pointer)
        next = code.plus(code.load(within, typ=word), 1)
        over = code.icmp_unsigned("==", next, page)
        code.store(code.select(over, number(0), next), within)
        code.store(code.add(code.load(block, typ=word), code.zext(over, word)), block)
    weights = code.local(single, number(TILE * PART))
    with code.loop(number(0), T, 1) as t:
        row = code.add(code.mul(b, T), t)
        mask = code.at(see, code.add(code.mul(row, S), start), byte)
        query = code.add(code.mul(row, N), code.mul(head, G))

        def several(since, until, size):
            """Queries g in [since, until), `size` of them at a time"""
            with code.loop(since, until, size) as g:
                first = code.add(query, g)
                for i in range(size):
                    scores, place = code.at(weights, i * PART, single), record(code, code.plus(first, i), part, parts, width)
                    top = code.call(score, [code.at(q, code.mul(code.plus(first, i), H), single), keys, mask, count, H, scores])
                    code.set(top, records, place, single)
                    code.set(code.call(weigh, [scores, count, top]), records, code.plus(place, 1), single)
                out = code.at(records, code.plus(record(code, first, part, parts, width), WIDTH), single)
                apart = code.mul(parts, code.plus(width, WIDTH))
                whole = code.sub(width, code.urem(width, number(TILE * WIDTH)))
                for wide, low, high in ((TILE, number(0), whole), (1, whole, width)):
                    with code.loop(low, high, wide * WIDTH) as h:
                        code.call(tiles[size, wide], [weights, values, mask, count, h, out, apart])
        since = number(0)
        for size in range(TILE, 0, -1):
            until = code.sub(G, code.urem(code.sub(G, since), number(size)))
            several(since, until, size)
            since = until
    code.ret_void()

    def prepare(code, address, size):
        words = dict(zip(POINTERS, (*map(address, range(6)), address(-1))))
        B, T, N, H = (size(0, i) for i in range(4))
        S = size(4, 2)
        words |= dict(T=T, N=N, H=H, width=size(-1, 3), K=size(1, 2), kept=size(2, 3), page=size(1, 1), W=size(3, 1), S=S)
        newest = code.local(word, start=number(WIDTH))             # one past the last slot that any query sees, or the first few
        with code.loop(number(0), code.mul(B, T), 1) as row:
            again, over = code.append_basic_block(), code.append_basic_block()
            mask, last = code.at(words["see"], code.mul(row, S), byte), code.local(word)
            code.store(S, last)
            code.branch(again)
            code.position_at_end(again)                             # from the end on, until somebody sees or it is known anyway
            at = code.load(last, typ=word)
            more = code.append_basic_block()
            code.cbranch(code.icmp_signed(">", at, code.load(newest, typ=word)), more, over)
            code.position_at_end(more)
            nobody = unseen(code, mask, code.plus(at, -WIDTH))[1]
            code.store(code.select(nobody, code.plus(at, -WIDTH), at), last)
            with code.if_then(code.not_(nobody)):
                code.store(at, newest)
            code.branch(again)
            code.position_at_end(over)
        parts = code.udiv(code.plus(code.load(newest, typ=word), PART - 1), number(PART))
        words["parts"] = parts
        items = code.mul(code.mul(B, words["K"]), parts)
        room = code.mul(code.mul(code.mul(code.mul(B, T), N), parts), code.plus(words["width"], WIDTH))
        words["records"] = code.call(outside(module, "malloc", pointer, word), [code.mul(room, number(4))])
        bytes = code.mul(code.mul(items, number(PART * BYTES[kind])), code.add(H, words["width"]))
        return words, items, code.least(code.plus(items, -1), code.udiv(bytes, number(WAKE)))

    put_together = together(module, record)

    def finish(code, job):
        """Every query's parts put together"""
        *_, sinks, out, records = pointers(code, job)
        T, N, _, width, K, *_, parts = sizes(code, job)
        B = code.udiv(code.udiv(code.get(job, team.places["items"]), parts), K)
        with code.loop(number(0), code.mul(code.mul(B, T), N), 1) as query:
            sink = code.get(sinks, code.urem(query, N), single)
            code.call(put_together, [records, query, parts, width, sink, code.at(out, code.mul(query, width), single)])
        code.call(outside(module, "free", nothing, pointer), [records])
    team.handler(f"llmjax_queries_{kind}", item, prepare, finish)


def together(module, record):
    """out [width] = one query's parts, each times e^(its largest score - the largest of all), divided by the sum of exponentials, the sink's with it"""
    made, code, (records, query, parts, width, sink, out) = function(module, "together", nothing, pointer, word, word, word, single, pointer)
    top = code.local(single, start=sink)
    here = lambda part: record(code, query, part, parts, width)
    with code.loop(number(0), parts, 1) as part:
        code.store(code.greater(code.get(records, here(part), single), code.load(top, typ=single)), top)
    largest = finite(code, code.load(top, typ=single))
    share = lambda x: code.exponential(code.every(code.fsub(x, largest)))
    norm = code.local(vector, start=share(sink))
    with code.loop(number(0), width, WIDTH) as h:
        code.keep(constant(0.0), out, h)
    with code.loop(number(0), parts, 1) as part:
        place = here(part)
        factor = share(code.get(records, place, single))
        code.store(code.multiply_add(factor, code.every(code.get(records, code.plus(place, 1), single)), code.load(norm, typ=vector)), norm)
        with code.loop(number(0), width, WIDTH) as h:
            code.keep(code.multiply_add(factor, code.numbers(records, code.add(place, code.plus(h, WIDTH))), code.numbers(out, h)), out, h)
    whole = code.load(norm, typ=vector)
    whole = code.select(code.fcmp_ordered("==", whole, constant(0.0)), constant(1.0), whole)
    with code.loop(number(0), width, WIDTH) as h:
        code.keep(code.fdiv(code.numbers(out, h), whole), out, h)
    code.ret_void()
    return made
