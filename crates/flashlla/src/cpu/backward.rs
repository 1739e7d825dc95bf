//! The backward, in two passes.
//!
//! The first goes over blocks of query rows: the second solve `A y = c`, `dq`, and a few numbers per row. The second goes over
//! tiles of keys and sums `dk` and `dv` over the queries that see them, in a fixed order, so that no two tasks write to one
//! place. Four products per pair of tiles are computed in both: keeping them would take N × M numbers.

use super::block::{Arith, Bias, Buffers, Scores, Weights, at_least, bad_tokens, exponentiate};
use super::forward::{largest_logit, ridges, scaled_queries};
use super::pack::Head;
use super::product::{Finish, Left, Plain, Right};
use super::rows::{Inputs, ReadRows};
use super::solve::{Block, Solved, Systems, shifts, solve};
use super::{LANES, Place, TILE, padded};
use crate::{Real, Visible};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// What the first pass leaves of a block: all that the second needs, and the gradients that are done.
pub struct BlockBackward<C> {
    pub place: Place,
    visible: Vec<Visible>,
    tiles: Range<usize>,
    /// Distance of rows in `q`, `x`, `minus_y`, `dq` and `dprobe`, and in `g`.
    pub width: usize,
    value_width: usize,
    /// Queries times the scale, output gradients, probes and `−y`. Rows that are not finite are zeros.
    q: Vec<C>,
    g: Vec<C>,
    x: Vec<C>,
    minus_y: Vec<C>,
    rows: Vec<RowNumbers<C>>,
    pub dq: Vec<C>,
    /// `−c`, when the probe was given.
    pub dprobe: Vec<C>,
    pub dridge: Vec<C>,
    pub dscale: C,
    pub largest_logit: f64,
    pub solved: Solved,
    pub flop: u64,
}

/// The numbers of one query row.
#[derive(Clone, Copy)]
struct RowNumbers<C> {
    max: C,
    inv_sum: C,
    /// `1 + k̄·x`, so that `a_j = one_plus_kx − k_j·x`.
    one_plus_kx: C,
    /// `k̄·y − γ̄`, so that `e_j = γ_j + shift_e − k_j·y`.
    shift_e: C,
    /// `m = Σ p_j e_j a_j`
    m: C,
    /// Whether the gradients of the keys and of the values that this row sees are NaN.
    spoils: [bool; 2],
}

/// Stores `γ` and adds up `Σ p γ`.
#[derive(Clone, Copy)]
struct SumWeighted<'a, T> {
    p: &'a [T],
    sum: *mut T,
}

impl<T: Real> Finish<T> for SumWeighted<'_, T> {
    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(
        self,
        simd: S,
        row: usize,
        col: usize,
        t: [T::V<S>; N],
    ) -> [T::V<S>; N] {
        debug_assert!((row + 1) * TILE <= self.p.len());
        let mut sum = T::splat(simd, T::ZERO);
        // SAFETY: `p` and `sum` have as many rows as the product.
        unsafe {
            let p = self.p.as_ptr().add(row * TILE + col);
            for (i, &t) in t.iter().enumerate() {
                let p = T::load::<S>(p.add(i * T::lanes::<S>()));
                sum = T::v_add(simd, sum, T::where_positive(simd, p, T::v_mul(simd, p, t)));
            }
            *self.sum.add(row) += T::reduce_sum(simd, sum);
        }
        t
    }
}

/// `w = p (γ − γ̄)` for a row of a tile, and its sum.
struct CentredWeights<'a, T> {
    p: &'a [T],
    gamma: &'a [T],
    mean: T,
    w: &'a mut [T],
}

impl<T: Real> WithSimd for CentredWeights<'_, T> {
    type Output = T;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> T {
        let Self { p, gamma, mean, w } = self;
        assert!(p.len() >= TILE && gamma.len() >= TILE && w.len() >= TILE);
        let (mean, mut sum) = (T::splat(simd, mean), T::splat(simd, T::ZERO));
        // SAFETY: rows of tiles have TILE columns, as just checked.
        unsafe {
            for j in (0..TILE).step_by(T::lanes::<S>()) {
                let p = T::load::<S>(p.as_ptr().add(j));
                let centred = T::v_sub(simd, T::load::<S>(gamma.as_ptr().add(j)), mean);
                let weighted = T::where_positive(simd, p, T::v_mul(simd, p, centred));
                T::store::<S>(w.as_mut_ptr().add(j), weighted);
                sum = T::v_add(simd, sum, weighted);
            }
        }
        T::reduce_sum(simd, sum)
    }
}

