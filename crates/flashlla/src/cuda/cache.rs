//! Caches in device memory.

use super::cache_write::{CacheWrite, CacheWriter};
use super::decode::{DevicePool, PoolLayout, check_pool};
use super::driver::{Allocation, copy_rows, upload};
use super::host::Room;
use super::plan::int;
use super::{Cuda, DeviceView, RawStream, lock};
use crate::cache::{CacheShape, KvCache, PageCopy, Pages};
use crate::{Element, Result, View};

/// A [`KvCache`] in the memory of a GPU.
///
/// Contiguous and paged, keys lie as `[pages, H, page_size, D]`. Methods whose names end in `_in` put their work into the caller's
/// stream and wait for nothing; the others wait. Use one stream, or order several with events: an append must be over when a
/// decoding elsewhere starts.
pub type DeviceCache<T> = KvCache<T, DeviceRoom>;

/// Keys and values in the memory of a GPU, and block table and lengths beside them.
#[derive(Debug)]
pub struct DeviceRoom {
    cuda: Cuda,
    k: Allocation,
    v: Allocation,
    /// `i32 [sequences, pages per sequence]`.
    table: Allocation,
    /// `i32 [sequences]`.
    lengths: Allocation,
    write: CacheWriter,
}

impl<T: Element> DeviceCache<T> {
    /// A room of `max_len` tokens for every sequence, on the engine's GPU.
    pub fn contiguous_on(cuda: &Cuda, shape: CacheShape) -> Result<Self> {
        Self::on(cuda, shape, Pages::contiguous(shape.sequences, shape.max_len)?)
    }

    /// A pool of `pages` pages of `page_size` tokens, a power of two from 16, on the engine's GPU.
    pub fn paged_on(cuda: &Cuda, shape: CacheShape, page_size: usize, pages: usize) -> Result<Self> {
        Self::on(cuda, shape, Pages::paged(shape.sequences, shape.max_len, page_size, pages)?)
    }

    fn on(cuda: &Cuda, shape: CacheShape, pages: Pages) -> Result<Self> {
        let write = cuda.cache_writer::<T>(shape.kv_heads, shape.head_dim, shape.value_dim)?;
        let paging = pages.paging().clone();
        let this = Self::with_room(shape, pages, |slots| {
            let context = &cuda.inner.context;
            let room =
                |dim: usize| Allocation::zeroed(context, slots * shape.kv_heads * dim * size_of::<T>());
            Ok(DeviceRoom {
                cuda: cuda.clone(),
                k: room(shape.head_dim)?,
                v: room(shape.value_dim)?,
                table: Allocation::zeroed(context, paging.table().len() * 4)?,
                lengths: Allocation::zeroed(context, paging.sequences() * 4)?,
                write,
            })
        })?;
        for (argument, pool) in [("head_dim", this.k_pool()), ("value_dim", this.v_pool())] {
            check_pool(argument, pool, this.page_size())?;
        }
        this.waited(|stream| {
            // SAFETY: the room is the cache's own, and the stream is waited for.
            unsafe { this.send(stream) }
        })?;
        Ok(this)
    }

    /// Runs something in a stream of the engine's and waits for it.
    fn waited<O>(&self, work: impl FnOnce(RawStream) -> Result<O>) -> Result<O> {
        let inner = &self.room.cuda.inner;
        let stream = inner.stream()?;
        let entered = inner.context.enter()?;
        let done = work(stream.raw());
        let waited = stream.synchronize();
        drop(entered);
        lock(&inner.streams).push(stream);
        waited.and(done)
    }

