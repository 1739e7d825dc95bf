//! Products of one query row with keys and values where they lie: they become the type of arithmetic in registers, and are put down nowhere.

use super::kernels::{Weigh, prefetch};
use crate::cpu::simd::MOST_LANES;
use crate::view::Run;
use crate::{Element, Real};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// How many bytes ahead of where it reads a pass asks for memory: tokens mostly follow each other.
const AHEAD: usize = 4096;
/// The same while tokens are looked at again, which asks for nothing that is near: by the next look at new ones, memory has brought some.
const FAR_AHEAD: usize = 16384;

/// Tokens that are looked at together: few, so that they stay in the first-level cache from one look to the next. Sums are put together by these, wherever pages end.
pub const FEW: usize = 32;

/// Up to [`FEW`] tokens at a time, with their places among all.
pub fn by_few(tokens: Range<usize>) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let first = tokens.start;
    tokens.clone().step_by(FEW).map(move |at| (at - first..at - first + FEW, at..tokens.end.min(at + FEW)))
}

/// Some rows of the same length.
pub trait Rows: Copy {
    type Item: Element;
    fn count(&self) -> usize;
    fn row(&self, i: usize) -> &[Self::Item];
    /// Where a row begins.
    ///
    /// # Safety
    /// There must be such a row.
    unsafe fn start(&self, i: usize) -> *const Self::Item;

    /// Their length.
    #[inline(always)]
    fn width(&self) -> usize {
        let width = if self.count() == 0 { 0 } else { self.row(0).len() };
        assert!((0..self.count()).all(|i| self.row(i).len() == width));
        width
    }
}

impl<T: Element> Rows for Run<'_, T> {
    type Item = T;
    #[inline(always)]
    fn count(&self) -> usize {
        self.count()
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &[T] {
        self.row(i)
    }
    #[inline(always)]
    unsafe fn start(&self, i: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { self.start(i) }
    }
}

impl<T: Element> Rows for &[&[T]] {
    type Item = T;
    #[inline(always)]
    fn count(&self) -> usize {
        self.len()
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &[T] {
        self[i]
    }
    #[inline(always)]
    unsafe fn start(&self, i: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { self.get_unchecked(i).as_ptr() }
    }
}

/// Asks for what follows so many bytes behind some numbers of a row.
#[inline(always)]
fn ask<T>(row: *const T, count: usize, ahead: usize) {
    for line in (0..count * size_of::<T>()).step_by(64) {
        prefetch(row.wrapping_byte_add(ahead + line));
    }
}

/// Where `G` rows from `first` on begin; the last one's place stands for those that are not there.
///
/// # Safety
/// There must be `count` rows, and one at least.
#[inline(always)]
unsafe fn starts<R: Rows, const G: usize>(rows: &R, first: usize, count: usize) -> [*const R::Item; G] {
    let mut all = [std::ptr::null(); G];
    for (g, start) in all.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *start = unsafe { rows.start((first + g).min(count - 1)) };
    }
    all
}

/// A row's first `N` registers, two by two in [an order of their type](crate::cpu::widen::Widen::in_order).
///
/// # Safety
/// The row must have as many numbers.
#[inline(always)]
unsafe fn registers<T: Element, C: Real, S: Simd, const N: usize>(simd: S, from: *const T) -> [C::V<S>; N] {
    let lanes = C::lanes::<S>();
    let mut all = [C::splat(simd, C::ZERO); N];
    // SAFETY: the caller's promise.
    unsafe {
        let (pairs, rest) = all.as_chunks_mut::<2>();
        for (i, pair) in pairs.iter_mut().enumerate() {
            *pair = T::pair::<S, C>(simd, from.add(2 * i * lanes));
        }
        for last in rest {
            *last = T::register::<S, C>(simd, from.add(N / 2 * 2 * lanes));
        }
    }
    all
}