/// From `p_j`, `γ_j`, `k_j·x` and `−k_j·y` of a row of a tile to `ds_j` (in place of `γ`) and, if wanted, `−p_j e_j` and `p_j a_j`
/// (in place of the products).
struct PairGradients<'a, T> {
    numbers: &'a RowNumbers<T>,
    p: &'a [T],
    gamma: &'a mut [T],
    kx: &'a mut [T],
    minus_ky: &'a mut [T],
    all: bool,
}

impl<T: Real> WithSimd for PairGradients<'_, T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { numbers, p, gamma, kx, minus_ky, all } = self;
        assert!(p.len() >= TILE && gamma.len() >= TILE && kx.len() >= TILE && minus_ky.len() >= TILE);
        let splat = |x| T::splat(simd, x);
        let (one_plus_kx, shift_e, m) =
            (splat(numbers.one_plus_kx), splat(numbers.shift_e), splat(numbers.m));
        let (inv, zero) = (splat(numbers.inv_sum), splat(T::ZERO));
        // SAFETY: rows of tiles have TILE columns, as just checked.
        unsafe {
            for j in (0..TILE).step_by(T::lanes::<S>()) {
                let weight = T::load::<S>(p.as_ptr().add(j));
                let p = T::v_mul(simd, weight, inv);
                let a = T::v_sub(simd, one_plus_kx, T::load::<S>(kx.as_ptr().add(j)));
                let e = T::v_add(
                    simd,
                    T::v_add(simd, T::load::<S>(gamma.as_ptr().add(j)), shift_e),
                    T::load::<S>(minus_ky.as_ptr().add(j)),
                );
                let seen = |x| T::where_positive(simd, weight, x);
                let (pa, pe) = (seen(T::v_mul(simd, p, a)), seen(T::v_mul(simd, p, e)));
                // p (e a − m)
                let ds = seen(T::v_sub(simd, T::v_mul(simd, pe, a), T::v_mul(simd, p, m)));
                T::store::<S>(gamma.as_mut_ptr().add(j), ds);
                if all {
                    T::store::<S>(kx.as_mut_ptr().add(j), T::v_sub(simd, zero, pe));
                    T::store::<S>(minus_ky.as_mut_ptr().add(j), pa);
                }
            }
        }
    }
}

/// What stays the same for all blocks.
pub struct Call<'a, C> {
    pub arch: pulp::Arch,
    pub inputs: &'a Inputs<'a, C>,
    /// The forward's probe.
    pub probe: &'a dyn ReadRows<C>,
    pub grad_out: &'a dyn ReadRows<C>,
}

