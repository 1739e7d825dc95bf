//! Decoding from caches, in host memory and in that of a GPU, and the bookkeeping of caches.

use crate::cpu::{Inputs, Results};
use crate::cuda::{Ridges, Strides, device_ridge, engine, with_gpu_type};
use crate::describe::Options;
use crate::raised;
use crate::tensor::{Dtype, HostTensor, with_type};
use crate::threads::interruptible;
use flashlla::cache::CacheView;
use flashlla::cuda::{
    CacheWrite, DECODE_TOLERANCE, DecodePointers, DevicePool, DeviceScale, DeviceView, PoolLayout, RawStream,
};
use flashlla::{Engine, Error};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

fn count(argument: &str, n: i64) -> PyResult<usize> {
    let error = || PyValueError::new_err(format!("{argument}: {n} is not allowed; it must be 0 or more"));
    usize::try_from(n).map_err(|_| error())
}

/// Decodes in host memory. `q [B, HQ, t, D]`; without a table `k [B, H, room, D]`, with one (row by row, a row per sequence) `k [pages,
/// H, page_size, D]`, and `v` alike. Results as for `cpu_forward`.
#[pyfunction]
pub fn cpu_decode(
    py: Python<'_>,
    inputs: Inputs,
    lengths: Vec<i64>,
    table: Option<Vec<i32>>,
    out: HostTensor,
    results: Results,
) -> PyResult<()> {
    let lengths = lengths.into_iter().map(|n| count("lengths", n)).collect::<PyResult<Vec<_>>>()?;
    with_type!(inputs.q.dtype, T => {
        // SAFETY: Python vouches for its tensors, and holds on to them until this returns.
        unsafe {
            let (k, v) = (inputs.k.view::<T>()?, inputs.v.view::<T>()?);
            let cache = match &table {
                None => CacheView::contiguous(k, v, &lengths),
                Some(table) => CacheView::paged_shared(k, v, table, &lengths),
            }
            .map_err(raised)?;
            let keys = [cache.sequences(), cache.kv_heads(), cache.max_len(), cache.head_dim()];
            let values = [keys[0], keys[1], keys[2], cache.value_dim()];
            let attention = inputs.described(keys, values)?;
            let mut decoding = attention.decoding(inputs.q.view::<T>()?, &cache).map_err(raised)?;
            if let Some(bias) = &inputs.bias {
                decoding = decoding.with_bias(bias.view()?).map_err(raised)?;
            }
            if let Some(probe) = &inputs.probe {
                decoding = decoding.with_probe(probe.view()?).map_err(raised)?;
            }
            let out = out.view_mut::<T>()?;
            results.fill(&interruptible(py, |cpu| cpu.decode_into(&decoding, out))?)
        }
    })
}

/// `(address, strides of page, KV head and slot)`.
#[derive(FromPyObject)]
pub struct Pool(u64, [i64; 3]);

impl From<Pool> for DevicePool {
    fn from(Pool(ptr, strides): Pool) -> Self {
        Self { ptr, strides }
    }
}

/// `(address, strides)` of four axes, batch, head, token and dim.
#[derive(FromPyObject)]
pub struct HeadsFirst(u64, Strides);

impl From<HeadsFirst> for DeviceView {
    fn from(HeadsFirst(ptr, strides): HeadsFirst) -> Self {
        Self { ptr, strides: strides.first_three() }
    }
}

/// The sizes of a decoding.
#[derive(FromPyObject)]
pub struct DecodeSizes {
    #[pyo3(item)]
    q: [usize; 4],
    #[pyo3(item)]
    k: [usize; 4],
    #[pyo3(item)]
    v: [usize; 4],
    /// Pages that a sequence can have, if there is a block table.
    #[pyo3(item)]
    table_width: Option<usize>,
}

/// A decoding made ready.
#[pyclass(frozen, module = "flashlla._flashlla")]
pub struct DecodePlan {
    plan: flashlla::cuda::DecodePlan,
}

/// Makes a decoding ready: queries, caches and outputs in `dtype`.
#[pyfunction]
pub fn cuda_decode_plan(
    py: Python<'_>,
    device: usize,
    dtype: Dtype,
    sizes: DecodeSizes,
    options: Options,
) -> PyResult<DecodePlan> {
    let ([pages, kv_heads, page_size, _], batch) = (sizes.k, sizes.q[0]);
    let layout = PoolLayout { pages, page_size, paged: sizes.table_width.is_some() };
    let room = sizes.table_width.map_or(page_size, |width| width.saturating_mul(page_size));
    let (k, v) = ([batch, kv_heads, room, sizes.k[3]], [batch, kv_heads, room, sizes.v[3]]);
    let attention = options.attention(sizes.q, k, v, None, DECODE_TOLERANCE)?;
    let plan = py.detach(|| {
        let cuda = engine(device)?;
        with_gpu_type!(dtype, T => cuda.decode_plan::<T>(&attention, layout).map_err(raised))
    })?;
    Ok(DecodePlan { plan })
}

#[pymethods]
impl DecodePlan {
    /// Bytes of scratch that a run needs whose longest sequence has so many tokens.
    fn scratch_bytes(&self, longest: usize) -> usize {
        self.plan.scratch_bytes(longest)
    }

