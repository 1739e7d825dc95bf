"""Threads, signals and forks."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import flashlla
import pytest
import torch
from conftest import random


@pytest.fixture(autouse=True)
def threads_as_before():
    before = flashlla.get_num_threads()
    yield
    flashlla.set_num_threads(before)


def test_bits_do_not_depend_on_threads() -> None:
    q, k, v = (random(1, 2, 300, 16, seed=i) for i in range(3))
    results = []
    for threads in (1, 3):
        flashlla.set_num_threads(threads)
        assert flashlla.get_num_threads() == threads
        results.append(flashlla.attention(q, k, v, causal=True))
    assert torch.equal(*results)


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_wrong_thread_counts(threads: int) -> None:
    with pytest.raises(ValueError, match="^threads:"):
        flashlla.set_num_threads(threads)


def test_python_runs_while_a_call_does() -> None:
    # 100 ms and more of work; the other thread wakes every millisecond.
    flashlla.set_num_threads(2)
    x = random(1, 4, 1500, 64, seed=0)
    inside, wakes = threading.Event(), []

    def watch() -> None:
        while not inside.is_set():
            wakes.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    flashlla.attention(x, x, x, ridge=0.1)
    ended = time.perf_counter()
    inside.set()
    watcher.join()
    assert sum(began < t < ended for t in wakes) >= 5, f"in {ended - began:.3f} s"


def test_calls_side_by_side() -> None:
    x = random(1, 2, 200, 16, seed=0)
    want = flashlla.attention(x, x, x)
    got: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: got.append(flashlla.attention(x, x, x))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6 and all(torch.equal(y, want) for y in got)


# Half a minute of work and more for two threads of any machine, were it not interrupted.
LONG = """
import signal, sys, time
import torch, flashlla
# A shell's background jobs, and what they start, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
flashlla.set_num_threads(2)
x = torch.randn(1, 64, 6000, 64, requires_grad=True)
weights = torch.ones(1, 64, 6000, 64)
call = lambda: flashlla.attention(x, x, x, ridge=0.01, solver="direct")
if sys.argv[1] == "backward":
    out, state = torch.zeros_like(x), torch.zeros(2, 1, 64, 6000, 64)
    arguments = (x, x, x, *[None] * 5, 0.01, None, False, None, 0, False, "direct", None, None, "standard", False)
    call = lambda: torch.ops.flashlla.backward(weights, torch.zeros(1, 64, 6000), state, *arguments)
elif sys.argv[1] == "numpy":
    array = x.detach().numpy()
    call = lambda: flashlla.attention(array, array, array, ridge=0.01, solver="direct")
print("ready", flush=True)
try:
    with torch.no_grad():
        call()
except KeyboardInterrupt:
    small = torch.randn(1, 1, 8, 4)
    assert flashlla.attention(small, small, small).isfinite().all()
    print("interrupted", flush=True)
else:
    print("finished", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("what", ["forward", "backward", "numpy"])
def test_control_c(what: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", LONG, what], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        began = time.perf_counter()
        assert process.stdout.readline() == "interrupted\n"
        assert time.perf_counter() - began < 10
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_works_after_a_fork() -> None:
    script = textwrap.dedent("""
        import os
        import numpy as np, flashlla
        x = np.random.default_rng(0).normal(size=(1, 2, 100, 8))
        want = flashlla.attention(x, x, x)
        child = os.fork()
        if child == 0:
            same = (flashlla.attention(x, x, x) == want).all()
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
