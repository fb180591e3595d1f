"""How a call from XLA is worked off by several threads: what every function of this package has around it.

A call becomes a job of so many items, which the calling thread and helpers from XLA's pool take one after the other.

To wake a thread of the pool takes some 50 microseconds, half of them the caller's: as much as a small product. So a helper that has done its part looks out for the next job for a while, at one
place for all functions, `posted`; the caller puts its job there while some helper is `idle`, and asks the pool only for others. Whoever holds a job, the place included, is counted in it, and
the last to let go frees it.
"""
import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from llmjax.core.native.code import Code, function, index, nothing, null, number, outside, pointer, word

PATIENCE = 8000            # looks before an idle helper goes back to the pool: 0.1 ms on a Xeon of 2023
POSTED, IDLE, BOARD = 0, 8, 16                                              # words of the board that all functions share: a job or null; how many helpers look at it; its size
JOB = ("item", "items", "next", "done", "holders", "request", *[""] * 4)     # the words of a job, before those of its function; a request has five
FRAME = dict(extension=1, api=2, context=3, arguments=9, results=14)         # words of XLA_FFI_CallFrame (xla/ffi/api/c_api.h, XLA FFI 0.1 and later)
BUFFER = dict(data=3, sizes=5)                                               # words of XLA_FFI_Buffer
API = dict(destroy=8, schedule=17)                                           # words of XLA_FFI_Api: XLA_FFI_Error_Destroy, XLA_FFI_ThreadPool_Schedule


