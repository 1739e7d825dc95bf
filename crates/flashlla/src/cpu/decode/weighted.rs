//! What follows the first pass: passes over keys, or keys and values, with softmax weights that are known.

use super::amx;
use super::kernels::{Dots, RootScaled, Step, Tokens, Weigh};
use super::rows::{FEW, Sum, by_few};
use super::stream::{Ahead, MOMENT_ROWS, Row, Stream, add_moments};
use crate::Real;
use crate::cpu::TILE;
use crate::cpu::block::Arith;
use crate::cpu::product::{Left, Right};
use crate::cpu::rowwise::RowExp;
use crate::cpu::solve::{Matrices, Systems, rounding};
use rayon::prelude::*;

/// What moments from the matrix unit may do to a residual, or to an output, before the keys themselves are asked.
const COARSE: f64 = 2e-5;

/// The softmax weights of all rows, and what was summed on the way to them.
pub struct Weighted<'a, C> {
    pub stream: &'a Stream<'a, C>,
    /// Of every split, by tile and row, relative to `reference`; scores until they were [weighed](Weighted::weigh).
    pub weights: Vec<Vec<C>>,
    pub weighed: bool,
    pub reference: Vec<C>,
    pub inv_sum: Vec<C>,
    /// Less the reference key.
    pub key_mean: Vec<C>,
    /// `Σ p (scale q·k) k` of one row, keys less the reference key, if it was summed.
    pub image: Vec<C>,
    /// Second moments of the rows, if they were wanted.
    pub moments: Vec<C>,
    /// Moments of some split come from the matrix unit.
    pub coarse: bool,
    /// The sum of squared weights then.
    pub squares: C,
    /// `Σ w k vᵀ` with keys less the reference key, `dim` rows, and the mean value. Empty where values were not looked at, or not all
    /// are finite.
    pub cross: Vec<C>,
    pub value_mean: Vec<C>,
    pub bad: Vec<bool>,
    /// Some key of a split is not finite: its rows are read as zeros.
    pub careful: Vec<bool>,
    /// What steps along single vectors found of the tokens' products with them.
    pub path: Path<C>,
}

/// The way from 0 to a row's solution, in steps along vectors whose products with all keys are known: so are the solution's, without another
/// look at the keys.
#[derive(Default)]
pub struct Path<C> {
    /// The sum of steps so far. Where this is not the solution, the products below are not its products.
    x: Vec<C>,
    /// By split and token: products with the sum of the steps before the last one, and those with the last step's vector. Keys are less
    /// the mean key.
    products: Vec<[Vec<C>; 2]>,
    /// How long the last step was, and the mean key's product where the vector is the query: scores are then its products.
    last: C,
    query: Option<C>,
}

impl<C: Real> Path<C> {
    /// Takes the last step's products to those of the steps before it.
    fn settle(arith: &Arith, [sum, last]: &mut [Vec<C>; 2], length: C) {
        if length != C::ZERO {
            arith.combine(sum, C::ONE, length, last);
        }
    }
}

