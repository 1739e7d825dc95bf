//! One KV head of one sequence, and some query rows that look at it: the passes over its keys and values.
//!
//! The keys are cut into splits by sizes alone, never by threads; every pass works on the splits in parallel and adds what they
//! give in their order. The last pass goes through them as the first did; what the caches still hold is found there.

use super::amx::{FirstPass, Sums};
use super::kernels::{Dots, ReadTile, RootScaled, Tokens};
use super::rows::Sum;
use super::weighted::{Path, Weighted};
use crate::cpu::block::{AddProduct, Arith};
use crate::cpu::product::{Left, Right};
use crate::cpu::rows::ReadRows;
use crate::cpu::rowwise::{RowExp, RowMax};
use crate::cpu::{LANES, Run, TILE, padded};
use crate::{Attention, Real, Visible};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of the matrix of second moments that are computed together, from their first column's register on.
pub const MOMENT_ROWS: usize = 16;
/// How far scores may rise above what weights are relative to before that is moved: `e^8` is far from any limit.
pub const RISE: f64 = 8.0;
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
    /// The reference key, which all keys are less by. Zero where keys differ by more than what they have in common.
    pub origin: Vec<C>,
    /// About the largest norm of a key less the reference.
    pub longest: C,
    /// The rows' queries times the scale.
    pub q: Vec<C>,
}

/// Tokens that will be read next, asked for a few at a time between products: all at once, products would wait for them; left to
/// the hardware, they would come only when read, since it does not look beyond what it has seen.
pub struct Ahead<'a, C> {
    from: &'a dyn ReadTile<C>,
    place: [usize; 2],
    tokens: Range<usize>,
    step: usize,
}

impl<'a, C: Real> Ahead<'a, C> {
    /// Of a tile, in so many steps.
    pub fn new(
        stream: &Stream<'a, C>,
        from: &'a dyn ReadTile<C>,
        tokens: Range<usize>,
        steps: usize,
    ) -> Self {
        Self { from, place: stream.place, tokens, step: TILE.div_ceil(steps) }
    }

    pub fn some(&mut self) {
        let next = self.tokens.start..self.tokens.end.min(self.tokens.start + self.step);
        self.tokens.start = next.end;
        if !next.is_empty() {
            self.from.prefetch(self.place, next);
        }
    }
}

/// What the first pass finds in a split; vectors of one number or one vector per row.
pub struct Found<C> {
    /// By tile and row.
    pub scores: Vec<C>,
    /// What weights are relative to.
    pub reference: Vec<C>,
    pub sum: Vec<C>,
    pub mean: Vec<C>,
    /// `Σ w (scale q·k) k` of one row whose scores have no bias, keys less the reference key; empty where it was not summed.
    pub image: Vec<C>,
    /// Upper halves, `dim` rows of `width` each; empty unless wanted.
    pub moments: Vec<C>,
    /// `Σ w k vᵀ`, `dim` rows of the values' padded width, and `Σ w v`. Empty where values were not looked at.
    pub cross: Vec<C>,
    pub value_sum: Vec<C>,
    /// The sum of squared weights, if the matrix unit was used.
    pub squares: C,
    /// Moments and products with values are yet to be [settled](FirstPass::settle).
    pub packed: bool,
    /// Rows that see a key or bias that is not finite.
    pub bad: Vec<bool>,
    careful: bool,
}

impl<C: Real> Found<C> {
    /// Of so many rows and tiles, with room for so many moments.
    pub fn new(rows: usize, tiles: usize, width: usize, moments: usize) -> Self {
        Self {
            scores: vec![C::ZERO; tiles * rows * TILE],
            reference: vec![C::NEG_INFINITY; rows],
            sum: vec![C::ZERO; rows],
            mean: vec![C::ZERO; rows * width],
            image: vec![],
            moments: vec![C::ZERO; moments],
            cross: vec![],
            value_sum: vec![],
            squares: C::ZERO,
            packed: false,
            bad: vec![false; rows],
            careful: false,
        }
    }

