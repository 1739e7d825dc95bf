//! [`BackwardPlan`]: the backward on device pointers.

use super::driver::{Arguments, Context, Function, Memory, fill, upload};
use super::plan::{
    Convert, ConvertScratch, Core, GRADIENT_ERRORS, Group, Places, Source, Tables, Variants, aligned, dtype,
    int, side,
};
use super::{DeviceBias, DeviceRidge, DeviceView, Inner, PlanOptions, RawStream};
use crate::{Attention, Diagnostics, Element, Error, Result};
use std::sync::Arc;

/// What a backward reads and writes, all in device memory. Layouts are those of [`super::ForwardPointers`].
#[derive(Debug, Clone, Copy)]
pub struct BackwardPointers {
    /// Queries.
    pub q: DeviceView,
    /// Keys.
    pub k: DeviceView,
    /// Values.
    pub v: DeviceView,
    /// The bias of the forward.
    pub bias: Option<DeviceBias>,
    /// Ridges in place of the description's.
    pub ridge: Option<DeviceRidge>,
    /// The gradient of the outputs.
    pub grad_out: DeviceView,
    /// The log-sum-exp that the forward wrote.
    pub lse: u64,
    /// The mean keys that the forward wrote.
    pub key_mean: u64,
    /// The probes that the forward wrote, or that were given to it.
    pub probe: u64,
    /// Where to write the gradient of the queries.
    pub dq: DeviceView,
    /// Where to write the gradient of the keys.
    pub dk: DeviceView,
    /// Where to write the gradient of the values.
    pub dv: DeviceView,
    /// Where to write the gradient of every query's ridge, `f32 [batch, query head, N]`, contiguous.
    pub dridge: u64,
    /// Where to write every query's part of the scale's gradient, in the same layout.
    pub dscale: u64,
    /// Where to write the gradient of every query head's bias, `f32 [batch, query head, M]`, contiguous, if there is one.
    pub dbias: Option<u64>,
    /// Where to write the covariances `c`, in the layout of the probe: minus the gradient of a given one.
    pub covariance: Option<u64>,
    /// Where to write each query's steps (`i32`) and residual (`f32`) of the second solve.
    pub diagnostics: Option<[u64; 2]>,
}

/// The backward of an [`Attention`] made ready for the GPU; see [`super::ForwardPlan`]. Its results are the same bits every
/// time: every sum has one order.
#[derive(Debug)]
pub struct BackwardPlan {
    core: Core,
    bytes: usize,
    convert: Convert,
    convert_grad: Convert,
    convert_f32: Convert,
    solve: Variants,
    query: Variants,
    key: Variants,
    /// First query that sees a block of keys, and one past the last.
    seen_by: Option<[Vec<i32>; 2]>,
    scratch: Scratch,
}

/// Where the scratch of a backward lies, from its beginning.
#[derive(Debug)]
struct Scratch {
    tables: Tables,
    seen_by: [u64; 2],
    /// For keys and values, queries and grad_out, probe and y.
    convert: [ConvertScratch; 3],
    /// Of keys and values, queries and grad_out, probe and y.
    units: [u64; 3],
    /// Those tensors in fp16.
    halves: [u64; 6],
    /// Mean of grad_out . v of every query, and three numbers of the step that dq takes beyond y.
    scalars: u64,
    /// What the key pass needs of every query.
    numbers: u64,
    y: u64,
    bytes: usize,
}

impl Scratch {
    /// `seen_by` is the bytes of one such table.
    fn new(core: &Core, convert: &Convert, seen_by: usize) -> Self {
        let [heads, kv_heads] = core.heads();
        let (rows, key_rows) = (heads * core.padded_queries(), kv_heads * core.padded_keys());
        let mut places = Places::default();
        let places = &mut places;
        let half = |places: &mut Places, rows: usize| places.take(rows * core.width * 2);
        Self {
            tables: core.place_tables(places),
            seen_by: [places.take(seen_by), places.take(seen_by)],
            convert: [key_rows, rows, rows].map(|rows| convert.place(rows, places)),
            units: [kv_heads, heads, heads].map(|heads| Convert::place_units(heads, places)),
            halves: [
                half(places, key_rows),
                half(places, key_rows),
                half(places, rows),
                half(places, rows),
                half(places, rows),
                half(places, rows),
            ],
            scalars: places.take(4 * rows * 4),
            numbers: places.take(rows * 16 * 2),
            y: places.take(rows * core.width * 4),
            bytes: places.0,
        }
    }
}

