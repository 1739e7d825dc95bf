"""The extension module: functions on addresses. Private; use what `flashlla` exports."""

from collections.abc import Sequence
from typing import Any, TypedDict, final

__all__ = [
    "MAX_HEAD_DIM",
    "BackwardPlan",
    "CacheFullError",
    "CacheWriter",
    "DecodePlan",
    "ForwardPlan",
    "Pages",
    "__version__",
    "cpu_backward",
    "cpu_decode",
    "cpu_forward",
    "cuda_backward_plan",
    "cuda_cache_writer",
    "cuda_decode_plan",
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
def cpu_forward(inputs: dict[str, Any], out: _Host, results: dict[str, _Host | None]) -> None: ...
def cpu_decode(
    inputs: dict[str, Any],
    lengths: list[int],
    table: list[int] | None,
    out: _Host,
    results: dict[str, _Host | None],
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
def cuda_decode_plan(device: int, dtype: str, sizes: dict[str, Any], options: dict[str, Any]) -> DecodePlan: ...
def cuda_cache_writer(
    device: int,
    dtype: str,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    pages: int,
    page_size: int,
    table_width: int,
) -> CacheWriter: ...

class CacheFullError(ValueError): ...

@final
class Pages:
    def __new__(cls, sequences: int, max_len: int, page_size: int | None, pages: int | None) -> Pages: ...
    def append(self, tokens: list[tuple[int, int]]) -> list[tuple[int, int, int]]: ...
    def fork(self, source: int, to: int) -> tuple[int, int, int] | None: ...
    def truncate(self, sequence: int, length: int) -> None: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def table(self) -> list[int]: ...
    @property
    def table_width(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...

@final
class DecodePlan:
    def scratch_bytes(self, longest: int) -> int: ...
    def run(
        self,
        stream: int,
        scratch: int,
        longest: int,
        q: _Strided,
        k: _Strided,
        v: _Strided,
        table: int | None,
        lengths: int,
        out: _Strided,
        ridge: _Strided | None,
        scale: tuple[int, int] | None,
        probe: int | None,
        lse: int | None,
        state: tuple[int, int] | None,
        diagnostics: tuple[int, int] | None,
    ) -> None: ...

@final
class CacheWriter:
    def run(
        self,
        stream: int,
        k: _Strided,
        v: _Strided,
        k_pool: _Strided,
        v_pool: _Strided,
        table: int,
        lengths: int,
        first: int,
        sequences: int,
        tokens: int,
    ) -> None: ...

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
