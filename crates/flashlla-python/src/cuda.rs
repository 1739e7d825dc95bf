//! Forward and backward in the memory of an NVIDIA GPU, in the caller's stream.
//!
//! Plans are kept by the Python side, which knows when two calls are alike; running one parses two dozen integers, releases
//! Python's lock and launches.

use crate::describe::Options;
use crate::raised;
use crate::tensor::Dtype;
use flashlla::cuda::{
    BackwardPointers, DeviceBias, DeviceRidge, DeviceView, ForwardPointers, HIGH_TOLERANCE, PlanOptions,
    RawStream, STANDARD_TOLERANCE,
};
use flashlla::{Attention, Cuda, Element};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::collections::HashMap;
use std::sync::Mutex;

/// The engines that were opened, by the number of the GPU.
static ENGINES: Mutex<Option<HashMap<usize, Cuda>>> = Mutex::new(None);

pub fn engine(device: usize) -> PyResult<Cuda> {
    let mut engines = ENGINES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let engines = engines.get_or_insert_default();
    if let Some(engine) = engines.get(&device) {
        return Ok(engine.clone());
    }
    let engine = Cuda::on(device).map_err(raised)?;
    engines.insert(device, engine.clone());
    Ok(engine)
}

/// What is known of GPU number `device` and the kernels for it.
#[pyfunction]
pub fn cuda_info(py: Python<'_>, device: usize) -> PyResult<Bound<'_, PyDict>> {
    let engine = py.detach(|| engine(device))?;
    let kernels = &engine.bundle().index().kernels;
    let fitting = kernels.iter().filter(|k| k.entry == "lla_forward" && k.arch == engine.architecture());
    let mut head_dims: Vec<usize> = fitting.map(|k| k.head_dim).collect();
    head_dims.sort_unstable();
    head_dims.dedup();
    let info = PyDict::new(py);
    info.set_item("name", engine.name())?;
    info.set_item("architecture", engine.architecture())?;
    info.set_item("driver", engine.driver_version())?;
    info.set_item("kernels", engine.bundle().origin())?;
    info.set_item("architectures", engine.bundle().architectures())?;
    info.set_item("head_dims", head_dims)?;
    Ok(info)
}

/// The sizes of a call, and whether a bias and a probe come with it.
#[derive(FromPyObject)]
pub struct Sizes {
    #[pyo3(item)]
    q: [usize; 4],
    #[pyo3(item)]
    k: [usize; 4],
    #[pyo3(item)]
    v: [usize; 4],
    #[pyo3(item)]
    bias: bool,
    #[pyo3(item)]
    probe: bool,
}

impl Sizes {
    fn attention(&self, options: &Options) -> PyResult<Attention> {
        let resolution = if options.high() { HIGH_TOLERANCE } else { STANDARD_TOLERANCE };
        options.attention(self.q, self.k, self.v, None, resolution)
    }

    fn has(&self) -> PlanOptions {
        PlanOptions { bias: self.bias, probe: self.probe }
    }
}

pub fn no_f64<T>() -> PyResult<T> {
    Err(PyTypeError::new_err(
        "q: float64 is not computed on a GPU; use float32, bfloat16 or float16, or the CPU",
    ))
}

/// Calls `$body` with the type that a [`Dtype`] names, `f64` refused.
macro_rules! with_gpu_type {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::Dtype::F64 => $crate::cuda::no_f64(),
            $crate::tensor::Dtype::F32 => {
                type $t = f32;
                $body
            }
            $crate::tensor::Dtype::Bf16 => {
                type $t = flashlla::bf16;
                $body
            }
            $crate::tensor::Dtype::F16 => {
                type $t = flashlla::f16;
                $body
            }
        }
    };
}
pub(crate) use with_gpu_type;

/// The axes of a layout that are batch, head and token, where it has them.
#[derive(Debug, Clone, Copy)]
pub struct Axes([Option<usize>; 3]);

