"""A dense reference in plain PyTorch: O(N²) memory, and the D×D system of every query. For tests and small sizes.

The interface, and what is returned, are those of the published package's reference: `rho` and `denom` belong to the paper's
uncentred form. They are computed here from normalised weights, which is the same up to rounding: with p the softmax weights, δ = k̄ − q
and C the weighted covariance of the keys,

    Σ/ω = C + δδᵀ + λI      ρ = (Σ/ω)⁻¹ δ      denom = ω (1 − δ·ρ)      out = Σ_j p_j (1 − (k_j − q)·ρ) v_j / (1 − δ·ρ)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lla_backward_naive", "lla_forward_naive"]


def _sums(x: Tensor) -> torch.dtype:
    """Half precision is summed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _ridge(ridge: float | Tensor, q: Tensor) -> float | Tensor:
    """As `(batch, seqlen, 1)`, or what broadcasts to it."""
    if not isinstance(ridge, Tensor) or ridge.dim() == 0:
        return ridge
    return ridge.expand(q.shape[0], q.shape[1])[..., None]


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`(batch, queries, keys)`, minus infinity at the keys that causality hides."""
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(1, 2) * scale).masked_fill(later, float("-inf"))


def _blocks(x: Tensor, size: int) -> Tensor:
    """`(batch, tokens, blocks, size)`."""
    return x.reshape(*x.shape[:2], -1, size)


def _second_moment(p: Tensor, k: Tensor) -> Tensor:
    """Σ_j p_ij k_j k_jᵀ of every block: `(batch, queries, blocks, size, size)`; k is `(batch, keys, blocks, size)`."""
    pairs = k[..., :, None] * k[..., None, :]
    return (p @ pairs.flatten(2)).reshape(*p.shape[:2], *pairs.shape[2:])


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def lla_forward_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float,
    ridge_lambda: float | Tensor,
    delta_eps: float,
    lla_block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal LLA, densely; differentiable by autograd.

    Args:
        q, k, v: `(batch, seqlen, head_dim)`.
        qk_scale: factor on q·k.
        ridge_lambda: a number or a tensor that broadcasts to `(batch, seqlen)`.
        delta_eps: added to the denominator, away from 0.
        lla_block_size: treat blocks of that many dims as uncorrelated; a divisor of head_dim (default: one block).

    Returns:
        `(o, rho, denom, m)`: outputs and the paper's ρ `(batch, seqlen, head_dim)`, denominators and row maxima of the logits
        `(batch, seqlen, 1)`.

    >>> import torch
    >>> from flashlla.ops.naive import lla_forward_naive
    >>> q, k, v = torch.randn(3, 1, 8, 4)
    >>> [tuple(x.shape) for x in lla_forward_naive(q, k, v, 0.5, 1.0, 1e-12)]
    [(1, 8, 4), (1, 8, 4), (1, 8, 1), (1, 8, 1)]
    """
    dim, dtype = q.shape[2], q.dtype
    size = dim if lla_block_size is None else lla_block_size
    if size < 1 or dim % size != 0:
        raise ValueError(f"lla_block_size: {size} is not allowed; it must be a divisor of head_dim ({dim})")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"k, v: dtypes {k.dtype} and {v.dtype} do not match q's {q.dtype}")
    q, k, v = (x.to(_sums(x)) for x in (q, k, v))

    logits = _logits(q, k, qk_scale)
    m = logits.amax(-1, keepdim=True)
    w = torch.exp(logits - m)
    omega = w.sum(-1, keepdim=True)
    p = w / omega
    mean = p @ k
    delta = mean - q
    mean_blocks, delta_blocks = _blocks(mean, size), _blocks(delta, size)
    sigma = _second_moment(p, _blocks(k, size)) - mean_blocks[..., :, None] * mean_blocks[..., None, :]
    sigma = sigma + delta_blocks[..., :, None] * delta_blocks[..., None, :]
    ridge = _ridge(ridge_lambda, q)
    ridge = ridge[..., None, None] if isinstance(ridge, Tensor) and ridge.dim() > 0 else ridge
    sigma = sigma + ridge * _eye(sigma)
    rho = torch.linalg.solve(sigma, delta_blocks[..., None])[..., 0].flatten(2)

    denom = omega * (1 - (delta * rho).sum(-1, keepdim=True))
    denom = denom + delta_eps * torch.sign(denom)
    slopes = rho @ k.transpose(1, 2) - (rho * q).sum(-1, keepdim=True)
    out = (w * (1 - slopes) / denom) @ v
    return out.to(dtype), rho.to(dtype), denom.to(dtype), m.to(dtype)


@torch.no_grad()
def lla_backward_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    d: Tensor,
    m: Tensor,
    grad_o: Tensor,
    qk_scale: float,
    ridge_lambda: float | Tensor,
    lla_block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `Σ o · grad_o`, from what `lla_forward_naive` returned as `(rho, denom, m)`.

    The probe of the covariance form is x = ρ ω / denom; from there the formulas are those of the covariance form, with a second
    solve in the same matrix. Blocks (`lla_block_size` below head_dim) are not implemented.

    Returns:
        `(dq, dk, dv)` in the shapes of q, k and v.

    >>> import torch
    >>> from flashlla.ops.naive import lla_backward_naive, lla_forward_naive
    >>> q, k, v, grad = torch.randn(4, 1, 8, 4)
    >>> o, rho, denom, m = lla_forward_naive(q, k, v, 0.5, 1.0, 1e-12)
    >>> [tuple(x.shape) for x in lla_backward_naive(q, k, v, rho, denom, m, grad, 0.5, 1.0)]
    [(1, 8, 4), (1, 8, 4), (1, 8, 4)]
    """
    dim, dtype = q.shape[2], q.dtype
    if lla_block_size not in (None, dim):
        raise ValueError(f"lla_block_size: {lla_block_size} is not allowed; it must be head_dim ({dim}) in a backward")
    q, k, v, r, d, m, grad_o = (x.to(_sums(q)) for x in (q, k, v, r, d, m, grad_o))

    w = torch.exp(_logits(q, k, qk_scale) - m)
    omega = w.sum(-1, keepdim=True)
    p = w / omega
    mean = p @ k
    x = r * omega / d
    covariance = _second_moment(p, k[:, :, None])[:, :, 0] - mean[..., :, None] * mean[..., None, :]
    ridge = _ridge(ridge_lambda, q)
    square = ridge[..., None] if isinstance(ridge, Tensor) and ridge.dim() > 0 else ridge
    system = covariance + square * _eye(covariance)

    def against_keys(y: Tensor) -> Tensor:
        """(k_j − k̄_i)·y_i"""
        return y @ k.transpose(1, 2) - (mean * y).sum(-1, keepdim=True)

    gamma = grad_o @ v.transpose(1, 2)
    gamma = gamma - (p * gamma).sum(-1, keepdim=True)
    c = (p * gamma) @ k - (p * gamma).sum(-1, keepdim=True) * mean
    y = torch.linalg.solve(system, c[..., None])[..., 0]
    a = 1 - against_keys(x)
    e = gamma - against_keys(y)
    ds = p * (e * a + ridge * (x * y).sum(-1, keepdim=True))
    dq = y + qk_scale * (ds @ k)
    dk = qk_scale * ds.transpose(1, 2) @ q - (p * e).transpose(1, 2) @ x - (p * a).transpose(1, 2) @ y
    dv = (p * a).transpose(1, 2) @ grad_o
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
