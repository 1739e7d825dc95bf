"""The interface of the published package: signatures, results, gradients; and its dense reference."""

import inspect

import dense
import flashlla
import pytest
import torch
from conftest import assert_near, random
from flashlla import LLAFunction, lla_attention
from flashlla.ops.naive import lla_backward_naive, lla_forward_naive


def qkv(b: int, s: int, d: int, dtype=torch.float32, grad: bool = False) -> list[torch.Tensor]:
    return [random(b, s, d, seed=i, dtype=dtype, grad=grad) for i in range(3)]


def arguments(ridge=10.0, scale: float | None = None, rtol: float = 1e-12) -> tuple:
    return (ridge, scale, 1e-6, 1e-6, rtol, 32, False)


def test_signatures() -> None:
    assert str(inspect.signature(lla_attention)).replace("'", "") == (
        "(q: Tensor, k: Tensor, v: Tensor, *, ridge_lambda: float | Tensor = 10.0, qk_scale: float | None = None, "
        "delta_eps: float = 1e-12, cg_atol: float = 1e-12, cg_rtol: float = 1e-12, cg_max_iters: int = 32, "
        "cg_use_preconditioner: bool = False) -> Tensor"
    )
    names = "q k v ridge_lambda qk_scale delta_eps cg_atol cg_rtol cg_max_iters cg_use_preconditioner"
    assert " ".join(inspect.signature(LLAFunction.apply).parameters) == names
    names = "q k v qk_scale ridge_lambda delta_eps lla_block_size"
    assert " ".join(inspect.signature(lla_forward_naive).parameters) == names
    names = "q k v r d m grad_o qk_scale ridge_lambda lla_block_size"
    assert " ".join(inspect.signature(lla_backward_naive).parameters) == names
    assert flashlla.ops.LLAFunction is LLAFunction and flashlla.ops.lla_attention is lla_attention


# The published tests call with a squared residual of 1e-6, and allow 1e-2 and 1e-1.
@pytest.mark.parametrize(("rtol", "tolerance"), [(1e-12, 1e-5), (1e-6, 1e-3)])
@pytest.mark.parametrize("tokens", [64, 128, 256, 512])
def test_forward_and_backward_against_the_reference(tokens: int, rtol: float, tolerance: float) -> None:
    q, k, v = qkv(1, tokens, 64, grad=True)
    scale = 64**-0.5
    o, omega = LLAFunction.apply(q, k, v, *arguments(torch.tensor(10.0), scale, rtol))
    want, rho, denom, m = lla_forward_naive(q.detach(), k.detach(), v.detach(), scale, 10.0, 1e-6)
    assert_near(o, want, tolerance, "o")
    grad_o = random(*o.shape, seed=4, dtype=torch.float32)
    o.backward(grad_o)
    gradients = lla_backward_naive(q.detach(), k.detach(), v.detach(), rho, denom, m, grad_o, scale, 10.0)
    for name, x, gradient in zip("qkv", (q, k, v), gradients, strict=True):
        assert_near(x.grad, gradient, tolerance, f"d{name}")
    assert omega.shape == (1, tokens, 1) and omega.dtype == torch.float32 and not omega.requires_grad
    logits = (q @ k.mT * scale).masked_fill(~dense.visible(tokens, tokens, causal=True), -torch.inf).detach()
    assert_near(omega, (logits - logits.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True), 1e-5, "omega")


def test_omega_of_more_rows_than_a_block() -> None:
    q, k, v = qkv(1, 1500, 8, torch.float64)
    omega = LLAFunction.apply(q, k, v, *arguments())[1]
    logits = (q @ k.mT * 8**-0.5).masked_fill(~dense.visible(1500, 1500, causal=True), -torch.inf)
    assert_near(omega, (logits - logits.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True), 1e-6)


RIDGES = {
    "number": lambda: 0.5,
    "scalar": lambda: torch.tensor(0.5, dtype=torch.float64),
    "one": lambda: torch.tensor([0.5], dtype=torch.float64),
    "token": lambda: random(40, seed=8).abs() + 0.1,
    "batch": lambda: random(2, 1, seed=8).abs() + 0.1,
    "both": lambda: random(2, 40, seed=8).abs() + 0.1,
}


