//! What happens to rows of tiles between the products: masks, maxima, exponentials, and the vector steps of the solver.

use super::TILE;
use super::simd::SimdReal;
use crate::Real;
use pulp::{Simd, WithSimd};

/// The registers of one row of a tile, by address.
#[inline(always)]
fn columns<T: SimdReal, S: Simd>() -> impl Iterator<Item = usize> {
    (0..TILE).step_by(T::lanes::<S>())
}

/// The largest score of a row of a tile.
pub struct RowMax<'a, T>(pub &'a [T]);
impl<T: SimdReal> WithSimd for RowMax<'_, T> {
    type Output = T;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T {
        assert!(self.0.len() >= TILE);
        // SAFETY: a row of a tile has TILE columns, as just checked.
        unsafe {
            let mut max = T::load::<S>(self.0.as_ptr());
            for j in columns::<T, S>().skip(1) {
                max = T::v_max(simd, T::load::<S>(self.0.as_ptr().add(j)), max);
            }
            T::reduce_max(simd, max)
        }
    }
}

/// Replaces every score of a row of a tile by `exp(score − max)` and returns their sum.
pub struct RowExp<'a, T>(pub &'a mut [T], pub T);
impl<T: SimdReal> WithSimd for RowExp<'_, T> {
    type Output = T;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T {
        let Self(row, max) = self;
        assert!(row.len() >= TILE);
        let max = T::splat(simd, max);
        let p = row.as_mut_ptr();
        // SAFETY: a row of a tile has TILE columns, as just checked.
        unsafe {
            let mut sum = None;
            for j in columns::<T, S>() {
                let e = T::exp(simd, T::v_sub(simd, T::load::<S>(p.add(j)), max));
                T::store::<S>(p.add(j), e);
                sum = Some(sum.map_or(e, |sum| T::v_add(simd, sum, e)));
            }
            T::reduce_sum(simd, sum.expect("TILE > 0"))
        }
    }
}

/// `Σ a_i b_i`
pub struct Dot<'a, T>(pub &'a [T], pub &'a [T]);
impl<T: Real> WithSimd for Dot<'_, T> {
    type Output = T;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T {
        let Self(a, b) = self;
        assert!(a.len() == b.len());
        let lanes = T::lanes::<S>();
        let whole = a.len() - a.len() % lanes;
        let mut sum = T::splat(simd, T::ZERO);
        // SAFETY: every register read starts at a multiple of its length below `whole`.
        unsafe {
            for i in (0..whole).step_by(lanes) {
                sum = T::fma(simd, T::load::<S>(a.as_ptr().add(i)), T::load::<S>(b.as_ptr().add(i)), sum);
            }
        }
        let rest: T = a[whole..].iter().zip(&b[whole..]).map(|(&a, &b)| a * b).sum();
        T::reduce_sum(simd, sum) + rest
    }
}

/// `y = factor · x + scale · y`, in place.
pub struct Combine<'a, T> {
    pub y: &'a mut [T],
    pub scale: T,
    pub factor: T,
    pub x: &'a [T],
}
impl<T: Real> WithSimd for Combine<'_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { y, scale, factor, x } = self;
        assert!(x.len() == y.len());
        let lanes = T::lanes::<S>();
        let whole = y.len() - y.len() % lanes;
        let (scales, factors) = (T::splat(simd, scale), T::splat(simd, factor));
        // SAFETY: every register read or written starts at a multiple of its length below `whole`.
        unsafe {
            for i in (0..whole).step_by(lanes) {
                let scaled = T::v_mul(simd, scales, T::load::<S>(y.as_ptr().add(i)));
                let sum = T::fma(simd, factors, T::load::<S>(x.as_ptr().add(i)), scaled);
                T::store::<S>(y.as_mut_ptr().add(i), sum);
            }
        }
        for (y, &x) in y[whole..].iter_mut().zip(&x[whole..]) {
            *y = factor * x + scale * *y;
        }
    }
}
