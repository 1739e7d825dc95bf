"""Plans in the place of the extension's GPU plans: they compute in host memory, with the definition of `dense`, on the very
addresses and strides that the kernels would get. What Python does around the kernels can so be tested on any machine."""

import ctypes

import dense
import torch
from flashlla import _cuda

FORWARD = "stream scratch q k v out bias ridge probe lse key_mean probe_out diagnostics"
BACKWARD = "stream scratch q k v bias ridge grad_out lse key_mean probe dq dk dv dridge dscale dbias covariance"
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
AXES = {"bhnd": (0, 1, 2), "bnhd": (0, 2, 1), "bnd": (0, None, 1), "nhd": (None, 1, 0)}


def memory(address: int, dtype: torch.dtype, shape: tuple, strides: tuple | None = None) -> torch.Tensor:
    """Memory as a tensor, in row-major order unless strides are given."""
    size = torch.Size(shape)
    if strides is None:
        strides = torch.empty(size, device="meta").stride()
    length = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True)) if size.numel() else 0
    if length == 0:
        return torch.empty(size, dtype=dtype)
    data = torch.frombuffer((ctypes.c_byte * (length * dtype.itemsize)).from_address(address), dtype=dtype)
    return data.as_strided(size, strides)


class Plan:
    """Keeps the arguments of its runs by name."""

    scratch_bytes = 1 << 10

    def __init__(self, names: str, layout: str, dtypes: tuple, sizes: dict, options: dict) -> None:
        self.names, self.layout, self.sizes, self.options = names.split(), layout, sizes, options
        self.dtypes = [TYPES[name] for name in dtypes]
        (b, h, n, d), dv = sizes["q"], sizes["v"][3]
        self.state_shape = (b, h, (n + 127) // 128 * 128, 64 if max(d, dv) <= 64 else 128)
        self.runs: list[dict] = []

    def run(self, *arguments) -> None:
        given = dict(zip(self.names, arguments, strict=True))
        self.runs.append(given)
        (self._backward if "grad_out" in given else self._forward)(given)

    def _tensor(self, at: tuple, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
        address, strides = at
        assert len(strides) == len(self.layout) and (strides[-1] == 1 or shape[3] == 1), "dims lie side by side"
        steps = [0 if axis is None else strides[axis] for axis in AXES[self.layout]]
        return memory(address, dtype, shape, (*steps, 1))

    def _leaves(self, given: dict) -> dict[str, torch.Tensor]:
        """What the operator is a function of, in float64; ridge and scale of every query, and the bias of every head."""
        (b, h, n, d), m = self.sizes["q"], self.sizes["k"][2]
        leaves = {name: self._tensor(given[name], self.sizes[name], self.dtypes[0]) for name in "qkv"}
        leaves["ridge"] = torch.full((b, h, n), self.options["ridge"])
        if given["ridge"] is not None:
            leaves["ridge"] = memory(given["ridge"][0], torch.float32, (b, h, n), given["ridge"][1])
        scale = self.options.get("scale")
        leaves["scale"] = torch.full((b, h, n, 1), d**-0.5 if scale is None else scale, dtype=torch.float64)
        if given["bias"] is not None:
            leaves["bias"] = memory(given["bias"][0], torch.float32, (b, h, m), (*given["bias"][1], 1))
        if given["probe"] is not None and self.sizes["probe"]:
            leaves["probe"] = memory(given["probe"], torch.float32, self.state_shape)[:, :, :n, :d]
        assert (given["bias"] is not None) == self.sizes["bias"]
        return {name: x.double().requires_grad_() for name, x in leaves.items()}

    def _compute(self, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = {name: self.options[name] for name in "causal window cu_seqlens q_offset leave_one_out".split()}
        return dense.attention(**leaves, **mask)

    def _forward(self, given: dict) -> None:
        assert (given["probe"] is not None) == self.sizes["probe"]
        (b, h, n, _), dv = self.sizes["q"], self.sizes["v"][3]
        with torch.no_grad():
            self._tensor(given["out"], (b, h, n, dv), self.dtypes[0]).copy_(self._compute(self._leaves(given)))
            # Marks, all over the memory that they may write, for the backward to find.
            for name, shape, mark in self._state((b, h, n)):
                if given[name] is not None:
                    memory(given[name], torch.float32, shape).fill_(mark)

    def _state(self, rows: tuple) -> tuple:
        return ("lse", rows, 9.0), ("key_mean", self.state_shape, 7.0), ("probe_out", self.state_shape, 8.0)

    def _backward(self, given: dict) -> None:
        (b, h, n, d), m, dv = self.sizes["q"], self.sizes["k"][2], self.sizes["v"][3]
        for name, shape, mark in self._state((b, h, n)):
            if name != "probe_out" or not self.sizes["probe"]:
                found = memory(given[name.removesuffix("_out")], torch.float32, shape)
                if name == "lse":
                    # Rows that are out of it; memory may be gone when the run is looked at.
                    given["marked"] = found == _cuda._SPOILT
                    found = found[~given["marked"]]
                assert (found == mark).all(), f"{name} is not what the forward left"
        leaves = self._leaves(given)
        grad_out = self._tensor(given["grad_out"], (b, h, n, dv), self.dtypes[1]).double()
        with torch.enable_grad():
            out = self._compute(leaves)
        found = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True)
        gradients = dict(zip(leaves, found, strict=True))
        for name in "qkv":
            self._tensor(given[f"d{name}"], self.sizes[name], self.dtypes[0]).copy_(gradients[name])
        if gradients["ridge"] is not None:
            memory(given["dridge"], torch.float32, (b, h, n)).copy_(gradients["ridge"])
        memory(given["dscale"], torch.float32, (b, h, n)).copy_(gradients["scale"][..., 0])
        if given["dbias"] is not None:
            memory(given["dbias"], torch.float32, (b, h, m)).copy_(gradients["bias"])
        if given["covariance"] is not None:
            memory(given["covariance"], torch.float32, self.state_shape)[:, :, :n, :d].copy_(-gradients["probe"])


class Plans:
    """Makes them, and counts."""

    def __init__(self) -> None:
        self.forward: list[Plan] = []
        self.backward: list[Plan] = []

    def make_forward(self, device: int, layout: str, dtype: str, sizes: dict, options: dict) -> Plan:
        self.forward.append(Plan(FORWARD, layout, (dtype,), sizes, options))
        return self.forward[-1]

    def make_backward(self, device: int, layout: str, dtype: str, grad: str, sizes: dict, options: dict) -> Plan:
        self.backward.append(Plan(BACKWARD, layout, (dtype, grad), sizes, options))
        return self.backward[-1]
