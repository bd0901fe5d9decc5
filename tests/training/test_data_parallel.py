"""One batch over two processes against the same batch in one, in fp64: gradients, what is split, what travels."""

import pytest
import torch

from parallel_workers import NUM_SEQUENCES, batch_of, build_module, fail_on_first, measure_shared, train_one_batch
from tiny_training import VOCAB_SIZE, start_processes
from ultramem.evaluation.perplexity import evaluate_perplexity
from ultramem.model.roles import parameter_roles
from ultramem.training.data_parallel import clip_gradients_

pytestmark = pytest.mark.dist

PKM = {"type": "pkm", "num_keys": 8, "key_dim": 8, "top_k": 4, "query_norm": "batch"}
MEMORY = {"num_keys": 8, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8, "top_k": 4, "search": "exact"}
MOE = {"type": "moe", "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
MODELS = {
    "dense": {"memory": None},
    "ultramem_v2": {"memory": MEMORY | {"tucker_penalty_weight": 3.0, "tucker_penalty_margin": 0.0}},
    "moe": {"memory": None, "ffn": MOE | {"router_z_loss_coef": 0.0}},
}


def in_two_processes(folder, function, *arguments):
    for process in start_processes(function, folder, *arguments):
        process.join(300)
        assert process.exitcode == 0


def results_of(folder, parallel, micro_batch_sequences, model):
    folder = folder / f"{parallel}-{micro_batch_sequences}"
    folder.mkdir()
    in_two_processes(folder, train_one_batch, parallel, micro_batch_sequences, model)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def reference(model):
    """The same sequences as one batch of one process."""
    module = build_module(None, 2 * NUM_SEQUENCES, **model)
    parts = [batch_of(rank) for rank in (0, 1)]
    module.train_batch({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    return module


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_mean_over_all_targets(tmp_path, name, parallel):
    """Also of tables and auxiliary losses, with unequal numbers of targets; they travel once per batch."""
    expected = reference(MODELS[name])
    at_once, in_parts = (results_of(tmp_path, parallel, size, MODELS[name]) for size in (NUM_SEQUENCES, 1))
    for result in (*at_once, *in_parts):
        assert float(result["loss"]) == pytest.approx(float(expected.batch_loss), rel=1e-6)
        for parameter_name, parameter in expected.model.named_parameters():
            gradient = result["gradients"][parameter_name]
            # The share of targets is an fp32 number; everything else is fp64.
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-9, msg=parameter_name)
        assert result["reductions"] == at_once[0]["reductions"]
    assert at_once[0]["reductions"].total() > 0


def test_fsdp_splits_all_but_tables_and_keys(tmp_path):
    roles = parameter_roles(build_module(None, 1, **MODELS["ultramem_v2"]).model)
    first, second = results_of(tmp_path, "fsdp", NUM_SEQUENCES, MODELS["ultramem_v2"])
    assert first["split"] == {name for name, role in roles.items() if role not in ("table", "key")}
    for name, gradient in first["gradients"].items():
        held = first["local_elements"][name] + second["local_elements"][name]
        assert held == gradient.numel() * (1 if name in first["split"] else 2), name


def test_running_statistics_are_averaged(tmp_path):
    first, second = results_of(tmp_path, "ddp", NUM_SEQUENCES, {"memory": PKM})
    means = []
    for rank in (0, 1):
        module = build_module(None, NUM_SEQUENCES, memory=PKM)
        module.train_batch(batch_of(rank))
        means.append({name: buffer for name, buffer in module.model.named_buffers() if "query_mean" in name})
    assert means[0]
    for name in means[0]:
        assert not torch.equal(means[0][name], means[1][name])
        assert torch.equal(first["buffers"][name], second["buffers"][name])
        torch.testing.assert_close(first["buffers"][name], (means[0][name] + means[1][name]) / 2)


def test_what_the_first_process_raises_all_raise(tmp_path):
    in_two_processes(tmp_path, fail_on_first)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["refused by process 0"] * 2


@pytest.mark.parametrize("max_norm", [0.5, float("inf")])
def test_clipping_in_one_process_is_torchs(max_norm):
    module = build_module(None, NUM_SEQUENCES, **MODELS["ultramem_v2"])
    module.train_batch(batch_of(0))
    parameters = list(module.model.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = clip_gradients_(parameters, max_norm)
    ours = [parameter.grad.clone() for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    assert torch.equal(torch.nn.utils.clip_grad_norm_(parameters, max_norm), norm)
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(parameters, ours, strict=True))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("num_tokens", "batch_size", "num_batches"),
    # One file; with its last short window, an odd and an even number of batches; a single one.
    [(8 * 16 + 5, 3, 4), (8 * 16 + 1, 2, 4), (6 * 16 + 3, 2, 4), (4 * 16 + 2, 2, 3), (5, 4, 1)],
)
def test_a_shared_evaluation_is_that_of_one_process(tmp_path, parallel, num_tokens, batch_size, num_batches):
    """Each process runs as many forward passes as any other, half of one process's, rounded up."""
    tokens = torch.randint(2, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(1))
    tokens.numpy().astype("<u2").tofile(tmp_path / "a.npy")
    options = {"sequence_length_tokens": 16, "batch_size": batch_size}
    in_two_processes(tmp_path, measure_shared, [tmp_path / "a.npy"], parallel, options)
    model = build_module(None, 1).model
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    expected = evaluate_perplexity(model, [tmp_path / "a.npy"], **options)
    assert len(forwards) == num_batches
    for rank in (0, 1):
        loss, num_predicted, num_forwards = torch.load(tmp_path / f"{rank}.pt")
        assert loss == pytest.approx(expected.loss, rel=1e-12)
        assert num_predicted == expected.num_tokens == num_tokens - 1
        assert num_forwards == -(-num_batches // 2)
