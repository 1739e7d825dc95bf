"""What is handed to a GPU's plans, and what is made of their results: with plans that only look, on any machine."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from conftest import random
from flashlla import _cuda, _flashlla, _operators

B, HQ, H, N, M, D, DV = 2, 4, 2, 5, 7, 6, 3
OPTIONS = (2.0, None, True, None, 0, False, "auto", None, None, "standard")
STATE = (B, HQ, 128, 64)


def at(address: int, *shape: int) -> torch.Tensor:
    """Memory as a float32 tensor."""
    size = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_float * size).from_address(address), dtype=torch.float32).reshape(shape)


class Plan:
    """In the place of the extension's; keeps the arguments, and calls `act` with them by name."""

    scratch_bytes = 1 << 10
    state_shape = STATE

    def __init__(self, names: str, act=lambda **given: None) -> None:
        self.names, self.act, self.runs = names.split(), act, []

    def run(self, *arguments) -> None:
        given = dict(zip(self.names, arguments, strict=True))
        self.runs.append(given)
        self.act(**given)


FORWARD = "stream scratch q k v out bias ridge probe lse key_mean probe_out diagnostics"
BACKWARD = "stream scratch q k v bias ridge grad_out lse key_mean probe dq dk dv dridge dscale dbias covariance"


@pytest.fixture
def made(monkeypatch):
    """The plans that calls get, and what they were made from."""
    calls = SimpleNamespace(forward=Plan(FORWARD), backward=Plan(BACKWARD), made=[])

    def maker(plan):
        def make(device, *dtypes_sizes_options):
            calls.made.append((device, *dtypes_sizes_options))
            return plan

        return make

    monkeypatch.setattr(_flashlla, "cuda_forward_plan", maker(calls.forward))
    monkeypatch.setattr(_flashlla, "cuda_backward_plan", maker(calls.backward))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(_cuda, "state_shape", lambda q, v: STATE)
    _cuda._plan.cache_clear()
    yield calls
    _cuda._plan.cache_clear()


def tensors(**others) -> tuple:
    q, k, v = (
        random(*shape, seed=i, dtype=torch.bfloat16)
        for i, shape in enumerate([(B, HQ, N, D), (B, H, M, D), (B, H, M, DV)])
    )
    names = ("ridge", "scale", "bias", "probe", "cu_seqlens")
    return (q, k, v, *(others.get(name) for name in names))


def results(inputs: tuple, state: bool, diagnostics: bool) -> tuple:
    q, _, v = inputs[:3]
    return (
        torch.empty(B, HQ, N, DV, dtype=q.dtype),
        torch.empty(B, HQ, N),
        torch.zeros(2, *STATE) if state else torch.empty(0),
        torch.ones(2, B, HQ, N) if diagnostics else torch.empty(0),
    )


def test_the_signatures_are_the_extensions() -> None:
    for name, plan in (("ForwardPlan", FORWARD), ("BackwardPlan", BACKWARD)):
        signature = getattr(_flashlla, name).run.__text_signature__
        assert signature.replace("$self, ", "").strip("()") == ", ".join(plan.split())


def test_plain_forward(made) -> None:
    inputs = tensors()
    out = results(inputs, False, False)
    for _ in range(3):
        _cuda.forward(inputs, OPTIONS, out)
    assert len(made.made) == 1, "plans are kept"
    _, dtype, sizes, options = made.made[0]
    assert dtype == "bf16"
    assert sizes == {"q": (B, HQ, N, D), "k": (B, H, M, D), "v": (B, H, M, DV), "bias": False, "probe": False}
    assert options["ridge"] == 2.0 and options["causal"] is True and options["cu_seqlens"] is None
    given = made.forward.runs[-1]
    assert given["stream"] == 77
    assert given["q"] == (inputs[0].data_ptr(), (HQ * N * D, N * D, D))
    assert given["out"] == (out[0].data_ptr(), (HQ * N * DV, N * DV, DV))
    assert given["lse"] == out[1].data_ptr()
    assert all(given[name] is None for name in "bias ridge probe key_mean probe_out diagnostics".split())


