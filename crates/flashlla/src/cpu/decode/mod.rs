//! Decoding: a few query rows against a long cache, which is read where it lies.
//!
//! One task is a KV head of a sequence with up to [`ROWS`] of the query rows that look at it (`stream.rs` has the first of its passes, `weighted.rs` the others):
//!
//! 1. One pass over the keys gives scores, softmax weights and the mean key.
//! 2. `(C + λI) x = δ` is solved, in one of two ways. *Moments*: the first pass sums the weighted products of the keys' coordinates
//!    too, D (D + 1) flop per key and row, and one Cholesky factorisation does the rest. *Conjugate gradients*: the first pass does
//!    not, and each step is one more pass over the keys, 4 D flop per key and row.
//! 3. One pass over keys and values gives the outputs.
//!
//! A row that is alone reads tokens in registers where they lie (`rows.rs`), and its first pass makes the first step of conjugate gradients too: that step is along
//! the query, and `Σ p (k·q) k` needs no pass of its own. Nor does its last pass need keys: the output asks for their products with the solution, which is a sum of steps
//! along vectors whose products with all keys are known ([`weighted::Path`]).
//!
//! After moments, summing `Σ w_j v_j k_jᵀ` as well would save the keys of the last pass, but costs twice the arithmetic of the moments; the keys
//! cost 4 D flop per row, and are often still in a cache. A matrix unit makes that arithmetic cheap: where there is one, one query row is
//! done in one pass (`amx/`).

mod amx;
mod kernels;
mod rows;
mod stream;
mod weighted;

use super::block::Arith;
use super::forward::{largest_logit, ridge};
use super::rows::ReadRows;
use super::solve::{Solved, Systems, solve};
use super::tasks::{BlockReport, Sinks, gathered};
use super::{LANES, Run, TILE, Targets, is_hard, padded};
use crate::decoding::check_out;
use crate::{Attention, Decoding, Element, Error, Precision, Real, Result, Solver, State, Tensor, ViewMut};
use amx::FirstPass;
pub use amx::Unit;
use kernels::Pool;
use rayon::prelude::*;
use std::ops::Range;
use stream::{Inputs, Row, Stream};

/// The most query rows of a task: their scores stay small beside the keys, and a tile of keys is read once for all.
const ROWS: usize = 16;
/// Tasks that a call is cut into if it has fewer heads, as long as each has [`LEAST_KEYS`].
const TASKS: usize = 256;
/// The fewest keys of a split.
const LEAST_KEYS: usize = 2048;

/// A KV head of a sequence, the query rows that look at it, and how the keys that they see are split.
#[derive(Debug, Clone)]
struct Task {
    place: [usize; 2],
    rows: Vec<Row>,
    splits: Vec<Range<usize>>,
}

fn tasks<T: Element>(decoding: &Decoding<T>) -> Vec<Task> {
    let a = decoding.attention();
    let per_head = a.group() * a.queries();
    let heads = a.batch() * a.kv_heads() * per_head.div_ceil(ROWS);
    let mut tasks = Vec::with_capacity(heads);
    for sequence in 0..a.batch() {
        for kv_head in 0..a.kv_heads() {
            for first in (0..per_head).step_by(ROWS) {
                let rows: Vec<Row> = (first..per_head.min(first + ROWS))
                    .map(|i| {
                        let (head, query) = (kv_head * a.group() + i / a.queries(), i % a.queries());
                        Row { head, query, visible: decoding.visible(sequence, query) }
                    })
                    .collect();
                let splits = splits(&rows, heads);
                tasks.push(Task { place: [sequence, kv_head], rows, splits });
            }
        }
    }
    tasks
}

/// The keys that some rows see, in pieces. They depend on the call alone, not on the threads there are.
fn splits(rows: &[Row], heads: usize) -> Vec<Range<usize>> {
    let seen = || rows.iter().map(|row| &row.visible).filter(|v| v.start < v.end);
    let first = seen().map(|v| v.start).min().unwrap_or(0);
    let last = seen().map(|v| v.end).max().unwrap_or(0);
    let pieces = TASKS.div_ceil(heads).min((last - first) / LEAST_KEYS).max(1);
    let size = (last - first).div_ceil(pieces).next_multiple_of(TILE).max(TILE);
    (first..last).step_by(size).map(|at| at..last.min(at + size)).collect()
}

