//! The tasks of a call, and how their results come together.

use super::block::{Bias, Buffers};
use super::pack::{Bad, Head};
use super::rows::{Inputs, ReadRows, WriteRows};
use super::{BLOCK, Run, TILE, backward, forward, solve};
use crate::{Attention, Diagnostics, OtherGradients, Real, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Mutex;

/// Where a block of query rows stands.
#[derive(Debug, Clone)]
pub struct Place {
    pub batch: usize,
    pub head: usize,
    pub rows: Range<usize>,
}

/// Every block, in the order of the outputs.
pub fn places(a: &Attention) -> Vec<Place> {
    let mut places = vec![];
    for batch in 0..a.batch() {
        for head in 0..a.heads() {
            for first in (0..a.queries()).step_by(BLOCK) {
                places.push(Place { batch, head, rows: first..(first + BLOCK).min(a.queries()) });
            }
        }
    }
    places
}

/// Buffers are kept from block to block: one set per thread that is at work.
struct Pool<C>(Mutex<Vec<Buffers<C>>>);

impl<C: Real> Pool<C> {
    fn new() -> Self {
        Self(Mutex::new(vec![]))
    }

    fn with<R>(&self, work: impl FnOnce(&mut Buffers<C>) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut buffers = lock().pop().unwrap_or_default();
        let result = work(&mut buffers);
        lock().push(buffers);
        result
    }
}

/// A problem's keys, values and bias, laid out for the blocks.
struct Prepared<C> {
    /// By batch and KV head.
    heads: Vec<Head<C>>,
    /// By batch and query head.
    bias: Vec<Bias<C>>,
}

impl<C: Real> Prepared<C> {
    fn new(inputs: &Inputs<C>, backward: bool) -> Self {
        let a = inputs.attention;
        let heads: Vec<Head<C>> = (0..a.batch() * a.kv_heads())
            .into_par_iter()
            .map(|n| Head::new(inputs, n / a.kv_heads(), n % a.kv_heads(), backward))
            .collect();
        let bias = match inputs.bias {
            None => vec![],
            Some(bias) => (0..a.batch() * a.heads())
                .into_par_iter()
                .map(|n| {
                    let (b, h) = (n / a.heads(), n % a.heads());
                    let head = &heads[b * a.kv_heads() + h / a.group()];
                    let (bias_b, bias_h) = a.bias_place(bias.shape(), b, h);
                    let given: Vec<C> = (0..a.keys()).map(|j| bias.entry(bias_b, bias_h, j, 0)).collect();
                    let hidden: Vec<bool> = given.iter().map(|&value| value == C::NEG_INFINITY).collect();
                    let bad_k =
                        (0..a.keys()).map(|j| !hidden[j] && (!given[j].is_finite() || head.k.bad.at(j)));
                    let bad_v = (0..a.keys()).map(|j| !hidden[j] && head.v.bad.at(j));
                    let bad = [Bad::new(bad_k), Bad::new(bad_v)];
                    let mut values = given;
                    values
                        .iter_mut()
                        .filter(|x| !x.is_finite() && **x != C::NEG_INFINITY)
                        .for_each(|x| *x = C::ZERO);
                    values.resize(a.keys().next_multiple_of(TILE), C::ZERO);
                    Bias { values, hidden, bad }
                })
                .collect(),
        };
        Self { heads, bias }
    }

    fn head(&self, a: &Attention, place: &Place) -> &Head<C> {
        &self.heads[place.batch * a.kv_heads() + place.head / a.group()]
    }

    fn bias(&self, a: &Attention, batch: usize, head: usize) -> Option<&Bias<C>> {
        self.bias.get(batch * a.heads() + head)
    }
}

/// Where a forward's results go.
pub struct Sinks<'a, C> {
    pub out: &'a dyn WriteRows<C>,
    pub lse: &'a dyn WriteRows<C>,
    pub key_mean: &'a dyn WriteRows<C>,
    pub probe: &'a dyn WriteRows<C>,
}

/// What a block reports beside its results.
pub struct BlockReport {
    pub solved: solve::Solved,
    pub flop: u64,
    /// The largest product of a probe's norm and a key's: what `(k_j − k̄)·x` loses to rounding is about that times ε.
    pub reach: f64,
    pub largest_logit: f64,
}

