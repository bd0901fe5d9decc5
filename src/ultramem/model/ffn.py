"""The FFN of a block: dense SwiGLU, or the mixture of experts of OLMoE; settings, costs, modules and router losses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeMLP, OlmoeTopKRouter

from ultramem.errors import ConfigError
from ultramem.model.sections import make_section
from ultramem.ops import grouped_linear

if TYPE_CHECKING:
    from ultramem.model.configuration import UltraMemConfig


@strict
@dataclass
class DenseFFNConfig:
    """Settings of the dense FFN: its inner width is the decoder's ``intermediate_size``."""

    type: Literal["dense"] = "dense"

    def dense_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Weights that every token reads, per block."""
        return 3 * hidden_size * intermediate_size

    def expert_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Weights of all experts, per block: none."""
        del hidden_size, intermediate_size
        return 0

    def active_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Weights that one token reads, per block."""
        return self.dense_parameters(hidden_size, intermediate_size)

    def flops_per_token(self, hidden_size: int, intermediate_size: int) -> int:
        """FLOPs of the matrix products for one token (a multiply-add counts as two), per block."""
        return 2 * self.active_parameters(hidden_size, intermediate_size)

    def elements_per_step(self, batch_size: int, hidden_size: int, intermediate_size: int) -> float:
        """Weights read to decode one token for each of B sequences, per block."""
        del batch_size
        return self.dense_parameters(hidden_size, intermediate_size)


@strict
@dataclass
class MoEFFNConfig:
    """Settings of the mixture of experts of OLMoE (arXiv 2409.02060), without capacity limit: no token is dropped.

    Attributes:
        num_experts: E.
        num_experts_per_tok: a, experts that each token visits.
        intermediate_size: inner width of one expert; null for the decoder's ``intermediate_size`` // a, with which the
            experts of a token cost what the dense FFN costs.
        norm_topk_prob: divide a token's router weights by their sum.
        router_aux_loss_coef: weight of the load-balancing loss; 0 is off.
        router_z_loss_coef: weight of the router's z-loss; 0 is off.
        experts_implementation: how the experts are computed; see `grouped_linear_experts` for the default, the others
            are those of transformers: ``eager`` (a loop; does not compile), ``batched_mm`` (copies the weights of every
            choice of every token: for few tokens), ``grouped_mm`` (no fp64; compiles in bf16 only). Transformers'
            ``experts_implementation`` of ``from_pretrained`` and ``set_experts_implementation`` overrides it.
    """

    type: Literal["moe"] = "moe"
    num_experts: int = 64
    num_experts_per_tok: int = 8
    intermediate_size: int | None = None
    norm_topk_prob: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    experts_implementation: Literal["grouped_linear", "eager", "batched_mm", "grouped_mm"] = "grouped_linear"

    def __post_init__(self) -> None:
        """Check what does not depend on the decoder. Raises ConfigError naming the field."""
        for name in ("num_experts", "num_experts_per_tok", "intermediate_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"ffn.{name} must be at least 1; got {value}.")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"ffn.num_experts_per_tok ({self.num_experts_per_tok}) must be at most ffn.num_experts "
                f"({self.num_experts})."
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"ffn.{name} must not be negative; got {getattr(self, name)}.")

    def expert_size(self, intermediate_size: int) -> int:
        """Inner width of one expert in a decoder whose ``intermediate_size`` this is.

        Raises:
            ConfigError: the default would be 0.
        """
        if self.intermediate_size is not None:
            return self.intermediate_size
        if intermediate_size < self.num_experts_per_tok:
            raise ConfigError(
                f"ffn.intermediate_size is null, which gives each expert intermediate_size ({intermediate_size}) // "
                f"ffn.num_experts_per_tok ({self.num_experts_per_tok}) = 0 inner units; set it, or use fewer experts "
                "per token."
            )
        return intermediate_size // self.num_experts_per_tok

    def _one_expert(self, hidden_size: int, intermediate_size: int) -> int:
        return 3 * hidden_size * self.expert_size(intermediate_size)

    def dense_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Weights that every token reads, per block: the router's."""
        del intermediate_size
        return self.num_experts * hidden_size

    def expert_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Weights of all experts, per block."""
        return self.num_experts * self._one_expert(hidden_size, intermediate_size)

    def active_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Weights that one token reads, per block: the router's and those of a experts."""
        experts = self.num_experts_per_tok * self._one_expert(hidden_size, intermediate_size)
        return self.dense_parameters(hidden_size, intermediate_size) + experts

    def flops_per_token(self, hidden_size: int, intermediate_size: int) -> int:
        """FLOPs of the matrix products for one token (a multiply-add counts as two), per block."""
        return 2 * self.active_parameters(hidden_size, intermediate_size)

    def elements_per_step(self, batch_size: int, hidden_size: int, intermediate_size: int) -> float:
        """Weights read to decode one token for each of B sequences, per block.

        The router's, and those of the E·(1 − (1 − a/E)^B) distinct experts expected under uniform routing.
        """
        missed = (1 - self.num_experts_per_tok / self.num_experts) ** batch_size
        experts = self.expert_parameters(hidden_size, intermediate_size) * (1 - missed)
        return self.dense_parameters(hidden_size, intermediate_size) + experts


