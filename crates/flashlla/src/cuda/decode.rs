//! [`DecodePlan`]: decoding on device pointers.

use super::bundle::Wanted;
use super::decode_shared::{Call, Shared, SharedSchedule};
use super::driver::{Arguments, Context, Function, Memory};
use super::plan::{Places, RidgeTable, dtype, int, option, side};
use super::{DeviceRidge, DeviceView, Inner, RawStream};
use crate::decoding::MAX_DECODE_QUERIES;
use crate::{Attention, Element, Error, Result, Solver};
use std::sync::Arc;

/// Relative residual that [`Solver::Auto`] goes to when decoding from moments: the matrix is formed, so that a step costs next to
/// nothing.
pub const DECODE_TOLERANCE: f64 = 1e-5;
/// The most splits of a context: what the merging kernels take.
const MOST_SPLITS: usize = 64;
/// A context is split where that saves more key tiles than splits cost, measured in these: for any query, and for each. At padded head
/// dimensions of 64 and 128, on an H100.
const SPLITS_COST: [(f64, f64); 2] = [(8.0, 0.08), (4.0, 0.13)];
/// Numbers beside the matrices that a query's folded splits leave, in f32: four vectors, and these.
const FOLDED_NUMBERS: usize = 16;
/// Key tiles of a split: fewer are not worth a block, and a tensor core's sums lose digits over more.
const SPLIT_TILES: std::ops::RangeInclusive<usize> = 2..=256;
/// Rows are decoded in groups whose moments, folded ones too, take no more than this, in bytes.
const MOST_MOMENTS: usize = 256 << 20;
/// Memory behind the moments that the folding kernel may read, in parts.
const MORE_PARTS: usize = 8;
/// Elements that keys and values are read in.
const UNIT: usize = 8;

/// Keys or values of a cache in device memory: a pool `[page, KV head, slot, dim]`, dims side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePool {
    /// The address of element (0, 0, 0, 0), aligned to 16 bytes.
    pub ptr: u64,
    /// Distances between neighbours along page, KV head and slot, in elements: multiples of 8.
    pub strides: [i64; 3],
}

impl DevicePool {
    /// The arguments, and then its strides as the kernels take them.
    pub(super) fn after(&self, arguments: Arguments) -> Arguments {
        let [page, head, slot] = self.strides;
        arguments.i32s([page as i32]).i64s([head]).i32s([slot as i32])
    }
}

/// Factors on q·k in device memory, `f32`, one per KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceScale {
    /// The address of the first KV head's.
    pub ptr: u64,
    /// Distance between KV heads, in elements; 0 where they share it.
    pub stride: i32,
}

/// How the pages of a cache lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLayout {
    /// Pages of the pool; of a contiguous cache its sequences.
    pub pages: usize,
    /// Tokens of a page; of a contiguous cache its capacity.
    pub page_size: usize,
    /// A block table says which page holds what; otherwise page `b` is sequence `b`.
    pub paged: bool,
}

impl PoolLayout {
    /// Columns of the block table of sequences with room for `keys` tokens; 1 without a table.
    pub(super) fn table_width(&self, keys: usize) -> usize {
        if self.paged { keys / self.page_size } else { 1 }
    }
}

/// The most key tiles that a sequence's queries look at, of `most` tokens, with a window unless it is 0.
pub(super) fn key_tiles(most: usize, window: usize, queries: usize, tile: usize) -> usize {
    let tiles = most.div_ceil(tile).max(1);
    // A window may begin and end inside a tile.
    if window > 0 { tiles.min((window + queries).div_ceil(tile) + 1) } else { tiles }
}

