"""The processes of a job: how they connect, adopt a decision of the first one, and end."""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from bigbatch.job import meeting, statuses
from bigbatch.job.jax_private import job_state, running_in_cloud_tpu_vm
from bigbatch.job.output import say, unbreakable
from bigbatch.mistake import Mistake

# How long to wait for the first process, which may have large checkpoints to check.
DECISION_SECONDS = 600
LAST_SECONDS = 3
# JAX's error texts contain one of these when a process is lost: gRPC's codes and gloo's messages.
LOST_PEER = r"UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|gloo|connection|heartbeat"
# How long the first process waits at the end for the others to arrive, and then for them to exit.
END_SECONDS = 30
A_MONTH_S = 30 * 24 * 3600
AFTER_YOU_SECONDS = 1
# Google's firewall rule for a TPU pod opens port 8476 between its hosts, but not port 8482, the one
# that JAX uses since 0.8.1 (https://github.com/jax-ml/jax/issues/35905).
TPU_COORDINATOR_PORT = 8476

_decisions = itertools.count()


def join(
    coordinator: str, processes: int, process: int, dead_peer_seconds: int, join_seconds: int = 300
) -> None:
    """Connects this process to its job. To be called once, before any other use of JAX.

    Leave the first three at "", 0 and -1 for a job of one process, and where JAX finds the
    processes itself: on Cloud TPU, with port 8476 unless JAX_COORDINATOR_PORT is set.

    Args:
        coordinator: host:port of the first process.
        processes: the number of processes.
        process: the number of this process, from 0.
        dead_peer_seconds: the other processes end when one was silent for so long.
        join_seconds: this process ends, with status 42, when another has not come for so long.

    Raises:
        Mistake: if only some of the first three are given, they contradict each other, or the
            coordinator has no port; or if JAX's own variables describe half a job.
    """
    # JAX's preemption service would swallow a SIGTERM that arrives before training listens. It also
    # stops only between updates, whereas a run has to stop inside an evaluation too.
    jax.config.update("jax_enable_preemption_service", False)
    given = (bool(coordinator), processes > 0, process >= 0)
    for flag, seconds in (("dead_peer", dead_peer_seconds), ("join", join_seconds)):
        if seconds < 1:
            raise Mistake(f"--{flag}_seconds is {seconds}; it must be 1 or more.")
    # JAX aborts the process where its own time is over; `meeting` ends it before.
    options = {"heartbeat_timeout_seconds": dead_peer_seconds,
               "initialization_timeout": join_seconds + 60}
    if any(given):
        if not all(given) or process >= processes or not re.search(r".:\d+$", coordinator):
            raise Mistake(
                f"--coordinator={coordinator!r}, --processes={processes} and --process={process}: "
                "all three are needed, on every host the same coordinator (the first process's "
                "host:port) and number, and a process from 0 to below the number."
            )
        if processes == 1:
            options |= _expect_no_others()
        with meeting.limited(join_seconds):
            jax.distributed.initialize(coordinator, processes, process, **options)
        return
    if running_in_cloud_tpu_vm:
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(TPU_COORDINATOR_PORT))
    try:
        with meeting.limited(join_seconds):
            jax.distributed.initialize(**options)
    except ValueError as error:
        if named := os.environ.get("JAX_COORDINATOR_ADDRESS"):
            raise Mistake(
                f"JAX_COORDINATOR_ADDRESS is {named!r}, but JAX does not find how many processes "
                f"the job has and which one this is ({str(error).rstrip('.')}): give --coordinator,"
                " --processes and --process, or unset the variable for a job of one process."
            ) from None
        if "coordinator_address should be defined" not in str(error):
            raise
        # The platform does not name any processes, so this one is a job of its own.
        options |= _expect_no_others()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        jax.distributed.initialize(
            address, 1, 0, coordinator_bind_address=address, **options
        )


