//! [`Shared`]: decoding for queries that share a KV head, by conjugate gradients over the cache.
//!
//! Moments cost products of their own for every query. Where several queries read the same keys, passes over the keys that serve up to
//! 16 queries at once cost no more than reading them, and a few do. Queries whose solve would take too many are
//! left to the moments: the GPU notes which, and the host, which does not see it, launches both.

use super::bundle::Wanted;
use super::decode::{DecodePointers, PoolLayout, key_tiles};
use super::driver::{Arguments, Function};
use super::plan::{Places, int, side};
use super::{DeviceRidge, DeviceScale, DeviceView, Inner, RawStream};
use crate::{Attention, Precision, Result, Solver};
use std::sync::Arc;

/// What decoding takes on an H100, of which the ratios matter, for kernels of width 64 and 128.
struct Cost {
    /// Nanoseconds that moments take for a query and a key.
    moments: f64,
    /// Nanoseconds that three passes together take for a tile of queries and a key.
    passes: f64,
    /// Nanoseconds that launches and steps take however few keys there are.
    steps: f64,
}

const COSTS: [Cost; 2] =
    [Cost { moments: 0.10, passes: 0.24, steps: 90e3 }, Cost { moments: 0.27, passes: 0.45, steps: 130e3 }];
/// The relative error that is expected of outputs whose solve ends, where the description asks for no tolerance.
const OUTPUT_ERROR: f64 = 1e-3;
/// No query is asked for a relative residual below a quarter of this.
const TOLERANCE: f64 = 1.2e-3;
/// Smaller tolerances are for the moments: a residual that is updated from pass to pass knows no better.
const LEAST_TOLERANCE: f64 = 1e-4;
/// Queries of a tile.
const TILE: usize = 16;
/// Tile blocks for a multiprocessor, for kernels of width 64 and 128.
const BLOCKS: [usize; 2] = [4, 6];
/// A split has at least so many key tiles.
const LEAST_TILES: usize = 4;

/// The kernels of such a decoding.
#[derive(Debug)]
pub(super) struct Shared {
    passes: [Arc<Function>; 3],
    steps: [Arc<Function>; 3],
    /// Keys of a tile.
    tile: usize,
    width: usize,
    tolerance: f64,
    error: f64,
    /// Passes that a query may take: more cost as much as its moments.
    limit: usize,
}

/// Where the scratch lies, and how the context is split.
pub(super) struct SharedSchedule {
    /// Tiles of queries.
    tiles: usize,
    /// Key tiles of a split.
    of_split: usize,
    splits: usize,
    sums: u64,
    parts: u64,
    vectors: u64,
    record: u64,
    kept: u64,
    live: u64,
    /// Which queries are left to the moments.
    pub todo: u64,
}

/// What a run is told about its call.
pub(super) struct Call<'a> {
    pub pointers: &'a DecodePointers,
    pub layout: PoolLayout,
    pub base: u64,
    pub options: i32,
    pub window: usize,
    pub most: usize,
    pub ridge: DeviceRidge,
    pub scale: DeviceScale,
    pub lse: u64,
}

impl Shared {
    /// None where every query is decoded by itself.
    pub fn new(
        engine: &Arc<Inner>,
        a: &Attention,
        layout: PoolLayout,
        width: usize,
        dtype: &'static str,
    ) -> Result<Option<Self>> {
        let queries = a.group() * a.queries();
        let Solver::Auto { tolerance, max_iters: None } = a.solver() else { return Ok(None) };
        let exact = a.precision() == Precision::High || tolerance.is_some_and(|t| t < LEAST_TOLERANCE);
        // f32 keys would have to be rounded.
        if queries < 2 || exact || dtype == "f32" {
            return Ok(None);
        }
        let wanted = |entry, kind| Wanted {
            entry,
            dtype,
            head_dim: width,
            high: false,
            bias: false,
            aligned: true,
            kind,
        };
        let pages = layout.paged.then_some(layout.page_size);
        let mut tile = 0;
        let mut pass = |kind| -> Result<_> {
            let (function, [_, keys]) = engine.load_for(wanted("lla_decode_pass", kind), pages)?;
            tile = keys;
            Ok(function)
        };
        let passes = [pass(0)?, pass(1)?, pass(2)?];
        let step = |kind| -> Result<_> { Ok(engine.load(wanted("lla_decode_step", kind))?.0) };
        let steps = [step(0)?, step(1)?, step(2)?];
        let (tolerance, error) = tolerance.map_or((TOLERANCE, OUTPUT_ERROR), |t| (t, 0.0));
        // A pass reads half of the cache; moments of a query take as long as reading all of it, or 1.5 times as long.
        let limit = (queries * width / 64).clamp(3, 10);
        Ok(Some(Self { passes, steps, tile, width, tolerance, error, limit }))
    }

    /// Whether the kernels reach all queries and outputs of a KV head with 32 bits.
    pub fn reaches(a: &Attention, pointers: &DecodePointers) -> bool {
        [pointers.q, pointers.out].iter().all(|view| {
            let far = |stride: i64, by: usize| stride.unsigned_abs().saturating_mul(by as u64);
            let [_, head, row] = view.strides;
            far(head, a.group()).saturating_add(far(row, a.queries())) < 1 << 30
        })
    }

