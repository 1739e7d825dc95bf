//! The forward of one block of query rows.

use super::block::{Arith, Bias, Buffers, Scores, Weights, at_least, bad_tokens};
use super::pack::Head;
use super::product::{Finish, Left, Right};
use super::rows::Inputs;
use super::simd::SimdReal;
use super::solve::{Block, Solved, Systems, shifts, solve};
use super::{Place, TILE};
use crate::{Attention, Real, Visible};
use pulp::Simd;

/// `w = p (1 + c − t)`, 0 where `p` is: from `t_j = x·k_j` to the weights of the output.
#[derive(Clone, Copy)]
struct OutputWeights<'a, T> {
    p: &'a [T],
    /// `1 + k̄·x`
    shift: &'a [T],
}

impl<T: SimdReal> Finish<T> for OutputWeights<'_, T> {
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        simd: S,
        row: usize,
        col: usize,
        mut t: [T::V<S>; N],
    ) -> [T::V<S>; N] {
        debug_assert!(row < self.shift.len() && (row + 1) * TILE <= self.p.len());
        // SAFETY: a block has as many shifts and rows of weights as the product has rows.
        unsafe {
            let shift = T::splat(simd, *self.shift.get_unchecked(row));
            let p = self.p.as_ptr().add(row * TILE + col);
            for (i, t) in t.iter_mut().enumerate() {
                let p = T::load::<S>(p.add(i * T::lanes::<S>()));
                *t = T::where_positive(simd, p, T::v_mul(simd, p, T::v_sub(simd, shift, *t)));
            }
        }
        t
    }
}

/// What a block gives: rows in order.
pub struct BlockForward<C> {
    pub out: Vec<C>,
    pub lse: Vec<C>,
    pub key_mean: Vec<C>,
    pub probe: Vec<C>,
    /// Distance of rows in `out`, and in `key_mean` and `probe`.
    pub widths: [usize; 2],
    pub solved: Solved,
    pub flop: u64,
    /// The largest norm of a probe times that of a key.
    pub reach: f64,
    pub largest_logit: f64,
}

/// The query rows of a block times the scale, and which of them are bad.
pub fn scaled_queries<C: Real>(inputs: &Inputs<C>, place: &Place, width: usize, q: &mut Vec<C>) -> Vec<bool> {
    let scale = C::of_f64(inputs.attention.scale());
    let q = at_least(q, place.rows.len() * width);
    q.fill(C::ZERO);
    let mut bad = vec![false; place.rows.len()];
    for ((row, bad), i) in q.chunks_exact_mut(width).zip(&mut bad).zip(place.rows.clone()) {
        *bad = !inputs.q.read(place.batch, place.head, i, row);
        row.iter_mut().for_each(|x| *x *= scale);
    }
    bad
}

/// The ridge of one query. A λ below the range of the arithmetic still is not 0.
pub fn ridge<C: Real>(attention: &Attention, batch: usize, head: usize, query: usize) -> C {
    C::of_f64(attention.ridge().at(batch, head, query).max(f32::MIN_POSITIVE.into()))
}

/// The ridge of every row of a block.
pub fn ridges<C: Real>(attention: &Attention, place: &Place) -> Vec<C> {
    place.rows.clone().map(|i| ridge(attention, place.batch, place.head, i)).collect()
}

/// The largest size of the rows' largest scores.
pub fn largest_logit<C: Real>(max: &[C]) -> f64 {
    max.iter().map(|max| max.as_f64().abs()).filter(|max| max.is_finite()).fold(0.0, f64::max)
}

