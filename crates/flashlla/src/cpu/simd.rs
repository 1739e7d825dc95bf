//! Vectors of `f32` or `f64`, one set of operations over every instruction set that `pulp` finds at run time.
//!
//! `pulp` names its operations per element type; this trait makes them generic, so that every kernel is written once.

use pulp::Simd;

/// The most numbers that a register has, on any instruction set.
pub const MOST_LANES: usize = 16;

/// A type of arithmetic with vectors of it. Sealed; an implementation detail of [`crate::Real`].
#[doc(hidden)]
pub trait SimdReal: Copy + Send + Sync + 'static {
    /// A register full of values.
    type V<S: Simd>: Copy;

    /// Values in a register.
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::V<S>>() / size_of::<Self>()
    }
    fn splat<S: Simd>(simd: S, x: Self) -> Self::V<S>;
    /// `a · b + c`
    fn fma<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    fn v_add<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    fn v_sub<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    fn v_mul<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    fn v_max<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// `if weight > 0 { x } else { 0 }`, also where `x` is not finite.
    fn where_positive<S: Simd>(simd: S, weight: Self::V<S>, x: Self::V<S>) -> Self::V<S>;
    /// The exponential function for arguments up to about 0, within 2 units in the last place; 0 below the normal range.
    fn exp<S: Simd>(simd: S, x: Self::V<S>) -> Self::V<S>;
    fn reduce_sum<S: Simd>(simd: S, x: Self::V<S>) -> Self;
    fn reduce_max<S: Simd>(simd: S, x: Self::V<S>) -> Self;

    /// The sums of four registers.
    #[inline(always)]
    fn reduce_four<S: Simd>(simd: S, x: [Self::V<S>; 4]) -> [Self; 4] {
        x.map(|x| Self::reduce_sum(simd, x))
    }

    /// # Safety
    /// `lanes` values from `p` on must be readable.
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> Self::V<S> {
        // SAFETY: the caller's promise; a register is plain values.
        unsafe { p.cast::<Self::V<S>>().read_unaligned() }
    }
    /// # Safety
    /// `lanes` values from `p` on must be writable.
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, x: Self::V<S>) {
        // SAFETY: the caller's promise; a register is plain values.
        unsafe { p.cast::<Self::V<S>>().write_unaligned(x) }
    }
}

macro_rules! forward {
    ($t:ident, $v:ident, [$splat:ident, $fma:ident, $add:ident, $sub:ident, $mul:ident, $max:ident,
      $gt:ident, $select:ident, $sum:ident, $rmax:ident]) => {
        type V<S: Simd> = S::$v;
        #[inline(always)]
        fn splat<S: Simd>(simd: S, x: Self) -> S::$v {
            simd.$splat(x)
        }
        #[inline(always)]
        fn fma<S: Simd>(simd: S, a: S::$v, b: S::$v, c: S::$v) -> S::$v {
            simd.$fma(a, b, c)
        }
        #[inline(always)]
        fn v_add<S: Simd>(simd: S, a: S::$v, b: S::$v) -> S::$v {
            simd.$add(a, b)
        }
        #[inline(always)]
        fn v_sub<S: Simd>(simd: S, a: S::$v, b: S::$v) -> S::$v {
            simd.$sub(a, b)
        }
        #[inline(always)]
        fn v_mul<S: Simd>(simd: S, a: S::$v, b: S::$v) -> S::$v {
            simd.$mul(a, b)
        }
        #[inline(always)]
        fn v_max<S: Simd>(simd: S, a: S::$v, b: S::$v) -> S::$v {
            simd.$max(a, b)
        }
        #[inline(always)]
        fn where_positive<S: Simd>(simd: S, weight: S::$v, x: S::$v) -> S::$v {
            let zero = simd.$splat(0.0);
            simd.$select(simd.$gt(weight, zero), x, zero)
        }
        #[inline(always)]
        fn reduce_sum<S: Simd>(simd: S, x: S::$v) -> Self {
            simd.$sum(x)
        }
        #[inline(always)]
        fn reduce_max<S: Simd>(simd: S, x: S::$v) -> Self {
            simd.$rmax(x)
        }
    };
}

