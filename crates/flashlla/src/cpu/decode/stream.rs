//! One KV head of one sequence, and some query rows that look at it: the passes over its keys and values.
//!
//! The keys are cut into splits by sizes alone, never by threads; every pass works on the splits in parallel and adds what they
//! give in their order. The last pass goes through them as the first did; what the caches still hold is found there.

use super::kernels::{Dots, ReadTile, RootScaled, Weigh};
use crate::cpu::block::{AddProduct, Arith};
use crate::cpu::product::{Left, Right};
use crate::cpu::rows::ReadRows;
use crate::cpu::rowwise::{RowExp, RowMax};
use crate::cpu::solve::{Matrices, Systems};
use crate::cpu::{LANES, Run, TILE, padded};
use crate::{Attention, Real, Visible};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of the matrix of second moments that are computed together, from their first column's register on.
const MOMENT_ROWS: usize = 16;
/// How far scores may rise above what weights are relative to before that is moved: `e^8` is far from any limit.
const RISE: f64 = 8.0;
/// Reference keys are means of so many.
const SAMPLES: usize = 8;

/// A decoding in the type of arithmetic.
pub struct Inputs<'a, C> {
    pub attention: &'a Attention,
    pub q: &'a dyn ReadRows<C>,
    pub k: &'a dyn ReadTile<C>,
    pub v: &'a dyn ReadTile<C>,
    pub bias: Option<&'a dyn ReadRows<C>>,
    pub probe: Option<&'a dyn ReadRows<C>>,
}

/// One query row.
#[derive(Debug, Clone)]
pub struct Row {
    pub head: usize,
    pub query: usize,
    pub visible: Visible,
}

/// What the passes over one KV head have in common.
pub struct Stream<'a, C> {
    pub run: Run,
    pub inputs: &'a Inputs<'a, C>,
    /// Sequence and KV head.
    pub place: [usize; 2],
    pub rows: &'a [Row],
    pub splits: Vec<Range<usize>>,
    pub width: usize,
    /// The reference key, which all keys are less by.
    pub origin: Vec<C>,
    /// About the largest norm of a key less the reference.
    pub longest: C,
    /// The rows' queries times the scale.
    pub q: Vec<C>,
}

/// Tokens that will be read next, asked for a few at a time between products: all at once, products would wait for them; left to
/// the hardware, they would come only when read, since it does not look beyond what it has seen.
struct Ahead<'a, C> {
    from: &'a dyn ReadTile<C>,
    place: [usize; 2],
    tokens: Range<usize>,
    step: usize,
}

impl<'a, C: Real> Ahead<'a, C> {
    /// Of a tile, in so many steps.
    fn new(stream: &Stream<'a, C>, from: &'a dyn ReadTile<C>, tokens: Range<usize>, steps: usize) -> Self {
        Self { from, place: stream.place, tokens, step: TILE.div_ceil(steps) }
    }

    fn some(&mut self) {
        let next = self.tokens.start..self.tokens.end.min(self.tokens.start + self.step);
        self.tokens.start = next.end;
        if !next.is_empty() {
            self.from.prefetch(self.place, next);
        }
    }
}

/// What the first pass finds in a split; vectors of one number or one vector per row.
struct Found<C> {
    /// By tile and row.
    scores: Vec<C>,
    /// What weights are relative to.
    reference: Vec<C>,
    sum: Vec<C>,
    mean: Vec<C>,
    /// Upper halves, `dim` rows of `width` each; empty unless wanted.
    moments: Vec<C>,
    /// Rows that see a key or bias that is not finite.
    bad: Vec<bool>,
    careful: bool,
}

/// The softmax weights of all rows, and what was summed on the way to them.
pub struct Weighted<'a, C> {
    pub stream: &'a Stream<'a, C>,
    /// Of every split, by tile and row, relative to `reference`.
    weights: Vec<Vec<C>>,
    pub reference: Vec<C>,
    pub inv_sum: Vec<C>,
    /// Less the reference key.
    pub key_mean: Vec<C>,
    /// Second moments of the rows, if they were wanted.
    pub moments: Vec<C>,
    pub bad: Vec<bool>,
    /// Some key of a split is not finite: its rows are read as zeros.
    careful: Vec<bool>,
}

