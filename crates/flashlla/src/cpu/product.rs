//! Products of small dense tiles, with something done to every result while it is still in registers.
//!
//! A micro-kernel keeps 6 rows times a few registers of columns in registers and walks the inner dimension once. There is no
//! packing here: keys and values are laid out once per call (`pack.rs`) so that each tile's right-hand side is already a
//! panel that fits the first-level cache, which a general matrix product could not assume.

use super::simd::SimdReal;
use pulp::{Simd, WithSimd};

/// Rows of a micro-kernel: 6 rows of 4 registers leave 8 of 32 for the right-hand side and a broadcast.
const ROWS: usize = 6;

/// What happens to a product `t` at `(row, col..)` before it is stored.
pub trait Finish<T: SimdReal>: Copy {
    /// # Safety
    /// `row` and `col..col + N registers` lie inside the product; the implementation's pointers cover that much.
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        simd: S,
        row: usize,
        col: usize,
        t: [T::V<S>; N],
    ) -> [T::V<S>; N];
}

/// Stores the product as it is.
#[derive(Clone, Copy)]
pub struct Plain;
impl<T: SimdReal> Finish<T> for Plain {
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        _: S,
        _: usize,
        _: usize,
        t: [T::V<S>; N],
    ) -> [T::V<S>; N] {
        t
    }
}

/// Adds the product to what is there.
#[derive(Clone, Copy)]
pub struct AddTo<T>(*const T, usize);
impl<T: SimdReal> Finish<T> for AddTo<T> {
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        simd: S,
        row: usize,
        col: usize,
        mut t: [T::V<S>; N],
    ) -> [T::V<S>; N] {
        for (i, t) in t.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let old = unsafe { T::load::<S>(self.0.add(row * self.1 + col + i * T::lanes::<S>())) };
            *t = T::v_add(simd, old, *t);
        }
        t
    }
}

/// The left operand: element `(i, p)` is `data[i · row + p · col]`.
#[derive(Clone, Copy)]
pub struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

/// The right operand: element `(p, j)` is `data[p · row + j]`.
#[derive(Clone, Copy)]
pub struct Right<'a, T> {
    pub data: &'a [T],
    pub row: usize,
}

struct Product<'a, T, F> {
    size: [usize; 3],
    a: Left<'a, T>,
    b: Right<'a, T>,
    c: *mut T,
    c_row: usize,
    finish: F,
}

/// `c = finish(a · b)` for sizes `[m, n, k]`, `n` a multiple of [`super::LANES`]; row `i` of `c` starts at `i · c_row`.
pub fn product<T: SimdReal, F: Finish<T>>(
    arch: pulp::Arch,
    size: [usize; 3],
    a: Left<T>,
    b: Right<T>,
    c: &mut [T],
    c_row: usize,
    finish: F,
) {
    let [m, n, k] = size;
    if m == 0 || n == 0 {
        return;
    }
    assert!(n.is_multiple_of(super::LANES) && n <= c_row && c.len() >= (m - 1) * c_row + n, "c of a product");
    if k > 0 {
        assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "a of a product");
        assert!(b.data.len() >= (k - 1) * b.row + n, "b of a product");
    }
    arch.dispatch(Product { size, a, b, c: c.as_mut_ptr(), c_row, finish });
}

/// `c += a · b`
pub fn add_product<T: SimdReal>(
    arch: pulp::Arch,
    size: [usize; 3],
    a: Left<T>,
    b: Right<T>,
    c: &mut [T],
    c_row: usize,
) {
    let add = AddTo(c.as_ptr(), c_row);
    product(arch, size, a, b, c, c_row, add);
}

impl<T: SimdReal, F: Finish<T>> WithSimd for Product<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // With 16 registers, 6 × 2 accumulators.
        if S::REGISTER_COUNT >= 32 { self.panels::<S, 4>(simd) } else { self.panels::<S, 2>(simd) }
    }
}

