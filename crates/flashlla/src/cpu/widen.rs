//! From storage types to the type of arithmetic, many numbers at a time.

use super::simd::MOST_LANES;
use crate::{Element, Real};
use half::{bf16, f16};
use pulp::Simd;

/// A storage type that can be read many numbers at a time. Sealed; an implementation detail of [`crate::Element`].
#[doc(hidden)]
pub trait Widen: Copy + 'static {
    /// `out = from − origin`, as long as the shortest of them.
    fn widen<S: Simd, C: Real>(simd: S, from: &[Self], origin: &[C], out: &mut [C]);
    /// A register full of numbers of the type of arithmetic.
    ///
    /// # Safety
    /// As many numbers as the register has must be readable from `from` on.
    unsafe fn register<S: Simd, C: Real>(simd: S, from: *const Self) -> C::V<S>;
    /// Two registers full, in an order that costs little: see [`Widen::in_order`].
    ///
    /// # Safety
    /// As many numbers as two registers have must be readable from `from` on.
    #[inline(always)]
    unsafe fn pair<S: Simd, C: Real>(simd: S, from: *const Self) -> [C::V<S>; 2] {
        // SAFETY: the caller's promise.
        unsafe { one_and_next::<Self, S, C>(simd, from) }
    }
    /// From two registers of numbers one after the other to that order.
    #[inline(always)]
    fn in_order<S: Simd, C: Real>(pair: [C::V<S>; 2]) -> [C::V<S>; 2] {
        pair
    }
    /// And back.
    #[inline(always)]
    fn out_of_order<S: Simd, C: Real>(pair: [C::V<S>; 2]) -> [C::V<S>; 2] {
        pair
    }
    /// Adds a row to those of its type, if there are such.
    fn push<'a>(_row: &'a [Self], _rows: &mut Rows<'a>) {}
}

/// [`Widen::register`], one number at a time.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn one_by_one<T: Copy, S: Simd, C: Real>(from: *const T, of: impl Fn(T) -> C) -> C::V<S> {
    assert!(C::lanes::<S>() <= MOST_LANES);
    let mut numbers = [C::ZERO; MOST_LANES];
    // SAFETY: the caller's promise; and the array holds a register's numbers, as just checked.
    unsafe {
        for (i, number) in numbers.iter_mut().enumerate().take(C::lanes::<S>()) {
            *number = of(*from.add(i));
        }
        C::load::<S>(numbers.as_ptr())
    }
}

/// Whether the type of arithmetic is `f32`, in registers of so many of them.
#[inline(always)]
fn is_f32<S: Simd, C: Real>(lanes: usize) -> bool {
    size_of::<C>() == size_of::<f32>() && S::F32_LANES == lanes
}

/// Two registers full of numbers one after the other.
///
/// # Safety
/// As many must be readable.
#[inline(always)]
unsafe fn one_and_next<T: Widen, S: Simd, C: Real>(simd: S, from: *const T) -> [C::V<S>; 2] {
    // SAFETY: the caller's promise.
    unsafe { [T::register::<S, C>(simd, from), T::register::<S, C>(simd, from.add(C::lanes::<S>()))] }
}

/// Whether pairs of registers of `bf16` numbers have those at even places first.
#[inline(always)]
fn evens_then_odds<C: Real>() -> bool {
    size_of::<C>() == size_of::<f32>() && cfg!(target_endian = "little")
}

/// From two registers of numbers one after the other to those at even places and those at odd ones, or back.
#[inline(always)]
fn evens_and_odds<S: Simd, C: Real, const BACK: bool>(pair: [C::V<S>; 2]) -> [C::V<S>; 2] {
    let (lanes, mut numbers) = (C::lanes::<S>(), [C::ZERO; 2 * MOST_LANES]);
    assert!(lanes <= MOST_LANES);
    let mut moved = numbers;
    // SAFETY: the arrays hold two registers' numbers, as just checked.
    unsafe {
        C::store::<S>(numbers.as_mut_ptr(), pair[0]);
        C::store::<S>(numbers.as_mut_ptr().add(lanes), pair[1]);
        for i in 0..lanes {
            if BACK {
                (moved[2 * i], moved[2 * i + 1]) = (numbers[i], numbers[lanes + i]);
            } else {
                (moved[i], moved[lanes + i]) = (numbers[2 * i], numbers[2 * i + 1]);
            }
        }
        [C::load::<S>(moved.as_ptr()), C::load::<S>(moved.as_ptr().add(lanes))]
    }
}

/// Rows where they lie, of the types that are worth it.
#[derive(Debug, Default)]
pub struct Rows<'a> {
    pub f32: Vec<&'a [f32]>,
    pub bf16: Vec<&'a [bf16]>,
}

impl Rows<'_> {
    pub fn clear(&mut self) {
        self.f32.clear();
        self.bf16.clear();
    }
}

/// One number at a time, which compilers turn into registers full where `of` is simple.
#[inline(always)]
fn each<T: Copy, C: Real>(from: &[T], origin: &[C], out: &mut [C], of: impl Fn(T) -> C) {
    for ((out, &from), &origin) in out.iter_mut().zip(from).zip(origin) {
        *out = of(from) - origin;
    }
}