/// Numbers of the type of arithmetic in the order that [`registers`] of `T` have.
///
/// # Safety
/// So many must be there.
#[inline(always)]
unsafe fn in_order<T: Element, C: Real, S: Simd, const N: usize>(simd: S, from: *const C) -> [C::V<S>; N] {
    let mut all = [C::splat(simd, C::ZERO); N];
    for (i, register) in all.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *register = unsafe { C::load::<S>(from.add(i * C::lanes::<S>())) };
    }
    for pair in all.as_chunks_mut::<2>().0 {
        *pair = T::in_order::<S, C>(*pair);
    }
    all
}

/// Adds what is in that order to numbers.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_to<T: Element, C: Real, S: Simd, const N: usize>(simd: S, mut all: [C::V<S>; N], to: *mut C) {
    for pair in all.as_chunks_mut::<2>().0 {
        *pair = T::out_of_order::<S, C>(*pair);
    }
    for (i, part) in all.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let to = to.add(i * C::lanes::<S>());
            C::store::<S>(to, C::v_add(simd, C::load::<S>(to), part));
        }
    }
}

/// What rows are less by: `LESS` says whether it is anything.
#[inline(always)]
fn less<C: Real, S: Simd, const N: usize, const LESS: bool>(
    simd: S,
    mut row: [C::V<S>; N],
    origin: &[C::V<S>; N],
) -> [C::V<S>; N] {
    if LESS {
        for (x, &o) in row.iter_mut().zip(origin) {
            *x = C::v_sub(simd, *x, o);
        }
    }
    row
}

/// `out_j = d · (rows_j − origin)`
pub struct RowDots<'a, R, C> {
    pub rows: R,
    pub d: &'a [C],
    pub origin: Option<&'a [C]>,
    pub out: &'a mut [C],
}

impl<R: Rows, C: Real> WithSimd for RowDots<'_, R, C> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (dim, lanes) = (self.rows.width(), C::lanes::<S>());
        assert!(self.d.len() >= dim && self.origin.is_none_or(|origin| origin.len() >= dim));
        assert!(self.out.len() == self.rows.count());
        // SAFETY: everything is as long as the rows.
        unsafe {
            match (dim / lanes, self.origin.is_some()) {
                (2, false) => self.of_registers::<S, 2, false>(simd),
                (4, false) => self.of_registers::<S, 4, false>(simd),
                (8, false) => self.of_registers::<S, 8, false>(simd),
                (4, true) => self.of_registers::<S, 4, true>(simd),
                (8, true) => self.of_registers::<S, 8, true>(simd),
                (_, false) => self.of_registers::<S, 0, false>(simd),
                (_, true) => self.of_registers::<S, 0, true>(simd),
            }
        }
    }
}

impl<R: Rows, C: Real> RowDots<'_, R, C> {
    /// Rows of `N` registers and less than one more, or of any length where it is 0.
    ///
    /// # Safety
    /// `d` and `origin` must be as long as the rows.
    #[inline(always)]
    unsafe fn of_registers<S: Simd, const N: usize, const LESS: bool>(self, simd: S) {
        let Self { rows, d, origin, out } = self;
        let (dim, count, lanes) = (rows.width(), rows.count(), C::lanes::<S>());
        let whole = dim - dim % lanes;
        let tail = last_register::<C>(&d[..dim], lanes);
        let origin = if LESS { origin.expect("what rows are less by") } else { d };
        // SAFETY: `N` registers are no more than a row.
        let (ordered, ordered_origin) = unsafe {
            let d = in_order::<R::Item, C, S, N>(simd, d.as_ptr());
            (d, if LESS { in_order::<R::Item, C, S, N>(simd, origin.as_ptr()) } else { d })
        };
        for first in (0..count).step_by(4) {
            let mut sums = [C::splat(simd, C::ZERO); 4];
            // SAFETY: registers at multiples of their length within rows, `d` and `origin`, or at the end of rows longer than
            // one; `tail` is as long.
            unsafe {
                let starts: [_; 4] = starts(&rows, first, count);
                for start in starts {
                    // (Of a number of lines that the compiler knows.)
                    ask(start, if N > 0 { N * lanes } else { dim }, AHEAD);
                }
                for (sum, start) in sums.iter_mut().zip(starts) {
                    let row = registers::<R::Item, C, S, N>(simd, start);
                    let row = less::<C, S, N, LESS>(simd, row, &ordered_origin);
                    for (d, x) in ordered.iter().zip(row) {
                        *sum = C::fma(simd, *d, x, *sum);
                    }
                }
                for at in (N * lanes..whole).step_by(lanes) {
                    let d = C::load::<S>(d.as_ptr().add(at));
                    add_products::<R::Item, C, S, LESS>(simd, d, starts, origin, at, &mut sums);
                }
                if whole > 0 && whole < dim {
                    // The last register of the row, with zeros for what was there before.
                    let d = C::load::<S>(tail.as_ptr());
                    add_products::<R::Item, C, S, LESS>(simd, d, starts, origin, dim - lanes, &mut sums);
                }
            }
            let mut sums = C::reduce_four(simd, sums);
            if whole == 0 {
                for (g, sum) in sums.iter_mut().enumerate() {
                    let row = rows.row((first + g).min(count - 1));
                    for at in 0..dim {
                        let x = row[at].to_real::<C>();
                        *sum += d[at] * if LESS { x - origin[at] } else { x };
                    }
                }
            }
            out[first..].iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
        }
    }
}

