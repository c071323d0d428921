"""A table in a plain PyTorch loop: stopped anywhere and continued, it is consumed exactly."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make test-adapters")

from bigbatch import schedule  # noqa: E402  (needs nothing of the above)
from bigbatch.adapters.pytorch import ScheduledBatches, ScheduledRates  # noqa: E402
from bigbatch.mistake import Mistake  # noqa: E402
from tests.adapters import tables, torch_task  # noqa: E402
from tests.adapters.tables import ADAM, ORDER, SGD, TABLES  # noqa: E402


def train(table, record, saved=None, stop=None, workers=0):
    """A PyTorch user's loop; returns the model and what they would save."""
    model = torch_task.Linear()
    optimizer = torch_task.make_optimizer(table, model.parameters())
    scheduler = ScheduledRates(optimizer, table)
    record.watch(optimizer)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    loader = torch.utils.data.DataLoader(
        torch_task.Examples(), num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        batch_sampler=ScheduledBatches(table, ORDER, from_update=scheduler.last_epoch))
    for batch in loader:
        record.see(batch["index"])
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(batch["features"]), batch["labels"]).backward()
        optimizer.step()
        scheduler.step()
        if scheduler.last_epoch == stop:
            break
    return model, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                   "scheduler": scheduler.state_dict()}


@pytest.mark.parametrize("name", TABLES)
def test_a_loop_stopped_anywhere_and_continued_consumes_the_table(name, tmp_path):
    table = TABLES[name]
    for stop in tables.stops(table):
        record = torch_task.Recorder()
        torch.save(train(table, record, stop=stop)[1], tmp_path / "saved.pt")
        assert len(record.taken) == stop
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        model, _ = train(table, record, saved)
        assert record.taken == tables.wanted(table)
        np.testing.assert_allclose(
            torch_task.array(model), tables.weights_after(table, record.taken), rtol=1e-12)


def test_workers_that_fetch_ahead_lose_nothing_at_a_stop():
    table, record = TABLES["adam"], torch_task.Recorder()
    _, saved = train(table, record, stop=20, workers=2)
    train(table, record, saved, workers=2)
    assert record.taken == tables.wanted(table)


def test_what_is_loaded_first_makes_no_difference():
    table = TABLES["adam"]
    _, saved = train(table, torch_task.Recorder(), stop=45)
    found = []
    for optimizer_first in (True, False):
        optimizer = torch_task.make_optimizer(table, torch_task.Linear().parameters())
        if optimizer_first:
            optimizer.load_state_dict(saved["optimizer"])
        rates = ScheduledRates(optimizer, table)
        rates.load_state_dict(saved["scheduler"])
        if not optimizer_first:
            optimizer.load_state_dict(saved["optimizer"])
        rates.step()
        counts = {float(kept["step"]) for kept in optimizer.state_dict()["state"].values()}
        found.append((torch_task.in_optimizer(optimizer), counts))
    count = float(saved["optimizer"]["state"][0]["step"])
    assert count > 1 and found == [(schedule.row(table, 46).rates[:4], {count})] * 2


def test_each_example_is_seen_once_an_epoch():
    seen = [index for batch in ScheduledBatches(TABLES["sgd"], ORDER) for index in batch]
    for first in range(0, 6 * tables.EXAMPLES, tables.EXAMPLES):
        assert sorted(seen[first : first + tables.EXAMPLES]) == list(range(tables.EXAMPLES))


def test_groups_keep_their_multiple_of_the_rate_and_the_decay():
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.002, "weight_decay": 0}],
        lr=ADAM.learning_rate, weight_decay=ADAM.weight_decay)
    ScheduledRates(optimizer, TABLES["adam"]).go_to(30)
    rates = schedule.row(TABLES["adam"], 30).rates
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"]) == (rates.learning_rate, rates.weight_decay)
    assert second["lr"] == pytest.approx(rates.learning_rate / 10, rel=1e-12)
    assert second["weight_decay"] == 0


def test_an_l2_decay_is_left_as_it_is():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.02, momentum=0.9,
                                weight_decay=5e-4)
    ScheduledRates(optimizer, TABLES["sgd"]).go_to(TABLES["sgd"].updates - 1)
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4


def test_a_state_of_another_schedule_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.02, momentum=0.9)
    rates = ScheduledRates(optimizer, TABLES["sgd"])
    rates.go_to(30)
    other = schedule.make_table(SGD, "decay", tables.LIMITS)
    with pytest.raises(Mistake, match="saved before update 30 .* continue with the recipe"):
        ScheduledRates(optimizer, other).load_state_dict(rates.state_dict())


