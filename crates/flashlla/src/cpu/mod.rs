//! The blockwise CPU engine.
//!
//! A block of query rows against one head is one task; tasks run on rayon's threads. Inside a task everything is products of
//! small tiles (`product.rs`) on keys and values that were laid out for them once (`pack.rs`), with row operations in between
//! (`rowwise.rs`). A block's softmax weights are kept while its solve runs (they are a block's rows × keys, not N × M) unless
//! they outgrow [`CACHED_WEIGHTS`]; then they are recomputed from `q·k` in every pass. Each block ends its conjugate gradients
//! when all its rows have converged, and rows that are done leave the products.
//!
//! Every number is computed by one task in one order, whichever thread runs it: results do not depend on the thread count.

mod backward;
mod block;
mod direct;
mod forward;
mod pack;
mod product;
mod rowwise;
mod simd;
mod solve;

pub use simd::SimdReal;

use crate::engine::{check_gradients, check_out};
use crate::{
    Diagnostics, Element, Engine, OtherGradients, Precision, Problem, Real, Result, State, Tensor, View,
    ViewMut,
};
use block::Buffers;
pub(crate) use pack::Bad;
use pack::Head;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Mutex;

/// Every row of numbers is padded to a multiple of this: whole registers on any instruction set.
const LANES: usize = 16;
/// Keys of a tile: with `D = 64` in `f32`, a tile of keys is 16 KiB, a third of a first-level cache.
const TILE: usize = 64;
/// Query rows of a block: a multiple of the products' 6 rows; small enough that few rows wait for the slowest, large enough
/// that reading a tile of keys from the second-level cache costs little.
const BLOCK: usize = 48;
/// The most bytes of softmax weights that a block keeps.
const CACHED_WEIGHTS: usize = 16 << 20;

/// The CPU engine: blockwise, multi-threaded (rayon's current thread pool), SIMD chosen at run time.
///
/// ```
/// use flashlla::{Attention, Cpu, Engine, View};
/// let x: Vec<f32> = (0..4 * 8).map(|i| (i as f32).sin()).collect();
/// let x = View::bnd(&x, [1, 4, 8])?;
/// let attention = Attention::builder_for(&x, &x, &x).build()?;
/// let forward = Cpu::new().forward(&attention.problem(x, x, x)?)?;
/// assert_eq!(forward.out.shape(), [1, 1, 4, 8]);
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    arch: pulp::Arch,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// With the best instruction set that the machine has.
    pub fn new() -> Self {
        Self { arch: pulp::Arch::new() }
    }

    /// The instruction set in use: `"avx512"`, `"avx2+fma"`, `"neon"` or `"plain"`.
    pub fn instruction_set(&self) -> &'static str {
        struct Width;
        impl pulp::WithSimd for Width {
            type Output = (usize, usize);
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) -> (usize, usize) {
                (S::F32_LANES, S::REGISTER_COUNT)
            }
        }
        match self.arch.dispatch(Width).0 {
            16 => "avx512",
            8 => "avx2+fma",
            4 => "neon",
            _ => "plain",
        }
    }
}

fn padded(n: usize, multiple: usize) -> usize {
    n.next_multiple_of(multiple)
}

/// Where a block of query rows stands.
#[derive(Debug, Clone)]
struct Place {
    batch: usize,
    head: usize,
    rows: Range<usize>,
}

/// Every block, in the order of the outputs.
fn places<T: Element>(problem: &Problem<T>) -> Vec<Place> {
    let a = problem.attention();
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
    /// By the bias's batch and head, and KV head: the bias of every key, padded to whole tiles, and the bad keys.
    bias: Vec<(Vec<C>, Bad)>,
}

impl<C: Real> Prepared<C> {
    fn new<T: Element>(problem: &Problem<T>, backward: bool) -> Self {
        let a = problem.attention();
        let heads: Vec<Head<C>> = (0..a.batch() * a.kv_heads())
            .into_par_iter()
            .map(|n| Head::new(problem, n / a.kv_heads(), n % a.kv_heads(), backward))
            .collect();
        let bias = match problem.bias() {
            None => vec![],
            Some(bias) => (0..a.batch() * a.heads())
                .into_par_iter()
                .map(|n| {
                    let (b, h) = (n / a.heads(), n % a.heads());
                    let k = &heads[b * a.kv_heads() + h / a.group()].k;
                    let (bias_b, bias_h) = problem.bias_place(b, h);
                    let mut values = vec![C::ZERO; a.keys().next_multiple_of(TILE)];
                    let bad = Bad::new((0..a.keys()).map(|j| {
                        let value: C = bias.at(bias_b, bias_h, j, 0).to_real();
                        // A key hidden by its bias is not seen, whatever it holds.
                        let hidden = value == C::NEG_INFINITY;
                        let finite = value.is_finite();
                        values[j] = if finite || hidden { value } else { C::ZERO };
                        !hidden && (!finite || k.bad.at(j))
                    }));
                    (values, bad)
                })
                .collect(),
        };
        Self { heads, bias }
    }

