"""The lines of a run's logs: what is written, and what is read of damaged ones."""

import json
import math

import pytest

from bigbatch.mistake import Mistake
from bigbatch.storage import logs

EVENTS = [{"examples_seen": 100 * count, "loss": 1 / count} for count in range(1, 5)]
DAMAGED = {
    "bits": b'{"examples_seen": 2\xb00, "loss": 0.5}', "half": b'{"examples_se', "zeros": bytes(40),
    "empty": b"", "two": b'{"examples_seen": 100}{"examples_seen": 200}', "no event": b"200",
}


def write(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named_and_the_others_are_kept(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(event).encode() for event in EVENTS]
    lines[1] = DAMAGED[kind]
    write(path, lines)
    with pytest.raises(Mistake, match=r"line 2 of .*metrics\.jsonl is damaged .* Take it out"):
        logs.read_events(path)
    said, = logs.cut_events(path, 300)
    assert said.startswith(f"line 2 of {path} is damaged (") and said.endswith(", and was removed")
    assert logs.read_events(path) == [EVENTS[0], EVENTS[2]]
    assert logs.cut_events(path, 300) == []


def test_a_line_without_a_position_is_damaged_where_the_log_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [b'{"loss": 1.0}', json.dumps(EVENTS[0]).encode()])
    assert len(logs.cut_events(path, 300)) == 1
    assert logs.read_events(path) == EVENTS[:1]


def test_a_half_line_is_cut_whatever_is_in_the_others(tmp_path):
    path = tmp_path / "timing.jsonl"
    for whole in (b"", b"\xff\xfe\n", b'{"event": "start"}\n'):
        path.write_bytes(whole + b'{"ev\xb0')
        logs.cut_half_line(path)
        assert path.read_bytes() == whole


def test_what_is_no_finite_number_is_written_as_json_has_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logs.append_event(path, {"examples_seen": 1, "test_loss": math.inf, "share": {"a": math.nan},
                             "list": (-math.inf, 0.1), "text": "NaN"})
    assert path.read_text() == (
        '{"examples_seen": 1, "test_loss": null, "share": {"a": null}, "list": [null, 0.1], '
        '"text": "NaN"}\n')