/// What a decoding reads and writes, all in device memory.
///
/// The GPU cannot refuse what the host does not see: lengths beyond the room and pages that the pool does not have are cut to what
/// there is, so that no other memory is touched, but the outputs of such sequences mean nothing.
#[derive(Debug, Clone, Copy)]
pub struct DecodePointers {
    /// Queries `[B, HQ, t, D]`.
    pub q: DeviceView,
    /// Keys.
    pub k: DevicePool,
    /// Values.
    pub v: DevicePool,
    /// The block table, `i32 [B, pages per sequence]`, contiguous; there must be one exactly if the plan is for pages.
    pub table: Option<u64>,
    /// Tokens of each sequence, `i32 [B]`, those of the queries included.
    pub lengths: u64,
    /// The outputs `[B, HQ, t, DV]`, in the inputs' type.
    pub out: DeviceView,
    /// Ridges in place of the description's.
    pub ridge: Option<DeviceRidge>,
    /// Scales in place of the description's.
    pub scale: Option<DeviceScale>,
    /// The probe to use in place of a solve, `f32 [B, HQ, t, D]`, contiguous.
    pub probe: Option<u64>,
    /// Where to write the log-sum-exp, `f32 [B, HQ, t]`, contiguous.
    pub lse: Option<u64>,
    /// Where to write mean keys and (unless given) probes, each `f32 [B, HQ, t, D]`, contiguous.
    pub state: Option<[u64; 2]>,
    /// Where to write each query's conjugate-gradient steps (`i32`) and residual (`f32`), contiguous.
    pub diagnostics: Option<[u64; 2]>,
}

/// How a decoding goes through a cache ([`DecodePlan::method`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeMethod {
    /// Every query by the moments of its keys and values, in one pass.
    Moments,
    /// Up to 16 queries of a KV head together, by conjugate gradients whose passes are split over the keys, each a launch. On an H100
    /// for long contexts: for 8 query heads per KV head of dimension 64 (128) from some 130,000 (50,000) keys on, all sequences and KV heads counted, for 4
    /// from 400,000 to 750,000 (150,000 to 320,000).
    Passes,
    /// The same in one launch, in which a tile block makes all passes for its queries: for many sequences and contexts of up to some 3000 keys.
    Together,
}

/// A decoding made ready for the GPU.
///
/// Made by [`super::Cuda::decode_plan`]. One pass over keys and values, split over the context, and a solve for every query
/// ("Decoding in one pass"): like [`super::ForwardPlan`] it only puts work into the caller's stream.
///
/// Where many queries (new tokens times query heads) share a KV head of bf16 or f16 and there is enough to do, they are
/// solved together by conjugate gradients over the cache ([`DecodePlan::method`]), which end when the expected relative error of the
/// outputs is 5e-4, or at the tolerance that is given; those that would take too many passes are left to their moments.
/// [`Solver::Cg`], [`Solver::Auto`] with a limit of steps or a tolerance below 1e-4, and [`crate::Precision::High`] always take the
/// moments.
#[derive(Debug)]
pub struct DecodePlan {
    engine: Arc<Inner>,
    attention: Attention,
    layout: PoolLayout,
    width: usize,
    /// Keys of a tile of the splits.
    tile: usize,
    options: i32,
    ridge: RidgeTable,
    tolerance: f64,
    max_iters: i32,
    split: Arc<Function>,
    fold: Arc<Function>,
    merge: Arc<Function>,
    /// What does the work of all three where a context is not split.
    whole: Arc<Function>,
    /// Where queries share a KV head: what decodes most of them.
    shared: Option<Shared>,
}

/// How a context is split, and where the scratch lies.
struct Schedule {
    /// Key tiles of a split.
    tiles: usize,
    splits: usize,
    /// Rows decoded at a time.
    rows: usize,
    /// Keys that a sequence may have.
    most: usize,
    moments: u64,
    state: u64,
    /// Covariances of the folded splits, and the numbers beside them.
    folded: u64,
    sums: u64,
    lse: u64,
    ridge: u64,
    scale: u64,
    shared: Option<SharedSchedule>,
    bytes: usize,
}