/// Adds the products of a register of `d` with those from `at` on of some rows less `origin`.
///
/// # Safety
/// Rows, and `origin` if they are less by it, must have a register's numbers from `at` on.
#[inline(always)]
unsafe fn add_products<T: Element, C: Real, S: Simd, const LESS: bool>(
    simd: S,
    d: C::V<S>,
    rows: [*const T; 4],
    origin: &[C],
    at: usize,
    sums: &mut [C::V<S>; 4],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let origin = if LESS { C::load::<S>(origin.as_ptr().add(at)) } else { d };
        for (sum, row) in sums.iter_mut().zip(rows) {
            let x = T::register::<S, C>(simd, row.add(at));
            *sum = C::fma(simd, d, if LESS { C::v_sub(simd, x, origin) } else { x }, *sum);
        }
    }
}

/// What a step of conjugate gradients needs of some rows, all less `origin`: `t_j = d · rows_j − shift`, and `out += Σ_j w_j t_j rows_j`, where
/// rows with a weight of 0 count for nothing. Returns `Σ_j w_j t_j`.
pub struct RowStep<'a, R, C> {
    pub rows: R,
    pub origin: Option<&'a [C]>,
    pub d: &'a [C],
    /// At least [`FEW`] numbers, whatever the rows are; so for `t`.
    pub w: &'a [C],
    pub shift: C,
    pub t: &'a mut [C],
    pub out: &'a mut [C],
}

impl<R: Rows, C: Real> WithSimd for RowStep<'_, R, C> {
    type Output = C;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> C {
        let (dim, count, lanes) = (self.rows.width(), self.rows.count(), C::lanes::<S>());
        assert!(count <= FEW && self.w.len() >= FEW && self.t.len() >= FEW);
        assert!(self.d.len() >= dim && self.out.len() >= dim);
        assert!(self.origin.is_none_or(|origin| origin.len() >= dim));
        // With 32 registers, rows of the usual lengths are read once.
        if S::REGISTER_COUNT >= 32 && dim.is_multiple_of(lanes) {
            // SAFETY: everything is as long as the rows, and these as long as is said.
            unsafe {
                match (dim / lanes, self.origin.is_some()) {
                    (2, false) => return self.held::<S, 2, 4, false>(simd),
                    (3, false) => return self.held::<S, 3, 4, false>(simd),
                    (4, false) => return self.held::<S, 4, 4, false>(simd),
                    (5, false) => return self.held::<S, 5, 2, false>(simd),
                    (6, false) => return self.held::<S, 6, 2, false>(simd),
                    (8, false) => return self.held::<S, 8, 2, false>(simd),
                    (4, true) => return self.held::<S, 4, 4, true>(simd),
                    (8, true) => return self.held::<S, 8, 2, true>(simd),
                    _ => (),
                }
            }
        }
        let Self { rows, origin, d, w, shift, t, out } = self;
        RowDots { rows, d, origin, out: &mut t[..count] }.with_simd(simd);
        t[..count].iter_mut().for_each(|t| *t -= shift);
        let mut weighted = [C::ZERO; FEW];
        weighted[..count].copy_from_slice(&t[..count]);
        let sum = Weigh { t: &mut weighted, w, shift: C::ZERO, sign: C::ONE, one: C::ZERO }.with_simd(simd);
        RowSums { rows, fresh: false, origin, sums: [Sum { weights: &weighted[..count], out }] }
            .with_simd(simd);
        sum
    }
}

