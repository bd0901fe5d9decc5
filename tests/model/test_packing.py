"""Several documents in one sequence: each gives what it gives alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import tiny_llama, tiny_ultramem
from ultramem.model.packing import document_positions

END = 0
MOE = {"type": "moe", "num_experts": 4, "num_experts_per_tok": 2}


def test_positions_restart_after_every_end():
    ids_BT = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 6, 7, 8, 9, 5, 0]])
    assert document_positions(ids_BT, END).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_positions_count_from_the_last_end(ids):
    expected, position = [], 0
    for token in ids:
        expected.append(position)
        position = 0 if token == END else position + 1
    assert document_positions(torch.tensor([ids]), END).tolist() == [expected]


def packed_documents():
    """Two rows of 23 tokens: documents of 7, 1, 11 and 4 tokens; of 16 and 7, the last one cut off."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(2, 400, (2, 23), generator=generator)
    cuts = [[7, 8, 19, 23], [16, 23]]
    for row, ends in zip(ids_BT, cuts, strict=True):
        row[[end - 1 for end in ends]] = END
    ids_BT[1, -1] = 5
    return ids_BT, [list(zip([0, *ends[:-1]], ends, strict=True)) for ends in cuts]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "build",
    [
        tiny_llama,
        tiny_ultramem,
        lambda **options: tiny_ultramem(memory=None, ffn=MOE, **options),
        lambda **options: tiny_ultramem(memory={"type": "ultramem", "num_keys": 12, "key_dim": 8}, **options),
    ],
    ids=["llama", "ultramem_v2", "moe", "ultramem"],
)
def test_logits_of_packed_documents_equal_those_of_each_alone(build, attention):
    model = build(dtype=torch.float64)
    model.set_attn_implementation(attention)
    # The softmax of eager attention and of the routers is in fp32 whatever the model's dtype.
    is_moe = (getattr(model.config, "ffn", None) or {}).get("type") == "moe"
    atol = 1e-5 if attention == "eager" or is_moe else 1e-12
    ids_BT, spans = packed_documents()
    with torch.no_grad():
        packed = model(input_ids=ids_BT, position_ids=document_positions(ids_BT, END), use_cache=False).logits
        unmasked = model(input_ids=ids_BT, use_cache=False).logits
        for row, documents in enumerate(spans):
            for start, end in documents:
                alone = model(input_ids=ids_BT[row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=0, atol=atol)
    # The test would not notice a mask that does nothing, did the documents before not matter.
    assert (packed - unmasked).abs().max() > 1e-3
