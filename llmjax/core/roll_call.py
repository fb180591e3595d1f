"""Who is there, asked over plain sockets before jax starts its own service on the same port: jax aborts the process where one is missing and cannot say which."""
from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from llmjax.core.cluster import Place
from llmjax.core.errors import ConfigError


def whoami() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def roll_call(place: Place, timeout: float) -> list[str]:
    """Waits until all processes have come. -> "host, pid" of each, by number; the same list on all of them.

    Raises ConfigError (one line) where process 0 does not answer or does not hear from all within `timeout` seconds (naming those who are missing), and where two have one number or
    they were told of different counts.
    """
    assert place.coordinator is not None and place.index is not None
    deadline = time.monotonic() + timeout
    host, _, port = place.coordinator.rpartition(":")
    return gather(place, int(port), deadline, timeout) if place.index == 0 else report(place, host.strip("[]"), int(port), deadline, timeout)


def gather(place: Place, port: int, deadline: float, timeout: float) -> list[str]:
    """Process 0: hears all the others and answers them all at once."""
    assert place.count is not None
    hosts, lines = {0: whoami()}, []
    with contextlib.ExitStack() as stack:
        try:
            family = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else dict(family=socket.AF_INET)
            listening = stack.enter_context(socket.create_server(("", port), backlog=place.count, **family))      # type: ignore[arg-type]
        except OSError as error:
            raise ConfigError(f"process 0 cannot listen at port {port} of {socket.gethostname()} ({error.strerror}); another run may hold it: set LLMJAX_COORDINATOR") from error
        wrong = None
        while len(hosts) < place.count and wrong is None:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [i for i in range(place.count) if i not in hosts]
                some = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
                wrong = (f"of {place.count} processes, number{'s' if len(missing) > 1 else ''} {some} did not come to {place.coordinator} within {timeout:g} s; "
                         "were they started, and can they reach it? distributed.start_timeout is how long to wait")
                break
            listening.settimeout(left)
            try:
                connection = stack.enter_context(listening.accept()[0])
            except OSError:
                continue
            said = hear(connection, min(10.0, left))
            if said is None or not isinstance(said.get("index"), int):        # a port scanner
                continue
            if said.get("count") != place.count:
                wrong = f"process {said['index']} ({said.get('host')}) was told of {said.get('count')} processes, process 0 ({hosts[0]}) of {place.count}"
            elif not 0 <= said["index"] < place.count or hosts.get(said["index"], said.get("host")) != said.get("host"):
                wrong = f"two processes have the number {said['index']}: {hosts.get(said['index'])} and {said.get('host')}; LLMJAX_PROCESS_ID must differ"
            else:
                hosts[said["index"]] = str(said.get("host"))
            lines.append(connection)
        answer = [hosts[i] for i in range(place.count)] if wrong is None else []
        for connection in lines:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(dict(wrong=wrong, hosts=answer)).encode() + b"\n")
    if wrong is not None:
        raise ConfigError(wrong)
    return answer


def report(place: Place, host: str, port: int, deadline: float, timeout: float) -> list[str]:
    """Any other process: tells process 0 that it is there, and waits for the answer."""
    me = json.dumps(dict(index=place.index, count=place.count, host=whoami())).encode() + b"\n"
    reason = "nothing listens there"
    for _ in pauses(deadline):
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(10.0, deadline - time.monotonic()))) as connection:
                connection.sendall(me)
                said = hear(connection, max(1.0, deadline - time.monotonic()) + 5)      # process 0 waits until its own deadline before it says who is missing
        except OSError as error:
            reason = f"{error.strerror or error}"
            continue
        if said is None or "hosts" not in said:
            reason = "it gives no answer; another program may listen there"
            continue
        if said.get("wrong"):
            raise ConfigError(said["wrong"])
        return list(said["hosts"])
    raise ConfigError(f"process 0 does not answer at {place.coordinator} ({reason}) within {timeout:g} s; was it started, and is LLMJAX_COORDINATOR right? "
                      "distributed.start_timeout is how long to wait")


def pauses(deadline: float) -> Iterator[None]:
    """Turns until the deadline, at least one, each a little later than the one before."""
    pause = 0.1
    while True:
        yield
        if time.monotonic() + pause >= deadline:
            return
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)


def hear(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One line of JSON, or None where none comes."""
    connection.settimeout(seconds)
    try:
        said = json.loads(connection.makefile("rb").readline())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
