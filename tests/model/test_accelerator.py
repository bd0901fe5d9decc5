"""The package on an accelerator: what it computes there is what it computes on the CPU. `pytest -m gpu` runs these."""

import copy
from pathlib import Path

import pytest
import torch

from tiny_memories import DECODERS, VARIANTS, decoder, memory_layer, token_ids, tokens
from tolerances import assert_close
from ultramem.benchmarks.decode_step import fill_cache, make_step
from ultramem.evaluation.parity import check_fixture
from ultramem.ops import bag, triton, use_backend
from ultramem.ops.triton import tables

pytestmark = pytest.mark.gpu

FIXTURES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
DEVICE = "cuda"

decoders = pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)


def test_the_kernels_run_here():
    assert triton.why_unavailable() is None


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_fixtures_pass(path, backend):
    with use_backend(backend):
        assert not check_fixture(path, DEVICE).failures


def numbers(layer, pool, x):
    """Output and gradients of a layer, by name."""
    x = x.detach().requires_grad_()
    result = layer(x, pool)
    (result.output.square().sum() + sum(result.losses.values())).backward()
    parameters = [*layer.named_parameters(), *pool.named_parameters(), ("x", x)]
    return {"output": result.output, **{name: parameter.grad for name, parameter in parameters}}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_layers_compute_what_they_compute_on_the_cpu(changes):
    layer, pool = memory_layer(dtype=torch.float32, **changes)
    if getattr(layer.config, "query_norm", None) == "batch":
        # In training it takes the query's bias out again, whose gradient is then nothing but rounding.
        layer.eval()
    x = tokens(40, dtype=torch.float32)
    there = numbers(copy.deepcopy(layer).to(DEVICE), copy.deepcopy(pool).to(DEVICE), x.to(DEVICE))
    for name, expected in numbers(layer, pool, x).items():
        ours = there[name]
        if expected is not None:
            # Sums over tokens are as exact as their largest terms.
            scale = expected.abs().max().clamp(min=1)
            assert_close(ours.cpu() / scale, expected / scale)


@decoders
def test_decoders_compute_what_they_compute_on_the_cpu(settings):
    model, input_ids = decoder(torch.float32, **settings), token_ids(2, 12)
    expected = model(input_ids, labels=input_ids)
    expected.loss.backward()
    there = copy.deepcopy(model).to(DEVICE)
    there.zero_grad()
    output = there(input_ids.to(DEVICE), labels=input_ids.to(DEVICE))
    output.loss.backward()
    torch.testing.assert_close(output.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    for (name, ours), theirs in zip(there.named_parameters(), model.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad.cpu() / scale, theirs.grad / scale, rtol=1e-3, atol=1e-3, msg=name)


@decoders
def test_bf16_is_finite_and_near(settings):
    model, input_ids = decoder(torch.bfloat16, **settings).to(DEVICE), token_ids(2, 12).to(DEVICE)
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = copy.deepcopy(model).float()(input_ids, labels=input_ids)
    assert abs(output.loss - exact.loss) < 0.1


@decoders
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["reserved", "static"])
def test_greedy_text_is_that_of_the_cpu(settings, options, fresh_compiler):
    model, prompt = decoder(torch.float32, **settings), token_ids(2, 5)
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **greedy)
    there = model.to(DEVICE).generate(prompt.to(DEVICE), **greedy, **options)
    assert torch.equal(there.cpu(), expected)


@decoders
def test_compiles_without_a_graph_break(settings, fresh_compiler):
    model, input_ids = decoder(torch.float32, **settings).to(DEVICE), token_ids(2, 12).to(DEVICE)
    model.refresh_retrieval()
    expected = model(input_ids, labels=input_ids, use_cache=False)
    output = torch.compile(model, fullgraph=True)(input_ids, labels=input_ids, use_cache=False)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-3)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("settings", [settings for name, settings in DECODERS.items() if name != "ultramem"])
def test_a_decode_step_waits_for_nothing(settings):
    model, input_ids = decoder(torch.bfloat16, **settings).to(DEVICE), token_ids(3, 1).to(DEVICE)
    cache = fill_cache(model, 3, 7)
    with torch.inference_mode():
        model(input_ids, past_key_values=cache, use_cache=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = model(input_ids, past_key_values=cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert output.logits.isfinite().all()


def test_captured_steps_share_a_cache():
    """What one model's step leaves in the cache must not move it away under the graph of another."""
    models = [decoder(torch.float32, **DECODERS[name]).to(DEVICE) for name in ("every", "dense")]
    cache = fill_cache(models[0], 3, 7)
    steps = [make_step(model, cache, 3) for model in models]
    torch.cuda.empty_cache()
    for _ in range(2):
        for step in steps:
            logits = step.prepare()().clone()
            expected = step.run_with_statistics(step.last_ids_B1).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 8


def test_gradients_of_tables_repeat():
    idx = torch.randint(50, (4000, 32), device=DEVICE)
    w, table = torch.randn(4000, 32, device=DEVICE), torch.randn(50, 96, device=DEVICE, requires_grad=True)
    weight = torch.randn(4000, 96, device=DEVICE)
    first, again = (torch.autograd.grad(bag(idx, w, table), table, weight)[0] for _ in range(2))
    assert torch.equal(first, again)
    rows, sums = tables.scatter_rows(idx, w[..., None], weight, 50)
    assert torch.equal(first[rows], sums)
    expected = torch.zeros(50, 96, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, idx.flatten(), (w.double()[..., None] * weight.double()[:, None]).flatten(0, 1))
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-3)
