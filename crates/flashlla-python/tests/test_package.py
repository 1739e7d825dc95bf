"""The command line, the documentation's examples, types."""

import doctest
import importlib
import json
import re
import subprocess
import sys

import flashlla
import pytest
import torch
from conftest import ROOT
from flashlla.__main__ import main

MODULES = ["flashlla", "flashlla._public", "flashlla.ops", "flashlla.ops.naive", "flashlla.nn", "flashlla.bench"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0 and results.failed == 0


def test_example_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})


def test_everything_public_is_documented_and_there() -> None:
    for name in flashlla.__all__:
        thing = getattr(flashlla, name)
        assert isinstance(thing, str) or thing.__doc__, name


def test_the_version_is_the_workspace_s() -> None:
    assert f'version = "{flashlla.__version__}"' in (ROOT / "Cargo.toml").read_text()


def test_info(capsys) -> None:
    assert main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["flashlla"] == flashlla.__version__ and about["threads"] >= 1
    assert about["cuda"]["available"] or "cuda" in about["cuda"]["reason"]
    assert main(["info"]) == 0
    assert "instruction_set" in capsys.readouterr().out


def test_bench(capsys) -> None:
    assert main(["bench", "--shape", "1,2,64,16", "--repeats", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["flashlla", "sdpa", "dense"]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in rows)
    assert main(["bench", "--shape", "1,2,64,16", "--repeats", "1", "--ridge", "-1"]) == 1
    assert "ridge" in capsys.readouterr().err
    for wrong in (["--shape", "1,2"], ["--shape", "1,2,a,4"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            main(["bench", *wrong])
        error = capsys.readouterr().err.splitlines()[-1]
        assert wrong[0] in error and f"'{wrong[1]}' is not allowed" in error
    for device in ("gpu", "meta", *([] if torch.cuda.is_available() else ["cuda"])):
        assert main(["bench", "--device", device]) == 1
        error = capsys.readouterr().err
        assert device in error and error.count("\n") == 1


def test_runs_as_a_program() -> None:
    run = subprocess.run([sys.executable, "-m", "flashlla", "info"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and flashlla.__version__ in run.stdout


def test_numpy_is_enough() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, flashlla\n"
        "x = np.ones((1, 1, 4, 2)); print(flashlla.attention(x, x, x).shape, hasattr(flashlla, 'nn'))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout == "(1, 1, 4, 2) False\n", run.stderr


@pytest.mark.parametrize("command", [["mypy"], ["mypy.stubtest", "flashlla._flashlla"]], ids=lambda c: c[0])
def test_types(command: list[str]) -> None:
    pytest.importorskip("mypy")
    folder = ROOT / "crates/flashlla-python"
    arguments = ["--config-file", "pyproject.toml", "python/flashlla"] if command == ["mypy"] else []
    run = subprocess.run(
        [sys.executable, "-m", *command, *arguments], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
