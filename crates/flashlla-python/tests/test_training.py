"""The training example: the same losses as with the dense reference, and, with --slow, a task learned."""

import importlib.util
import time

import pytest
from conftest import ROOT

_spec = importlib.util.spec_from_file_location(
    "associative_recall", ROOT / "crates/flashlla-python/examples/associative_recall.py"
)
recall = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recall)


def test_the_same_losses_as_the_reference() -> None:
    mine, _ = recall.train(20, batch=8, quiet=True)
    theirs, _ = recall.train(20, reference=True, batch=8, quiet=True)
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert abs(a - b) <= 1e-4 * b, f"step {step}: {a} and {b}"
    assert mine[-1] != mine[0]


@pytest.mark.slow
def test_learns() -> None:
    began = time.perf_counter()
    losses, right = recall.train(200)
    assert losses[0] > 2.5 and losses[-1] < 0.05 and right > 0.98
    assert time.perf_counter() - began < 180
