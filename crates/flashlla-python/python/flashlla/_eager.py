"""The short way of a call on a GPU: from tensors to the kernels with nothing between that has to be paid for at every call.

What `torch.ops.flashlla.forward` is for (compilation, fake tensors, modes and subclasses that look at every operator) is looked
for first; where any of it is at work, and for what is rare or wrong, the answer is `None`, and the operator is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlla._cuda import Call, prepared
from flashlla._options import Options

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class _Recorded(torch.autograd.Function):
    """A forward with its gradients recorded."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        out_dtype: torch.dtype,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ridge: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        probe: Tensor | None,
    ) -> Tensor:
        b, h, n = call.rows
        kept = q.new_empty(2 * call.state_numel + b * h * n, dtype=torch.float32)
        lse = kept.data_ptr() + 8 * call.state_numel
        out = call.forward(q, k, v, ridge, scale, bias, probe, lse=lse, state=kept)
        ctx.save_for_backward(kept, q, k, v, ridge, scale, bias, probe)
        ctx.call = call
        return out if call.dtype is out_dtype else out.to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (grad_out, *ctx.saved_tensors)
        # Recording is on only where gradients of gradients may be asked for.
        gradients = _Once.apply(ctx.call, *inputs) if torch.is_grad_enabled() else _gradients(ctx.call, *inputs)
        wanted = zip(gradients, ctx.needs_input_grad[2:], strict=True)
        return (None, None, *[x if needed else None for x, needed in wanted])


def _gradients(call: Call, grad_out: Tensor, kept: Tensor, *tensors: Any) -> tuple[Tensor | None, ...]:
    _, h, n = call.rows
    lse = kept.as_strided(call.rows, (h * n, n, 1), 2 * call.state_numel)
    return call.backward(grad_out, lse, kept, *tensors)


class _Once(torch.autograd.Function):
    """The backward where it is recorded: it has no gradients of its own."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError("flashlla: gradients of gradients are not implemented")


def watched() -> bool:
    """Whether anything looks at operators as they are called."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def attention(
    q: Tensor,
    k: Any,
    v: Any,
    ridge: Any,
    scale: Any,
    bias: Any,
    probe: Any,
    cu_seqlens: Any,
    options: Options,
    layout: str,
    out_dtype: torch.dtype | None,
) -> Tensor | None:
    device, dtype = q.get_device(), q.dtype
    if dtype not in _FLOATS or watched():
        return None
    tensors = [q, k, v]
    ridge_value, scale_value = options.ridge, options.scale
    if isinstance(ridge, (float, int)):
        ridge_value, ridge = float(ridge), None
    elif ridge is None:
        return None
    if isinstance(scale, (float, int)):
        scale_value, scale = float(scale), None
    for x in (q, k, v):
        if type(x) not in _PLAIN or x.dtype is not dtype or x.get_device() != device:
            return None
    for x in (ridge, scale, bias, probe):
        if x is not None:
            if type(x) not in _PLAIN or x.dtype is not torch.float32 or x.get_device() != device:
                return None
            tensors.append(x)
    sequences = None
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.dim() != 1:
            return None
        sequences = tuple(cu_seqlens.tolist())
    given = (bias is not None, probe is not None, scale is not None)
    shapes = (q.shape, k.shape, v.shape)
    call = prepared(device, layout, dtype, *shapes, *given, sequences, ridge_value, scale_value, options)
    if out_dtype is None:
        out_dtype = dtype
    if torch.is_grad_enabled() and any([x.requires_grad for x in tensors]):
        recorded: Tensor = _Recorded.apply(call, out_dtype, q, k, v, ridge, scale, bias, probe)
        return recorded
    out = call.forward(q, k, v, ridge, scale, bias, probe)
    return out if call.dtype is out_dtype else out.to(out_dtype)