    fn head<T: Element>(&self, problem: &Problem<T>, place: &Place) -> &Head<C> {
        let a = problem.attention();
        &self.heads[place.batch * a.kv_heads() + place.head / a.group()]
    }

    fn bias<T: Element>(&self, problem: &Problem<T>, batch: usize, head: usize) -> Option<(&[C], &Bad)> {
        self.bias
            .get(batch * problem.attention().heads() + head)
            .map(|(values, bad)| (values.as_slice(), bad))
    }
}

/// Whether a problem is computed in `f64`.
fn in_f64<T: Element>(problem: &Problem<T>) -> bool {
    size_of::<T::Acc>() == 8 || problem.attention().precision() == Precision::High
}

fn forward<T: Element, C: Real, O: Element>(
    arch: pulp::Arch,
    problem: &Problem<T>,
    out: ViewMut<O>,
) -> State<T::Acc> {
    let a = problem.attention();
    let prepared = Prepared::<C>::new(problem, false);
    let rows = [a.batch(), a.heads(), a.queries()];
    let mut lse = Tensor::<T::Acc>::zeros(&[rows[0], rows[1], rows[2], 1]);
    let (mut key_mean, mut probe) = (Tensor::zeros(&a.query_shape()), Tensor::zeros(&a.query_shape()));
    let (lse_view, mean_view, probe_view) = (lse.view_mut(), key_mean.view_mut(), probe.view_mut());
    let pool = Pool::new();
    let solved: Vec<_> = places(problem)
        .par_iter()
        .with_max_len(1)
        .map(|place| {
            let (head, bias) =
                (prepared.head(problem, place), prepared.bias(problem, place.batch, place.head));
            let block = pool.with(|buffers| forward::forward(arch, problem, head, bias, place, buffers));
            let [out_width, width] = block.widths;
            for (row, i) in place.rows.clone().enumerate() {
                let (b, h) = (place.batch, place.head);
                // SAFETY: every query row belongs to one block, and every block to one task.
                unsafe {
                    out.write_row(b, h, i, &block.out[row * out_width..][..a.value_dim()]);
                    lse_view.write_row(b, h, i, &block.lse[row..=row]);
                    mean_view.write_row(b, h, i, &block.key_mean[row * width..][..a.head_dim()]);
                    probe_view.write_row(b, h, i, &block.probe[row * width..][..a.head_dim()]);
                }
            }
            (block.solved, block.flop)
        })
        .collect();
    State { lse: Tensor::new(lse.into_vec(), &rows), key_mean, probe, diagnostics: gathered(solved) }
}