/// `Σ x^i / i!`, highest power first.
#[inline(always)]
fn taylor<T: SimdReal, S: Simd, const N: usize>(simd: S, x: T::V<S>, inverse_factorials: [T; N]) -> T::V<S> {
    let mut sum = T::splat(simd, inverse_factorials[N - 1]);
    for &c in inverse_factorials[..N - 1].iter().rev() {
        sum = T::fma(simd, sum, x, T::splat(simd, c));
    }
    sum
}

// Both exponentials: x = n ln 2 + r with n an integer and |r| ≤ ln 2 / 2; a Taylor polynomial in r (its remainder is below
// half a unit in the last place), times 2^n by adding n to the exponent bits. Adding `MAGIC` rounds to an integer and leaves
// it in the low bits of the sum.
impl SimdReal for f32 {
    forward!(
        f32,
        f32s,
        [
            splat_f32s,
            mul_add_e_f32s,
            add_f32s,
            sub_f32s,
            mul_f32s,
            max_f32s,
            greater_than_f32s,
            select_f32s,
            reduce_sum_f32s,
            reduce_max_f32s
        ]
    );

    // Four transposed quarters, added: a third of the instructions of four sums.
    #[inline(always)]
    fn reduce_four<S: Simd>(simd: S, x: [S::f32s; 4]) -> [f32; 4] {
        if S::F32_LANES < 4 {
            return x.map(|x| simd.reduce_sum_f32s(x));
        }
        let [a, b, c, d] = simd.deinterleave_shfl_f32s(x);
        let sum = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        // Within every four lanes there is now one sum for each of the registers (tested below).
        let mut lanes = [0f32; MOST_LANES];
        assert!(size_of::<S::f32s>() <= size_of_val(&lanes));
        // SAFETY: a register of f32 is plain values, and fits the array as just checked.
        unsafe { lanes.as_mut_ptr().cast::<S::f32s>().write_unaligned(sum) };
        let mut sums = [lanes[0], lanes[1], lanes[2], lanes[3]];
        // (Iterators are not always inlined where a function has instructions of its own.)
        let mut first = 4;
        while first < S::F32_LANES {
            for i in 0..4 {
                sums[i] += lanes[first + i];
            }
            first += 4;
        }
        sums
    }

    #[inline(always)]
    fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
        const MAGIC: f32 = 12_582_912.0; // 1.5 · 2^23
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;
        const LOWEST: f32 = -86.0; // keeps 2^n normal
        let splat = |c| simd.splat_f32s(c);
        let clamped = simd.max_f32s(splat(LOWEST), x);
        let shifted = simd.mul_add_e_f32s(clamped, splat(std::f32::consts::LOG2_E), splat(MAGIC));
        let n = simd.sub_f32s(shifted, splat(MAGIC));
        let r = simd.mul_add_e_f32s(n, splat(-LN2_HI), clamped);
        let r = simd.mul_add_e_f32s(n, splat(-LN2_LO), r);
        let inverse_factorials =
            [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0f32];
        let e = taylor::<f32, S, 8>(simd, r, inverse_factorials);
        let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
        let e = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(e), exponent));
        simd.select_f32s(simd.less_than_f32s(x, splat(LOWEST)), splat(0.0), e)
    }
}

/// `x << BITS`, lane by lane: `pulp` has no shift of 64-bit lanes. Compilers make one instruction of the loop.
#[inline(always)]
fn shifted_left<S: Simd, const BITS: u32>(x: S::u64s) -> S::u64s {
    const MOST_LANES: usize = 8;
    let mut lanes = [0u64; MOST_LANES];
    assert!(size_of::<S::u64s>() <= size_of_val(&lanes));
    // SAFETY: a register of u64 is plain values, and fits the array as just checked.
    unsafe {
        lanes.as_mut_ptr().cast::<S::u64s>().write_unaligned(x);
        lanes.iter_mut().for_each(|lane| *lane <<= BITS);
        lanes.as_ptr().cast::<S::u64s>().read_unaligned()
    }
}

impl SimdReal for f64 {
    forward!(
        f64,
        f64s,
        [
            splat_f64s,
            mul_add_e_f64s,
            add_f64s,
            sub_f64s,
            mul_f64s,
            max_f64s,
            greater_than_f64s,
            select_f64s,
            reduce_sum_f64s,
            reduce_max_f64s
        ]
    );

