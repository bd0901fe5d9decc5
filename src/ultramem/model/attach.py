"""Memories beside the MLPs of other people's decoders: attached as an exact no-op, trained, saved and detached."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ultramem.errors import CheckpointError, ConfigError
from ultramem.files import staged_folder
from ultramem.layers import MEMORY_TYPES, MemoryConfig, MemoryLayer, add_losses, draw_pool, parse_placement
from ultramem.model.configuration import make_memory_config
from ultramem.model.inspection import check_tensors

Train = Literal["memory", "all", "none"]

ADAPTER_NAME = "memory_adapter"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class BaseModel:
    """What an adapter's weights depend on in the model that it is attached to.

    Attributes:
        model_type: of the text decoder's configuration.
        hidden_size: D.
        num_blocks: blocks of the decoder.
    """

    model_type: str
    hidden_size: int
    num_blocks: int


class MemoryAdapter(nn.Module):
    """Memory layers and the pool that they share; made by `attach`, found as ``model.memory_adapter``.

    A block's MLP returns mlp(x) + memory(x): a hook on the MLP adds the second term. Auxiliary losses are collected
    while the model that was attached to runs and leave with its output: ``output.auxiliary_losses`` has them by name,
    and ``output.loss`` includes them when the model was given labels.

    Args:
        config: the memories' settings; its placement lists the blocks.
        base: the model that the adapter fits.
    """

    def __init__(self, config: MemoryConfig, base: BaseModel) -> None:
        super().__init__()
        self.config, self.base = config, base
        spans = parse_placement(config.placement, base.num_blocks)
        if any(span.start != span.end for span in spans):
            raise ConfigError(
                f"memory.placement {config.placement!r} has spans; a memory beside an MLP is added in the block that "
                f'it reads. Give layers a list of blocks in 0…{base.num_blocks - 1} or "every".'
            )
        if config.position != "parallel":
            raise ConfigError(
                f"memory.position {config.position!r} is for ultramem's own decoder; attached memories stand beside "
                "the MLP. Leave it out or set it to parallel."
            )
        if config.num_past_tokens:
            raise ConfigError(
                "queries that look back at earlier tokens need a cache that other models do not keep for a memory; "
                "set memory.query_conv to 0."
            )
        self.blocks = [span.start for span in spans]
        layer = MEMORY_TYPES[config.type].layer
        self.memories = nn.ModuleList(layer(base.hidden_size, config, len(spans), index) for index in range(len(spans)))
        self.pool = layer.make_pool(base.hidden_size, config, len(spans), draw=False)
        self.handles: list[RemovableHandle] = []
        self.base_requires_grad: dict[str, bool] = {}
        self._losses: dict[str, Tensor] | None = None
        self._grad_enabled = False

    def refresh_retrieval(self) -> None:
        """Recompute what the memories derive from their parameters; call after each optimizer step."""
        for memory in self._layers:
            memory.refresh_retrieval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the added weights alone: ``adapter_config.json`` and ``adapter.safetensors``.

        Args:
            folder: written beside itself under a temporary name and renamed; an adapter that is there is replaced.

        Raises:
            CheckpointError: something else is at that path, or it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / CONFIG_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} is there and is no adapter folder; name a new folder or an adapter's.")
        description = {"format": FORMAT, "base_model": asdict(self.base), "memory": asdict(self.config)}
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        try:
            with staged_folder(folder) as stage:
                (stage / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
                save_file(tensors, stage / WEIGHTS_FILE, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} cannot be written ({error}). Make the folder above it writable and its disk roomy enough."
            ) from error

    def extra_repr(self) -> str:
        """Where the memories stand, for print(model)."""
        return f"blocks={self.blocks}"

    @property
    def _layers(self) -> list[MemoryLayer]:
        return cast(list[MemoryLayer], list(self.memories))

    @torch.no_grad()
    def _start_as_no_op(self, ffn_ratio: float) -> None:
        """Draw the pool by the config's scheme, then make every output zero."""
        draw_pool(self.pool, self._layers, self.base.num_blocks, ffn_ratio)
        for memory in self._layers:
            memory.zero_output(self.pool)

    def _register(self, model: nn.Module, mlps: list[nn.Module]) -> None:
        model.add_module(ADAPTER_NAME, self)
        # Partials of methods, not closures: copying or pickling the model makes hooks of the copied adapter.
        self.handles = [
            model.register_forward_pre_hook(self._begin_forward),
            model.register_forward_hook(self._end_forward, with_kwargs=True),
            *(mlps[block].register_forward_hook(partial(self._add, index)) for index, block in enumerate(self.blocks)),
        ]

    def _begin_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self._losses, self._grad_enabled = {}, torch.is_grad_enabled()

    def _add(self, index: int, mlp: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        memory = self._layers[index]
        # A mixture of experts may return its router's scores beside the hidden states.
        hidden = output[0] if isinstance(output, tuple) else output
        weight = next(memory.parameters())
        result = memory(args[0].to(device=weight.device, dtype=weight.dtype), self.pool)
        # None while the backward of a checkpointed block recomputes it: its losses have been handed on.
        if self._losses is not None and result.losses:
            if torch.is_grad_enabled() != self._grad_enabled:
                raise ConfigError(
                    "gradient checkpointing with use_reentrant=True loses the gradients of the memories' auxiliary "
                    "losses; leave it out or set it to False."
                )
            add_losses(self._losses, result.losses)
        added = hidden + result.output.to(hidden)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        losses, self._losses = self._losses, None
        if not losses:
            return output
        if not isinstance(output, ModelOutput):
            raise ConfigError(
                "the memories' auxiliary losses cannot leave in a tuple; call the model with return_dict=True, or set "
                "the weights of these losses to 0 in the memory's settings."
            )
        total = output.get("loss")
        if total is not None:
            # Trainers that accumulate gradients divide the cross-entropy by the targets of the whole batch; a
            # micro-batch then adds its share of the auxiliary losses.
            labels, num_targets = kwargs.get("labels"), kwargs.get("num_items_in_batch")
            share = 1.0
            if labels is not None and num_targets is not None:
                share = (labels[..., 1:] != -100).sum() / num_targets
            output["loss"] = total + (share * torch.stack(list(losses.values())).sum()).to(total.device)
        add_losses(losses, output.get("auxiliary_losses") or {})
        output["auxiliary_losses"] = losses
        return output


def attach(
    model: PreTrainedModel,
    memory_config: MemoryConfig | dict[str, Any],
    layers: Literal["every"] | Sequence[int] | None = None,
    *,
    train: Train = "memory",
) -> MemoryAdapter:
    """Add memories in parallel to the MLPs of a decoder; until they are trained its outputs are the same to the bit.

    The names of the model's own parameters do not change; the adapter is a submodule, so ``.to()``, ``.train()`` and
    ``.parameters()`` reach it. Its weights start in the model's dtype, but at least in float32.

    Args:
        model: a decoder of transformers whose blocks have an ``mlp``; of a model with several towers, its text decoder.
        memory_config: settings of the memories, or a mapping whose ``type`` names a kind of memory.
        layers: numbers of the blocks that get a memory, or ``"every"``; None for the placement in ``memory_config``.
        train: what requires a gradient afterwards: the ``memory`` alone, ``all`` parameters or ``none``.

    Returns:
        The adapter, also found as ``model.memory_adapter``.

    Raises:
        ConfigError: the model has no such blocks or has an adapter, or the settings do not fit it.
    """
    config = make_memory_config(memory_config) if isinstance(memory_config, dict) else memory_config
    if layers is not None:
        config = replace(config, placement=layers if isinstance(layers, str) else list(layers))
    mlps, base = _inspect(model, train)
    adapter = MemoryAdapter(config, base)
    text_config = model.config.get_text_config(decoder=True)
    inner = getattr(text_config, "intermediate_size", None) or 4 * base.hidden_size
    adapter._start_as_no_op(inner / base.hidden_size)
    # Steps of an optimizer are lost in the rounding of 16-bit weights.
    dtype = torch.promote_types(model.dtype, torch.float32)
    adapter.to(device=_device(mlps), dtype=dtype)
    _install(model, mlps, adapter, train)
    return adapter


def load_adapter(model: PreTrainedModel, folder: str | Path, *, train: Train = "memory") -> MemoryAdapter:
    """Attach the memories that `MemoryAdapter.save_pretrained` wrote; every tensor is the file's, also in its dtype.

    Args:
        model: of the architecture, hidden size and number of blocks of the model that was saved from.
        folder: the adapter folder.
        train: as in `attach`.

    Returns:
        The adapter.

    Raises:
        CheckpointError: the folder's files are missing, damaged or another version's, or belong to another model.
        ConfigError: as `attach`.
    """
    folder = Path(folder)
    mlps, base = _inspect(model, train)
    config, saved_base = _read_description(folder)
    if saved_base != base:
        differences = ", ".join(
            f"{name} {wanted!r} instead of {getattr(base, name)!r}"
            for name, wanted in asdict(saved_base).items()
            if wanted != getattr(base, name)
        )
        raise CheckpointError(
            f"the adapter in {folder} was made for another model: {differences}. Load it into the model that it was "
            "attached to."
        )
    try:
        with torch.device("meta"):
            adapter = MemoryAdapter(config, base)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes no adapter ({error}) Put back the configuration that was saved."
        ) from error
    adapter.load_state_dict(_read_weights(folder, adapter), assign=True)
    adapter.to(_device(mlps))
    _install(model, mlps, adapter, train)
    return adapter