/// The blocks named of a forward; `None` when it was told to stop.
pub fn forward<C: Real>(
    run: Run,
    inputs: &Inputs<C>,
    places: &[Place],
    sinks: &Sinks<C>,
) -> Option<Vec<BlockReport>> {
    let a = inputs.attention;
    let prepared = Prepared::new(inputs, false);
    let pool = Pool::new();
    places
        .par_iter()
        .with_max_len(1)
        .map(|place| {
            if !run.goes_on() {
                return None;
            }
            let (head, bias) = (prepared.head(a, place), prepared.bias(a, place.batch, place.head));
            let block = pool.with(|buffers| forward::forward(run.arch, inputs, head, bias, place, buffers));
            let [out_width, width] = block.widths;
            for (row, i) in place.rows.clone().enumerate() {
                let (b, h) = (place.batch, place.head);
                // SAFETY: every query row belongs to one block, and every block to one task.
                unsafe {
                    sinks.out.write(b, h, i, &block.out[row * out_width..][..a.value_dim()]);
                    sinks.lse.write(b, h, i, &block.lse[row..=row]);
                    sinks.key_mean.write(b, h, i, &block.key_mean[row * width..][..a.head_dim()]);
                    sinks.probe.write(b, h, i, &block.probe[row * width..][..a.head_dim()]);
                }
            }
            Some(BlockReport {
                solved: block.solved,
                flop: block.flop,
                reach: block.reach,
                largest_logit: block.largest_logit,
            })
        })
        .collect()
}