impl Widen for f64 {
    #[inline(always)]
    fn widen<S: Simd, C: Real>(_: S, from: &[Self], origin: &[C], out: &mut [C]) {
        each(from, origin, out, |x| x.to_real());
    }

    #[inline(always)]
    unsafe fn register<S: Simd, C: Real>(_: S, from: *const Self) -> C::V<S> {
        // SAFETY: the caller's promise.
        unsafe { one_by_one::<_, S, C>(from, |x| x.to_real()) }
    }
}

impl Widen for f32 {
    #[inline(always)]
    fn widen<S: Simd, C: Real>(_: S, from: &[Self], origin: &[C], out: &mut [C]) {
        each(from, origin, out, |x| x.to_real());
    }

    #[inline(always)]
    unsafe fn register<S: Simd, C: Real>(_: S, from: *const Self) -> C::V<S> {
        // SAFETY: the caller's promise; a `Real` of four bytes is `f32`.
        unsafe {
            if size_of::<C>() == size_of::<f32>() {
                C::load::<S>(from.cast())
            } else {
                one_by_one::<_, S, C>(from, |x| x.to_real())
            }
        }
    }

    fn push<'a>(row: &'a [Self], rows: &mut Rows<'a>) {
        rows.f32.push(row);
    }
}

impl Widen for bf16 {
    #[inline(always)]
    fn widen<S: Simd, C: Real>(_: S, from: &[Self], origin: &[C], out: &mut [C]) {
        each(from, origin, out, |x| C::of_f32(f32::from_bits(u32::from(x.to_bits()) << 16)));
    }

    #[inline(always)]
    unsafe fn register<S: Simd, C: Real>(_: S, from: *const Self) -> C::V<S> {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{
                _mm_loadu_si128, _mm256_cvtepu16_epi32, _mm256_loadu_si256, _mm256_slli_epi32,
                _mm512_cvtepu16_epi32, _mm512_slli_epi32,
            };
            // SAFETY: a register's numbers are there, and so are the instructions: see `f16`. Registers are plain values.
            unsafe {
                if is_f32::<S, C>(16) {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    return std::mem::transmute_copy(&_mm512_slli_epi32::<16>(wide));
                }
                if is_f32::<S, C>(8) {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    return std::mem::transmute_copy(&_mm256_slli_epi32::<16>(wide));
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { one_by_one::<_, S, C>(from, |x| C::of_f32(f32::from_bits(u32::from(x.to_bits()) << 16))) }
    }

    // Those at even places and those at odd ones: a shift and a mask of words of two numbers. One register at a time takes twice as many
    // instructions.
    #[inline(always)]
    unsafe fn pair<S: Simd, C: Real>(simd: S, from: *const Self) -> [C::V<S>; 2] {
        // SAFETY: the caller's promise; words are as long as two numbers, and a `Real` of four bytes is `f32`. Registers are plain values.
        unsafe {
            if evens_then_odds::<C>() {
                let words = from.cast::<S::u32s>().read_unaligned();
                let even = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
                let odd = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
                let [even, odd] = [simd.transmute_f32s_u32s(even), simd.transmute_f32s_u32s(odd)];
                return [std::mem::transmute_copy(&even), std::mem::transmute_copy(&odd)];
            }
            one_and_next::<Self, S, C>(simd, from)
        }
    }

    #[inline(always)]
    fn in_order<S: Simd, C: Real>(pair: [C::V<S>; 2]) -> [C::V<S>; 2] {
        if evens_then_odds::<C>() {
            return evens_and_odds::<S, C, false>(pair);
        }
        pair
    }

    #[inline(always)]
    fn out_of_order<S: Simd, C: Real>(pair: [C::V<S>; 2]) -> [C::V<S>; 2] {
        if evens_then_odds::<C>() {
            return evens_and_odds::<S, C, true>(pair);
        }
        pair
    }

    fn push<'a>(row: &'a [Self], rows: &mut Rows<'a>) {
        rows.bf16.push(row);
    }
}

/// `out = values − origin` for as many numbers as a register has, which the compiler then knows.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn less<C: Real, const N: usize>(values: &[f32; N], origin: &[C; N], out: &mut [C; N]) {
    for i in 0..N {
        out[i] = C::of_f32(values[i]) - origin[i];
    }
}