impl DecodePlan {
    pub(super) fn new<T: Element>(
        engine: &Arc<Inner>,
        attention: &Attention,
        layout: PoolLayout,
    ) -> Result<Self> {
        let (a, dtype) = (attention, dtype::<T>()?);
        if a.solver() == Solver::Direct {
            let allowed = "auto or cg on a GPU (compute direct solves on the CPU)";
            return Err(Error::value("solver", "direct", allowed));
        }
        if !(1..=MAX_DECODE_QUERIES).contains(&a.queries()) {
            let allowed = format!("from 1 to {MAX_DECODE_QUERIES} per sequence (more: a forward)");
            return Err(Error::value("queries", a.queries(), allowed));
        }
        if a.mask().is_leave_one_out() {
            return Err(Error::value("leave_one_out", true, "false when decoding on a GPU"));
        }
        let widths = engine.bundle.head_dims(&engine.architecture, "lla_decode_merge");
        let widest = widths.last().copied().unwrap_or(0);
        for (argument, dim) in [("head_dim", a.head_dim()), ("value_dim", a.value_dim())] {
            if dim > widest || dim % UNIT != 0 {
                let allowed =
                    format!("a multiple of {UNIT}, at most {widest}, when decoding with these GPU kernels");
                return Err(Error::value(argument, dim, allowed));
            }
        }
        let needed = a.head_dim().max(a.value_dim());
        let width = widths.into_iter().find(|&w| w >= needed).unwrap_or(widest);
        let PoolLayout { pages, page_size, paged } = layout;
        if paged && page_size * a.keys().checked_div(page_size).unwrap_or(0) != a.keys() {
            return Err(Error::value("keys", a.keys(), format!("whole pages of {page_size} tokens")));
        }
        if !paged && (a.keys() != page_size || a.batch() != pages) {
            let given = format!("{pages} pages of {page_size} tokens");
            let allowed = format!("{} sequences with room for {} tokens each", a.batch(), a.keys());
            return Err(Error::value("cache", given, allowed));
        }
        let rows = a.batch() * a.heads() * a.queries();
        for (argument, given) in
            [("batch", rows), ("keys", a.keys().max(page_size) + SPLIT_TILES.end() * 64), ("pages", pages)]
        {
            if given > i32::MAX as usize / 2 {
                return Err(Error::value(argument, given, "below 2^30 in all on a GPU"));
            }
        }
        let find = |entry: &str, dtype: &str, pages: Option<usize>| {
            let wanted =
                Wanted { entry, dtype, head_dim: width, high: false, bias: false, aligned: true, kind: 0 };
            engine.load_for(wanted, pages)
        };
        let (split, [_, tile]) = find("lla_decode_split", dtype, paged.then_some(page_size))?;
        let (fold, _) = find("lla_decode_fold", "", None)?;
        let (merge, _) = find("lla_decode_merge", dtype, None)?;
        let (whole, _) = find("lla_decode_whole", dtype, paged.then_some(page_size))?;
        let (tolerance, max_iters) = match a.solver() {
            Solver::Auto { tolerance, max_iters } => {
                (tolerance.unwrap_or(DECODE_TOLERANCE), max_iters.unwrap_or(8 * width))
            }
            Solver::Cg { tolerance, max_iters } => (tolerance, max_iters),
            Solver::Direct => unreachable!("refused before"),
        };
        Ok(Self {
            engine: engine.clone(),
            attention: a.clone(),
            layout,
            width,
            tile,
            options: option::CAUSAL * i32::from(a.mask().is_causal())
                + option::WINDOW * i32::from(a.mask().window_len().is_some()),
            ridge: RidgeTable::new(a),
            // Squared in f32: not below its smallest normal number.
            tolerance: tolerance.max(1e-7),
            max_iters: i32::try_from(max_iters).unwrap_or(i32::MAX),
            split,
            fold,
            merge,
            whole,
            shared: Shared::new(engine, a, layout, width, dtype)?,
        })
    }

    pub(super) fn context(&self) -> &Context {
        &self.engine.context
    }

    /// The description.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// How the pages lie.
    pub fn layout(&self) -> PoolLayout {
        self.layout
    }

