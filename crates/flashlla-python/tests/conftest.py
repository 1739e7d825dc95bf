"""What the tests share: random tensors, and the relative error that they hold results to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error. A NaN in either makes it infinite."""
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    got, want = got.detach().double(), want.detach().double()
    if got.isnan().any() or want.isnan().any():
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float, name: str = "") -> None:
    found = error(got, want)
    assert found <= tolerance, f"{name} {found:.1e} > {tolerance:.0e}"