    /// Whether keys and biases were: something not finite in a key spoils every row's sums, even that of rows that do not see it.
    fn is_finite(&self) -> bool {
        [&self.sum, &self.mean, &self.image, &self.moments]
            .iter()
            .all(|values| values.iter().all(|x| x.is_finite()))
    }
}

impl<'a, C: Real> Stream<'a, C> {
    pub fn new(
        run: Run,
        inputs: &'a Inputs<'a, C>,
        place: [usize; 2],
        rows: &'a [Row],
        splits: Vec<Range<usize>>,
    ) -> Self {
        let width = padded(inputs.attention.head_dim(), LANES);
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
        this.find_origin();
        this
    }

    pub fn dim(&self) -> usize {
        self.inputs.attention.head_dim()
    }

    pub fn keys(&self) -> usize {
        self.splits.iter().map(|split| split.len()).sum()
    }

    /// The mean of a few finite keys, evenly spread.
    fn find_origin(&mut self) {
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
            let mut sorted: Vec<Vec<C>> = finite.iter().map(|key| key.to_vec()).collect();
            sort_columns(&mut sorted);
            let middle = &sorted[SAMPLES / 2];
            let far = |key: &[C]| key.iter().zip(middle).map(|(&x, &m)| (x - m) * (x - m)).sum::<C>();
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
        // Little would cancel then, and nothing is left to take away from each key.
        let common = self.origin.iter().map(|&x| x * x).sum::<C>();
        if common <= self.longest * self.longest {
            self.longest += common.root();
            self.origin.fill(C::ZERO);
        }
    }

    /// The reference key, if it is not zero.
    pub fn less(&self) -> Option<&[C]> {
        self.origin.iter().any(|&x| x != C::ZERO).then_some(&self.origin[..])
    }

