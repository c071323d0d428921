"""A job on a TPU slice of a GKE cluster: through xpk, or with kubectl and a JobSet alone.

    python launch/gke.py cluster CLUSTER --zone=ZONE --tpu-type=v5litepod-256 --spot
    python launch/gke.py image IMAGE          # builds the committed tree, and pushes it
    python launch/gke.py create NAME --cluster=CLUSTER --zone=ZONE --tpu-type=v5litepod-256 \\
        --spot --image=IMAGE --env=XDG_CACHE_HOME=/dev/shm -- \\
        --config=configs/imagenet_resnet50.py:thirty_minutes \\
        --config.data.dir=gs://BUCKET/tfds --workdir=gs://BUCKET/run
    python launch/gke.py logs NAME            # of the first host; Ctrl-C ends only the following

Without xpk, on a cluster with the JobSet controller that kubectl talks to:

    python launch/gke.py jobset NAME --tpu-type=v6e-64 --spot --image=IMAGE -- ...   # prints it
    python launch/gke.py apply NAME --tpu-type=v6e-64 --spot --image=IMAGE -- ...

Jobs are listed and deleted with xpk and kubectl themselves (README.md, beside this file, has the
commands).

IMAGE is a name in a registry, for example REGION-docker.pkg.dev/PROJECT/REPOSITORY/bigbatch:1. All
hosts run the one command, and JAX finds the others by what GKE tells each. A pod that ends with 42
is started again with the others, up to --max-restarts times. GKE has no v2: launch/tpu_vm.py has.
With --dry-run the commands are printed, one a line, and none is run.
"""

import argparse
import json
import shlex
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import accelerators
import archive
import commands
import statuses

CHIPS_A_HOST = 4  # on the machine types for slices of several hosts, ct4p to ct6e -4t
PLATFORM = "linux/amd64"  # of the hosts, whatever the laptop is


def xpk(options: argparse.Namespace, *words: str) -> list[str]:
    """xpk's command for the cluster."""
    project = [f"--project={options.project}"] * bool(options.project)
    return ["xpk", *words, f"--cluster={options.cluster}", f"--zone={options.zone}", *project]