    /// Rows, one per query.
    fn rows(&self) -> usize {
        let a = &self.attention;
        a.batch() * a.heads() * a.queries()
    }

    fn window(&self) -> usize {
        // Wider windows hide nothing.
        self.attention.mask().window_len().unwrap_or(0).min(1 << 30)
    }

    fn schedule(&self, longest: usize) -> Schedule {
        let rows = self.rows().max(1);
        let most = longest.min(self.attention.keys());
        let tiles = key_tiles(most, self.window(), self.attention.queries(), self.tile);
        let multiprocessors = self.context().multiprocessors();
        // As many splits as fill the GPU once.
        let blocks = multiprocessors * if self.width <= 64 { 2 } else { 1 };
        let wanted = tiles.div_ceil((blocks / rows).max(1));
        let mut of_split =
            wanted.clamp(*SPLIT_TILES.start(), *SPLIT_TILES.end()).max(tiles.div_ceil(MOST_SPLITS));
        let (cost, per_row) = SPLITS_COST[usize::from(self.width > 64)];
        if tiles <= *SPLIT_TILES.end()
            && (tiles.saturating_sub(of_split) as f64) <= cost + per_row * rows as f64
        {
            of_split = tiles;
        }
        let splits = tiles.div_ceil(of_split);
        let part = (2 * self.width + 2) * self.width * 4;
        let folded = 4 * self.width * self.width * 2;
        let at_once = (MOST_MOMENTS / (splits * part + folded)).clamp(1, rows);
        // One launch keeps nothing in memory.
        let (parts, merged) = if splits == 1 { (0, 0) } else { (at_once * splits + MORE_PARTS, at_once) };
        let mut places = Places::default();
        let places = &mut places;
        Schedule {
            shared: self.shared.as_ref().and_then(|shared| {
                shared.schedule(&self.attention, most, self.window(), multiprocessors, places)
            }),
            tiles: of_split,
            splits,
            rows: at_once,
            most,
            moments: places.take(parts * part),
            state: places.take(merged * splits * 8),
            folded: places.take(merged * folded),
            sums: places.take(merged * (4 * self.width + FOLDED_NUMBERS) * 4),
            lse: places.take(rows * 4),
            ridge: places.take(self.ridge.bytes()),
            scale: places.take(4),
            bytes: places.0,
        }
    }

    /// What a run does whose longest sequence has `longest` tokens: what is expected to be fastest. Whatever this says, queries or
    /// outputs of which those of a KV head are 2^30 elements apart are decoded from their moments.
    pub fn method(&self, longest: usize) -> DecodeMethod {
        self.schedule(longest).shared.map_or(DecodeMethod::Moments, |shared| shared.method())
    }

    /// The scratch in bytes that a run needs whose longest sequence has `longest` tokens: at most 0.3 GB and some numbers per query,
    /// and, where queries are solved together, up to 68 kB for every 16 of a KV head's, and 17 kB (9 at head dimensions up to 64) for each
    /// split of those.
    pub fn scratch_bytes(&self, longest: usize) -> usize {
        self.schedule(longest).bytes
    }