impl<'a, C: Real> Stream<'a, C> {
    pub fn new(
        run: Run,
        inputs: &'a Inputs<'a, C>,
        place: [usize; 2],
        rows: &'a [Row],
        splits: Vec<Range<usize>>,
    ) -> Self {
        let (dim, width) = (inputs.attention.head_dim(), padded(inputs.attention.head_dim(), LANES));
        let mut this = Self {
            run,
            inputs,
            place,
            rows,
            splits,
            width,
            origin: vec![C::ZERO; width],
            longest: C::ZERO,
            q: vec![C::ZERO; rows.len() * width],
        };
        this.find_origin(dim);
        this
    }

    pub fn dim(&self) -> usize {
        self.inputs.attention.head_dim()
    }

    pub fn keys(&self) -> usize {
        self.splits.iter().map(|split| split.len()).sum()
    }

    /// The mean of a few finite keys, evenly spread.
    fn find_origin(&mut self, dim: usize) {
        let (Some(first), Some(last)) = (self.splits.first(), self.splits.last()) else { return };
        let (first, keys) = (first.start, last.end - first.start);
        let mut samples = vec![C::ZERO; SAMPLES.min(keys) * self.width];
        for (i, sample) in samples.chunks_exact_mut(self.width).enumerate() {
            let j = first + i * keys / SAMPLES.min(keys);
            self.inputs.k.read(self.run.arch, self.place, j, sample, &self.origin);
        }
        let finite = |key: &&[C]| key.iter().all(|x| x.is_finite());
        let mut finite: Vec<&[C]> = samples.chunks_exact(self.width).filter(finite).collect();
        // One wild key would move the mean of all: the two farthest from the coordinates' middle do not count.
        if finite.len() == SAMPLES {
            let middle: Vec<C> = (0..dim)
                .map(|d| {
                    let mut column: Vec<C> = finite.iter().map(|key| key[d]).collect();
                    column.sort_unstable_by(|a, b| a.partial_cmp(b).expect("finite"));
                    column[SAMPLES / 2]
                })
                .collect();
            let far = |key: &[C]| key.iter().zip(&middle).map(|(&x, &m)| (x - m) * (x - m)).sum::<C>();
            finite.sort_by(|a, b| far(a).partial_cmp(&far(b)).unwrap_or(std::cmp::Ordering::Equal));
            finite.truncate(SAMPLES - 2);
        }
        let share = C::ONE / C::of_f64(finite.len().max(1) as f64);
        for key in &finite {
            self.origin.iter_mut().zip(*key).for_each(|(o, &x)| *o += share * x);
        }
        for key in samples.chunks_exact(self.width).filter(|key| key.iter().all(|x| x.is_finite())) {
            let norm = key.iter().zip(&self.origin).map(|(&x, &o)| (x - o) * (x - o)).sum::<C>().root();
            if norm > self.longest {
                self.longest = norm;
            }
        }
        self.longest = self.longest + self.longest;
    }

