//! A block of query rows: what it sees, and its softmax weights tile by tile.

use super::pack::{Bad, Head};
use super::product::{Finish, Left, Plain, Right, add_product, product};
use super::rowwise::{Combine, Dot, RowExp, RowMax};
use super::simd::SimdReal;
use super::{CACHED_WEIGHTS, TILE};
use crate::{Real, Visible};
use pulp::Simd;
use std::cell::Cell;
use std::ops::Range;

/// The instruction set in use, and a count of the floating-point operations that products take.
pub struct Arith {
    pub arch: pulp::Arch,
    pub flop: Cell<u64>,
}

/// Where a product is added to: rows `row` apart.
pub struct AddProduct<'a, T> {
    pub data: &'a mut [T],
    pub row: usize,
}

impl Arith {
    pub fn new(arch: pulp::Arch) -> Self {
        Self { arch, flop: Cell::new(0) }
    }

    /// Counts a product of sizes `[m, n, k]` that was made elsewhere.
    pub fn count(&self, [m, n, k]: [usize; 3]) {
        self.flop.set(self.flop.get() + 2 * (m * n * k) as u64);
    }

    /// `c = finish(a · b)` for sizes `[m, n, k]`; rows of `c` are `n` apart.
    pub fn product<T: SimdReal>(
        &self,
        size: [usize; 3],
        a: Left<T>,
        b: Right<T>,
        c: &mut [T],
        finish: impl Finish<T>,
    ) {
        self.count(size);
        product(self.arch, size, a, b, c, size[1], finish);
    }

    /// `c += a · b` for sizes `[m, n, k]`; rows of `c` are `n` apart.
    pub fn add_product<T: SimdReal>(&self, size: [usize; 3], a: Left<T>, b: Right<T>, c: &mut [T]) {
        self.count(size);
        add_product(self.arch, size, a, b, c, size[1]);
    }

    /// `into += a · b` for sizes `[m, n, k]`, into part of something larger.
    pub fn add_product_into<T: SimdReal>(
        &self,
        size: [usize; 3],
        a: Left<T>,
        b: Right<T>,
        into: AddProduct<T>,
    ) {
        self.count(size);
        add_product(self.arch, size, a, b, into.data, into.row);
    }

    pub fn dot<T: Real>(&self, a: &[T], b: &[T]) -> T {
        self.arch.dispatch(Dot(a, b))
    }

    /// `y = factor · x + scale · y`
    pub fn combine<T: Real>(&self, y: &mut [T], scale: T, factor: T, x: &[T]) {
        self.arch.dispatch(Combine { y, scale, factor, x });
    }
}

/// Adds a bias per key to the scores.
#[derive(Clone, Copy)]
struct AddBias<'a, T>(&'a [T]);
impl<T: SimdReal> Finish<T> for AddBias<'_, T> {
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        simd: S,
        _: usize,
        col: usize,
        mut t: [T::V<S>; N],
    ) -> [T::V<S>; N] {
        debug_assert!(col + N * T::lanes::<S>() <= self.0.len());
        for (i, t) in t.iter_mut().enumerate() {
            // SAFETY: the bias of a tile has TILE values, and columns lie inside the tile.
            *t = T::v_add(simd, *t, unsafe { T::load::<S>(self.0.as_ptr().add(col + i * T::lanes::<S>())) });
        }
        t
    }
}

/// The keys that a set of query rows sees, as tiles.
pub fn seen_tiles(visible: &[Visible]) -> Range<usize> {
    let seen = || visible.iter().filter(|v| v.start < v.end);
    let first = seen().map(|v| v.start).min().unwrap_or(0);
    let last = seen().map(|v| v.end).max().unwrap_or(0);
    first / TILE..last.div_ceil(TILE)
}

/// What is needed to compute the scores of some query rows of one head against a tile of keys.
pub struct Scores<'a, C> {
    pub head: &'a Head<C>,
    /// The bias of every key, padded to whole tiles.
    pub bias: Option<&'a [C]>,
    /// Query rows times the scale, `width` apart.
    pub q: &'a [C],
    pub width: usize,
    pub visible: &'a [Visible],
}

impl<C: Real> Scores<'_, C> {
    /// The scores of tile `t`, minus infinity where a row does not see a key.
    pub fn compute(&self, arith: &Arith, t: usize, scores: &mut [C]) {
        let rows = self.visible.len();
        let size = [rows, TILE, self.head.k.dim];
        let q = Left { data: self.q, row: self.width, col: 1 };
        let k = Right { data: self.head.k.tile_transposed(t), row: TILE };
        match self.bias {
            Some(bias) => arith.product(size, q, k, scores, AddBias(&bias[t * TILE..][..TILE])),
            None => arith.product(size, q, k, scores, Plain),
        }
        let first = t * TILE;
        for (row, visible) in scores.chunks_exact_mut(TILE).zip(self.visible) {
            let start = visible.start.clamp(first, first + TILE) - first;
            let end = visible.end.clamp(first, first + TILE) - first;
            if end - start < TILE {
                row[..start].fill(C::NEG_INFINITY);
                row[start.max(end)..].fill(C::NEG_INFINITY);
            }
            if let Some(own) = visible.skip.filter(|own| (first..first + TILE).contains(own)) {
                row[own - first] = C::NEG_INFINITY;
            }
        }
    }
}

