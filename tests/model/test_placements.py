"""Where memories stand and whose rows they read: in place of the FFN, on one table, for every type."""

import pytest
import torch

from tiny_memories import SIZES, decoder, decoder_config, token_ids
from tolerances import assert_close
from ultramem.model import cost_card

kinds = pytest.mark.parametrize("kind", SIZES)


def build(kind, dtype=torch.float64, **memory):
    return decoder(dtype, memory={"type": kind, **memory})


@kinds
@pytest.mark.parametrize("placement", [[1], "0:1/1:2"], ids=str)
def test_a_memory_in_place_of_the_ffn(kind, placement):
    model = build(kind, placement=placement, position="replace")
    starts = {1} if placement == [1] else {0, 1}
    assert model.config.replaced_blocks == starts
    for index, block in enumerate(model.model.layers):
        assert (block.mlp is None) == (index in starts)
        names = {name.split(".")[0] for name, _ in block.named_parameters()}
        assert ("mlp" in names) == (index not in starts)
    # Where the memory is silent, the block is its attention alone.
    memories = model.model.memories
    with torch.no_grad():
        for memory in memories:
            memory.zero_output(model.model.memory_pool)
    states = model(token_ids(1, 5), output_hidden_states=True).hidden_states
    block = model.model.layers[0 if 0 in starts else 1]
    before, after = states[block.layer_idx], states[block.layer_idx + 1]
    position = torch.arange(5)[None]
    mask = torch.full((5, 5), float("-inf"), dtype=before.dtype).triu(1)
    attended, _ = block.self_attn(
        block.input_layernorm(before),
        position_embeddings=model.model.rotary_emb(before, position),
        attention_mask=mask[None, None],
    )
    assert_close(after, before + attended)


@kinds
def test_costs_of_a_replaced_ffn(kind):
    beside, instead = (
        cost_card(decoder_config(memory={"type": kind, "placement": [0, 2], "position": position}))
        for position in ("parallel", "replace")
    )
    ffn = 3 * 32 * 40
    assert beside.dense_parameters - instead.dense_parameters == 2 * ffn
    assert beside.active_parameters - instead.active_parameters == 2 * ffn
    assert beside.flops_per_token() - instead.flops_per_token() == 2 * 2 * ffn
    assert beside.bytes_per_decode_step(1) - instead.bytes_per_decode_step(1) == 2 * 2 * ffn
    assert beside.table_parameters == instead.table_parameters


@kinds
def test_placement_and_position_change_the_output(kind):
    base = {"placement": [0, 1], "position": "parallel", "tables": "private"}
    changes = [{}, {"placement": [0, 2]}, {"placement": "0:0/1:2"}, {"position": "replace"}, {"tables": "shared"}]
    logits = [build(kind, **{**base, **change})(token_ids(1, 5)).logits for change in changes]
    for index, other in enumerate(logits[1:], start=1):
        assert not torch.allclose(logits[0], other), changes[index]


@kinds
def test_one_table_for_all_layers_learns_from_each(kind):
    model = build(kind, tables="shared")
    pool = model.model.memory_pool
    assert pool.num_rows == 36
    assert {(memory.window.offset, memory.window.size) for memory in model.model.memories} == {(0, 36)}
    model.set_table_gradients("rows")
    model(token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    assert len(pool.value_gradients.contributions) == 3
    for part in pool.value_gradients.contributions:
        assert 0 <= part.idx_NK.min() <= part.idx_NK.max() < 36
        assert part.w_NKC.abs().sum() > 0
        assert part.x_NV.abs().sum() > 0


@kinds
@pytest.mark.parametrize("tables", ["private", "shared", "ring"])
def test_tables_have_the_rows_that_are_asked_for(kind, tables):
    share = {"share_ratio": 0.7} if tables == "ring" else {}
    model = build(kind, torch.float32, tables=tables, **share)
    memories, pool = model.model.memories, model.model.memory_pool
    assert pool.num_rows == (36 if tables == "shared" else 3 * 36)
    # ⌊√(0.7 · 3 · 36)⌋ = 8
    size = 64 if tables == "ring" else 36
    offsets = [0, 0, 0] if tables == "shared" else [0, 36, 72]
    assert [(memory.window.offset, memory.window.size) for memory in memories] == [(start, size) for start in offsets]
    assert cost_card(model.config).table_parameters == sum(table.numel() for table in pool.parameters())
