//! One [`Attention`] made ready for the GPU: what the forward's and the backward's plan have in common.

use super::bundle::Wanted;
use super::driver::{Arguments, Function, fill, upload};
use super::{Inner, RawStream};
use crate::{Attention, Diagnostics, Element, Error, Result, Solver};
use std::sync::Arc;

/// Blocks' worth of work that one block does in kernels that nearly always find nothing to do: then it is blocks that cost time.
pub(super) const SELDOM: u32 = 8;
/// Every token count is rounded up to this inside: a multiple of all tiles.
const TOKENS: usize = 128;

/// Expected relative error of the outputs, as a root of the mean square over a block of 64 queries, at which, from 64 queries on,
/// [`Solver::Auto`](crate::Solver) without a tolerance ends its solves with [`Precision::Standard`](crate::Precision). Their rounding to
/// `bf16` alone is 1.6e-3.
///
/// It is estimated for values of size 1 that know nothing of their keys: a residual r leaves at most |r| / λ of the probe, along which
/// the keys vary by |C q|² / qᵀC q, with C their covariance. Queries that make passes may be left at more by a factor that is the root of
/// ln(1/ρ) / (1 - ρ), where ρ is what a pass leaves of the residual's square: they end anywhere below that bound. No query of the block is left
/// at more than five times the mean, none is asked for a relative residual below a quarter of [`STANDARD_TOLERANCE`], and all
/// are for one of 1e-2. On normal queries, keys and values it made outputs err by up to 2.5e-3 where all see 512 to 6144 keys, at λ from 1 to 100, their
/// rounding included.
pub const STANDARD_OUTPUT_ERROR: f64 = 2.2e-3;
/// The same of the gradients of queries, keys and values, for the backward's own solves. What residuals do to gradients was measured
/// on normal queries, keys and values; where values are functions of the keys, gradients of keys err by twice as much.
pub const STANDARD_GRADIENT_ERROR: f64 = 2.5e-3;
/// [`STANDARD_OUTPUT_ERROR`], and what it is for blocks that make no pass where contexts grow with the queries ([`Mask::grows`](crate::Mask::grows)).
/// What is left then falls with the square of the context: in the mean over a sequence it is at most a quarter of the largest square. Outputs of such
/// sequences of 512 to 6144 tokens erred by up to 2.2e-3 in all, at λ from 1 to 100.
pub(super) const OUTPUT_ERRORS: [f64; 2] = [STANDARD_OUTPUT_ERROR, 5.4e-3];
/// The same of gradients. Those of queries and keys erred by up to 4.2e-3 at λ = 10, 4.7e-3 at 30, of such sequences of 1024 and 3072 tokens.
pub(super) const GRADIENT_ERRORS: [f64; 2] = [STANDARD_GRADIENT_ERROR, 5e-3];
/// Relative residual with [`Precision::Standard`](crate::Precision) at head dimensions up to 64, over the square root of 2 where the
/// kernels are 128 wide: right-hand sides grow like the root of the head dimension, and the outputs' errors with them. Small ridges ask
/// for a part of it; a query that ran out of steps above it has not converged.
pub const STANDARD_TOLERANCE: f64 = 3e-3;
/// Query rows of a block that solves together.
const BLOCK: usize = 64;
/// Relative residual above which no solve counts as done, however small the error that is expected of it.
const MOST_RESIDUAL: f64 = 0.1;
/// Relative residual that every query is solved to with [`Precision::High`](crate::Precision), at all head dimensions.
pub const HIGH_TOLERANCE: f64 = 1e-4;

/// Bits of the kernels' `options`.
pub(super) mod option {
    pub const CAUSAL: i32 = 1;
    pub const WINDOW: i32 = 2;
    pub const RANGES: i32 = 4;
    pub const LEAVE_ONE_OUT: i32 = 8;
    pub const PROBE_GIVEN: i32 = 16;
    pub const HEAVY_FIRST: i32 = 32;
    pub const BLOCK_TABLE: i32 = 64;
    /// Only queries that a list names.
    pub const SOME: i32 = 256;
}

/// A tensor `[batch, head, token, dim]` in device memory, its dims side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceView {
    /// The address of element (0, 0, 0, 0), aligned to its type.
    pub ptr: u64,
    /// Distances between neighbours along batch, head and token, in elements.
    pub strides: [i64; 3],
}