class Team:
    """Writes into a module what threads do with a job. words: the names of what a job of this function has beyond JOB; board: the address of BOARD words, all 0 at first."""

    def __init__(self, module: Any, words: Sequence[str], threads: int, board: int):
        self.module, self.threads = module, threads
        self.places = {name: i for i, name in enumerate((*JOB, *words)) if name}
        self.posted, self.idle = (ir.Constant(word, board + 8 * place).inttoptr(pointer) for place in (POSTED, IDLE))
        arm = platform.machine().lower() in ("arm64", "aarch64")
        breath = outside(module, "llvm.aarch64.hint", nothing, index) if arm else outside(module, "llvm.x86.sse2.pause", nothing)
        self.breath = breath, [ir.Constant(index, 1)] if arm else []         # the processor's own word for "I am waiting"
        self.item = ir.FunctionType(nothing, [pointer, word]).as_pointer()
        self.work = self.made_work()
        self.leave = self.made_leave()
        self.post = self.made_post()
        self.help = self.made_help()

    def function(self, name):
        return function(self.module, name, nothing, pointer)

    def made_work(self):
        """Take items until none is left."""
        made, code, (job,) = self.function("work")
        item, items = code.get(job, self.places["item"], self.item), code.get(job, self.places["items"])
        again, take, over = (code.append_basic_block() for _ in range(3))
        code.branch(again)
        code.position_at_end(again)
        mine = code.count(code.at(job, self.places["next"]), 1)
        code.cbranch(code.icmp_signed("<", mine, items), take, over)
        code.position_at_end(take)
        code.call(item, [job, mine])
        code.count(code.at(job, self.places["done"]), 1)
        code.branch(again)
        code.position_at_end(over)
        code.ret_void()
        return made

    def made_leave(self):
        """Let go of a job: the last to do so frees it, for a helper may come when all is done."""
        made, code, (job,) = self.function("leave")
        with code.if_then(code.icmp_signed("==", code.count(code.at(job, self.places["holders"]), -1), number(1))):
            code.call(outside(self.module, "free", nothing, pointer), [job])
        code.ret_void()
        return made

    def made_post(self):
        """Put a job where idle helpers look; what stood there is let go, for its caller does without."""
        made, code, (job,) = self.function("post")
        code.count(code.at(job, self.places["holders"]), 1)
        before = code.put(self.posted, job)
        with code.given(before):
            code.call(self.leave, [before])
        code.ret_void()
        return made

    def made_help(self):
        """What a helper does: its part of a job, then of others that come while it looks out for them."""
        made, code, (job,) = self.function("help")
        looks = code.local(word)
        code.call(self.work, [job])
        code.call(self.leave, [job])
        code.count(self.idle, 1)
        code.store(number(0), looks)
        look, found, over = (code.append_basic_block() for _ in range(3))
        code.branch(look)
        code.position_at_end(look)
        code.call(*self.breath)
        seen = code.plus(code.load(looks, typ=word), 1)
        code.store(seen, looks)
        there = code.icmp_unsigned("!=", code.load_atomic(self.posted, "acquire", 8, typ=word), number(0))
        late = code.icmp_signed(">", seen, number(PATIENCE))
        code.cbranch(code.or_(there, late), found, look)
        code.position_at_end(found)                                       # or no longer idle: a job that was posted just now is not left lying
        others = code.plus(code.count(self.idle, -1), -1)
        next = code.put(self.posted, null)
        with code.given(next):
            started = code.load_atomic(code.at(next, self.places["next"]), "monotonic", 8, typ=word)
            more = code.icmp_signed("<", started, code.get(next, self.places["items"]))
            with code.if_then(code.and_(more, code.icmp_signed(">", others, number(0)))):
                code.call(self.post, [next])
            code.call(self.work, [next])
            code.call(self.leave, [next])
            code.store(number(0), looks)
        rest = code.append_basic_block()
        code.cbranch(code.icmp_signed(">", code.load(looks, typ=word), number(PATIENCE)), over, rest)
        code.position_at_end(rest)
        code.count(self.idle, 1)
        code.branch(look)
        code.position_at_end(over)
        code.ret_void()
        return made

    def handler(self, name: str, item: Any, prepare: Callable[[Code, Callable, Callable], tuple[dict[str, Any], Any, Any]], finish: Callable[[Code, Any], None] = lambda code, job: None):
        """The function `name`, which XLA calls: make the job, ask for helpers, work along, wait for the items that they took, `finish`.

        prepare(code, address, size) -> (the job's own words, how many items, how many helpers are worth their waking); address(i), size(i, axis): of the i-th operand, the last is the
        result. item: a function (job, its number).
        """
        _, code, (frame,) = function(self.module, name, pointer, pointer, local=False)
        extension = code.get(frame, FRAME["extension"], pointer)
        with code.given(extension):                                       # XLA asks, once, which version of its interface this is written for
            code.store(number(1 << 32), code.at(code.get(extension, 3, pointer), 3))       # two numbers of 32 bits: 0 and 1, little end first
            code.ret(null)
        arguments, results, api, context = (code.get(frame, FRAME[n], pointer) for n in ("arguments", "results", "api", "context"))
        buffer = lambda i: code.get(results, 0, pointer) if i < 0 else code.get(arguments, i, pointer)
        words, items, helpers = prepare(code, lambda i: code.get(buffer(i), BUFFER["data"], pointer), lambda i, axis: code.get(code.get(buffer(i), BUFFER["sizes"], pointer), axis))
        job = code.call(outside(self.module, "malloc", pointer, word), [number(8 * (1 + max(self.places.values())))])
        for key, value in dict(item=item, items=items, next=number(0), done=number(0), holders=number(1), **words).items():
            code.store(value, code.at(job, self.places[key]))
        request = code.at(job, self.places["request"])

        def ask(what, result, *values):
            """One of XLA's own functions, with a structure of its size, no extension, and `values`"""
            for i, value in enumerate((number(8 * (2 + len(values))), null, *values)):
                code.store(value, code.at(request, i))
            return code.call(code.get(api, API[what], ir.FunctionType(result, [pointer]).as_pointer()), [request])
        helpers = code.least(helpers, number(self.threads - 1))
        idle = code.load_atomic(self.idle, "monotonic", 8, typ=word)
        with code.if_then(code.and_(code.icmp_signed(">", idle, number(0)), code.icmp_signed(">", items, number(1)))):
            code.call(self.post, [job])
        with code.loop(idle, helpers, 1):
            code.count(code.at(job, self.places["holders"]), 1)
            failed = ask("schedule", pointer, context, self.help, job)
            with code.given(failed):                                      # no threads to be had: this one does it all
                ask("destroy", nothing, failed)
                code.call(self.leave, [job])
        code.call(self.work, [job])
        again, wait, over = (code.append_basic_block() for _ in range(3))
        code.branch(again)
        code.position_at_end(again)
        done = code.load_atomic(code.at(job, self.places["done"]), "acquire", 8, typ=word)
        code.cbranch(code.icmp_signed("<", done, items), wait, over)
        code.position_at_end(wait)
        code.call(outside(self.module, "sched_yield", index), [])
        code.branch(again)
        code.position_at_end(over)
        taken = code.extract_value(code.cmpxchg(self.posted, code.ptrtoint(job, word), number(0), "seq_cst"), 1)
        with code.if_then(taken):                                         # still posted: nobody came
            code.call(self.leave, [job])
        finish(code, job)
        code.call(self.leave, [job])
        code.ret(null)
