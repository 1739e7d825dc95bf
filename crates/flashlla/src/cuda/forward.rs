//! [`ForwardPlan`]: the forward on device pointers.

use super::driver::{Arguments, Context, Function, Memory};
use super::plan::{
    Convert, ConvertScratch, Core, Group, OUTPUT_ERRORS, Places, SELDOM, Source, Tables, Variants, aligned,
    dtype, int, side,
};
use super::{DeviceBias, DeviceRidge, DeviceView, Inner, PlanOptions, RawStream};
use crate::{Attention, Diagnostics, Element, Result};
use std::sync::Arc;

/// What a forward reads and writes, all in device memory.
///
/// `key_mean`, the probe and a given probe are `f32 [batch, query head, N', D']`, contiguous, aligned to 16 bytes: N and D
/// rounded up as [`ForwardPlan::state_shape`] says. `lse`, `iterations` and `residual` are `[batch, query head, N]`, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct ForwardPointers {
    /// Queries.
    pub q: DeviceView,
    /// Keys.
    pub k: DeviceView,
    /// Values.
    pub v: DeviceView,
    /// The outputs, in the inputs' type.
    pub out: DeviceView,
    /// The bias; there must be one exactly if the plan was made for one.
    pub bias: Option<DeviceBias>,
    /// Ridges in place of the description's.
    pub ridge: Option<DeviceRidge>,
    /// The probe to use; there must be one exactly if the plan was made for one.
    pub probe: Option<u64>,
    /// Where to write the log-sum-exp, `f32`.
    pub lse: Option<u64>,
    /// Where to write the mean keys.
    pub key_mean: Option<u64>,
    /// Where to write the solved probes.
    pub probe_out: Option<u64>,
    /// Where to write each query's conjugate-gradient steps (`i32`) and residual (`f32`).
    pub diagnostics: Option<[u64; 2]>,
}

/// An [`Attention`] made ready for the GPU: kernels chosen and loaded, masks and limits translated.
///
/// Made by [`super::Cuda::forward_plan`]. Running it only puts work into the caller's stream, memory in stream order
/// included; it never waits for the GPU, and one plan may run in several streams at once.
#[derive(Debug)]
pub struct ForwardPlan {
    core: Core,
    bytes: usize,
    convert: Convert,
    forward: Variants,
    poison: Variants,
    scratch: Scratch,
}

/// Where the scratch of a forward lies, from its beginning.
#[derive(Debug)]
struct Scratch {
    tables: Tables,
    convert: ConvertScratch,
    unit: u64,
    kh: u64,
    vh: u64,
    qh: u64,
    key_mean: u64,
    bytes: usize,
}

impl Scratch {
    fn new(core: &Core, convert: &Convert) -> Self {
        let [heads, kv_heads] = core.heads();
        let (rows, key_rows) = (heads * core.padded_queries(), kv_heads * core.padded_keys());
        let mut places = Places::default();
        let places = &mut places;
        Self {
            tables: core.place_tables(places),
            convert: convert.place(key_rows, places),
            unit: Convert::place_units(kv_heads, places),
            kh: places.take(key_rows * core.width * 2),
            vh: places.take(key_rows * core.width * 2),
            // Kernels 128 wide keep it in registers.
            qh: places.take(if core.width == 64 { rows * core.width * 2 } else { 0 }),
            key_mean: places.take(rows * core.width * 4),
            bytes: places.0,
        }
    }
}

impl ForwardPlan {
    pub(super) fn new<T: Element>(
        engine: &Arc<Inner>,
        attention: &Attention,
        options: PlanOptions,
        high: bool,
    ) -> Result<Self> {
        let dtype = dtype::<T>()?;
        let mut core = Core::new(engine, attention, options, high)?;
        let convert = Convert::new(&core, dtype)?;
        let forward = core.find("lla_forward", dtype, high, options.bias)?;
        let poison = core.find("lla_poison", dtype, false, false)?;
        core.use_block(forward.block[0]);
        let scratch = Scratch::new(&core, &convert);
        Ok(Self { core, bytes: size_of::<T>(), convert, forward, poison, scratch })
    }

    pub(super) fn context(&self) -> &Context {
        &self.core.engine.context
    }

    /// The description.
    pub fn attention(&self) -> &Attention {
        &self.core.attention
    }

    /// Whether the diagnostics tell of a query that stopped short of what its solve aims for.
    pub fn unconverged(&self, diagnostics: &Diagnostics) -> bool {
        self.core.unconverged(diagnostics)
    }

    /// The shape `[batch, query head, N', D']` of mean keys and probes on the device.
    pub fn state_shape(&self) -> [usize; 4] {
        self.core.state_shape()
    }