/// Whether the first pass is to sum second moments.
///
/// For one row per KV head and `f32` arithmetic it is if a matrix unit makes them cheap (they then take 0.6 to 0.7 times what conjugate gradients to 1e-6 take
/// that put tiles of keys down; contexts of 32,768, λ = 1), or the dimension does. Otherwise conjugate gradients that read keys where they lie
/// come first. Measured on two AVX-512 cores at 32,768, `bf16` and `f32`, they take 0.58 and 0.65 (D = 64) and 0.38 and 0.60 times (D = 128) what moments
/// take at λ = 1, 0.65 and 0.69, 0.43 and 0.87 at λ = 0.1; at D = 32 they are even there, and at 24 moments are faster. How many steps they would take is known
/// after the first pass, which makes one, and where that is slower moments are summed in a second pass (`slowness` in `weighted.rs`). Few keys do not pay for a
/// factorisation: that limit is an estimate from operation counts, not measured.
fn sums_moments<C: FirstPass>(run: Run, a: &Attention, rows: usize, keys: usize) -> bool {
    let cheap = C::has_unit(run) || size_of::<C>() == size_of::<f64>() || a.head_dim() < 32;
    match a.solver() {
        Solver::Direct => true,
        Solver::Cg { .. } => false,
        Solver::Auto { .. } => cheap && rows == 1 && a.head_dim() <= 128 && keys >= 8 * a.head_dim(),
    }
}

pub fn decode_into<T: Element, O: Element>(
    run: Run,
    decoding: &Decoding<T>,
    out: ViewMut<O>,
) -> Result<State<T::Acc>> {
    check_out(decoding, &out)?;
    let a = decoding.attention();
    let rows = [a.batch(), a.heads(), a.queries()];
    let mut lse = Tensor::zeros(&[rows[0], rows[1], rows[2], 1]);
    let (mut key_mean, mut probe) = (Tensor::zeros(&a.query_shape()), Tensor::zeros(&a.query_shape()));
    let targets: Targets<O, T::Acc> =
        Targets { out, lse: lse.view_mut(), key_mean: key_mean.view_mut(), probe: probe.view_mut() };
    let data = Data {
        decoding,
        q: decoding.q(),
        k: Pool { cache: decoding.cache(), view: decoding.cache().k() },
        v: Pool { cache: decoding.cache(), view: decoding.cache().v() },
        bias: decoding.bias(),
        probe: decoding.probe(),
    };
    let tasks = tasks(decoding);
    let in_f64 = size_of::<T::Acc>() == 8 || a.precision() == Precision::High;
    let mut reports = if in_f64 {
        decode_f64(run, &data.inputs(), &tasks, &targets.sinks())?
    } else {
        decode_f32(run, &data.inputs(), &tasks, &targets.sinks())?
    };
    if !in_f64 {
        // As a forward does: what single precision does not resolve is done again.
        let hard: Vec<usize> = (0..tasks.len()).filter(|&i| is_hard(&reports[i])).collect();
        if !hard.is_empty() {
            let again: Vec<Task> = hard.iter().map(|&i| tasks[i].clone()).collect();
            let done = decode_f64(run, &data.inputs(), &again, &targets.sinks())?;
            for (i, report) in hard.into_iter().zip(done) {
                let flop = reports[i].flop + report.flop;
                reports[i] = BlockReport { flop, ..report };
            }
        }
    }
    let diagnostics = gathered(reports.into_iter().map(|report| (report.solved, report.flop)));
    Ok(State { lse: Tensor::new(lse.into_vec(), &rows), key_mean, probe, diagnostics })
}

/// A decoding's tensors, held while they are read in the type of arithmetic.
struct Data<'a, T: Element> {
    decoding: &'a Decoding<'a, T>,
    q: crate::View<'a, T>,
    k: Pool<'a, T>,
    v: Pool<'a, T>,
    bias: Option<crate::View<'a, T::Acc>>,
    probe: Option<crate::View<'a, T::Acc>>,
}

impl<T: Element> Data<'_, T> {
    fn inputs<C: Real>(&self) -> Inputs<'_, C> {
        Inputs {
            attention: self.decoding.attention(),
            q: &self.q,
            k: &self.k,
            v: &self.v,
            bias: self.bias.as_ref().map(|bias| bias as &dyn ReadRows<C>),
            probe: self.probe.as_ref().map(|probe| probe as &dyn ReadRows<C>),
        }
    }
}

// Compiled here, once for each type of arithmetic.
macro_rules! compiled {
    ($t:ident, $decode:ident) => {
        fn $decode(
            run: Run,
            inputs: &Inputs<$t>,
            tasks: &[Task],
            sinks: &Sinks<$t>,
        ) -> Result<Vec<BlockReport>> {
            decode(run, inputs, tasks, sinks).ok_or(Error::Interrupted)
        }
    };
}
compiled!(f32, decode_f32);
compiled!(f64, decode_f64);

fn decode<C: FirstPass>(
    run: Run,
    inputs: &Inputs<C>,
    tasks: &[Task],
    sinks: &Sinks<C>,
) -> Option<Vec<BlockReport>> {
    tasks.par_iter().with_max_len(1).map(|task| one(run, inputs, task, sinks)).collect()
}