/// A bias per key in device memory, `f32`, neighbouring keys side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBias {
    /// The address of the first batch's, first head's, first key's.
    pub ptr: u64,
    /// Distances between batches and between *query* heads, in elements; 0 where they share it.
    pub strides: [i32; 2],
}

/// Ridges in device memory, `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRidge {
    /// The address of the first.
    pub ptr: u64,
    /// Distances between batches, query heads and queries, in elements; 0 where they share it.
    pub strides: [i32; 3],
}

/// What a plan is made for beside the description.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Logits get a bias.
    pub bias: bool,
    /// Probes are given.
    pub probe: bool,
}

/// The name of a storage type in the bundle.
pub(super) fn dtype<T: Element>() -> Result<&'static str> {
    match T::NAME {
        "f64" => Err(Error::value("dtype", "f64", "f32, bf16 or f16 on a GPU (compute f64 on the CPU)")),
        name => Ok(name),
    }
}

/// Whether a tensor can be read and written 16 bytes at a time.
pub(super) fn aligned(view: &DeviceView, cols: usize, bytes: usize) -> bool {
    let whole = |n: u64| (n * bytes as u64).is_multiple_of(16);
    view.ptr.is_multiple_of(16) && whole(cols as u64) && view.strides.iter().all(|s| whole(s.unsigned_abs()))
}

/// Places in one allocation, each aligned to 256 bytes.
#[derive(Default)]
pub(super) struct Places(pub usize);

impl Places {
    pub fn take(&mut self, bytes: usize) -> u64 {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(256);
        at as u64
    }
}

/// A kernel in its variants: for tensors that can be accessed 16 bytes at a time, and for any; and for such tensors without the options that
/// most calls have no use for.
#[derive(Debug)]
pub(super) struct Variants {
    usual: Arc<Function>,
    aligned: Arc<Function>,
    any: Arc<Function>,
    /// Query rows and key rows of a tile block.
    pub block: [usize; 2],
}

impl Variants {
    pub fn pick(&self, aligned: bool) -> &Function {
        if aligned { &self.aligned } else { &self.any }
    }

    /// The same for a call that may want diagnostics.
    pub fn pick_for(&self, aligned: bool, diagnostics: bool) -> &Function {
        if aligned && !diagnostics { &self.usual } else { self.pick(aligned) }
    }
}

/// Keys per query from which on a kernel's variant for long contexts is faster, where it has one (measured on an H100 at a ridge of 10).
fn long_from(entry: &str) -> i64 {
    if entry == "lla_forward" { 1536 } else { 3072 }
}

/// A size as a kernel takes it.
pub(super) fn int(n: usize) -> i32 {
    i32::try_from(n).expect("sizes were checked when the plan was made")
}

/// A side of a grid.
pub(super) fn side(n: usize) -> u32 {
    u32::try_from(n).expect("sizes were checked when the plan was made")
}

/// A description's ridges as the kernels read them.
#[derive(Debug)]
pub(super) struct RidgeTable {
    values: Vec<f32>,
    strides: [i32; 3],
}

impl RidgeTable {
    pub fn new(a: &Attention) -> Self {
        // Neither 0 nor infinite in f32; at such ridges nothing changes any more.
        let values = a.ridge().values().iter().map(|x| x.clamp(1e-30, 1e30) as f32).collect();
        let place = |b, h, n| a.ridge().index(b, h, n) as i32;
        let step = |size: usize, next: [usize; 3]| {
            if size > 1 { place(next[0], next[1], next[2]) } else { 0 }
        };
        let strides = [step(a.batch(), [1, 0, 0]), step(a.heads(), [0, 1, 0]), step(a.queries(), [0, 0, 1])];
        Self { values, strides }
    }

    pub fn bytes(&self) -> usize {
        self.values.len() * 4
    }

    /// The ridges to use: those that are given, or its own, written to `ptr`.
    ///
    /// # Safety
    /// There must be room at `ptr` in memory of the stream's.
    pub unsafe fn write(
        &self,
        ptr: u64,
        given: Option<DeviceRidge>,
        stream: RawStream,
    ) -> Result<DeviceRidge> {
        if let Some(given) = given {
            return Ok(given);
        }
        // SAFETY: the caller's.
        unsafe {
            match self.values[..] {
                [one] => fill(ptr, one.to_bits(), 1, stream)?,
                _ => upload(ptr, &self.values, stream)?,
            }
        }
        Ok(DeviceRidge { ptr, strides: self.strides })
    }
}

