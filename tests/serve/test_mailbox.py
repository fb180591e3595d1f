"""What threads tell the coroutines of a loop: all of it, in order, with one waking for all that comes before the loop looks."""
import asyncio
import threading

from llmjax.serve.answers import Mailbox


def test_nothing_is_lost_and_order_is_kept():
    async def main():
        box, queues = Mailbox.of(asyncio.get_running_loop()), [asyncio.Queue() for _ in range(4)]
        assert Mailbox.of(asyncio.get_running_loop()) is box
        threads = [threading.Thread(target=lambda q=q: [box.put(q, i) for i in range(2000)]) for q in queues]
        for t in threads:
            t.start()
        async with asyncio.timeout(30):
            return [[await q.get() for _ in range(2000)] for q in queues]
    assert asyncio.run(main()) == [list(range(2000))] * 4


def test_the_loop_is_woken_once():
    class Loop:
        def __init__(self):
            self.called = []

        def call_soon_threadsafe(self, function):
            self.called.append(function)
    loop, queue = Loop(), asyncio.Queue()
    box = Mailbox(loop)
    for i in range(3):
        box.put(queue, i)
    assert len(loop.called) == 1 and queue.empty()
    loop.called[0]()
    box.put(queue, 3)
    assert len(loop.called) == 2 and [queue.get_nowait() for _ in range(3)] == [0, 1, 2]


def test_a_loop_that_has_ended_is_left_alone():
    async def main():
        return Mailbox.of(asyncio.get_running_loop())
    asyncio.run(main()).put(asyncio.Queue(), "too late")