pub fn forward<C: Real>(
    arch: pulp::Arch,
    inputs: &Inputs<C>,
    head: &Head<C>,
    bias: Option<&Bias<C>>,
    place: &Place,
    buffers: &mut Buffers<C>,
) -> BlockForward<C> {
    let arith = Arith::new(arch);
    let attention = inputs.attention;
    let (rows, dim, width) = (place.rows.len(), head.k.dim, head.k.width);
    let visible: Vec<Visible> =
        place.rows.clone().map(|i| attention.mask().visible(i, attention.keys())).collect();
    let Buffers { q, weights: cache, tile, .. } = buffers;
    let [tile, ..] = tile;

    let bad_q = scaled_queries(inputs, place, width, q);
    let scores = Scores { head, bias: bias.map(|bias| bias.values.as_slice()), q, width, visible: &visible };
    let mut key_mean = vec![];
    let mut weights = Weights::new(&arith, scores, cache, &mut key_mean);

    // δ = k̄ − q, both less the reference key. `residual` becomes δ − A x.
    let mut query = vec![C::ZERO; width];
    let mut residual = key_mean.clone();
    for (delta, i) in residual.chunks_exact_mut(width).zip(place.rows.clone()) {
        inputs.q.read(place.batch, place.head, i, &mut query);
        for ((delta, &q), &o) in delta.iter_mut().zip(&query).zip(&head.origin) {
            *delta -= q - o;
        }
    }
    let (mut x, mut bad_x) = (vec![C::ZERO; rows * width], vec![false; rows]);
    let solved = match inputs.probe {
        Some(probe) => {
            for ((row, x), i) in x.chunks_exact_mut(width).enumerate().zip(place.rows.clone()) {
                bad_x[row] = !probe.read(place.batch, place.head, i, x);
            }
            Solved { iterations: vec![0; rows], residual: vec![0.0; rows], direct: 0 }
        }
        None => {
            let ridge = ridges(attention, place);
            let systems =
                Systems { key_mean: &key_mean, ridge: &ridge, solver: attention.solver(), first: None };
            solve(&arith, &mut Block { weights: &mut weights, tile }, &systems, &mut residual, &mut x)
        }
    };

    // out = Σ p_j (1 − (k_j − k̄)·x) v_j
    let out_width = head.v.width;
    let mut out = vec![C::ZERO; rows * out_width];
    let mut shift = shifts(&arith, &mut weights, &key_mean, &x, tile);
    shift.iter_mut().for_each(|shift| *shift += C::ONE);
    let products = at_least(tile, rows * TILE);
    for t in weights.tiles.clone() {
        let p = weights.tile(&arith, t);
        let right = Right { data: head.k.tile_transposed(t), row: TILE };
        let finish = OutputWeights { p, shift: &shift };
        arith.product([rows, TILE, dim], Left { data: &x, row: width, col: 1 }, right, products, finish);
        let left = Left { data: products, row: TILE, col: 1 };
        arith.add_product(
            [rows, out_width, TILE],
            left,
            Right { data: head.v.tile(t), row: out_width },
            &mut out,
        );
    }

    let longest_probe = x.chunks_exact(width).map(|x| arith.dot(x, x).as_f64()).fold(0.0, f64::max).sqrt();
    let reach = longest_probe * head.k.longest.as_f64();
    let largest_logit = largest_logit(&weights.max);

    // Back to the caller's coordinates.
    let [bad_k, bad_v] = bad_tokens(head, bias);
    let mut lse = vec![C::NEG_INFINITY; rows];
    for row in 0..rows {
        let at = row * width..(row + 1) * width;
        let (out, mean) = (&mut out[row * out_width..][..out_width], &mut key_mean[at.clone()]);
        let inv = weights.inv_sum[row];
        if bad_q[row] || bad_k.seen(&visible[row]) {
            if visible[row].count() > 0 {
                lse[row] = C::NAN;
                for values in [out, mean, &mut x[at]] {
                    values.fill(C::NAN);
                }
            }
            continue;
        }
        if inv == C::ZERO {
            if inputs.probe.is_none() {
                x[at].fill(C::ZERO);
            }
            continue;
        }
        out.iter_mut().for_each(|x| *x *= inv);
        if bad_v.seen(&visible[row]) || bad_x[row] {
            out.fill(C::NAN);
        }
        if bad_x[row] {
            x[at.clone()].fill(C::NAN);
        }
        // Each logit was short by scale q·μ.
        let origin: C = head.origin.iter().zip(&weights.scores.q[at]).map(|(&o, &q)| o * q).sum();
        lse[row] = weights.max[row] - inv.logarithm() + origin;
        mean.iter_mut().zip(&head.origin).for_each(|(m, &o)| *m += o);
    }
    BlockForward {
        out,
        lse,
        key_mean,
        probe: x,
        widths: [out_width, width],
        solved,
        flop: arith.flop.get(),
        reach,
        largest_logit,
    }
}
