//! The first pass with the matrix unit.

use super::Sums;
use super::moments::{self, Ahead, Moments, STEPS};
use super::pack::{self, Step, weights_alone};
use super::raw;
use super::tiles::{SIDE, STEP, Unit};
use crate::cpu::block::Arith;
use crate::cpu::decode::kernels::Dots;
use crate::cpu::decode::stream::{Found, RISE, Stream};
use crate::cpu::rowwise::RowMax;
use crate::cpu::widen::Rows;
use crate::cpu::{LANES, TILE, padded};
use half::bf16;
use std::ops::Range;

/// Steps of a tile of keys.
const PER_TILE: usize = TILE / STEP;

/// Where keys and values are packed from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    /// Rows of `bf16` where they lie, coordinates in the order of [`raw::coordinate`].
    Bf16,
    /// Rows of `f32` where they lie.
    F32,
    /// Tiles that they are read to, keys less the reference key.
    Tiles,
}

impl From {
    fn of(stream: &Stream<f32>) -> Self {
        let a = stream.inputs.attention;
        let whole = |size| [a.head_dim(), a.value_dim()].iter().all(|dim| dim.is_multiple_of(size));
        let (mut rows, first) = (Rows::default(), stream.splits[0].start);
        for from in [stream.inputs.k, stream.inputs.v] {
            from.rows(stream.place, first..first + 1, &mut rows);
        }
        match [rows.bf16.len(), rows.f32.len()] {
            [2, 0] if whole(raw::BOTH) => Self::Bf16,
            [0, 2] if whole(SIDE) => Self::F32,
            _ => Self::Tiles,
        }
    }

    /// Which coordinate number `i` of block `block` is.
    fn coordinate(self, block: usize, i: usize) -> usize {
        if self == Self::Bf16 { raw::coordinate(block, i) } else { block * SIDE + i }
    }
}

