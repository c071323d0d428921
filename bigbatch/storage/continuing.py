"""Whether a run may be continued with a config other than the one it was saved with.

A change that would have trained the examples seen so far differently is refused, and the message
has both values. Allowed are changes that do not affect what is learned (logging, devices,
microbatches) and changes that affect only examples not yet seen (more epochs, a later fall).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bigbatch import __version__
from bigbatch.config import epochs_of, make_phases, make_recipe, saved_config
from bigbatch.mistake import Mistake
from bigbatch.schedule import Phase, Rates, Recipe, rates_at, reference_rate
from bigbatch.schedule.deciding import Growth
from bigbatch.schedule.smoothing import Smoothed
from bigbatch.storage import logs

# These keys do not change what is learned.
FREE = (
    "sharding", "deterministic", "max_per_device_batch", "microbatches", "eval_batch_size",
    "log_every_epochs", "eval_every_epochs", "checkpoint_every_epochs", "intervals_from",
    "keep_checkpoints", "tensorboard", "noise", "data.dir", "data.workers", "data.read_threads",
    "data.on_bad_image",  # affects only images read from now on
)
# ... but for these, where the run decides by what is measured.
NOT_FREE_IF_MEASURED = ("noise", "intervals_from")
# These keys affect training only through the phases and the rates, which are compared themselves.
THROUGH_PHASES = (
    "recipe", "strategy", "hybrid_falls", "by_hand", "ramp", "exchange", "per_example", "scale_up",
    "limits",
)
SAME = 1e-12  # relative difference of rates up to which they are called the same
CURVE_POINTS = 512  # of a user's curve that are saved
LOOKED_AT = 64  # updates of each phase whose rates are compared


class Position(NamedTuple):
    """How far a run has come, counted from its first example and its first update."""

    examples_seen: int = 0
    updates: int = 0
    # Not None: the run was stopped during the evaluation after its last update. The next start
    # evaluates first, then writes this line of metrics.jsonl together with the results.
    pending_evaluation: dict[str, Any] | None = None
    noise: Smoothed = Smoothed()  # what the updates so far have measured of the noise scale
    growth: Growth = Growth()  # of the strategy "measured": what it has seen and decided


def position_of(run: Mapping[str, Any]) -> Position:
    """The position in a checkpoint's run.json, see `describe_run`; the run's start for {}."""
    if not run:
        return Position()
    pending = run.get("pending_evaluation", run.get("owed"))  # version 0.1 called it `owed`
    if pending is not None:
        pending = {key: value for key, value in pending.items() if key != "evaluate"}
    return Position(
        run["examples_seen"], run["updates"], pending, Smoothed(*run.get("noise", ())),
        _growth_of(run.get("growth", {})))


def _growth_of(saved: Mapping[str, Any]) -> Growth:
    decisions = tuple((example, batch) for example, batch in saved.get("decisions", ()))
    return Growth(decisions, saved.get("loss", 0.0), saved.get("loss_weight", 0.0),
                  Smoothed(*saved.get("by_all", ())))


def describe_run(config: ConfigDict, phases: Sequence[Phase], at: Position) -> dict[str, Any]:
    """The content of a checkpoint's run.json: position, version, config and phases.

    Of a curve that is a function of the user's also some of its rates, since the config only names
    it.
    """
    recipe = make_recipe(config)
    position = at._asdict() | {"growth": at.growth._asdict()}
    if config.strategy != "measured":
        del position["growth"]
    return {
        **position,
        "version": __version__,
        "config": json.loads(config.to_json()),
        "phases": [dataclasses.asdict(phase) for phase in phases],
        **({"curve": list(_looked_up(recipe))} if callable(recipe.curve) else {}),
    }


@functools.lru_cache(maxsize=4)  # each checkpoint has it
def _looked_up(recipe: Recipe) -> tuple[float, ...]:
    """The rates of the reference along a run, to tell whether a user's function has changed."""
    return tuple(reference_rate(recipe, example)
                 for example in _curve_points(recipe.epochs, recipe.examples))


