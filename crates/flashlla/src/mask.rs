//! Which keys a query can see.

use crate::{Error, Result};

/// Which keys a query can see: any combination of causality, a sliding window, packed sequences and leave-one-out.
///
/// Query `i` stands at position `i + q_offset`; key `j` stands at position `j`. Whatever the combination, the keys that
/// a query sees are one contiguous range, less at most its own position: see [`Visible`].
///
/// ```
/// use flashlla::Mask;
/// let mask = Mask::causal().window(2);
/// let seen: Vec<usize> = mask.visible(3, 10).iter().collect();
/// assert_eq!(seen, [2, 3]);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mask {
    pub(crate) causal: bool,
    pub(crate) q_offset: i64,
    pub(crate) window: Option<usize>,
    pub(crate) cu_seqlens: Option<Vec<usize>>,
    pub(crate) leave_one_out: bool,
}

/// The keys that one query sees: `start..end` without `skip`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// The first key seen.
    pub start: usize,
    /// One past the last key of the range; equal to `start` when it is empty.
    pub end: usize,
    /// A key inside the range that is not seen (the query's own position under leave-one-out).
    pub skip: Option<usize>,
}

impl Visible {
    /// The number of keys seen.
    pub fn count(&self) -> usize {
        self.end - self.start - usize::from(self.skip.is_some())
    }

    /// Whether key `j` is seen.
    pub fn contains(&self, j: usize) -> bool {
        self.start <= j && j < self.end && self.skip != Some(j)
    }

    /// The keys seen, in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + use<> {
        let skip = self.skip;
        (self.start..self.end).filter(move |&j| Some(j) != skip)
    }
}

impl Mask {
    /// Every query sees every key.
    pub fn full() -> Self {
        Self::default()
    }

    /// A query sees the keys up to its own position.
    pub fn causal() -> Self {
        Self { causal: true, ..Self::default() }
    }

    /// Sets the position of query 0 (default 0). With a cache of `M` keys whose last `N` belong to the queries, that is
    /// `M - N`. A negative offset is allowed: under causality, queries before position 0 see no key.
    pub fn q_offset(mut self, position: i64) -> Self {
        self.q_offset = position;
        self
    }

    /// A query at position `i` sees only keys `j > i - window`. Without causality, later keys are not limited.
    pub fn window(mut self, window: usize) -> Self {
        self.window = Some(window);
        self
    }

    /// Several sequences packed one after another: `cu_seqlens` holds the running sums of their lengths, from 0 to the
    /// number of keys. A query sees only the keys of the sequence that its position lies in. Lengths of 0 are allowed.
    pub fn cu_seqlens(mut self, cu_seqlens: impl Into<Vec<usize>>) -> Self {
        self.cu_seqlens = Some(cu_seqlens.into());
        self
    }

    /// A query does not see the key at its own position.
    pub fn leave_one_out(mut self) -> Self {
        self.leave_one_out = true;
        self
    }

    /// Whether later keys are hidden.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// The position of query 0.
    pub fn offset(&self) -> i64 {
        self.q_offset
    }

    /// The length of the sliding window, if there is one.
    pub fn window_len(&self) -> Option<usize> {
        self.window
    }

    /// The running sums of the packed sequences' lengths, if there are any.
    pub fn sequences(&self) -> Option<&[usize]> {
        self.cu_seqlens.as_deref()
    }

    /// Whether the query's own position is hidden.
    pub fn is_leave_one_out(&self) -> bool {
        self.leave_one_out
    }

    /// Whether `queries` queries see contexts that grow with them: each all keys of its sequence up to its own, among `keys` keys, from a
    /// query on that sees the first one.
    ///
    /// ```
    /// use flashlla::Mask;
    /// assert!(Mask::causal().grows(100, 100));
    /// assert!(!Mask::causal().q_offset(50).grows(50, 100)); // the first query sees 51 keys
    /// assert!(!Mask::causal().window(64).grows(100, 100));
    /// assert!(!Mask::full().grows(100, 100));
    /// ```
    pub fn grows(&self, queries: usize, keys: usize) -> bool {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let inside = count(queries).saturating_add(self.q_offset) <= count(keys);
        self.causal && self.window.is_none() && self.q_offset <= 0 && inside
    }

    /// The keys that query `i` sees among `keys` keys.
    pub fn visible(&self, i: usize, keys: usize) -> Visible {
        let position = (i as i64).saturating_add(self.q_offset);
        let (mut start, mut end) = (0i64, keys as i64);
        if let Some(cu) = &self.cu_seqlens {
            // The sequence that holds the position: after the last boundary that is not beyond it.
            let after = cu.partition_point(|&c| c as i64 <= position);
            if after == 0 || after == cu.len() {
                return Visible { start: 0, end: 0, skip: None };
            }
            (start, end) = (cu[after - 1] as i64, cu[after] as i64);
        }
        if self.causal {
            end = end.min(position.saturating_add(1));
        }
        if let Some(window) = self.window {
            let window = i64::try_from(window).unwrap_or(i64::MAX);
            start = start.max(position.saturating_sub(window).saturating_add(1));
        }
        if end <= start {
            return Visible { start: 0, end: 0, skip: None };
        }
        let own = self.leave_one_out && start <= position && position < end;
        Visible { start: start as usize, end: end as usize, skip: own.then_some(position as usize) }
    }

    pub(crate) fn validate(&self, queries: usize, keys: usize) -> Result<()> {
        if self.window == Some(0) {
            return Err(Error::value("window", 0, "at least 1 (leave it out for no window)"));
        }
        let last = self.q_offset.checked_add(i64::try_from(queries).unwrap_or(i64::MAX));
        let Some(last) = last else {
            return Err(Error::value(
                "q_offset",
                self.q_offset,
                "small enough that q_offset + queries fits in 64 bits",
            ));
        };
        if let Some(cu) = &self.cu_seqlens {
            let allowed = format!("running sums from 0 to the number of keys ({keys}), never decreasing");
            if cu.len() < 2 || cu[0] != 0 || cu[cu.len() - 1] != keys || cu.windows(2).any(|w| w[0] > w[1]) {
                return Err(Error::value("cu_seqlens", abbreviated(cu), allowed));
            }
            if queries > 0 && (self.q_offset < 0 || last > keys as i64) {
                return Err(Error::value(
                    "q_offset",
                    self.q_offset,
                    format!(
                        "such that the {queries} query positions lie inside the packed sequences (0..{keys})"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// A list for a one-line message, however long it is.
fn abbreviated(values: &[usize]) -> String {
    if values.len() <= 12 {
        format!("{values:?}")
    } else {
        format!("[{}, ... {} values ..., {}]", values[0], values.len() - 2, values[values.len() - 1])
    }
}