impl<R: Rows, C: Real> RowStep<'_, R, C> {
    /// Rows of `N` registers, `G` of them at a time, which stay in registers from the product to the sum.
    ///
    /// # Safety
    /// Rows, `origin`, `d` and `out` must have so many numbers, and `w` one for each row.
    #[inline(always)]
    unsafe fn held<S: Simd, const N: usize, const G: usize, const LESS: bool>(self, simd: S) -> C {
        let Self { rows, origin, d, w, shift, t, out } = self;
        let count = rows.count();
        let zero = C::splat(simd, C::ZERO);
        let mut total = C::ZERO;
        // SAFETY: the caller's promise.
        unsafe {
            let d = in_order::<R::Item, C, S, N>(simd, d.as_ptr());
            let origin = if LESS {
                in_order::<R::Item, C, S, N>(simd, origin.expect("what rows are less by").as_ptr())
            } else {
                d
            };
            let mut parts = [zero; N];
            let mut first = 0;
            while first + G <= count {
                let mut some = [C::ZERO; G];
                some.copy_from_slice(&w[first..first + G]);
                let starts = starts::<R, G>(&rows, first, first + G);
                let (products, sum) = held_rows::<R::Item, C, S, N, G, LESS>(
                    simd, starts, &origin, &d, shift, some, &mut parts,
                );
                t[first..first + G].copy_from_slice(&products);
                total += sum;
                first += G;
            }
            if first < count {
                // Rows that are not there are the last one, with a weight of 0.
                let mut some = [C::ZERO; G];
                some[..count - first].copy_from_slice(&w[first..count]);
                let starts = starts::<R, G>(&rows, first, count);
                let (products, sum) = held_rows::<R::Item, C, S, N, G, LESS>(
                    simd, starts, &origin, &d, shift, some, &mut parts,
                );
                t[first..count].copy_from_slice(&products[..count - first]);
                total += sum;
            }
            add_to::<R::Item, C, S, N>(simd, parts, out.as_mut_ptr());
        }
        total
    }
}

/// What [`RowStep`] does with `G` rows of `N` registers: the products less `shift`, and the sum of those times their weights; the rows times that are added to
/// `parts`.
///
/// # Safety
/// Rows must have so many numbers.
#[inline(always)]
unsafe fn held_rows<T: Element, C: Real, S: Simd, const N: usize, const G: usize, const LESS: bool>(
    simd: S,
    starts: [*const T; G],
    origin: &[C::V<S>; N],
    d: &[C::V<S>; N],
    shift: C,
    w: [C; G],
    parts: &mut [C::V<S>; N],
) -> ([C; G], C) {
    let zero = C::splat(simd, C::ZERO);
    let mut held = [[zero; N]; G];
    for (held, start) in held.iter_mut().zip(starts) {
        ask(start, N * C::lanes::<S>(), AHEAD);
        // SAFETY: the caller's promise.
        let row = unsafe { registers::<T, C, S, N>(simd, start) };
        *held = less::<C, S, N, LESS>(simd, row, origin);
    }
    // Two rows have two sums each, so that additions wait for fewer of them.
    let each = 4 / G;
    let mut sums = [zero; 4];
    for (g, row) in held.iter().enumerate() {
        for (i, (&d, &x)) in d.iter().zip(row).enumerate() {
            let sum = &mut sums[g * each + i % each];
            *sum = C::fma(simd, d, x, *sum);
        }
    }
    let sums = C::reduce_four(simd, sums);
    let (mut products, mut weighted) = ([C::ZERO; G], [C::ZERO; G]);
    for g in 0..G {
        products[g] = if G == 2 { sums[2 * g] + sums[2 * g + 1] } else { sums[g] } - shift;
        let product = w[g] * products[g];
        weighted[g] = if w[g] > C::ZERO { product } else { C::ZERO };
    }
    for (row, &weighted) in held.iter().zip(&weighted) {
        let weighted = C::splat(simd, weighted);
        for (part, &x) in parts.iter_mut().zip(row) {
            *part = C::fma(simd, weighted, x, *part);
        }
    }
    let mut sum = C::ZERO;
    for x in weighted {
        sum += x;
    }
    (products, sum)
}

