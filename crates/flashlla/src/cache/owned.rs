//! A cache that owns its memory: what all have in common, and the one in the host's memory.

use super::{CacheView, PageCopy, Pages};
use crate::attention::MAX_HEAD_DIM;
use crate::{Element, Error, Result, View};
use std::borrow::Cow;
use std::marker::PhantomData;

/// The sizes of a [`KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Sequences B.
    pub sequences: usize,
    /// KV heads H.
    pub kv_heads: usize,
    /// Dimension D of keys, 1 to 256.
    pub head_dim: usize,
    /// Dimension DV of values, 1 to 256.
    pub value_dim: usize,
    /// The most tokens of a sequence; a paged cache rounds it up to whole pages.
    pub max_len: usize,
}

/// Keys and values of a batch of sequences, each of its own length, to decode from.
///
/// *Contiguous*, every sequence has a room of `max_len` tokens, `[B, H, max_len, D]`. *Paged*, tokens lie in pages that are taken
/// from a common pool `[pages, page_size, H, D]` when they are needed, and forked sequences share them until one writes.
/// Memory is taken once, when the cache is made. An operation that fails has changed nothing.
///
/// ```
/// use flashlla::cache::{CacheShape, KvCache};
/// use flashlla::{Attention, Cpu, Engine, View};
/// # fn main() -> Result<(), flashlla::Error> {
/// let shape = CacheShape { sequences: 2, kv_heads: 1, head_dim: 4, value_dim: 4, max_len: 64 };
/// let mut cache = KvCache::<f32>::paged(shape, 16, 6)?;
///
/// // A prompt of 20 tokens for sequence 0, shared with sequence 1, then one token for each: [B, H, tokens, dim].
/// let prompt: Vec<f32> = (0..20 * 4).map(|i| (i as f32).sin()).collect();
/// let prompt = View::bhnd(&prompt, [1, 1, 20, 4])?;
/// cache.append_to(0, prompt, prompt)?;
/// cache.fork(0, 1)?;
/// assert_eq!(cache.pages_free(), 4);
/// let new: Vec<f32> = (0..8).map(|i| (i as f32).cos()).collect();
/// let new = View::bhnd(&new, [2, 1, 1, 4])?;
/// cache.append(new, new)?;
/// assert_eq!((cache.lengths(), cache.pages_free()), (&[21, 21][..], 3));
///
/// // The token's query, which sees all that the cache holds.
/// let view = cache.view();
/// let attention = Attention::builder_for_cache(&new, &view).ridge(1.0).build()?;
/// let forward = Cpu::new().decode(&attention.decoding(new, &view)?)?;
/// assert_eq!(forward.out.shape(), [2, 1, 1, 4]);
/// # Ok(())
/// # }
/// ```
///
/// `R` is where keys and values lie: in the host's memory, unless it says otherwise.
#[derive(Debug, Clone)]
pub struct KvCache<T, R = HostRoom<T>> {
    pub(crate) shape: CacheShape,
    pub(crate) pages: Pages,
    pub(crate) room: R,
    stored: PhantomData<T>,
}