def detach(model: nn.Module) -> None:
    """Remove the memories: module tree, hooks and what requires a gradient are as before `attach`.

    Raises:
        ConfigError: nothing is attached to the model.
    """
    adapter = getattr(model, ADAPTER_NAME, None)
    if not isinstance(adapter, MemoryAdapter):
        raise ConfigError(
            f"no memories are attached to this {type(model).__name__}; give the model that attach was called with."
        )
    for handle in adapter.handles:
        handle.remove()
    delattr(model, ADAPTER_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(adapter.base_requires_grad.get(name, parameter.requires_grad))


def _inspect(model: nn.Module, train: str) -> tuple[list[nn.Module], BaseModel]:
    """The MLPs of a decoder's blocks, in order, and what an adapter has to fit."""
    if train not in get_args(Train):
        raise ConfigError(f"train must be one of {', '.join(get_args(Train))}; got {train!r}.")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"attach takes a model of transformers; got a {type(model).__name__}.")
    if any(isinstance(module, MemoryAdapter) for module in model.modules()):
        raise ConfigError("the model has memories attached already; call ultramem.detach(model) first.")
    blocks = _decoder_blocks(model)
    text_config = model.config.get_text_config(decoder=True)
    base = BaseModel(text_config.model_type, text_config.hidden_size, len(blocks))
    return [cast(nn.Module, block.mlp) for block in blocks], base


