//! A cache's keys and values, borrowed.

use super::{Paging, Sharing};
use crate::{Element, Error, Result, View};
use std::borrow::Cow;

/// Keys and values that lie where a [`Paging`] says: what engines decode from. Nothing is copied.
///
/// Keys and values are views `[page, KV head, slot, dim]` with any strides, so both orders in use can be read in place:
/// `[pages, page_size, H, D]` (vLLM, FlashAttention) through [`View::bnhd`], `[pages, H, page_size, D]` through [`View::bhnd`].
///
/// ```
/// use flashlla::{View, cache::CacheView};
/// // Two sequences of 20 and 3 tokens in a pool [4 pages, 16 slots, 1 head, 2 dims]; -1 fills the table up.
/// let (k, v) = (vec![0.5f32; 4 * 16 * 2], vec![1.0f32; 4 * 16 * 2]);
/// let shape = [4, 16, 1, 2];
/// let cache =
///     CacheView::paged(View::bnhd(&k, shape)?, View::bnhd(&v, shape)?, &[3, 0, 2, -1], &[20, 3])?;
/// assert_eq!((cache.sequences(), cache.max_len()), (2, 32));
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CacheView<'a, T: Element> {
    k: View<'a, T>,
    v: View<'a, T>,
    paging: Cow<'a, Paging>,
}

impl<'a, T: Element> CacheView<'a, T> {
    /// Contiguous tensors `k [B, H, capacity, D]` and `v [B, H, capacity, DV]`, and how many tokens of each sequence there are.
    pub fn contiguous(k: View<'a, T>, v: View<'a, T>, lengths: &[usize]) -> Result<Self> {
        let [sequences, _, capacity, _] = k.shape();
        if lengths.len() != sequences {
            return Err(Error::shape("lengths", &[lengths.len()], &[sequences], "batch"));
        }
        Self::new(k, v, Cow::Owned(Paging::contiguous(lengths, capacity)?))
    }

    /// Pools of pages `k [pages, H, page_size, D]` and `v [pages, H, page_size, DV]`, a block table `[B, pages per sequence]`, row
    /// by row, and lengths. Page sizes are powers of two from 16. No page may be used twice; see [`CacheView::paged_shared`].
    pub fn paged(k: View<'a, T>, v: View<'a, T>, table: &[i32], lengths: &[usize]) -> Result<Self> {
        let [pages, _, page_size, _] = k.shape();
        let paging = Paging::paged(table, lengths, page_size, pages, Sharing::Exclusive)?;
        Self::new(k, v, Cow::Owned(paging))
    }

    /// As [`CacheView::paged`], where sequences may share the pages of a common past ([`Sharing::Prefix`]).
    pub fn paged_shared(k: View<'a, T>, v: View<'a, T>, table: &[i32], lengths: &[usize]) -> Result<Self> {
        let [pages, _, page_size, _] = k.shape();
        let paging = Paging::paged(table, lengths, page_size, pages, Sharing::Prefix)?;
        Self::new(k, v, Cow::Owned(paging))
    }

    /// Joins a paging with its keys and values.
    pub(super) fn new(k: View<'a, T>, v: View<'a, T>, paging: Cow<'a, Paging>) -> Result<Self> {
        let ([pages, heads, page_size, _], [_, _, _, value_dim]) = (k.shape(), v.shape());
        let expected = [pages, heads, page_size, value_dim];
        if v.shape() != expected {
            return Err(Error::shape("v", &v.shape(), &expected, "as k has, value_dim"));
        }
        debug_assert!(pages == paging.pages() && page_size == paging.page_size());
        Ok(Self { k, v, paging })
    }

    /// The keys `[pages, H, page_size, D]`.
    pub fn k(&self) -> View<'a, T> {
        self.k
    }
    /// The values `[pages, H, page_size, DV]`.
    pub fn v(&self) -> View<'a, T> {
        self.v
    }
    /// Block table and lengths.
    pub fn paging(&self) -> &Paging {
        &self.paging
    }
    /// Sequences B.
    pub fn sequences(&self) -> usize {
        self.paging.sequences()
    }
    /// Tokens of every sequence.
    pub fn lengths(&self) -> &[usize] {
        self.paging.lengths()
    }
    /// The most tokens that a sequence can have: [`crate::Attention::keys`] of a description that decodes from this cache.
    pub fn max_len(&self) -> usize {
        self.paging.max_len()
    }
    /// KV heads H.
    pub fn kv_heads(&self) -> usize {
        self.k.shape()[1]
    }
    /// Dimension D of keys.
    pub fn head_dim(&self) -> usize {
        self.k.shape()[3]
    }
    /// Dimension DV of values.
    pub fn value_dim(&self) -> usize {
        self.v.shape()[3]
    }
    /// Bytes of the keys and values that the lengths say are there, shared pages counted once per sequence.
    pub fn bytes_in_use(&self) -> usize {
        let tokens: usize = self.lengths().iter().sum();
        tokens * self.kv_heads() * (self.head_dim() + self.value_dim()) * size_of::<T>()
    }
}