@pytest.mark.parametrize("name", RIDGES)
def test_ridges(name: str) -> None:
    ridge = RIDGES[name]()
    q, k, v = qkv(2, 40, 8, torch.float64, grad=True)
    leaves = [q, k, v]
    if isinstance(ridge, torch.Tensor):
        leaves.append(ridge.requires_grad_())
    o = lla_attention(q, k, v, ridge_lambda=ridge)
    want, rho, denom, m = lla_forward_naive(q, k, v, 8**-0.5, ridge, 0.0)
    assert_near(o, want, 1e-11)
    weights = random(*o.shape, seed=9)
    mine, theirs = (torch.autograd.grad(x, leaves, weights) for x in (o, want))
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a, b, 1e-9)
    for a, b in zip(lla_backward_naive(q, k, v, rho, denom, m, weights, 8**-0.5, ridge), theirs, strict=False):
        assert_near(a, b, 1e-9)


def test_the_reference_is_the_definition() -> None:
    q, k, v = qkv(2, 30, 6, torch.float64)
    o, rho, denom, m = lla_forward_naive(q, k, v, 0.4, 0.3, 0.0)
    want = dense.attention(q[:, None], k[:, None], v[:, None], ridge=0.3, scale=0.4, causal=True)
    assert_near(o, want[:, 0], 1e-11)
    # ρ and the denominator as the paper defines them, from unnormalised weights.
    logits = (q @ k.mT * 0.4).masked_fill(~dense.visible(30, 30, causal=True), -torch.inf)
    w = (logits - m).exp()
    z = k[:, None] - q[:, :, None]
    mu = (w[..., None] * z).sum(2)
    omega = w.sum(-1)
    sigma = (w[..., None] * z).mT @ z + 0.3 * omega[..., None, None] * torch.eye(6, dtype=q.dtype)
    assert_near(rho, torch.linalg.solve(sigma, mu[..., None])[..., 0], 1e-10)
    assert_near(denom[..., 0], omega - (mu * rho).sum(-1), 1e-10)
    assert torch.equal(m[..., 0], logits.amax(-1))
    moved = lla_forward_naive(q, k, v, 0.4, 0.3, 0.5)[2]
    assert_near(moved, denom + 0.5, 1e-12)


def test_blocks_of_the_reference() -> None:
    q, k, v = qkv(1, 20, 6, torch.float64)
    o, rho, denom, _ = lla_forward_naive(q, k, v, 0.4, 0.3, 0.0, lla_block_size=2)
    assert error_of(rho, lla_forward_naive(q, k, v, 0.4, 0.3, 0.0)[1]) > 1e-3  # It is another operator,
    logits = (q @ k.mT * 0.4).masked_fill(~dense.visible(20, 20, causal=True), -torch.inf)
    p = logits.softmax(-1)
    for first in (0, 2, 4):  # in which every block of dims has a system of its own.
        dims = slice(first, first + 2)
        z = k[:, None, :, dims] - q[:, :, None, dims]
        sigma = (p[..., None] * z).mT @ z + 0.3 * torch.eye(2, dtype=q.dtype)
        mean = (p[..., None] * z).sum(2)
        assert_near(rho[..., dims], torch.linalg.solve(sigma, mean[..., None])[..., 0], 1e-10)
    with pytest.raises(ValueError, match="lla_block_size"):
        lla_forward_naive(q, k, v, 0.4, 0.3, 0.0, lla_block_size=4)
    with pytest.raises(ValueError, match="lla_block_size"):
        lla_backward_naive(q, k, v, rho, denom, denom, o, 0.4, 0.3, lla_block_size=2)


def error_of(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_looser_tolerance_takes_fewer_steps_and_errs_within_it() -> None:
    q, k, v = qkv(1, 256, 32, torch.float64)
    exact = lla_attention(q, k, v, ridge_lambda=0.1)
    loose = lla_attention(q, k, v, ridge_lambda=0.1, cg_rtol=1e-4)
    assert 1e-9 < error_of(loose, exact) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 33, 16, dtype, grad=True)
    o, omega = LLAFunction.apply(q, k, v, *arguments(torch.tensor(0.1, dtype=dtype)))
    assert o.dtype == dtype and omega.dtype == torch.float32
    o.float().pow(2).mean().backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"ridge_lambda": torch.ones(3)}, "ridge_lambda"),
        ({"ridge_lambda": -1.0}, "ridge"),
        ({"cg_max_iters": 0}, "max_iters"),
        ({"cg_rtol": -1.0}, "cg_rtol"),
        ({"cg_rtol": float("nan")}, "cg_rtol"),
        ({"qk_scale": float("inf")}, "scale"),
    ],
)
def test_errors(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        lla_attention(*qkv(1, 8, 4), **change)


def test_four_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="q: shape"):
        lla_attention(*(x[None] for x in qkv(1, 8, 4)))
