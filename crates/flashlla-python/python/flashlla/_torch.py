"""PyTorch where there is one, else `None`: NumPy alone is enough for much of the package."""

from __future__ import annotations

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

__all__ = ["torch"]