def _decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    decoder = cast(nn.Module, model.get_decoder())  # type: ignore[no-untyped-call]
    found = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(getattr(block, "mlp", None), nn.Module) for block in module)
    }
    if len(found) > 1:
        raise ConfigError(
            f"{type(model).__name__} has several lists of blocks with an `mlp`: {', '.join(found)}; attach to the "
            "submodule that is the text decoder."
        )
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks that all have an `mlp`; memories can be attached to "
            "decoders built like Llama, Qwen, OLMo, Gemma or GPT-NeoX."
        )
    return next(iter(found.values()))


def _device(mlps: list[nn.Module]) -> torch.device:
    device = next(mlps[0].parameters()).device
    if device.type == "meta":
        raise ConfigError("the model is on the meta device; load its weights before attaching memories.")
    return device


def _install(model: nn.Module, mlps: list[nn.Module], adapter: MemoryAdapter, train: Train) -> None:
    adapter.base_requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        # Quantised weights are integers and take no gradient.
        if parameter.is_floating_point():
            parameter.requires_grad_(train == "all")
    adapter.requires_grad_(train != "none")
    adapter.train(model.training)
    adapter._register(model, mlps)


def _read_description(folder: Path) -> tuple[MemoryConfig, BaseModel]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; expected a folder that adapter.save_pretrained wrote.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version = description["format"]
        if version == FORMAT:
            return make_memory_config(description["memory"]), BaseModel(**description["base_model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({' '.join(str(error).split())}). Save the adapter again, or copy the file again."
        ) from error
    raise CheckpointError(
        f"{file} has format {version!r}; this version of ultramem reads format {FORMAT}. Use the version that saved it."
    )


def _read_weights(folder: Path, adapter: MemoryAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter folder, whose names and shapes must be those of ``adapter``."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_FILE}. Save the adapter again, or copy the whole folder again."
        )
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}). Save the adapter again, or copy the file again."
        ) from error
    expected, shapes = (
        {name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (adapter.state_dict(), found)
    )
    check_tensors(folder, CONFIG_FILE, expected, shapes)
    return found
