"""The operator on PyTorch tensors: checks, layouts, autocast; the work is done by the operators of `_operators`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashlla import _eager
from flashlla._operators import forward
from flashlla._options import Options, as_laid_out, bias_axes, check_axes, heads_first, integers, ridge_axes

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check(argument: str, x: Any, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{argument}: {type(x).__name__} is not allowed; q, k and v must all be torch.Tensor or all numpy.ndarray"
        )
    if x.dtype not in _FLOATS:
        raise TypeError(f"{argument}: dtype {x.dtype} is not allowed; it must be float64, float32, bfloat16 or float16")
    if x.dtype != like.dtype:
        raise TypeError(f"{argument}: dtype {x.dtype} does not match q's {like.dtype}")
    if x.device != like.device:
        raise ValueError(f"{argument}: device {x.device} does not match q's {like.device}")


def _autocast(device: str) -> torch.dtype | None:
    """The dtype that an enclosing `torch.autocast` asks for."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _number(argument: str, x: Any) -> float:
    try:
        if isinstance(x, (str, bytes)):
            raise TypeError
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: {type(x).__name__} is not allowed; it must be a number or a tensor") from None


def _floating(argument: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: {type(x).__name__} is not allowed; it must be a torch.Tensor, as q is")
    if not x.is_floating_point():
        raise TypeError(f"{argument}: dtype {x.dtype} is not allowed; it must be a floating-point type")
    return x


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Any,
    scale: Any,
    bias: Any,
    probe: Any,
    cu_seqlens: Any,
    options: Options,
    layout: str,
    diagnostics: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    device = q.device
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"q: device {device} is not allowed; it must be cpu or cuda")
    dtype = _autocast(device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (q, k, v))
    if q.is_cuda and not diagnostics and not torch.compiler.is_compiling():
        short = _eager.attention(q, k, v, ridge, scale, bias, probe, cu_seqlens, options, layout, out_dtype)
        if short is not None:
            return short, ()
    _check("q", q, q)
    _check("k", k, q)
    _check("v", v, q)
    if device.type == "cuda" and q.dtype == torch.float64:
        raise TypeError("q: float64 is not computed on a GPU; use float32, bfloat16 or float16, or the CPU")
    check_axes("q", q.shape, layout)
    check_axes("k", k.shape, layout)
    check_axes("v", v.shape, layout)
    q, k, v = heads_first(q, layout), heads_first(k, layout), heads_first(v, layout)
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32

    ridge_value, scale_value = options.ridge, options.scale
    if isinstance(ridge, Tensor):
        ridge = _floating("ridge", ridge).to(device)
        ridge = ridge.reshape(() if ridge.shape == (1,) else ridge.shape)
        ridge = ridge.reshape(ridge_axes(ridge.shape))
    else:
        ridge_value, ridge = _number("ridge", ridge), None
    if bias is not None:
        bias = _floating("bias", bias).to(device, sums).reshape(bias_axes(bias.shape))
    if probe is not None:
        probe = _floating("probe", probe).to(device, sums)
        check_axes("probe", probe.shape, layout)
        probe = heads_first(probe, layout)
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.is_floating_point() or cu_seqlens.dim() != 1:
            raise TypeError(
                f"cu_seqlens: shape {list(cu_seqlens.shape)} of {cu_seqlens.dtype} is not allowed; "
                "it must be a list or tensor [sequences + 1] of integers"
            )
    elif cu_seqlens is not None:
        cu_seqlens = torch.tensor(integers("cu_seqlens", cu_seqlens), dtype=torch.int64)

    root = None
    if isinstance(scale, Tensor):
        _floating("scale", scale)
        if diagnostics and (scale.numel() > 1 or device.type != "cpu"):
            # Mean keys and probes are those of the rescaled call.
            root = _grouped(_square(scale, q, k), q, k).detach().sqrt()
        if device.type != "cpu":
            scale = scale.to(device)
        elif scale.numel() == 1:
            scale = scale.reshape(())
        else:
            out_dtype = q.dtype if out_dtype is None else out_dtype
            q, k, v, ridge, probe = _rescaled(q, k, v, ridge_value if ridge is None else ridge, probe, scale)
            scale_value, scale = 1.0, None
    elif scale is not None:
        scale_value, scale = _number("scale", scale), None

    inputs = (q, k, v, ridge, scale, bias, probe)
    save = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in inputs])
    arguments = (
        *inputs,
        cu_seqlens,
        ridge_value,
        scale_value,
        *options[2:],
        out_dtype,
        layout in ("bnhd", "nhd"),
        save,
        diagnostics,
    )
    if save or torch.compiler.is_compiling():
        out, lse, state, solves = forward(*arguments)
    else:
        # The same, less the way through what records gradients.
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, state, solves = forward(*arguments)
    rest: tuple[Tensor, ...] = ()
    if diagnostics:
        # On a GPU tokens and dims are padded to whole tiles.
        key_mean, used = state[:, :, :, : q.shape[2], : q.shape[3]]
        if root is not None:
            key_mean, used = key_mean / root, used * root
        rest = (lse, key_mean, used, solves[1].view(torch.int32), solves[0])
    return as_laid_out(out, layout), rest


def _square(scale: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The scale as `[KV heads or 1, 1, 1]`: the square of what queries and keys are multiplied with."""
    if scale.dim() > 1 or scale.numel() not in (1, k.shape[1]):
        raise ValueError(
            f"scale: shape {list(scale.shape)} does not fit; it must be a number, [] or [{k.shape[1]}] (KV heads)"
        )
    # The engine would find it in the ridges that are made from it, and name those.
    if scale.numel() > 1 and scale.device.type == "cpu" and not (torch.compiler.is_compiling() or _eager.watched()):
        wrong = [x for x in scale.tolist() if not 0 < x < math.inf]
        if wrong:
            raise ValueError(f"scale: {wrong[0]} is not allowed; it must be finite and greater than 0 for each KV head")
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    square: Tensor = scale.to(q.device, wide).reshape(-1, 1, 1)
    return square


def _grouped(square: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The same of query heads."""
    grouped: Tensor = square if square.shape[0] == 1 else square.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return grouped


def _rescaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: float | Tensor,
    probe: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A scale per KV head on the CPU, as a call with scale 1; `_cuda.Call` says how, and does it on a GPU.

    The gradient of the scale is left to autograd here: in float32 and with solves to 1e-6, which the CPU engine has, the sums
    over q and k keep enough digits.
    """
    square = _square(scale, q, k)
    grouped = _grouped(square, q, k)
    ridges = grouped.reshape(1, -1, 1) * (ridge.to(square.dtype) if isinstance(ridge, Tensor) else ridge)
    root = grouped.sqrt()
    if probe is not None:
        probe = probe / root
    wide = square.dtype
    return q.to(wide) * root, k.to(wide) * square.sqrt(), v.to(wide), ridges, probe