fn backward<T: Element, G: Element, C: Real, O: Element>(
    arch: pulp::Arch,
    problem: &Problem<T>,
    state: &State<T::Acc>,
    grad_out: View<G>,
    [dq, dk, dv]: [ViewMut<O>; 3],
) -> OtherGradients<T::Acc> {
    let a = problem.attention();
    let prepared = Prepared::<C>::new(problem, true);
    let pool = Pool::new();
    let call = backward::Call { arch, problem, probe: state.probe.view(), grad_out };
    let blocks: Vec<backward::BlockBackward<C>> = places(problem)
        .par_iter()
        .with_max_len(1)
        .map(|place| {
            let (head, bias) =
                (prepared.head(problem, place), prepared.bias(problem, place.batch, place.head));
            let mut block = pool.with(|buffers| backward::rows(&call, head, bias, place, buffers));
            for (row, i) in place.rows.clone().enumerate() {
                // SAFETY: every query row belongs to one block, and every block to one task.
                unsafe {
                    dq.write_row(place.batch, place.head, i, &block.dq[row * block.width..][..a.head_dim()])
                };
            }
            block.dq = vec![]; // Blocks stay until the second pass is done; this is done with.
            block
        })
        .collect();

    // The blocks of each batch and query head, one after another.
    let per_head = a.queries().div_ceil(BLOCK);
    let tiles = a.keys().div_ceil(TILE);
    let mut flop: u64 = blocks.iter().map(|block| block.flop).sum();
    let key_heads: Vec<usize> = (0..a.batch() * a.kv_heads()).collect();
    // The blocks that see a KV head, by query head: consecutive, since query heads of a group are.
    let seeing = |n: usize| &blocks[n * a.group() * per_head..][..a.group() * per_head];
    let spoilt: Vec<[Vec<bool>; 2]> =
        key_heads.par_iter().map(|&n| backward::spoilt(a.keys(), seeing(n).iter())).collect();
    let tile_results: Vec<(Vec<Vec<C>>, u64)> = (0..key_heads.len() * tiles)
        .into_par_iter()
        .with_max_len(1)
        .map(|task| {
            let (n, t) = (task / tiles, task % tiles);
            let (b, h) = (n / a.kv_heads(), n % a.kv_heads());
            let head = &prepared.heads[n];
            let group = h * a.group()..(h + 1) * a.group();
            let biases: Vec<_> = group.map(|h| prepared.bias(problem, b, h).map(|(bias, _)| bias)).collect();
            let by_head: Vec<_> = seeing(n).chunks(per_head.max(1)).collect();
            let mut tile = pool.with(|buffers| backward::keys(arch, head, &biases, &by_head, t, buffers));
            let (width, value_width) = (tile.dk.len() / TILE, tile.dv.len() / TILE);
            for j in t * TILE..((t + 1) * TILE).min(a.keys()) {
                let dk_row = &mut tile.dk[(j % TILE) * width..][..a.head_dim()];
                let dv_row = &mut tile.dv[(j % TILE) * value_width..][..a.value_dim()];
                if spoilt[n][0][j] {
                    dk_row.fill(C::NAN);
                    tile.dbias.iter_mut().for_each(|dbias| dbias[j % TILE] = C::NAN);
                }
                if spoilt[n][1][j] {
                    dv_row.fill(C::NAN);
                }
                // SAFETY: every key belongs to one tile, and every tile to one task.
                unsafe {
                    dk.write_row(b, h, j, dk_row);
                    dv.write_row(b, h, j, dv_row);
                }
            }
            (tile.dbias, tile.flop)
        })
        .collect();

    // Sums over rows and heads, in order.
    let mut dridge = vec![C::ZERO; a.ridge().values().len()];
    let mut dscale = C::ZERO;
    for block in &blocks {
        dscale += block.dscale;
        for (row, i) in block.place.rows.clone().enumerate() {
            dridge[a.ridge().index(block.place.batch, block.place.head, i)] += block.dridge[row];
        }
    }
    let dbias = problem.bias().map(|bias| {
        let shape = bias.shape();
        let mut sum = vec![C::ZERO; shape.iter().product()];
        for (task, (tile, _)) in tile_results.iter().enumerate() {
            let (n, t) = (task / tiles, task % tiles);
            for (in_group, dbias) in tile.iter().enumerate() {
                let (b, h) = problem.bias_place(n / a.kv_heads(), n % a.kv_heads() * a.group() + in_group);
                for j in t * TILE..((t + 1) * TILE).min(a.keys()) {
                    sum[(b * shape[1] + h) * a.keys() + j] += dbias[j % TILE];
                }
            }
        }
        Tensor::new(sum.into_iter().map(Element::from_real).collect(), &shape)
    });
    let dprobe = problem.probe().map(|_| {
        let rows = |block: &backward::BlockBackward<C>| {
            let rows = block.dprobe.chunks_exact(block.width).map(|row| row[..a.head_dim()].to_vec());
            rows.flatten().map(Element::from_real).collect::<Vec<T::Acc>>()
        };
        Tensor::new(blocks.iter().flat_map(rows).collect(), &a.query_shape())
    });
    flop += tile_results.iter().map(|(_, flop)| flop).sum::<u64>();
    let mut diagnostics = gathered(blocks.into_iter().map(|block| (block.solved, 0)).collect());
    diagnostics.flop = flop;
    OtherGradients {
        dridge: Tensor::new(dridge.into_iter().map(Element::from_real).collect(), a.ridge().shape()),
        dscale: Element::from_real(dscale),
        dbias,
        dprobe,
        diagnostics,
    }
}

fn gathered(solved: Vec<(solve::Solved, u64)>) -> Diagnostics {
    let mut all = Diagnostics::default();
    for (block, flop) in solved {
        all.iterations.extend(block.iterations);
        all.residual.extend(block.residual);
        all.direct += block.direct;
        all.flop += flop;
    }
    all
}

impl Engine for Cpu {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        check_out(problem, &out)?;
        Ok(if in_f64(problem) {
            forward::<T, f64, O>(self.arch, problem, out)
        } else {
            forward::<T, T::Acc, O>(self.arch, problem, out)
        })
    }

    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> Result<OtherGradients<T::Acc>> {
        check_gradients(problem, state, &grad_out, [&dq, &dk, &dv])?;
        Ok(if in_f64(problem) {
            backward::<T, G, f64, O>(self.arch, problem, state, grad_out, [dq, dk, dv])
        } else {
            backward::<T, G, T::Acc, O>(self.arch, problem, state, grad_out, [dq, dk, dv])
        })
    }
}

#[cfg(test)]
mod tests {
    /// Every instruction set that this machine can run.
    pub fn architectures() -> Vec<pulp::Arch> {
        let mut all = vec![pulp::Arch::Scalar, pulp::Arch::new()];
        #[cfg(target_arch = "x86_64")]
        if let Some(v3) = pulp::x86::V3::try_new() {
            all.push(pulp::Arch::V3(v3));
        }
        all
    }
}