    /// The tiles of a split: number, first token and how many.
    pub fn tiles(split: &Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> + use<C> {
        let split = split.clone();
        split.clone().step_by(TILE).enumerate().map(move |(i, first)| (i, first, TILE.min(split.end - first)))
    }

    /// Reads a tile of keys or values; rows beyond `count` become zeros. When careful, so do tokens that are not finite; they are
    /// returned.
    pub fn read(
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
    pub fn hide(&self, (first, count): (usize, usize), scores: &mut [C]) {
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
    pub fn add_bias(&self, (first, count): (usize, usize), scores: &mut [C], bad: &mut [bool]) {
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

    /// Scores of a tile become weights, whose sum this is.
    pub fn weigh(&self, arch: pulp::Arch, scores: &mut [C], reference: C) -> C {
        if reference == C::NEG_INFINITY {
            // No key seen yet; a NaN stays one.
            scores.iter_mut().for_each(|x| *x = if *x == C::NEG_INFINITY { C::ZERO } else { C::NAN });
            scores.iter().copied().sum()
        } else {
            arch.dispatch(RowExp(scores, reference))
        }
    }

    fn first_pass_of(&self, arith: &Arith, split: &Range<usize>, moments: bool, careful: bool) -> Found<C> {
        let (n, width, dim, arch) = (self.rows.len(), self.width, self.dim(), arith.arch);
        let room = if moments { n * dim * width } else { 0 };
        let mut found = Found { careful, ..Found::new(n, split.len().div_ceil(TILE), width, room) };
        let (mut keys, mut scaled) = (vec![C::ZERO; TILE * width], vec![C::ZERO; TILE * width]);
        let mut weights = vec![C::ZERO; n * TILE];
        let mut weighted_scores = [C::ZERO; TILE];
        let less = self.less();
        for (i, first, count) in Self::tiles(split) {
            if !self.run.goes_on() {
                break;
            }
            let next = first + count..split.end.min(first + count + TILE);
            let steps = 2 + if moments { n * dim.div_ceil(MOMENT_ROWS) } else { 0 };
            let mut ahead = Ahead::new(self, self.inputs.k, next, steps);
            // One row's products are made where the keys lie: to put them down first would take longer than to look at them twice.
            let in_place = n == 1 && !moments && !careful;
            let tokens = Tokens { place: self.place, range: first..first + count, origin: less };
            let in_place = in_place && {
                weights[count..].fill(C::ZERO);
                self.inputs.k.dots(arch, tokens.clone(), &self.q, &mut weights[..count])
            };
            let mut bad_keys = vec![];
            if !in_place {
                bad_keys = self.read(self.inputs.k, &self.origin, (first, count), &mut keys, careful);
                ahead.some();
                arch.dispatch(Dots { rows: &self.q, tile: &keys, width, products: &mut weights });
            }
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
                    found.image.iter_mut().for_each(|x| *x *= factor);
                    if moments {
                        let at = row * dim * width..(row + 1) * dim * width;
                        found.moments[at].iter_mut().for_each(|x| *x *= factor);
                    }
                }
                found.sum[row] += self.weigh(arch, scores, *reference);
            }
            if in_place {
                found.image.resize(if self.inputs.bias.is_none() { width } else { 0 }, C::ZERO);
                let scores = &found.scores[i * n * TILE..];
                for ((product, &w), &score) in weighted_scores.iter_mut().zip(&weights).zip(scores) {
                    *product = if w > C::ZERO { w * score } else { C::ZERO };
                }
                let mean = Sum { weights: &weights[..count], out: &mut found.mean };
                let image = Sum { weights: &weighted_scores[..count], out: &mut found.image };
                let image = (!image.out.is_empty()).then_some(image);
                arith.count([1 + usize::from(image.is_some()), width, TILE]);
                self.inputs.k.combine(arch, tokens, false, mean, image);
                continue;
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
    pub fn first_pass(&self, arith: &Arith, moments: bool) -> Weighted<'_, C>
    where
        C: FirstPass,
    {
        let (n, width) = (self.rows.len(), self.width);
        let mut found: Vec<(Found<C>, u64)> = self
            .splits
            .par_iter()
            .with_max_len(1)
            .map(|split| {
                let arith = Arith::new(self.run.arch);
                let fast = if moments && n == 1 { C::fast(self, &arith, split) } else { None };
                let mut found = fast.unwrap_or_else(|| self.first_pass_of(&arith, split, moments, false));
                if !found.is_finite() {
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
        // Moments can only be added as they are if all are alike.
        let packed = found.iter().all(|(found, _)| found.packed);
        for (found, _) in found.iter_mut().filter(|(found, _)| found.packed && !packed) {
            let Found { mean, moments, cross, .. } = found;
            C::settle(self, Sums { mean, moments, cross });
        }
        // Values that are not finite are for a pass that knows of them.
        let looked_at_values = found.iter().all(|(one, _)| {
            let sums = [&one.cross, &one.value_sum];
            sums.iter().all(|sums| !sums.is_empty() && sums.iter().all(|x| x.is_finite()))
        });
        let mut all = Weighted {
            stream: self,
            weights: vec![],
            weighed: false,
            inv_sum: vec![C::ZERO; n],
            key_mean: vec![C::ZERO; n * width],
            image: vec![],
            moments: vec![],
            coarse: found.iter().any(|(one, _)| !one.cross.is_empty()),
            squares: C::ZERO,
            cross: vec![],
            value_mean: vec![],
            bad: vec![false; n],
            careful: found.iter().map(|(found, _)| found.careful).collect(),
            path: Path::default(),
            reference,
        };
        let [size, cross_size, value_size] = match &found[..] {
            [(one, _), ..] if looked_at_values => {
                [one.moments.len() / n, one.cross.len(), one.value_sum.len()]
            }
            [(one, _), ..] => [one.moments.len() / n, 0, 0],
            [] => [0; 3],
        };
        let image_size = if found.iter().all(|(one, _)| !one.image.is_empty()) { width } else { 0 };
        // The first split's sums become those of all.
        for (i, (found, _)) in found.iter_mut().enumerate() {
            for row in 0..n {
                let own = found.reference[row];
                // A split in which the row sees nothing: −∞ − (−∞) would be NaN.
                let unseen = own == C::NEG_INFINITY && found.sum[row] == C::ZERO;
                let factor = if unseen { C::ZERO } else { (own - all.reference[row]).exponential() };
                all.inv_sum[row] += factor * found.sum[row];
                all.squares += factor * factor * found.squares;
                let pairs = [
                    (&mut all.key_mean, &mut found.mean, width),
                    (&mut all.image, &mut found.image, image_size),
                    (&mut all.moments, &mut found.moments, size),
                    (&mut all.cross, &mut found.cross, cross_size),
                    (&mut all.value_mean, &mut found.value_sum, value_size),
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
                if image_size > 0 {
                    all.image = std::mem::take(&mut found.image);
                }
                if looked_at_values {
                    all.cross = std::mem::take(&mut found.cross);
                    all.value_mean = std::mem::take(&mut found.value_sum);
                }
            }
        }
        all.inv_sum.iter_mut().for_each(|sum| *sum = if *sum == C::ZERO { C::ZERO } else { C::ONE / *sum });
        if packed && !all.moments.is_empty() {
            let Weighted { key_mean: mean, moments, cross, .. } = &mut all;
            C::settle(self, Sums { mean, moments, cross });
        }
        for (mean, &inv) in all.key_mean.chunks_exact_mut(width).zip(&all.inv_sum) {
            mean.iter_mut().for_each(|x| *x *= inv);
        }
        all.value_mean.iter_mut().for_each(|x| *x *= all.inv_sum[0]);
        all.image.iter_mut().for_each(|x| *x *= all.inv_sum[0]);
        all.weights = found.into_iter().map(|(found, _)| found.scores).collect();
        all
    }
}

/// Sorts every column of [`SAMPLES`] rows, all columns side by side: by Batcher's network of exchanges, odd-even merges of two, four and eight.
fn sort_columns<C: Real>(rows: &mut [Vec<C>]) {
    #[rustfmt::skip]
    const EXCHANGES: [[usize; 2]; 19] = [
        [0, 1], [2, 3], [4, 5], [6, 7],
        [0, 2], [1, 3], [4, 6], [5, 7],
        [1, 2], [5, 6],
        [0, 4], [1, 5], [2, 6], [3, 7],
        [2, 4], [3, 5],
        [1, 2], [3, 4], [5, 6],
    ];
    for places in EXCHANGES {
        let [low, high] = rows.get_disjoint_mut(places).expect("two of the rows");
        for (low, high) in low.iter_mut().zip(high.iter_mut()) {
            let (x, y) = (*low, *high);
            (*low, *high) = if y < x { (y, x) } else { (x, y) };
        }
    }
}

/// `moments += scaledᵀ scaled`, the upper half in steps of [`MOMENT_ROWS`].
/// `between` is called before each of them.
pub fn add_moments<C: Real>(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_is_sorted() {
        // A network that sorts all sequences of two values sorts all sequences (the zero-one principle).
        let bit = |i: usize, row: usize| f64::from(u8::from(i >> row & 1 == 1));
        let mut rows: Vec<Vec<f64>> =
            (0..SAMPLES).map(|row| (0..1 << SAMPLES).map(|i| bit(i, row)).collect()).collect();
        sort_columns(&mut rows);
        for i in 0..1usize << SAMPLES {
            let ones = i.count_ones() as usize;
            let column: Vec<f64> = rows.iter().map(|row| row[i]).collect();
            let want: Vec<f64> = (0..SAMPLES).map(|row| f64::from(u8::from(row >= SAMPLES - ones))).collect();
            assert_eq!(column, want, "{i:08b}");
        }
    }
}
