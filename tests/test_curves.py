"""Figures and tables are drawn from workdirs alone."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import curves


def write_run(folder, final, batch=50, examples=100, epochs=2):
    """A finished run as a workdir holds it: two updates an epoch, loss 1/update."""
    folder.mkdir()
    events = [
        {"updates": u, "examples_seen": u * batch, "epoch": u * batch / examples,
         "batch_size": batch, "train_loss": 1 / u, "test_accuracy": final if u == 4 else 0.5}
        for u in range(1, 1 + epochs * examples // batch)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    timing = [{"event": "speed", "seconds": s} for s in (1.5, 2)] + [{"event": "save"}]
    (folder / "timing.jsonl").write_text("".join(json.dumps(e) + "\n" for e in timing))
    phases = [{"start_example": 0, "end_example": epochs * examples}]
    (folder / "config.json").write_text(json.dumps({"phases": phases}))
    return folder


def test_the_table_has_mean_and_deviation_of_the_last_evaluations(tmp_path):
    folders = [write_run(tmp_path / str(seed), 0.9 + 0.02 * seed) for seed in (0, 1, 2)]
    runs = [curves.read_run(folder) for folder in folders]
    row = curves.table({"decay": runs}).splitlines()[-1]
    assert row == "| decay | 3 | 92.00 ± 2.00 % | 4 | 3.5 |"


def test_losses_are_means_over_the_epoch_an_update_began_in(tmp_path):
    run = curves.read_run(write_run(tmp_path / "run", 0.9))
    epochs, losses = curves.epoch_means(run.events, "train_loss")
    assert epochs.tolist() == [1, 2]
    np.testing.assert_allclose(losses, [(1 + 1 / 2) / 2, (1 / 3 + 1 / 4) / 2])
    np.testing.assert_allclose(curves.at_updates(run, epochs), [2, 4])


def test_a_picture_is_drawn(tmp_path):
    runs = [curves.read_run(write_run(tmp_path / str(seed), 0.9)) for seed in (0, 1)]
    curves.draw({"a": runs, "b": runs[:1]}, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_a_run_that_is_not_finished_or_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run was made here"):
        curves.read_run(tmp_path)
    folder = write_run(tmp_path / "run", 0.9)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="stands at example 150 of 200"):
        curves.read_run(folder)
