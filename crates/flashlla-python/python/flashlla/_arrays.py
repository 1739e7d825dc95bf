"""The operator on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flashlla import _flashlla
from flashlla._options import Options, as_laid_out, bias_axes, check_axes, heads_first, integers, ridge_axes

Array = npt.NDArray[Any]

# bfloat16 is a dtype of the package ml_dtypes, known by its name.
_NAMES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def _host(array: Array) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    size = array.itemsize
    strides = tuple(stride // size for stride in array.strides)
    return (array.__array_interface__["data"][0], _NAMES[array.dtype.name], array.shape, strides)


def _readable(argument: str, array: Any) -> Array:
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{argument}: {type(array).__name__} is not allowed; q, k and v must all be torch.Tensor or all numpy.ndarray"
        )
    if array.dtype.name not in _NAMES:
        raise TypeError(
            f"{argument}: dtype {array.dtype} is not allowed; it must be float64, float32, float16 or bfloat16"
        )
    steps = all(stride % array.itemsize == 0 for stride in array.strides)
    if not (array.dtype.isnative and array.flags.aligned and steps):
        return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
    return array


def _inputs(
    named: dict[str, Any], ridge: Any, scale: Any, bias: Any, probe: Any, options: Options, layout: str
) -> tuple[dict[str, Any], list[Array], Options]:
    """What the engine reads, the arrays whose addresses that holds, and the options with the numbers among them. `named`: q, k
    and v, under the names that the user knows them by."""
    inputs: dict[str, Any] = {}
    held: list[Array] = []  # What addresses lead to must stay alive.
    for name, (argument, array) in zip("qkv", named.items(), strict=True):
        array = _readable(argument, array)
        if held and array.dtype != held[0].dtype:
            raise TypeError(f"{argument}: dtype {array.dtype} does not match q's {held[0].dtype}")
        check_axes(argument, array.shape, layout)
        held.append(heads_first(array, layout))
        inputs[name] = _host(held[-1])
    sums = _sums(held[0])

    inputs.update(ridge=None, bias=None, probe=None)
    for argument, x in (("ridge", ridge), ("bias", bias), ("probe", probe)):
        if x is not None and np.asarray(x).dtype.kind not in "fiu" or x is None and argument == "ridge":
            raise TypeError(
                f"{argument}: {type(x).__name__} is not allowed; it must be a number or an array of numbers"
            )
    if np.ndim(ridge) > 0:
        ridge = np.asarray(ridge, dtype=np.float64)
        if ridge.shape == (1,):
            ridge = ridge.reshape(())
        held.append(np.ascontiguousarray(ridge.reshape(ridge_axes(ridge.shape))))
        inputs["ridge"] = _host(held[-1])
    else:
        options = options._replace(ridge=float(ridge))
    if scale is not None:
        if np.asarray(scale).dtype.kind not in "fiu":
            raise TypeError(f"scale: {type(scale).__name__} is not allowed; it must be a number")
        if np.ndim(scale) > 0 and np.size(scale) > 1:
            raise ValueError(f"scale: shape {list(np.shape(scale))} does not fit; it must be a number for NumPy arrays")
        options = options._replace(scale=float(np.asarray(scale).reshape(())))
    if bias is not None:
        bias = np.asarray(bias, dtype=sums)
        held.append(np.ascontiguousarray(bias.reshape(bias_axes(bias.shape))))
        inputs["bias"] = _host(held[-1])
    if probe is not None:
        check_axes("probe", np.shape(probe), layout)
        held.append(heads_first(np.ascontiguousarray(np.asarray(probe, dtype=sums)), layout))
        inputs["probe"] = _host(held[-1])
    return inputs, held, options


def _sums(q: Array) -> np.dtype[Any]:
    return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)


def _outputs(q: Array, value_dim: int, layout: str, diagnostics: bool) -> tuple[Array, tuple[Array, ...]]:
    """Everything that a call returns, not yet computed, `[batch, head, token, dim]`."""
    b, h, n, d = q.shape
    if layout in ("bnhd", "nhd"):
        out = np.empty((b, n, h, value_dim), q.dtype).swapaxes(1, 2)
    else:
        out = np.empty((b, h, n, value_dim), q.dtype)
    if not diagnostics:
        return out, ()
    sums = _sums(q)
    rest = (
        np.empty((b, h, n), sums),
        np.empty((b, h, n, d), sums),
        np.empty((b, h, n, d), sums),
        np.empty((b, h, n), np.int32),
        np.empty((b, h, n), np.float32),
    )
    return out, rest


def _results(rest: tuple[Array, ...]) -> dict[str, Any]:
    names = ("lse", "key_mean", "probe", "iterations", "residual")
    if not rest:
        return dict.fromkeys(names)
    # Iterations are int32 under float32's name.
    hosts = [_host(array.view(np.float32) if array.dtype == np.int32 else array) for array in rest]
    return dict(zip(names, hosts, strict=True))


def attention(
    q: Any,
    k: Any,
    v: Any,
    ridge: Any,
    scale: Any,
    bias: Any,
    probe: Any,
    cu_seqlens: Any,
    options: Options,
    layout: str,
    diagnostics: bool,
) -> tuple[Array, tuple[Array, ...]]:
    named = {"q": q, "k": k, "v": v}
    inputs, held, options = _inputs(named, ridge, scale, bias, probe, options, layout)
    sequences = None if cu_seqlens is None else integers("cu_seqlens", cu_seqlens)
    inputs["options"] = options.given(None, sequences)
    out, rest = _outputs(held[0], held[2].shape[3], layout, diagnostics)
    _flashlla.cpu_forward(inputs, _host(out), _results(rest))
    return as_laid_out(out, layout), rest


def decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    block_table: Any,
    ridge: Any,
    scale: Any,
    bias: Any,
    probe: Any,
    options: Options,
    layout: str,
    diagnostics: bool,
) -> tuple[Array, tuple[Array, ...]]:
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    inputs, held, options = _inputs(named, ridge, scale, bias, probe, options, layout)
    inputs["options"] = options.given(None, None)
    out, rest = _outputs(held[0], held[2].shape[3], layout, diagnostics)
    table = None
    if block_table is not None:
        table = integers("block_table", rows_of("block_table", np.shape(block_table), held[0].shape[0], block_table))
    _flashlla.cpu_decode(inputs, integers("lengths", lengths), table, _host(out), _results(rest))
    return as_laid_out(out, layout), rest


def rows_of(argument: str, shape: Any, sequences: int, table: Any) -> Any:
    """A table `[sequences, n]` row by row."""
    if len(shape) != 2 or shape[0] != sequences:
        raise ValueError(
            f"{argument}: shape {list(shape)} does not fit; it must be [{sequences}, n] (sequences, pages per sequence)"
        )
    return np.asarray(table).reshape(-1)
