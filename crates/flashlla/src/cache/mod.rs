//! Caches of keys and values for decoding: [`KvCache`], which owns them, and [`CacheView`], which describes anybody's.
//!
//! A cache is a pool of pages. Page `p` holds the keys and values of `page_size` neighbouring tokens of one sequence, for all
//! KV heads; a *block table* says which page holds which tokens of which sequence, and a list of lengths how many tokens there
//! are. A contiguous cache `[B, H, capacity, D]` is the special case of one page per sequence, as long as its capacity.
//!
//! | room | what is in it |
//! |---|---|
//! | [`Paging`] | block table and lengths, checked: nothing of tensors or devices |
//! | [`Pages`] | who owns which page: append, fork, truncate, free, as bookkeeping that any device can follow |
//! | [`CacheView`] | a paging with its keys and values: what engines decode from |
//! | [`KvCache`] | pages with their keys and values, in the host's memory or, with feature `cuda`, a GPU's |
//!
//! Beams share the pages of their common past: [`KvCache::fork`] copies nothing, and whoever first writes to a page that others
//! use too gets a copy of that page ([`PageCopy`]).

mod owned;
mod pages;
mod paging;
mod view;

pub use owned::{CacheShape, HostRoom, KvCache};
pub use pages::{PageCopy, Pages};
pub use paging::{MIN_PAGE_SIZE, Paging, Sharing};
pub use view::CacheView;