    /// The scratch that a forward needs, in bytes: O((N + M) D) per head.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch.bytes
    }

    /// The names, in the bundle's index, of the kernels that a call launches where all tensors can be accessed 16 bytes at a time, in
    /// their order. Calls that ask for diagnostics may take others than calls that do not.
    pub fn kernel_names(&self, diagnostics: bool) -> Vec<&str> {
        let forward = self.forward.pick_for(true, diagnostics);
        let [convert, adjust] = self.convert.functions();
        [convert, adjust, forward, self.poison.pick(true)].map(Function::name).into()
    }

    /// Puts a forward into `stream`. Nothing is waited for, and nothing outlives the work in the stream but what `pointers`
    /// name.
    ///
    /// `scratch` is device memory of [`ForwardPlan::scratch_bytes`] bytes, aligned to 256; without it, memory is taken and
    /// given back in the order of the stream. Packed sequences and ridges that vary are copied from the host with every call:
    /// give ridges as device memory where the stream is being captured.
    ///
    /// Queries that see a key or value that is not finite get NaN (also where the bias hides it); the others are not affected.
    ///
    /// # Safety
    /// `stream` must be a stream of the plan's GPU (null is the default stream). Every address must lead to device memory of
    /// the sizes described, valid in the order of the stream and, for what is written, not otherwise used.
    pub unsafe fn run(
        &self,
        stream: RawStream,
        pointers: &ForwardPointers,
        scratch: Option<u64>,
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.run_parts(stream, pointers, scratch, true) }
    }

    /// The same; without `poison`, queries that see what is not finite get what they get with zeros in its place.
    ///
    /// # Safety
    /// As above.
    pub(super) unsafe fn run_parts(
        &self,
        stream: RawStream,
        pointers: &ForwardPointers,
        scratch: Option<u64>,
        poison: bool,
    ) -> Result<()> {
        let (core, p) = (&self.core, pointers);
        let a = &core.attention;
        let has = PlanOptions { bias: p.bias.is_some(), probe: p.probe.is_some() };
        core.check(has, &[("q", p.q), ("k", p.k), ("v", p.v), ("out", p.out)])?;
        if a.batch() * a.queries() == 0 {
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
        let [unit, kh, vh, qh] = [at.unit, at.kh, at.vh, at.qh].map(|at| base + at);
        // SAFETY: inside the scratch.
        let ridge = unsafe { core.write_tables(&at.tables, base, p.ridge, stream)? };

        let key_mean = p.key_mean.unwrap_or(base + at.key_mean);
        let [probe, lse] = [p.probe.or(p.probe_out), p.lse].map(|at| at.unwrap_or(0));
        let [iterations, relative] = p.diagnostics.unwrap_or([0, 0]);
        let strides = |arguments: Arguments, view: &DeviceView| {
            arguments.i64s([view.strides[0], view.strides[1]]).i32s([view.strides[2] as i32])
        };
        let forward = Arguments::new()
            .pointers([p.q.ptr, kh, vh, unit, qh, p.out.ptr, key_mean, probe, lse])
            .pointers([ridge.ptr, iterations, relative])
            .then(&core.by_query(&at.tables, base, self.forward.block[0], p.bias))
            .i32s([int(a.head_dim())]);
        let forward = strides(forward, &p.q).f32(a.scale() as f32).i32s([int(a.value_dim())]);
        let forward = strides(forward, &p.out).then(&core.solve_limits(ridge, OUTPUT_ERRORS)).i32s([
            i32::from(p.lse.is_some()),
            i32::from(p.probe_out.is_some()),
            i32::from(p.diagnostics.is_some()),
        ]);
        let poisoned = Arguments::new()
            .pointers([unit, base + at.convert.marks(), p.out.ptr, lse])
            .then(&core.by_row(&at.tables, base))
            .i32s([int(a.value_dim())])
            .i64s([p.out.strides[0], p.out.strides[1]])
            .i32s([p.out.strides[2] as i32, i32::from(p.lse.is_some())]);
        let grid =
            |kernel: &Variants| [side(core.heads()[0]), side(a.queries().div_ceil(kernel.block[0])), 1];
        let [heads, blocks, _] = grid(&self.poison);
        let few = [heads, blocks.div_ceil(SELDOM), 1];
        let tensors = [
            Source { view: p.k, columns: a.head_dim(), half: kh },
            Source { view: p.v, columns: a.value_dim(), half: vh },
        ];
        let keys = Group {
            tensors: &tensors,
            shape: [a.batch(), a.kv_heads(), a.keys()],
            padded: core.padded_keys(),
            scratch: &at.convert,
            unit,
        };
        // SAFETY: the arguments are those of the kernels' signatures in that order; the caller's memory is as large as
        // described, the scratch as large as `scratch` laid out.
        unsafe {
            self.convert.launch(base, &[keys], stream)?;
            let whole = aligned(&p.q, a.head_dim(), self.bytes) && aligned(&p.out, a.value_dim(), self.bytes);
            self.forward.pick_for(whole, p.diagnostics.is_some()).launch(
                grid(&self.forward),
                &forward,
                stream,
            )?;
            if poison {
                self.poison.pick(true).launch(few, &poisoned, stream)?;
            }
            Ok(())
        }
    }
}