impl FromPyObject<'_, '_> for Axes {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match object.extract::<&str>()? {
            "bhnd" => Ok(Self([Some(0), Some(1), Some(2)])),
            "bnhd" => Ok(Self([Some(0), Some(2), Some(1)])),
            "bnd" => Ok(Self([Some(0), None, Some(1)])),
            "nhd" => Ok(Self([None, Some(1), Some(0)])),
            other => Err(PyValueError::new_err(format!(
                "layout: '{other}' is not allowed; it must be bhnd, bnhd, bnd or nhd"
            ))),
        }
    }
}

impl Axes {
    fn view(self, Strided(ptr, strides): Strided) -> DeviceView {
        DeviceView { ptr, strides: self.0.map(|axis| axis.map_or(0, |axis| strides.0[axis])) }
    }
}

/// The strides of up to four axes, as `Tensor.stride()` returns them.
pub struct Strides([i64; 4]);

impl Strides {
    /// Those of batch, head and token.
    pub fn first_three(&self) -> [i64; 3] {
        [self.0[0], self.0[1], self.0[2]]
    }
}

impl FromPyObject<'_, '_> for Strides {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let object = object.cast::<PyTuple>()?;
        let mut strides = [0; 4];
        if object.len() > strides.len() {
            return Err(PyValueError::new_err("strides: more than four are not allowed"));
        }
        for (at, stride) in strides.iter_mut().zip(object.iter_borrowed()) {
            *at = stride.extract()?;
        }
        Ok(Self(strides))
    }
}

/// `(address, strides)` in the layout of the plan.
#[derive(FromPyObject)]
pub struct Strided(u64, Strides);

/// `(address, strides of batch and query head)`.
#[derive(FromPyObject)]
pub struct Bias(u64, [i32; 2]);

/// `(address, strides of batch, query head and query)`.
#[derive(FromPyObject)]
pub struct Ridges(u64, [i32; 3]);

fn device_bias(bias: Option<Bias>) -> Option<DeviceBias> {
    bias.map(|Bias(ptr, strides)| DeviceBias { ptr, strides })
}

pub fn device_ridge(ridge: Option<Ridges>) -> Option<DeviceRidge> {
    ridge.map(|Ridges(ptr, strides)| DeviceRidge { ptr, strides })
}

/// A forward made ready.
#[pyclass(frozen, module = "flashlla._flashlla")]
pub struct ForwardPlan {
    plan: flashlla::cuda::ForwardPlan,
    axes: Axes,
    /// Bytes of scratch that a run needs.
    #[pyo3(get)]
    scratch_bytes: usize,
    /// The shape of key_mean and probes on the device.
    #[pyo3(get)]
    state_shape: [usize; 4],
}

/// Makes a forward ready: inputs and outputs in `dtype` and `layout`.
#[pyfunction]
pub fn cuda_forward_plan(
    py: Python<'_>,
    device: usize,
    layout: Axes,
    dtype: Dtype,
    sizes: Sizes,
    options: Options,
) -> PyResult<ForwardPlan> {
    fn make<T: Element>(
        cuda: &Cuda,
        attention: &Attention,
        has: PlanOptions,
    ) -> PyResult<flashlla::cuda::ForwardPlan> {
        cuda.forward_plan::<T>(attention, has).map_err(raised)
    }
    let attention = sizes.attention(&options)?;
    let plan = py.detach(|| {
        let cuda = engine(device)?;
        with_gpu_type!(dtype, T => make::<T>(&cuda, &attention, sizes.has()))
    })?;
    let (scratch_bytes, state_shape) = (plan.scratch_bytes(), plan.state_shape());
    Ok(ForwardPlan { plan, axes: layout, scratch_bytes, state_shape })
}