impl Widen for f16 {
    #[inline(always)]
    fn widen<S: Simd, C: Real>(_: S, from: &[Self], origin: &[C], out: &mut [C]) {
        // Numbers that registers were filled with.
        #[allow(unused_mut)]
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_loadu_si256, _mm512_cvtph_ps};
            let len = from.len().min(origin.len()).min(out.len());
            let (from, origin, out) = (&from[..len], &origin[..len], &mut out[..len]);
            // pulp's registers of 16 and 8 `f32` on this architecture come with AVX-512F and with AVX2 and F16C.
            if S::F32_LANES == 16 {
                let (parts, _) = from.as_chunks::<16>();
                for ((from, origin), out) in parts.iter().zip(origin.as_chunks().0).zip(out.as_chunks_mut().0)
                {
                    // SAFETY: 16 numbers of 16 bits are there, and so is the instruction.
                    let values: [f32; 16] = unsafe {
                        std::mem::transmute(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
                    };
                    less(&values, origin, out);
                }
                done = parts.len() * 16;
            } else if S::F32_LANES == 8 {
                let (parts, _) = from.as_chunks::<8>();
                for ((from, origin), out) in parts.iter().zip(origin.as_chunks().0).zip(out.as_chunks_mut().0)
                {
                    // SAFETY: 8 numbers of 16 bits are there, and so is the instruction.
                    let values: [f32; 8] = unsafe {
                        std::mem::transmute(_mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())))
                    };
                    less(&values, origin, out);
                }
                done = parts.len() * 8;
            }
        }
        let len = from.len().min(origin.len()).min(out.len());
        each(&from[done..len], &origin[done..len], &mut out[done..len], |x| x.to_real());
    }

    #[inline(always)]
    unsafe fn register<S: Simd, C: Real>(_: S, from: *const Self) -> C::V<S> {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_loadu_si256, _mm512_cvtph_ps};
            // SAFETY: a register's numbers are there, and so are the instructions, as above. Registers are plain values.
            unsafe {
                if is_f32::<S, C>(16) {
                    return std::mem::transmute_copy(&_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
                }
                if is_f32::<S, C>(8) {
                    return std::mem::transmute_copy(&_mm256_cvtph_ps(_mm_loadu_si128(from.cast())));
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { one_by_one::<_, S, C>(from, |x| x.to_real()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Read<'a, T, C>(&'a [T], &'a [C], &'a mut [C]);
    impl<T: Element, C: Real> pulp::WithSimd for Read<'_, T, C> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            T::widen(simd, self.0, self.1, self.2);
        }
    }

    struct Registers<'a, T, C>(&'a [T], &'a mut [C]);
    impl<T: Element, C: Real> pulp::WithSimd for Registers<'_, T, C> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let lanes = C::lanes::<S>();
            for (from, out) in self.0.chunks_exact(lanes).zip(self.1.chunks_exact_mut(lanes)) {
                // SAFETY: a register's numbers each.
                unsafe { C::store::<S>(out.as_mut_ptr(), T::register::<S, C>(simd, from.as_ptr())) };
            }
        }
    }

    struct Pairs<'a, T, C>(&'a [T], &'a mut [C]);
    impl<T: Element, C: Real> pulp::WithSimd for Pairs<'_, T, C> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let lanes = C::lanes::<S>();
            for (from, out) in self.0.chunks_exact(2 * lanes).zip(self.1.chunks_exact_mut(2 * lanes)) {
                // SAFETY: two registers' numbers each.
                unsafe {
                    // There and back again, from either side.
                    let pair = T::out_of_order::<S, C>(T::pair::<S, C>(simd, from.as_ptr()));
                    let pair = T::out_of_order::<S, C>(T::in_order::<S, C>(pair));
                    (0..2).for_each(|i| C::store::<S>(out.as_mut_ptr().add(i * lanes), pair[i]));
                }
            }
        }
    }

    fn check<T: Element, C: Real>(numbers: &[T]) {
        let same = |x: T, got: C| {
            let want: f64 = x.to_real();
            got.as_f64() == want || got.as_f64().is_nan() && want.is_nan()
        };
        for arch in crate::cpu::tests::architectures() {
            // Every place of a register, and what is left after the last.
            for shift in [0, 1, 15] {
                let numbers = &numbers[shift..];
                let mut out = vec![C::ONE; numbers.len()];
                arch.dispatch(Read(numbers, &vec![C::ZERO; numbers.len()], &mut out));
                for (&x, &got) in numbers.iter().zip(&out) {
                    assert!(same(x, got), "{x:?} read as {got:?} with {arch:?}");
                }
                out.fill(C::ONE);
                let whole = numbers.len() - numbers.len() % 16;
                arch.dispatch(Registers(&numbers[..whole], &mut out));
                for (&x, &got) in numbers[..whole].iter().zip(&out) {
                    assert!(same(x, got), "{x:?} in a register is {got:?} with {arch:?}");
                }
                out.fill(C::ONE);
                let whole = numbers.len() - numbers.len() % 32;
                arch.dispatch(Pairs(&numbers[..whole], &mut out));
                for (&x, &got) in numbers[..whole].iter().zip(&out) {
                    assert!(same(x, got), "{x:?} in a pair of registers is {got:?} with {arch:?}");
                }
            }
        }
    }

    #[test]
    fn every_16_bit_number_is_read_exactly_on_every_instruction_set() {
        let f16s: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let bf16s: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        check::<_, f32>(&f16s);
        check::<_, f64>(&f16s);
        check::<_, f32>(&bf16s);
        check::<_, f64>(&bf16s);
    }
}
