"""Local Linear Attention (LLA) for PyTorch and NumPy.

LLA fits, at every query, a local *linear* model of the values where softmax attention fits a local *constant* (Zuo et al.,
"Local Linear Attention", ICLR 2026). For a query `q` with visible keys `k_j`, values `v_j`, softmax weights `p_j` and a
ridge λ > 0:

    k̄ = Σ p_j k_j     C = Σ p_j (k_j − k̄)(k_j − k̄)ᵀ     x = (C + λI)⁻¹ (k̄ − q)     out = Σ p_j (1 − (k_j − k̄)·x) v_j

Large λ is softmax attention. Everything is exact (no approximation of the operator), forward and backward.

- `attention`: the whole operator, on tensors and arrays.
- `decode`, `KvCache`: the newest queries of each sequence over a cache, in one pass.
- `nn.LocalLinearAttention`: a module in the place of `torch.nn.MultiheadAttention`.
- `lla_attention`, `LLAFunction`, `ops.naive`: the interface of the package published with the paper.
- `python -m flashlla info` and `python -m flashlla bench`.

>>> import torch, flashlla
>>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
>>> flashlla.attention(q, k, v, ridge=1.0, causal=True).shape
torch.Size([1, 2, 16, 8])
"""

from flashlla._cache import KvCache
from flashlla._decoding import decode
from flashlla._flashlla import CacheFullError, __version__, get_num_threads, set_num_threads
from flashlla._public import Diagnostics, attention

__all__ = [
    "CacheFullError",
    "Diagnostics",
    "KvCache",
    "__version__",
    "attention",
    "decode",
    "get_num_threads",
    "set_num_threads",
]

try:
    import torch as _torch  # noqa: F401
except ImportError:  # NumPy alone is enough for `attention`.
    pass
else:
    from flashlla import nn, ops
    from flashlla.ops import LLAFunction, lla_attention

    __all__ += ["LLAFunction", "lla_attention", "nn", "ops"]
