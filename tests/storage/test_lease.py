"""Who may write to a workdir in a bucket: against tests/support/bucket_server.py."""

import os

import pytest

from bigbatch.storage import bucket, lease


def leases(count, name):
    files, root = bucket.connect(f"gs://bucket/{name}")
    return [lease.Lease(files, f"{root}/lease.json", f"gs://bucket/{name}") for _ in range(count)]


def test_of_two_that_take_a_stale_lease_one_wins(server, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.05)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    dead, quick, slow = leases(3, "takers")
    dead.take()
    dead._ended.set()  # its process is gone
    stands_still = slow._stands_still

    def overtaken(generation):
        still = stands_still(generation)
        quick.take()  # between what the slow one has seen and what it does
        return still

    monkeypatch.setattr(slow, "_stands_still", overtaken)
    with pytest.raises(ValueError, match="held by another job"):
        slow.take()
    quick.renew()
    with pytest.raises(lease.Lost, match="took the lease"):
        dead.renew()
    dead.release()
    assert "lease.json" in server.names("bucket/takers/"), "released what was another's"
    quick.release()
    assert server.names("bucket/takers/") == []


def test_a_lease_is_renewed_by_itself_and_one_given_up_is_free_at_once(server, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    holder, other = leases(2, "beats")
    holder.take()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on {os.uname().nodename}"):
        other.take()
    holder.release()
    other.take()
    other.release()


def test_a_renewal_whose_answer_was_lost_is_still_the_holders(server):
    (holder,) = leases(1, "unheard")
    holder.take()
    server.answer_lost = "^bucket/unheard/lease.json"
    holder.renew()  # made twice, the second time over its own first
    assert server.answer_lost == ""
    holder.renew()
    holder.check()
    holder.release()
    assert server.names("bucket/unheard/") == []


def test_a_holder_that_never_heard_of_its_own_renewals_has_not_lost_the_lease(server):
    (holder,) = leases(1, "silence")
    holder.take()
    for confirm in (holder.check, holder.renew):
        known = holder._generation
        holder.renew()
        holder._generation = known  # the network went before the answer came
        confirm()
    server.put("bucket/silence/lease.json", b'{"process": 7, "host": "other"}')
    for confirm in (holder.check, holder.renew):
        with pytest.raises(lease.Lost, match="process 7 on other"):
            confirm()
    holder.release()
    assert server.names("bucket/silence/") == ["lease.json"]