/// What forward and backward have in common: the description, translated.
#[derive(Debug)]
pub(super) struct Core {
    pub engine: Arc<Inner>,
    pub attention: Attention,
    pub has: PlanOptions,
    /// The head dimension of the kernels.
    pub width: usize,
    pub options: i32,
    offset: i32,
    window: i32,
    /// First visible key and one past the last of every query, where causality and a window do not say it all. Neither
    /// ever decreases from query to query.
    ranges: Option<[Vec<i32>; 2]>,
    ridge: RidgeTable,
    pub tolerance: f64,
    /// Solves end by the error that is expected of the results, not by residuals.
    by_error: bool,
    pub max_iters: i32,
    /// Numbers of `ranges` by block, each with the block's size: see [`Core::block_bounds`].
    bounds: Vec<(usize, Vec<i32>)>,
}

/// Where a core's tables lie in the scratch.
#[derive(Debug)]
pub(super) struct Tables {
    ranges: [u64; 2],
    bounds: Vec<u64>,
    ridge: u64,
}

impl Core {
    pub fn new(engine: &Arc<Inner>, attention: &Attention, has: PlanOptions, high: bool) -> Result<Self> {
        let a = attention;
        if a.solver() == Solver::Direct {
            return Err(Error::value(
                "solver",
                "direct",
                "auto or cg on a GPU (compute direct solves on the CPU)",
            ));
        }
        let widths = engine.bundle.head_dims(&engine.architecture, "lla_backward_solve");
        let widest = widths.last().copied().unwrap_or(0);
        let needed = a.head_dim().max(a.value_dim());
        let Some(&width) = widths.iter().find(|&&w| w >= needed) else {
            let (argument, given) = match a.head_dim() > widest {
                true => ("head_dim", a.head_dim()),
                false => ("value_dim", a.value_dim()),
            };
            return Err(Error::value(
                argument,
                given,
                format!("at most {widest}, the widest of these GPU kernels"),
            ));
        };
        // Rows are counted in 32 bits, and a grid's second side has 16.
        let rows = a.batch() * a.heads() * a.queries().next_multiple_of(TOKENS) * 2;
        let key_rows = a.batch() * a.kv_heads() * a.keys().next_multiple_of(TOKENS) * 2;
        for (argument, tokens, rows) in [("queries", a.queries(), rows), ("keys", a.keys(), key_rows)] {
            if rows > i32::MAX as usize || tokens > 64 * 65535 {
                let (b, h) = (a.batch(), a.heads());
                let allowed = format!("small enough on a GPU for batch {b} and {h} heads to have 2^30 rows");
                return Err(Error::value(argument, tokens, allowed));
            }
        }
        if a.batch() * a.heads() > 65535 {
            return Err(Error::value(
                "batch",
                a.batch(),
                "on a GPU, at most 65535 when multiplied by the query heads",
            ));
        }
        let (options, offset, window, ranges) = translate_mask(a, has.probe);
        let (tolerance, by_error, max_iters) = limits(a.solver(), high, width);
        // The mean over a block of few queries would be one over rows that are not there.
        let by_error = by_error && a.queries() >= BLOCK;
        Ok(Self {
            engine: engine.clone(),
            attention: a.clone(),
            has,
            width,
            options,
            offset,
            window,
            ranges,
            ridge: RidgeTable::new(a),
            tolerance,
            by_error,
            max_iters,
            bounds: vec![],
        })
    }

    /// Keys that a query sees, in the mean over the queries, with the masks of usual calls.
    fn mean_keys(&self) -> i64 {
        let a = &self.attention;
        let keys = a.keys() as i64;
        if self.options & option::CAUSAL == 0 {
            return keys;
        }
        (i64::from(self.offset) + a.queries() as i64 / 2).clamp(0, keys)
    }

    /// Whether the mask and the probe are those of usual calls, which some kernels have a variant for: all keys or a causal mask, and nothing given.
    fn is_usual(&self) -> bool {
        self.options & !(option::CAUSAL | option::HEAVY_FIRST) == 0
    }