/// The first pass over one block.
pub fn rows<C: Real>(
    call: &Call<C>,
    head: &Head<C>,
    bias: Option<&Bias<C>>,
    place: &Place,
    buffers: &mut Buffers<C>,
) -> BlockBackward<C> {
    let arith = Arith::new(call.arch);
    let arith = &arith;
    let (inputs, attention) = (call.inputs, call.inputs.attention);
    let (n, dim, width) = (place.rows.len(), head.k.dim, head.k.width);
    let (value_dim, value_width) = (head.v.dim, head.v.width);
    let visible: Vec<Visible> =
        place.rows.clone().map(|i| attention.mask().visible(i, attention.keys())).collect();
    let Buffers { weights: cache, gamma: gamma_cache, tile: [tile, kx, ky, ds], .. } = buffers;

    let mut q = vec![];
    let bad_q = scaled_queries(inputs, place, width, &mut q);
    let (mut g, mut x) = (vec![C::ZERO; n * value_width], vec![C::ZERO; n * width]);
    let (mut bad_g, mut bad_x) = (vec![false; n], vec![false; n]);
    for (row, i) in place.rows.clone().enumerate() {
        let (b, h) = (place.batch, place.head);
        bad_g[row] = !call.grad_out.read(b, h, i, &mut g[row * value_width..][..value_width]);
        bad_x[row] = !call.probe.read(b, h, i, &mut x[row * width..][..width]);
    }

    let scores =
        Scores { head, bias: bias.map(|bias| bias.values.as_slice()), q: &q, width, visible: &visible };
    let mut key_mean = vec![];
    let mut weights = Weights::new(arith, scores, cache, &mut key_mean);
    let tiles = weights.tiles.clone();

    // γ_j = g·v_j, kept beside the weights, and γ̄
    let cached = weights.is_cached();
    let gamma_len = n * TILE;
    let gammas = at_least(gamma_cache, gamma_len * if cached { tiles.len().max(1) } else { 1 });
    let slot = |t: usize| if cached { (t - tiles.start) * gamma_len } else { 0 };
    let gamma_product = |t: usize, gamma: &mut [C], finish: Option<SumWeighted<C>>| {
        let left = Left { data: &g, row: value_width, col: 1 };
        let right = Right { data: head.v.tile_transposed(t), row: TILE };
        match finish {
            Some(finish) => arith.product([n, TILE, value_dim], left, right, gamma, finish),
            None => arith.product([n, TILE, value_dim], left, right, gamma, Plain),
        }
    };
    let mut gamma_mean = vec![C::ZERO; n];
    for t in tiles.clone() {
        let p = weights.tile(arith, t);
        let finish = SumWeighted { p, sum: gamma_mean.as_mut_ptr() };
        gamma_product(t, &mut gammas[slot(t)..][..gamma_len], Some(finish));
    }
    gamma_mean.iter_mut().zip(&weights.inv_sum).for_each(|(mean, &inv)| *mean *= inv);

    // c = Σ p_j (γ_j − γ̄)(k_j − k̄)
    let mut c = vec![C::ZERO; n * width];
    let mut sum = vec![C::ZERO; n];
    for t in tiles.clone() {
        let gamma = &mut gammas[slot(t)..][..gamma_len];
        if !cached {
            gamma_product(t, gamma, None);
        }
        let p = weights.tile(arith, t);
        let w = at_least(tile, n * TILE);
        for (row, sum) in sum.iter_mut().enumerate() {
            let at = row * TILE..(row + 1) * TILE;
            let w = &mut w[at.clone()];
            let (p, gamma) = (&p[at.clone()], &gamma[at]);
            *sum += arith.arch.dispatch(CentredWeights { p, gamma, mean: gamma_mean[row], w });
        }
        let left = Left { data: w, row: TILE, col: 1 };
        arith.add_product([n, width, TILE], left, Right { data: head.k.tile(t), row: width }, &mut c);
    }
    let means = key_mean.chunks_exact(width);
    for ((c, mean), (sum, &inv)) in
        c.chunks_exact_mut(width).zip(means).zip(sum.into_iter().zip(&weights.inv_sum))
    {
        arith.combine(c, inv, -(sum * inv), mean);
    }

    // A y = c; what is left of c is the residual. A given probe has y = 0.
    let mut y = vec![C::ZERO; n * width];
    let mut residual = c.clone();
    let ridge = ridges(attention, place);
    let given = inputs.probe.is_some();
    let solved = if given {
        Solved { iterations: vec![0; n], residual: vec![0.0; n], direct: 0 }
    } else {
        let systems = Systems { key_mean: &key_mean, ridge: &ridge, solver: attention.solver(), first: None };
        solve(arith, &mut Block { weights: &mut weights, tile }, &systems, &mut residual, &mut y)
    };

    let [bad_k, bad_v] = bad_tokens(head, bias);
    let kx_mean = shifts(arith, &mut weights, &key_mean, &x, tile);
    let ky_mean = shifts(arith, &mut weights, &key_mean, &y, tile);
    let mut dridge = vec![C::ZERO; n];
    let mut numbers = Vec::with_capacity(n);
    for row in 0..n {
        let at = row * width..(row + 1) * width;
        let (x_row, y_row) = (&mut x[at.clone()], &mut y[at.clone()]);
        // m = Σ p_j e_j a_j = −x·(c − C y), and c − C y = λ y + residual
        let xy = arith.dot(x_row, y_row);
        let mut row_numbers = RowNumbers {
            max: weights.max[row],
            inv_sum: weights.inv_sum[row],
            one_plus_kx: C::ONE + kx_mean[row],
            shift_e: ky_mean[row] - gamma_mean[row],
            m: -(ridge[row] * xy + arith.dot(x_row, &residual[at.clone()])),
            spoils: [false, false],
        };
        if !given {
            dridge[row] = xy;
        }
        if weights.inv_sum[row] == C::ZERO && visible[row].count() > 0 && !bad_q[row] {
            // Every key hidden by its bias: as if it saw none.
        } else if visible[row].count() > 0 {
            let finite = [row_numbers.one_plus_kx, row_numbers.shift_e, row_numbers.m, row_numbers.inv_sum]
                .iter()
                .chain(&*x_row)
                .chain(&*y_row)
                .all(|x| x.is_finite());
            let spoilt = !finite || bad_q[row] || bad_g[row] || bad_x[row] || bad_k.seen(&visible[row]);
            row_numbers.spoils = [spoilt || bad_v.seen(&visible[row]), spoilt];
            if spoilt {
                // Out of every product: a weight of 0 does not keep a NaN out.
                row_numbers.max = C::NEG_INFINITY;
                x_row.fill(C::ZERO);
                y_row.fill(C::ZERO);
            }
        }
        numbers.push(row_numbers);
    }

    // dq = y + scale Σ ds_j k_j,  dscale = q · Σ ds_j k_j
    let minus_y: Vec<C> = y.iter().map(|&y| -y).collect();
    let mut dq = vec![C::ZERO; n * width];
    for t in tiles.clone() {
        let (kx, ky, ds) = (at_least(kx, n * TILE), at_least(ky, n * TILE), at_least(ds, n * TILE));
        let right = Right { data: head.k.tile_transposed(t), row: TILE };
        arith.product([n, TILE, dim], Left { data: &x, row: width, col: 1 }, right, kx, Plain);
        arith.product([n, TILE, dim], Left { data: &minus_y, row: width, col: 1 }, right, ky, Plain);
        if cached {
            ds.copy_from_slice(&gammas[slot(t)..][..gamma_len]);
        } else {
            gamma_product(t, ds, None);
        }
        pair_gradients(arith, &numbers, weights.tile(arith, t), ds, kx, ky, false);
        let left = Left { data: ds, row: TILE, col: 1 };
        arith.add_product([n, width, TILE], left, Right { data: head.k.tile(t), row: width }, &mut dq);
    }
    let scale = C::of_f64(attention.scale());
    let mut dscale = C::ZERO;
    let mut query = vec![C::ZERO; width];
    for (row, i) in place.rows.clone().enumerate() {
        let at = row * width..(row + 1) * width;
        inputs.q.read(place.batch, place.head, i, &mut query);
        dscale += arith.dot(&query, &dq[at.clone()]);
        arith.combine(&mut dq[at.clone()], scale, C::ONE, &y[at.clone()]);
        if numbers[row].spoils[0] {
            dq[at.clone()].fill(C::NAN);
            c[at].fill(C::NAN);
            dridge[row] = if given { C::ZERO } else { C::NAN };
            dscale = C::NAN;
        }
    }
    let dprobe = if given { c.iter().map(|&c| -c).collect() } else { vec![] };
    let largest_logit = largest_logit(&weights.max);
    drop(weights);
    let flop = arith.flop.get();
    BlockBackward {
        place: place.clone(),
        visible,
        tiles,
        width,
        value_width,
        q,
        g,
        x,
        minus_y,
        rows: numbers,
        dq,
        dprobe,
        dridge,
        dscale,
        largest_logit,
        solved,
        flop,
    }
}