def job(arguments: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The one command of all hosts, as Kubernetes takes it."""
    command = [*commands.environment(options), "python", "-u", "-m", "bigbatch.main", *arguments]
    return commands.double_dollars(command)


def on_gke(options: argparse.Namespace) -> accelerators.Slice:
    """The slice asked for. Raises ValueError if GKE has none of that kind."""
    kind = accelerators.parse(options.tpu_type)
    if not kind.tpu.gke_label:
        known = ", ".join(name for name, tpu in accelerators.TPUS.items() if tpu.gke_label)
        raise ValueError(f"{kind.name}: on GKE these scripts know {known}; "
                         "for v2 and v3 use launch/tpu_vm.py.")
    return kind


def create_cluster(options: argparse.Namespace) -> None:
    """Makes a cluster with a node pool of one slice."""
    kind = on_gke(options)
    options.cluster = options.name
    commands.run(
        xpk(options, "cluster", "create") + [f"--tpu-type={kind.name}", "--num-slices=1"]
        + ["--spot" if options.spot else "--on-demand"],
        options, capture=False,
    )


def build_image(options: argparse.Namespace) -> None:
    """Builds launch/Dockerfile on the committed tree and pushes it."""
    packed = archive.pack("image", options)
    commands.run(
        ["docker", "build", "--file=launch/Dockerfile", f"--platform={PLATFORM}",
         f"--tag={options.name}", "-"],
        options, stdin=str(packed), capture=False,
    )
    commands.run(["docker", "push", options.name], options, attempts=3, capture=False)


def create(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Hands the job to xpk."""
    commands.check_job(arguments)
    kind = on_gke(options)
    # xpk puts the command into a script of its own and sends a stop to what it started: with `exec`
    # that is Python, not a shell.
    command = "exec " + shlex.join(job(arguments, options))
    commands.run(
        xpk(options, "workload", "create") + [
            f"--workload={options.name}", f"--tpu-type={kind.name}", "--num-slices=1",
            f"--docker-image={options.image}", f"--command={command}",
            f"--max-restarts={options.max_restarts}", f"--restart-on-exit-codes={statuses.AGAIN}",
            "--termination-grace-period-seconds=120",
        ] + ["--spot"] * options.spot,
        options, capture=False,
    )


def jobset(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """launch/jobset.yaml for this job.

    Raises:
        ValueError: for a mistake in what was asked.
    """
    commands.check_job(arguments)
    kind = on_gke(options)
    topology = options.topology or kind.topology
    if not topology:
        raise ValueError(f"the topology of {kind.name} ({kind.chips} chips) does not follow from "
                         "its name: give --topology, for example 4x4x4.")
    size = 1
    for side in topology.split("x"):
        size *= int(side) if side.isdigit() else 0
    if size != kind.chips:
        raise ValueError(f"--topology={topology}: {kind.name} has {kind.chips} chips.")
    chips_a_host = min(kind.chips, CHIPS_A_HOST)
    if kind.chips % chips_a_host:
        raise ValueError(f"{kind.name}: {kind.chips} chips are no whole number of hosts of "
                         f"{chips_a_host}.")
    final = [statuses.FAILED, statuses.MISTAKE, statuses.STOPPED_AFTER_PHASE]
    strings = {
        "name": options.name, "image": options.image, "topology": topology,
        "gke_accelerator": kind.tpu.gke_label,
    }
    template = string.Template((Path(__file__).parent / "jobset.yaml").read_text())
    return template.substitute(
        {key: json.dumps(value) for key, value in strings.items()},  # JSON's strings are YAML's
        command=json.dumps(job(arguments, options)), max_restarts=options.max_restarts, final=final,
        hosts=kind.chips // chips_a_host, chips_a_host=chips_a_host,
        spot_selector='cloud.google.com/gke-spot: "true"' if options.spot else "# on demand",
    )


def apply(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Hands the JobSet to the cluster that kubectl talks to."""
    text = jobset(options, arguments)
    path = Path(tempfile.gettempdir()) / f"bigbatch-{options.name}.jobset.yaml"
    if not options.dry_run:
        path.write_text(text)
    commands.run(["kubectl", "create", f"--filename={path}"], options, capture=False)


def logs(options: argparse.Namespace) -> None:
    """Follows the output of the first host."""
    selector = ",".join([
        f"jobset.sigs.k8s.io/jobset-name={options.name}", "jobset.sigs.k8s.io/job-index=0",
        "batch.kubernetes.io/job-completion-index=0",
    ])
    commands.run(["kubectl", "logs", "--follow", "--tail=100", f"--selector={selector}"],
                 options, capture=False)


def main(argv: list[str]) -> int:
    """The command line."""
    own, arguments = commands.split(argv)
    parser = commands.make_parser("gke", __doc__)
    for action, one in commands.add_actions(parser, {
        "cluster": "make a cluster with one slice, through xpk",
        "image": "build and push the image",
        "create": "run the job, through xpk", "logs": "follow the first host's output",
        "jobset": "print the JobSet", "apply": "run the job as that JobSet",
    }).items():
        one.add_argument("name", help="of the cluster, image or job")
        if action in ("cluster", "create"):
            one.add_argument("--zone", required=True)
            one.add_argument("--project", default="", help="default: gcloud's")
        if action == "create":
            one.add_argument("--cluster", required=True)
        if action in ("cluster", "create", "jobset", "apply"):
            one.add_argument("--tpu-type", required=True, help="v5litepod-256, v6e-16, v4-64, ...")
            one.add_argument("--spot", action="store_true")
        if action in ("create", "jobset", "apply"):
            one.add_argument("--image", required=True, help="as given to `image`")
            one.add_argument("--max-restarts", type=int, default=100, help="default 100")
            commands.add_environment_flag(one)
        if action in ("jobset", "apply"):
            one.add_argument("--topology", default="", help="of v4 and v5p slices, as 4x4x4")
        if action == "image":
            archive.add_flags(one)
    options = commands.parse(parser, own)
    _act(options, arguments)
    return 0


def _act(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    action = options.action
    if action == "cluster":
        create_cluster(options)
    elif action == "image":
        build_image(options)
    elif action == "create":
        create(options, arguments)
    elif action == "logs":
        logs(options)
    elif action == "jobset":
        print(jobset(options, arguments), end="")
    elif action == "apply":
        apply(options, arguments)


if __name__ == "__main__":
    commands.main(main)
