//! [`CacheWriter`]: new keys and values into the pages of a cache in device memory.

use super::bundle::Wanted;
use super::decode::{DevicePool, PoolLayout, check_pool};
use super::driver::{Arguments, Function};
use super::plan::{dtype, int, side};
use super::{DeviceView, Inner, RawStream};
use crate::{Element, Error, Result};
use std::sync::Arc;

/// Tokens to be written, all in device memory.
#[derive(Debug, Clone, Copy)]
pub struct CacheWrite {
    /// New keys `[sequences, H, tokens, D]`.
    pub k: DeviceView,
    /// New values `[sequences, H, tokens, DV]`.
    pub v: DeviceView,
    /// The keys of the cache.
    pub k_pool: DevicePool,
    /// The values of the cache.
    pub v_pool: DevicePool,
    /// The block table, `i32 [B, pages per sequence]`; of a contiguous cache 0, 1, 2, ...
    pub table: u64,
    /// Tokens of each sequence, `i32 [B]`, the new ones counted.
    pub lengths: u64,
    /// The sequence of the cache that the first of the new ones is; the others follow.
    pub first: usize,
    /// How many sequences get tokens.
    pub sequences: usize,
    /// New tokens of each.
    pub tokens: usize,
}

/// The kernel that appends to caches, made ready for one type and size of heads. Made by [`super::Cuda::cache_writer`].
#[derive(Debug, Clone)]
pub struct CacheWriter {
    engine: Arc<Inner>,
    write: Arc<Function>,
    kv_heads: usize,
    /// Of keys and values.
    dims: [usize; 2],
}

impl CacheWriter {
    pub(super) fn new<T: Element>(engine: &Arc<Inner>, kv_heads: usize, dims: [usize; 2]) -> Result<Self> {
        let (entry, dtype) = ("lla_cache_write", dtype::<T>()?);
        let widths = engine.bundle.head_dims(&engine.architecture, entry);
        let widest = widths.last().copied().unwrap_or(0);
        for (argument, dim) in ["head_dim", "value_dim"].into_iter().zip(dims) {
            if dim == 0 || dim % 8 != 0 || dim > widest {
                let allowed = format!("a multiple of 8, at most {widest}, for a cache on a GPU");
                return Err(Error::value(argument, dim, allowed));
            }
        }
        if !(1..=65535).contains(&kv_heads) {
            return Err(Error::value("kv_heads", kv_heads, "from 1 to 65535 for a cache on a GPU"));
        }
        let head_dim = widths.into_iter().find(|&w| w >= dims[0].max(dims[1])).unwrap_or(widest);
        let wanted = Wanted { entry, dtype, head_dim, high: false, bias: false, aligned: false, kind: 0 };
        let (write, _) = engine.load(wanted)?;
        Ok(Self { engine: engine.clone(), write, kv_heads, dims })
    }

    /// Puts the write into `stream`: tokens go to the end of their sequences, as `lengths` and `table` say when it runs. What those say
    /// is cut to the room there is. `layout` says how pages lie and `table_width` how many a sequence can have.
    ///
    /// # Safety
    /// `stream` must be a stream of the engine's GPU, and every address lead to device memory of the sizes described, valid in the
    /// order of the stream and, for the pools, not otherwise used.
    pub unsafe fn run(
        &self,
        stream: RawStream,
        write: &CacheWrite,
        layout: PoolLayout,
        table_width: usize,
    ) -> Result<()> {
        let w = write;
        for (argument, view) in [("k", w.k), ("v", w.v)] {
            if i32::try_from(view.strides[2]).is_err() {
                return Err(Error::value(argument, view.strides[2], "a token stride below 2^31 on a GPU"));
            }
        }
        for (argument, pool) in [("k_cache", w.k_pool), ("v_cache", w.v_pool)] {
            check_pool(argument, pool, layout.page_size)?;
        }
        let counts = [w.sequences * w.tokens, table_width * layout.page_size, layout.pages];
        if counts.iter().any(|&n| n > i32::MAX as usize) {
            return Err(Error::value("k", w.tokens, "fewer than 2^31 tokens in all, in as many slots"));
        }
        if counts[0] == 0 {
            return Ok(());
        }
        let strides = |arguments: Arguments, [outer, head, row]: [i64; 3]| {
            arguments.i64s([outer, head]).i32s([row as i32])
        };
        let arguments = Arguments::new()
            .pointers([w.k.ptr, w.v.ptr, w.k_pool.ptr, w.v_pool.ptr, w.table, w.lengths])
            .i32s([w.first, w.tokens, table_width, layout.pages, layout.page_size].map(int))
            .i32s(self.dims.map(int));
        let arguments = [w.k.strides, w.v.strides, w.k_pool.strides, w.v_pool.strides]
            .into_iter()
            .fold(arguments, strides);
        let _entered = self.engine.context.enter()?;
        // SAFETY: the arguments are those of the kernel's signature in that order; the memory is the caller's.
        unsafe { self.write.launch([side(counts[0]), side(self.kv_heads), 1], &arguments, stream) }
    }
}