/// All blocks and tiles of a backward. `dq`, `dk` and `dv` are written; the rest comes back, with the largest logit. `None` when
/// it was told to stop.
pub fn backward<C: Real>(
    run: Run,
    inputs: &Inputs<C>,
    probe: &dyn ReadRows<C>,
    grad_out: &dyn ReadRows<C>,
    [dq, dk, dv]: [&dyn WriteRows<C>; 3],
) -> Option<(OtherGradients<C>, f64)> {
    let a = inputs.attention;
    let prepared = Prepared::new(inputs, true);
    let pool = Pool::new();
    let arch = run.arch;
    let call = backward::Call { arch, inputs, probe, grad_out };
    let blocks: Option<Vec<backward::BlockBackward<C>>> = places(a)
        .par_iter()
        .with_max_len(1)
        .map(|place| {
            if !run.goes_on() {
                return None;
            }
            let (head, bias) = (prepared.head(a, place), prepared.bias(a, place.batch, place.head));
            let mut block = pool.with(|buffers| backward::rows(&call, head, bias, place, buffers));
            for (row, i) in place.rows.clone().enumerate() {
                // SAFETY: every query row belongs to one block, and every block to one task.
                unsafe {
                    dq.write(place.batch, place.head, i, &block.dq[row * block.width..][..a.head_dim()])
                };
            }
            block.dq = vec![]; // Blocks stay until the second pass is done; this is done with.
            Some(block)
        })
        .collect();
    let blocks = blocks?;

    // The blocks of each batch and query head, one after another.
    let per_head = a.queries().div_ceil(BLOCK);
    let tiles = a.keys().div_ceil(TILE);
    let mut flop: u64 = blocks.iter().map(|block| block.flop).sum();
    let key_heads = a.batch() * a.kv_heads();
    // The blocks that see a KV head, by query head: consecutive, since query heads of a group are.
    let seeing = |n: usize| &blocks[n * a.group() * per_head..][..a.group() * per_head];
    let spoilt: Vec<[Vec<bool>; 2]> = (0..a.batch() * a.heads())
        .into_par_iter()
        .map(|n| {
            let hidden = prepared.bias(a, n / a.heads(), n % a.heads()).map(|bias| bias.hidden.as_slice());
            backward::spoilt(a.keys(), hidden, &blocks[n * per_head..][..per_head])
        })
        .collect();
    let tile_results: Option<Vec<(Vec<Vec<C>>, u64)>> = (0..key_heads * tiles)
        .into_par_iter()
        .with_max_len(1)
        .map(|task| {
            if !run.goes_on() {
                return None;
            }
            let (n, t) = (task / tiles, task % tiles);
            let (b, h) = (n / a.kv_heads(), n % a.kv_heads());
            let head = &prepared.heads[n];
            let group = h * a.group()..(h + 1) * a.group();
            let biases: Vec<_> = group.map(|h| prepared.bias(a, b, h)).collect();
            let by_head: Vec<_> = seeing(n).chunks(per_head.max(1)).collect();
            let mut tile = pool.with(|buffers| backward::keys(arch, head, &biases, &by_head, t, buffers));
            let (width, value_width) = (tile.dk.len() / TILE, tile.dv.len() / TILE);
            for j in t * TILE..((t + 1) * TILE).min(a.keys()) {
                let dk_row = &mut tile.dk[(j % TILE) * width..][..a.head_dim()];
                let dv_row = &mut tile.dv[(j % TILE) * value_width..][..a.value_dim()];
                let by_head = &spoilt[n * a.group()..][..a.group()];
                if by_head.iter().any(|spoilt| spoilt[0][j]) {
                    dk_row.fill(C::NAN);
                }
                if by_head.iter().any(|spoilt| spoilt[1][j]) {
                    dv_row.fill(C::NAN);
                }
                for (dbias, _) in tile.dbias.iter_mut().zip(by_head).filter(|(_, spoilt)| spoilt[0][j]) {
                    dbias[j % TILE] = C::NAN;
                }
                // SAFETY: every key belongs to one tile, and every tile to one task.
                unsafe {
                    dk.write(b, h, j, dk_row);
                    dv.write(b, h, j, dv_row);
                }
            }
            Some((tile.dbias, tile.flop))
        })
        .collect();
    let tile_results = tile_results?;

    // Sums over rows and heads, in order.
    let mut dridge = vec![C::ZERO; a.ridge().values().len()];
    let mut dscale = C::ZERO;
    for block in &blocks {
        dscale += block.dscale;
        for (row, i) in block.place.rows.clone().enumerate() {
            dridge[a.ridge().index(block.place.batch, block.place.head, i)] += block.dridge[row];
        }
    }
    let dbias = inputs.bias.map(|bias| {
        let shape = bias.shape();
        let mut sum = vec![C::ZERO; shape.iter().product()];
        for (task, (tile, _)) in tile_results.iter().enumerate() {
            let (n, t) = (task / tiles, task % tiles);
            for (in_group, dbias) in tile.iter().enumerate() {
                let (b, h) = a.bias_place(shape, n / a.kv_heads(), n % a.kv_heads() * a.group() + in_group);
                for j in t * TILE..((t + 1) * TILE).min(a.keys()) {
                    sum[(b * shape[1] + h) * a.keys() + j] += dbias[j % TILE];
                }
            }
        }
        Tensor::new(sum, &shape)
    });
    let dprobe = inputs.probe.map(|_| {
        let rows = |block: &backward::BlockBackward<C>| {
            let rows = block.dprobe.chunks_exact(block.width).map(|row| row[..a.head_dim()].to_vec());
            rows.flatten().collect::<Vec<C>>()
        };
        Tensor::new(blocks.iter().flat_map(rows).collect(), &a.query_shape())
    });
    flop += tile_results.iter().map(|(_, flop)| flop).sum::<u64>();
    let largest_logit = blocks.iter().map(|block| block.largest_logit).fold(0.0, f64::max);
    let mut diagnostics = gathered(blocks.into_iter().map(|block| (block.solved, 0)));
    diagnostics.flop = flop;
    Some((
        OtherGradients { dridge: Tensor::new(dridge, a.ridge().shape()), dscale, dbias, dprobe, diagnostics },
        largest_logit,
    ))
}

/// The reports of all blocks, in the order of the outputs.
pub fn gathered(blocks: impl IntoIterator<Item = (solve::Solved, u64)>) -> Diagnostics {
    let mut all = Diagnostics::default();
    for (block, flop) in blocks {
        all.iterations.extend(block.iterations);
        all.residual.extend(block.residual);
        all.direct += block.direct;
        all.flop += flop;
    }
    all
}
