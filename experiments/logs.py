"""The logs of a run in its workdir: what figures and tables are made from."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bigbatch.config import saved_config
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket, continuing
from bigbatch.storage.logs import read_events

# Keys in which the seeds of one curve may differ: the seed itself, and keys that change neither
# what is learned nor when it is measured.
FREE = {"seed", *continuing.FREE} - {"log_every_epochs", "eval_every_epochs"}


class Logs(NamedTuple):
    """The logs of one run, which finished or diverged."""

    events: list[dict[str, Any]]  # of metrics.jsonl; a run that diverged at once has none
    timing: list[dict[str, Any]]  # of timing.jsonl
    config: dict[str, Any]
    phases: list[dict[str, Any]]
    version: str  # of bigbatch, which wrote the config; "" for 0.1, which did not note it

    @property
    def diverged(self) -> dict[str, Any] | None:
        """See the function `divergence`."""
        return divergence(self.timing)

    @property
    def examples(self) -> int:
        """N."""
        return self.config["data"]["train_examples"]

    @property
    def decides(self) -> bool:
        """Whether the run decided itself when its batch grew, so that its phases are its own."""
        return filled(self).strategy == "measured"

    @property
    def updates(self) -> int:
        """Of the whole schedule, also where the run diverged before its end."""
        return sum(phase["updates"] for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of all starts together, without the time that a kill lost."""
        return sum(event["seconds"] for event in self.timing if "seconds" in event) or None

    @property
    def training_seconds(self) -> float | None:
        """Wall-clock time of all starts together, without evaluation and waiting for compilers.

        None where a start did not log it, as one that was killed or that diverged.
        """
        starts, wholes = ([event for event in self.timing if event["event"] == kind]
                          for kind in ("start", "time_share"))
        if not wholes or len(wholes) != len(starts):
            return None
        return sum(
            whole["wall_seconds"]
            * (1 - sum(whole["time_share"][what] for what in ("evaluation", "compile")))
            for whole in wholes
        )

    @property
    def devices(self) -> set[str]:
        """The devices that it was trained on, as "8 x TPU v3"."""
        return {f"{event['devices']} x {event['device_kind']}" for event in self.timing
                if event["event"] == "start"}


def divergence(timing: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The event of a run's timing.jsonl that says when training diverged, with epoch and updates.

    Started again, such a run would diverge at the same update. None where it was started since.
    """
    found = [event for event in timing if event["event"] in ("start", "diverged")]
    return found[-1] if found and found[-1]["event"] == "diverged" else None


def read_run(workdir: str | Path) -> Logs:
    """The logs of a run that is over, in a folder or in a bucket (gs://).

    Raises:
        Mistake: if the workdir holds none, or a run that has neither finished nor diverged.
    """
    with bucket.opened(workdir) as (folder, mirror):
        if mirror:
            mirror.bring_down_logs()
        events, timing = (read_events(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
        if not events and not divergence(timing):
            raise Mistake(
                f"{workdir} has no metrics.jsonl with events in it: no run was made here.")
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = Logs(events, timing, *(described.get(key, "") for key in ("config", "phases", "version")))
    end = run.phases[-1]["end_example"]
    if not run.diverged and events[-1]["examples_seen"] != end:
        raise Mistake(
            f"{workdir} holds a run that stands at example {events[-1]['examples_seen']} of "
            f"{end}: give its command again until it has finished."
        )
    return run


def filled(run: Logs) -> ConfigDict:
    """The run's config with every key of now, so that old and new runs can be compared."""
    version = {"version": run.version} if run.version else {}
    return saved_config({"config": run.config} | version)


def check_seeds(name: str, runs: Sequence[Logs]) -> None:
    """Refuses runs under one name that are not seeds of one config.

    Raises:
        Mistake: naming the first key in which they differ, with both values.
    """
    first, *others = (
        continuing.flatten(json.loads(filled(run).to_json())) for run in runs)
    for other in others:
        for key, one, another in continuing.unlike(first, other):
            if not continuing.is_among(key, FREE):
                raise Mistake(
                    f"the runs of {name} differ in more than their seed: config.{key} is {one!r} "
                    f"in one and {another!r} in another. Give each its own NAME.")


def judged_by(runs: Iterable[Logs]) -> str:
    """The quantity by which runs are shown to have ended: their test accuracy, or else loss."""
    known = {name for run in runs for event in run.events for name in event}
    return "test_loss" if "test_loss" in known and "test_accuracy" not in known else "test_accuracy"


def finished(runs: Sequence[Logs]) -> list[Logs]:
    """The runs that did not diverge."""
    return [run for run in runs if not run.diverged]


def updates_of(runs: Sequence[Logs]) -> str:
    """How many updates runs take, as "2,847"; where they decide and differ, as "239 (208 to 259)",
    the mean with the range."""
    counts = [run.updates for run in runs]
    return f"{statistics.mean(counts):,.0f}" + (
        f" ({min(counts):,} to {max(counts):,})" * (len(set(counts)) > 1))


def divergences(runs: Sequence[Logs]) -> str:
    """How many runs diverged and when, as "1 of 3 diverged at epoch 0.62"; "" for none."""
    epochs = [f"{run.diverged['epoch']:.3g}" for run in runs if run.diverged]
    return f"{len(epochs)} of {len(runs)} diverged at epoch {', '.join(epochs)}" * bool(epochs)