    /// The tiles of a split: number, first token and how many.
    fn tiles(split: &Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> + use<C> {
        let split = split.clone();
        split.clone().step_by(TILE).enumerate().map(move |(i, first)| (i, first, TILE.min(split.end - first)))
    }

    /// Reads a tile of keys or values; rows beyond `count` become zeros. When careful, so do tokens that are not finite; they are
    /// returned.
    fn read(
        &self,
        from: &dyn ReadTile<C>,
        origin: &[C],
        (first, count): (usize, usize),
        tile: &mut [C],
        careful: bool,
    ) -> Vec<usize> {
        let width = origin.len();
        from.read(self.run.arch, self.place, first, &mut tile[..count * width], origin);
        tile[count * width..].fill(C::ZERO);
        let mut bad = vec![];
        if careful {
            for (j, row) in tile.chunks_exact_mut(width).enumerate() {
                if !row.iter().all(|x| x.is_finite()) {
                    row.fill(C::ZERO);
                    bad.push(j);
                }
            }
        }
        bad
    }

    /// Minus infinity where a row does not see a key.
    fn hide(&self, (first, count): (usize, usize), scores: &mut [C]) {
        for (row, scores) in self.rows.iter().zip(scores.chunks_exact_mut(TILE)) {
            let Visible { start, end, skip } = row.visible;
            let start = start.clamp(first, first + count) - first;
            let end = (end.clamp(first, first + count) - first).max(start);
            if end - start < TILE {
                scores[..start].fill(C::NEG_INFINITY);
                scores[end..].fill(C::NEG_INFINITY);
            }
            if let Some(own) = skip.filter(|own| (first..first + count).contains(own)) {
                scores[own - first] = C::NEG_INFINITY;
            }
        }
    }

    /// Adds the bias; rows for which it is not a number, or infinite, are bad.
    fn add_bias(&self, (first, count): (usize, usize), scores: &mut [C], bad: &mut [bool]) {
        let Some(bias) = self.inputs.bias else { return };
        for ((row, scores), bad) in self.rows.iter().zip(scores.chunks_exact_mut(TILE)).zip(bad) {
            let (b, h) = self.inputs.attention.bias_place(bias.shape(), self.place[0], row.head);
            for (j, score) in scores.iter_mut().enumerate().take(count) {
                let value = bias.entry(b, h, first + j, 0);
                if value.is_finite() || value == C::NEG_INFINITY {
                    *score += value;
                } else if row.visible.contains(first + j) {
                    *bad = true;
                }
            }
        }
    }

    fn first_pass_of(&self, arith: &Arith, split: &Range<usize>, moments: bool, careful: bool) -> Found<C> {
        let (n, width, dim, arch) = (self.rows.len(), self.width, self.dim(), arith.arch);
        let mut found = Found {
            scores: vec![C::ZERO; split.len().div_ceil(TILE) * n * TILE],
            reference: vec![C::NEG_INFINITY; n],
            sum: vec![C::ZERO; n],
            mean: vec![C::ZERO; n * width],
            moments: vec![C::ZERO; if moments { n * dim * width } else { 0 }],
            bad: vec![false; n],
            careful,
        };
        let (mut keys, mut scaled) = (vec![C::ZERO; TILE * width], vec![C::ZERO; TILE * width]);
        let mut weights = vec![C::ZERO; n * TILE];
        for (i, first, count) in Self::tiles(split) {
            if !self.run.goes_on() {
                break;
            }
            let next = first + count..split.end.min(first + count + TILE);
            let steps = 2 + if moments { n * dim.div_ceil(MOMENT_ROWS) } else { 0 };
            let mut ahead = Ahead::new(self, self.inputs.k, next, steps);
            let bad_keys = self.read(self.inputs.k, &self.origin, (first, count), &mut keys, careful);
            ahead.some();
            arch.dispatch(Dots { rows: &self.q, tile: &keys, width, products: &mut weights });
            arith.count([n, TILE, dim]);
            self.add_bias((first, count), &mut weights, &mut found.bad);
            self.hide((first, count), &mut weights);
            for (row, scores) in weights.chunks_exact(TILE).enumerate() {
                found.bad[row] |= bad_keys.iter().any(|&j| scores[j] != C::NEG_INFINITY);
            }
            found.scores[i * n * TILE..][..n * TILE].copy_from_slice(&weights);
            for (row, scores) in weights.chunks_exact_mut(TILE).enumerate() {
                let largest = arch.dispatch(RowMax(scores));
                let reference = &mut found.reference[row];
                if largest > *reference + C::of_f64(RISE) {
                    let factor = (*reference - largest).exponential(); // 0 at first
                    *reference = largest;
                    found.sum[row] *= factor;
                    found.mean[row * width..][..width].iter_mut().for_each(|x| *x *= factor);
                    if moments {
                        let at = row * dim * width..(row + 1) * dim * width;
                        found.moments[at].iter_mut().for_each(|x| *x *= factor);
                    }
                }
                if *reference == C::NEG_INFINITY {
                    // No key seen yet; a NaN stays one.
                    scores.iter_mut().for_each(|x| *x = if *x == C::NEG_INFINITY { C::ZERO } else { C::NAN });
                    found.sum[row] += scores.iter().copied().sum::<C>();
                } else {
                    found.sum[row] += arch.dispatch(RowExp(scores, *reference));
                }
            }
            ahead.some();
            let (left, right) =
                (Left { data: &weights, row: TILE, col: 1 }, Right { data: &keys, row: width });
            arith.add_product([n, width, TILE], left, right, &mut found.mean);
            for (weights, moments) in
                weights.chunks_exact(TILE).zip(found.moments.chunks_exact_mut(dim * width))
            {
                arch.dispatch(RootScaled { tile: &keys, weights, out: &mut scaled, width });
                add_moments(arith, &scaled, moments, [dim, width], || ahead.some());
            }
        }
        found
    }

    /// Scores, softmax weights, mean keys and, when wanted, second moments.
    pub fn first_pass(&self, arith: &Arith, moments: bool) -> Weighted<'_, C> {
        let (n, width) = (self.rows.len(), self.width);
        let mut found: Vec<(Found<C>, u64)> = self
            .splits
            .par_iter()
            .with_max_len(1)
            .map(|split| {
                let arith = Arith::new(self.run.arch);
                let mut found = self.first_pass_of(&arith, split, moments, false);
                // Something not finite in a key spoils every row's sums, even that of rows that do not see it.
                let all = [&found.sum, &found.mean, &found.moments];
                if !all.iter().all(|values| values.iter().all(|x| x.is_finite())) {
                    found = self.first_pass_of(&arith, split, moments, true);
                }
                (found, arith.flop.get())
            })
            .collect();
        found.iter().for_each(|(_, flop)| arith.flop.set(arith.flop.get() + flop));

        let mut reference = vec![C::NEG_INFINITY; n];
        for (found, _) in &found {
            for (all, &one) in reference.iter_mut().zip(&found.reference) {
                *all = if one > *all || one.as_f64().is_nan() { one } else { *all };
            }
        }
        let mut all = Weighted {
            stream: self,
            weights: vec![],
            inv_sum: vec![C::ZERO; n],
            key_mean: vec![C::ZERO; n * width],
            moments: vec![],
            bad: vec![false; n],
            careful: found.iter().map(|(found, _)| found.careful).collect(),
            reference,
        };
        let size = if moments { self.dim() * width } else { 0 };
        // The first split's sums become those of all.
        for (i, (found, _)) in found.iter_mut().enumerate() {
            for row in 0..n {
                let own = found.reference[row];
                // A split in which the row sees nothing: −∞ − (−∞) would be NaN.
                let unseen = own == C::NEG_INFINITY && found.sum[row] == C::ZERO;
                let factor = if unseen { C::ZERO } else { (own - all.reference[row]).exponential() };
                all.inv_sum[row] += factor * found.sum[row];
                let pairs = [
                    (&mut all.key_mean, &mut found.mean, width),
                    (&mut all.moments, &mut found.moments, size),
                ];
                for (all, one, size) in pairs {
                    let one = &mut one[row * size..][..size];
                    one.iter_mut().for_each(|x| *x *= factor);
                    if i > 0 {
                        all[row * size..][..size].iter_mut().zip(one).for_each(|(all, one)| *all += *one);
                    }
                }
                all.bad[row] |= found.bad[row];
            }
            if i == 0 {
                all.key_mean = std::mem::take(&mut found.mean);
                all.moments = std::mem::take(&mut found.moments);
            }
        }
        all.inv_sum.iter_mut().for_each(|sum| *sum = if *sum == C::ZERO { C::ZERO } else { C::ONE / *sum });
        for (mean, &inv) in all.key_mean.chunks_exact_mut(width).zip(&all.inv_sum) {
            mean.iter_mut().for_each(|x| *x *= inv);
        }
        let reference = &all.reference;
        all.weights = found
            .into_par_iter()
            .with_max_len(1)
            .map(|(found, _)| {
                let mut weights = found.scores;
                for (i, scores) in weights.chunks_exact_mut(TILE).enumerate() {
                    if reference[i % n] == C::NEG_INFINITY {
                        scores.fill(C::ZERO);
                    } else {
                        self.run.arch.dispatch(RowExp(scores, reference[i % n]));
                    }
                }
                weights
            })
            .collect();
        all
    }
}

