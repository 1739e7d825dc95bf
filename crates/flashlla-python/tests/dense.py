"""The operator in a few lines of PyTorch, every option included: what the package is held to.

Written from the definition (a ridge regression with an unpenalised intercept, centred at the query), not from the covariance form
that the engine computes, and differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(n: int, m: int, causal=False, window=None, cu_seqlens=None, q_offset=0, leave_one_out=False) -> Tensor:
    i, j = torch.arange(n)[:, None] + q_offset, torch.arange(m)[None]
    seen = torch.ones(n, m, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= j > i - window
    if leave_one_out:
        seen &= j != i
    if cu_seqlens is not None:
        bounds = torch.as_tensor(cu_seqlens)
        seen &= torch.bucketize(i, bounds, right=True) == torch.bucketize(j, bounds, right=True)
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, *, ridge=10.0, scale=None, bias=None, probe=None, **mask) -> Tensor:
    """`q [B, HQ, N, D]`, `k [B, H, M, D]`, `v [B, H, M, DV]`; ridge and bias broadcast to `[B, HQ, N]` and `[B, HQ, M]`."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1) if x.shape[1] == kv_heads else x

    scale = q.shape[3] ** -0.5 if scale is None else scale
    if isinstance(scale, Tensor) and scale.dim() == 1:
        scale = scale.repeat_interleave(q.shape[1] // len(scale))[:, None, None]
    if isinstance(ridge, Tensor) and ridge.dim() == 1:
        ridge = ridge[None, :, None]
    ridge = torch.as_tensor(ridge, dtype=q.dtype).expand(q.shape[:3])[..., None, None]
    seen = visible(q.shape[2], k.shape[2], **mask)
    k, v = per_query_head(k), per_query_head(v)
    logits = q @ k.mT * scale
    if bias is not None:
        bias = bias if bias.dim() == 3 else bias[None, None]
        logits = logits + per_query_head(bias)[:, :, None]
    p = logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    z = k[:, :, None] - q[:, :, :, None]
    if probe is not None:
        mean = p @ k
        return (p * (1 - ((k[:, :, None] - mean[:, :, :, None]) * probe[:, :, :, None]).sum(-1))) @ v
    ones = torch.ones_like(z[..., :1])
    design = torch.cat((ones, z), -1)  # [B, HQ, N, M, 1 + D]
    penalty = torch.eye(q.shape[3] + 1, dtype=q.dtype)
    penalty[0, 0] = 0
    gram = (design * p[..., None]).mT @ design + ridge * penalty
    gram = gram + (~seen.any(-1)).to(q.dtype)[:, None, None] * torch.eye(q.shape[3] + 1, dtype=q.dtype)
    moments = (design * p[..., None]).mT @ v[:, :, None]
    return torch.linalg.solve(gram, moments)[..., 0, :]


def scale_terms(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, grad_out: Tensor, **options) -> Tensor:
    """The terms, one for each query, of which a scale's gradient is the sum: `[B, HQ, N, 1]`."""
    grouped = scale.reshape(-1, 1, 1).repeat_interleave(q.shape[1] // scale.numel(), 0)
    per_query = grouped.expand(*q.shape[:3], 1).clone().requires_grad_()
    (terms,) = torch.autograd.grad(attention(q, k, v, scale=per_query, **options), per_query, grad_out)
    return terms