def _curve_points(epochs: float, examples: int) -> list[int]:
    """The examples at which a curve is looked up, in a run over a training set of `examples`."""
    last = round(epochs * examples)
    return [last * index // CURVE_POINTS for index in range(CURVE_POINTS)]


def changes(
    saved: Mapping[str, Any], config: ConfigDict, phases: Sequence[Phase]
) -> tuple[list[str], list[str]]:
    """The differences between a saved run and the present config.

    Args:
        saved: what `describe_run` returned when the run was saved.
        config: the present one.
        phases: those of `config`.

    Returns:
        (differences that forbid continuing, differences that are allowed), one text each.
    """
    filled = saved_config(saved)
    before = flatten(json.loads(filled.to_json()))
    now = flatten(json.loads(config.to_json()))
    may_change = [name for name in FREE + THROUGH_PHASES
                  if config.strategy != "measured" or name not in NOT_FREE_IF_MEASURED]
    refused, allowed = [], []
    for key, old, new in unlike(before, now):
        text = f"{key}: {old!r} saved, {new!r} now"
        (allowed if is_among(key, may_change) else refused).append(text)
    differing = _phase_changes(saved["phases"], phases, saved["examples_seen"])
    if not differing:
        differing = _rate_changes(filled, config, phases, saved["examples_seen"])
    if not differing:
        differing = _curve_changes(saved, filled, config)
    if differing:
        # The keys that are the cause say more than the phases that follow from them.
        causes = [text for text in allowed if text.startswith(THROUGH_PHASES)]
        if not (causes or refused):
            causes = _curve_changes(saved, filled, config) or [
                "the same recipe has other phases in this version of bigbatch (a grown batch "
                "follows the whole noise so far since 0.2), so only the version that began the run "
                "can end it"]
        refused += causes + differing
    return refused, allowed


def check_anew(folder: Path, workdir: str | Path, config: ConfigDict) -> None:
    """Checks that a run may begin where there is no checkpoint, which empties metrics.jsonl.

    It may where the same run was killed before it had saved.

    Args:
        folder: the local folder of the workdir.
        workdir: as the user named it.
        config: of the run that is to begin.

    Raises:
        Mistake: if the log is one of another config, or of a run that had checkpoints.
    """
    events, _ = logs.whole_events(folder / "metrics.jsonl", "examples_seen")
    if not events:
        return
    if (folder / "config.json").exists():
        decisions = tuple((event["examples_seen"], event["grows_to"])
                          for event in events if "grows_to" in event)
        phases, seen = make_phases(config, decisions), events[-1]["examples_seen"]
        try:
            saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            refused, _ = changes(saved | {"examples_seen": seen}, config, phases)
        except (ValueError, TypeError, KeyError) as error:
            raise Mistake(
                f"{workdir} holds the log of a run without a checkpoint, and its config.json does "
                "not say of which run: give another --workdir, or remove metrics.jsonl.") from error
        if refused:
            raise Mistake(
                f"{workdir} holds the log of a run of another config, and no checkpoint: "
                f"{'; '.join(refused)}. A start would replace metrics.jsonl: give another "
                "--workdir, set these keys back, or remove this file.")
    if stood_at := _saved_at(folder / "timing.jsonl"):
        raise Mistake(
            f"{workdir} holds the log of a run that was saved at example {stood_at}, and no "
            "checkpoint any more. A start would train from the first example and replace "
            "metrics.jsonl: bring the checkpoints back, give another --workdir, or remove this "
            "file.")


def _saved_at(path: Path) -> int:
    """Where the last start that ended by itself had saved, by timing.jsonl; 0 for nowhere.

    Only such a start writes how its time was spent, after its last save.
    """
    saved_at = 0
    for event in logs.whole_events(path, "examples_seen")[0]:
        if event.get("event") == "time_share" or (
                event.get("event") == "start" and not event["examples_seen"]):
            saved_at = event["examples_seen"]
    return saved_at


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each key whose values differ in two flat dicts, with both; "(absent)" where there is none."""
    for key in sorted(one.keys() | other.keys()):
        pair = tuple(flat[key] if key in flat else "(absent)" for flat in (one, other))
        if pair[0] != pair[1]:
            yield key, *pair


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or is in a group that is one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _phase_changes(
    saved: Sequence[Mapping[str, Any]], phases: Sequence[Phase], examples_seen: int
) -> list[str]:
    """The differences between the phases before `examples_seen`, one text each."""
    def seen(phases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for phase in phases:
            if phase["start_example"] >= examples_seen:
                break
            row = {key: phase[key] for key in (
                "start_example", "batch_size", "learning_rate", "momentum"
            )}
            # The present phase may get another end, but its updates so far must stay the same.
            row["end_example"] = min(phase["end_example"], examples_seen)
            rows.append(row)
        return rows

    old, new = seen(saved), seen([dataclasses.asdict(phase) for phase in phases])
    differing = [
        f"phase {index}: {before} saved, {after} now"
        for index, (before, after) in enumerate(zip(old, new, strict=False))
        # In another version the last bits may differ.
        if not all(math.isclose(before[key], after[key], rel_tol=SAME) for key in before)
    ]
    if len(old) != len(new):
        differing.append(
            f"phases before example {examples_seen}: {len(old)} saved, {len(new)} now"
        )
    return differing


def _rate_changes(
    before: ConfigDict, now: ConfigDict, phases: Sequence[Phase], examples_seen: int
) -> list[str]:
    """The first difference of what updates before `examples_seen` took, as a list of one text.

    Both configs have the same phases so far. In each, some updates are compared.
    """
    old, new = make_recipe(before), make_recipe(now)
    for phase in phases:
        count = -(-(min(phase.end_example, examples_seen) - phase.start_example)
                  // phase.batch_size)
        for update in sorted({index * (count - 1) // LOOKED_AT for index in range(LOOKED_AT + 1)}):
            if update < 0:
                return []
            start = phase.start_example + update * phase.batch_size
            was, is_now = (rates_at(one, phase.batch_size, start) for one in (old, new))
            if not all(math.isclose(one, other, rel_tol=SAME)
                       for one, other in zip(was, is_now, strict=True)):
                return [f"the update at example {start}: {_told(was)} saved, {_told(is_now)} now"]
    return []


def _curve_changes(
    saved: Mapping[str, Any], before: ConfigDict, now: ConfigDict
) -> list[str]:
    """The first place before the position where a user's curve was another, as a list of a text.

    The saved rates are at the examples of the saved config: the run may have become longer.
    """
    recipe = make_recipe(now)
    if "curve" not in saved or not callable(recipe.curve):
        return []
    points = _curve_points(epochs_of(before, "recipe.epochs"), before.data.train_examples)
    for example, was in zip(points, saved["curve"], strict=True):
        if example >= saved["examples_seen"]:
            break
        is_now = reference_rate(recipe, example)
        if not math.isclose(was, is_now, rel_tol=SAME):
            return [f"the function {now.recipe.curve} was another: at example {example} the "
                    f"rate of the reference was {was:.9g}, and now is {is_now:.9g}"]
    return []


def _told(rates: Rates) -> str:
    return ", ".join(f"{key} {value:.9g}" for key, value in rates._asdict().items())