/// What lies beyond the last whole register of a row, in the place where it ends the row's last register; zeros before.
#[inline(always)]
fn last_register<C: Real>(row: &[C], lanes: usize) -> [C; MOST_LANES] {
    let mut last = [C::ZERO; MOST_LANES];
    let rest = row.len() % lanes;
    last[lanes - rest..lanes].copy_from_slice(&row[row.len() - rest..]);
    last
}

/// `out += Σ_j weights_j row_j`
pub struct Sum<'a, C> {
    pub weights: &'a [C],
    pub out: &'a mut [C],
}

impl<C> Sum<'_, C> {
    /// That of some rows.
    #[inline(always)]
    pub fn part(&mut self, rows: Range<usize>) -> Sum<'_, C> {
        Sum { weights: &self.weights[rows], out: self.out }
    }
}

/// Such sums over rows less `origin`.
pub struct RowSums<'a, R, C, const W: usize> {
    pub rows: R,
    /// Whether nobody has looked at the rows just before, and asked for those that follow soon.
    pub fresh: bool,
    pub origin: Option<&'a [C]>,
    pub sums: [Sum<'a, C>; W],
}

impl<R: Rows, C: Real, const W: usize> WithSimd for RowSums<'_, R, C, W> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let dim = self.rows.width();
        assert!(self.origin.is_none_or(|origin| origin.len() >= dim));
        assert!(self.sums.iter().all(|sum| sum.out.len() >= dim && sum.weights.len() == self.rows.count()));
        if self.origin.is_some() {
            self.add_up::<S, true>(simd);
        } else {
            self.add_up::<S, false>(simd);
        }
    }
}

impl<R: Rows, C: Real, const W: usize> RowSums<'_, R, C, W> {
    #[inline(always)]
    fn add_up<S: Simd, const LESS: bool>(self, simd: S) {
        let Self { rows, fresh, origin, mut sums } = self;
        let (dim, lanes) = (rows.width(), C::lanes::<S>());
        let origin = origin.unwrap_or_default();
        let mut at = 0;
        // SAFETY: as many registers as are added are below `dim`, which all of these have.
        unsafe {
            // Sums, the origin, two registers of a row and its weights have to fit.
            let most = if S::REGISTER_COUNT >= 32 || W == 1 { 8 } else { 4 };
            while most >= 8 && at + 8 * lanes <= dim {
                add_rows::<R, C, S, W, 8, LESS>(simd, &rows, fresh, origin, &mut sums, at);
                at += 8 * lanes;
            }
            while at + 4 * lanes <= dim {
                add_rows::<R, C, S, W, 4, LESS>(simd, &rows, fresh, origin, &mut sums, at);
                at += 4 * lanes;
            }
            while at + 2 * lanes <= dim {
                add_rows::<R, C, S, W, 2, LESS>(simd, &rows, fresh, origin, &mut sums, at);
                at += 2 * lanes;
            }
            while at + lanes <= dim {
                add_rows::<R, C, S, W, 1, LESS>(simd, &rows, fresh, origin, &mut sums, at);
                at += lanes;
            }
        }
        if at < dim && dim > lanes {
            // The last register of the rows, of which a part is added.
            let mut last = [[C::ZERO; MOST_LANES]; W];
            let origin = if LESS { &origin[dim - lanes..] } else { origin };
            let mut parts: [Sum<C>; W] = std::array::from_fn(|_| Sum { weights: &[], out: &mut [] });
            for ((part, sum), last) in parts.iter_mut().zip(&sums).zip(&mut last) {
                *part = Sum { weights: sum.weights, out: last };
            }
            let ends = Ends { rows, from: dim - lanes };
            // SAFETY: a register of the rows' ends, of `origin` and of sums.
            unsafe { add_rows::<Ends<R>, C, S, W, 1, LESS>(simd, &ends, false, origin, &mut parts, 0) };
            for (sum, last) in sums.iter_mut().zip(&last) {
                let parts = &last[lanes - (dim - at)..lanes];
                sum.out[at..dim].iter_mut().zip(parts).for_each(|(out, &x)| *out += x);
            }
            return;
        }
        for at in at..dim {
            for Sum { weights, out } in &mut sums {
                for (j, &weight) in weights.iter().enumerate() {
                    let x = rows.row(j)[at].to_real::<C>();
                    out[at] += weight * if LESS { x - origin[at] } else { x };
                }
            }
        }
    }
}

