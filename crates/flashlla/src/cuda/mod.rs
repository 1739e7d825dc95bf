//! The engine for NVIDIA GPUs.
//!
//! The kernels are compiled ahead of time into a [`bundle::Bundle`], which is embedded when the library is built or read from
//! a file at run time; beside it only the NVIDIA driver is needed, which is looked up when an engine is made.
//!
//! [`Cuda`] computes problems in host memory like the other engines. [`ForwardPlan`] and [`BackwardPlan`] do the same on device
//! pointers and in the caller's stream, for bindings to frameworks that have their tensors on the GPU.
//!
//! # Numbers
//!
//! Inputs are `f32`, `bf16` or `f16`; `f64` is refused (the products run on fp16 tensor cores with `f32` sums, so that the
//! other half of its digits would be lost silently). Keys and values are converted to fp16, scaled by a power of two per
//! head: exact for `bf16` and `f16` keys whose range allows, 11 bits of `f32`.
//!
//! - [`Precision::Standard`](crate::Precision): search directions and probes in fp16.
//! - [`Precision::High`](crate::Precision): in two fp16 terms, one more product per pass.
//!
//! [`Solver::Auto`](crate::Solver) without a tolerance ends the conjugate gradients of a block of queries in standard precision when
//! the expected error of its outputs is [`STANDARD_OUTPUT_ERROR`] ([`STANDARD_GRADIENT_ERROR`] of its gradients; more for blocks that make no pass under
//! a causal mask, where what is left falls along the sequence), in high precision when every query's relative residual is [`HIGH_TOLERANCE`]; a tolerance that is given is a relative residual. It takes at most
//! `D'` (`4 D'`) steps, D' being the head dimension rounded up to that of the kernels. Where a query has not converged by
//! then, [`Cuda`] computes the problem again in high precision; a [`ForwardPlan`] does not, because it would have to wait for the
//! diagnostics. They give every query's steps and relative residual.

mod backward;
pub mod bundle;
mod cache;
mod cache_write;
mod decode;
mod decode_shared;
mod driver;
mod forward;
mod host;
mod host_decode;
mod plan;
mod spoilt;

pub use backward::{BackwardPlan, BackwardPointers};
pub use cache::{DeviceCache, DeviceRoom};
pub use cache_write::{CacheWrite, CacheWriter};
pub use decode::{
    DECODE_TOLERANCE, DecodeMethod, DecodePlan, DecodePointers, DevicePool, DeviceScale, PoolLayout,
};
pub use driver::RawStream;
pub use forward::{ForwardPlan, ForwardPointers};
pub use plan::{
    DeviceBias, DeviceRidge, DeviceView, HIGH_TOLERANCE, PlanOptions, STANDARD_GRADIENT_ERROR,
    STANDARD_OUTPUT_ERROR, STANDARD_TOLERANCE,
};

use crate::{Attention, Element, Error, Precision, Result};
use bundle::{Bundle, Wanted};
use driver::{Context, Function, Stream};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

/// Names a bundle of kernels to use in place of the embedded one.
pub const KERNELS_VARIABLE: &str = "FLASHLLA_KERNELS";