def test_what_does_not_fit_is_refused():
    def one(kind, **options):
        return kind([torch.nn.Parameter(torch.zeros(()))], **options)

    with pytest.raises(Mistake, match=r"learning_rate is 0.02, .* have lr 0.001; one must have"):
        ScheduledRates(one(torch.optim.AdamW, weight_decay=0.1), TABLES["adam"])
    with pytest.raises(Mistake, match=r"weight_decay is 0.1, .* have weight_decay 0; one must"):
        ScheduledRates(one(torch.optim.Adam, lr=0.02), TABLES["adam"])
    with pytest.raises(Mistake, match="accumulates=False"):
        ScheduledRates(one(torch.optim.Adam, lr=0.02), TABLES["sgd"])
    with pytest.raises(Mistake, match="accumulates=True"):
        ScheduledRates(one(torch.optim.SGD, lr=0.02, momentum=0.9), TABLES["adam"])
    with pytest.raises(Mistake, match="accumulates=True"):
        ScheduledRates(one(torch.optim.SGD, lr=0.02), TABLES["adam"])
    apart = dataclasses.replace(ADAM, per_example=schedule.PerExample(momentum=False))
    with pytest.raises(Mistake, match="by one count of updates; set both"):
        ScheduledRates(one(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
                       schedule.make_table(apart, "increase", tables.LIMITS))
    with pytest.raises(Mistake, match="nesterov=True, .* set one of them to False"):
        ScheduledRates(one(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True), TABLES["sgd"])
    decay = {"lr": 0.02, "weight_decay": 0.1}
    for kind in (torch.optim.Adam, torch.optim.Adamax, torch.optim.RAdam):
        with pytest.raises(Mistake, match=r"decay is 0.1 and decoupled, .* \(L2\); take AdamW"):
            ScheduledRates(one(kind, **decay), TABLES["adam"])
    undecayed = schedule.make_table(
        dataclasses.replace(ADAM, weight_decay=0.0), "increase", tables.LIMITS)
    ScheduledRates(one(torch.optim.Adam, **decay), undecayed)
    with pytest.raises(Mistake, match=r"decoupled weight decay of 0.1, .* is 0; state it there"):
        ScheduledRates(one(torch.optim.AdamW, **decay), undecayed)
    with pytest.raises(Mistake, match=r"betas \(0.5, 0.95\), .* recipe's \(0.9, 0.99\); change"):
        ScheduledRates(one(torch.optim.AdamW, betas=(0.5, 0.95), **decay), TABLES["adam"])
    for betas in ((0.9, 0.99), (0.9, 0.999)):
        ScheduledRates(one(torch.optim.AdamW, betas=betas, **decay), TABLES["adam"])
    with pytest.raises(Mistake, match=r"momentum 0.5, .* the recipe's 0.9; change"):
        ScheduledRates(one(torch.optim.SGD, lr=0.02, momentum=0.5), TABLES["sgd"])
    with pytest.raises(Mistake, match="dampening 0.9, which acts once an update"):
        ScheduledRates(one(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.9), TABLES["sgd"])
    with pytest.raises(Mistake, match="alpha 0.99, which acts once an update"):
        ScheduledRates(one(torch.optim.RMSprop, lr=0.02, momentum=0.9), TABLES["sgd"])
    with pytest.raises(Mistake, match="momentum_decay 0.004, which acts once an update"):
        ScheduledRates(one(torch.optim.NAdam, lr=0.02), TABLES["adam"])
    with pytest.raises(Mistake, match="neither betas nor a momentum"):
        ScheduledRates(one(torch.optim.Adagrad, lr=0.02), TABLES["sgd"])
    with pytest.raises(Mistake, match=r"no multiple of the 3 processes"):
        ScheduledBatches(TABLES["sgd"], ORDER, ranks=3)
    with pytest.raises(Mistake, match=r"from 0 to 1"):
        ScheduledBatches(TABLES["sgd"], ORDER, rank=2, ranks=2)
    with pytest.raises(Mistake, match=r"from_update is -1"):
        ScheduledBatches(TABLES["sgd"], ORDER, from_update=-1)


def _train_a_rank(rank, ranks, folder):
    """One of several processes, each with its part of every batch; saves its weights."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    table, record = TABLES["adam"], torch_task.Recorder()
    model = torch_task.Linear()
    optimizer = torch_task.make_optimizer(table, model.parameters())
    scheduler = ScheduledRates(optimizer, table)
    record.watch(optimizer)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for batch in torch.utils.data.DataLoader(
            torch_task.Examples(), batch_sampler=ScheduledBatches(table, ORDER, 0, rank, ranks)):
        record.see(batch["index"])
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(parallel(batch["features"]), batch["labels"]).backward()
        optimizer.step()
        scheduler.step()
    torch.save({"weights": model.weights.detach(), "taken": [tuple(one) for one in record.taken]},
               f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_batches_of_one(tmp_path):
    table = TABLES["adam"]
    torch.multiprocessing.spawn(_train_a_rank, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, other, both in zip(found[0]["taken"], found[1]["taken"], tables.wanted(table),
                                strict=True):
        assert (one[0], other[0]) == (both.examples[::2], both.examples[1::2])
        assert one[1] == other[1] == both.rates
    for made in found:
        np.testing.assert_allclose(
            made["weights"].numpy(), tables.weights_after(table, tables.wanted(table)), rtol=1e-12)