def _expect_no_others() -> dict[str, int]:
    """Leaves out gloo, which reduces between processes on CPU: it looks up the machine's own name,
    which not every container can resolve.

    Returns:
        Options for joining. A process alone is silent to itself while it is paused (Ctrl-Z), and
        may go on after that.
    """
    jax.config.update("jax_cpu_collectives_implementation", None)
    return {"heartbeat_timeout_seconds": A_MONTH_S}


def decided_by_first(what: str, decide: Callable[[], Any]) -> Any:
    """Returns on every process what `decide` returns on the first one.

    Args:
        what: a name for the decision. All processes must make the same calls in the same order.
        decide: called on the first process only; its result must be valid JSON.

    Raises:
        Mistake: on every process, if `decide` raises one, or if the processes were not joined.
    """
    if jax.process_count() == 1:
        return decide()
    client = job_state.client
    if client is None:
        raise Mistake(
            f"JAX sees {jax.process_count()} processes, but they were never joined, so they cannot "
            "agree on the position of the run: start them with python -m bigbatch.main, or call "
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
    answer = json.loads(client.blocking_key_value_get(key, 1000 * DECISION_SECONDS))
    if "refused" in answer:
        raise Mistake(answer["refused"])
    return answer["decision"]


def gathered(what: str, give: Callable[[], Any]) -> list[Any]:
    """Returns on every process what `give` returns on each one, in the order of the processes.

    Args:
        what: a name for it. All processes must make the same calls in the same order.
        give: its result must be valid JSON.

    Raises:
        Mistake: on every process, if `give` raises one on any.
    """
    if jax.process_count() == 1:
        return [give()]
    client, key = job_state.client, f"bigbatch/{what}/{next(_decisions)}"
    try:
        mine = {"given": give()}
    except Mistake as error:
        mine = {"refused": str(error)}
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(mine))
    answers = [
        json.loads(client.blocking_key_value_get(f"{key}/{process}", 1000 * DECISION_SECONDS))
        for process in range(jax.process_count())
    ]
    for answer in answers:
        if "refused" in answer:
            raise Mistake(answer["refused"])
    return [answer["given"] for answer in answers]


def explain(error: jax.errors.JaxRuntimeError) -> tuple[int, str]:
    """The exit status for an error of JAX's runtime, and one line that says what to change.

    The status is 42 if another process or the connection to it was lost: the same command,
    started again on all hosts, continues the run.
    """
    text = str(error).strip().partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in text:
        return statuses.FAILED, (
            f"out of device memory: {text}. A lower --config.max_per_device_batch needs less."
        )
    if jax.process_count() > 1 and re.search(LOST_PEER, text, re.IGNORECASE):
        return statuses.AGAIN, (
            f"another process of the job has ended or is out of reach ({text}). Start all of them "
            "again; the run continues from its newest checkpoint."
        )
    return statuses.FAILED, text


def leave(status: int, text: str = "", together: bool = False) -> None:
    """Ends the process at once, without waiting for programs that are still being compiled.

    Args:
        status: the exit status.
        text: printed as one line first; "" for nothing.
        together: whether to wait for the other processes to end too. When the first process ends,
            the connections of the job end, and JAX aborts all processes that are left.
    """
    if text:
        say(f"bigbatch: {' '.join(text.split())}")
    for stream in (sys.stdout, sys.stderr):  # that they break is no reason to end otherwise
        unbreakable(stream).flush()
    if together and job_state.num_processes > 1:
        _end_together(job_state.client, job_state.process_id, job_state.num_processes)
    elif job_state.process_id == 0 and job_state.num_processes > 1:
        # The connections of the job end with this process, and JAX then aborts the others. First
        # they get time to receive the same Mistake and to end with their own message.
        time.sleep(LAST_SECONDS)
    os._exit(status)


def _end_together(client: Any, process: int, processes: int) -> None:
    """Lets the first process end last: the others wait for it to call this, and then it for them.

    The first process waits at most `END_SECONDS`. JAX's own shutdown is not used, because there a
    process that dies now would change the exit status of the others.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one died after its last save
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