FFNConfig = DenseFFNConfig | MoEFFNConfig

FFN_TYPES: dict[str, type[DenseFFNConfig] | type[MoEFFNConfig]] = {"dense": DenseFFNConfig, "moe": MoEFFNConfig}


def make_ffn_config(settings: dict[str, Any] | None) -> FFNConfig:
    """Build the typed settings of the FFN from a mapping whose ``type`` names a kind; None or no type is ``dense``.

    Raises:
        ConfigError: an unknown type or field, or a value that the field does not take; names the field.
    """
    return make_section("ffn", "an FFN", settings or {}, FFN_TYPES)


class FFNOutput(NamedTuple):
    """What an FFN returns.

    Attributes:
        output: [..., D].
        router_logits: [N, E] over the flattened tokens, in the dtype of the router; None for a dense FFN.
    """

    output: Tensor
    router_logits: Tensor | None


class DenseFFN(OlmoeMLP):
    """SwiGLU: W_down (act(W_gate x) ⊙ W_up x)."""

    def forward(self, x: Tensor) -> FFNOutput:
        """Transform tokens [..., D]."""
        return FFNOutput(super().forward(x), None)  # type: ignore[no-untyped-call]

    @property
    def output_weight(self) -> nn.Parameter:
        """The projection back to the hidden states."""
        return cast(nn.Parameter, self.down_proj.weight)


class MoEFFN(nn.Module):
    """Router and experts of OLMoE; names and layout of the weights are those of its block.

    Args:
        config: the decoder's settings; its ``ffn`` must be of type ``moe``.
    """

    def __init__(self, config: "UltraMemConfig") -> None:
        super().__init__()
        ffn = config.ffn_config
        assert isinstance(ffn, MoEFFNConfig)
        block = OlmoeConfig(
            hidden_size=config.hidden_size,
            intermediate_size=ffn.expert_size(config.intermediate_size),
            hidden_act=config.hidden_act,
            num_attention_heads=config.num_attention_heads,
            num_experts=ffn.num_experts,
            num_experts_per_tok=ffn.num_experts_per_tok,
            norm_topk_prob=ffn.norm_topk_prob,
        )
        self.gate = OlmoeTopKRouter(block)  # type: ignore[no-untyped-call]
        self.experts = OlmoeExperts(block)
        # Where the experts look up their implementation: the model's own settings, which transformers changes.
        self.experts.config = config  # type: ignore[assignment]

    def forward(self, x: Tensor) -> FFNOutput:
        """Transform tokens [..., D]."""
        x_ND = x.reshape(-1, x.shape[-1])
        router_logits, weights_NA, index_NA = self.gate(x_ND)
        return FFNOutput(self.experts(x_ND, index_NA, weights_NA).view_as(x), router_logits)

    @property
    def output_weight(self) -> nn.Parameter:
        """The experts' projections back to the hidden states."""
        return self.experts.down_proj


def build_ffn(config: "UltraMemConfig") -> DenseFFN | MoEFFN:
    """Make the FFN that the decoder's settings ask for."""
    if isinstance(config.ffn_config, MoEFFNConfig):
        return MoEFFN(config)
    return DenseFFN(config)  # type: ignore[no-untyped-call]


