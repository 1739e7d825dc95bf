"""The interface of the package published with the paper, computed by this one.

Causal, one head, `(batch, seqlen, head_dim)`. Names and arguments are the published ones. What its uncentred form needs and the
covariance form does not (`delta_eps`, `cg_atol`, `cg_use_preconditioner`) is accepted and has no effect: there is no denominator
to keep from 0, and a diagonal preconditioner changes nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlla import _tensors
from flashlla._options import check_axes, checked

__all__ = ["LLAFunction", "lla_attention"]

# Rows of logits that are looked at together when their maxima are asked for.
_BLOCK = 1024


def _ridge(ridge: Any, q: Tensor) -> Any:
    """What broadcasts to (batch, seqlen), as axes [batch, 1, query]."""
    if not isinstance(ridge, Tensor):
        return ridge
    if ridge.numel() == 1:
        return ridge.reshape(())
    b, s = q.shape[:2]
    fits = ridge.dim() <= 2 and all(n in (1, full) for n, full in zip(reversed(ridge.shape), (s, b), strict=False))
    if not fits:
        raise ValueError(f"ridge_lambda: shape {list(ridge.shape)} does not fit; it must broadcast to [{b}, {s}]")
    return ridge.reshape(-1, 1, ridge.shape[-1])


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge_lambda: Any,
    qk_scale: float | None,
    cg_rtol: float,
    cg_max_iters: int,
    lse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if not isinstance(q, Tensor):
        raise TypeError(f"q: {type(q).__name__} is not allowed; it must be a torch.Tensor")
    check_axes("q", q.shape, "bnd")
    if not cg_rtol >= 0:
        raise ValueError(f"cg_rtol: {cg_rtol} is not allowed; it must be at least 0")
    # |r|² ≤ rtol |δ|². The default and below ask for more than float32 resolves: the engine's own limit then.
    tolerance = min(cg_rtol**0.5, 0.5) if cg_rtol > 1e-12 else None
    options = checked(True, None, 0, False, "auto", tolerance, cg_max_iters, "standard")
    out_dtype = torch.bfloat16 if q.device.type == "cuda" else None
    ridge = _ridge(ridge_lambda, q)
    return _tensors.attention(q, k, v, ridge, qk_scale, None, None, None, options, "bnd", lse, out_dtype)


@torch.no_grad()
def _omega(q: Tensor, k: Tensor, scale: float | None, lse: Tensor) -> Tensor:
    """Σ exp(logit − row maximum), `(batch, seqlen, 1)`: exp(lse − row maximum), a block of rows at a time."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    q, k = (x.to(lse.dtype) for x in (q, k))
    keys = torch.arange(k.shape[1], device=q.device)
    parts = []
    for first in range(0, q.shape[1], _BLOCK):
        rows = q[:, first : first + _BLOCK]
        logits = rows @ k[:, : first + _BLOCK].transpose(1, 2) * scale
        places = torch.arange(first, first + rows.shape[1], device=q.device)
        hidden = keys[: first + _BLOCK] > places[:, None]
        maxima = logits.masked_fill(hidden, float("-inf")).amax(-1)
        parts.append(torch.exp(lse[:, first : first + _BLOCK] - maxima))
    return (torch.cat(parts, 1) if parts else lse)[..., None].float()


class LLAFunction:
    """`apply` as in the published package; gradients flow to q, k, v and, beyond it, to `ridge_lambda`.

    >>> import torch
    >>> from flashlla import LLAFunction
    >>> q, k, v = torch.randn(3, 2, 64, 16)
    >>> o, omega = LLAFunction.apply(q, k, v, torch.tensor(10.0), 0.25, 1e-6, 1e-6, 1e-6, 32, False)
    >>> o.shape, omega.shape, omega.dtype
    (torch.Size([2, 64, 16]), torch.Size([2, 64, 1]), torch.float32)
    """

    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ridge_lambda: float | Tensor,
        qk_scale: float | None,
        delta_eps: float,
        cg_atol: float,
        cg_rtol: float,
        cg_max_iters: int,
        cg_use_preconditioner: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns `(o, omega)`.

        `o` is `(batch, seqlen, head_dim)`: bfloat16 on CUDA, as published, and the dtype of q on the CPU. `omega` is the softmax
        normaliser relative to the row maximum, `(batch, seqlen, 1)` float32; it carries no gradient and costs one more product
        of queries and keys. The other arguments are those of `lla_attention`.
        """
        qk_scale = None if qk_scale is None else float(qk_scale)
        o, rest = _call(q, k, v, ridge_lambda, qk_scale, cg_rtol, cg_max_iters, True)
        return o, _omega(q.detach(), k.detach(), qk_scale, rest[0][:, 0])


def lla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge_lambda: float | Tensor = 10.0,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float = 1e-12,
    cg_rtol: float = 1e-12,
    cg_max_iters: int = 32,
    cg_use_preconditioner: bool = False,
) -> Tensor:
    """Causal Local Linear Attention with one head, as the published package calls it.

    Args:
        q, k, v: `(batch, seqlen, head_dim)`, on the CPU or a GPU.
        ridge_lambda: a number, or a tensor that broadcasts to `(batch, seqlen)`.
        qk_scale: default head_dim^-0.5.
        delta_eps, cg_atol, cg_use_preconditioner: accepted, without effect (see the module).
        cg_rtol: a query is done at |r|² ≤ cg_rtol · |r0|². The default, and anything below, means what the arithmetic resolves
            (a relative residual of 1e-6 in float32, 1e-12 in float64, 3e-3 on a GPU).
        cg_max_iters: the most steps; on the CPU the solve is direct from there.

    Returns:
        `(batch, seqlen, head_dim)`: bfloat16 on CUDA, as published, and the dtype of q on the CPU.

    >>> import torch
    >>> from flashlla import lla_attention
    >>> q, k, v = torch.randn(3, 2, 64, 16)
    >>> lla_attention(q, k, v, ridge_lambda=0.1).shape
    torch.Size([2, 64, 16])
    """
    qk_scale = None if qk_scale is None else float(qk_scale)
    return _call(q, k, v, ridge_lambda, qk_scale, cg_rtol, cg_max_iters, False)[0]