    /// Whether it is expected to take less time than moments, for a context of so many keys.
    fn is_worthwhile(&self, a: &Attention, keys: usize) -> bool {
        let cost = &COSTS[usize::from(self.width > 64)];
        let queries = a.group() * a.queries();
        let gain = cost.moments * queries as f64 - cost.passes * queries.div_ceil(TILE) as f64;
        gain * (a.batch() * a.kv_heads() * keys) as f64 > cost.steps
    }

    /// None where moments are faster.
    pub fn schedule(
        &self,
        a: &Attention,
        most: usize,
        window: usize,
        multiprocessors: usize,
        places: &mut Places,
    ) -> Option<SharedSchedule> {
        let tiles = a.batch() * a.kv_heads() * (a.group() * a.queries()).div_ceil(TILE);
        let key_tiles = key_tiles(most, window, a.queries(), self.tile);
        if !self.is_worthwhile(a, key_tiles * self.tile) {
            return None;
        }
        let blocks = multiprocessors * BLOCKS[usize::from(self.width > 64)];
        let of_split = key_tiles.div_ceil((blocks / tiles.max(1)).max(1)).max(LEAST_TILES);
        let splits = key_tiles.div_ceil(of_split);
        let columns = self.width * TILE;
        Some(SharedSchedule {
            tiles,
            of_split,
            splits,
            sums: places.take(tiles * splits * 2 * columns * 4),
            parts: places.take(tiles * splits * 4 * TILE * 4),
            vectors: places.take(tiles * 3 * columns * 2),
            record: places.take(tiles * 16 * TILE * 4),
            kept: places.take(tiles * 3 * columns * 4),
            live: places.take(tiles * 4),
            todo: places.take(a.batch() * a.heads() * a.queries() * 4),
        })
    }

    /// Decodes, and notes in `todo` which queries are left to the moments.
    ///
    /// # Safety
    /// As for [`super::DecodePlan::run`]; the scratch is laid out by `schedule` from `call.base` on.
    pub unsafe fn run(
        &self,
        stream: RawStream,
        a: &Attention,
        plan: &SharedSchedule,
        call: &Call,
    ) -> Result<()> {
        let (p, base) = (call.pointers, call.base);
        let [sums, parts, vectors, record] =
            [plan.sums, plan.parts, plan.vectors, plan.record].map(|at| base + at);
        let [kept, live, todo] = [plan.kept, plan.live, plan.todo].map(|at| base + at);
        let PoolLayout { pages, page_size, .. } = call.layout;
        let table_width = call.layout.table_width(a.keys());
        let common = Arguments::new()
            .i32s([call.options, int(a.kv_heads()), int(a.group()), int(a.queries())])
            .i32s([int(call.window), int(call.most)]);
        let rows = |arguments: Arguments, view: &DeviceView| {
            arguments.i64s([view.strides[0]]).i32s([view.strides[1] as i32, view.strides[2] as i32])
        };
        let pass = Arguments::new()
            .pointers([p.q.ptr, p.k.ptr, p.v.ptr, p.table.unwrap_or(0), p.lengths, sums, parts, vectors])
            .pointers([record, live, call.scale.ptr])
            .then(&common)
            .i32s([int(table_width), int(pages), int(page_size), int(plan.of_split)])
            .i32s([int(a.head_dim()), int(a.value_dim())]);
        let pass = p.v.after(p.k.after(rows(pass, &p.q))).i32s([call.scale.stride]);
        let [key_mean, probe] = p.state.unwrap_or([0, 0]);
        let [iterations, relative] = p.diagnostics.unwrap_or([0, 0]);
        let step = Arguments::new()
            .pointers([p.q.ptr, p.lengths, sums, parts, vectors, record, kept, live, todo])
            .pointers([call.ridge.ptr, p.out.ptr, call.lse, key_mean, p.probe.unwrap_or(probe)])
            .pointers([iterations, relative])
            .then(&common)
            .i32s([int(plan.splits), int(plan.of_split * self.tile), int(self.tile)])
            .i32s([int(a.head_dim()), int(a.value_dim())]);
        let step = rows(rows(step, &p.q).i32s(call.ridge.strides), &p.out)
            .f32((self.tolerance * self.tolerance) as f32)
            .f32((self.error * self.error) as f32);
        let flags = [p.state.is_some(), p.diagnostics.is_some()].map(i32::from);
        // SAFETY: the arguments are those of the kernels' signatures in that order; the caller's memory is as large as described,
        // the scratch as large as the schedule laid out.
        let turn = |kind: usize, left: usize| unsafe {
            self.passes[kind].launch([side(plan.tiles), side(plan.splits), 1], &pass, stream)?;
            let step = Arguments::new().then(&step).i32s([int(left)]).i32s(flags);
            self.steps[kind].launch([side(plan.tiles), 1, 1], &step, stream)
        };
        turn(0, self.limit)?;
        if p.probe.is_none() {
            (0..self.limit).rev().try_for_each(|left| turn(1, left))?;
        }
        turn(2, 0)
    }
}