impl BackwardPlan {
    pub(super) fn new<T: Element, G: Element, O: Element>(
        engine: &Arc<Inner>,
        attention: &Attention,
        options: PlanOptions,
        high: bool,
    ) -> Result<Self> {
        let (inputs, grad, out) = (dtype::<T>()?, dtype::<G>()?, dtype::<O>()?);
        if attention.scale() < 0.0 {
            return Err(Error::value("scale", attention.scale(), "at least 0 for gradients on a GPU"));
        }
        let mut core = Core::new(engine, attention, options, high)?;
        let bias = options.bias;
        let convert = Convert::new(&core, inputs)?;
        let convert_grad = Convert::new(&core, grad)?;
        let convert_f32 = Convert::new(&core, "f32")?;
        let solve = core.find("lla_backward_solve", "", high, bias)?;
        let query = core.find("lla_backward_query", out, false, bias)?;
        let key = core.find("lla_backward_key", out, false, bias)?;
        for kernel in [&solve, &query] {
            core.use_block(kernel.block[0]);
        }
        let seen_by = core.queries_of_keys(key.block[1]);
        let table = seen_by.as_ref().map_or(0, |[first, _]| first.len() * 4);
        let scratch = Scratch::new(&core, &convert, table);
        Ok(Self {
            core,
            bytes: size_of::<O>(),
            convert,
            convert_grad,
            convert_f32,
            solve,
            query,
            key,
            seen_by,
            scratch,
        })
    }

    pub(super) fn context(&self) -> &Context {
        &self.core.engine.context
    }

    /// The description.
    pub fn attention(&self) -> &Attention {
        &self.core.attention
    }

    /// Whether the diagnostics tell of a query whose second solve stopped short of what it aims for.
    pub fn unconverged(&self, diagnostics: &Diagnostics) -> bool {
        self.core.unconverged(diagnostics)
    }

    /// The shape `[batch, query head, N', D']` of mean keys and probes on the device.
    pub fn state_shape(&self) -> [usize; 4] {
        self.core.state_shape()
    }