/// The engine for one NVIDIA GPU. Clones share the GPU's context, memory and loaded kernels.
///
/// ```no_run
/// use flashlla::{Attention, Cuda, Engine, View};
/// let x: Vec<f32> = (0..4 * 8).map(|i| (i as f32).sin()).collect();
/// let x = View::bnd(&x, [1, 4, 8])?;
/// let attention = Attention::builder_for(&x, &x, &x).build()?;
/// let forward = Cuda::new()?.forward(&attention.problem(x, x, x)?)?;
/// assert_eq!(forward.out.shape(), [1, 1, 4, 8]);
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    bundle: Bundle,
    architecture: String,
    context: Arc<Context>,
    /// By place in the bundle's index.
    loaded: Mutex<HashMap<usize, Arc<Function>>>,
    /// Streams that no call is using.
    streams: Mutex<Vec<Stream>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Cuda {
    /// On the first GPU, with the kernels that the environment variable [`KERNELS_VARIABLE`] names or else the embedded ones.
    pub fn new() -> Result<Self> {
        Self::on(0)
    }

    /// The same on the GPU numbered `device`.
    pub fn on(device: usize) -> Result<Self> {
        let bundle = match std::env::var_os(KERNELS_VARIABLE) {
            Some(path) if !path.is_empty() => Some(Bundle::open(path)?),
            _ => Bundle::embedded().transpose()?,
        };
        Self::make(bundle, device)
    }

    /// On the GPU numbered `device`, with the kernels in a file made by `cargo xtask kernels`.
    pub fn with_bundle(path: impl AsRef<Path>, device: usize) -> Result<Self> {
        Self::make(Some(Bundle::open(path)?), device)
    }

    fn make(bundle: Option<Bundle>, device: usize) -> Result<Self> {
        let context = Context::open(device, bundle.as_ref().map_or(0, |b| b.index().driver))?;
        let Some(bundle) = bundle else {
            return Err(Error::Cuda {
                problem: format!(
                    "there are no GPU kernels: none are embedded, and {KERNELS_VARIABLE} is not set"
                ),
                remedy: format!(
                    "make them with `cargo xtask kernels`, then set {KERNELS_VARIABLE} to the file or build again"
                ),
            });
        };
        let (major, minor) = context.capability();
        let Some(architecture) = bundle.architecture_for((major, minor)).map(str::to_string) else {
            return Err(Error::Cuda {
                problem: format!(
                    "the kernels in {} are for {}, but the {} is sm_{major}{minor}",
                    bundle.origin(),
                    bundle.architectures().join(", "),
                    context.name(),
                ),
                remedy: format!("make them with `cargo xtask kernels --arch sm_{major}{minor}`"),
            });
        };
        Ok(Self {
            inner: Arc::new(Inner {
                bundle,
                architecture,
                context: Arc::new(context),
                loaded: Mutex::default(),
                streams: Mutex::default(),
            }),
        })
    }

    /// The GPU's name.
    pub fn name(&self) -> &str {
        self.inner.context.name()
    }

    /// The architecture of the kernels in use, such as `sm_90`.
    pub fn architecture(&self) -> &str {
        &self.inner.architecture
    }

    /// The newest CUDA version that the driver supports, as it numbers them (13000 is 13.0).
    pub fn driver_version(&self) -> u32 {
        self.inner.context.driver()
    }

    /// The kernels in use.
    pub fn bundle(&self) -> &Bundle {
        &self.inner.bundle
    }

    /// Makes a forward ready to run on device pointers: inputs and outputs stored as `T`. Loads the kernels that it
    /// needs, if no call has needed them before.
    pub fn forward_plan<T: Element>(
        &self,
        attention: &Attention,
        options: PlanOptions,
    ) -> Result<ForwardPlan> {
        ForwardPlan::new::<T>(&self.inner, attention, options, attention.precision() == Precision::High)
    }

    /// Makes a decoding ready to run on device pointers, for caches that lie as `layout` says; queries, caches and outputs
    /// stored as `T`. The description is that of [`Attention::builder_for_cache`](Attention::builder_for_cache): its number of keys
    /// is the room of a sequence. Decoding takes no bias, and head dimensions that are multiples of 8.
    pub fn decode_plan<T: Element>(&self, attention: &Attention, layout: PoolLayout) -> Result<DecodePlan> {
        DecodePlan::new::<T>(&self.inner, attention, layout)
    }

    /// Makes the appending of keys and values, stored as `T`, to caches in device memory ready to run on device pointers.
    pub fn cache_writer<T: Element>(
        &self,
        kv_heads: usize,
        head_dim: usize,
        value_dim: usize,
    ) -> Result<CacheWriter> {
        CacheWriter::new::<T>(&self.inner, kv_heads, [head_dim, value_dim])
    }

    /// The same as [`Cuda::forward_plan`] for a backward: inputs stored as `T`, the gradient of the outputs as `G`, the other gradients as `O`.
    pub fn backward_plan<T: Element, G: Element, O: Element>(
        &self,
        attention: &Attention,
        options: PlanOptions,
    ) -> Result<BackwardPlan> {
        let high = attention.precision() == Precision::High;
        BackwardPlan::new::<T, G, O>(&self.inner, attention, options, high)
    }
}

impl Inner {
    /// A kernel, and the query rows and key rows of its blocks.
    fn load(&self, wanted: Wanted) -> Result<(Arc<Function>, [usize; 2])> {
        self.load_for(wanted, None)
    }

    /// The same; with a page size, a kernel that finds its keys through a block table.
    fn load_for(&self, wanted: Wanted, page_size: Option<usize>) -> Result<(Arc<Function>, [usize; 2])> {
        let Some(place) = self.bundle.find(&self.architecture, wanted, page_size) else {
            let Wanted { entry, dtype, head_dim, high, bias, .. } = wanted;
            let with = |yes: bool, what: &str| if yes { format!(", {what}") } else { String::new() };
            return Err(Error::Cuda {
                problem: format!(
                    "the kernels in {} for {} lack {entry} (head dimension {head_dim}{}{}{}{})",
                    self.bundle.origin(),
                    self.architecture,
                    with(!dtype.is_empty(), dtype),
                    with(high, "high precision"),
                    with(bias, "bias"),
                    page_size.map_or(String::new(), |size| format!(", pages of {size}")),
                ),
                remedy: "make them anew with `cargo xtask kernels`".into(),
            });
        };
        let kernel = &self.bundle.index().kernels[place];
        let block = [kernel.block_queries, kernel.block_keys];
        if let Some(function) = lock(&self.loaded).get(&place) {
            return Ok((function.clone(), block));
        }
        // Loaded without the lock: other threads go on, and of two that load the same one is dropped.
        let cubin = self.bundle.cubin(kernel);
        let entry = format!("{}_entry", kernel.entry);
        let function = Arc::new(Function::load(&self.context, cubin, &entry, &kernel.name)?);
        Ok((lock(&self.loaded).entry(place).or_insert(function).clone(), block))
    }

    /// A stream for the time of one call.
    fn stream(&self) -> Result<Stream> {
        match lock(&self.streams).pop() {
            Some(stream) => Ok(stream),
            None => Stream::new(&self.context),
        }
    }
}