def grouped_linear_experts(experts: Any, x_ND: Tensor, index_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """Experts' outputs by one grouped matrix product per projection: trains and compiles in every dtype.

    Registered with transformers as the experts implementation ``grouped_linear``. In contrast to ``grouped_mm`` it
    also compiles in fp32, runs in fp64 and obeys autocast.

    Args:
        experts: a gated experts module of transformers without biases, such as ``OlmoeExperts``.
        x_ND: tokens.
        index_NA: each token's experts, int64.
        weights_NA: their weights.

    Returns:
        [N, D] in the dtype of ``x_ND``.
    """
    num_tokens, num_chosen = index_NA.shape
    expert_S, order_S = index_NA.reshape(-1).sort()
    bounds_E = torch.arange(experts.num_experts, device=expert_S.device, dtype=expert_S.dtype)
    ends_E = torch.searchsorted(expert_S, bounds_E, right=True).to(torch.int32)
    gate_up = grouped_linear(x_ND[order_S // num_chosen], experts.gate_up_proj, ends_E)
    inner = experts._apply_gate(gate_up)
    outer = grouped_linear(inner, experts.down_proj, ends_E)
    outer = outer * weights_NA.reshape(-1)[order_S].unsqueeze(-1)
    # Back in the order of the choices, each token's lie side by side: a sum in fixed order, free of atomics.
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return outer[back_S].view(num_tokens, num_chosen, x_ND.shape[1]).sum(1).to(x_ND.dtype)


ALL_EXPERTS_FUNCTIONS.register("grouped_linear", grouped_linear_experts)


def router_losses(
    router_logits: tuple[Tensor, ...], config: MoEFFNConfig, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted auxiliary losses of all routers of a model.

    - ``load_balance``: E · Σ_e f_e · p_e, with f_e the choices of expert e per token and p_e its mean probability, both
      over all layers; a balanced router has E · Σ = a. As transformers computes it for OLMoE.
    - ``router_z``: the mean over tokens and layers of (logsumexp of the logits)² (arXiv 2409.02060, §2).

    Args:
        router_logits: [B·T, E] of each layer, any floating dtype.
        config: names E, a and the weights; a loss with weight 0 is left out.
        attention_mask: [B, T] or longer at the front (cached decoding), one where a token is real; other forms and None
            count every token.

    Returns:
        fp32 scalars (fp64 for fp64 logits) by name; 0 where no token is real.
    """
    logits_LNE = torch.stack(router_logits)
    logits_LNE = logits_LNE.to(torch.promote_types(logits_LNE.dtype, torch.float32))
    real_N = _real_tokens(logits_LNE, attention_mask)
    # At least one, so that a batch of padding has gradient 0 instead of NaN.
    num_rows = (real_N.sum() * len(router_logits)).clamp(min=1)
    losses: dict[str, Tensor] = {}
    if config.router_aux_loss_coef:
        probabilities_LNE = logits_LNE.softmax(-1)
        # The router chose in fp32, whatever the logits' dtype; the same numbers give the same choices.
        chosen_LNA = logits_LNE.float().softmax(-1).topk(config.num_experts_per_tok).indices
        share_LNE = torch.zeros_like(probabilities_LNE).scatter_(-1, chosen_LNA, 1.0)
        chosen_E = (share_LNE * real_N.unsqueeze(-1)).sum((0, 1)) / num_rows
        probability_E = (probabilities_LNE * real_N.unsqueeze(-1)).sum((0, 1)) / num_rows
        losses["load_balance"] = config.router_aux_loss_coef * config.num_experts * (chosen_E * probability_E).sum()
    if config.router_z_loss_coef:
        squares_LN = logits_LNE.logsumexp(-1).square()
        losses["router_z"] = config.router_z_loss_coef * (squares_LN * real_N).sum() / num_rows
    return losses


def _real_tokens(logits_LNE: Tensor, attention_mask: Tensor | None) -> Tensor:
    num_tokens = logits_LNE.shape[1]
    if attention_mask is None or attention_mask.ndim != 2:
        return logits_LNE.new_ones(num_tokens)
    length = num_tokens // attention_mask.shape[0] if attention_mask.shape[0] else 0
    return attention_mask[:, attention_mask.shape[1] - length :].reshape(-1).to(logits_LNE)
