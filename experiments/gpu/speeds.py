"""The speed of each batch in runs' own logs, and what of a run's time was what.

    PYTHONPATH=. python experiments/gpu/speeds.py

of the workdirs in $WORK and in its `runs`.
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from bigbatch.storage.logs import read_events


def lines(workdir: Path) -> Iterator[str]:
    """A run: how far it came, a line a batch size and phase, and the shares of its time."""
    logged, timing = (read_events(workdir / name) for name in ("metrics.jsonl", "timing.jsonl"))
    if not logged:
        return
    last = logged[-1]
    tested = [event["test_accuracy"] for event in logged if "test_accuracy" in event][-1:]
    yield (f"{workdir.name}: epoch {last['epoch']:.1f}, update {last['updates']}, training loss "
           f"{last['train_loss']:.4f}"
           + "".join(f", test accuracy {value:.4f}" for value in tested))
    batch_at = {event["examples_seen"]: event["batch_size"] for event in logged}
    by_batch = defaultdict(list)
    for event in timing:
        if event["event"] == "speed" and event["updates"] and event["examples_seen"] in batch_at:
            by_batch[batch_at[event["examples_seen"]]].append(event)
    for batch, events in sorted(by_batch.items()):
        later = events[len(events) // 4:]
        # Added up: of two updates in a row a line may count some of the one's time as the other's.
        updates = sum(event["updates"] for event in later)
        each = sum(event["updates"] / event["updates_per_second"] for event in later) / updates
        used = [event["model_flop_utilisation"] for event in later]
        known = all(isinstance(one, float) for one in used)
        yield (f"   batch {batch}: {1000 * each:.3f} ms an update, {batch / each:.0f} images a "
               f"second, share of the peak {statistics.median(used) if known else used[-1]} "
               f"({updates} updates)")
    for event in timing:
        if event["event"] == "phase":
            yield (f"   phase {event['phase']}: compiled in {event['compile_seconds']} s, waited "
                   f"{event['waited_seconds']} s")
        if event["event"] == "time_share":
            yield f"   {event['wall_seconds']:.1f} s: {event['time_share']}"


if __name__ == "__main__":
    work = Path(os.environ["WORK"])
    for folder in sorted({path.parent for path in [*work.glob("*/metrics.jsonl"),
                                                   *work.glob("runs/*/metrics.jsonl")]}):
        print("\n".join(lines(folder)))
