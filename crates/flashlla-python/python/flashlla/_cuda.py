"""The operator in the memory of an NVIDIA GPU: plans, pointers, padding. Nothing here waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashlla import _flashlla
from flashlla._options import Options

# Tokens are padded to whole tiles on the device.
_TOKENS = 128

_NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@lru_cache
def _head_dims(device: int) -> tuple[int, ...]:
    return tuple(_flashlla.cuda_info(device)["head_dims"])


def state_shape(q: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The shape of key means and probes: tokens and dims rounded up to those of the kernels."""
    b, h, n, d = q.shape
    needed = max(d, v.shape[3])
    index = q.device.index if q.device.index is not None else torch.cuda.current_device()
    width = next((w for w in _head_dims(index) if w >= needed), needed)
    return (b, h, (n + _TOKENS - 1) // _TOKENS * _TOKENS, width)


@lru_cache(maxsize=1024)
def _plan(
    make: Any,
    device: int,
    dtype: torch.dtype,
    others: tuple[torch.dtype, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    bias: bool,
    probe: bool,
    sequences: tuple[int, ...] | None,
    options: tuple[Any, ...],
) -> Any:
    sizes = {"q": q, "k": k, "v": v, "bias": bias, "probe": probe}
    given = Options(*options).given(None, None if sequences is None else list(sequences))
    return make(device, _NAMES[dtype], *(_NAMES[other] for other in others), sizes, given)


def _planned(make: Any, others: tuple[torch.dtype, ...], tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    q, k, v, _, _, bias, probe, cu_seqlens = tensors
    # Reads device memory, and so waits, only if the sequences are there.
    sequences = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    has = (bias is not None, probe is not None)
    return _plan(make, q.device.index, q.dtype, others, *shapes, *has, sequences, options)


def _rows(x: Tensor) -> Tensor:
    """With its dims side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return (x.data_ptr(), x.stride()[:3])


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 where there is one element."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _bias(bias: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, Any]:
    if bias is None:
        return None, None
    b, h, m, _ = bias.shape
    rows = bias.reshape(b, h, m)
    if h not in (1, q.shape[1]):
        rows = rows.repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows = rows.contiguous()
    return rows, (rows.data_ptr(), _steps(rows)[:2])


def _ridge(ridge: Tensor | None, q: Tensor) -> tuple[Tensor | None, Any]:
    if ridge is None:
        return None, None
    fits = all(size in (1, full) for size, full in zip(ridge.shape, q.shape, strict=False))
    if not fits:
        raise ValueError(
            f"ridge: shape {list(ridge.shape)} does not fit; it must be {list(q.shape[:3])} (batch, query heads, "
            "queries) with 1 where it is constant"
        )
    ridge = ridge.to(torch.float32)
    return ridge, (ridge.data_ptr(), _steps(ridge))


def _check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is None:
        return
    b, h, m, _ = bias.shape
    if b not in (1, q.shape[0]) or h not in (1, q.shape[1], k.shape[1]) or m != k.shape[2]:
        raise ValueError(
            f"bias: shape {[b, h, m]} does not fit; it must be [{q.shape[0]} or 1, {q.shape[1]} or {k.shape[1]} or 1, "
            f"{k.shape[2]}] (batch, query heads or KV heads, keys)"
        )


def _check_shapes(tensors: tuple[Any, ...]) -> None:
    """What the description cannot see, because it is made from these very sizes."""
    q, k, v, _, _, bias, probe, _ = tensors
    b, _, _, d = q.shape
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"k: shape {list(k.shape)} does not fit; batch and head_dim must be those of q, {b} and {d}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: shape {list(v.shape)} does not fit; it must be {list(k.shape[:3])} and value_dim")
    if probe is not None and probe.shape != q.shape:
        raise ValueError(f"probe: shape {list(probe.shape)} does not fit; it must be that of q, {list(q.shape)}")
    _check_bias(bias, q, k)


def forward(tensors: tuple[Any, ...], options: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    """Puts a forward into the current stream, into `results`."""
    q, k, v, ridge, _, bias, probe, _ = tensors
    out, lse, state, solves = results
    _check_shapes(tensors)
    plan = _planned(_flashlla.cuda_forward_plan, (), tensors, options)
    q, k, v = _rows(q), _rows(k), _rows(v)
    # The kernels write the type that they read.
    written = out if out.dtype == q.dtype else torch.empty_like(out, dtype=q.dtype)
    bias, bias_at = _bias(bias, q, k)
    ridge, ridge_at = _ridge(ridge, q)
    scratch = q.new_empty((plan.scratch_bytes,), dtype=torch.uint8)
    key_mean, used, diagnostics = None, None, None
    if state.numel() > 0:
        key_mean, used = state.data_ptr(), state.data_ptr() + 2 * state.numel()
    if solves.numel() > 0:
        diagnostics = (solves.data_ptr() + 2 * solves.numel(), solves.data_ptr())
    given = None
    if probe is not None:
        padded = state[1].zero_() if state.numel() > 0 else q.new_zeros(plan.state_shape, dtype=torch.float32)
        padded[:, :, : q.shape[2], : q.shape[3]] = probe
        given, used, diagnostics = padded.data_ptr(), None, None
        solves.zero_()
    plan.run(
        torch.cuda.current_stream(q.device).cuda_stream,
        scratch.data_ptr(),
        _view(q),
        _view(k),
        _view(v),
        _view(written),
        bias_at,
        ridge_at,
        given,
        lse.data_ptr(),
        key_mean,
        used,
        diagnostics,
    )
    if written is not out:
        out.copy_(written)


def backward(
    grad_out: Tensor,
    state: tuple[Tensor, ...],
    tensors: tuple[Any, ...],
    options: tuple[Any, ...],
    results: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Puts a backward into the current stream, into `results`."""
    q, k, v, ridge, _, bias, probe, _ = tensors
    dq, dk, dv, dridge, dscale, dbias, dprobe = results
    lse, rows_state = state
    key_mean, used = rows_state.data_ptr(), rows_state.data_ptr() + 2 * rows_state.numel()
    plan = _planned(_flashlla.cuda_backward_plan, (grad_out.dtype,), tensors, options)
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    rows, bias_at = _bias(bias, q, k)
    float_ridge, ridge_at = _ridge(ridge, q)
    (b, h, n, _), (_, kv, m, _) = q.shape, k.shape
    scratch = q.new_empty((plan.scratch_bytes,), dtype=torch.uint8)
    per_query = q.new_empty((2, b, h, n), dtype=torch.float32)
    per_key = None if bias is None else q.new_empty((b, h, m), dtype=torch.float32)
    covariance = None if probe is None else q.new_empty(plan.state_shape, dtype=torch.float32)
    plan.run(
        torch.cuda.current_stream(q.device).cuda_stream,
        scratch.data_ptr(),
        _view(q),
        _view(k),
        _view(v),
        bias_at,
        ridge_at,
        _view(grad_out),
        lse.data_ptr(),
        key_mean,
        used,
        _view(dq),
        _view(dk),
        _view(dv),
        per_query[0].data_ptr(),
        per_query[1].data_ptr(),
        None if per_key is None else per_key.data_ptr(),
        None if covariance is None else covariance.data_ptr(),
    )
    if ridge is not None:
        if probe is None:
            dridge = per_query[0].sum_to_size(ridge.shape).to(ridge.dtype)
        else:
            dridge = torch.zeros_like(ridge)
    if bias is not None and per_key is not None:
        if bias.shape[1] == kv != h:
            per_key = per_key.reshape(b, kv, h // kv, m).sum(2)
        dbias = per_key.sum_to_size(bias.shape[:3]).reshape(bias.shape)
    if probe is not None and covariance is not None:
        dprobe = -covariance[:, :, :n, : q.shape[3]].contiguous()
    return dq, dk, dv, dridge, dscale, dbias, dprobe
