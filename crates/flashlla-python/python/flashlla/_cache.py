"""`KvCache`: keys and values of a batch of sequences, to decode from."""

from __future__ import annotations

from typing import Any

from flashlla import _flashlla
from flashlla._decoding import check_layout, decode
from flashlla._options import check_axes, heads_first
from flashlla._torch import torch


def _zeros(shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.zeros(shape, dtype=dtype, device=device)
    import numpy as np

    if device is not None:
        raise ValueError(f"device: {device} is not allowed; it must be None with a NumPy dtype")
    return np.zeros(shape, dtype)


class KvCache:
    """Keys and values of a batch of sequences, each of its own length, in PyTorch tensors (CPU or CUDA) or NumPy arrays.

    Contiguous, every sequence has a room of `max_len` tokens. Paged (with `page_size`), tokens lie in pages taken from a common
    pool when they are needed, and forked sequences share them until one writes. Memory is taken once, when the cache is made. An
    operation that fails has changed nothing.

    Args:
        sequences: B.
        kv_heads: H.
        head_dim: D of keys, at most 256; on a GPU a multiple of 8, at most 128.
        max_len: the most tokens of a sequence, rounded up to whole pages.
        value_dim: DV of values (default `head_dim`).
        page_size: tokens of a page, a power of two from 16 (default: contiguous). Multiples of 64 are fastest on a GPU.
        pages: pages of the pool (default: enough for all sequences to have `max_len` tokens).
        dtype: a `torch.dtype` (default `torch.float32`), or a NumPy dtype for arrays.
        device: of tensors.
        layout: "bhnd" or "bnhd", for the pools and all that is appended.

    >>> import torch, flashlla
    >>> cache = flashlla.KvCache(2, kv_heads=1, head_dim=8, max_len=64, page_size=16)
    >>> prompt = torch.randn(1, 1, 20, 8)
    >>> cache.append(prompt, prompt, sequence=0)
    >>> cache.fork(0, 1)  # shares the prompt's pages
    >>> k, v = torch.randn(2, 2, 1, 1, 8)
    >>> cache.append(k, v)
    >>> cache.lengths, cache.pages_free
    ([21, 21], 5)
    >>> cache.decode(torch.randn(2, 4, 1, 8), ridge=1.0).shape
    torch.Size([2, 4, 1, 8])
    """

    def __init__(
        self,
        sequences: int,
        kv_heads: int,
        head_dim: int,
        max_len: int,
        *,
        value_dim: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        dtype: Any = None,
        device: Any = None,
        layout: str = "bhnd",
    ) -> None:
        check_layout(layout)
        value_dim = head_dim if value_dim is None else value_dim
        for argument, x in (("head_dim", head_dim), ("value_dim", value_dim)):
            if not 1 <= x <= _flashlla.MAX_HEAD_DIM:
                raise ValueError(f"{argument}: {x} is not allowed; it must be from 1 to {_flashlla.MAX_HEAD_DIM}")
        for argument, x, least in (("sequences", sequences, 0), ("kv_heads", kv_heads, 1), ("max_len", max_len, 0)):
            if x < least:
                raise ValueError(f"{argument}: {x} is not allowed; it must be at least {least}")
        if page_size is None and pages is not None:
            raise ValueError(f"pages: {pages} is not allowed; it must be None without page_size")
        if page_size is not None:
            if page_size < 1 or (pages is not None and pages < 0):
                raise ValueError(
                    f"page_size: {page_size} with {pages} pages is not allowed; it must be a power of two from 16"
                )
            pages = sequences * -(-max_len // page_size) if pages is None else pages
        self._pages = _flashlla.Pages(sequences, max_len, page_size, pages)
        self._paged = page_size is not None
        self.kv_heads, self.head_dim, self.value_dim, self.layout = kv_heads, head_dim, value_dim, layout
        if dtype is None:
            dtype = "float32" if torch is None else torch.float32
        count, size = self._pages.pages, self._pages.page_size

        def room(dim: int) -> Any:
            tokens_first = (count, size, kv_heads, dim)
            return _zeros(tokens_first if layout == "bnhd" else (count, kv_heads, size, dim), dtype, device)

        self.k: Any = room(head_dim)
        """The keys: `[pages, H, page_size, D]` (contiguous: `[B, H, max_len, D]`), or in the order of "bnhd"."""
        self.v: Any = room(value_dim)
        """The values, alike."""
        self._on_gpu = torch is not None and isinstance(self.k, torch.Tensor) and self.k.is_cuda
        self._writer: Any = None
        if self._on_gpu:
            from flashlla._operators import NAMES

            if dtype not in NAMES:
                raise TypeError(f"dtype: {dtype} is not allowed; it must be float32, bfloat16 or float16")
            table_shape = (sequences, self._pages.table_width)
            self._writer = _flashlla.cuda_cache_writer(
                self.k.get_device(), NAMES[dtype], kv_heads, head_dim, value_dim, count, size, table_shape[1]
            )
            self._table = torch.tensor(self._pages.table, dtype=torch.int32).reshape(table_shape).to(self.k.device)
            self._lengths = torch.zeros(sequences, dtype=torch.int32, device=self.k.device)

    def __repr__(self) -> str:
        kind = f"pages of {self.page_size}" if self._paged else "contiguous"
        return f"KvCache(lengths={self.lengths}, max_len={self.max_len}, {kind}, dtype={self.k.dtype}, layout={self.layout!r})"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        lengths: list[int] = self._pages.lengths
        return lengths

    @property
    def max_len(self) -> int:
        """The most tokens of a sequence."""
        most: int = self._pages.table_width * self._pages.page_size
        return most

    @property
    def page_size(self) -> int:
        """Tokens of a page; of a contiguous cache `max_len`."""
        size: int = self._pages.page_size
        return size

    @property
    def pages_free(self) -> int:
        """Pages that no sequence uses."""
        free: int = self._pages.free_pages
        return free

    @property
    def block_table(self) -> list[list[int]] | None:
        """Pages of each sequence, `[B, pages per sequence]`; -1 where there is none. None for a contiguous cache."""
        if not self._paged:
            return None
        width, table = self._pages.table_width, self._pages.table
        return [table[at : at + width] for at in range(0, len(table), width)] if width else [[] for _ in self.lengths]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take, used or not."""
        return self._bytes(self._pages.pages * self._pages.page_size)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages in use, each counted once (contiguous: of the tokens that are there)."""
        if self._paged:
            return self._bytes((self._pages.pages - self._pages.free_pages) * self._pages.page_size)
        return self._bytes(sum(self.lengths))

    def _bytes(self, tokens: int) -> int:
        itemsize: int = self.k.dtype.itemsize
        return tokens * self.kv_heads * (self.head_dim + self.value_dim) * itemsize

    def _pools(self) -> tuple[Any, Any]:
        return heads_first(self.k, self.layout), heads_first(self.v, self.layout)

    def _copy(self, copy: tuple[int, int, int]) -> None:
        source, to, tokens = copy
        for pool in self._pools():
            pool[to, :, :tokens] = pool[source, :, :tokens]

    def _send(self) -> None:
        """Table and lengths to the GPU, in the order of the stream."""
        if self._on_gpu:
            if self._paged:
                self._table.copy_(torch.tensor(self._pages.table, dtype=torch.int32).reshape(self._table.shape))
            self._lengths.copy_(torch.tensor(self._pages.lengths, dtype=torch.int32))

    def append(self, k: Any, v: Any, sequence: int | None = None) -> None:
        """Appends tokens: `k [B, H, n, D]` and `v [B, H, n, DV]` in the cache's layout to every sequence, or `[1, H, n, ..]` to one.

        Raises `CacheFullError` (a `ValueError`) where there is no room.
        """
        rows = len(self._pages.lengths) if sequence is None else 1
        if type(k) is not type(self.k) and not (
            torch is not None and isinstance(k, torch.Tensor) and isinstance(self.k, torch.Tensor)
        ):
            raise TypeError(
                f"k: {type(k).__name__} is not allowed; it must be a {type(self.k).__name__}, as the cache is"
            )
        check_axes("k", k.shape, self.layout)
        n = heads_first(k, self.layout).shape[2]
        for argument, x, dim in (("k", k, self.head_dim), ("v", v, self.value_dim)):
            expected = (rows, self.kv_heads, n, dim)
            check_axes(argument, x.shape, self.layout)
            if tuple(heads_first(x, self.layout).shape) != expected:
                names = "batch, KV heads, tokens, dim" + (" before the layout" if self.layout != "bhnd" else "")
                raise ValueError(
                    f"{argument}: shape {list(x.shape)} does not fit; it must be {list(expected)} ({names})"
                )
            if x.dtype != self.k.dtype:
                raise TypeError(f"{argument}: dtype {x.dtype} does not match the cache's {self.k.dtype}")
            if self._on_gpu and x.device != self.k.device:
                raise ValueError(f"{argument}: device {x.device} does not match the cache's {self.k.device}")
        first = 0 if sequence is None else sequence
        copies = self._pages.append([(first + row, n) for row in range(rows)])
        for copy in copies:
            self._copy(copy)
        self._send()
        k, v = heads_first(k, self.layout), heads_first(v, self.layout)
        if self._on_gpu:
            self._write_on_gpu(k.detach(), v.detach(), first, rows, n)
            return
        if torch is not None and isinstance(k, torch.Tensor):
            k, v = k.detach(), v.detach()
        lengths, table = self._pages.lengths, self._pages.table
        width, size = self._pages.table_width, self._pages.page_size
        pools = self._pools()
        for row in range(rows):
            at, end = lengths[first + row] - n, lengths[first + row]
            done = 0
            while at < end:
                page, slot = table[(first + row) * width + at // size], at % size
                count = min(size - slot, end - at)
                for pool, new in zip(pools, (k, v), strict=True):
                    pool[page, :, slot : slot + count] = new[row, :, done : done + count]
                at, done = at + count, done + count

    def _write_on_gpu(self, k: Any, v: Any, first: int, rows: int, n: int) -> None:
        from flashlla._cuda import stream

        k, v = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (k, v))
        k_pool, v_pool = ((pool.data_ptr(), pool.stride()[:3]) for pool in self._pools())
        self._writer.run(
            stream(self.k.get_device()),
            (k.data_ptr(), k.stride()),
            (v.data_ptr(), v.stride()),
            k_pool,
            v_pool,
            self._table.data_ptr(),
            self._lengths.data_ptr(),
            first,
            rows,
            n,
        )

    def fork(self, source: int, to: int) -> None:
        """Makes the empty sequence `to` a continuation of all that `source` holds. A paged cache copies nothing yet."""
        copy = self._pages.fork(source, to)
        if copy is not None:
            self._copy(copy)
        self._send()

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets a sequence's tokens from `length` on, such as those of a speculation that did not hold."""
        self._pages.truncate(sequence, length)
        self._send()

    def free(self, sequence: int) -> None:
        """Forgets a sequence; its pages can be used again unless others share them."""
        self.truncate(sequence, 0)

    def decode(self, q: Any, **options: Any) -> Any:
        """`flashlla.decode` of queries, in the cache's layout, over what it holds."""
        lengths: Any = self._pages.lengths
        table: Any = None
        check_axes("q", q.shape, self.layout)
        n = heads_first(q, self.layout).shape[2]
        for sequence, length in enumerate(lengths):
            if 0 < length < n:
                raise ValueError(
                    f"q: {n} queries are not allowed; it must be at most the {length} tokens of sequence {sequence}: append theirs first"
                )
        longest = max(lengths, default=0)
        if self._on_gpu:
            lengths, table = self._lengths, self._table if self._paged else None
            options.setdefault("max_length", longest)
        elif self._paged:
            table = self.block_table
            if torch is not None and isinstance(self.k, torch.Tensor):
                table = torch.tensor(table, dtype=torch.int32).reshape(len(lengths), -1)
        return decode(q, self.k, self.v, lengths, block_table=table, layout=self.layout, **options)
