"""Parity with published implementations: their fixtures rebuilt as our layers, run, and compared number by number."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultramem.errors import CheckpointError, ConfigError
from ultramem.evaluation.released import OPTIONAL_TENSORS, RELEASED_LAYERS, ReleasedLayer, build, gradients, places
from ultramem.layers import MemoryLayer, MemoryPool
from ultramem.layers.retrieval import Retrieved
from ultramem.layers.tucker_memory import TuckerMemory

ABSOLUTE_TOLERANCE = 1e-5
RELATIVE_TOLERANCE = 1e-4


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


def check_fixture(path: Path, device: torch.device | str = "cpu") -> ParityReport:
    """Compare our layer with one fixture: output, selected slots, their scores, auxiliary losses, every gradient.

    Slots, scores and auxiliary losses are compared where the fixture holds them.

    Args:
        path: a safetensors file whose header holds the layer's settings under the released names
            (tests/golden/README.md).
        device: where the layer runs.

    Raises:
        CheckpointError: the file cannot be read or is no fixture of a layer that exists here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors fixture: {error}. Name a fixture file, or copy it again."
        ) from None
    layer = settings.get("layer", "")
    if layer not in RELEASED_LAYERS:
        raise CheckpointError(
            f"{path} is no fixture of a layer that is built here: its header names layer {layer!r}; known: "
            f"{', '.join(RELEASED_LAYERS)}. Name fixtures of known layers only."
        )
    remedy = "Write the fixture again, header and tensors from one run (tests/golden/README.md)."
    try:
        return _check(path, layer, settings, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}, which a fixture of {layer} must hold. {remedy}") from None
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is no consistent fixture of {layer}: {error} {remedy}") from None


def _load(released: ReleasedLayer, layer: MemoryLayer, pool: MemoryPool, tensors: dict[str, Tensor]) -> set[str]:
    """Give layer and pool memory and fill them, absent gains with one; returns the published names of what was held."""
    weights: dict[str, Tensor] = {}
    shapes = {name: list(target.shape) for name, target in places(released, layer, pool).items()}
    for name, value in tensors.items():
        kind, _, published = name.partition(".")
        if kind not in ("param", "buffer"):
            continue
        shape = shapes.get(published)
        if shape is None:
            raise ValueError(f"it holds {name}, which the layer that its header describes does not have.")
        if value.numel() != math.prod(shape):
            raise ValueError(f"{name} has shape {list(value.shape)}, its header asks for {shape}.")
        weights[published] = value
    if missing := sorted(shapes.keys() - weights.keys() - OPTIONAL_TENSORS):
        raise ValueError(f"it lacks the weights {', '.join(missing)} of the layer that its header describes.")
    layer.to_empty(device=tensors["in.x"].device)
    pool.to_empty(device=tensors["in.x"].device)
    with torch.no_grad():
        for published, target in places(released, layer, pool).items():
            target.copy_(weights[published].view(target.shape) if published in weights else torch.ones(()))
    return set(weights)


def _check(path: Path, name: str, header: dict[str, str], tensors: dict[str, Tensor]) -> ParityReport:
    released = RELEASED_LAYERS[name]
    layer, pool, failures = build(released, header)
    if failures:
        return ParityReport(path, name, float("nan"), float("nan"), tuple(failures))
    filled = _load(released, layer, pool, tensors)
    if not tensors["in.x"].shape == tensors["in.grad_y"].shape == (*tensors["in.x"].shape[:-1], layer.hidden_size):
        raise ValueError(f"in.x and in.grad_y must both be [..., {layer.hidden_size}].")

    x = tensors["in.x"].clone().requires_grad_()
    result = layer(x, pool)
    loss = (result.output * tensors["in.grad_y"]).sum() + sum(result.losses.values())
    loss.backward()
    with torch.no_grad():
        retrieved = layer.retrieval(x.reshape(-1, layer.hidden_size))
    checks = {"output": (result.output, tensors["out.y"])}
    if isinstance(layer, TuckerMemory):
        if "out.tucker_aux_loss" in tensors:
            checks["tucker_aux_loss"] = (layer.retrieval.tucker_penalty(0.15), tensors["out.tucker_aux_loss"].squeeze())
        if "out.balance_loss" in tensors:
            checks["balance_loss"] = (layer.retrieval.key_balance(retrieved), tensors["out.balance_loss"].squeeze())
    num_other, score_pair = _compare_retrieval(retrieved, released, tensors)
    if num_other:
        failures.append(f"{num_other} tokens select other slots")
    if score_pair is not None:
        checks["scores"] = score_pair

    gradient_pairs = {"grad.x": (x.grad, tensors["grad.x"])}
    for published, gradient in gradients(released, layer, pool).items():
        if published in filled:
            assert gradient is not None
            expected = tensors[f"grad.{published}"]
            if expected.numel() == gradient.numel():
                expected = expected.view(gradient.shape)
            gradient_pairs[f"grad.{published}"] = (gradient, expected)
    for compared, (ours, theirs) in {**checks, **gradient_pairs}.items():
        if ours.shape != theirs.shape:
            raise ValueError(f"{compared} has shape {list(theirs.shape)}, its header asks for {list(ours.shape)}.")
        excess = (ours - theirs).abs() - ABSOLUTE_TOLERANCE - RELATIVE_TOLERANCE * theirs.abs()
        if not (excess <= 0).all():
            failures.append(f"{compared} differs by up to {_largest_error(ours, theirs):.2e}")
    return ParityReport(
        path,
        name,
        _largest_error(*checks["output"]),
        float(torch.tensor([_largest_error(*pair) for pair in gradient_pairs.values()]).max()),
        tuple(failures),
    )


def _compare_retrieval(
    retrieved: Retrieved, released: ReleasedLayer, tensors: dict[str, Tensor]
) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """Tokens that select other slots, and the scores [N, H·k, cores] of both sides in one order; None if not held."""
    slots, scores = retrieved.slots_NHK.flatten(1), retrieved.scores_NHKC.flatten(1, 2)
    names = (f"out.{released.slots}", f"out.{released.scores}")
    published = [tensors.get(name) for name in names]
    for index, (name, ours) in enumerate(zip(names, (slots, scores), strict=True)):
        theirs = published[index]
        if theirs is not None and theirs.numel() != ours.numel():
            raise ValueError(f"{name} must be {list(ours.shape)}, is {list(theirs.shape)}.")
        published[index] = None if theirs is None else theirs.reshape(ours.shape)
    published_slots, published_scores = published
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
