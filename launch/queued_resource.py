"""A Cloud TPU slice as a queued resource: made, waited for, deleted."""

import argparse
import json
import time

import accelerators
import commands

# States from which no slice comes back; "" where there is none.
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING", "")


def command(action: str, options: argparse.Namespace, *flags: str) -> list[str]:
    """gcloud's command for the queued resource."""
    return ["gcloud", "compute", "tpus", "queued-resources", action, options.name, *flags,
            *where(options)]


def where(options: argparse.Namespace) -> list[str]:
    """gcloud's flags for the place; and it shall not ask questions."""
    project = [f"--project={options.project}"] * bool(options.project)
    return [f"--zone={options.zone}", *project, "--quiet"]


def state(options: argparse.Namespace, assumed: str = "ACTIVE") -> str:
    """The queued resource's state; "" where there is none of that name."""
    describe = command("describe", options, "--format=value(state.state)")
    try:
        return commands.run(describe, options, assumed=assumed, attempts=5, final="NOT_FOUND",
                            show=False).strip()
    except commands.Failed as error:
        if "NOT_FOUND" in error.stderr:
            return ""
        raise


def create(options: argparse.Namespace) -> bool:
    """Makes the slice and waits for it. Returns whether it is this invocation's own.

    Raises:
        ValueError: if there is one of that name, without --reuse.
        commands.Failed: if it could not be made; what there was of it is deleted then.
    """
    found = state(options, assumed="ACTIVE" if options.reuse else "")
    if not found:
        request(options)
        return True
    if not options.reuse:
        raise ValueError(
            f"{options.name} exists already and is {found}: --reuse takes it as it is, the action "
            "`delete` deletes it, another name makes another one."
        )
    if found in GONE:
        raise ValueError(f"{options.name} is {found} and will not come up: `delete` it first.")
    wait(options)
    return False


def request(options: argparse.Namespace) -> None:
    """Makes a slice of a name that is free, and waits for it; deletes it if it does not come up."""
    kind = accelerators.parse(options.accelerator_type)
    flags = [
        f"--node-id={options.name}", f"--accelerator-type={kind.name}",
        f"--runtime-version={options.runtime_version or kind.tpu.runtime_version}",
        # Past the limit Google gives the request up too, should nobody be there to delete it.
        f"--valid-until-duration={60 * options.wait_minutes}s",
    ] + ["--spot"] * options.spot
    if options.data_disk:
        flags.append(f"--data-disk=source={options.data_disk},mode=read-only")
    try:
        # Once: after an error there may be a request or none.
        commands.run(command("create", options, *flags), options)
        wait(options)
    except commands.Failed as error:
        # Someone else may have made one of that name meanwhile.
        if error.status != 127 and "ALREADY_EXISTS" not in error.stderr and state(options):
            delete(options)
        raise


def wait(options: argparse.Namespace) -> None:
    """Waits until the slice is there.

    Raises:
        commands.Failed: if it will not be, or not before --wait-minutes.
    """
    until = time.monotonic() + 60 * options.wait_minutes
    before = None
    while (now := state(options)) != "ACTIVE":
        if now != before:
            print(f"launch: {options.name} is {now or 'not there'}", flush=True)
        before = now
        if now in GONE or time.monotonic() > until:
            reason = f"{options.name} is {now or 'gone'}"
            if now not in GONE:
                reason += f" after {options.wait_minutes} minutes"
            raise commands.Failed(
                commands.line(command("describe", options)), 1, f"{reason}, not ACTIVE")
        time.sleep(options.poll_seconds)


def delete(options: argparse.Namespace) -> None:
    """Deletes the slice and its request; content where there is none."""
    try:
        # One that is being suspended can be deleted only when it is.
        commands.run(command("delete", options, "--force"), options, attempts=8, final="NOT_FOUND")
    except commands.Failed as error:
        if "NOT_FOUND" not in error.stderr:
            raise


def count_hosts(options: argparse.Namespace) -> int:
    """How many workers the slice has."""
    describe = ["gcloud", "compute", "tpus", "tpu-vm", "describe", options.name, "--format=json",
               *where(options)]
    described = commands.run(describe, options, attempts=5, show=False,
                             assumed='{"networkEndpoints": [{}]}')
    try:
        return len(json.loads(described)["networkEndpoints"])
    except (ValueError, KeyError):
        raise commands.Failed(commands.line(describe), 0, "it names no networkEndpoints") from None
