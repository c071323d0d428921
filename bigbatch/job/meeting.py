"""What a process says while it waits for the other processes of its job, and how long it waits.

JAX itself waits for five minutes without a word and then aborts the process. Who is there can only
be seen from outside of JAX: the first process looks at the connections to its port, the others
whether anybody listens there.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bigbatch.job import statuses
from bigbatch.job.jax_private import job_state
from bigbatch.job.output import say

SAID_AFTER = (5, 30, 60, 120)  # seconds; then every 5 minutes
LAST_LOOK = 3  # seconds before the end
ESTABLISHED = "01"  # in /proc/net/tcp


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Says who is waited for while the block, which joins a job, lasts; ends it after `seconds`.

    The process ends then with status 42, since the same command on all hosts may well find them.
    """
    over = threading.Event()
    threading.Thread(target=_watch, args=(over, seconds), name="meeting", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(over: threading.Event, seconds: int) -> None:
    began = time.monotonic()
    to_say, missing = list(SAID_AFTER), ""
    while not over.wait(0.5):
        waited = time.monotonic() - began
        # Before the others, which began to wait at the same time, give up and are not there either.
        if waited >= seconds - LAST_LOOK and not missing:
            missing = _missing()
        if waited >= seconds:
            say(f"bigbatch: gave up after {seconds} s: {missing}. Start all processes of the "
                "job within this time (--join_seconds), with the same --coordinator and "
                "--processes.")
            os._exit(statuses.AGAIN)
        if waited >= to_say[0]:
            to_say = to_say[1:] or [to_say[0] + 300]
            say(f"bigbatch: waiting, for {seconds - waited:.0f} s more: {_missing()}")


def _missing() -> str:
    """Who is not there, as far as this process can see."""
    address, processes = job_state.coordinator_address, job_state.num_processes
    if job_state.client is None or address is None:
        return "JAX is still finding out which processes the job has"
    if job_state.process_id:
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), 2).close()
            return (f"the first process of the job, at {address}, is there, but not all "
                    f"{processes} processes are; it says how many have come")
        return (f"the first process of the job (--process=0) is not there: nothing listens at "
                f"{address}")
    others = peers(int(address.rpartition(":")[2]))
    if others is None:
        return f"not all of the {processes - 1} other processes of the job have come"
    came = f" (from {', '.join(sorted(set(others)))})" if others else ""
    return (f"{len(others)} of the {processes - 1} other processes of the job have come to "
            f"{address}{came}")


def peers(port: int) -> list[str] | None:
    """The addresses of all connections to a port of this machine but the first process's own.

    None where the system does not tell.
    """
    ends = set()  # of each connection, as (address, port) here and there
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, remote, state = line.split()[1:4]
            if state == ESTABLISHED:
                ends.add((_end(local), _end(remote)))
    here = sorted(there for own, there in ends if own[1] == port)
    own = [there for address, there in ends if there in here and (there, address) in ends]
    if not own:
        return None
    here.remove(own[0])  # one of those from this machine, it does not matter which
    return [address for address, _ in here]


def _end(text: str) -> tuple[str, int]:
    """Address and port as /proc/net has them: words of 4 bytes, each in this machine's order."""
    words, _, port = text.rpartition(":")
    packed = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder)
                      for at in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)