fn one<C: FirstPass>(run: Run, inputs: &Inputs<C>, task: &Task, sinks: &Sinks<C>) -> Option<BlockReport> {
    let (a, n) = (inputs.attention, task.rows.len());
    let arith = Arith::new(run.arch);
    let mut stream = Stream::new(run, inputs, task.place, &task.rows, task.splits.clone());
    let (width, value_width) = (stream.width, padded(a.value_dim(), LANES));
    let [sequence, _] = task.place;

    // Queries less the reference key, and times the scale.
    let mut bad_q = vec![false; n];
    let mut residual = vec![C::ZERO; n * width];
    let scale = C::of_f64(a.scale());
    for (r, row) in task.rows.iter().enumerate() {
        let (at, mut q) = (r * width..(r + 1) * width, vec![C::ZERO; width]);
        bad_q[r] = !inputs.q.read(sequence, row.head, row.query, &mut q);
        for (((delta, scaled), &q), &o) in
            residual[at.clone()].iter_mut().zip(&mut stream.q[at]).zip(&q).zip(&stream.origin)
        {
            (*delta, *scaled) = (o - q, q * scale);
        }
    }

    let moments = inputs.probe.is_none() && sums_moments::<C>(run, a, n, stream.keys());
    let mut weighted = stream.first_pass(&arith, moments);
    residual.iter_mut().zip(&weighted.key_mean).for_each(|(delta, &mean)| *delta += mean);

    let (mut x, mut bad_x) = (vec![C::ZERO; n * width], vec![false; n]);
    let solved = match inputs.probe {
        Some(probe) => {
            for ((x, bad), row) in x.chunks_exact_mut(width).zip(&mut bad_x).zip(&task.rows) {
                *bad = !probe.read(sequence, row.head, row.query, x);
            }
            Solved { iterations: vec![0; n], residual: vec![0.0; n], direct: 0 }
        }
        None => {
            let ridge: Vec<C> = task.rows.iter().map(|row| ridge(a, sequence, row.head, row.query)).collect();
            let key_mean = weighted.key_mean.clone();
            let solver = if moments { Solver::Direct } else { a.solver() };
            let image = weighted.image_of_query(&arith, &ridge);
            let first = image.as_ref().map(|[query, image]| [&query[..], &image[..]]);
            let systems = Systems { key_mean: &key_mean, ridge: &ridge, solver, first };
            solve(&arith, &mut weighted, &systems, &mut residual, &mut x)
        }
    };
    let mut out = weighted.outputs(&arith, &x, value_width);
    if !run.goes_on() {
        return None;
    }

    let longest_probe = x.chunks_exact(width).map(|x| arith.dot(x, x).as_f64()).fold(0.0, f64::max).sqrt();
    let (reach, largest_logit) =
        (longest_probe * stream.longest.as_f64(), largest_logit(&weighted.reference));
    let mut key_mean = std::mem::take(&mut weighted.key_mean);
    for (r, row) in task.rows.iter().enumerate() {
        let at = r * width..(r + 1) * width;
        let (out, mean, x) =
            (&mut out[r * value_width..][..a.value_dim()], &mut key_mean[at.clone()], &mut x[at.clone()]);
        let inv = weighted.inv_sum[r];
        let mut lse = C::NEG_INFINITY;
        if (bad_q[r] || weighted.bad[r]) && row.visible.count() > 0 {
            lse = C::NAN;
            for values in [&mut *out, &mut *mean, &mut *x] {
                values.fill(C::NAN);
            }
        } else if inv == C::ZERO {
            if inputs.probe.is_none() {
                x.fill(C::ZERO);
            }
        } else {
            if bad_x[r] {
                out.fill(C::NAN);
                x.fill(C::NAN);
            }
            // Each logit was short by scale q·o.
            let origin: C = stream.origin.iter().zip(&stream.q[at]).map(|(&o, &q)| o * q).sum();
            lse = weighted.reference[r] - inv.logarithm() + origin;
            mean.iter_mut().zip(&stream.origin).for_each(|(mean, &o)| *mean += o);
        }
        // SAFETY: every query row belongs to one task.
        unsafe {
            let (h, i) = (row.head, row.query);
            sinks.out.write(sequence, h, i, out);
            sinks.lse.write(sequence, h, i, &[lse]);
            sinks.key_mean.write(sequence, h, i, &mean[..a.head_dim()]);
            sinks.probe.write(sequence, h, i, &x[..a.head_dim()]);
        }
    }
    Some(BlockReport { solved, flop: arith.flop.get(), reach, largest_logit })
}
