"""What a retrieval keeps of weights that stand still: never older than the weights, whatever changed them."""

import copy
import io

import pytest
import torch

from tiny_memories import memory_layer, tokens
from tolerances import assert_bit_equal
from ultramem.layers.derived import Derived


@pytest.fixture
def warm():
    """A retrieval in evaluation mode that has its keys at hand, and tokens."""
    layer, _ = memory_layer(dtype=torch.float32, query_per_rank=True)
    retrieval, x = layer.retrieval.eval(), tokens(6, dtype=torch.float32)
    with torch.no_grad():
        retrieval(x)
    return retrieval, x


def assert_up_to_date(retrieval, x):
    """The same numbers as a retrieval of the same state that has nothing at hand."""
    fresh = copy.deepcopy(retrieval)
    with torch.no_grad():
        ours, theirs = retrieval(x), fresh(x)
    for name in ("scores_NHKC", "slots_NHK", "keys"):
        assert_bit_equal(getattr(ours, name), getattr(theirs, name))
    assert_bit_equal(retrieval.singular_values(), fresh.singular_values())


def scale_in_place(retrieval):
    with torch.no_grad():
        retrieval.keys.mul_(torch.randn_like(retrieval.keys))
        retrieval.cores.add_(torch.rand_like(retrieval.cores))


def change_gain(retrieval):
    with torch.no_grad():
        retrieval.key_norm.copy_(torch.rand_like(retrieval.key_norm))


def change_directions(retrieval):
    retrieval.row_direction.copy_(torch.randn_like(retrieval.row_direction))


def load(retrieval):
    state = {name: torch.rand_like(tensor) for name, tensor in retrieval.state_dict().items()}
    retrieval.load_state_dict(state)


def load_by_assignment(retrieval):
    state = {name: torch.rand_like(tensor) for name, tensor in retrieval.state_dict().items()}
    retrieval.load_state_dict(state, assign=True)


def step_of_an_optimizer(retrieval):
    optimizer = torch.optim.AdamW(retrieval.parameters(), lr=0.1)
    retrieval(tokens(3, dtype=torch.float32)).scores_NHKC.square().sum().backward()
    optimizer.step()


def there_and_back(retrieval):
    """bf16 and fp32 again: rounded weights in the same parameters."""
    retrieval.bfloat16().float()


def exchange_weights_behind_the_version(retrieval):
    """As averaged weights are put in for an evaluation, which calls eval()."""
    retrieval.keys.data.copy_(torch.randn_like(retrieval.keys))
    retrieval.eval()


def refresh_after_a_write_behind_the_version(retrieval):
    retrieval.keys.data.copy_(torch.randn_like(retrieval.keys))
    retrieval.cores.data.copy_(torch.rand_like(retrieval.cores))
    retrieval.refresh()


CHANGES = [
    scale_in_place,
    change_gain,
    change_directions,
    load,
    load_by_assignment,
    step_of_an_optimizer,
    there_and_back,
    exchange_weights_behind_the_version,
    refresh_after_a_write_behind_the_version,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen(warm, change):
    retrieval, x = warm
    with torch.no_grad():
        before = retrieval(x).keys.clone()
    change(retrieval)
    assert_up_to_date(retrieval, x)
    if change is not change_directions:
        assert not torch.equal(retrieval(x).keys, before)


def test_keys_are_normalised_once_for_weights_that_stand_still(warm):
    retrieval, x = warm
    with torch.no_grad():
        assert retrieval(x).keys is retrieval(x).keys
    assert retrieval.singular_values() is retrieval.singular_values()


def test_a_pass_with_gradients_reaches_the_raw_keys(warm):
    retrieval, x = warm
    retrieval(x).scores_NHKC.square().sum().backward()
    for parameter in (retrieval.keys, retrieval.key_norm, retrieval.cores, retrieval.query_proj.weight):
        assert parameter.grad.abs().sum() > 0


def test_a_pass_with_gradients_drops_what_was_at_hand(warm):
    """FSDP writes into gathered parameters without counting versions: only steps and evaluations alternate."""
    retrieval, x = warm
    retrieval(x)
    retrieval.keys.data.copy_(torch.randn_like(retrieval.keys))
    assert_up_to_date(retrieval, x)


def test_a_copy_starts_without_a_value(warm):
    """Its versions count from zero and could meet those of the original."""
    retrieval, x = warm
    copied = copy.deepcopy(retrieval)
    for _ in range(4):
        scale_in_place(copied)
        assert_up_to_date(copied, x)


def test_pickled_modules_hold_nothing_derived(warm):
    retrieval, x = warm
    file = io.BytesIO()
    torch.save(retrieval, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded._searched_keys._value is None
    assert_up_to_date(loaded, x)


def test_inference_mode(warm):
    retrieval, x = warm
    with torch.inference_mode():
        inside = retrieval(x).scores_NHKC.clone()
    scale_in_place(retrieval)
    with torch.inference_mode():
        assert not torch.equal(retrieval(x).scores_NHKC, inside)
    assert_up_to_date(retrieval, x)
    # What inference mode computed must not be what a later pass saves for its backward.
    retrieval(x).scores_NHKC.sum().backward()


def test_weights_without_versions_are_never_kept():
    with torch.inference_mode():
        source = torch.ones(3)
        derived = Derived()
        first = derived.get((source,), torch.float32, source.clone)
        source.add_(1)
        assert not torch.equal(derived.get((source,), torch.float32, source.clone), first)


def test_another_dtype_is_another_value():
    source = torch.ones(3)
    derived = Derived()
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert derived.get((source,), dtype, lambda dtype=dtype: source.to(dtype)).dtype == dtype


def test_a_compiled_pass_is_right_after_a_change(warm, fresh_compiler):
    retrieval, x = warm
    compiled = torch.compile(retrieval, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x).scores_NHKC, retrieval(x).scores_NHKC)
        scale_in_place(retrieval)
