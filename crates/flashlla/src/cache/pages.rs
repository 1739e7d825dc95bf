//! Who owns which page.

use super::Paging;
use super::paging::{check_count, check_page_size};
use crate::{Error, Result};
use std::collections::HashMap;

/// What has to be copied before an append or after a fork: the keys and values of the first `tokens` slots of page `from`, all
/// heads, to page `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// The page to read.
    pub from: usize,
    /// The page to write.
    pub to: usize,
    /// Slots in use.
    pub tokens: usize,
}

/// The bookkeeping of a cache: a block table, lengths, and how many sequences use each page.
///
/// It moves no data, so that caches on any device can be built on it: an operation says what to copy, and the new
/// [`Pages::paging`] says where new tokens go. An operation that fails has changed nothing.
///
/// ```
/// use flashlla::cache::Pages;
/// let mut pages = Pages::paged(2, 64, 16, 5)?; // 2 sequences of up to 64 tokens, 5 pages of 16
/// assert!(pages.append(&[(0, 20)])?.is_empty());
/// pages.fork(0, 1)?; // shares both pages
/// assert_eq!(pages.free_pages(), 3);
/// let copies = pages.append(&[(1, 1)])?; // writes to a page that both use: a copy of its 4 tokens first
/// assert_eq!((copies[0].tokens, pages.free_pages()), (4, 2));
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pages {
    paging: Paging,
    /// Sequences that use each page.
    users: Vec<u32>,
    /// Pages that none uses; the last is the next to be taken.
    free: Vec<i32>,
    /// Every sequence has its own page, always: a contiguous cache.
    fixed: bool,
}

impl Pages {
    /// For a contiguous cache of `sequences` sequences of up to `max_len` tokens.
    pub fn contiguous(sequences: usize, max_len: usize) -> Result<Self> {
        check_count("sequences", sequences)?;
        let paging = Paging::contiguous(&vec![0; sequences], max_len)?;
        Ok(Self { paging, users: vec![1; sequences], free: vec![], fixed: true })
    }

    /// For `pages` pages of `page_size` tokens, a power of two from 16, and `sequences` sequences of up to `max_len` tokens,
    /// rounded up to whole pages.
    pub fn paged(sequences: usize, max_len: usize, page_size: usize, pages: usize) -> Result<Self> {
        check_page_size(page_size)?;
        check_count("sequences", sequences)?;
        check_count("pages", pages)?;
        // More than all pages no sequence can have.
        let width = max_len.div_ceil(page_size).min(pages);
        let entries = sequences.checked_mul(width).filter(|&n| n <= isize::MAX as usize / 8);
        let Some(entries) = entries else {
            let allowed = format!("small enough for a block table of {sequences} sequences");
            return Err(Error::value("max_len", max_len, allowed));
        };
        let paging =
            Paging { page_size, pages, width, table: vec![-1; entries], lengths: vec![0; sequences] };
        Ok(Self { paging, users: vec![0; pages], free: (0..pages as i32).rev().collect(), fixed: false })
    }

    /// Block table and lengths as they are now.
    pub fn paging(&self) -> &Paging {
        &self.paging
    }

    /// Pages that no sequence uses.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Whether every sequence has a room of its own ([`Pages::contiguous`]).
    pub fn is_contiguous(&self) -> bool {
        self.fixed
    }

    /// How many sequences use a page. Panics when there is no such page.
    pub fn users(&self, page: usize) -> usize {
        self.users[page] as usize
    }

    fn check(&self, argument: &'static str, sequence: usize) -> Result<()> {
        match self.paging.sequences() {
            n if sequence < n => Ok(()),
            0 => Err(Error::value(argument, sequence, "a sequence, and the cache has none")),
            n => Err(Error::value(argument, sequence, format!("a sequence from 0 to {}", n - 1))),
        }
    }

