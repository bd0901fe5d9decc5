import numpy as np
import torch

from tiny_models import tiny_ultramem
from ultramem.evaluation.usage import count_slot_reads


def test_reads_are_those_of_the_forward_pass(tmp_path):
    model = tiny_ultramem(97)
    tokens = np.random.default_rng(0).integers(0, 97, 41).astype("<u2")
    tokens.tofile(tmp_path / "a.npy")
    model.train()
    counts = count_slot_reads(model, [tmp_path / "a.npy"], sequence_length_tokens=8, batch_size=2)
    assert model.training
    model.eval()
    expected = [torch.zeros(num_slots, dtype=torch.int64) for num_slots in model.num_slots_per_memory]
    for start in range(0, 40, 8):
        window = torch.from_numpy(tokens[start : start + 8].astype(np.int64))[None]
        for number, statistics in enumerate(model(input_ids=window, output_memory_statistics=True).memory_statistics):
            for slot in statistics["slots_NK"].flatten().tolist():
                expected[number][slot] += 1
    assert len(counts) == 2
    for counts_S, expected_S in zip(counts, expected, strict=True):
        assert torch.equal(counts_S, expected_S)
    assert counts[0].sum() == 40 * model.config.memory["top_k"]