/// `moments += scaledᵀ scaled`, the upper half in steps of [`MOMENT_ROWS`].
/// `between` is called before each of them.
fn add_moments<C: Real>(
    arith: &Arith,
    scaled: &[C],
    moments: &mut [C],
    [dim, width]: [usize; 2],
    mut between: impl FnMut(),
) {
    for first in (0..dim).step_by(MOMENT_ROWS) {
        between();
        let rows = MOMENT_ROWS.min(dim - first);
        let left = Left { data: &scaled[first..], row: 1, col: width };
        let right = Right { data: &scaled[first..], row: width };
        let into = &mut moments[first * width + first..];
        arith.add_product_into(
            [rows, width - first, TILE],
            left,
            right,
            AddProduct { data: into, row: width },
        );
    }
}

impl<C: Real> Weighted<'_, C> {
    /// One pass over the keys and, when `values` is theirs, the values. For every row named with its vector `d` and number
    /// `shift`, the sum over `j` of `w_j (sign (d·k_j − shift) + one)` times key or value `j`, and the sum of the weights alone.
    fn pass(
        &self,
        arith: &Arith,
        rows: &[usize],
        (d, shift): (&[C], &[C]),
        (sign, one): (C, C),
        values: Option<usize>,
    ) -> (Vec<C>, Vec<C>) {
        let stream = self.stream;
        let (n, width, all) = (rows.len(), stream.width, stream.rows.len());
        let out_width = values.unwrap_or(width);
        let zeros = vec![C::ZERO; out_width];
        let parts: Vec<(Vec<C>, Vec<C>, u64)> = stream
            .splits
            .par_iter()
            .with_max_len(1)
            .zip(&self.weights)
            .zip(&self.careful)
            .map(|((split, weights), &careful)| {
                let arith = Arith::new(stream.run.arch);
                let sums = |careful_values| {
                    let mut keys = vec![C::ZERO; TILE * width];
                    let mut others = vec![C::ZERO; if values.is_some() { TILE * out_width } else { 0 }];
                    let mut products = vec![C::ZERO; n * TILE];
                    let (mut sum, mut out) = (vec![C::ZERO; n], vec![C::ZERO; n * out_width]);
                    let mut spoilt = vec![false; n];
                    for (i, first, count) in Stream::<C>::tiles(split) {
                        if !stream.run.goes_on() {
                            break;
                        }
                        let (at, next) = ((first, count), first + count..split.end.min(first + count + TILE));
                        let mut next_keys = Ahead::new(stream, stream.inputs.k, next, 2);
                        stream.read(stream.inputs.k, &stream.origin, at, &mut keys, careful);
                        let mut next_values = Ahead::new(stream, stream.inputs.v, first..first + count, 2);
                        let mut ahead =
                            || if values.is_some() { next_values.some() } else { next_keys.some() };
                        ahead();
                        arith.arch.dispatch(Dots { rows: d, tile: &keys, width, products: &mut products });
                        ahead();
                        arith.count([n, TILE, stream.dim()]);
                        for (r, t) in products.chunks_exact_mut(TILE).enumerate() {
                            let w = &weights[(i * all + rows[r]) * TILE..][..TILE];
                            sum[r] += arith.arch.dispatch(Weigh { t, w, shift: shift[r], sign, one });
                        }
                        let right = if values.is_some() {
                            let bad = stream.read(stream.inputs.v, &zeros, at, &mut others, careful_values);
                            for (r, spoilt) in spoilt.iter_mut().enumerate() {
                                let row = &stream.rows[rows[r]];
                                *spoilt |= bad.iter().any(|&j| self.sees(row, first + j));
                            }
                            &others
                        } else {
                            &keys
                        };
                        if values.is_some() {
                            next_keys.some();
                        }
                        let left = Left { data: &products, row: TILE, col: 1 };
                        let right = Right { data: right, row: out_width };
                        arith.add_product([n, out_width, TILE], left, right, &mut out);
                        if values.is_some() {
                            next_keys.some();
                        }
                    }
                    for (out, _) in out.chunks_exact_mut(out_width).zip(spoilt).filter(|(_, spoilt)| *spoilt)
                    {
                        out.fill(C::NAN);
                    }
                    (sum, out)
                };
                let (sum, out) = match sums(false) {
                    (_, out) if values.is_some() && !out.iter().all(|x| x.is_finite()) => sums(true),
                    fine => fine,
                };
                (sum, out, arith.flop.get())
            })
            .collect();
        let (mut sum, mut out) = (vec![C::ZERO; n], vec![C::ZERO; n * out_width]);
        for (part_sum, part, flop) in parts {
            sum.iter_mut().zip(part_sum).for_each(|(all, one)| *all += one);
            out.iter_mut().zip(part).for_each(|(all, one)| *all += one);
            arith.flop.set(arith.flop.get() + flop);
        }
        (sum, out)
    }

    /// Whether a row sees a token; one that a bias of minus infinity hides it does not.
    fn sees(&self, row: &Row, token: usize) -> bool {
        let hidden = self.stream.inputs.bias.is_some_and(|bias| {
            let (b, h) =
                self.stream.inputs.attention.bias_place(bias.shape(), self.stream.place[0], row.head);
            bias.entry(b, h, token, 0) == C::NEG_INFINITY
        });
        row.visible.contains(token) && !hidden
    }

    /// `Σ_j p_j (1 − (k_j − k̄)·x) v_j` of every row, rows of `width` numbers.
    pub fn outputs(&self, arith: &Arith, x: &[C], width: usize) -> Vec<C> {
        let all: Vec<usize> = (0..self.stream.rows.len()).collect();
        let mut shift: Vec<C> = x
            .chunks_exact(self.stream.width)
            .zip(self.key_mean.chunks_exact(self.stream.width))
            .map(|(x, mean)| arith.dot(x, mean))
            .collect();
        // As `shifts` in `solve.rs`: where x is large, over the very products that it will be subtracted from.
        let large = C::of_f64(16.0) / self.stream.longest;
        let small = |x: &[C]| arith.dot(x, x) <= large * large;
        if !x.chunks_exact(self.stream.width).all(small) {
            let (sum, _) = self.pass(arith, &all, (x, &shift), (C::ONE, C::ZERO), None);
            for ((shift, sum), &inv) in shift.iter_mut().zip(sum).zip(&self.inv_sum) {
                *shift += sum * inv;
            }
        }
        let (_, mut out) = self.pass(arith, &all, (x, &shift), (-C::ONE, C::ONE), Some(width));
        for (out, &inv) in out.chunks_exact_mut(width).zip(&self.inv_sum) {
            out.iter_mut().for_each(|x| *x *= inv);
        }
        out
    }
}