    /// Makes room for new tokens, `(sequence, how many)`, each sequence named at most once. The copies must be made before the
    /// tokens are written, which then belong at the end of their sequences.
    pub fn append(&mut self, tokens: &[(usize, usize)]) -> Result<Vec<PageCopy>> {
        let size = self.paging.page_size;
        let (mut needed, mut seen) = (0, vec![false; self.paging.sequences()]);
        // Writers of each shared page; the last user of a page needs no copy.
        let mut writers: HashMap<usize, u32> = HashMap::new();
        let mut copied = vec![];
        for &(sequence, n) in tokens {
            self.check("sequence", sequence)?;
            if std::mem::replace(&mut seen[sequence], true) {
                return Err(Error::value("sequence", sequence, "named once in an append"));
            }
            let length = self.paging.lengths[sequence];
            let fits = self.paging.max_len() - length;
            if n > fits {
                return Err(Error::CacheFull {
                    needed: format!("sequence {sequence} holds {length} tokens and is to have {n} more"),
                    there: format!("room for {fits}, of {} per sequence", self.paging.max_len()),
                });
            }
            if self.fixed || n == 0 {
                continue;
            }
            needed += (length + n).div_ceil(size) - length.div_ceil(size);
            if !length.is_multiple_of(size) {
                let last = self.paging.place(sequence, length - 1).0;
                let before = writers.entry(last).or_default();
                if self.users[last] - *before > 1 {
                    *before += 1;
                    needed += 1;
                    copied.push(sequence);
                }
            }
        }
        if needed > self.free.len() {
            return Err(Error::CacheFull {
                needed: format!("{needed} more pages of {size} tokens are needed"),
                there: format!("{} free, of {}", self.free.len(), self.paging.pages),
            });
        }

        let mut copies = vec![];
        for &sequence in &copied {
            let length = self.paging.lengths[sequence];
            let from = self.paging.place(sequence, length - 1).0;
            let to = self.take();
            self.users[from] -= 1;
            self.paging.table[sequence * self.paging.width + (length - 1) / size] = to;
            copies.push(PageCopy { from, to: to as usize, tokens: length % size });
        }
        for &(sequence, n) in tokens {
            let length = self.paging.lengths[sequence];
            if !self.fixed {
                for part in length.div_ceil(size)..(length + n).div_ceil(size) {
                    self.paging.table[sequence * self.paging.width + part] = self.take();
                }
            }
            self.paging.lengths[sequence] = length + n;
        }
        Ok(copies)
    }

    fn take(&mut self) -> i32 {
        let page = self.free.pop().expect("free pages were counted");
        self.users[page as usize] = 1;
        page
    }

    /// Makes the empty sequence `to` a continuation of all that `from` holds. Paged, they share its pages and nothing is to be
    /// copied; contiguous, the copy that is returned is to be made.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<Option<PageCopy>> {
        self.check("from", from)?;
        self.check("to", to)?;
        if self.paging.lengths[to] > 0 {
            let given = format!("sequence {to} with {} tokens", self.paging.lengths[to]);
            return Err(Error::value("to", given, "an empty sequence (free it first)"));
        }
        let length = self.paging.lengths[from];
        self.paging.lengths[to] = length;
        if self.fixed {
            return Ok((length > 0).then_some(PageCopy { from, to, tokens: length }));
        }
        let width = self.paging.width;
        for part in 0..length.div_ceil(self.paging.page_size) {
            let page = self.paging.table[from * width + part];
            self.users[page as usize] += 1;
            self.paging.table[to * width + part] = page;
        }
        Ok(None)
    }

    /// Forgets a sequence's tokens from `length` on.
    pub fn truncate(&mut self, sequence: usize, length: usize) -> Result<()> {
        self.check("sequence", sequence)?;
        let old = self.paging.lengths[sequence];
        if length > old {
            return Err(Error::value("length", length, format!("at most the {old} tokens there are")));
        }
        if !self.fixed {
            let size = self.paging.page_size;
            // From the end: pages are taken again in the order that they were in.
            for part in (length.div_ceil(size)..old.div_ceil(size)).rev() {
                let entry = &mut self.paging.table[sequence * self.paging.width + part];
                let page = std::mem::replace(entry, -1);
                self.users[page as usize] -= 1;
                if self.users[page as usize] == 0 {
                    self.free.push(page);
                }
            }
        }
        self.paging.lengths[sequence] = length;
        Ok(())
    }

    /// Forgets a sequence.
    pub fn free(&mut self, sequence: usize) -> Result<()> {
        self.truncate(sequence, 0)
    }
}
