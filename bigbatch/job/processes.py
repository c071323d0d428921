"""The processes of a job: how they find one another, let the first decide, and end."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from bigbatch.job import statuses
from bigbatch.job.jax_private import job_state, running_in_cloud_tpu_vm
from bigbatch.mistake import Mistake

# Another process may be slower to start: to read and check a checkpoint, say.
DECISION_SECONDS = 600
LAST_SECONDS = 3
# In the texts of what JAX raises when a process it needs is gone: gRPC's codes, gloo's words.
LOST_PEER = r"UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|gloo|connection|heartbeat"
# How long the first process waits for the others at the end, and then for their exits.
END_SECONDS = 30
AFTER_YOU_SECONDS = 1
# The firewall rule that Google makes for a TPU pod opens 8476 between its hosts, and not the 8482
# that JAX takes since 0.8.1 (https://github.com/jax-ml/jax/issues/35905).
TPU_COORDINATOR_PORT = 8476

_decisions = itertools.count()


def join(coordinator: str, processes: int, process: int, dead_peer_seconds: int) -> None:
    """Makes this process one of the job's; to be called once, before anything touches JAX.

    Args:
        coordinator: host:port of the first process; "" where the platform knows (Cloud TPU, where
            the port is then 8476 unless JAX_COORDINATOR_PORT says another), and for a job of one
            process.
        processes: how many there are; 0 where the platform knows.
        process: which one this is, from 0; -1 where the platform knows.
        dead_peer_seconds: how long a process may be silent before the others end.

    Raises:
        Mistake: if only some of the three are given, or they do not fit together, or the
            coordinator has no port.
    """
    _leave_on_sigterm()
    # JAX's own handling would swallow a SIGTERM that arrives before training listens, and it agrees
    # on a step, where a stop inside an evaluation has to be agreed on too.
    jax.config.update("jax_enable_preemption_service", False)
    given = (bool(coordinator), processes > 0, process >= 0)
    options = {"heartbeat_timeout_seconds": dead_peer_seconds}
    if dead_peer_seconds < 1:
        raise Mistake(f"--dead_peer_seconds is {dead_peer_seconds}; it must be 1 or more.")
    if any(given):
        if not all(given) or process >= processes or not re.search(r".:\d+$", coordinator):
            raise Mistake(
                f"--coordinator={coordinator!r}, --processes={processes} and --process={process}: "
                "all three are needed, on every host the same coordinator (the first process's "
                "host:port) and number, and a process from 0 to below the number."
            )
        jax.distributed.initialize(coordinator, processes, process, **options)
        return
    if running_in_cloud_tpu_vm:
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(TPU_COORDINATOR_PORT))
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        # No platform that knows: a job of one.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        jax.distributed.initialize(
            address, 1, 0, coordinator_bind_address=address, **options
        )


def _leave_on_sigterm() -> None:
    """Until training listens for itself there is nothing to save.

    A thread reads of the signal from a socket, since a Python handler would not run while JAX waits
    for other processes. `preemption.Watch` takes the signal over.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno())

    def follow() -> None:
        with writer:  # kept open
            while reader.recv(1)[0] != signal.SIGTERM:
                pass
        os._exit(statuses.AGAIN)

    threading.Thread(target=follow, name="sigterm", daemon=True).start()


def decided_by_first(what: str, decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the first process, on all of them.

    Args:
        what: names the decision. All processes ask for the same ones in the same order.
        decide: called on the first process only; returns what JSON can hold.

    Raises:
        Mistake: on every process, if `decide` raises one, or if the processes have no way to
            tell one another.
    """
    if jax.process_count() == 1:
        return decide()
    client = job_state.client
    if client is None:
        raise Mistake(
            f"JAX sees {jax.process_count()} processes, but they were never joined, so they cannot "
            "agree on where the run stands: start them with python -m bigbatch.main, or call "
            "jax.distributed.initialize() in each, before anything else that touches JAX."
        )
    key = f"bigbatch/{what}/{next(_decisions)}"
    if jax.process_index() == 0:
        try:
            decision = decide()
        except Mistake as error:
            client.key_value_set(key, json.dumps({"refused": str(error)}))
            raise
        client.key_value_set(key, json.dumps({"decision": decision}))
        return decision
    told = json.loads(client.blocking_key_value_get(key, 1000 * DECISION_SECONDS))
    if "refused" in told:
        raise Mistake(told["refused"])
    return told["decision"]


def explain(error: jax.errors.JaxRuntimeError) -> tuple[int, str]:
    """(exit status, one line) on what JAX's runtime could not do, with what to change if known.

    The status is 42 where only another process or the way to it was lost: started again, the same
    command goes on.
    """
    text = str(error).strip().partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in text:
        return statuses.FAILED, (
            f"out of device memory: {text}. A lower --config.max_per_device_batch needs less."
        )
    if jax.process_count() > 1 and re.search(LOST_PEER, text, re.IGNORECASE):
        return statuses.AGAIN, (
            f"another process of the job has ended or is out of reach ({text}). Start all of them "
            "again; the run goes on from its newest checkpoint."
        )
    return statuses.FAILED, text


def leave(status: int, text: str = "", together: bool = False) -> None:
    """Ends the process at once, without waiting for programs still being compiled.

    Args:
        status: for the system.
        text: printed as one line first.
        together: wait for the other processes to come to the same point, so that the first, which
            holds the job together, does not go before them.
    """
    if text:
        print(f"bigbatch: {' '.join(text.split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if together and job_state.num_processes > 1:
        _end_together(job_state.client, job_state.process_id, job_state.num_processes)
    elif job_state.process_id == 0 and job_state.num_processes > 1:
        # The job's connections go with this process, and JAX then aborts the others: first let them
        # hear of the same mistake, and end with a word of their own.
        time.sleep(LAST_SECONDS)
    os._exit(status)


def _end_together(client: Any, process: int, processes: int) -> None:
    """Returns once all have come here; on the first, when the others have gone or are overdue.

    Not JAX's own shutdown, in which a process that dies now would take the others' status with it.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # of one that died after its last save
        if process:
            client.blocking_key_value_get("bigbatch/end/0", 1000 * DECISION_SECONDS)
            client.key_value_set(f"bigbatch/end/{process}", "")
            return
        client.key_value_set("bigbatch/end/0", "")
        until = time.monotonic() + END_SECONDS
        for other in range(1, processes):
            milliseconds = max(1, int(1000 * (until - time.monotonic())))
            client.blocking_key_value_get(f"bigbatch/end/{other}", milliseconds)
        time.sleep(AFTER_YOU_SECONDS)