impl<C: Real> Matrices<C> for Weighted<'_, C> {
    fn rows(&self) -> usize {
        self.stream.rows.len()
    }
    fn dim(&self) -> usize {
        self.stream.dim()
    }
    fn width(&self) -> usize {
        self.stream.width
    }
    fn keys(&self) -> usize {
        self.stream.keys()
    }
    fn inv_sum(&self) -> &[C] {
        &self.inv_sum
    }

    fn apply(&mut self, arith: &Arith, systems: &Systems<C>, rows: &[usize], d: &[C], out: &mut [C]) {
        let width = self.stream.width;
        let mean = |row: usize| &self.key_mean[row * width..][..width];
        let shift: Vec<C> =
            rows.iter().zip(d.chunks_exact(width)).map(|(&row, d)| arith.dot(d, mean(row))).collect();
        let (sum, image) =
            self.pass(arith, rows, (&d[..rows.len() * width], &shift), (C::ONE, C::ZERO), None);
        for (i, &row) in rows.iter().enumerate() {
            let out = &mut out[i * width..][..width];
            let inv = self.inv_sum[row];
            out.copy_from_slice(&image[i * width..][..width]);
            arith.combine(out, inv, -(sum[i] * inv), mean(row));
            arith.combine(out, C::ONE, systems.ridge[row], &d[i * width..][..width]);
        }
    }

    fn applies_cheaply(&self) -> bool {
        false
    }

    fn second_moments(&mut self, arith: &Arith, rows: &[usize], matrices: &mut [C]) {
        let (stream, width, dim, all) =
            (self.stream, self.stream.width, self.stream.dim(), self.stream.rows.len());
        if !self.moments.is_empty() {
            for (matrix, &row) in matrices.chunks_exact_mut(dim * width).zip(rows) {
                matrix.copy_from_slice(&self.moments[row * dim * width..][..dim * width]);
            }
            return;
        }
        let parts: Vec<(Vec<C>, u64)> = stream
            .splits
            .par_iter()
            .with_max_len(1)
            .zip(&self.weights)
            .zip(&self.careful)
            .map(|((split, weights), &careful)| {
                let arith = Arith::new(stream.run.arch);
                let (mut keys, mut scaled) = (vec![C::ZERO; TILE * width], vec![C::ZERO; TILE * width]);
                let mut sums = vec![C::ZERO; rows.len() * dim * width];
                for (i, first, count) in Stream::<C>::tiles(split) {
                    let next = first + count..split.end.min(first + count + TILE);
                    let steps = rows.len() * dim.div_ceil(MOMENT_ROWS);
                    let mut ahead = Ahead::new(stream, stream.inputs.k, next, steps);
                    stream.read(stream.inputs.k, &stream.origin, (first, count), &mut keys, careful);
                    for (sums, &row) in sums.chunks_exact_mut(dim * width).zip(rows) {
                        let weights = &weights[(i * all + row) * TILE..][..TILE];
                        let scale = RootScaled { tile: &keys, weights, out: &mut scaled, width };
                        arith.arch.dispatch(scale);
                        add_moments(&arith, &scaled, sums, [dim, width], || ahead.some());
                    }
                }
                (sums, arith.flop.get())
            })
            .collect();
        matrices.fill(C::ZERO);
        for (part, flop) in parts {
            matrices.iter_mut().zip(part).for_each(|(all, one)| *all += one);
            arith.flop.set(arith.flop.get() + flop);
        }
    }
}