def test_forward_with_everything(made) -> None:
    inputs = tensors(
        ridge=torch.full((1, HQ, 1), 3.0, dtype=torch.float64),
        bias=torch.arange(H * M, dtype=torch.float32).reshape(1, H, M, 1),
        cu_seqlens=torch.tensor([0, 3, M]),
    )
    seen = {}

    def act(**given):
        seen["ridge"] = at(given["ridge"][0], HQ).clone()
        seen["bias"] = at(given["bias"][0], HQ, M).clone()

    made.forward.act = act
    out = results(inputs, True, True)
    _cuda.forward(inputs, OPTIONS, out)
    given = made.forward.runs[-1]
    assert made.made[0][3]["cu_seqlens"] == [0, 3, M] and made.made[0][2]["bias"] is True
    assert given["ridge"][1] == (0, 1, 0) and (seen["ridge"] == 3).all()
    assert given["bias"][1] == (0, M)  # One row for every query head.
    assert torch.equal(seen["bias"], inputs[5].reshape(H, M).repeat_interleave(2, 0))
    assert given["key_mean"] == out[2].data_ptr() and given["probe_out"] == out[2][1].data_ptr()
    assert given["diagnostics"] == (out[3][1].data_ptr(), out[3].data_ptr())


def test_a_given_probe_is_padded(made) -> None:
    probe = random(B, HQ, N, D, seed=5, dtype=torch.float32)
    inputs = tensors(probe=probe)
    out = results(inputs, True, True)
    _cuda.forward(inputs, OPTIONS, out)
    given = made.forward.runs[-1]
    padded = at(given["probe"], *STATE)
    assert given["probe"] == out[2][1].data_ptr()  # Where the backward finds it.
    assert torch.equal(padded[:, :, :N, :D], probe) and padded.abs().sum() == probe.abs().sum()
    assert given["probe_out"] is None and given["diagnostics"] is None and (out[3] == 0).all()
    _cuda.forward(inputs, OPTIONS, results(inputs, False, False))


def test_dims_that_do_not_lie_side_by_side_are_copied(made) -> None:
    q, *rest = tensors()
    apart = q.mT.contiguous().mT
    seen = {}
    made.forward.act = lambda **given: seen.update(q=given["q"])
    _cuda.forward((apart, *rest), OPTIONS, results((q, *rest), False, False))
    assert seen["q"][0] != apart.data_ptr() and seen["q"][1] == (HQ * N * D, N * D, D)


@pytest.mark.parametrize("ridge", [(1, 1, 1), (1, HQ, 1), (B, 1, N), (B, HQ, N)])
@pytest.mark.parametrize("bias", [(1, 1), (B, 1), (1, H), (B, H), (1, HQ), (B, HQ)])
def test_sums_of_the_backward(made, ridge: tuple, bias: tuple) -> None:
    inputs = tensors(ridge=torch.ones(ridge, dtype=torch.float64), bias=torch.zeros(*bias, M, 1))
    per_query = random(B, HQ, N, seed=1, dtype=torch.float32)
    per_key = random(B, HQ, M, seed=2, dtype=torch.float32)

    def act(**given):
        at(given["dridge"], B, HQ, N).copy_(per_query)
        at(given["dbias"], B, HQ, M).copy_(per_key)

    made.backward.act = act
    grad_out = torch.ones((), dtype=torch.bfloat16).expand(B, HQ, N, DV)
    empty = _operators._backward_outputs(inputs, True)
    state = (torch.zeros(B, HQ, N), torch.zeros(2, *STATE))
    dq, dk, dv, dridge, _, dbias, _ = _cuda.backward(grad_out, state, inputs, OPTIONS, empty)
    given = made.backward.runs[-1]
    assert given["grad_out"][1] == (HQ * N * DV, N * DV, DV)  # Expanded gradients are written out.
    assert given["dq"] == (dq.data_ptr(), dq.stride()[:3]) and dq.stride()[2] == HQ * D
    assert given["probe"] == state[1][1].data_ptr() and given["covariance"] is None
    assert dridge.shape == ridge and dridge.dtype == torch.float64
    torch.testing.assert_close(dridge, per_query.sum_to_size(ridge).double())
    want = per_key if bias[1] in (1, HQ) else per_key.reshape(B, H, 2, M).sum(2)
    torch.testing.assert_close(dbias, want.sum_to_size(*bias, M)[..., None])
    assert dk.shape == inputs[1].shape and dv.dtype == torch.bfloat16


def test_gradient_of_a_given_probe(made) -> None:
    inputs = tensors(probe=torch.zeros(B, HQ, N, D), ridge=torch.ones(1, 1, 1))
    covariance = random(*STATE, seed=3, dtype=torch.float32)
    made.backward.act = lambda **given: at(given["covariance"], *STATE).copy_(covariance)
    empty = _operators._backward_outputs(inputs, False)
    state = (torch.zeros(B, HQ, N), torch.zeros(2, *STATE))
    gradients = _cuda.backward(torch.zeros(B, HQ, N, DV), state, inputs, OPTIONS, empty)
    assert torch.equal(gradients[6], -covariance[:, :, :N, :D])
    assert (gradients[3] == 0).all()  # A ridge that has no effect.