/// Rows from some column on.
#[derive(Clone, Copy)]
struct Ends<R> {
    rows: R,
    from: usize,
}

impl<R: Rows> Rows for Ends<R> {
    type Item = R::Item;
    #[inline(always)]
    fn count(&self) -> usize {
        self.rows.count()
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &[R::Item] {
        &self.rows.row(i)[self.from..]
    }
    #[inline(always)]
    unsafe fn start(&self, i: usize) -> *const R::Item {
        // SAFETY: the caller's promise; rows are longer than `from`.
        unsafe { self.rows.start(i).add(self.from) }
    }
}

/// [`RowSums`] for `N` registers of columns from `at` on.
///
/// # Safety
/// Rows, sums, and `origin` if rows are less by it, must have that many numbers, and every sum a weight for each row.
#[inline(always)]
unsafe fn add_rows<R: Rows, C: Real, S: Simd, const W: usize, const N: usize, const LESS: bool>(
    simd: S,
    rows: &R,
    fresh: bool,
    origin: &[C],
    sums: &mut [Sum<C>; W],
    at: usize,
) {
    let zero = C::splat(simd, C::ZERO);
    let mut parts = [[zero; N]; W];
    // SAFETY: the caller's promise.
    unsafe {
        let origin =
            if LESS { in_order::<R::Item, C, S, N>(simd, origin.as_ptr().add(at)) } else { [zero; N] };
        for j in 0..rows.count() {
            let row = rows.start(j).add(at);
            ask(row, N * C::lanes::<S>(), if fresh { AHEAD } else { FAR_AHEAD });
            let row = registers::<R::Item, C, S, N>(simd, row);
            let row = less::<C, S, N, LESS>(simd, row, &origin);
            for (parts, sum) in parts.iter_mut().zip(&*sums) {
                let weight = C::splat(simd, *sum.weights.get_unchecked(j));
                for (part, &x) in parts.iter_mut().zip(&row) {
                    *part = C::fma(simd, weight, x, *part);
                }
            }
        }
        for (sum, parts) in sums.iter_mut().zip(parts) {
            add_to::<R::Item, C, S, N>(simd, parts, sum.out.as_mut_ptr().add(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn close<C: Real>(what: &str, got: &[C], want: &[f64]) {
        // The largest of the sums below is some thousands, of numbers that all but f64 holds in f32.
        let tolerance = if size_of::<C>() == 8 { 1e-11 } else { 3e-3 };
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got.as_f64() - want).abs() <= tolerance, "{what}, {i}: {got:?} instead of {want}");
        }
    }

    fn all_sizes<T: Element, C: Real>() {
        sizes_of::<T, C>(false);
        sizes_of::<T, C>(true);
    }

    fn sizes_of<T: Element, C: Real>(less: bool) {
        let value = |i: usize| ((i * 7919) % 101) as f64 / 16.0 - 3.0;
        for arch in crate::cpu::tests::architectures() {
            for dim in (1..=36).chain([40, 47, 48, 64, 72, 80, 96, 100, 112, 127, 128, 130, 256]) {
                for count in [1, 2, 3, 4, 7, 16, FEW] {
                    let what = format!("{} in {}, {arch:?}, {dim}, {count}, {less}", T::NAME, size_of::<C>());
                    let numbers: Vec<T> =
                        (0..dim * count).map(|i| T::from_real(C::of_f64(value(i)))).collect();
                    let rows: Vec<&[T]> = numbers.chunks(dim).collect();
                    let list = |from: usize, len: usize| -> Vec<C> {
                        (from..from + len).map(|i| C::of_f64(value(i) / 4.0)).collect()
                    };
                    let (d, origin) = (list(5, dim), list(9, dim));
                    let mut w = list(11, FEW);
                    w.iter_mut().step_by(3).for_each(|w| *w = C::ZERO);
                    w.iter_mut().for_each(|w| *w = if *w < C::ZERO { -*w } else { *w });
                    let shift = C::of_f64(0.5);

                    let origin = less.then_some(&origin[..]);
                    let of = |j: usize, i: usize| {
                        rows[j][i].to_real::<C>().as_f64() - origin.map_or(0.0, |origin| origin[i].as_f64())
                    };
                    let products: Vec<f64> =
                        (0..count).map(|j| (0..dim).map(|i| d[i].as_f64() * of(j, i)).sum()).collect();
                    let sums = |weights: &[f64], begin: f64| -> Vec<f64> {
                        (0..dim)
                            .map(|i| {
                                begin + weights.iter().enumerate().map(|(j, w)| w * of(j, i)).sum::<f64>()
                            })
                            .collect()
                    };
                    let plain: Vec<f64> = w[..count].iter().map(|w| w.as_f64()).collect();
                    let weighted: Vec<f64> =
                        plain.iter().zip(&products).map(|(w, t)| w * (t - 0.5)).collect();

                    let mut out = vec![C::ONE; count];
                    let dots = RowDots { rows: &rows[..], d: &d, origin, out: &mut out };
                    arch.dispatch(dots);
                    close(&what, &out, &products);

                    let [mut one, mut other] = [vec![C::ONE; dim], vec![C::ZERO; dim]];
                    let [first, second] = [&mut one, &mut other].map(|out| Sum { weights: &w[..count], out });
                    let (rows, fresh) = (&rows[..], true);
                    arch.dispatch(RowSums { rows, fresh, origin, sums: [first, second] });
                    close(&what, &one, &sums(&plain, 1.0));
                    close(&what, &other, &sums(&plain, 0.0));

                    let (mut t, mut out) = (vec![C::ZERO; FEW], vec![C::ZERO; dim]);
                    let step = RowStep { rows, origin, d: &d, w: &w, shift, t: &mut t, out: &mut out };
                    let sum = arch.dispatch(step);
                    close(&what, &t[..count], &products.iter().map(|t| t - 0.5).collect::<Vec<_>>());
                    let scale = C::of_f64(1e-2); // these are products of three numbers
                    out.iter_mut().for_each(|x| *x *= scale);
                    close(&what, &out, &sums(&weighted, 0.0).iter().map(|x| 1e-2 * x).collect::<Vec<_>>());
                    close(&what, &[sum], &[weighted.iter().sum()]);
                }
            }
        }
    }

    #[test]
    fn rows_of_all_lengths_on_every_instruction_set() {
        all_sizes::<bf16, f32>();
        all_sizes::<f16, f32>();
        all_sizes::<f32, f32>();
        all_sizes::<f32, f64>();
        all_sizes::<bf16, f64>();
        all_sizes::<f64, f64>();
    }
}