pub fn first_pass(unit: Unit, stream: &Stream<f32>, arith: &Arith, split: &Range<usize>) -> Found<f32> {
    let (width, dim, arch) = (stream.width, stream.dim(), arith.arch);
    let value_dim = stream.inputs.attention.value_dim();
    let value_width = padded(value_dim, LANES);
    let (zeros, zeros_bf16) = (vec![0.0; width.max(value_width)], vec![bf16::ZERO; width.max(value_width)]);
    let mut found = Found::new(1, split.len().div_ceil(TILE), width, 0);
    let mut mean = vec![0.0; width];
    let mut weights = [0.0f32; TILE];

    let from = From::of(stream);
    let (ordered_q, ordered_origin) = match from {
        From::Bf16 => (raw::ordered(&stream.q), raw::ordered(&stream.origin)),
        _ => (vec![], vec![]),
    };
    let origin = if from == From::F32 { &stream.origin[..] } else { &zeros[..width] };
    let room = if from == From::Tiles { TILE } else { 0 };
    let (mut keys, mut values) = (vec![0.0; room * width], vec![0.0; room * value_width]);
    let [mut key_rows, mut value_rows] = [Rows::default(), Rows::default()];

    let mut moments = Moments::new(unit, from == From::Bf16, [width, value_width]);
    let mut ahead = Ahead::default();
    let round = STEPS * STEP;
    for (i, first, count) in Stream::<f32>::tiles(split) {
        if !stream.run.goes_on() {
            break;
        }
        if moments.steps == 0 {
            let next = split.end.min(first + round)..split.end.min(first + 2 * round);
            ahead.refill(stream, next);
        }
        if from != From::Tiles {
            for (from, rows) in [(stream.inputs.k, &mut key_rows), (stream.inputs.v, &mut value_rows)] {
                rows.clear();
                from.rows(stream.place, first..first + count, rows);
                rows.f32.resize(TILE, &zeros[..]);
                rows.bf16.resize(TILE, &zeros_bf16[..]);
            }
        }
        let [keys, values]: [Vec<&[f32]>; 2] = match from {
            From::Bf16 => {
                raw::scores(unit, &key_rows.bf16, &ordered_origin, &ordered_q, &mut weights);
                [vec![], vec![]]
            }
            From::F32 => {
                pack::scores(unit, &key_rows.f32, origin, &stream.q, &mut weights);
                [std::mem::take(&mut key_rows.f32), std::mem::take(&mut value_rows.f32)]
            }
            From::Tiles => {
                stream.read(stream.inputs.k, &stream.origin, (first, count), &mut keys, false);
                let no_origin = &zeros[..value_width];
                stream.read(stream.inputs.v, no_origin, (first, count), &mut values, false);
                arch.dispatch(Dots { rows: &stream.q, tile: &keys, width, products: &mut weights });
                [keys.chunks_exact(width).collect(), values.chunks_exact(value_width).collect()]
            }
        };
        stream.add_bias((first, count), &mut weights, &mut found.bad);
        stream.hide((first, count), &mut weights);
        found.scores[i * TILE..][..TILE].copy_from_slice(&weights);
        let largest = arch.dispatch(RowMax(&weights));
        if largest > found.reference[0] + RISE as f32 {
            let factor = (found.reference[0] - largest).exp(); // 0 at first
            found.reference[0] = largest;
            found.sum[0] *= factor;
            found.squares *= factor * factor;
            moments.multiply(&mut ahead);
            moments.scale(factor);
            mean.iter_mut().for_each(|x| *x *= factor);
        }
        found.sum[0] += stream.weigh(arch, &mut weights, found.reference[0]);
        found.squares += arith.dot(&weights, &weights);

        for (s, weights) in weights.as_chunks::<STEP>().0.iter().enumerate() {
            let step = moments.steps;
            weights_alone(weights, &mut moments.weights[step]);
            if from == From::Bf16 {
                let [keys, values] = [&key_rows, &value_rows].map(|rows| &rows.bf16.as_chunks::<STEP>().0[s]);
                for (b, (origin, sums)) in pairs(&ordered_origin).iter().zip(pairs_mut(&mut mean)).enumerate()
                {
                    let left = moments.left(2 * b, step);
                    raw::weighted(unit, keys, b * raw::BOTH, (weights, origin), left, sums, ahead.take(SIDE));
                    let right = moments.keys.exact(2 * b, step);
                    raw::pairs(unit, keys, b * raw::BOTH, right, ahead.take(SIDE));
                }
                for b in 0..value_width / raw::BOTH {
                    let right = moments.values.exact(2 * b, step);
                    raw::pairs(unit, values, b * raw::BOTH, right, ahead.take(SIDE));
                }
            } else {
                let keys = Step { rows: &keys.as_chunks().0[s], origin };
                let values = Step { rows: &values.as_chunks().0[s], origin: &zeros };
                for (block, sum) in mean.as_chunks_mut::<SIDE>().0.iter_mut().enumerate() {
                    let [even, odd] = moments.left(block / 2 * 2, step);
                    let left = if block % 2 == 0 { even } else { odd };
                    pack::weighted(unit, keys, block * SIDE, weights, left, sum, ahead.take(SIDE));
                    let right = moments.keys.terms(block, step);
                    pack::terms(unit, keys, block * SIDE, right, ahead.take(SIDE));
                }
                for block in 0..value_width / SIDE {
                    let right = moments.values.terms(block, step);
                    pack::terms(unit, values, block * SIDE, right, ahead.take(SIDE));
                }
            }
            moments.steps += 1;
        }
        if moments.steps + PER_TILE > STEPS {
            moments.multiply(&mut ahead);
        }
    }
    moments.multiply(&mut ahead);
    arith.count([1, split.len(), dim]);
    arith.count([1, split.len(), dim * (dim + 1) / 2 + (dim + 1) * value_dim]);

    // How coordinates are ordered does not matter to sums over splits.
    found.moments = moments.second();
    found.cross = moments.cross();
    found.packed = true;
    found.value_sum = vec![0.0; value_width];
    moments.each_value(|block, i, x| found.value_sum[from.coordinate(block, i)] = x);
    for (i, x) in mean.into_iter().enumerate() {
        found.mean[from.coordinate(i / SIDE, i % SIDE)] = x;
    }
    found
}

/// Moments by rows and columns of coordinates.
pub fn settle(stream: &Stream<f32>, sums: Sums<f32>) {
    let (from, dim, width) = (From::of(stream), stream.dim(), stream.width);
    let value_width = padded(stream.inputs.attention.value_dim(), LANES);
    let packed = std::mem::replace(sums.moments, vec![0.0; dim * width]);
    moments::each(&packed, width / SIDE, |[a, b], [i, j], x| {
        let (row, column) = (from.coordinate(a, i), from.coordinate(b, j));
        if a <= b && row < dim && column < dim {
            // Keys less the reference key on the right too.
            let shift = if from == From::Bf16 { sums.mean[row] * stream.origin[column] } else { 0.0 };
            sums.moments[row.min(column) * width + row.max(column)] = x - shift;
        }
    });
    if sums.cross.is_empty() {
        return;
    }
    let packed = std::mem::replace(sums.cross, vec![0.0; dim * value_width]);
    moments::each(&packed, value_width / SIDE, |[a, b], [i, j], x| {
        let (row, column) = (from.coordinate(a, i), from.coordinate(b, j));
        if row < dim {
            sums.cross[row * value_width + column] = x;
        }
    });
}

fn pairs(x: &[f32]) -> &[[[f32; SIDE]; 2]] {
    x.as_chunks::<SIDE>().0.as_chunks::<2>().0
}

fn pairs_mut(x: &mut [f32]) -> &mut [[[f32; SIDE]; 2]] {
    x.as_chunks_mut::<SIDE>().0.as_chunks_mut::<2>().0
}
