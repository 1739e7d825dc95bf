"""What PyTorch does with operators: compilation, fake tensors, autocast, checkpointing, gradient modes."""

import shutil

import flashlla
import pytest
import torch
from conftest import assert_near, random
from torch.utils.checkpoint import checkpoint

OPTIONS = (None, True, None, 0, False, "auto", None, None, "standard")  # From scale to precision.


def inputs(dtype=torch.float32) -> list[torch.Tensor]:
    shapes = [(2, 4, 24, 8), (2, 2, 24, 8), (2, 2, 24, 8), (4,)]
    q, k, v, ridge = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    return [x.requires_grad_() for x in (q, k, v, ridge.abs() + 0.5)]


def model(q, k, v, ridge):
    out = flashlla.attention(q * 2, k, v + 1, ridge=ridge.exp(), scale=ridge[0], causal=True)
    packed = flashlla.attention(q, k, v, ridge=ridge, window=7, cu_seqlens=[0, 9, 24])
    return (out * packed).tanh()


def results(function, leaves) -> list[torch.Tensor]:
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.sum(), leaves)]


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param(
            "inductor", False, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
        ),
    ],
)
def test_compiles_without_a_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for got, want in zip(results(compiled, inputs()), results(model, inputs()), strict=True):
        assert_near(got, want, 1e-5)


def test_compiles_the_interface_of_the_published_package() -> None:
    torch._dynamo.reset()

    def call(q, k, v):
        o = flashlla.lla_attention(q, k, v, ridge_lambda=0.5)
        o2, omega = flashlla.LLAFunction.apply(q, k, v, torch.tensor(0.5), 0.3, 0.0, 1e-6, 1e-6, 32, False)
        return o * o2 + omega

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [random(2, 20, 8, seed=i, dtype=torch.float32, grad=True) for i in range(3)]
    for got, want in zip(results(compiled, leaves), results(call, leaves), strict=True):
        assert_near(got, want, 1e-6)


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(("save", "diagnostics"), [(True, False), (False, True), (True, True)])
def test_operators_are_what_they_declare(tokens_first: bool, save: bool, diagnostics: bool) -> None:
    q, k, v, ridge = inputs()
    if not save:
        q, k, v, ridge = (x.detach() for x in (q, k, v, ridge))
    ridge = ridge.reshape(1, 4, 1)
    scale = torch.tensor(0.3, requires_grad=save)
    bias, probe = torch.zeros(1, 1, 24, 1), None
    cu_seqlens = torch.tensor([0, 24])
    arguments = (q, k, v, ridge, scale, bias, probe, cu_seqlens, 1.0, *OPTIONS, None, tokens_first, save, diagnostics)
    torch.library.opcheck(torch.ops.flashlla.forward.default, arguments)
    if save:
        with torch.no_grad():
            out, lse, state, _ = torch.ops.flashlla.forward(*arguments)
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(
            torch.ops.flashlla.backward.default,
            (torch.ones_like(out), lse, state, *detached[:18], tokens_first),
        )


def test_meta_tensors_have_shapes() -> None:
    q = torch.empty(2, 10, 4, 8, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 12, 2, 8, device="meta", dtype=torch.bfloat16)
    out, diagnostics = flashlla.attention(q, k, k, layout="bnhd", return_diagnostics=True)
    assert out.is_meta and out.shape == (2, 10, 4, 8) and out.dtype == torch.bfloat16
    assert diagnostics.probe.shape == (2, 4, 10, 8) and diagnostics.lse.dtype == torch.float32


def test_autocast() -> None:
    q, k, v, ridge = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = flashlla.attention(q, k.bfloat16(), v, ridge=ridge)
    assert out.dtype == torch.bfloat16
    want = flashlla.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), ridge=ridge)
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and ridge.grad.dtype == torch.float32
    exact = inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert flashlla.attention(*exact[:3]).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    def checkpointed(*leaves):
        return checkpoint(model, *leaves, use_reentrant=reentrant)

    leaves = inputs()
    want = results(model, leaves)
    checkpointed(*leaves).sum().backward()
    for leaf, gradient in zip(leaves, want[1:], strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_modes_without_gradients() -> None:
    q, k, v, ridge = inputs()
    want = flashlla.attention(q, k, v, ridge=ridge)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = flashlla.attention(q, k, v, ridge=ridge)
        assert not out.requires_grad and torch.equal(out, want)


def test_data_parallel(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        block = flashlla.nn.LocalLinearAttention(16, 2)
        x = random(2, 5, 16, seed=0, dtype=torch.float32)
        torch.nn.parallel.DistributedDataParallel(block)(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    finally:
        torch.distributed.destroy_process_group()
