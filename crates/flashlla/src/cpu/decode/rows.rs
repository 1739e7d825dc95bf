//! Products of one query row with keys and values where they lie: they become the type of arithmetic in registers, and are put down nowhere.

use super::kernels::prefetch;
use crate::cpu::widen::Widen;
use crate::view::Run;
use crate::{Element, Real};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// How many bytes ahead of where it reads a pass asks for memory: tokens mostly follow each other.
const AHEAD: usize = 4096;

/// Tokens that are looked at together: few, so that memory and arithmetic take turns quickly. Sums are put together by these, wherever pages end.
pub const FEW: usize = 16;

/// Up to [`FEW`] tokens at a time, with their places among all.
pub fn by_few(tokens: Range<usize>) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let first = tokens.start;
    tokens.clone().step_by(FEW).map(move |at| (at - first..at - first + FEW, at..tokens.end.min(at + FEW)))
}

/// Some rows of the same length.
pub trait Rows {
    type Item: Element;
    fn count(&self) -> usize;
    fn row(&self, i: usize) -> &[Self::Item];

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
}

/// Asks for what follows some way behind a row.
#[inline(always)]
fn ask<T>(row: &[T]) {
    row.chunks(64 / size_of::<T>()).for_each(|line| prefetch(line.as_ptr().wrapping_byte_add(AHEAD)));
}

/// `out_j = d · (rows_j − origin)`
pub struct RowDots<'a, R, C> {
    pub rows: R,
    pub d: &'a [C],
    pub origin: &'a [C],
    pub out: &'a mut [C],
}

impl<R: Rows, C: Real> WithSimd for RowDots<'_, R, C> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, d, origin, out } = self;
        let (dim, count) = (rows.width(), rows.count());
        let whole = dim - dim % C::lanes::<S>();
        assert!(d.len() >= dim && origin.len() >= dim && out.len() == count);
        for first in (0..count).step_by(4) {
            let rows = [0, 1, 2, 3].map(|i| rows.row((first + i).min(count - 1)));
            rows.iter().for_each(|row| ask(row));
            let mut sums = [C::splat(simd, C::ZERO); 4];
            for at in (0..whole).step_by(C::lanes::<S>()) {
                // SAFETY: registers at multiples of their length below `whole`, which all of these have.
                unsafe {
                    let (d, origin) =
                        (C::load::<S>(d.as_ptr().add(at)), C::load::<S>(origin.as_ptr().add(at)));
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        let x = C::v_sub(simd, R::Item::register::<S, C>(simd, row.as_ptr().add(at)), origin);
                        *sum = C::fma(simd, d, x, *sum);
                    }
                }
            }
            let mut sums = C::reduce_four(simd, sums);
            for (sum, row) in sums.iter_mut().zip(rows) {
                for at in whole..dim {
                    *sum += d[at] * (row[at].to_real::<C>() - origin[at]);
                }
            }
            out[first..].iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
        }
    }
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
    pub origin: &'a [C],
    pub sums: [Sum<'a, C>; W],
}

impl<R: Rows, C: Real, const W: usize> WithSimd for RowSums<'_, R, C, W> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, origin, mut sums } = self;
        let (dim, lanes) = (rows.width(), C::lanes::<S>());
        assert!(origin.len() >= dim);
        assert!(sums.iter().all(|sum| sum.out.len() >= dim && sum.weights.len() == rows.count()));
        (0..rows.count()).for_each(|j| ask(rows.row(j)));
        let mut at = 0;
        // SAFETY: as many registers as are added are below `dim`, which all of these have.
        unsafe {
            while at + 4 * lanes <= dim {
                add_rows::<R, C, S, W, 4>(simd, &rows, origin, &mut sums, at);
                at += 4 * lanes;
            }
            while at + lanes <= dim {
                add_rows::<R, C, S, W, 1>(simd, &rows, origin, &mut sums, at);
                at += lanes;
            }
        }
        for at in at..dim {
            for Sum { weights, out } in &mut sums {
                for (j, &weight) in weights.iter().enumerate() {
                    out[at] += weight * (rows.row(j)[at].to_real::<C>() - origin[at]);
                }
            }
        }
    }
}

/// [`RowSums`] for `N` registers of columns from `at` on, each in two parts, so that additions need not wait for each other.
///
/// # Safety
/// Rows, `origin` and sums must have that many numbers, and every sum a weight for each row.
#[inline(always)]
unsafe fn add_rows<R: Rows, C: Real, S: Simd, const W: usize, const N: usize>(
    simd: S,
    rows: &R,
    origin: &[C],
    sums: &mut [Sum<C>; W],
    at: usize,
) {
    let place = |i: usize| at + i * C::lanes::<S>();
    // SAFETY: the caller's promise.
    unsafe {
        let origin: [C::V<S>; N] = std::array::from_fn(|i| C::load::<S>(origin.as_ptr().add(place(i))));
        let mut parts = [[[C::splat(simd, C::ZERO); N]; W]; 2];
        for first in (0..rows.count()).step_by(2) {
            for (j, part) in (first..rows.count()).zip(&mut parts) {
                let row = rows.row(j);
                let weights: [C::V<S>; W] =
                    std::array::from_fn(|w| C::splat(simd, *sums[w].weights.get_unchecked(j)));
                for i in 0..N {
                    let x = C::v_sub(
                        simd,
                        R::Item::register::<S, C>(simd, row.as_ptr().add(place(i))),
                        origin[i],
                    );
                    for w in 0..W {
                        part[w][i] = C::fma(simd, weights[w], x, part[w][i]);
                    }
                }
            }
        }
        let [even, odd] = parts;
        for ((sum, even), odd) in sums.iter_mut().zip(even).zip(odd) {
            for (i, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                let to = sum.out.as_mut_ptr().add(place(i));
                let part = C::v_add(simd, even, odd);
                C::store::<S>(to, C::v_add(simd, C::load::<S>(to), part));
            }
        }
    }
}