/// Keys and values in the host's memory.
#[derive(Debug, Clone)]
pub struct HostRoom<T> {
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Element, R> KvCache<T, R> {
    /// Checks the sizes, and makes the room for so many slots.
    pub(crate) fn with_room(
        shape: CacheShape,
        pages: Pages,
        make: impl FnOnce(usize) -> Result<R>,
    ) -> Result<Self> {
        let shape = CacheShape { max_len: pages.paging().max_len(), ..shape };
        for (argument, size) in [("head_dim", shape.head_dim), ("value_dim", shape.value_dim)] {
            if !(1..=MAX_HEAD_DIM).contains(&size) {
                return Err(Error::value(argument, size, format!("from 1 to {MAX_HEAD_DIM}")));
            }
        }
        if shape.kv_heads == 0 {
            return Err(Error::value("kv_heads", 0, "at least 1"));
        }
        let slots = pages.paging().pages().checked_mul(pages.paging().page_size());
        let elements = slots.and_then(|n| n.checked_mul(shape.kv_heads * MAX_HEAD_DIM));
        let Some(slots) = slots.filter(|_| elements.is_some_and(|n| n <= isize::MAX as usize / 16)) else {
            let given = format!("{} pages of {}", pages.paging().pages(), pages.paging().page_size());
            return Err(Error::value("cache", given, "small enough for this machine's addresses"));
        };
        Ok(Self { shape, pages, room: make(slots)?, stored: PhantomData })
    }

    /// The sizes that it was made with (`max_len` in whole pages).
    pub fn shape(&self) -> CacheShape {
        self.shape
    }
    /// Tokens of every sequence.
    pub fn lengths(&self) -> &[usize] {
        self.pages.paging().lengths()
    }
    /// Tokens of one sequence. Panics when there is no such sequence.
    pub fn len(&self, sequence: usize) -> usize {
        self.lengths()[sequence]
    }
    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.lengths().iter().all(|&length| length == 0)
    }
    /// Tokens that fit in all, whichever sequences they belong to.
    pub fn capacity(&self) -> usize {
        self.pages.paging().pages() * self.pages.paging().page_size()
    }
    /// Bytes of memory that keys and values take, used or not.
    pub fn bytes(&self) -> usize {
        self.capacity() * self.shape.kv_heads * (self.shape.head_dim + self.shape.value_dim) * size_of::<T>()
    }
    /// Bytes of the pages in use, each counted once (contiguous: of the tokens that are there).
    pub fn bytes_used(&self) -> usize {
        let tokens = if self.pages.is_contiguous() {
            self.lengths().iter().sum()
        } else {
            self.pages_used() * self.page_size()
        };
        tokens * self.shape.kv_heads * (self.shape.head_dim + self.shape.value_dim) * size_of::<T>()
    }
    /// Tokens of a page; of a contiguous cache `max_len`.
    pub fn page_size(&self) -> usize {
        self.pages.paging().page_size()
    }
    /// Pages of the pool; of a contiguous cache one per sequence.
    pub fn pages(&self) -> usize {
        self.pages.paging().pages()
    }
    /// Pages that no sequence uses.
    pub fn pages_free(&self) -> usize {
        self.pages.free_pages()
    }
    /// Pages in use, shared ones counted once.
    pub fn pages_used(&self) -> usize {
        self.pages() - self.pages_free()
    }
    /// The bookkeeping.
    pub fn bookkeeping(&self) -> &Pages {
        &self.pages
    }

    /// Whether tensors are new tokens of so many sequences.
    pub(crate) fn check_tokens(&self, k: [usize; 4], v: [usize; 4], sequences: usize) -> Result<()> {
        let CacheShape { kv_heads, head_dim, value_dim, .. } = self.shape;
        let tokens = k[2];
        for (argument, given, dim, meaning) in [
            ("k", k, head_dim, "sequences, KV heads, tokens, head_dim"),
            ("v", v, value_dim, "sequences, KV heads, tokens as k, value_dim"),
        ] {
            let expected = [sequences, kv_heads, tokens, dim];
            if given != expected {
                return Err(Error::shape(argument, &given, &expected, meaning));
            }
        }
        Ok(())
    }
}

impl<T: Element> KvCache<T> {
    /// A room of `max_len` tokens for every sequence.
    pub fn contiguous(shape: CacheShape) -> Result<Self> {
        Self::new(shape, Pages::contiguous(shape.sequences, shape.max_len)?)
    }

    /// A pool of `pages` pages of `page_size` tokens, a power of two from 16.
    pub fn paged(shape: CacheShape, page_size: usize, pages: usize) -> Result<Self> {
        Self::new(shape, Pages::paged(shape.sequences, shape.max_len, page_size, pages)?)
    }

    fn new(shape: CacheShape, pages: Pages) -> Result<Self> {
        Self::with_room(shape, pages, |slots| {
            let room = |dim: usize| -> Result<Vec<T>> {
                let (elements, mut room) = (slots * shape.kv_heads * dim, vec![]);
                if room.try_reserve_exact(elements).is_err() {
                    let given = format!("{} bytes", elements * size_of::<T>());
                    return Err(Error::value("cache", given, "no more than there is memory for"));
                }
                room.resize(elements, T::default());
                Ok(room)
            };
            Ok(HostRoom { k: room(shape.head_dim)?, v: room(shape.value_dim)? })
        })
    }