impl<T: SimdReal, F: Finish<T>> Product<'_, T, F> {
    #[inline(always)]
    fn panels<S: Simd, const N: usize>(&self, simd: S) {
        let width = T::lanes::<S>();
        let mut col = 0;
        // Few shapes of micro-kernel: each is compiled for every finish, type and instruction set.
        while col + N * width <= self.size[1] {
            self.rows::<S, N>(simd, col);
            col += N * width;
        }
        while N > 2 && col + 2 * width <= self.size[1] {
            self.rows::<S, 2>(simd, col);
            col += 2 * width;
        }
        while col < self.size[1] {
            self.rows::<S, 1>(simd, col);
            col += width;
        }
    }

    #[inline(always)]
    fn rows<S: Simd, const N: usize>(&self, simd: S, col: usize) {
        let m = self.size[0];
        let mut row = 0;
        // SAFETY: `product` checked that all rows and columns of the sizes lie inside the operands.
        unsafe {
            while row + ROWS <= m {
                self.kernel::<S, ROWS, N>(simd, row, col);
                row += ROWS;
            }
            while row + 2 <= m {
                self.kernel::<S, 2, N>(simd, row, col);
                row += 2;
            }
            if row < m {
                self.kernel::<S, 1, N>(simd, row, col);
            }
        }
    }

    /// # Safety
    /// Rows `row..row + M` and `N` registers from column `col` on lie inside the product.
    #[inline(always)]
    unsafe fn kernel<S: Simd, const M: usize, const N: usize>(&self, simd: S, row: usize, col: usize) {
        let lanes = T::lanes::<S>();
        let mut acc = [[T::splat(simd, zero::<T>()); N]; M];
        // SAFETY: the caller's promise; every address below is inside an operand.
        unsafe {
            let mut a = self.a.data.as_ptr().add(row * self.a.row);
            let mut b = self.b.data.as_ptr().add(col);
            for _ in 0..self.size[2] {
                let mut right = [T::splat(simd, zero::<T>()); N];
                for (j, right) in right.iter_mut().enumerate() {
                    *right = T::load::<S>(b.add(j * lanes));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let left = T::splat(simd, *a.add(i * self.a.row));
                    for (acc, right) in acc.iter_mut().zip(right) {
                        *acc = T::fma(simd, left, right, *acc);
                    }
                }
                a = a.wrapping_add(self.a.col);
                b = b.wrapping_add(self.b.row);
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let done = self.finish.finish::<S, N>(simd, row + i, col, acc);
                for (j, done) in done.into_iter().enumerate() {
                    T::store::<S>(self.c.add((row + i) * self.c_row + col + j * lanes), done);
                }
            }
        }
    }
}

#[inline(always)]
fn zero<T: SimdReal>() -> T {
    // SAFETY: both types of arithmetic are plain numbers, for which all bits 0 is the value 0.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_all_small_sizes_on_every_instruction_set() {
        let value = |i: usize| ((i * 7919) % 101) as f64 / 101.0 - 0.5;
        for arch in crate::cpu::tests::architectures() {
            for m in 1..=13 {
                for n in [16, 32, 48, 64, 80, 128] {
                    for k in [0, 1, 5, 64] {
                        let a: Vec<f64> = (0..m * k).map(value).collect();
                        let b: Vec<f64> = (0..k * n).map(|i| value(i + 3)).collect();
                        let mut c = vec![1.0; m * n];
                        // The left operand lies transposed, to try both strides.
                        let left = Left { data: &a, row: 1, col: m };
                        add_product(arch, [m, n, k], left, Right { data: &b, row: n }, &mut c, n);
                        for i in 0..m {
                            for j in 0..n {
                                let expected: f64 =
                                    1.0 + (0..k).map(|p| a[p * m + i] * b[p * n + j]).sum::<f64>();
                                assert!((c[i * n + j] - expected).abs() < 1e-12, "{arch:?} {m} {n} {k}");
                            }
                        }
                    }
                }
            }
        }
    }
}