    #[inline(always)]
    fn exp<S: Simd>(simd: S, x: S::f64s) -> S::f64s {
        const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 · 2^52
        const LN2_HI: f64 = 6.931_471_803_691_238e-1;
        const LN2_LO: f64 = 1.908_214_929_270_587_7e-10;
        const LOWEST: f64 = -700.0;
        let splat = |c| simd.splat_f64s(c);
        let clamped = simd.max_f64s(splat(LOWEST), x);
        let shifted = simd.mul_add_e_f64s(clamped, splat(std::f64::consts::LOG2_E), splat(MAGIC));
        let n = simd.sub_f64s(shifted, splat(MAGIC));
        let r = simd.mul_add_e_f64s(n, splat(-LN2_HI), clamped);
        let r = simd.mul_add_e_f64s(n, splat(-LN2_LO), r);
        let mut inverse_factorials = [1.0f64; 13];
        for i in 1..13 {
            inverse_factorials[i] = inverse_factorials[i - 1] / i as f64;
        }
        let e = taylor::<f64, S, 13>(simd, r, inverse_factorials);
        let exponent = shifted_left::<S, 52>(simd.transmute_u64s_f64s(shifted));
        let e = simd.transmute_f64s_u64s(simd.add_u64s(simd.transmute_u64s_f64s(e), exponent));
        simd.select_f64s(simd.less_than_f64s(x, splat(LOWEST)), splat(0.0), e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a, T>(&'a mut [T]);
    impl<T: SimdReal> pulp::WithSimd for Exp<'_, T> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for chunk in self.0.chunks_exact_mut(T::lanes::<S>()) {
                // SAFETY: a chunk is one register long.
                unsafe { T::store::<S>(chunk.as_mut_ptr(), T::exp(simd, T::load::<S>(chunk.as_ptr()))) };
            }
        }
    }

    struct Four<'a, T>(&'a [T]);
    impl<T: SimdReal> pulp::WithSimd for Four<'_, T> {
        type Output = [T; 4];
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> [T; 4] {
            let lanes = T::lanes::<S>();
            assert!(self.0.len() >= 4 * lanes);
            // SAFETY: there are four registers' worth of values.
            let four = [0, 1, 2, 3].map(|i| unsafe { T::load::<S>(self.0.as_ptr().add(i * lanes)) });
            T::reduce_four(simd, four)
        }
    }

    #[test]
    fn four_sums_on_every_instruction_set() {
        fn check<T: crate::Real>() {
            for arch in crate::cpu::tests::architectures() {
                let values: Vec<T> = (0..64).map(|i| T::of_f64((i * i % 37) as f64)).collect();
                let lanes = [1, 2, 4, 8, 16].into_iter().filter(|lanes| {
                    let sums = |i: usize| values[i * lanes..][..*lanes].iter().copied().sum::<T>();
                    arch.dispatch(Four(&values)) == [0, 1, 2, 3].map(sums)
                });
                assert_eq!(lanes.count(), 1, "{arch:?}");
            }
        }
        check::<f32>();
        check::<f64>();
    }

    #[test]
    fn exponentials_are_accurate_on_every_instruction_set() {
        for arch in crate::cpu::tests::architectures() {
            let xs: Vec<f64> = (0..64_000).map(|i| -(i as f64) * 0.0135).collect();
            let mut ys = xs.clone();
            arch.dispatch(Exp(&mut ys));
            for (x, y) in xs.iter().zip(ys).filter(|(x, _)| **x > -700.0) {
                assert!((y / x.exp() - 1.0).abs() < 4e-16, "f64 exp({x}) = {y:e} with {arch:?}");
            }
            let xs: Vec<f32> = (0..64_000).map(|i| -(i as f32) * 0.00134).collect();
            let mut ys = xs.clone();
            arch.dispatch(Exp(&mut ys));
            for (x, y) in xs.iter().zip(ys) {
                assert!(
                    (y as f64 / (*x as f64).exp() - 1.0).abs() < 2.0e-7,
                    "f32 exp({x}) = {y:e} with {arch:?}"
                );
            }
            let mut edge = vec![f32::NEG_INFINITY; 64];
            edge[1] = -200.0;
            edge[2] = 0.0;
            arch.dispatch(Exp(&mut edge));
            assert_eq!(&edge[..4], [0.0, 0.0, 1.0, 0.0]);
        }
    }
}
