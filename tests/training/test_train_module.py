"""One step of the train module: losses, gradients, clipping, learning rates."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tiny_training import VOCAB_SIZE, tiny_model
from ultramem.errors import TrainingError
from ultramem.model.roles import parameter_roles
from ultramem.training import train_module
from ultramem.training.checkpoints import complete_steps
from ultramem.training.config import (
    DataSection,
    LoggingSection,
    OptimizerSection,
    RunConfig,
    RunSection,
    TrainingSection,
)
from ultramem.training.run import resolve_config, train
from ultramem.training.train_module import UltraMemTrainModule


class FakeTrainer(SimpleNamespace):
    """What a train module asks of the trainer, with the metrics of the step in a dictionary."""

    def record_metric(self, name, value, reduce_type=None, namespace=None, merge_strategy=None):
        self.metrics[f"{namespace}/{name}" if namespace else name] = float(value)

    def record_ce_loss(self, value, reduce_type=None):
        self.record_metric("train/CE loss", value)


def make_module(
    micro_batch_sequences=None,
    precision="fp32",
    memory_interval_steps=None,
    model=None,
    table_gradients="dense",
    **optimizer,
):
    config = RunConfig(
        run=RunSection(save_folder="absent"),
        data=DataSection(sequence_length_tokens=16),
        optimizer=OptimizerSection(**optimizer),
        training=TrainingSection(
            max_steps=10,
            global_batch_sequences=4,
            micro_batch_sequences=micro_batch_sequences,
            precision=precision,
            table_gradients=table_gradients,
        ),
        logging=LoggingSection(memory_interval_steps=memory_interval_steps),
    )
    model = model or without_dropout()
    module = UltraMemTrainModule(model, parameter_roles(model), config, flops_per_token=10)
    module._trainer = FakeTrainer(
        device=torch.device("cpu"),
        global_step=1,
        global_train_tokens_seen=64,
        max_tokens=640,
        max_steps=10,
        dp_process_group=None,
        data_loader=SimpleNamespace(batches_processed=3, epoch=2),
        metrics={},
    )
    return module


def without_dropout(**memory):
    """The tiny model without dropout and without the key-balance loss, which is no sum over tokens."""
    settings = {"num_keys": 8, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8, "top_k": 4, **memory}
    return tiny_model(attention_dropout=0.0, memory=settings)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(2, VOCAB_SIZE, (4, 16), generator=generator)}


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.model.named_parameters()}


def test_loss_and_gradient_are_those_of_the_mean_over_targets():
    module = make_module()
    module.train_batch(batch())
    ours = gradients(module)
    module.zero_grads()
    logits = module.model(input_ids=batch()["input_ids"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch()["input_ids"][:, 1:].flatten())
    loss.backward()
    assert module.trainer.metrics["train/CE loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("micro_batch_sequences", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch_sequences):
    """Also with an auxiliary loss that does not depend on the tokens, which must not be counted once per part."""
    penalty = {"tucker_penalty_weight": 3.0, "tucker_penalty_margin": 0.0}
    whole, parts = make_module(model=without_dropout(**penalty)), None
    parts = make_module(micro_batch_sequences, model=without_dropout(**penalty))
    for module in (whole, parts):
        module.train_batch(batch())
    assert whole.trainer.metrics["train/tucker_penalty"] > 0.01
    assert parts.trainer.metrics == pytest.approx(whole.trainer.metrics, rel=1e-5)
    expected = gradients(whole)
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_tables_and_the_rest_are_clipped_apart():
    module = make_module(max_grad_norm=0.5, table_max_grad_norm=0.125)
    module.train_batch(batch())
    for parameter in module.model.parameters():
        parameter.grad.mul_(1000)
    module.optim.step = lambda: None  # look at the gradients that the optimizer would get
    module.optim_step()
    roles = parameter_roles(module.model)
    for limit, is_table in ((0.5, False), (0.125, True)):
        squares = [
            parameter.grad.square().sum()
            for name, parameter in module.model.named_parameters()
            if (roles[name] == "table") == is_table
        ]
        assert torch.stack(squares).sum().sqrt().item() == pytest.approx(limit, rel=1e-4)
    assert module.trainer.metrics["optim/dense grad norm"] > 100
    assert module.trainer.metrics["optim/tables grad norm"] > 1


def test_no_limit_leaves_gradients_alone():
    module = make_module(max_grad_norm=None, table_max_grad_norm=None)
    module.train_batch(batch())
    for parameter in module.model.parameters():
        parameter.grad.mul_(1000)
    before = gradients(module)
    module.optim.step = lambda: None
    module.optim_step()
    for name, gradient in gradients(module).items():
        assert torch.equal(gradient, before[name])


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda module: setattr(module, "batch_loss", torch.tensor(float("inf"))), r"loss inf, dense grad norm \d"),
        (
            lambda module: module.model.model.memory_pool.values.grad.view(-1)[3].fill_(float("nan")),
            r"loss \d\.\d+, dense grad norm \d\S*, tables grad norm nan",
        ),
    ],
)
def test_a_step_that_would_spoil_the_weights_is_not_taken(spoil, found):
    module = make_module()
    module.train_batch(batch())
    spoil(module)
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    message = rf"step 1 cannot be taken \({found}.*Lower 'optimizer.lr'.*no checkpoint is complete yet in 'absent'"
    with pytest.raises(TrainingError, match=message):
        module.optim_step()
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("memory", ["", "model.memory=null"])
def test_a_run_whose_loss_is_nan_names_its_step_and_its_last_checkpoint(config_path, monkeypatch, memory):
    losses, count = train_module.next_token_losses, iter(range(100))
    # Two micro-batches a step: the second of step 6.
    monkeypatch.setattr(
        train_module, "next_token_losses", lambda *given: losses(*given) * (float("nan") if next(count) == 11 else 1)
    )
    overrides = ["checkpoint.save_async=false", "logging.interval_steps=10", *filter(None, [memory])]
    with pytest.raises(TrainingError) as error:
        train(*resolve_config(config_path, overrides))
    run_folder = config_path.parent / "run"
    assert "step 6 cannot be taken (loss nan, dense grad norm nan" in str(error.value)
    assert f"last complete checkpoint is '{run_folder}/step4', and the same command resumes from it" in str(error.value)
    assert complete_steps(run_folder) == [4]
    monkeypatch.undo()
    assert train(*resolve_config(config_path, overrides)).name == "step12-hf"


def test_step_moves_every_parameter_at_its_groups_rate_and_refreshes_the_search():
    module = make_module(lr=0.01, key_lr_multiplier=0.25, table_lr_multiplier=20.0, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    retrieval = module.model.model.memories[0].retrieval
    directions = {name: buffer.clone() for name, buffer in retrieval.named_buffers()}
    module.train_batch(batch())
    touched = {name: parameter.grad != 0 for name, parameter in module.model.named_parameters()}
    module.optim_step()
    # 10 % of the way through: the warmup of 1 % is over.
    rates = module.learning_rates
    assert rates["tables"] / rates["dense"] == pytest.approx(1 + 19 * 0.9)
    assert rates["keys"] / rates["dense"] == pytest.approx(0.25)
    groups = {"table": "tables", "key": "keys"}
    for name, role in parameter_roles(module.model).items():
        change = (dict(module.model.named_parameters())[name].detach() - before[name])[touched[name]].abs()
        # AdamW's first step is the rate times the sign of the gradient, up to eps.
        assert change.median().item() == pytest.approx(rates[groups.get(role, "dense")], rel=0.05), name
    changed = [name for name, buffer in retrieval.named_buffers() if not torch.equal(buffer, directions[name])]
    assert changed, "the coarse directions follow the cores"


def test_bf16_autocast_keeps_weights_and_gradients_in_fp32():
    module = make_module(precision="bf16")
    seen = []
    module.model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    module.train_batch(batch())
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in module.model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(module).values()} == {torch.float32}
    reference = make_module()
    reference.train_batch(batch())
    assert module.trainer.metrics["train/CE loss"] == pytest.approx(
        reference.trainer.metrics["train/CE loss"], rel=0.02
    )


def test_memory_statistics_accumulate_over_micro_batches():
    whole, parts = make_module(None, memory_interval_steps=1), make_module(1, memory_interval_steps=1)
    for module in (whole, parts):
        module.train_batch(batch())
    assert len(whole.memory_meters) == 2
    for a, b in zip(whole.memory_meters, parts.memory_meters, strict=True):
        assert int(a.counts_S.sum()) == 4 * 16 * 4  # sequences · tokens · top_k
        assert torch.equal(a.counts_S, b.counts_S)
        assert {k: v for k, v in b.read().items() if k != "output_std"} == pytest.approx(
            {k: v for k, v in a.read().items() if k != "output_std"}, rel=1e-5
        )


def test_the_recall_of_the_search_is_measured_at_the_steps_that_are_reported():
    """An exact search has recall one, whatever was selected; ours is measured against it on 64 tokens of the batch."""
    module = make_module(1, memory_interval_steps=3)
    for step in (1, 2):
        module.trainer.global_step = step
        module.train_batch(batch())
    assert all("search_recall" not in meter.read() for meter in module.memory_meters)
    module.trainer.global_step = 3
    module.train_batch(batch())
    whole = make_module(memory_interval_steps=1)
    whole.train_batch(batch())
    for meter, other in zip(module.memory_meters, whole.memory_meters, strict=True):
        assert 0.1 < meter.read()["search_recall"] < 1
        assert meter.sums[5] == 4 * 16
        # The same 64 tokens with the same weights, as one micro-batch.
        assert meter.read()["search_recall"] == pytest.approx(other.read()["search_recall"])


def test_dropout_depends_on_seed_and_step_only():
    module = make_module(model=tiny_model())
    losses = []
    for step, disturbance in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(disturbance)
        module.trainer.global_step = step
        module.train_batch(batch())
        losses.append(module.trainer.metrics["train/CE loss"])
    assert losses[0] == losses[1] != losses[2]


def test_dry_run_does_nothing():
    module = make_module()
    state = torch.get_rng_state()
    module.train_batch(batch(), dry_run=True)
    assert all(parameter.grad is None for parameter in module.model.parameters())
    assert module.trainer.metrics == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_eval_batch_gives_losses_per_position_without_dropout():
    module = make_module(model=tiny_model())
    input_ids = batch()["input_ids"]
    labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    module.model.train()
    logits, losses = module.eval_batch({"input_ids": input_ids}, labels)
    assert module.model.training
    assert logits.shape == (4, 16, VOCAB_SIZE)
    assert losses.shape == (4, 16)
    assert (losses[:, -1] == 0).all()
    assert torch.equal(losses, module.eval_batch({"input_ids": input_ids}, labels)[1])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    assert (losses.sum() / 60).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loading_keeps_the_configs_rates_and_the_checkpoints_moments():
    module = make_module(lr=0.01)
    module.train_batch(batch())
    module.optim_step()
    state = module.state_dict()
    other = make_module(lr=0.5, betas=(0.8, 0.9))
    other.load_state_dict(state)
    for group in other.optim.param_groups:
        assert (group["initial_lr"], group["betas"]) == (0.5, (0.8, 0.9))
    for (name, a), b in zip(module.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(module.optim.state[a]["exp_avg"], other.optim.state[b]["exp_avg"]), name
        assert float(other.optim.state[b]["step"]) == 1


def as_dense(module):
    """Gradients with the collected ones spread over their tables."""
    collected = {
        id(table): torch.zeros_like(table).index_copy(0, *pair) for table, pair in module.optim.coalesce().items()
    }
    return {
        name: collected[id(parameter)] if id(parameter) in collected else parameter.grad.clone()
        for name, parameter in module.model.named_parameters()
    }


@pytest.mark.parametrize("micro_batch_sequences", [None, 1])
def test_rows_take_the_step_that_dense_gradients_take_where_they_touch(micro_batch_sequences):
    """Several layers share the pool; gradients, norms before and after clipping, rates and changes are the same."""
    modules = [make_module(table_gradients="dense", table_max_grad_norm=1e-3)]
    modules += [make_module(micro_batch_sequences, table_gradients="rows", table_max_grad_norm=1e-3)]
    before = {name: parameter.detach().clone() for name, parameter in modules[0].model.named_parameters()}
    for module in modules:
        module.train_batch(batch())
    dense, rows = modules
    expected, pool = gradients(dense), rows.model.model.memory_pool
    assert pool.values.grad is None
    assert pool.pre_values.grad is None
    for name, gradient in as_dense(rows).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    touched = {id(table): pair[0] for table, pair in rows.optim.coalesce().items()}
    for module in modules:
        module.optim_step()
    assert rows.trainer.metrics == pytest.approx(dense.trainer.metrics, rel=1e-5)
    assert rows.trainer.metrics["optim/tables grad norm"] > 1e-3
    assert rows.learning_rates == dense.learning_rates
    for (name, parameter), twin in zip(rows.model.named_parameters(), dense.model.parameters(), strict=True):
        if id(parameter) not in touched:
            torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6, msg=name)
            continue
        hit = torch.zeros(len(parameter), dtype=torch.bool).index_fill(0, touched[id(parameter)], True)
        assert 0 < hit.sum() < len(hit)
        torch.testing.assert_close(parameter[hit], twin[hit], rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(parameter[~hit], before[name][~hit])
    rows.zero_grads()
    assert all(not len(table_rows) for table_rows, _ in rows.optim.coalesce().values())


def test_a_step_with_row_gradients_that_are_nan_is_not_taken():
    module = make_module(table_gradients="rows")
    module.train_batch(batch())
    module.optim.coalesce()[module.model.model.memory_pool.values][1][0, 0] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    with pytest.raises(TrainingError, match="tables grad norm nan"):
        module.optim_step()
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_gradient_checkpointing_collects_every_row_once():
    plain, recomputing = make_module(table_gradients="rows"), make_module(table_gradients="rows")
    recomputing.model.gradient_checkpointing_enable()
    for module in (plain, recomputing):
        module.train_batch(batch())
    for a, b in zip(plain.optim.coalesce().values(), recomputing.optim.coalesce().values(), strict=True):
        assert torch.equal(a[0], b[0])
        torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_loading_row_wise_state_keeps_every_bit(moments):
    """Through torch's distributed state dictionaries, as training states are saved and loaded."""
    options = {"table_gradients": "rows", "table_moments": moments}
    module, other = make_module(**options), make_module(**options)
    module.train_batch(batch())
    module.optim_step()
    fresh = other.state_dict()  # OLMo-core makes an optimizer create its state this way before it loads
    saved = copy.deepcopy(module.state_dict())
    assert {key: value.dtype for key, value in fresh["optim"]["state"]["model.memory_pool.values"].items()} == {
        key: value.dtype for key, value in saved["optim"]["state"]["model.memory_pool.values"].items()
    }
    other.load_state_dict(saved)
    for module_ in (module, other):
        module_.zero_grads()
        module_.train_batch(batch(1))
        module_.optim_step()
    for (name, a), b in zip(module.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in module.optim.state[a].items():
            assert torch.equal(value, other.optim.state[b][key]), (name, key)