    /// What there is, for [`crate::Engine::decode`].
    pub fn view(&self) -> CacheView<'_, T> {
        let view = |data, dim| {
            let [pages, slots, heads] = [self.pages(), self.page_size(), self.shape.kv_heads];
            if self.pages.is_contiguous() {
                View::bhnd(data, [pages, heads, slots, dim])
            } else {
                View::bnhd(data, [pages, slots, heads, dim])
            }
        };
        let k = view(&self.room.k, self.shape.head_dim).expect("the pool fills its shape");
        let v = view(&self.room.v, self.shape.value_dim).expect("the pool fills its shape");
        CacheView::new(k, v, Cow::Borrowed(self.pages.paging())).expect("keys and values have one shape")
    }

    /// Appends `n` tokens to every sequence: `k [B, H, n, D]` and `v [B, H, n, DV]`.
    pub fn append(&mut self, k: View<T>, v: View<T>) -> Result<()> {
        self.check_tokens(k.shape(), v.shape(), self.shape.sequences)?;
        let tokens: Vec<_> = (0..self.shape.sequences).map(|sequence| (sequence, k.shape()[2])).collect();
        self.write(&tokens, k, v)
    }

    /// Appends `n` tokens to one sequence: `k [1, H, n, D]` and `v [1, H, n, DV]`.
    pub fn append_to(&mut self, sequence: usize, k: View<T>, v: View<T>) -> Result<()> {
        self.check_tokens(k.shape(), v.shape(), 1)?;
        self.write(&[(sequence, k.shape()[2])], k, v)
    }

    fn write(&mut self, tokens: &[(usize, usize)], k: View<T>, v: View<T>) -> Result<()> {
        let copies = self.pages.append(tokens)?;
        copies.into_iter().for_each(|copy| self.copy(copy));
        for (row, &(sequence, n)) in tokens.iter().enumerate() {
            let first = self.len(sequence) - n;
            for i in 0..n {
                let (page, slot) = self.pages.paging().place(sequence, first + i);
                for head in 0..self.shape.kv_heads {
                    let at = self.row(page, slot, head);
                    for (pool, new, dim) in [
                        (&mut self.room.k, &k, self.shape.head_dim),
                        (&mut self.room.v, &v, self.shape.value_dim),
                    ] {
                        let place = &mut pool[at * dim..][..dim];
                        new.row(row, head, i).for_each(|d, x| place[d] = x);
                    }
                }
            }
        }
        Ok(())
    }

    /// Which row of the pool a token's head is.
    fn row(&self, page: usize, slot: usize, head: usize) -> usize {
        let (slots, heads) = (self.page_size(), self.shape.kv_heads);
        if self.pages.is_contiguous() {
            (page * heads + head) * slots + slot
        } else {
            (page * slots + slot) * heads + head
        }
    }

    fn copy(&mut self, PageCopy { from, to, tokens }: PageCopy) {
        for head in 0..self.shape.kv_heads {
            for slot in 0..tokens {
                let (from, to) = (self.row(from, slot, head), self.row(to, slot, head));
                for (pool, dim) in
                    [(&mut self.room.k, self.shape.head_dim), (&mut self.room.v, self.shape.value_dim)]
                {
                    pool.copy_within(from * dim..(from + 1) * dim, to * dim);
                }
            }
        }
    }

    /// Makes the empty sequence `to` a continuation of all that `from` holds. A paged cache copies nothing yet.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        if let Some(copy) = self.pages.fork(from, to)? {
            self.copy(copy);
        }
        Ok(())
    }

    /// Forgets a sequence's tokens from `length` on, such as those of a speculation that did not hold.
    pub fn truncate(&mut self, sequence: usize, length: usize) -> Result<()> {
        self.pages.truncate(sequence, length)
    }

    /// Forgets a sequence; its pages can be used again unless others share them.
    pub fn free(&mut self, sequence: usize) -> Result<()> {
        self.pages.free(sequence)
    }
}