    /// A kernel for this width, in all variants.
    pub fn find(&self, entry: &str, dtype: &str, high: bool, bias: bool) -> Result<Variants> {
        let head_dim = self.width;
        // Most kernels have a variant for any alignment; those that touch no tensor of the caller's only that.
        let of =
            |aligned, kind| self.engine.load(Wanted { entry, dtype, head_dim, high, bias, aligned, kind });
        let (any, block) = of(false, 0)?;
        let first_of = |kinds: &[u32]| {
            kinds.iter().find_map(|&kind| match of(true, kind) {
                // Those for long contexts have other key rows, which nobody asks these kernels for.
                Ok((function, [queries, keys])) if queries == block[0] && (keys == block[1] || kind == 2) => {
                    Some(function)
                }
                _ => None,
            })
        };
        let aligned = first_of(&[0]).unwrap_or_else(|| any.clone());
        let kinds: &[u32] = match self.is_usual() {
            true if self.mean_keys() >= long_from(entry) => &[2, 1],
            true => &[1],
            false => &[],
        };
        let usual = first_of(kinds).unwrap_or_else(|| aligned.clone());
        Ok(Variants { usual, aligned, any, block })
    }

    /// Queries N', rounded up.
    pub fn padded_queries(&self) -> usize {
        self.attention.queries().next_multiple_of(TOKENS)
    }

    /// Keys M', rounded up; never none.
    pub fn padded_keys(&self) -> usize {
        self.attention.keys().max(1).next_multiple_of(TOKENS)
    }

    /// Query heads and KV heads of all batches.
    pub fn heads(&self) -> [usize; 2] {
        let a = &self.attention;
        [a.batch() * a.heads(), a.batch() * a.kv_heads()]
    }

    /// The shape of mean keys and probes.
    pub fn state_shape(&self) -> [usize; 4] {
        let a = &self.attention;
        [a.batch(), a.heads(), self.padded_queries(), self.width]
    }

    /// Makes ready for kernels with blocks of so many queries.
    pub fn use_block(&mut self, block: usize) {
        let Some([first, end]) = &self.ranges else { return };
        if self.bounds.iter().any(|(b, _)| *b == block) {
            return;
        }
        // Smallest and largest first key, smallest and largest end, of every block.
        let bounds = first
            .chunks(block)
            .zip(end.chunks(block))
            .flat_map(|(first, end)| [first[0], first[first.len() - 1], end[0], end[end.len() - 1]]);
        self.bounds.push((block, bounds.collect()));
    }

    /// For every block of so many keys the first query that sees any of them and one past the last, where causality and a
    /// window do not say it all.
    pub fn queries_of_keys(&self, block: usize) -> Option<[Vec<i32>; 2]> {
        let [first, end] = self.ranges.as_ref()?;
        let blocks = self.attention.keys().div_ceil(block);
        let begin = |j: usize| end.partition_point(|&e| e <= int(j * block)) as i32;
        let finish = |j: usize| first.partition_point(|&f| f < int((j + 1) * block)) as i32;
        Some([(0..blocks).map(begin).collect(), (0..blocks).map(finish).collect()])
    }

    pub fn place_tables(&self, places: &mut Places) -> Tables {
        let len = self.ranges.as_ref().map_or(0, |[first, _]| first.len() * 4);
        Tables {
            ranges: [places.take(len), places.take(len)],
            bounds: self.bounds.iter().map(|(_, bounds)| places.take(bounds.len() * 4)).collect(),
            ridge: places.take(self.ridge.bytes()),
        }
    }

    /// Writes the tables into the scratch at `base`, and returns the ridges to use.
    ///
    /// # Safety
    /// The scratch must be memory of the stream's, as large as was placed.
    pub unsafe fn write_tables(
        &self,
        tables: &Tables,
        base: u64,
        given: Option<DeviceRidge>,
        stream: RawStream,
    ) -> Result<DeviceRidge> {
        // SAFETY: the caller's.
        unsafe {
            if let Some(ranges) = &self.ranges {
                for (at, values) in tables.ranges.iter().zip(ranges) {
                    upload(base + at, values, stream)?;
                }
                for (at, (_, values)) in tables.bounds.iter().zip(&self.bounds) {
                    upload(base + at, values, stream)?;
                }
            }
            self.ridge.write(base + tables.ridge, given, stream)
        }
    }

