"""What runs leave in their workdirs, written out without training."""

import json


def write_run(folder, accuracies, losses, batch=10, examples=50, **config):
    """The workdir of a finished run, evaluated at each of its updates; returns the folder."""
    folder.mkdir(parents=True)
    updates = len(losses)
    write_events(folder / "metrics.jsonl", [
        {"updates": u, "examples_seen": batch * u, "epoch": batch * u / examples,
         "batch_size": batch, "train_loss": losses[u - 1], "test_accuracy": accuracies[u - 1],
         "learning_rate": 0.1}
        for u in range(1, updates + 1)
    ])
    write_events(folder / "timing.jsonl", [
        {"event": "speed", "seconds": 1.5}, {"event": "speed", "seconds": 2}, {"event": "save"}])
    (folder / "config.json").write_text(json.dumps({
        "config": {"data": {"train_examples": examples, "dir": ""}} | config,
        "phases": [{"start_example": 0, "end_example": batch * updates, "updates": updates,
                    "learning_rate": 0.1}]}))
    return folder


def write_events(path, events):
    """A file of events, one a line."""
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
