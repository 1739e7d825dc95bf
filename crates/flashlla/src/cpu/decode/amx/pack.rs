//! Numbers as the matrix unit takes them: `f32` as one `bf16` term or the sum of two, transposed on the left, in pairs of rows on the right.
//!
//! Memory that comes next is asked for on the way, a line per pair.
//!
//! Two terms are within 2⁻¹⁷ of the number, and rounded to nearest, so that errors do not add up to a bias.

use super::tiles::{Lines, Operand, SIDE, STEP, Terms, Unit};
use std::arch::x86_64::*;

/// The upper half of a number is its first term.
const UPPER: i32 = 0xffff_0000u32 as i32;
/// Half a unit of the upper half.
const HALF: i32 = 0x8000;

/// Keys, or values, of a step, less an origin as long as they are.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    pub rows: &'a [&'a [f32]; STEP],
    pub origin: &'a [f32],
}

impl Step<'_> {
    fn check(&self, column: usize) {
        let end = column + SIDE;
        assert!(self.origin.len() >= end && self.rows.iter().all(|row| row.len() >= end), "rows of a step");
    }

    /// # Safety
    /// Row and origin reach up to `column + SIDE`.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn load(&self, row: usize, column: usize, origin: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_sub_ps(unsafe { _mm512_loadu_ps(self.rows[row].as_ptr().add(column)) }, origin)
    }
}

/// The product of every row less `origin` with `q`.
pub fn scores(_: Unit, rows: &[&[f32]], origin: &[f32], q: &[f32], out: &mut [f32]) {
    assert!(q.len().is_multiple_of(SIDE) && origin.len() == q.len());
    assert!(rows.iter().all(|row| row.len() >= q.len()), "rows of a step");
    for (rows, out) in rows.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: a `Unit` says that the instructions are there; the rows were checked.
        *out = unsafe { four_scores(rows, origin, q) };
    }
}

/// # Safety
/// The rows and the origin are as long as `q`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn four_scores(rows: &[&[f32]; 4], origin: &[f32], q: &[f32]) -> [f32; 4] {
    let mut sums = [_mm512_setzero_ps(); 4];
    for column in (0..q.len()).step_by(SIDE) {
        // SAFETY: `q` is a multiple of SIDE long, and everything else as long.
        unsafe {
            let (q, o) =
                (_mm512_loadu_ps(q.as_ptr().add(column)), _mm512_loadu_ps(origin.as_ptr().add(column)));
            for (sum, row) in sums.iter_mut().zip(rows) {
                *sum = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_loadu_ps(row.as_ptr().add(column)), o), q, *sum);
            }
        }
    }
    four_sums(sums)
}

/// The sums of four registers.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn four_sums([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let [ab, cd] = [_mm512_castps_pd(ab), _mm512_castps_pd(cd)];
    // Every four lanes: parts of the four sums.
    let all = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
    );
    let all = _mm512_add_ps(all, _mm512_shuffle_f32x4::<0x4e>(all, all));
    let all = _mm512_add_ps(all, _mm512_shuffle_f32x4::<0xb1>(all, all));
    let mut out = [0.0; 4];
    // SAFETY: four numbers.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(all)) };
    out
}

/// Weighted keys as two terms, [`SIDE`] of their coordinates from `column` on; adds their sum.
pub fn weighted(
    _: Unit,
    rows: Step,
    column: usize,
    weights: &[f32; STEP],
    out: &mut Terms,
    sum: &mut [f32; SIDE],
    lines: Lines,
) {
    rows.check(column);
    // SAFETY: a `Unit` says that the instructions are there; the rows were checked.
    unsafe { weighted_terms(rows, column, weights, out, sum, lines) }
}

/// Numbers as two terms, pairs of rows.
pub fn terms(_: Unit, rows: Step, column: usize, out: &mut Terms, lines: Lines) {
    rows.check(column);
    // SAFETY: a `Unit` says that the instructions are there; the rows were checked.
    unsafe { term_pairs(rows, column, out, lines) }
}

/// A pair of rows as two terms, and the sum of what these stand for.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn pair(x: [__m512; 2]) -> ([__m512i; 2], __m512) {
    let (upper, half) = (_mm512_set1_epi32(UPPER), _mm512_set1_epi32(HALF));
    let [high_0, high_1] = x.map(|x| _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper));
    let low_0 = _mm512_sub_ps(x[0], _mm512_castsi512_ps(high_0));
    let low_1 = _mm512_sub_ps(x[1], _mm512_castsi512_ps(high_1));
    let [low_0, low_1] = [low_0, low_1].map(|low| _mm512_add_epi32(_mm512_castps_si512(low), half));
    let terms = [_mm512_or_si512(_mm512_srli_epi32::<16>(high_0), high_1), joined(low_0, low_1)];
    let [high_0, high_1] = [high_0, high_1].map(|x| _mm512_castsi512_ps(x));
    let [low_0, low_1] = [low_0, low_1].map(|low| _mm512_castsi512_ps(_mm512_and_si512(low, upper)));
    (terms, _mm512_add_ps(_mm512_add_ps(high_0, low_0), _mm512_add_ps(high_1, low_1)))
}