    fn pool(&self, room: &Allocation, dim: usize) -> DevicePool {
        let slot = dim as i64;
        let head = slot * self.page_size() as i64;
        DevicePool { ptr: room.ptr(), strides: [head * self.shape.kv_heads as i64, head, slot] }
    }
    /// Where the keys are.
    pub fn k_pool(&self) -> DevicePool {
        self.pool(&self.room.k, self.shape.head_dim)
    }
    /// Where the values are.
    pub fn v_pool(&self) -> DevicePool {
        self.pool(&self.room.v, self.shape.value_dim)
    }
    /// Where the block table is, `i32 [sequences, pages per sequence]`, if there is one.
    pub fn table_ptr(&self) -> Option<u64> {
        (!self.pages.is_contiguous()).then(|| self.room.table.ptr())
    }
    /// Where the lengths are, `i32 [sequences]`.
    pub fn lengths_ptr(&self) -> u64 {
        self.room.lengths.ptr()
    }
    /// How the pages lie, for [`Cuda::decode_plan`].
    pub fn layout(&self) -> PoolLayout {
        let paged = !self.pages.is_contiguous();
        PoolLayout { pages: self.pages(), page_size: self.page_size(), paged }
    }
    /// The engine whose GPU it is on.
    pub fn engine(&self) -> &Cuda {
        &self.room.cuda
    }

    /// Copies block table and lengths to the GPU.
    ///
    /// # Safety
    /// The stream must be of that GPU, and its context current.
    unsafe fn send(&self, stream: RawStream) -> Result<()> {
        let lengths: Vec<i32> = self.lengths().iter().map(|&n| int(n)).collect();
        // SAFETY: both were allocated in those sizes.
        unsafe {
            upload(self.room.table.ptr(), self.pages.paging().table(), stream)?;
            upload(self.room.lengths.ptr(), &lengths, stream)
        }
    }

    /// As [`KvCache::append`], from host memory.
    pub fn append(&mut self, k: View<T>, v: View<T>) -> Result<()> {
        self.check_tokens(k.shape(), v.shape(), self.shape.sequences)?;
        self.append_host(0, self.shape.sequences, k, v)
    }

    /// As [`KvCache::append_to`], from host memory.
    pub fn append_to(&mut self, sequence: usize, k: View<T>, v: View<T>) -> Result<()> {
        self.check_tokens(k.shape(), v.shape(), 1)?;
        self.append_host(sequence, 1, k, v)
    }

    fn append_host(&mut self, first: usize, sequences: usize, k: View<T>, v: View<T>) -> Result<()> {
        let cuda = self.room.cuda.clone();
        let stream = cuda.inner.stream()?;
        let entered = cuda.inner.context.enter()?;
        let room = Room::new(&cuda.inner.context, &stream);
        let (k_here, v_here) = (room.tensor(k)?, room.tensor(v)?);
        // SAFETY: the tensors are as large as was checked; the stream is waited for before they are given back.
        let done = unsafe { self.write_in(stream.raw(), first, sequences, k.shape()[2], k_here.1, v_here.1) };
        let waited = stream.synchronize();
        drop((k_here, v_here, entered));
        lock(&cuda.inner.streams).push(stream);
        waited.and(done)
    }

    /// Appends `tokens` tokens to every sequence, `k [B, H, tokens, D]` and `v [B, H, tokens, DV]` in device memory, in the order of
    /// the stream.
    ///
    /// # Safety
    /// `stream` must be a stream of the cache's GPU, the tensors memory of that GPU in those shapes, valid in the order of the
    /// stream; and nothing else may use the cache meanwhile.
    pub unsafe fn append_in(
        &mut self,
        stream: RawStream,
        k: DeviceView,
        v: DeviceView,
        tokens: usize,
    ) -> Result<()> {
        let _entered = self.room.cuda.clone().inner.context.enter()?;
        // SAFETY: the caller's.
        unsafe { self.write_in(stream, 0, self.shape.sequences, tokens, k, v) }
    }

    /// Appends `tokens` tokens to one sequence, `k [1, H, tokens, D]` and `v [1, H, tokens, DV]`.
    ///
    /// # Safety
    /// As for [`DeviceCache::append_in`].
    pub unsafe fn append_to_in(
        &mut self,
        stream: RawStream,
        sequence: usize,
        k: DeviceView,
        v: DeviceView,
        tokens: usize,
    ) -> Result<()> {
        let _entered = self.room.cuda.clone().inner.context.enter()?;
        // SAFETY: the caller's.
        unsafe { self.write_in(stream, sequence, 1, tokens, k, v) }
    }

