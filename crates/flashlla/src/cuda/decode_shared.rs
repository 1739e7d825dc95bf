//! [`Shared`]: decoding for queries that share a KV head, by conjugate gradients over the cache.
//!
//! Moments cost products of their own for every query. Where several queries read the same keys, passes over the keys that serve up to
//! 16 queries at once cost no more than reading them, and a few do. Queries whose solve would take too many are
//! left to the moments: the GPU notes which, and the host, which does not see it, launches both.

use super::bundle::Wanted;
use super::decode::{DecodeMethod, DecodePointers, PoolLayout, key_tiles};
use super::driver::{Arguments, Function};
use super::plan::{Places, int, side};
use super::{DeviceRidge, DeviceScale, DeviceView, Inner, RawStream};
use crate::{Attention, Precision, Result, Solver};
use std::sync::Arc;

/// What decoding takes on an H100, in nanoseconds, of which the ratios matter, for kernels of width 64 and 128. Fits to timings on
/// normal keys at ridge 1.
struct Cost {
    /// Moments: their launches, and of every query its solve and, for each key, its sums.
    moments: [f64; 3],
    /// A block that makes all passes: its steps, and each key.
    together: [f64; 2],
    /// Launches and steps of passes that are split, and every key of a tile of queries.
    passes: [f64; 2],
}

const COSTS: [Cost; 2] = [
    Cost { moments: [18e3, 40.0, 0.087], together: [100e3, 82.0], passes: [85e3, 0.168] },
    Cost { moments: [20e3, 130.0, 0.235], together: [255e3, 150.0], passes: [100e3, 0.37] },
];
/// With so many keys there are twice as many passes as with many more.
const FEW_KEYS: f64 = 2500.0;
/// The relative error that is expected of outputs whose solve ends, where the description asks for no tolerance.
const OUTPUT_ERROR: f64 = 5e-4;
/// No query is asked for a relative residual below a quarter of this.
const TOLERANCE: f64 = 4e-4;
/// Smaller tolerances are for the moments: a residual that is updated from pass to pass knows no better.
const LEAST_TOLERANCE: f64 = 1e-4;
/// Queries of a tile.
const TILE: usize = 16;
/// A pass is not split into more.
const MOST_SPLITS: usize = 256;
/// Tile blocks of a pass that a multiprocessor runs at a time, for kernels of width 64 and 128.
const RESIDENT: [usize; 2] = [4, 3];
/// Tile blocks that make all passes, which a multiprocessor runs at a time.
const TOGETHER: usize = 2;
/// Passes that such a block may make.
const TOGETHER_LIMIT: usize = 16;

/// The kernels of such a decoding.
#[derive(Debug)]
pub(super) struct Shared {
    passes: [Arc<Function>; 3],
    steps: [Arc<Function>; 3],
    together: Arc<Function>,
    /// Keys of a pass's tile.
    tile: usize,
    width: usize,
    tolerance: f64,
    error: f64,
    /// Passes that a query may take: more cost as much as its moments.
    limit: usize,
}

/// How a context is gone through.
enum Way {
    /// One launch, in which a tile block makes all passes.
    Together { kept: u64, record: u64 },
    /// A launch for each pass, split over the keys, and one for each step.
    Passes {
        /// Key tiles of a split.
        of_split: usize,
        splits: usize,
        sums: u64,
        parts: u64,
        vectors: u64,
        record: u64,
        kept: u64,
        live: u64,
    },
}

/// What is launched, and where the scratch lies.
pub(super) struct SharedSchedule {
    /// Tiles of queries.
    tiles: usize,
    way: Way,
    /// Which queries are left to the moments.
    pub todo: u64,
}

impl SharedSchedule {
    pub fn method(&self) -> DecodeMethod {
        match self.way {
            Way::Together { .. } => DecodeMethod::Together,
            Way::Passes { .. } => DecodeMethod::Passes,
        }
    }
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
        // f32 keys would have to be rounded. What makes all passes looks at a first key even where none counts.
        let empty = a.keys() == 0 || layout.pages == 0;
        if queries < 2 || exact || dtype == "f32" || empty {
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
        let (together, _) = engine.load_for(wanted("lla_decode_together", 0), pages)?;
        let (tolerance, error) = tolerance.map_or((TOLERANCE, OUTPUT_ERROR), |t| (t, 0.0));
        // More passes cost as much as moments.
        let limit = (queries * width / 32).clamp(4, 10);
        Ok(Some(Self { passes, steps, together, tile, width, tolerance, error, limit }))
    }

    /// Whether the kernels reach all queries and outputs of a KV head with 32 bits.
    pub fn reaches(a: &Attention, pointers: &DecodePointers) -> bool {
        [pointers.q, pointers.out].iter().all(|view| {
            let far = |stride: i64, by: usize| stride.unsigned_abs().saturating_mul(by as u64);
            let [_, head, row] = view.strides;
            far(head, a.group()).saturating_add(far(row, a.queries())) < 1 << 30
        })
    }

    /// What is expected to take the least time, for a context of so many keys.
    fn fastest(&self, a: &Attention, tiles: usize, keys: usize, multiprocessors: usize) -> DecodeMethod {
        let Cost { moments, together, passes } = &COSTS[usize::from(self.width > 64)];
        let (queries, waves) =
            (a.batch() * a.heads() * a.queries(), tiles.div_ceil(TOGETHER * multiprocessors));
        let (queries, waves, tiles, keys) = (queries as f64, waves as f64, tiles as f64, keys as f64);
        let moments = moments[0] + queries * (moments[1] + keys * moments[2]);
        let together = waves * (together[0] + keys * together[1]);
        let passes = passes[0] + tiles * (keys + FEW_KEYS) * passes[1];
        if moments <= together.min(passes) {
            DecodeMethod::Moments
        } else if together < passes {
            DecodeMethod::Together
        } else {
            DecodeMethod::Passes
        }
    }