/// The upper halves of two rows, the first's in the lower halves.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn joined(first: __m512i, second: __m512i) -> __m512i {
    // a | b & c, with a the most significant bit of the eight cases.
    const SELECT: i32 = 0b1111_1000;
    _mm512_ternarylogic_epi32::<SELECT>(_mm512_srli_epi32::<16>(first), second, _mm512_set1_epi32(UPPER))
}

/// # Safety
/// The rows reach up to `column + SIDE`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn weighted_terms(
    rows: Step,
    column: usize,
    weights: &[f32; STEP],
    Terms([high, low]): &mut Terms,
    sum: &mut [f32; SIDE],
    lines: Lines,
) {
    // SAFETY: sixteen numbers.
    let mut all = unsafe { _mm512_loadu_ps(sum.as_ptr()) };
    // SAFETY: the caller's promise.
    let origin = unsafe { _mm512_loadu_ps(rows.origin.as_ptr().add(column)) };
    for p in 0..SIDE {
        lines.ask(p);
        let x = [2 * p, 2 * p + 1].map(|j| {
            // SAFETY: the caller's promise.
            let key = unsafe { rows.load(j, column, origin) };
            _mm512_mul_ps(key, _mm512_set1_ps(weights[j]))
        });
        all = _mm512_add_ps(all, _mm512_add_ps(x[0], x[1]));
        let ([h, l], _) = pair(x);
        // SAFETY: rows of operands are registers long.
        unsafe {
            _mm512_store_si512(high.0[p].as_mut_ptr().cast(), h);
            _mm512_store_si512(low.0[p].as_mut_ptr().cast(), l);
        }
    }
    // SAFETY: sixteen numbers.
    unsafe { _mm512_storeu_ps(sum.as_mut_ptr(), all) };
    transpose(high);
    transpose(low);
}

/// # Safety
/// The rows reach up to `column + SIDE`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn term_pairs(rows: Step, column: usize, Terms([high, low]): &mut Terms, lines: Lines) {
    // SAFETY: the caller's promise.
    let origin = unsafe { _mm512_loadu_ps(rows.origin.as_ptr().add(column)) };
    for p in 0..SIDE {
        lines.ask(p);
        // SAFETY: the caller's promise; rows of operands are registers long.
        unsafe {
            let ([h, l], _) = pair([2 * p, 2 * p + 1].map(|j| rows.load(j, column, origin)));
            _mm512_store_si512(high.0[p].as_mut_ptr().cast(), h);
            _mm512_store_si512(low.0[p].as_mut_ptr().cast(), l);
        }
    }
}

/// Rows become columns.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn transpose(tile: &mut Operand) {
    let rows = &mut tile.0;
    // SAFETY: rows of operands are registers long.
    let load = |i: usize| unsafe { _mm512_load_si512(rows[i].as_ptr().cast()) };
    let mut a = [_mm512_setzero_si512(); SIDE];
    for (i, a) in a.iter_mut().enumerate() {
        *a = load(i);
    }
    // Within lanes of four: 4 × 4 numbers, then 4 × 4 lanes.
    let mut b = a;
    for i in (0..SIDE).step_by(2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for i in (0..SIDE).step_by(4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 g + e], lane l: column 4 l + e of rows 4 g to 4 g + 3.
    for e in 0..4 {
        let [r0, r1, r2, r3] = [a[e], a[4 + e], a[8 + e], a[12 + e]];
        let low = [_mm512_shuffle_i32x4::<0x44>(r0, r1), _mm512_shuffle_i32x4::<0x44>(r2, r3)];
        let high = [_mm512_shuffle_i32x4::<0xee>(r0, r1), _mm512_shuffle_i32x4::<0xee>(r2, r3)];
        let columns = [
            _mm512_shuffle_i32x4::<0x88>(low[0], low[1]),
            _mm512_shuffle_i32x4::<0xdd>(low[0], low[1]),
            _mm512_shuffle_i32x4::<0x88>(high[0], high[1]),
            _mm512_shuffle_i32x4::<0xdd>(high[0], high[1]),
        ];
        for (l, column) in columns.into_iter().enumerate() {
            // SAFETY: rows of operands are registers long.
            unsafe { _mm512_store_si512(rows[4 * l + e].as_mut_ptr().cast(), column) };
        }
    }
}

/// Weights as the first rows of a left operand: three terms, which are exact together.
pub fn weights_alone(weights: &[f32; STEP], out: &mut Operand) {
    let mut rest = *weights;
    for row in &mut out.0[..3] {
        for (pair, rest) in row.iter_mut().zip(rest.as_chunks_mut::<2>().0) {
            let upper = rest.map(|x| x.to_bits() & UPPER as u32);
            *pair = upper[0] >> 16 | upper[1];
            rest.iter_mut().zip(upper).for_each(|(rest, upper)| *rest -= f32::from_bits(upper));
        }
    }
}