    /// The scratch that a backward needs, in bytes: O((N + M) D) per head.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch.bytes
    }

    /// The names, in the bundle's index, of the kernels that a call launches where all tensors can be accessed 16 bytes at a time, in
    /// their order. Calls that ask for diagnostics may take others than calls that do not.
    pub fn kernel_names(&self, diagnostics: bool) -> Vec<&str> {
        let mut functions: Vec<&Function> = self.convert.functions().into();
        if !self.convert.same(&self.convert_grad) {
            functions.extend(self.convert_grad.functions());
        }
        functions.push(self.solve.pick_for(true, diagnostics));
        functions.push(self.convert_f32.functions()[1]);
        functions.extend([self.query.pick_for(true, false), self.key.pick(true)]);
        functions.into_iter().map(Function::name).collect()
    }

    /// Puts a backward into `stream`; see [`super::ForwardPlan::run`].
    ///
    /// Queries, keys, values and gradients of outputs are read as zeros where they are not finite. What says that a query is
    /// not to be trusted is its `lse`: NaN (the forward's, where a query or a key that it sees is not finite) makes its own
    /// gradients NaN and leaves it out of those of the keys; -1e30 makes those of the keys that it sees not finite too, and of
    /// no others. A query that is itself not finite may also reach keys in the same blocks as those that it sees.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn run(
        &self,
        stream: RawStream,
        pointers: &BackwardPointers,
        scratch: Option<u64>,
    ) -> Result<()> {
        let (core, p) = (&self.core, pointers);
        let a = &core.attention;
        let has = PlanOptions { bias: p.bias.is_some(), probe: core.has.probe };
        let views = [("q", p.q), ("k", p.k), ("v", p.v), ("grad_out", p.grad_out)];
        core.check(has, &views)?;
        core.check(has, &[("dq", p.dq), ("dk", p.dk), ("dv", p.dv)])?;
        if a.batch() == 0 {
            return Ok(());
        }
        let context = &*core.engine.context;
        let _entered = context.enter()?;
        let at = &self.scratch;
        let own = match scratch {
            Some(_) => None,
            None => Some(Memory::new(context, stream, at.bytes)?),
        };
        let base = scratch.or(own.as_ref().map(Memory::ptr)).expect("one of the two");
        let [unit, q_unit, x_unit] = at.units.map(|at| base + at);
        let [heads, kv_heads] = core.heads();
        // Two units for every head lie behind each other.
        let (g_unit, y_unit) = (q_unit + 4 * heads as u64, x_unit + 4 * heads as u64);
        let [kh, vh, qh, gh, xh, yh] = at.halves.map(|at| base + at);
        let [scalars, numbers, y] = [at.scalars, at.numbers, at.y].map(|at| base + at);
        let [of_keys, of_queries, of_states] = &at.convert;
        let [first_query, end_query] = at.seen_by.map(|at| base + at);
        // SAFETY: inside the scratch.
        let ridge = unsafe {
            if let Some([first, end]) = &self.seen_by {
                upload(first_query, first, stream)?;
                upload(end_query, end, stream)?;
            }
            core.write_tables(&at.tables, base, p.ridge, stream)?
        };

        let common = |kernel: &Variants| core.by_query(&at.tables, base, kernel.block[0], p.bias);
        let scale = a.scale() as f32;
        let [iterations, relative] = p.diagnostics.unwrap_or([0, 0]);
        let solve = Arguments::new()
            .pointers([
                qh,
                gh,
                kh,
                vh,
                q_unit,
                unit,
                p.lse,
                p.key_mean,
                p.probe,
                p.covariance.unwrap_or(0),
                y,
            ])
            .pointers([base + of_states.amax(), scalars, p.dridge, iterations, relative])
            .then(&common(&self.solve))
            .f32(scale)
            .pointers([ridge.ptr])
            .then(&core.solve_limits(ridge, GRADIENT_ERRORS))
            .i32s([i32::from(p.diagnostics.is_some())]);
        let strides = |arguments: Arguments, view: &DeviceView| {
            arguments.i64s([view.strides[0], view.strides[1]]).i32s([view.strides[2] as i32])
        };
        let query = Arguments::new()
            .pointers([qh, gh, xh, yh, kh, vh, q_unit, x_unit, y_unit, unit, p.key_mean, y, p.lse])
            .pointers([scalars, numbers, p.dq.ptr, p.dscale])
            .then(&common(&self.query))
            .i32s([int(a.head_dim())]);
        let query = strides(query, &p.dq).f32(scale);
        let key = Arguments::new()
            .pointers([qh, gh, xh, yh, kh, vh, q_unit, x_unit, y_unit, unit, numbers])
            .pointers([p.dk.ptr, p.dv.ptr, p.dbias.unwrap_or(0), first_query, end_query])
            .i32s([0])
            .then(&core.by_key(&at.tables, base, p.bias))
            .i32s([int(a.head_dim()), int(a.value_dim())]);
        let key = strides(strides(key, &p.dk), &p.dv).f32(scale);

        let width = core.width as i64;
        let np = core.padded_queries();
        let state = |ptr: u64, half: u64| {
            let strides = [(a.heads() * np) as i64 * width, np as i64 * width, width];
            Source { view: DeviceView { ptr, strides }, columns: core.width, half }
        };
        let keys = [
            Source { view: p.k, columns: a.head_dim(), half: kh },
            Source { view: p.v, columns: a.value_dim(), half: vh },
        ];
        let queries = [
            Source { view: p.q, columns: a.head_dim(), half: qh },
            Source { view: p.grad_out, columns: a.value_dim(), half: gh },
        ];
        let states = [state(p.probe, xh), state(y, yh)];
        let keys = Group {
            tensors: &keys,
            shape: [a.batch(), a.kv_heads(), a.keys()],
            padded: core.padded_keys(),
            scratch: of_keys,
            unit,
        };
        let group = |tensors, scratch, unit| Group {
            tensors,
            shape: [a.batch(), a.heads(), a.queries()],
            padded: np,
            scratch,
            unit,
        };
        let grid = |kernel: &Variants| [side(heads), side(a.queries().div_ceil(kernel.block[0])), 1];
        // SAFETY: as in the forward.
        unsafe {
            if a.queries() == 0 {
                self.convert.launch(base, &[keys], stream)?;
                // The key pass multiplies its empty sums by units, which must be numbers.
                fill(q_unit, 1f32.to_bits(), 2 * heads, stream)?;
                fill(x_unit, 1f32.to_bits(), 2 * heads, stream)?;
            } else {
                if self.convert.same(&self.convert_grad) {
                    self.convert.launch(base, &[keys, group(&queries, of_queries, q_unit)], stream)?;
                } else {
                    let [q, g] = [&queries[..1], &queries[1..]];
                    self.convert.launch(base, &[keys], stream)?;
                    self.convert.launch(base, &[group(q, of_queries, q_unit)], stream)?;
                    self.convert_grad.launch(base, &[group(g, of_queries, g_unit)], stream)?;
                }
                self.solve.pick_for(true, p.diagnostics.is_some()).launch(
                    grid(&self.solve),
                    &solve,
                    stream,
                )?;
                self.convert_f32.adjust(base, &[group(&states, of_states, x_unit)], false, stream)?;
                let dq = aligned(&p.dq, a.head_dim(), self.bytes);
                self.query.pick_for(dq, false).launch(grid(&self.query), &query, stream)?;
            }
            if a.keys() > 0 {
                let whole =
                    aligned(&p.dk, a.head_dim(), self.bytes) && aligned(&p.dv, a.value_dim(), self.bytes);
                let grid = [side(kv_heads), side(a.keys().div_ceil(self.key.block[1])), 1];
                self.key.pick(whole).launch(grid, &key, stream)?;
            }
        }
        Ok(())
    }
}