    /// The arguments from `options` to `range_batch`, which all kernels that look at pairs begin with.
    fn pairs(&self, tables: &Tables, base: u64) -> Arguments {
        let a = &self.attention;
        let [lo, hi] = tables.ranges.map(|at| base + at);
        Arguments::new()
            .i32s([self.options, int(a.heads()), int(a.kv_heads())])
            .i32s([int(a.queries()), int(self.padded_queries()), int(a.keys()), int(self.padded_keys())])
            .i32s([self.offset, self.window])
            .pointers([lo, hi])
            .i32s([0])
    }

    /// The arguments from `options` to `range_batch` of the kernel that goes by rows of queries and keys.
    pub fn by_row(&self, tables: &Tables, base: u64) -> Arguments {
        let a = &self.attention;
        let [lo, hi] = tables.ranges.map(|at| base + at);
        Arguments::new()
            .i32s([self.options, int(a.heads()), int(a.kv_heads()), int(a.queries()), int(a.keys())])
            .i32s([int(self.padded_keys()), self.offset, self.window])
            .pointers([lo, hi])
            .i32s([0])
    }

    fn bias(bias: Option<DeviceBias>) -> Arguments {
        let bias = bias.unwrap_or(DeviceBias { ptr: 0, strides: [0, 0] });
        Arguments::new().pointers([bias.ptr]).i32s(bias.strides)
    }

    /// The arguments from `options` to `bias_head` of a kernel with blocks of so many queries.
    pub fn by_query(&self, tables: &Tables, base: u64, block: usize, bias: Option<DeviceBias>) -> Arguments {
        let bounds = self.bounds.iter().position(|(b, _)| *b == block).map_or(0, |i| base + tables.bounds[i]);
        self.pairs(tables, base).pointers([bounds]).i32s([0]).then(&Self::bias(bias))
    }

    /// The same of a kernel whose blocks are of keys.
    pub fn by_key(&self, tables: &Tables, base: u64, bias: Option<DeviceBias>) -> Arguments {
        self.pairs(tables, base).then(&Self::bias(bias))
    }

    /// The arguments of a solve from `ridge_batch` to `first_error2`; the errors are those of the results at which it may end, and at which it needs no
    /// pass where contexts grow.
    pub fn solve_limits(&self, ridge: DeviceRidge, [error, growing]: [f64; 2]) -> Arguments {
        // A bias may hide keys.
        let grows =
            self.attention.mask().grows(self.attention.queries(), self.attention.keys()) && !self.has.bias;
        let first = if grows { growing } else { error };
        let [error2, first2] = [error, first].map(|error| if self.by_error { error * error } else { 0.0 });
        Arguments::new()
            .i32s(ridge.strides)
            .f32((self.tolerance * self.tolerance) as f32)
            .f32(error2 as f32)
            .i32s([self.max_iters])
            .f32(first2 as f32)
    }

    /// Whether a query stopped short of what its solve aims for.
    pub fn unconverged(&self, diagnostics: &Diagnostics) -> bool {
        // Blocks that end by the error of their results leave more, but no solve that went well a tenth, unless out of steps.
        let in_steps = |&steps: &u32| self.by_error && i64::from(steps) < i64::from(self.max_iters);
        let above = |steps: &u32, &r: &f32| {
            f64::from(r) > if in_steps(steps) { MOST_RESIDUAL } else { 1.001 * self.tolerance }
        };
        diagnostics.iterations.iter().zip(&diagnostics.residual).any(|(steps, r)| above(steps, r))
    }

