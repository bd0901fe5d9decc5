"""The operators that memory layers are made of; each is a plain PyTorch reference behind a registered operator."""

from ultramem.ops.backends import use_backend
from ultramem.ops.bag import bag, bag_reference
from ultramem.ops.gather_dot import gather_dot, gather_dot_reference
from ultramem.ops.grouped_linear import grouped_linear, grouped_linear_reference
from ultramem.ops.key_search import contract_keys, contract_sides, fine_scores, key_search, key_search_reference
from ultramem.ops.pooled_read import Activation, pooled_read
from ultramem.ops.product_topk import (
    Search,
    check_search,
    coarse_candidates,
    product_topk,
    product_topk_flops,
    product_topk_reference,
    search_recall,
)
from ultramem.ops.rms_norm import rms_norm, rms_norm_reference
from ultramem.ops.row_gradients import RowContribution, RowGradients
from ultramem.ops.scatter import scatter, scatter_reference

__all__ = [
    "Activation",
    "RowContribution",
    "RowGradients",
    "Search",
    "bag",
    "bag_reference",
    "check_search",
    "coarse_candidates",
    "contract_keys",
    "contract_sides",
    "fine_scores",
    "gather_dot",
    "gather_dot_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "key_search",
    "key_search_reference",
    "pooled_read",
    "product_topk",
    "product_topk_flops",
    "product_topk_reference",
    "rms_norm",
    "rms_norm_reference",
    "scatter",
    "scatter_reference",
    "search_recall",
    "use_backend",
]
