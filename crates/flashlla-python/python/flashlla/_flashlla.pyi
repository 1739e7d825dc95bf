"""The extension module: functions on addresses. Private; use what `flashlla` exports."""

from collections.abc import Sequence
from typing import Any, TypedDict, final

__all__ = [
    "MAX_HEAD_DIM",
    "BackwardPlan",
    "ForwardPlan",
    "__version__",
    "cpu_backward",
    "cpu_forward",
    "cuda_backward_plan",
    "cuda_forward_plan",
    "cuda_info",
    "get_num_threads",
    "instruction_set",
    "set_num_threads",
]

__version__: str
MAX_HEAD_DIM: int

# (address, dtype name, shape, strides in elements)
_Host = tuple[int, str, Sequence[int], Sequence[int]]
# (address, strides in elements) in the layout of a plan
_Strided = tuple[int, tuple[int, ...]]

class _CudaInfo(TypedDict):
    name: str
    architecture: str
    driver: int
    kernels: str
    architectures: list[str]
    head_dims: list[int]

def instruction_set() -> str: ...
def get_num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def cpu_forward(
    inputs: dict[str, Any],
    out: _Host,
    lse: _Host | None,
    key_mean: _Host | None,
    probe: _Host | None,
    iterations: _Host | None,
    residual: _Host | None,
) -> None: ...
def cpu_backward(
    inputs: dict[str, Any],
    state: tuple[_Host, _Host, _Host],
    grad_out: _Host,
    gradients: tuple[_Host, _Host, _Host],
    others: dict[str, _Host | None],
) -> float: ...
def cuda_info(device: int) -> _CudaInfo: ...
def cuda_forward_plan(
    device: int, layout: str, dtype: str, sizes: dict[str, Any], options: dict[str, Any]
) -> ForwardPlan: ...
def cuda_backward_plan(
    device: int, layout: str, dtype: str, grad_dtype: str, sizes: dict[str, Any], options: dict[str, Any]
) -> BackwardPlan: ...

@final
class ForwardPlan:
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def state_shape(self) -> list[int]: ...
    def run(
        self,
        stream: int,
        scratch: int,
        q: _Strided,
        k: _Strided,
        v: _Strided,
        out: _Strided,
        bias: _Strided | None,
        ridge: _Strided | None,
        probe: int | None,
        lse: int | None,
        key_mean: int | None,
        probe_out: int | None,
        diagnostics: tuple[int, int] | None,
    ) -> None: ...

@final
class BackwardPlan:
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def state_shape(self) -> list[int]: ...
    def run(
        self,
        stream: int,
        scratch: int,
        q: _Strided,
        k: _Strided,
        v: _Strided,
        bias: _Strided | None,
        ridge: _Strided | None,
        grad_out: _Strided,
        lse: int,
        key_mean: int,
        probe: int,
        dq: _Strided,
        dk: _Strided,
        dv: _Strided,
        dridge: int,
        dscale: int,
        dbias: int | None,
        covariance: int | None,
    ) -> None: ...
