"""A table in Hugging Face's Trainer: its own checkpoints, its own two ways of a loss."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make test-adapters")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-adapters")
pytest.importorskip("accelerate", reason="accelerate is not installed; make test-adapters")

from bigbatch.adapters.huggingface import ScheduledTrainer  # noqa: E402
from bigbatch.adapters.pytorch import ScheduledRates  # noqa: E402
from bigbatch.mistake import Mistake  # noqa: E402
from tests.adapters import tables, torch_task  # noqa: E402
from tests.adapters.tables import MICRO_BATCH, ORDER, TABLES  # noqa: E402


class MeanLoss(torch_task.Linear):
    """Returns the mean over the micro-batch; the Trainer has to divide."""

    def __init__(self, record):
        super().__init__()
        self.record = record

    def forward(self, features, labels, index):
        self.record.see(index)
        return {"loss": torch.nn.functional.mse_loss(super().forward(features), labels)}


class SummedLoss(MeanLoss):
    """Divides by the items of the whole update itself, as transformers' language models do."""

    def forward(self, features, labels, index, num_items_in_batch=None, **kwargs):
        squares = (torch_task.Linear.forward(self, features) - labels) ** 2
        self.record.see(index)
        return {"loss": squares.sum() / num_items_in_batch}


class StopAfter(transformers.TrainerCallback):
    """Stops the Trainer after a number of updates."""

    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.update:
            control.should_training_stop = True


def make(table, model, folder, stop=0, train_dataset=None, **changed):
    """A user's Trainer, and the optimizer in it."""
    options = {"learning_rate": table.recipe.learning_rate, "max_grad_norm": 0.0,
               "weight_decay": table.recipe.weight_decay, "save_steps": stop or 1000,
               "per_device_train_batch_size": MICRO_BATCH, "report_to": [], "use_cpu": True,
               "disable_tqdm": True, "logging_strategy": "no", **changed}
    arguments = transformers.TrainingArguments(folder, **options)
    optimizer = torch_task.make_optimizer(table, model.parameters())
    return ScheduledTrainer(
        model, arguments, train_dataset=train_dataset or torch_task.Examples(), table=table,
        order=ORDER, optimizers=(optimizer, None), callbacks=[StopAfter(stop)]), optimizer


@pytest.mark.parametrize("model", [MeanLoss, SummedLoss])
@pytest.mark.parametrize("name", TABLES)
def test_a_trainer_stopped_anywhere_and_continued_consumes_the_table(name, model, tmp_path):
    table = TABLES[name]
    for stop in tables.stops(table):
        record, folder = torch_task.Recorder(), str(tmp_path / str(stop))
        trainer, optimizer = make(table, model(record), folder, stop)
        record.watch(optimizer)
        trainer.train()
        assert len(record.taken) == stop
        trainer, optimizer = make(table, model(record), folder, stop=1000)
        record.watch(optimizer)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{stop}")
        assert record.taken == tables.wanted(table)
        assert trainer.state.global_step == table.updates
        np.testing.assert_allclose(
            torch_task.array(trainer.model), tables.weights_after(table, record.taken), rtol=1e-12)


def test_the_trainers_own_optimizer_takes_the_table(tmp_path):
    table, record = TABLES["adam"], torch_task.Recorder()
    trainer, _ = make(table, MeanLoss(record), str(tmp_path))
    trainer.optimizer = None
    trainer.create_optimizer()
    record.watch(trainer.optimizer)
    trainer.train()
    assert record.taken == tables.wanted(table)


def test_a_language_models_loss_is_the_mean_over_all_tokens_of_the_batch(tmp_path):
    """The micro-batches have different numbers of labels, so the mean of their means is another."""
    table, random = TABLES["sgd"], np.random.default_rng(0)
    tokens = torch.tensor(random.integers(1, 11, (tables.EXAMPLES, 6)))
    labels = torch.where(torch.tensor(random.random(tokens.shape)) < 0.5, -100, tokens)
    config = transformers.LlamaConfig(
        vocab_size=11, max_position_embeddings=6, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    alone = transformers.LlamaForCausalLM(config).double()
    alone.load_state_dict(model.state_dict())
    data = [{"input_ids": one, "labels": label} for one, label in zip(tokens, labels, strict=True)]
    make(table, model, str(tmp_path), train_dataset=data, max_steps=47)[0].train()

    optimizer = torch_task.make_optimizer(table, alone.parameters())
    rates = ScheduledRates(optimizer, table)
    for update in tables.wanted(table)[:47]:
        rows = list(update.examples)
        logits = alone(input_ids=tokens[rows]).logits[:, :-1]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[rows][:, 1:].flatten()).backward()
        optimizer.step()
        rates.step()
    # The model's loss is computed in float32.
    for found, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def test_a_step_that_the_scaler_leaves_out_takes_its_examples_along(tmp_path, monkeypatch):
    table, record = TABLES["sgd"], torch_task.Recorder()
    trainer, optimizer = make(table, MeanLoss(record), str(tmp_path))
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped",
                        property(lambda _: trainer.state.global_step in (5, 31)))
    record.watch(optimizer)
    trainer.train()
    assert record.taken == tables.wanted(table)


def test_the_loss_that_is_logged_is_the_batchs_mean(tmp_path):
    table, record = TABLES["sgd"], torch_task.Recorder()
    trainer, optimizer = make(table, MeanLoss(record), str(tmp_path), max_steps=35,
                              logging_strategy="steps", logging_steps=1)
    record.watch(optimizer)
    trainer.train()
    wanted = tables.wanted(table)
    for update, logged in enumerate(trainer.state.log_history[:35]):
        weights = tables.weights_after(table, wanted[:update])
        rows = list(wanted[update].examples)
        loss = np.mean((tables.FEATURES[rows] @ weights - tables.TARGETS[rows]) ** 2)
        assert logged["loss"] == pytest.approx(loss, rel=1e-6)
        assert logged["learning_rate"] == wanted[update].rates[0]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda _: 2))
    with pytest.raises(Mistake, match="runs in one process on one device"):
        make(TABLES["sgd"], MeanLoss(torch_task.Recorder()), str(tmp_path))


def test_what_does_not_fit_is_refused(tmp_path):
    table, record = TABLES["adam"], torch_task.Recorder()

    def refused(text, **changed):
        with pytest.raises(Mistake, match=text):
            make(table, MeanLoss(record), str(tmp_path), **changed)[0].train()

    refused(r"no multiple of the micro-batch of 3", per_device_train_batch_size=3)
    refused(r"gradient_accumulation_steps is 2; leave it 1", gradient_accumulation_steps=2)
    refused("begin with the first examples again", ignore_data_skip=True)
    refused("set has 49 examples, and recipe.examples is 50", train_dataset=[{}] * 49)
    refused(r"max_steps is 54, and the schedule has 53 updates", max_steps=54)
    model = MeanLoss(record)
    optimizer = torch_task.make_optimizer(table, model.parameters())
    given = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(Mistake, match=r"pass \(optimizer, None\)"):
        ScheduledTrainer(
            model, transformers.TrainingArguments(
                str(tmp_path), per_device_train_batch_size=MICRO_BATCH, use_cpu=True, report_to=[]),
            train_dataset=torch_task.Examples(), table=table, order=ORDER,
            optimizers=(optimizer, given))
