"""Parity with published implementations: their fixtures rebuilt as our layers, run, and compared number by number."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ultramem.errors import CheckpointError
from ultramem.layers import MemoryPool, UltraMemV2, UltraMemV2Config
from ultramem.layers.retrieval import Retrieved

ABSOLUTE_TOLERANCE = 1e-5
RELATIVE_TOLERANCE = 1e-4

# Published name → attribute of our layer or of its pool.
_PUBLISHED_TENSORS = {
    "keys": "retrieval.keys",
    "query_proj.weight": "retrieval.query_proj.weight",
    "query_norm.weight": "retrieval.query_norm",
    "keys_norm.weight": "retrieval.key_norm",
    "pre_values_proj.weight": "pre_proj.weight",
    "values_proj.weight": "out_proj.weight",
    "shuffle_index": "permutation",
    "tucker_core_u": "retrieval.row_direction",
    "tucker_core_v": "retrieval.col_direction",
    "values_for_look_up": "values",
    "pre_values_for_look_up": "pre_values",
}


@dataclass(frozen=True)
class ParityReport:
    """How far our layer is from one fixture.

    Attributes:
        path: the fixture.
        layer: name of the layer in the fixture.
        output_error: largest absolute error of the output.
        gradient_error: largest absolute error over all gradients.
        failures: what lies outside the pass mark (1e-5 + 1e-4 relative), a line each; empty for a pass.
    """

    path: Path
    layer: str
    output_error: float
    gradient_error: float
    failures: tuple[str, ...]


def check_fixture(path: Path) -> ParityReport:
    """Compare our layer with one fixture: output, selected slots, their scores, auxiliary losses, every gradient.

    Slots, scores and auxiliary losses are compared where the fixture holds them.

    Args:
        path: a safetensors file whose header holds the layer's settings under the released names
            (tests/golden/README.md).

    Raises:
        CheckpointError: the file cannot be read or is no fixture of a layer that exists here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors fixture: {error}. Name a fixture file, or copy it again."
        ) from None
    builders = {"ultramem_v2": _check_ultramem_v2}
    layer = settings.get("layer", "")
    if layer not in builders:
        raise CheckpointError(
            f"{path} is no fixture of a layer that is built here: its header names layer {layer!r}; known: "
            f"{', '.join(builders)}. Name fixtures of known layers only."
        )
    remedy = "Write the fixture again, header and tensors from one run (tests/golden/README.md)."
    try:
        return builders[layer](path, settings, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}, which a fixture of {layer} must hold. {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is no consistent fixture of {layer}: {error} {remedy}") from None


def ultramem_v2_config(settings: dict[str, str]) -> UltraMemV2Config:
    """The layer's settings from a fixture's header, in released names."""
    expansion, virtual = int(settings["mem_key_expand_time"]), int(settings["value_expand_time"])
    return UltraMemV2Config(
        num_keys=int(settings["knum"]),
        key_dim=int(settings["kdim"]),
        value_dim=int(settings["vdim"]),
        pre_value_dim=int(settings["pre_vdim"]),
        top_k=int(settings["knn"]),
        num_heads=int(settings["head"]),
        num_cores=int(settings["tucker_multihead"]),
        rank=int(settings["tucker_rank"]),
        key_expansion=expansion,
        projection="project" if virtual > 1 else "sum",
        share_ratio=float(settings["share_ratio"]),
        query_per_rank=settings["mem_q_for_each_tucker_rank"] == "True",
        pre_value_activation="gelu" if settings["mem_use_glu_act"] == "True" else None,
        key_balance_weight=float(settings["mem_key_balance_reg_coef"]),
    )


def _load(layer: UltraMemV2, pool: MemoryPool, tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Fill the layer and its pool; returns every parameter under its published name ('x' excluded)."""
    parameters: dict[str, nn.Parameter] = {}
    ours = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **dict(pool.named_parameters())}
    places = {published: ours[name] for published, name in _PUBLISHED_TENSORS.items() if name in ours}
    places |= {f"tucker_core.{index}": core for index, core in enumerate(layer.retrieval.cores.detach())}
    with torch.no_grad():
        # A fixture without affine norms has no gains: they are one.
        nn.init.ones_(layer.retrieval.query_norm)
        nn.init.ones_(layer.retrieval.key_norm)
        for name, value in tensors.items():
            kind, _, published = name.partition(".")
            if kind not in ("param", "buffer"):
                continue
            target = places.get(published)
            if target is None:
                raise ValueError(f"it holds {name}, which the layer that its header describes does not have.")
            if value.numel() != target.numel():
                raise ValueError(f"{name} has shape {list(value.shape)}, its header asks for {list(target.shape)}.")
            target.copy_(value.view(target.shape))
            if isinstance(target, nn.Parameter):
                parameters[published] = target
    return parameters


def _check_ultramem_v2(path: Path, settings: dict[str, str], tensors: dict[str, Tensor]) -> ParityReport:
    config = ultramem_v2_config(settings)
    num_memories = int(settings["mem_layer_num"])
    pool = UltraMemV2.make_pool(config, num_memories)
    layer = UltraMemV2(int(settings["hidden_size"]), config, num_memories, int(settings["layer_id"])).eval()
    failures = [
        f"{name} is {ours} here and {settings[name]} in the fixture"
        for name, ours in {
            "rows_total": layer.window.num_rows,
            "rows_window": layer.window.size,
            "window_offset": layer.window.offset,
            "keys_per_axis": layer.retrieval.keys.shape[2],
        }.items()
        if ours != int(settings[name])
    ]
    if failures:
        return ParityReport(path, "ultramem_v2", float("nan"), float("nan"), tuple(failures))
    parameters = _load(layer, pool, tensors)
    if not tensors["in.x"].shape == tensors["in.grad_y"].shape == (*tensors["in.x"].shape[:-1], layer.hidden_size):
        raise ValueError(f"in.x and in.grad_y must both be [..., {layer.hidden_size}].")

    x = tensors["in.x"].clone().requires_grad_()
    result = layer(x, pool)
    loss = (result.output * tensors["in.grad_y"]).sum() + sum(result.losses.values())
    loss.backward()
    with torch.no_grad():
        retrieved = layer.retrieval(x.reshape(-1, layer.hidden_size))
    checks = {"output": (result.output, tensors["out.y"])}
    if "out.tucker_aux_loss" in tensors:
        checks["tucker_aux_loss"] = (layer.retrieval.tucker_penalty(0.15), tensors["out.tucker_aux_loss"].squeeze())
    if "out.balance_loss" in tensors:
        checks["balance_loss"] = (layer.retrieval.key_balance(retrieved), tensors["out.balance_loss"].squeeze())
    num_other, score_pair = _compare_retrieval(retrieved, tensors)
    if num_other:
        failures.append(f"{num_other} tokens select other slots")
    if score_pair is not None:
        checks["scores"] = score_pair

    gradients = {"x": (x.grad, tensors["grad.x"])}
    for name, parameter in parameters.items():
        gradients[name] = (parameter.grad, tensors[f"grad.{name}"])
    for core in range(config.num_cores):
        gradients[f"tucker_core.{core}"] = (layer.retrieval.cores.grad[core], tensors[f"grad.tucker_core.{core}"])
    gradients = {f"grad.{name}": pair for name, pair in gradients.items()}
    for name, (ours, published) in {**checks, **gradients}.items():
        if ours.shape != published.shape:
            raise ValueError(f"{name} has shape {list(published.shape)}, its header asks for {list(ours.shape)}.")
        excess = (ours - published).abs() - ABSOLUTE_TOLERANCE - RELATIVE_TOLERANCE * published.abs()
        if not (excess <= 0).all():
            failures.append(f"{name} differs by up to {_largest_error(ours, published):.2e}")
    return ParityReport(
        path,
        "ultramem_v2",
        _largest_error(*checks["output"]),
        float(torch.tensor([_largest_error(*pair) for pair in gradients.values()]).max()),
        tuple(failures),
    )


def _compare_retrieval(retrieved: Retrieved, tensors: dict[str, Tensor]) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """Tokens that select other slots, and the scores [N, H·k, cores] of both sides in one order; None if not held."""
    slots, scores = retrieved.slots_NHK.flatten(1), retrieved.scores_NHKC.flatten(1, 2)
    published_slots = tensors.get("out.virtual_indices_before_shuffle")
    published_scores = tensors.get("out.scores")
    for name, ours, published in (
        ("out.virtual_indices_before_shuffle", slots, published_slots),
        ("out.scores", scores, published_scores),
    ):
        if published is not None and published.shape != ours.shape:
            raise ValueError(f"{name} must be {list(ours.shape)}, is {list(published.shape)}.")
    if published_slots is None:
        # Without slots nothing says which score is whose: a core's scores of a token agree in sorted order at least.
        pair = None if published_scores is None else (scores.sort(1).values, published_scores.sort(1).values)
        return 0, pair
    slots, order = slots.sort(stable=True)
    published_slots, published_order = published_slots.long().sort(stable=True)
    num_other = int((slots != published_slots).any(1).sum())
    if published_scores is None:
        return num_other, None
    return num_other, (_reorder(scores, order), _reorder(published_scores, published_order))


def _reorder(scores_NKC: Tensor, order_NK: Tensor) -> Tensor:
    return scores_NKC.gather(1, order_NK[..., None].expand(scores_NKC.shape))


def _largest_error(ours: Tensor, published: Tensor) -> float:
    return float((ours - published).detach().abs().max())