    /// Key tiles of a split of a pass. Every wave of blocks costs as much as its key tiles and five more; adding up splits
    /// costs as much as 0.6 key tiles for each.
    fn of_split(&self, tiles: usize, key_tiles: usize, multiprocessors: usize) -> usize {
        let resident = multiprocessors * RESIDENT[usize::from(self.width > 64)];
        let cost = |splits: usize| {
            let waves = (tiles * splits).div_ceil(resident.max(1));
            10 * waves * (key_tiles.div_ceil(splits) + 5) + 6 * splits
        };
        key_tiles
            .div_ceil((1..=key_tiles.clamp(1, MOST_SPLITS)).min_by_key(|&splits| cost(splits)).unwrap_or(1))
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
        let columns = self.width * TILE;
        let way = match self.fastest(a, tiles, key_tiles * self.tile, multiprocessors) {
            DecodeMethod::Moments => return None,
            DecodeMethod::Together => Way::Together {
                kept: places.take(tiles * 8 * columns * 4),
                record: places.take(tiles * 2 * 16 * TILE * 4),
            },
            DecodeMethod::Passes => {
                let of_split = self.of_split(tiles, key_tiles, multiprocessors);
                let splits = key_tiles.div_ceil(of_split);
                Way::Passes {
                    of_split,
                    splits,
                    sums: places.take(tiles * splits * 2 * columns * 4),
                    parts: places.take(tiles * splits * 4 * TILE * 4),
                    vectors: places.take(tiles * 3 * columns * 2),
                    record: places.take(tiles * 16 * TILE * 4),
                    kept: places.take(tiles * 3 * columns * 4),
                    live: places.take(tiles * 4),
                }
            }
        };
        Some(SharedSchedule { tiles, way, todo: places.take(a.batch() * a.heads() * a.queries() * 4) })
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
        let todo = base + plan.todo;
        let PoolLayout { pages, page_size, .. } = call.layout;
        let table = p.table.unwrap_or(0);
        let table_width = call.layout.table_width(a.keys());
        let dims = [int(a.head_dim()), int(a.value_dim())];
        let common = Arguments::new()
            .i32s([call.options, int(a.kv_heads()), int(a.group()), int(a.queries())])
            .i32s([int(call.window), int(call.most)]);
        let rows = |arguments: Arguments, view: &DeviceView| {
            arguments.i64s([view.strides[0]]).i32s([view.strides[1] as i32, view.strides[2] as i32])
        };
        let bounds = |arguments: Arguments| {
            let [tolerance, error] = [self.tolerance, self.error].map(|x| (x * x) as f32);
            arguments.f32(tolerance).f32(error)
        };
        let [key_mean, probe] = p.state.unwrap_or([0, 0]);
        let probe = p.probe.unwrap_or(probe);
        let [iterations, relative] = p.diagnostics.unwrap_or([0, 0]);
        let flags = [p.state.is_some(), p.diagnostics.is_some()].map(i32::from);
        let (of_split, splits, [sums, parts, vectors, record, kept, live]) = match plan.way {
            Way::Together { kept, record } => {
                let arguments = Arguments::new()
                    .pointers([p.q.ptr, p.k.ptr, p.v.ptr, table, p.lengths, call.scale.ptr, call.ridge.ptr])
                    .pointers([p.out.ptr, call.lse, key_mean, probe, iterations, relative, todo])
                    .pointers([base + kept, base + record])
                    .then(&common)
                    .i32s([int(table_width), int(pages), int(page_size)])
                    .i32s(dims);
                let arguments = p.v.after(p.k.after(rows(arguments, &p.q)));
                let arguments = arguments.i32s([call.scale.stride]).i32s(call.ridge.strides);
                let limit = if p.probe.is_some() { 0 } else { TOGETHER_LIMIT };
                let arguments = bounds(rows(arguments, &p.out)).i32s([int(limit)]).i32s(flags);
                // SAFETY: as below.
                return unsafe { self.together.launch([side(plan.tiles), 1, 1], &arguments, stream) };
            }
            Way::Passes { of_split, splits, sums, parts, vectors, record, kept, live } => {
                (of_split, splits, [sums, parts, vectors, record, kept, live].map(|at| base + at))
            }
        };
        let pass = Arguments::new()
            .pointers([p.q.ptr, p.k.ptr, p.v.ptr, table, p.lengths, sums, parts, vectors])
            .pointers([record, live, call.scale.ptr])
            .then(&common)
            .i32s([int(table_width), int(pages), int(page_size), int(of_split)])
            .i32s(dims);
        let pass = p.v.after(p.k.after(rows(pass, &p.q))).i32s([call.scale.stride]);
        let step = Arguments::new()
            .pointers([p.q.ptr, p.lengths, sums, parts, vectors, record, kept, live, todo])
            .pointers([call.ridge.ptr, p.out.ptr, call.lse, key_mean, probe, iterations, relative])
            .then(&common)
            .i32s([int(splits), int(of_split * self.tile), int(self.tile)])
            .i32s(dims);
        let step = bounds(rows(rows(step, &p.q).i32s(call.ridge.strides), &p.out));
        // SAFETY: the arguments are those of the kernels' signatures in that order; the caller's memory is as large as described,
        // the scratch as large as the schedule laid out.
        let turn = |kind: usize, left: usize| unsafe {
            self.passes[kind].launch([side(plan.tiles), side(splits), 1], &pass, stream)?;
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