    /// Puts a decoding into `stream`. Nothing is waited for, and nothing outlives the work in the stream but what `pointers` name.
    ///
    /// `longest` is at least the longest sequence's length: longer ones are taken to be that long. Where lengths grow under a captured graph, give the room that there is. `scratch` is device memory of
    /// [`DecodePlan::scratch_bytes`] bytes, aligned to 256; without it, memory is taken and given back in the order of the stream.
    /// Ridges that vary are copied from the host with every call: give them as device memory where the stream is being captured.
    ///
    /// Keys and values are read as fp16 relative to a power of two taken from a sample of each split: where others are more than
    /// 2000 times as large as those, outputs are NaN, never wrong.
    ///
    /// # Safety
    /// `stream` must be a stream of the plan's GPU (null is the default stream). Every address must lead to device memory of
    /// the sizes described, valid in the order of the stream and, for what is written, not otherwise used.
    pub unsafe fn run(
        &self,
        stream: RawStream,
        pointers: &DecodePointers,
        longest: usize,
        scratch: Option<u64>,
    ) -> Result<()> {
        let (a, p) = (&self.attention, pointers);
        self.check(p)?;
        if self.rows() == 0 {
            return Ok(());
        }
        let context = self.context();
        let _entered = context.enter()?;
        let plan = self.schedule(longest);
        let own = match scratch {
            Some(_) => None,
            None => Some(Memory::new(context, stream, plan.bytes)?),
        };
        let base = scratch.or(own.as_ref().map(Memory::ptr)).expect("one of the two");
        // SAFETY: inside the scratch.
        let (ridge, scale) = unsafe {
            let scale = match p.scale {
                Some(given) => given,
                None => {
                    let ptr = base + plan.scale;
                    super::driver::fill(ptr, (a.scale() as f32).to_bits(), 1, stream)?;
                    DeviceScale { ptr, stride: 0 }
                }
            };
            (self.ridge.write(base + plan.ridge, p.ridge, stream)?, scale)
        };
        let [moments, state] = [base + plan.moments, base + plan.state];
        let [folded, sums] = [base + plan.folded, base + plan.sums];
        let lse = p.lse.unwrap_or(base + plan.lse);
        let [key_mean, probe_out] = p.state.unwrap_or([0, 0]);
        let [iterations, relative] = p.diagnostics.unwrap_or([0, 0]);
        let PoolLayout { pages, page_size, paged } = self.layout;
        let table_width = self.layout.table_width(a.keys());
        let table = p.table.unwrap_or(0);
        let strides = |arguments: Arguments, view: &DeviceView| {
            arguments.i64s([view.strides[0], view.strides[1]]).i32s([view.strides[2] as i32])
        };
        let mut options = self.options + option::PROBE_GIVEN * i32::from(p.probe.is_some());
        let mut todo = 0;
        if let (Some(shared), Some(schedule)) = (&self.shared, &plan.shared)
            && Shared::reaches(a, p)
        {
            let call = Call {
                pointers: p,
                layout: self.layout,
                base,
                options,
                window: self.window(),
                most: plan.most,
                ridge,
                scale,
                lse,
            };
            // SAFETY: the caller's promise, and the scratch has room for the schedule.
            unsafe { shared.run(stream, a, schedule, &call)? };
            todo = base + schedule.todo;
            options += option::SOME;
        }
        let limits = |arguments: Arguments| {
            arguments
                .f32((self.tolerance * self.tolerance) as f32)
                .i32s([self.max_iters])
                .i32s([p.state.is_some(), p.diagnostics.is_some()].map(i32::from))
        };
        if plan.splits == 1 {
            let arguments = Arguments::new()
                .pointers([p.q.ptr, p.k.ptr, p.v.ptr, table, p.lengths, scale.ptr, ridge.ptr, p.out.ptr])
                .pointers([lse, key_mean, p.probe.unwrap_or(probe_out), iterations, relative, todo])
                .i32s([options, int(a.kv_heads()), int(a.group()), int(a.queries())])
                .i32s([int(self.window()), int(plan.most)])
                .i32s([int(table_width), int(pages), int(page_size), int(a.head_dim()), int(a.value_dim())]);
            let arguments = p.v.after(p.k.after(strides(arguments, &p.q))).i32s([scale.stride]);
            let arguments = limits(strides(arguments.i32s(ridge.strides), &p.out));
            // SAFETY: as below.
            return unsafe { self.whole.launch([side(self.rows()), 1, 1], &arguments, stream) };
        }
        // As many tile blocks as there is room for at a time, of one warp each: where few queries are left to their moments, all others'
        // leave at once.
        let resident = 32 * context.multiprocessors();
        for first in (0..self.rows()).step_by(plan.rows) {
            let rows = plan.rows.min(self.rows() - first);
            // A turn of a block is W = 128 numbers of the two matrices, one more the means.
            let fold_blocks = (resident / rows).min(2 * self.width * self.width / 128 + 1).max(8);
            let common = |options: i32| {
                Arguments::new()
                    .i32s([options, int(first), int(a.kv_heads()), int(a.group()), int(a.queries())])
                    .i32s([int(self.window()), int(plan.most)])
            };
            let split = Arguments::new()
                .pointers([p.q.ptr, p.k.ptr, p.v.ptr, table, p.lengths, moments, state, scale.ptr])
                .pointers([todo])
                .then(&common(options))
                .i32s([int(table_width), int(pages), int(page_size), int(plan.tiles)])
                .i32s([int(a.head_dim()), int(a.value_dim())]);
            let split = p.v.after(p.k.after(strides(split, &p.q))).i32s([scale.stride]);
            let cut = [int(plan.splits), int(plan.tiles * self.tile), int(self.tile)];
            let fold = Arguments::new()
                .pointers([p.lengths, moments, state, folded, sums, todo])
                .then(&common(options))
                .i32s(cut);
            let merge = Arguments::new()
                .pointers([p.q.ptr, p.k.ptr, table, p.lengths, folded, sums, ridge.ptr, p.out.ptr])
                .pointers([lse, key_mean, p.probe.unwrap_or(probe_out), iterations, relative, todo])
                .then(&common(options + option::BLOCK_TABLE * i32::from(paged)))
                .i32s([int(table_width), int(pages), int(page_size)])
                .i32s([int(a.head_dim()), int(a.value_dim())]);
            let merge = p.k.after(strides(merge, &p.q)).i32s(ridge.strides);
            let merge = limits(strides(merge, &p.out));
            // SAFETY: the arguments are those of the kernels' signatures in that order; the caller's memory is as large as
            // described, the scratch as large as the schedule laid out.
            unsafe {
                self.split.launch([side(rows), side(plan.splits), 1], &split, stream)?;
                self.fold.launch([side(rows), side(fold_blocks), 1], &fold, stream)?;
                self.merge.launch([side(rows), 1, 1], &merge, stream)?;
            }
        }
        Ok(())
    }

