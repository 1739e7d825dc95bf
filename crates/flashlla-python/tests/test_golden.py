"""The golden cases of the Rust library: outputs and gradients computed by another program in float64."""

import flashlla
import pytest
import torch
from conftest import ROOT, assert_near
from safetensors import safe_open

FOLDERS = [ROOT / "crates/flashlla/tests/golden", ROOT.parent / "shared/golden"]
CASES = sorted({path.stem: path for folder in FOLDERS for path in folder.glob("*.safetensors")}.values())


def read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path, dtype: torch.dtype) -> None:
    x, about = read(path)
    if x["q"].shape[2] * x["k"].shape[2] * x["q"].shape[0] * x["q"].shape[1] > 1 << 21:
        pytest.skip("large; the Rust tests run it")
    leaves = {name: x[name].to(dtype).requires_grad_() for name in ("q", "k", "v")}
    leaves["ridge"] = x["ridge"].clone().requires_grad_()
    leaves["scale"] = torch.tensor(float(about["scale"]), dtype=torch.float64, requires_grad=True)
    cu_seqlens = [int(c) for c in about["cu_seqlens"].split(",")] if about["cu_seqlens"] else None
    out, diagnostics = flashlla.attention(
        **leaves,
        causal=float(about["causal"]) != 0,
        window=int(float(about["window"])) or None,
        q_offset=int(float(about["q_offset"])),
        cu_seqlens=cu_seqlens,
        return_diagnostics=True,
    )
    gradients = torch.autograd.grad(out, tuple(leaves.values()), x["grad_out"].to(dtype))
    got = {"out": out, **{name: getattr(diagnostics, name) for name in ("lse", "key_mean", "probe")}}
    got |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    hard = float(x["ridge"].min()) <= 0.1 or float(x["lse"].abs().max()) > 50
    exact = dtype == torch.float64
    for name, value in got.items():
        tolerance = 1e-9 if exact else 1e-3 if hard else 1e-4
        if x[name].abs().max() < 1e-12:  # Zero but for rounding: nothing to be relative to.
            assert value.abs().max() < (1e-12 if exact else 1e-5), name
        else:
            assert_near(value.reshape(x[name].shape), x[name], tolerance, name)


def test_there_are_golden_cases() -> None:
    assert len(CASES) >= 8
