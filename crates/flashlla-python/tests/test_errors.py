"""Wrong input: ValueError or TypeError in one line that names the argument, and never a wrong answer."""

import flashlla
import numpy as np
import pytest
import torch


def good() -> dict:
    return {
        "q": torch.ones(2, 4, 6, 8),
        "k": torch.ones(2, 2, 7, 8),
        "v": torch.ones(2, 2, 7, 5),
    }


VALUES = {
    "ridge": [
        0.0,
        -1.0,
        float("nan"),
        float("inf"),
        torch.tensor(0.0),
        torch.ones(3),
        torch.ones(2, 4),
        torch.ones(2, 4, 5),
    ],
    "scale": [
        float("nan"),
        float("inf"),
        torch.tensor(float("nan")),
        torch.ones(3),
        torch.ones(1, 2),
        torch.tensor([0.1, -0.1]),
    ],
    "window": [0, -3],
    "max_iters": [0, -1],
    "tolerance": [-1e-3, 1.0, float("nan")],
    "solver": ["gmres"],
    "precision": ["double"],
    "layout": ["bdhn", ""],
    "cu_seqlens": [[0, 3], [0, 5, 3, 7], [1, 7], [-1, 7], torch.tensor([0, 8])],
    "bias": [torch.ones(6), torch.ones(3, 7), torch.ones(2, 3, 7), torch.ones(3, 4, 7)],
    "probe": [torch.ones(2, 4, 6, 7), torch.ones(2, 4, 8)],
    "q": [torch.ones(2, 4, 6), torch.ones(2, 4, 6, 8)[0, 0], torch.ones(2, 4, 6, 8, device="meta")],
    "k": [torch.ones(2, 3, 7, 8), torch.ones(2, 2, 7, 9), torch.ones(3, 2, 7, 8)],
    "v": [torch.ones(2, 2, 6, 5), torch.ones(2, 1, 7, 5), torch.ones(2, 7, 5)],
}
NAMES = {"k": "k|kv_heads", "q": "q|k"}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in VALUES.items() for v in values])
def test_values(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^({NAMES.get(name, name)})\b") as caught:
        flashlla.attention(**(good() | {name: value}))
    assert "\n" not in str(caught.value)


TYPES = {
    "q": [torch.ones(2, 4, 6, 8, dtype=torch.int32), torch.ones(2, 4, 6, 8, dtype=torch.float64), [[1.0]], None],
    "k": [torch.ones(2, 2, 7, 8, dtype=torch.bfloat16), np.ones((2, 2, 7, 8), np.float32), "k"],
    "v": [torch.ones(2, 2, 7, 5, dtype=torch.complex64), None],
    "ridge": ["much", "1.0", None, torch.ones((), dtype=torch.int64)],
    "scale": ["wide", "0.1", torch.ones((), dtype=torch.bool)],
    "bias": [torch.ones(7, dtype=torch.bool), [0.0] * 7, 1.0],
    "probe": [torch.ones(2, 4, 6, 8, dtype=torch.int64), np.ones((2, 4, 6, 8))],
} | (
    OPTIONS := {
        "causal": ["yes", 1, None],
        "leave_one_out": [0],
        "window": [2.5, "all", [3]],
        "q_offset": [0.5, None],
        "max_iters": [1.5],
        "tolerance": ["low", [1e-3], True],
        "solver": [None, 3],
        "precision": [True],
        "cu_seqlens": [7, [0.0, 7.0], "07", [[0, 7]]],
    }
)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in TYPES.items() for v in values])
def test_types(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^({'q|k' if name == 'q' else name})\b") as caught:
        flashlla.attention(**(good() | {name: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in VALUES.items() for v in values if not (isinstance(v, torch.Tensor) and v.is_meta)],
)
def test_values_with_arrays(name: str, value: object) -> None:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    arrays = {argument: x.numpy() for argument, x in good().items()}
    with pytest.raises(ValueError, match=rf"^({NAMES.get(name, name)})\b"):
        flashlla.attention(**(arrays | {name: value}))


@pytest.mark.parametrize("value", [torch.tensor([0.0, 7.0]), torch.tensor(7), torch.tensor([[0, 7]])])
def test_sequences_that_are_no_list_of_integers(value: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="^cu_seqlens"):
        flashlla.attention(**good(), cu_seqlens=value)


OTHERS = {"ridge": ["much", None], "scale": ["wide", True], "bias": ["b", np.ones(7, bool)], "probe": ["p"]}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in (OPTIONS | OTHERS).items() for v in values])
def test_options_with_arrays(name: str, value: object) -> None:
    arrays = {argument: x.numpy() for argument, x in good().items()}
    with pytest.raises(TypeError, match=rf"^{name}\b"):
        flashlla.attention(**(arrays | {name: value}))


@pytest.mark.parametrize("value", [np.ones((2, 4, 6, 8), np.int64), np.ones((2, 4, 6, 8), np.float64), "q", [1.0]])
def test_types_with_arrays(value: object) -> None:
    arrays = {argument: x.numpy() for argument, x in good().items()}
    with pytest.raises(TypeError, match="^(q|k)\\b"):
        flashlla.attention(**(arrays | {"q": value}))


def test_too_wide_a_head() -> None:
    x = torch.ones(1, 1, 2, 257)
    with pytest.raises(ValueError, match="head_dim: 257"):
        flashlla.attention(x, x, x)


def test_what_the_backward_is_given_is_checked_too() -> None:
    q, k, v = (x.requires_grad_() for x in good().values())
    out = flashlla.attention(q, k, v)
    with pytest.raises(RuntimeError, match="shape|invalid gradient"):
        out.backward(torch.ones(2, 4, 6, 4))


def test_a_failed_call_leaves_the_package_usable() -> None:
    with pytest.raises(ValueError):
        flashlla.attention(**good(), ridge=-1.0)
    assert flashlla.attention(**good()).isfinite().all()
