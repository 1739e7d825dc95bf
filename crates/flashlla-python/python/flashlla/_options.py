"""What a call is told beside its tensors, and where heads and tokens lie."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, NamedTuple

LAYOUTS = {"bhnd": 4, "bnhd": 4, "bnd": 3, "nhd": 3}


class Options(NamedTuple):
    """The options of a call, in the order in which the operators take them."""

    ridge: float
    scale: float | None
    causal: bool
    window: int | None
    q_offset: int
    leave_one_out: bool
    solver: str
    tolerance: float | None
    max_iters: int | None
    precision: str

    def given(self, scale: float | None, cu_seqlens: list[int] | None) -> dict[str, Any]:
        """The options as the extension takes them, with what stood in tensors."""
        options: dict[str, Any] = self._asdict()
        options["cu_seqlens"] = cu_seqlens
        if scale is not None:
            options["scale"] = scale
        return options


def _must_be(kind: str, argument: str, given: Any) -> TypeError:
    return TypeError(f"{argument}: {type(given).__name__} is not allowed; it must be {kind}")


def _integer(argument: str, x: Any) -> int | None:
    if x is None or type(x) is int:
        return x
    try:
        return operator.index(x)
    except TypeError:
        raise _must_be("an integer", argument, x) from None


def integers(argument: str, values: Any) -> list[int]:
    try:
        return [operator.index(x) for x in values]
    except TypeError:
        raise _must_be("a list of integers", argument, values) from None


def checked(
    causal: Any,
    window: Any,
    q_offset: Any,
    leave_one_out: Any,
    solver: Any,
    tolerance: Any,
    max_iters: Any,
    precision: Any,
) -> Options:
    """Options of the right types; whether their values are allowed is for the engine to say."""
    for argument, x in (("causal", causal), ("leave_one_out", leave_one_out)):
        if not isinstance(x, bool):
            raise _must_be("True or False", argument, x)
    for argument, x in (("solver", solver), ("precision", precision)):
        if not isinstance(x, str):
            raise _must_be("a string", argument, x)
    if tolerance is not None and (not isinstance(tolerance, Real) or isinstance(tolerance, bool)):
        raise _must_be("a number", "tolerance", tolerance)
    offset = _integer("q_offset", q_offset)
    if offset is None:
        raise _must_be("an integer", "q_offset", None)
    window, max_iters = _integer("window", window), _integer("max_iters", max_iters)
    tolerance = None if tolerance is None else float(tolerance)
    return Options(10.0, None, causal, window, offset, leave_one_out, solver, tolerance, max_iters, precision)


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: '{layout}' is not allowed; it must be one of {', '.join(LAYOUTS)}")


def check_axes(argument: str, shape: Any, layout: str) -> None:
    if len(shape) != LAYOUTS[layout]:
        raise ValueError(f"{argument}: shape {list(shape)} does not fit; it must have the axes of layout '{layout}'")


def sizes(shape: Any, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, tokens and dim of a tensor of that shape."""
    if layout == "bhnd":
        return (shape[0], shape[1], shape[2], shape[3])
    if layout == "bnhd":
        return (shape[0], shape[2], shape[1], shape[3])
    if layout == "bnd":
        return (shape[0], 1, shape[1], shape[2])
    return (1, shape[1], shape[0], shape[2])


def heads_first(x: Any, layout: str) -> Any:
    """A tensor or array of a layout as `[batch, head, token, dim]`: a view."""
    if layout == "bhnd":
        return x
    if layout == "bnhd":
        return x.swapaxes(1, 2)
    if layout == "bnd":
        b, n, d = x.shape
        return x.reshape(b, 1, n, d)
    return x[None].swapaxes(1, 2)


def as_laid_out(x: Any, layout: str) -> Any:
    """The opposite."""
    if layout == "bhnd":
        return x
    if layout == "bnhd":
        return x.swapaxes(1, 2)
    if layout == "bnd":
        return x.squeeze(1)
    return x.swapaxes(1, 2).squeeze(0)


def ridge_axes(shape: Any) -> tuple[int, ...]:
    """The axes `[batch, query head, query]` of a ridge of that shape, 1 where it is constant."""
    if len(shape) == 0:
        return (1, 1, 1)
    if len(shape) == 1:
        return (1, shape[0], 1)
    if len(shape) == 3:
        return tuple(shape)
    raise ValueError(
        f"ridge: shape {list(shape)} does not fit; it must be [], [query heads], or [batch, query heads, queries] "
        "with 1 where it is constant"
    )


def bias_axes(shape: Any) -> tuple[int, ...]:
    """The axes `[batch, head, key, 1]` of a bias of that shape, 1 where it is constant."""
    if len(shape) == 1:
        return (1, 1, shape[0], 1)
    if len(shape) == 3:
        return (*shape, 1)
    raise ValueError(
        f"bias: shape {list(shape)} does not fit; it must be [keys] or [batch, heads, keys] with 1 where it is constant"
    )