#[pymethods]
impl ForwardPlan {
    /// Puts the forward into `stream`. Addresses are of device memory; see the Rust library's `ForwardPointers`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        stream: usize,
        scratch: u64,
        q: Strided,
        k: Strided,
        v: Strided,
        out: Strided,
        bias: Option<Bias>,
        ridge: Option<Ridges>,
        probe: Option<u64>,
        lse: Option<u64>,
        key_mean: Option<u64>,
        probe_out: Option<u64>,
        diagnostics: Option<[u64; 2]>,
    ) -> PyResult<()> {
        let pointers = ForwardPointers {
            q: self.axes.view(q),
            k: self.axes.view(k),
            v: self.axes.view(v),
            out: self.axes.view(out),
            bias: device_bias(bias),
            ridge: device_ridge(ridge),
            probe,
            lse,
            key_mean,
            probe_out,
            diagnostics,
        };
        // SAFETY: Python vouches for its tensors: of this GPU, as large as described, valid in the order of the stream.
        py.detach(|| unsafe { self.plan.run(stream as RawStream, &pointers, Some(scratch)) }).map_err(raised)
    }
}

/// A backward made ready.
#[pyclass(frozen, module = "flashlla._flashlla")]
pub struct BackwardPlan {
    plan: flashlla::cuda::BackwardPlan,
    axes: Axes,
    /// Bytes of scratch that a run needs.
    #[pyo3(get)]
    scratch_bytes: usize,
    /// The shape of key_mean, probes and covariances on the device.
    #[pyo3(get)]
    state_shape: [usize; 4],
}

/// Makes a backward ready: inputs and the gradients of q, k and v in `dtype`, the gradient of the outputs in `grad_dtype`.
#[pyfunction]
pub fn cuda_backward_plan(
    py: Python<'_>,
    device: usize,
    layout: Axes,
    dtype: Dtype,
    grad_dtype: Dtype,
    sizes: Sizes,
    options: Options,
) -> PyResult<BackwardPlan> {
    fn make<T: Element, G: Element>(
        cuda: &Cuda,
        attention: &Attention,
        has: PlanOptions,
    ) -> PyResult<flashlla::cuda::BackwardPlan> {
        cuda.backward_plan::<T, G, T>(attention, has).map_err(raised)
    }
    let attention = sizes.attention(&options)?;
    let plan = py.detach(|| {
        let cuda = engine(device)?;
        with_gpu_type!(dtype, T => with_gpu_type!(grad_dtype, G => make::<T, G>(&cuda, &attention, sizes.has())))
    })?;
    let (scratch_bytes, state_shape) = (plan.scratch_bytes(), plan.state_shape());
    Ok(BackwardPlan { plan, axes: layout, scratch_bytes, state_shape })
}

#[pymethods]
impl BackwardPlan {
    /// Puts the backward into `stream`; see the Rust library's `BackwardPointers`.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        stream: usize,
        scratch: u64,
        q: Strided,
        k: Strided,
        v: Strided,
        bias: Option<Bias>,
        ridge: Option<Ridges>,
        grad_out: Strided,
        lse: u64,
        key_mean: u64,
        probe: u64,
        dq: Strided,
        dk: Strided,
        dv: Strided,
        dridge: u64,
        dscale: u64,
        dbias: Option<u64>,
        covariance: Option<u64>,
    ) -> PyResult<()> {
        let pointers = BackwardPointers {
            q: self.axes.view(q),
            k: self.axes.view(k),
            v: self.axes.view(v),
            bias: device_bias(bias),
            ridge: device_ridge(ridge),
            grad_out: self.axes.view(grad_out),
            lse,
            key_mean,
            probe,
            dq: self.axes.view(dq),
            dk: self.axes.view(dk),
            dv: self.axes.view(dv),
            dridge,
            dscale,
            dbias,
            covariance,
            diagnostics: None,
        };
        // SAFETY: as in the forward.
        py.detach(|| unsafe { self.plan.run(stream as RawStream, &pointers, Some(scratch)) }).map_err(raised)
    }
}