    /// # Safety
    /// As for [`DeviceCache::append_in`], with the context current.
    unsafe fn write_in(
        &mut self,
        stream: RawStream,
        first: usize,
        sequences: usize,
        tokens: usize,
        k: DeviceView,
        v: DeviceView,
    ) -> Result<()> {
        let rows: Vec<_> = (first..first + sequences).map(|sequence| (sequence, tokens)).collect();
        let copies = self.pages.append(&rows)?;
        // SAFETY: pages and tokens are those of the bookkeeping, which has room for them.
        unsafe {
            copies.into_iter().try_for_each(|copy| self.copy(copy, stream))?;
            self.send(stream)?;
        }
        let (k_pool, v_pool) = (self.k_pool(), self.v_pool());
        let (table, lengths) = (self.room.table.ptr(), self.room.lengths.ptr());
        let write = CacheWrite { k, v, k_pool, v_pool, table, lengths, first, sequences, tokens };
        let width = self.pages.paging().table_width();
        // SAFETY: the pools have the pages of the bookkeeping, the tensors are the caller's.
        unsafe { self.room.write.run(stream, &write, self.layout(), width) }
    }

    /// Copies slots of a page.
    ///
    /// # Safety
    /// The stream must be of the cache's GPU, and its context current.
    unsafe fn copy(&self, PageCopy { from, to, tokens }: PageCopy, stream: RawStream) -> Result<()> {
        for (pool, dim) in [(self.k_pool(), self.shape.head_dim), (self.v_pool(), self.shape.value_dim)] {
            let at = |page: usize| pool.ptr + (page as i64 * pool.strides[0]) as u64 * size_of::<T>() as u64;
            let pitch = self.page_size() * dim * size_of::<T>();
            // SAFETY: both pages are of the pool.
            unsafe {
                copy_rows(
                    at(from),
                    at(to),
                    tokens * dim * size_of::<T>(),
                    self.shape.kv_heads,
                    pitch,
                    stream,
                )?;
            }
        }
        Ok(())
    }

    /// As [`KvCache::fork`].
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        let copy = self.pages.fork(from, to)?;
        self.waited(|stream| {
            // SAFETY: the pages are the bookkeeping's; the stream is waited for.
            unsafe {
                copy.map_or(Ok(()), |copy| self.copy(copy, stream))?;
                self.send(stream)
            }
        })
    }

    /// As [`KvCache::fork`], in the order of a stream.
    ///
    /// # Safety
    /// As for [`DeviceCache::append_in`].
    pub unsafe fn fork_in(&mut self, stream: RawStream, from: usize, to: usize) -> Result<()> {
        let _entered = self.room.cuda.clone().inner.context.enter()?;
        let copy = self.pages.fork(from, to)?;
        // SAFETY: the caller's.
        unsafe {
            copy.map_or(Ok(()), |copy| self.copy(copy, stream))?;
            self.send(stream)
        }
    }

    /// As [`KvCache::truncate`].
    pub fn truncate(&mut self, sequence: usize, length: usize) -> Result<()> {
        self.pages.truncate(sequence, length)?;
        // SAFETY: the stream is waited for.
        self.waited(|stream| unsafe { self.send(stream) })
    }

    /// As [`KvCache::truncate`], in the order of a stream.
    ///
    /// # Safety
    /// As for [`DeviceCache::append_in`].
    pub unsafe fn truncate_in(&mut self, stream: RawStream, sequence: usize, length: usize) -> Result<()> {
        let _entered = self.room.cuda.clone().inner.context.enter()?;
        self.pages.truncate(sequence, length)?;
        // SAFETY: the caller's.
        unsafe { self.send(stream) }
    }

    /// As [`KvCache::free`].
    pub fn free(&mut self, sequence: usize) -> Result<()> {
        self.truncate(sequence, 0)
    }
}