    /// Puts the decoding into `stream`. Addresses are of device memory; see the Rust library's `DecodePointers`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        stream: usize,
        scratch: u64,
        longest: usize,
        q: HeadsFirst,
        k: Pool,
        v: Pool,
        table: Option<u64>,
        lengths: u64,
        out: HeadsFirst,
        ridge: Option<Ridges>,
        scale: Option<(u64, i32)>,
        probe: Option<u64>,
        lse: Option<u64>,
        state: Option<[u64; 2]>,
        diagnostics: Option<[u64; 2]>,
    ) -> PyResult<()> {
        let pointers = DecodePointers {
            q: q.into(),
            k: k.into(),
            v: v.into(),
            table,
            lengths,
            out: out.into(),
            ridge: device_ridge(ridge),
            scale: scale.map(|(ptr, stride)| DeviceScale { ptr, stride }),
            probe,
            lse,
            state,
            diagnostics,
        };
        // SAFETY: Python vouches for its tensors: of this GPU, as large as described, valid in the order of the stream.
        py.detach(|| unsafe { self.plan.run(stream as RawStream, &pointers, longest, Some(scratch)) })
            .map_err(raised)
    }
}

/// The kernel that appends to caches on a GPU, made ready.
#[pyclass(frozen, module = "flashlla._flashlla")]
pub struct CacheWriter {
    writer: flashlla::cuda::CacheWriter,
    layout: PoolLayout,
    table_width: usize,
}

/// Makes appending ready, to a cache of `pages` pages of `page_size` tokens, of which a sequence can have `table_width`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn cuda_cache_writer(
    py: Python<'_>,
    device: usize,
    dtype: Dtype,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    pages: usize,
    page_size: usize,
    table_width: usize,
) -> PyResult<CacheWriter> {
    let writer = py.detach(|| {
        let cuda = engine(device)?;
        with_gpu_type!(dtype, T => cuda.cache_writer::<T>(kv_heads, head_dim, value_dim).map_err(raised))
    })?;
    Ok(CacheWriter { writer, layout: PoolLayout { pages, page_size, paged: true }, table_width })
}

#[pymethods]
impl CacheWriter {
    /// Puts the write of the last `tokens` tokens of `sequences` sequences, from `first` on, into `stream`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        stream: usize,
        k: HeadsFirst,
        v: HeadsFirst,
        k_pool: Pool,
        v_pool: Pool,
        table: u64,
        lengths: u64,
        first: usize,
        sequences: usize,
        tokens: usize,
    ) -> PyResult<()> {
        let write = CacheWrite {
            k: k.into(),
            v: v.into(),
            k_pool: k_pool.into(),
            v_pool: v_pool.into(),
            table,
            lengths,
            first,
            sequences,
            tokens,
        };
        // SAFETY: as above.
        py.detach(|| unsafe { self.writer.run(stream as RawStream, &write, self.layout, self.table_width) })
            .map_err(raised)
    }
}

/// Who owns which page of a cache: the Rust library's `cache::Pages`.
#[pyclass(module = "flashlla._flashlla")]
pub struct Pages {
    pages: flashlla::cache::Pages,
}

#[pymethods]
impl Pages {
    /// `pages` pages of `page_size` tokens, or (both `None`) a room of `max_len` tokens for every sequence.
    #[new]
    fn new(
        sequences: usize,
        max_len: usize,
        page_size: Option<usize>,
        pages: Option<usize>,
    ) -> PyResult<Self> {
        let made = match (page_size, pages) {
            (Some(page_size), Some(pages)) => {
                flashlla::cache::Pages::paged(sequences, max_len, page_size, pages)
            }
            _ => flashlla::cache::Pages::contiguous(sequences, max_len),
        };
        Ok(Self { pages: made.map_err(raised)? })
    }

    /// Makes room for new tokens, `(sequence, how many)`; returns what to copy first, `(page, page, slots)`.
    fn append(&mut self, tokens: Vec<(i64, usize)>) -> PyResult<Vec<(usize, usize, usize)>> {
        let place = |(sequence, n): (i64, usize)| Ok((count("sequence", sequence)?, n));
        let tokens: Vec<(usize, usize)> = tokens.into_iter().map(place).collect::<PyResult<_>>()?;
        let copies = self.pages.append(&tokens).map_err(full)?;
        Ok(copies.into_iter().map(|copy| (copy.from, copy.to, copy.tokens)).collect())
    }

    /// Returns what to copy.
    fn fork(&mut self, source: i64, to: i64) -> PyResult<Option<(usize, usize, usize)>> {
        let copy = self.pages.fork(count("source", source)?, count("to", to)?).map_err(raised)?;
        Ok(copy.map(|copy| (copy.from, copy.to, copy.tokens)))
    }

    fn truncate(&mut self, sequence: i64, length: i64) -> PyResult<()> {
        self.pages.truncate(count("sequence", sequence)?, count("length", length)?).map_err(raised)
    }

    #[getter]
    fn lengths(&self) -> Vec<usize> {
        self.pages.paging().lengths().to_vec()
    }

    /// Row by row.
    #[getter]
    fn table(&self) -> Vec<i32> {
        self.pages.paging().table().to_vec()
    }

    #[getter]
    fn table_width(&self) -> usize {
        self.pages.paging().table_width()
    }

    #[getter]
    fn page_size(&self) -> usize {
        self.pages.paging().page_size()
    }

    #[getter]
    fn pages(&self) -> usize {
        self.pages.paging().pages()
    }

    #[getter]
    fn free_pages(&self) -> usize {
        self.pages.free_pages()
    }
}

/// A full cache is an error of its own, so that a scheduler can wait for pages.
fn full(error: Error) -> PyErr {
    match error {
        Error::CacheFull { .. } => CacheFullError::new_err(error.to_string()),
        other => raised(other),
    }
}

pyo3::create_exception!(
    flashlla,
    CacheFullError,
    PyValueError,
    "A cache has no room for the tokens; nothing was changed."
);