impl<C: Real> Weighted<'_, C> {
    /// Scores become weights, when they are wanted first.
    fn weigh(&mut self) {
        if std::mem::replace(&mut self.weighed, true) {
            return;
        }
        let (n, arch, reference) = (self.stream.rows.len(), self.stream.run.arch, &self.reference);
        if let Some(mean) = self.path.query.take() {
            let length = std::mem::replace(&mut self.path.last, C::ZERO);
            let of = |scores: &Vec<C>| scores.iter().map(|&score| length * (score - mean)).collect();
            self.path.products =
                self.weights.iter().map(|scores| [of(scores), vec![C::ZERO; scores.len()]]).collect();
        }
        self.weights.par_iter_mut().with_max_len(1).for_each(|scores| {
            for (i, scores) in scores.chunks_exact_mut(TILE).enumerate() {
                if reference[i % n] == C::NEG_INFINITY {
                    scores.fill(C::ZERO);
                } else {
                    arch.dispatch(RowExp(scores, reference[i % n]));
                }
            }
        });
    }

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
                let sums = |careful_values: bool| {
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

    /// The only row's query times the scale, and what the matrix makes of it, if the first pass has summed that.
    pub fn image_of_query(&self, arith: &Arith, ridge: &[C]) -> Option<[Vec<C>; 2]> {
        let query = &self.stream.q;
        let mut image = (!self.image.is_empty()).then(|| self.image.clone())?;
        arith.combine(&mut image, C::ONE, -arith.dot(query, &self.key_mean), &self.key_mean);
        arith.combine(&mut image, C::ONE, ridge[0], query);
        Some([query.clone(), image])
    }

    /// What a [pass](Self::pass) over keys alone does for the only row, with keys where they lie, if they can be used there. It keeps their products
    /// with `d`.
    fn step_in_place(&mut self, arith: &Arith, d: &[C], shift: C) -> Option<(Vec<C>, Vec<C>)> {
        let Stream { inputs, place, ref origin, ref splits, run, .. } = *self.stream;
        if self.stream.rows.len() > 1 || self.careful.contains(&true) {
            return None;
        }
        let less = self.stream.less();
        let Path { products, last, .. } = &mut self.path;
        if products.is_empty() {
            products.extend(self.weights.iter().map(|w| [vec![C::ZERO; w.len()], vec![C::ZERO; w.len()]]));
        }
        let length = std::mem::replace(last, C::ZERO);
        let parts: Option<Vec<(C, Vec<C>)>> = splits
            .par_iter()
            .with_max_len(1)
            .zip(&self.weights)
            .zip(products)
            .map(|((split, weights), products)| {
                let arith = Arith::new(run.arch);
                Path::settle(&arith, products, length);
                let [_, products] = products;
                let (mut sum, mut out) = (C::ZERO, vec![C::ZERO; origin.len()]);
                for (i, first, count) in Stream::<C>::tiles(split) {
                    if !run.goes_on() {
                        break;
                    }
                    let tokens = Tokens { place, range: first..first + count, origin: less };
                    let tile = i * TILE..(i + 1) * TILE;
                    let (w, t) = (&weights[tile.clone()], &mut products[tile]);
                    sum += inputs.k.step(run.arch, tokens, Step { d, w, shift, t, out: &mut out })?;
                }
                Some((sum, out))
            })
            .collect();
        let Some(parts) = parts else {
            self.path = Path::default();
            return None;
        };
        let (mut sum, mut out) = (C::ZERO, vec![C::ZERO; origin.len()]);
        for (part, image) in parts {
            sum += part;
            out.iter_mut().zip(image).for_each(|(out, x)| *out += x);
        }
        arith.count([2, self.stream.keys(), self.stream.dim()]);
        Some((vec![sum], out))
    }

    /// The output of the only row, with values, and keys if need be, where they lie, if they can be used there and all are finite.
    ///
    /// It is `Σ p_j (1 − (t_j − s)) v_j` with `t_j = k_j·x` and `s = Σ p_j t_j`, over these very products (see [`shifts`]). Where `x` was reached
    /// by steps that have looked at the keys, the products are known, and so is `s`. If not, `near` is taken for it, and what that errs by, times the mean
    /// value, is added.
    ///
    /// [`shifts`]: crate::cpu::solve::shifts
    fn output_in_place(&mut self, arith: &Arith, x: &[C], near: C, width: usize) -> Option<Vec<C>> {
        let Stream { inputs, place, ref splits, run, .. } = *self.stream;
        if self.stream.rows.len() > 1 || self.careful.contains(&true) {
            return None;
        }
        let less = self.stream.less();
        let Path { x: reached, mut products, last, .. } = std::mem::take(&mut self.path);
        let known = reached == x && products.len() == splits.len();
        let [one, zero] = [C::ONE, C::ZERO];
        let shift = if known {
            let sums: Vec<C> = products
                .par_iter_mut()
                .with_max_len(1)
                .zip(&self.weights)
                .map(|(products, weights)| {
                    Path::settle(&Arith::new(run.arch), products, last);
                    let ([t, room], w) = (products, &weights[..]);
                    room.copy_from_slice(t);
                    run.arch.dispatch(Weigh { t: room, w, shift: zero, sign: one, one: zero })
                })
                .collect();
            sums.into_iter().sum::<C>() * self.inv_sum[0]
        } else {
            near
        };
        let zeros = vec![zero; width];
        let parts: Option<Vec<[Vec<C>; 3]>> = splits
            .par_iter()
            .with_max_len(1)
            .zip(&self.weights)
            .enumerate()
            .map(|(split_number, (split, weights))| {
                let (mut out, mut mean, mut off) = (zeros.clone(), zeros.clone(), zero);
                let mut t = [zero; FEW];
                for (i, first, count) in Stream::<C>::tiles(split) {
                    if !run.goes_on() {
                        break;
                    }
                    for (few, range) in by_few(first..first + count) {
                        let at = i * TILE + few.start..i * TILE + few.end;
                        let (w, count) = (&weights[at.clone()], range.len());
                        let keys = Tokens { place, range, origin: less };
                        let values = Tokens { origin: None, ..keys.clone() };
                        let done = if known {
                            t.copy_from_slice(&products[split_number][0][at]);
                            run.arch.dispatch(Weigh { t: &mut t, w, shift, sign: -one, one });
                            let sum = Sum { weights: &t[..count], out: &mut out };
                            inputs.v.combine(run.arch, values, true, sum, None)
                        } else {
                            t[count..].fill(zero);
                            inputs.k.dots(run.arch, keys, x, &mut t[..count]) && {
                                off += run.arch.dispatch(Weigh { t: &mut t, w, shift, sign: one, one: zero });
                                t.iter_mut().zip(w).for_each(|(t, &w)| *t = w - *t);
                                let sum = Sum { weights: &t[..count], out: &mut out };
                                let other = Sum { weights: &w[..count], out: &mut mean };
                                inputs.v.combine(run.arch, values, true, sum, Some(other))
                            }
                        };
                        if !done {
                            return None;
                        }
                    }
                }
                Some([out, mean, vec![off]])
            })
            .collect();
        let mut sums = [zeros.clone(), zeros, vec![zero]];
        for part in parts? {
            for (sum, part) in sums.iter_mut().zip(part) {
                sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        }
        let keys = self.stream.keys();
        if !known {
            arith.count([1, keys, self.stream.dim()]);
        }
        arith.count([if known { 1 } else { 2 }, keys, width]);
        let ([mut out, mean, off], inv) = (sums, self.inv_sum[0]);
        arith.combine(&mut out, inv, off[0] * inv * inv, &mean);
        out.iter().all(|x| x.is_finite()).then_some(out)
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
    pub fn outputs(&mut self, arith: &Arith, x: &[C], width: usize) -> Vec<C> {
        if !self.cross.is_empty() && self.reach(arith, x) * self.epsilon() <= COARSE {
            return self.outputs_of_moments(arith, x, width);
        }
        self.weigh();
        let all: Vec<usize> = (0..self.stream.rows.len()).collect();
        let mut shift: Vec<C> = x
            .chunks_exact(self.stream.width)
            .zip(self.key_mean.chunks_exact(self.stream.width))
            .map(|(x, mean)| arith.dot(x, mean))
            .collect();
        if let Some(out) = self.output_in_place(arith, x, shift[0], width) {
            return out;
        }
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

impl<C: Real> Weighted<'_, C> {
    /// What moments from the matrix unit are off by: errors of single terms cancel over as many keys as share the weight.
    fn epsilon(&self) -> f64 {
        amx::EPSILON * self.squares.as_f64().sqrt() * self.inv_sum[0].as_f64()
    }

    /// The largest product of a probe's norm and about that of the farthest key.
    fn reach(&self, arith: &Arith, x: &[C]) -> f64 {
        let longest = x.chunks_exact(self.stream.width).map(|x| arith.dot(x, x).as_f64()).fold(0.0, f64::max);
        longest.sqrt() * self.stream.longest.as_f64()
    }

    /// `v̄ − Cov(v, k) x`, for one row.
    fn outputs_of_moments(&self, arith: &Arith, x: &[C], width: usize) -> Vec<C> {
        let inv = self.inv_sum[0];
        let shift = arith.dot(x, &self.key_mean);
        let mut out: Vec<C> = self.value_mean.iter().map(|&mean| mean + shift * mean).collect();
        for (cross, &x) in self.cross.chunks_exact(width).zip(x) {
            arith.combine(&mut out, C::ONE, -(x * inv), cross);
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
        self.weigh();
        let width = self.stream.width;
        let at = |row: usize| row * width..(row + 1) * width;
        let mean = |row: usize| &self.key_mean[at(row)];
        let shift: Vec<C> =
            rows.iter().zip(d.chunks_exact(width)).map(|(&row, d)| arith.dot(d, mean(row))).collect();
        let d = &d[..rows.len() * width];
        let in_place = self.step_in_place(arith, d, shift[0]);
        let (sum, image) =
            in_place.unwrap_or_else(|| self.pass(arith, rows, (d, &shift), (C::ONE, C::ZERO), None));
        for (i, &row) in rows.iter().enumerate() {
            let out = &mut out[i * width..][..width];
            let inv = self.inv_sum[row];
            out.copy_from_slice(&image[i * width..][..width]);
            arith.combine(out, inv, -(sum[i] * inv), &self.key_mean[at(row)]);
            arith.combine(out, C::ONE, systems.ridge[row], &d[i * width..][..width]);
        }
    }

    fn moved(&mut self, arith: &Arith, _: usize, length: C, d: &[C]) {
        if self.stream.rows.len() > 1 {
            return;
        }
        let x = &mut self.path.x;
        if x.is_empty() {
            x.resize(d.len(), C::ZERO);
        }
        arith.combine(x, C::ONE, length, d);
        self.path.last = length;
        if !self.weighed {
            self.path.query = Some(arith.dot(d, &self.key_mean));
        }
    }

    // Passes of one row wait for memory: measured on two AVX-512 cores, contexts of 32,768, between 1.6 (`bf16`, D = 128) and 4 (`f32`, D = 128), 2 at D = 64.
    fn slowness(&self) -> f64 {
        if self.rows() == 1 { 2.0 } else { 1.0 }
    }

    fn applies_cheaply(&self) -> bool {
        false
    }

    fn moments_error(&self) -> [f64; 2] {
        if self.coarse { [self.epsilon(), COARSE] } else { rounding::<C>() }
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
        self.weigh();
        let parts: Vec<(Vec<C>, u64)> = self
            .stream
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