fn pair_gradients<C: Real>(
    arith: &Arith,
    numbers: &[RowNumbers<C>],
    p: &[C],
    gamma: &mut [C],
    kx: &mut [C],
    minus_ky: &mut [C],
    all: bool,
) {
    let tiles = p.chunks_exact(TILE).zip(gamma.chunks_exact_mut(TILE));
    let products = kx.chunks_exact_mut(TILE).zip(minus_ky.chunks_exact_mut(TILE));
    for ((numbers, (p, gamma)), (kx, minus_ky)) in numbers.iter().zip(tiles).zip(products) {
        arith.arch.dispatch(PairGradients { numbers, p, gamma, kx, minus_ky, all });
    }
}

/// The gradients of one tile of keys.
pub struct TileBackward<C> {
    /// `TILE` rows of the keys' and of the values' packed widths.
    pub dk: Vec<C>,
    pub dv: Vec<C>,
    /// For each query head of the group: the gradient of the bias of the tile's keys.
    pub dbias: Vec<Vec<C>>,
    pub flop: u64,
}

/// The second pass over one tile of keys: `blocks` are those of the query heads that read them, by head.
pub fn keys<C: Real>(
    arch: pulp::Arch,
    head: &Head<C>,
    biases: &[Option<&Bias<C>>],
    blocks: &[&[BlockBackward<C>]],
    t: usize,
    buffers: &mut Buffers<C>,
) -> TileBackward<C> {
    let arith = &Arith::new(arch);
    let (dim, width) = (head.k.dim, head.k.width);
    let value_width = padded(head.v.dim, LANES);
    let [p, gamma, kx, ky] = &mut buffers.tile;
    let mut done = TileBackward {
        dk: vec![C::ZERO; TILE * width],
        dv: vec![C::ZERO; TILE * value_width],
        dbias: vec![],
        flop: 0,
    };
    for (&bias, &blocks) in biases.iter().zip(blocks) {
        let mut dbias = vec![C::ZERO; TILE];
        for block in blocks.iter().filter(|block| block.tiles.contains(&t)) {
            let n = block.place.rows.len();
            let [p, gamma, kx, ky] =
                [&mut *p, &mut *gamma, &mut *kx, &mut *ky].map(|tile| at_least(tile, n * TILE));
            let values = bias.map(|bias| bias.values.as_slice());
            let scores = Scores { head, bias: values, q: &block.q, width, visible: &block.visible };
            scores.compute(arith, t, p);
            for (row, numbers) in p.chunks_exact_mut(TILE).zip(&block.rows) {
                exponentiate(arith, row, &[numbers.max], |_, _| ());
            }
            let right = Right { data: head.v.tile_transposed(t), row: TILE };
            let left = Left { data: &block.g, row: block.value_width, col: 1 };
            arith.product([n, TILE, head.v.dim], left, right, gamma, Plain);
            let right = Right { data: head.k.tile_transposed(t), row: TILE };
            arith.product([n, TILE, dim], Left { data: &block.x, row: width, col: 1 }, right, kx, Plain);
            arith.product(
                [n, TILE, dim],
                Left { data: &block.minus_y, row: width, col: 1 },
                right,
                ky,
                Plain,
            );
            pair_gradients(arith, &block.rows, p, gamma, kx, ky, true);
            let (ds, minus_pe, pa) = (gamma, kx, ky);

            // dk_j = Σ ds_j (scale q) − p_j e_j x − p_j a_j y,  dv_j = Σ p_j a_j g
            for (weights, rows) in [(&*ds, &block.q), (&*minus_pe, &block.x), (&*pa, &block.minus_y)] {
                let left = Left { data: weights, row: 1, col: TILE };
                arith.add_product([TILE, width, n], left, Right { data: rows, row: width }, &mut done.dk);
            }
            let left = Left { data: pa, row: 1, col: TILE };
            arith.add_product(
                [TILE, value_width, n],
                left,
                Right { data: &block.g, row: value_width },
                &mut done.dv,
            );
            if bias.is_some() {
                for ds in ds.chunks_exact(TILE) {
                    arith.combine(&mut dbias, C::ONE, C::ONE, ds);
                }
            }
        }
        done.dbias.push(dbias);
    }
    done.flop = arith.flop.get();
    done
}

/// For every key: whether its own gradient and that of its value are NaN, because a query of one head that sees it is not
/// finite. A key hidden by its bias is not seen.
pub fn spoilt<C: Real>(keys: usize, hidden: Option<&[bool]>, blocks: &[BlockBackward<C>]) -> [Vec<bool>; 2] {
    [0, 1].map(|which| {
        let mut counts = vec![0i64; keys + 1];
        let mut skipped = vec![0i64; keys + 1];
        for block in blocks {
            for (_, visible) in block.rows.iter().zip(&block.visible).filter(|(row, _)| row.spoils[which]) {
                counts[visible.start] += 1;
                counts[visible.end] -= 1;
                if let Some(own) = visible.skip {
                    skipped[own] += 1;
                }
            }
        }
        let mut seen_by = 0;
        (0..keys)
            .map(|j| {
                seen_by += counts[j];
                seen_by > skipped[j] && !hidden.is_some_and(|hidden| hidden[j])
            })
            .collect()
    })
}
