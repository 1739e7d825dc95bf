//! Block tables and lengths.

use crate::{Error, Result};

/// The smallest page of a paged cache, in tokens.
pub const MIN_PAGE_SIZE: usize = 16;

/// Whether sequences of a block table may have pages in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Every page in use belongs to one sequence: what a table without forks looks like. A page used twice is an error.
    #[default]
    Exclusive,
    /// Sequences may share pages that hold the same part of each: a forked or common past. A page used twice by one sequence, or
    /// for different parts of two, is still an error.
    Prefix,
}

/// Where the tokens of every sequence lie: token `j` of sequence `b` is slot `j % page_size` of page
/// `table[b, j / page_size]`.
///
/// It has nothing of tensors or devices: engines of any device take it, and keep a copy of table and lengths where they need one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paging {
    pub(super) page_size: usize,
    pub(super) pages: usize,
    /// Pages that a sequence can have.
    pub(super) width: usize,
    /// `[sequences, width]`; what lies beyond a sequence's length is anything.
    pub(super) table: Vec<i32>,
    pub(super) lengths: Vec<usize>,
}

impl Paging {
    /// One room of `capacity` tokens per sequence, in the order of the sequences.
    pub fn contiguous(lengths: &[usize], capacity: usize) -> Result<Self> {
        check_count("lengths", lengths.len())?;
        let this = Self {
            page_size: capacity,
            pages: lengths.len(),
            width: 1,
            table: (0..lengths.len() as i32).collect(),
            lengths: lengths.to_vec(),
        };
        this.check_lengths("of the cache's capacity")?;
        Ok(this)
    }

    /// A block table `[sequences, pages per sequence]`, row by row, on a pool of `pages` pages of `page_size` tokens, a power of
    /// two from 16. Entries beyond a sequence's length are not looked at.
    pub fn paged(
        table: &[i32],
        lengths: &[usize],
        page_size: usize,
        pages: usize,
        sharing: Sharing,
    ) -> Result<Self> {
        check_page_size(page_size)?;
        check_count("pages", pages)?;
        check_count("lengths", lengths.len())?;
        let sequences = lengths.len();
        if if sequences == 0 { !table.is_empty() } else { !table.len().is_multiple_of(sequences) } {
            return Err(Error::Shape {
                argument: "block_table",
                given: vec![table.len()],
                expected: format!("[{sequences}, n] (sequences, pages per sequence), row by row"),
            });
        }
        let width = table.len().checked_div(sequences).unwrap_or(0);
        if width.checked_mul(page_size).is_none() {
            return Err(Error::value(
                "block_table",
                width,
                "small enough pages per sequence for 64-bit tokens",
            ));
        }
        let this = Self { page_size, pages, width, table: table.to_vec(), lengths: lengths.to_vec() };
        this.check_lengths("that the block table has pages for")?;
        this.check_table(sharing)?;
        Ok(this)
    }

    fn check_lengths(&self, room: &str) -> Result<()> {
        match self.lengths.iter().enumerate().find(|&(_, &length)| length > self.max_len()) {
            None => Ok(()),
            Some((sequence, length)) => Err(Error::value(
                "lengths",
                format!("{length} (sequence {sequence})"),
                format!("at most the {} tokens {room}", self.max_len()),
            )),
        }
    }

    fn check_table(&self, sharing: Sharing) -> Result<()> {
        // The sequence and the part of it that each page was first found to hold.
        let mut users: Vec<Option<(usize, usize)>> = vec![None; self.pages];
        for sequence in 0..self.sequences() {
            for (part, &page) in self.pages_of(sequence).iter().enumerate() {
                let place = format!("block_table[{sequence}, {part}] = {page}");
                let known = usize::try_from(page).ok().and_then(|page| users.get_mut(page));
                let Some(user) = known else {
                    return Err(Error::Value {
                        argument: "block_table",
                        given: place,
                        allowed: format!("a page from 0 to {}", self.pages as i128 - 1),
                    });
                };
                let Some((other, other_part)) = user.replace((sequence, part)) else { continue };
                let forked = sharing == Sharing::Prefix && other != sequence && other_part == part;
                if !forked {
                    return Err(Error::Value {
                        argument: "block_table",
                        given: place,
                        allowed: format!(
                            "a page not in use: [{other}, {other_part}] is the same page{}",
                            if sharing == Sharing::Exclusive && other != sequence && other_part == part {
                                " (say that pages are shared if it is a forked past)"
                            } else {
                                ""
                            }
                        ),
                    });
                }
            }
        }
        Ok(())
    }

    /// Sequences B.
    pub fn sequences(&self) -> usize {
        self.lengths.len()
    }
    /// Tokens of every sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }
    /// The most tokens that a sequence can have.
    pub fn max_len(&self) -> usize {
        self.width * self.page_size
    }
    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }
    /// Pages of the pool.
    pub fn pages(&self) -> usize {
        self.pages
    }
    /// The block table `[sequences, table_width]`, row by row. Entries beyond a sequence's length mean nothing.
    pub fn table(&self) -> &[i32] {
        &self.table
    }
    /// Pages that a sequence can have.
    pub fn table_width(&self) -> usize {
        self.width
    }

    /// The pages that a sequence's tokens lie in.
    pub fn pages_of(&self, sequence: usize) -> &[i32] {
        let used = self.lengths[sequence].div_ceil(self.page_size.max(1));
        &self.table[sequence * self.width..][..used]
    }

    /// Page and slot of a token. Panics when the sequence does not have it.
    #[inline]
    pub fn place(&self, sequence: usize, token: usize) -> (usize, usize) {
        assert!(token < self.lengths[sequence], "token {token} of {}", self.lengths[sequence]);
        (self.table[sequence * self.width + token / self.page_size] as usize, token % self.page_size)
    }
}

/// Tables hold 32-bit numbers, as the field's do.
pub(super) fn check_count(argument: &'static str, count: usize) -> Result<()> {
    if i32::try_from(count).is_ok() {
        Ok(())
    } else {
        Err(Error::value(argument, count, format!("at most {}", i32::MAX)))
    }
}

pub(super) fn check_page_size(page_size: usize) -> Result<()> {
    if page_size.is_power_of_two() && page_size >= MIN_PAGE_SIZE {
        Ok(())
    } else {
        Err(Error::value("page_size", page_size, format!("a power of two from {MIN_PAGE_SIZE}")))
    }
}