/// Buffers that one block needs; kept from block to block.
#[derive(Default)]
pub struct Buffers<C> {
    /// Query rows times the scale.
    pub q: Vec<C>,
    /// Softmax weights (relative to the row's largest) of every tile, when they fit.
    pub weights: Vec<C>,
    /// The same for a backward's `γ`.
    pub gamma: Vec<C>,
    pub tile: [Vec<C>; 4],
}

/// Makes a buffer at least `len` long. What is in it is left over from before.
pub fn at_least<C: Real>(buffer: &mut Vec<C>, len: usize) -> &mut [C] {
    if buffer.len() < len {
        buffer.resize(len, C::ZERO);
    }
    &mut buffer[..len]
}

/// The softmax weights of a block of query rows.
pub struct Weights<'a, C> {
    pub scores: Scores<'a, C>,
    pub tiles: Range<usize>,
    cache: &'a mut Vec<C>,
    cached: bool,
    /// The largest score of each row.
    pub max: Vec<C>,
    /// One over the sum of the row's weights; 0 where it sees no key.
    pub inv_sum: Vec<C>,
}

impl<'a, C: Real> Weights<'a, C> {
    /// Two passes over the keys: the largest scores, then the weights relative to them and the mean keys
    /// (`key_mean`, less the head's reference key, rows of the keys' packed width).
    pub fn new(arith: &Arith, scores: Scores<'a, C>, cache: &'a mut Vec<C>, key_mean: &mut Vec<C>) -> Self {
        let rows = scores.visible.len();
        let tiles = seen_tiles(scores.visible);
        let cached = tiles.len() * rows * TILE * size_of::<C>() <= CACHED_WEIGHTS;
        at_least(cache, if cached { tiles.len().max(1) } else { 1 } * rows * TILE);
        let mut max = vec![C::NEG_INFINITY; rows];
        let mut this = Self { scores, tiles, cache, cached, max: vec![], inv_sum: vec![] };
        for t in this.tiles.clone() {
            let slot = this.slot(t);
            let tile = &mut this.cache[slot];
            this.scores.compute(arith, t, tile);
            for (row, max) in tile.chunks_exact(TILE).zip(&mut max) {
                let largest = arith.arch.dispatch(RowMax(row));
                if largest > *max || !largest.is_finite() && largest != C::NEG_INFINITY {
                    *max = largest; // A NaN gets through, and with it the row becomes NaN.
                }
            }
        }
        this.max = max;

        let width = this.scores.head.k.width;
        let mut sum = vec![C::ZERO; rows];
        key_mean.clear();
        key_mean.resize(rows * width, C::ZERO);
        for t in this.tiles.clone() {
            let slot = this.slot(t);
            if !this.cached {
                this.scores.compute(arith, t, &mut this.cache[slot.clone()]);
            }
            let tile = &mut this.cache[slot];
            exponentiate(arith, tile, &this.max, |row, s| sum[row] += s);
            let weights = Left { data: tile, row: TILE, col: 1 };
            let k = Right { data: this.scores.head.k.tile(t), row: width };
            arith.add_product([rows, width, TILE], weights, k, key_mean);
        }
        this.inv_sum = sum.iter().map(|&s| if s == C::ZERO { C::ZERO } else { C::ONE / s }).collect();
        for (mean, &inv) in key_mean.chunks_exact_mut(width).zip(&this.inv_sum) {
            mean.iter_mut().for_each(|x| *x *= inv);
        }
        this
    }

    fn slot(&self, t: usize) -> Range<usize> {
        let len = self.scores.visible.len() * TILE;
        let first = if self.cached { (t - self.tiles.start) * len } else { 0 };
        first..first + len
    }

    pub fn rows(&self) -> usize {
        self.scores.visible.len()
    }

    /// Whether a whole block's worth of tiles fits its buffer.
    pub fn is_cached(&self) -> bool {
        self.cached
    }

    /// The weights of tile `t`, rows of [`TILE`], relative to the rows' largest; 0 for keys not seen.
    pub fn tile(&mut self, arith: &Arith, t: usize) -> &[C] {
        let slot = self.slot(t);
        if !self.cached {
            self.scores.compute(arith, t, &mut self.cache[slot.clone()]);
            exponentiate(arith, &mut self.cache[slot.clone()], &self.max, |_, _| ());
        }
        &self.cache[slot]
    }
}

/// Replaces scores by weights relative to the rows' largest, and hands out the sum of each row.
pub fn exponentiate<C: Real>(arith: &Arith, tile: &mut [C], max: &[C], mut sum: impl FnMut(usize, C)) {
    for (i, (row, &max)) in tile.chunks_exact_mut(TILE).zip(max).enumerate() {
        if max == C::NEG_INFINITY {
            row.fill(C::ZERO); // No key seen: −∞ − (−∞) would be NaN.
        } else {
            sum(i, arith.arch.dispatch(RowExp(row, max)));
        }
    }
}

/// The bias of one query head's keys.
pub struct Bias<C> {
    /// One per key, padded to whole tiles.
    pub values: Vec<C>,
    /// Keys that a bias of minus infinity hides.
    pub hidden: Vec<bool>,
    /// Bad keys or biases, and bad values, that are not hidden.
    pub bad: [Bad; 2],
}

/// Bad keys and bad values as a query head sees them.
pub fn bad_tokens<'a, C>(head: &'a Head<C>, bias: Option<&'a Bias<C>>) -> [&'a Bad; 2] {
    match bias {
        Some(bias) => [&bias.bad[0], &bias.bad[1]],
        None => [&head.k.bad, &head.v.bad],
    }
}