    fn check(&self, p: &DecodePointers) -> Result<()> {
        if p.table.is_some() != self.layout.paged {
            let say = |there: bool| if there { "given" } else { "none" };
            let allowed = format!("{}, as the plan says", say(self.layout.paged));
            return Err(Error::value("block_table", say(p.table.is_some()), allowed));
        }
        for (argument, view) in [("q", p.q), ("out", p.out)] {
            if i32::try_from(view.strides[2]).is_err() {
                return Err(Error::value(argument, view.strides[2], "a token stride below 2^31 on a GPU"));
            }
        }
        for (argument, pool) in [("k_cache", p.k), ("v_cache", p.v)] {
            check_pool(argument, pool, self.layout.page_size)?;
        }
        Ok(())
    }
}

/// What the kernels can read in place.
pub(super) fn check_pool(argument: &'static str, pool: DevicePool, page_size: usize) -> Result<()> {
    let [page, head, slot] = pool.strides;
    let whole = pool.strides.iter().all(|s| *s >= 0 && s.unsigned_abs().is_multiple_of(UNIT as u64));
    if !pool.ptr.is_multiple_of(16) || !whole {
        let given = format!("address {:#x} with strides {page}, {head}, {slot}", pool.ptr);
        let allowed = format!("aligned to 16 bytes, with strides that are multiples of {UNIT}, on a GPU");
        return Err(Error::value(argument, given, allowed));
    }
    let far = |steps: i64, by: usize| steps.saturating_mul(by as i64) > i64::from(i32::MAX);
    if far(page, 1) || far(slot, page_size.max(1)) {
        let given = format!("strides {page}, {head}, {slot}");
        return Err(Error::value(argument, given, "pages of fewer than 2^31 elements on a GPU"));
    }
    Ok(())
}
