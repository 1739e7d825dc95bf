//! Keys and values that are stored as `bf16`, packed from where they lie.
//!
//! A register holds 32 numbers of a row, of which those in upper halves become `f32` by a mask and those in lower halves by a shift. So
//! coordinates are taken in that order, thirty-two by thirty-two: first the even ones, then the odd ones ([`coordinate`]).

use super::pack::{four_sums, joined, pair, transpose};
use super::tiles::{Lines, Operand, SIDE, STEP, Terms, Unit};
use half::bf16;
use std::arch::x86_64::*;

/// Coordinates that are packed together.
pub const BOTH: usize = 2 * SIDE;

/// Which coordinate number `i` of block `block` is.
pub fn coordinate(block: usize, i: usize) -> usize {
    block / 2 * BOTH + 2 * i + block % 2
}

/// Numbers in the order of [`coordinate`].
pub fn ordered(numbers: &[f32]) -> Vec<f32> {
    (0..numbers.len()).map(|i| numbers[coordinate(i / SIDE, i % SIDE)]).collect()
}

fn check(rows: &[&[bf16]], columns: usize) {
    assert!(rows.iter().all(|row| row.len() >= columns), "rows of a step");
}

/// The product of every row less `origin` with `q`, both [`ordered`].
pub fn scores(_: Unit, rows: &[&[bf16]], origin: &[f32], q: &[f32], out: &mut [f32]) {
    assert!(q.len().is_multiple_of(BOTH) && origin.len() == q.len());
    check(rows, q.len());
    for (rows, out) in rows.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: a `Unit` says that the instructions are there; the rows were checked.
        *out = unsafe { four_scores(rows, origin, q) };
    }
}

/// Weighted rows less `origin`, [`BOTH`] of their coordinates from `column` on, as left operands. Adds their sums, of what the operands
/// stand for: they will be multiplied with the origin and subtracted from products with keys that were not shifted.
pub fn weighted(
    _: Unit,
    rows: &[&[bf16]; STEP],
    column: usize,
    (weights, origin): (&[f32; STEP], &[[f32; SIDE]; 2]),
    out: [&mut Terms; 2],
    sums: &mut [[f32; SIDE]; 2],
    lines: Lines,
) {
    check(rows, column + BOTH);
    // SAFETY: a `Unit` says that the instructions are there; the rows were checked.
    unsafe { weighted_terms(rows, column, weights, origin, out, sums, lines) }
}

/// Rows as right operands.
pub fn pairs(_: Unit, rows: &[&[bf16]; STEP], column: usize, out: [&mut Operand; 2], lines: Lines) {
    check(rows, column + BOTH);
    // SAFETY: a `Unit` says that the instructions are there; the rows were checked.
    unsafe { row_pairs(rows, column, out, lines) }
}

/// # Safety
/// There are 32 numbers from `column` on.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn load(row: &[bf16], column: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_loadu_si512(row.as_ptr().add(column).cast()) }
}

/// The even numbers of a register, and the odd ones.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn wide(x: __m512i) -> [__m512; 2] {
    let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(_mm512_and_si512(x, upper))]
}

/// # Safety
/// The rows and the origin are as long as `q`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn four_scores(rows: &[&[bf16]; 4], origin: &[f32], q: &[f32]) -> [f32; 4] {
    let mut sums = [_mm512_setzero_ps(); 4];
    for column in (0..q.len()).step_by(BOTH) {
        // SAFETY: `q` is a multiple of BOTH long, and everything else as long.
        unsafe {
            let at = |x: &[f32]| [column, column + SIDE].map(|i| _mm512_loadu_ps(x.as_ptr().add(i)));
            let (o, q) = (at(origin), at(q));
            for (sum, row) in sums.iter_mut().zip(rows) {
                let [even, odd] = wide(load(row, column));
                *sum = _mm512_fmadd_ps(_mm512_sub_ps(even, o[0]), q[0], *sum);
                *sum = _mm512_fmadd_ps(_mm512_sub_ps(odd, o[1]), q[1], *sum);
            }
        }
    }
    four_sums(sums)
}

/// # Safety
/// The rows reach up to `column + BOTH`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn weighted_terms(
    rows: &[&[bf16]; STEP],
    column: usize,
    weights: &[f32; STEP],
    origin: &[[f32; SIDE]; 2],
    out: [&mut Terms; 2],
    sums: &mut [[f32; SIDE]; 2],
    lines: Lines,
) {
    let [Terms([even_high, even_low]), Terms([odd_high, odd_low])] = out;
    // SAFETY: sixteen numbers each.
    let [origin, mut all] =
        unsafe { [origin, &*sums].map(|x| [_mm512_loadu_ps(x[0].as_ptr()), _mm512_loadu_ps(x[1].as_ptr())]) };
    for p in 0..SIDE {
        lines.ask(p);
        let [a, b] = [2 * p, 2 * p + 1].map(|j| {
            // SAFETY: the caller's promise.
            let [even, odd] = wide(unsafe { load(rows[j], column) });
            let weight = _mm512_set1_ps(weights[j]);
            [
                _mm512_mul_ps(_mm512_sub_ps(even, origin[0]), weight),
                _mm512_mul_ps(_mm512_sub_ps(odd, origin[1]), weight),
            ]
        });
        let (([eh, el], even), ([oh, ol], odd)) = (pair([a[0], b[0]]), pair([a[1], b[1]]));
        all = [_mm512_add_ps(all[0], even), _mm512_add_ps(all[1], odd)];
        // SAFETY: rows of operands are registers long.
        unsafe {
            _mm512_store_si512(even_high.0[p].as_mut_ptr().cast(), eh);
            _mm512_store_si512(even_low.0[p].as_mut_ptr().cast(), el);
            _mm512_store_si512(odd_high.0[p].as_mut_ptr().cast(), oh);
            _mm512_store_si512(odd_low.0[p].as_mut_ptr().cast(), ol);
        }
    }
    for (sums, all) in sums.iter_mut().zip(all) {
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), all) };
    }
    for tile in [even_high, even_low, odd_high, odd_low] {
        transpose(tile);
    }
}

/// # Safety
/// The rows reach up to `column + BOTH`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn row_pairs(rows: &[&[bf16]; STEP], column: usize, [even, odd]: [&mut Operand; 2], lines: Lines) {
    for p in 0..SIDE {
        lines.ask(p);
        // SAFETY: the caller's promise; rows of operands are registers long.
        unsafe {
            let (a, b) = (load(rows[2 * p], column), load(rows[2 * p + 1], column));
            _mm512_store_si512(
                even.0[p].as_mut_ptr().cast(),
                joined(_mm512_slli_epi32::<16>(a), _mm512_slli_epi32::<16>(b)),
            );
            _mm512_store_si512(odd.0[p].as_mut_ptr().cast(), joined(a, b));
        }
    }
}
