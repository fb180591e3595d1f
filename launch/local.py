"""Starts a command in several processes on this host, as one run.

    python launch/local.py -n 4 -- llmjax train --config=configs/quickstart.py:size=tiny --config.layout.fsdp=4
    python launch/local.py -n 2 --dry-run -- llmjax train …            says what it would start

Each process is told its place by LLMJAX_COORDINATOR, LLMJAX_NUM_PROCESSES and LLMJAX_PROCESS_ID; the rest of the environment, visible devices among it, is what it was
(`--gpus-per-process=1` gives each process GPUs of its own). Lines of output begin with the process's number. Ctrl-C and SIGTERM are passed on. The first process that fails ends the
others, after `--grace` seconds in which they may say what they saw, and its status is the launcher's (128 + the signal where a signal ended it).
"""
from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def places(count: int, port: int, gpus: int | None) -> list[dict[str, str]]:
    """What is added to the environment of each process."""
    common = {"LLMJAX_COORDINATOR": f"127.0.0.1:{port}", "LLMJAX_NUM_PROCESSES": str(count)}
    own = [{} if gpus is None else {"LLMJAX_LOCAL_DEVICES": ",".join(str(i * gpus + j) for j in range(gpus))} for i in range(count)]
    return [{**common, "LLMJAX_PROCESS_ID": str(i), **own[i]} for i in range(count)]


def show(number: int, pipe) -> None:
    """Passes a process's lines on, its number before each."""
    for line in pipe:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """-> the status of the first process that failed, or 0."""
    first, deadline = 0, None
    while None in [p.poll() for p in processes]:
        failed = next((i for i, p in enumerate(processes) if p.returncode), None)
        if failed is not None and deadline is None:
            first, deadline = processes[failed].returncode, time.monotonic() + grace
            how = f"signal {signal.Signals(-first).name}" if first < 0 else f"status {first}"
            print(f"launch: process {failed} (pid {processes[failed].pid}) ended with {how}", file=sys.stderr, flush=True)
        if deadline is not None and time.monotonic() > deadline:
            left = [i for i, p in enumerate(processes) if p.poll() is None]
            print(f"launch: stopping process{'es' if len(left) > 1 else ''} {', '.join(map(str, left))}", file=sys.stderr, flush=True)
            for i in left:
                processes[i].kill()
            deadline = float("inf")
        time.sleep(0.05)
    first = first or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - first if first < 0 else first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many processes")
    parser.add_argument("--port", type=int, help="where process 0 listens (a free one)")
    parser.add_argument("--gpus-per-process", type=int, help="process i takes this many GPUs, from i times as many on (all it sees)")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that the others have after one failed (10)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be started")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.processes < 1 or not command:
        parser.error("-n 1 or more and a command after -- are wanted")
    added = places(args.processes, args.port or (29500 if args.dry_run else free_port()), args.gpus_per_process)
    if args.dry_run:
        for more in added:
            print(" ".join(f"{k}={v}" for k, v in more.items()), shlex.join(command))
        return 0
    processes = [subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
                 for more in added]

    def pass_on(number: int, _frame) -> None:
        for p in processes:
            if p.poll() is None:
                p.send_signal(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    readers = [threading.Thread(target=show, args=(i, p.stdout), daemon=True) for i, p in enumerate(processes)]
    for reader in readers:
        reader.start()
    status = wait(processes, args.grace)
    for reader in readers:
        reader.join(5)
    return status


if __name__ == "__main__":
    sys.exit(main())
