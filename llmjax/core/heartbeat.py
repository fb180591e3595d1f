"""Signs of life between the processes of a run. A process that ends, or falls silent, or stands still in a step, ends the others with one line that names it: none is left
waiting for it in a collective.

All goes through the key-value store of jax's coordination service, which process 0 holds: everyone counts up a number of its own there; process 0 looks at all of them, the others
at that of process 0 and at what it says of the rest. Times are taken with one's own clock alone.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from llmjax.core.run_config import Distributed

LOST = re.compile(r"gloo|nccl|connection|socket|unavailable|peer|deadline|barrier|coordination|heartbeat", re.IGNORECASE)      # how the loss of another process reads in errors of jax


class Pulse:
    """One process's beat and its watch over the others.

    client: jax's, of the coordination service. hosts: "host, pid" of each process. room: a prefix for keys, new for each run in a process.
    """

    def __init__(self, client: Any, index: int, hosts: list[str], coordinator: str, timeouts: Distributed, room: str):
        self.client, self.index, self.hosts, self.coordinator, self.timeouts, self.room = client, index, hosts, coordinator, timeouts, room
        self.interval = min(5.0, timeouts.heartbeat_timeout / 10)
        self.patience = timeouts.heartbeat_timeout - 2 * self.interval     # a beat is seen an interval late, and so is the news of it
        self.step: int | None = None               # the step this process is in; None: in something else, which may take long
        self.answered = time.monotonic()           # when the service last answered
        self.looked = self.answered                # when the others were last looked at
        self.over = threading.Event()
        self.seen: dict[int, tuple[str, float]] = {}       # of each process: its last beat, and when it changed
        self.moved = (frozenset[tuple[int, str]](), time.monotonic())      # the steps all were in, and when one of them changed
        self.threads = [threading.Thread(target=work, name=f"llmjax {work.__name__}", daemon=True) for work in ((self.beat, self.judge) if index else (self.beat,))]

    def start(self) -> None:
        on_abort(self.aborted)
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(2 * self.interval)

    def name(self, index: int) -> str:
        return f"process {index} ({self.hosts[index]})"

    def beat(self) -> None:
        """A thread: tells that this process lives, and hears of the others."""
        count = 0
        while not self.over.wait(self.interval):
            count += 1
            try:
                self.client.key_value_set(f"{self.room}/beat/{self.index}", f"{count} {'' if self.step is None else self.step}", allow_overwrite=True)
                wrong = self.look()
                self.answered = time.monotonic()
            except Exception:                      # the service does not answer: `judge` knows for how long
                continue
            if wrong is not None and not self.over.is_set():
                self.leave(wrong)

    def judge(self) -> None:
        """A thread: ends this process where the service, which process 0 holds, no longer answers at all."""
        before = time.monotonic()
        while not self.over.wait(self.interval):
            now = time.monotonic()
            self.answered, before = self.answered + max(0.0, now - before - 2 * self.interval), now        # as in `look`
            if now - self.answered > self.patience and not self.over.is_set():
                end(self.lost())

    def look(self) -> str | None:
        """What is wrong with the others, if anything."""
        told = self.get("fallen")
        if told is not None:
            return told
        now = time.monotonic()
        late = max(0.0, now - self.looked - 2 * self.interval)     # this thread had to wait for its turn: nobody else's silence
        self.seen, self.looked = {i: (beat, changed + late) for i, (beat, changed) in self.seen.items()}, now
        beats = self.beats() if self.index == 0 else {0: self.get("beat/0") or ""}
        for i, beat in beats.items():
            if i not in self.seen or self.seen[i][0] != beat:
                self.seen[i] = beat, now
        silent = [i for i, (_, changed) in self.seen.items() if i != self.index and now - changed > self.patience]
        if silent:
            more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
            return self.publish(f"{self.name(silent[0])}{more} gives no sign of life (distributed.heartbeat_timeout is {self.timeouts.heartbeat_timeout:g} s); the run stops")
        return self.publish(still) if self.index == 0 and (still := self.standing(beats, now)) else None

    def standing(self, beats: dict[int, str], now: float) -> str | None:
        """Who holds up a step: where nobody moved for too long, the one that is furthest behind."""
        steps = {i: beat.partition(" ")[2] for i, beat in beats.items()}
        if frozenset(steps.items()) != self.moved[0] or not all(steps.values()):
            self.moved = frozenset(steps.items()), now
        limit = self.timeouts.step_timeout
        if limit is None or now - self.moved[1] <= limit:
            return None
        last = min(map(int, steps.values()))
        behind = [i for i, step in steps.items() if int(step) == last]
        if len(behind) == len(steps):
            return f"no process has come out of step {last} for {limit:g} s (distributed.step_timeout); the run stops"
        more = f" (and {len(behind) - 1} more)" if len(behind) > 1 else ""
        return f"{self.name(behind[0])}{more} has not come out of step {last} for {limit:g} s (distributed.step_timeout), the others are further; the run stops"

    def beats(self) -> dict[int, str]:
        found = {int(key.rpartition("/")[2]): value for key, value in self.client.key_value_dir_get(f"{self.room}/beat/")}
        return {i: found.get(i, "") for i in range(len(self.hosts))}

    def get(self, key: str) -> str | None:
        try:
            return self.client.key_value_try_get(f"{self.room}/{key}")
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def publish(self, wrong: str) -> str:
        """Tells all processes why the run stops; the first word counts. -> what was told first."""
        with contextlib.suppress(Exception):       # another was first
            self.client.key_value_set(f"{self.room}/fallen", wrong)
        return self.get("fallen") or wrong

    def fell(self, error: BaseException) -> None:
        """This process has failed: tells the others. Where the failure reads like the loss of another process, waits until that is known, which ends this process."""
        text = " ".join(str(error).split())[:300] or type(error).__name__
        others = LOST.search(text) and not isinstance(error, OSError) and not type(error).__module__.startswith("llmjax")
        if others and self.over.wait(self.timeouts.heartbeat_timeout + 4 * self.interval):
            threading.Event().wait(60)             # it is known, and this process is being ended
        self.over.set()
        with contextlib.suppress(Exception):
            self.publish(f"{self.name(self.index)} failed: {text}")
        self.linger()

    def linger(self) -> None:
        """Process 0 stays until the others had time to read why: its end is the end of the store."""
        if self.index:
            with contextlib.suppress(Exception):
                self.client.key_value_set(f"{self.room}/left/{self.index}", "", allow_overwrite=True)
            return
        now = time.monotonic()
        there = sum(now - changed <= self.patience / 2 for i, (_, changed) in self.seen.items() if i) if self.seen else len(self.hosts) - 1
        while time.monotonic() < now + 3 * self.interval + 1:
            with contextlib.suppress(Exception):
                if len(self.client.key_value_dir_get(f"{self.room}/left/")) >= there:
                    return
            time.sleep(0.05)

    def leave(self, wrong: str) -> None:
        """Ends this process at once, whatever its main thread waits for."""
        self.over.set()
        self.linger()
        end(wrong)

    def aborted(self) -> bool:
        """Asked when jax's own client is about to abort the process, as it does when the service goes away. -> whether that was it."""
        if self.over.is_set() or (answers(self.coordinator) and time.monotonic() - self.answered < self.patience / 2):
            return False
        end(self.lost())
        return True

    def lost(self) -> str:
        return f"{self.name(0)} gives no sign of life (distributed.heartbeat_timeout is {self.timeouts.heartbeat_timeout:g} s); this process stops"


def end(wrong: str) -> None:
    """One line on stderr and status 2, without the exit handlers, which would wait for the other processes."""
    sys.stdout.flush()
    os.write(2, f"llmjax: {wrong}\n".encode())
    os._exit(2)


def answers(address: str) -> bool:
    """Whether anything listens there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except OSError:
        return False


KEPT: list[Any] = []                   # C calls the handler: it must stay where it is


def on_abort(asked: Callable[[], bool]) -> None:
    """Calls `asked` where the process is about to be aborted (SIGABRT), from whichever thread; the abort goes on where it returns. A handler of Python's own `signal` would
    never run: it waits for the main thread, and abort() does not."""
    def handler(_: int) -> None:
        asked()
        libc.signal(signal.SIGABRT, None)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    function = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    KEPT[:] = [function]
    libc.signal(signal.SIGABRT, ctypes.cast(function, ctypes.c_void_p))