    /// Whether a bias is there exactly if one was planned, and token strides fit.
    pub fn check(&self, has: PlanOptions, views: &[(&'static str, DeviceView)]) -> Result<()> {
        for (argument, given, planned) in
            [("bias", has.bias, self.has.bias), ("probe", has.probe, self.has.probe)]
        {
            if given != planned {
                let say = |there: bool| if there { "given" } else { "none" };
                return Err(Error::value(
                    argument,
                    say(given),
                    format!("{}, as the plan says", say(planned)),
                ));
            }
        }
        match views.iter().find(|(_, view)| i32::try_from(view.strides[2]).is_err()) {
            Some((argument, view)) => {
                Err(Error::value(argument, view.strides[2], "a token stride below 2^31 on a GPU"))
            }
            None => Ok(()),
        }
    }
}

/// Converts up to four tensors to fp16 rows with a unit per head: two launches.
#[derive(Debug)]
pub(super) struct Convert {
    /// By a guess at the units.
    convert: Variants,
    /// What the guess did not fit.
    adjust: Variants,
    bytes: usize,
}

/// Memory that [`Convert`] works in, for up to two tensors.
#[derive(Debug)]
pub(super) struct ConvertScratch {
    amax: u64,
    marks: u64,
}

impl ConvertScratch {
    /// Where the largest magnitudes of chunks are.
    pub fn amax(&self) -> u64 {
        self.amax
    }

    /// Where rows are marked that hold what is not finite.
    pub fn marks(&self) -> u64 {
        self.marks
    }
}

impl Convert {
    pub fn new(core: &Core, dtype: &str) -> Result<Self> {
        let bytes = if dtype == "f32" { 4 } else { 2 };
        let (convert, adjust) =
            (core.find("lla_convert", dtype, false, false)?, core.find("lla_adjust", dtype, false, false)?);
        assert_eq!(convert.block[0], adjust.block[0], "both go through the same chunks");
        Ok(Self { convert, adjust, bytes })
    }

    /// Both, for tensors that can be accessed 16 bytes at a time.
    pub fn functions(&self) -> [&Function; 2] {
        [self.convert.pick(true), self.adjust.pick(true)]
    }

    /// Whether both take the same type of tensors.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.convert.any, &other.convert.any)
    }

    /// Places for tensors of `rows` padded rows in all heads.
    pub fn place(&self, rows: usize, places: &mut Places) -> ConvertScratch {
        let chunks = rows / self.convert.block[0] * 4;
        ConvertScratch { amax: places.take(2 * chunks), marks: places.take(2 * rows * 4) }
    }

    /// Room for the units of two tensors of so many heads each, and for what is noted beside them.
    pub fn place_units(heads: usize, places: &mut Places) -> u64 {
        places.take(6 * heads * 4)
    }

    /// Finds the units of one group of tensors, or of two groups of two, and converts them.
    ///
    /// # Safety
    /// All memory must be of the stream's and as large as described.
    pub unsafe fn launch(&self, base: u64, groups: &[Group<'_>], stream: RawStream) -> Result<()> {
        let [one, two] = [&groups[0], &groups[groups.len() - 1]];
        let [[a, b], [c, e]] = [one.both(), two.both()];
        let noted = |group: &Group<'_>| [base + group.scratch.amax, base + group.scratch.marks, group.unit];
        let convert = Arguments::new()
            .pointers([a.view.ptr, b.view.ptr, c.view.ptr, e.view.ptr])
            .pointers(noted(one))
            .pointers(noted(two))
            .pointers([a.half, b.half, c.half, e.half])
            .then(&self.shapes(groups));
        let (grid, aligned) = self.extent(groups);
        // SAFETY: the arguments are those of the kernel's signature; the caller vouches for the memory.
        unsafe {
            self.convert.pick(aligned).launch(grid, &convert, stream)?;
            self.adjust(base, groups, true, stream)
        }
    }

    /// The second half of [`Convert::launch`]; all of it, not `guessed`, where something else has found the largest magnitudes.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn adjust(
        &self,
        base: u64,
        groups: &[Group<'_>],
        guessed: bool,
        stream: RawStream,
    ) -> Result<()> {
        let [one, two] = [&groups[0], &groups[groups.len() - 1]];
        let [[a, b], [c, e]] = [one.both(), two.both()];
        let adjust = Arguments::new()
            .pointers([a.view.ptr, b.view.ptr, c.view.ptr, e.view.ptr])
            .pointers([base + one.scratch.amax, one.unit, base + two.scratch.amax, two.unit])
            .pointers([a.half, b.half, c.half, e.half])
            .then(&self.shapes(groups))
            .i32s([i32::from(guessed)]);
        let (mut grid, aligned) = self.extent(groups);
        if guessed {
            grid[0] = grid[0].div_ceil(SELDOM);
        }
        // SAFETY: the arguments are those of the kernel's signature; the caller vouches for the memory.
        unsafe { self.adjust.pick(aligned).launch(grid, &adjust, stream) }
    }

    /// Sizes and strides as both kernels take them.
    fn shapes(&self, groups: &[Group<'_>]) -> Arguments {
        let two = [&groups[0], &groups[groups.len() - 1]];
        let mut arguments = Arguments::new();
        for group in two {
            let [batch, heads, tokens] = group.shape;
            let chunks = group.padded / self.convert.block[0];
            arguments = arguments.i32s([int(batch * heads), int(heads), int(tokens), int(chunks)]);
        }
        for tensor in two.iter().flat_map(|group| group.both()) {
            let [batch, head, row] = tensor.view.strides;
            arguments = arguments.i32s([int(tensor.columns)]).i64s([batch, head]).i32s([row as i32]);
        }
        arguments
    }

    fn extent(&self, groups: &[Group<'_>]) -> ([u32; 3], bool) {
        let tensors = || groups.iter().flat_map(|group| group.tensors);
        let chunks = groups.iter().map(|group| group.padded / self.convert.block[0]).max();
        let heads = groups.iter().map(|group| group.shape[0] * group.shape[1]).max();
        let grid = [side(chunks.unwrap_or(0)), side(heads.unwrap_or(0)), side(tensors().count())];
        (grid, tensors().all(|tensor| aligned(&tensor.view, tensor.columns, self.bytes)))
    }
}

/// A tensor to convert.
pub(super) struct Source {
    pub view: DeviceView,
    pub columns: usize,
    /// Where its fp16 rows go.
    pub half: u64,
}

/// One tensor, or two of the same heads and tokens.
pub(super) struct Group<'a> {
    pub tensors: &'a [Source],
    /// Batch, heads, tokens.
    pub shape: [usize; 3],
    pub padded: usize,
    pub scratch: &'a ConvertScratch,
    /// Where their units go, one behind the other for every head, and behind all of them which heads are marked, and guesses.
    pub unit: u64,
}

impl Group<'_> {
    fn both(&self) -> [&Source; 2] {
        [&self.tensors[0], &self.tensors[self.tensors.len() - 1]]
    }
}

/// Options, offset, window and key ranges as the kernels take them.
fn translate_mask(a: &Attention, probe: bool) -> (i32, i32, i32, Option<[Vec<i32>; 2]>) {
    let mask = a.mask();
    let mut options = option::HEAVY_FIRST * i32::from(mask.is_causal());
    if probe {
        options |= option::PROBE_GIVEN;
    }
    // Positions are counted in 32 bits with room to add a window.
    let far = mask.offset().unsigned_abs() > 1 << 29;
    if mask.is_leave_one_out() && !far {
        options |= option::LEAVE_ONE_OUT; // a far-off query has no key of its own
    }
    let offset = if far { 0 } else { mask.offset() as i32 };
    if mask.sequences().is_none() && !far {
        options |= option::CAUSAL * i32::from(mask.is_causal());
        options |= option::WINDOW * i32::from(mask.window_len().is_some());
        let window = mask.window_len().map_or(0, |w| w.min(1 << 30) as i32);
        return (options, offset, window, None);
    }
    options |= option::RANGES;
    let mut last = (0, 0);
    let ranges = (0..a.queries()).map(|i| {
        let visible = mask.visible(i, a.keys());
        // A query that sees nothing has its empty range where its neighbour looks, not at key 0: a block reads from the
        // smallest start to the largest end of its rows.
        last = match visible.start == visible.end {
            true => (last.1, last.1),
            false => (visible.start as i32, visible.end as i32),
        };
        last
    });
    let (first, end) = ranges.unzip();
    (options, offset, 0, Some([first, end]))
}

/// Residual to reach, whether the results' expected errors decide instead, and most steps.
fn limits(solver: Solver, high: bool, width: usize) -> (f64, bool, i32) {
    let standard = STANDARD_TOLERANCE * (64.0 / width as f64).sqrt();
    let (tolerance, steps) = if high { (HIGH_TOLERANCE, 4 * width) } else { (standard, width) };
    let by_error = !high && matches!(solver, Solver::Auto { tolerance: None, .. });
    let (tolerance, steps) = match solver {
        Solver::Auto { tolerance: t, max_iters } => (t.unwrap_or(tolerance), max_iters.unwrap_or(steps)),
        Solver::Cg { tolerance, max_iters } => (tolerance, max_iters),
        Solver::Direct => unreachable!("refused before"),
    };
    // Squared in f32: not below its smallest normal number.
    (tolerance.max(1e-7), by_error, i32::try_from(steps).unwrap_or(i32::MAX))
}
