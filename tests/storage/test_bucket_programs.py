"""Compiled programs in a bucket, as bytes: against support/bucket_server.py."""

import time

import pytest

from bigbatch.storage import bucket_programs
from bigbatch.storage.bucket_programs import BucketPrograms

PROGRAM = bytes(range(256)) * 100


def send(key, program, writing=True, **options):
    """One start that has a program to send."""
    programs = BucketPrograms("gs://bucket/run/", writing)
    programs.send(key, program, **options)
    programs.close()


def fetch(key):
    """What a new machine finds."""
    return BucketPrograms("gs://bucket/run", writing=False).fetch(key)


def test_a_program_is_sent_once_by_one_process_and_found_by_its_key(server):
    send("key", b"of another process", writing=False)
    assert server.objects == {} and fetch("key") is None
    send("key", PROGRAM)
    send("key", b"of a later start")
    assert server.writes == ["put bucket/run/programs/key"] and fetch("key") == PROGRAM
    send("key", b"in its place", replace=True)
    assert fetch("key") == b"in its place"
    server.requests.clear()
    assert fetch("of another version") is None
    assert len(server.requests) == 1 and "prefix=run/programs" in server.requests[0]


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: b"\0" + content[1:],
    lambda content: content[:1000] + b"\0" + content[1001:]])
def test_a_damaged_one_is_none_and_is_replaced(server, damage):
    send("key", PROGRAM)
    name = "bucket/run/programs/key"
    server.put(name, damage(server.content(name)))
    programs = BucketPrograms("gs://bucket/run", writing=True)
    assert programs.fetch("key") is None
    programs.send("key", PROGRAM)  # what was compiled instead
    programs.close()
    assert fetch("key") == PROGRAM


def test_one_that_is_deleted_meanwhile_is_none_and_the_others_are_found(server):
    for key in ("one", "two"):
        send(key, PROGRAM)
    programs = BucketPrograms("gs://bucket/run", writing=False)
    assert programs.fetch("one") == PROGRAM
    del server.objects["bucket/run/programs/one"]
    assert programs.fetch("one") is None and programs.fetch("two") == PROGRAM


@pytest.mark.parametrize("what", ["GET .*prefix=run/programs", "GET .*programs/key", "POST"])
def test_a_bucket_that_is_not_available_is_asked_once(server, what, monkeypatch, capfd):
    """gcsfs itself repeats a request that is answered with 503, for a minute."""
    for name in ("FETCH_SECONDS", "SEND_SECONDS"):
        monkeypatch.setattr(bucket_programs, name, 0.3)
    send("key", PROGRAM)
    server.unavailable = what
    began = time.monotonic()
    programs = BucketPrograms("gs://bucket/run", writing=True)
    assert programs.fetch("key") == (PROGRAM if what == "POST" else None)
    programs.send("other", PROGRAM)
    programs.close()
    asked = len(server.requests)
    assert programs.fetch("key") is None
    programs.send("other", PROGRAM)
    programs.close()
    assert time.monotonic() - began < 3 and len(server.requests) == asked
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "programs is not used any more: the bucket did not an" in said


def test_a_run_does_not_wait_for_long_for_uploads(server, monkeypatch):
    monkeypatch.setattr(bucket_programs, "LAST_SECONDS", 0.2)
    server.unavailable = "POST"
    began = time.monotonic()
    send("key", PROGRAM)
    assert time.monotonic() - began < 1
