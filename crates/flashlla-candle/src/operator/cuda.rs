//! Calls on tensors in the memory of an NVIDIA GPU, in the stream of their device. Nothing here waits for the GPU.

use super::node::{Forward, Gradients, Inputs, Saved};
use crate::error::{raised, shape, value};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, DType, Device, DeviceLocation, Layout, Result, Storage, StorageRef, Tensor, WithDType,
};
use flashlla::cuda::{
    BackwardPlan, BackwardPointers, DeviceRidge, DeviceView, ForwardPlan, ForwardPointers, PlanOptions,
};
use flashlla::{Attention, Cuda, Element, bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// A storage type of Candle's on a GPU and of the engine's.
trait Number: Element + WithDType + CudaDType + DeviceRepr {}
impl<T: Element + WithDType + CudaDType + DeviceRepr> Number for T {}

macro_rules! with_type {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                $body
            }
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            DType::F16 => {
                type $t = f16;
                $body
            }
            other => Err(value("q", other.as_str(), "f32, bf16 or f16 on a GPU (compute f64 on the CPU)")),
        }
    };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The engines that were opened, by the number of the GPU. They work in the GPU's primary context, as Candle does.
static ENGINES: Mutex<Option<HashMap<usize, Cuda>>> = Mutex::new(None);

fn engine(device: &CudaDevice) -> Result<(usize, Cuda)> {
    let DeviceLocation::Cuda { gpu_id } = device.location() else {
        return Err(value("q", "a tensor on another device", "on a GPU"));
    };
    let mut engines = lock(&ENGINES);
    let engines = engines.get_or_insert_default();
    if let Some(engine) = engines.get(&gpu_id) {
        return Ok((gpu_id, engine.clone()));
    }
    let engine = Cuda::on(gpu_id).map_err(raised)?;
    engines.insert(gpu_id, engine.clone());
    Ok((gpu_id, engine))
}

/// What a plan is made for.
type Kind = (usize, DType, Attention, PlanOptions);

/// Plans made before, the newest last.
type Plans<P> = Mutex<Vec<(Kind, Arc<P>)>>;

/// Plans of each sort that are kept: more than the kinds of calls in a step of training.
const KEPT: usize = 64;

static FORWARDS: Plans<ForwardPlan> = Mutex::new(vec![]);
static BACKWARDS: Plans<BackwardPlan> = Mutex::new(vec![]);

fn planned<P>(plans: &Plans<P>, kind: Kind, make: impl FnOnce() -> Result<P>) -> Result<Arc<P>> {
    if let Some((_, plan)) = lock(plans).iter().find(|(other, _)| *other == kind) {
        return Ok(plan.clone());
    }
    let plan = Arc::new(make()?);
    let mut plans = lock(plans);
    if plans.len() >= KEPT {
        plans.remove(0);
    }
    plans.push((kind, plan.clone()));
    Ok(plan)
}

/// A tensor's memory, for as long as work that reads it is being put into a stream.
struct Held<'a>(StorageRef<'a>, &'a Layout);

fn held(tensor: &Tensor) -> Held<'_> {
    let (storage, layout) = tensor.storage_and_layout();
    Held(storage, layout)
}

impl Held<'_> {
    /// The address of the first element.
    fn ptr<'a, T: Number>(&'a self, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
        let Storage::Cuda(storage) = &*self.0 else {
            return Err(value("q", "a tensor on another device", "on a GPU"));
        };
        let (ptr, read) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
        Ok((ptr + (self.1.start_offset() * size_of::<T>()) as u64, read))
    }

    fn view<'a, T: Number>(&'a self, stream: &'a CudaStream) -> Result<(DeviceView, SyncOnDrop<'a>)> {
        let (ptr, read) = self.ptr::<T>(stream)?;
        let [batch, head, token, _] = self.1.stride() else { unreachable!("the ranks were checked") };
        Ok((DeviceView { ptr, strides: [*batch as i64, *head as i64, *token as i64] }, read))
    }
}

/// With its dims side by side.
fn rows(x: &Tensor) -> Result<Tensor> {
    if x.dim(3)? <= 1 || x.stride()[3] == 1 { Ok(x.clone()) } else { x.contiguous() }
}

/// A contiguous tensor at an address.
fn view(ptr: u64, [_, heads, tokens, dim]: [usize; 4]) -> DeviceView {
    DeviceView { ptr, strides: [(heads * tokens * dim) as i64, (tokens * dim) as i64, dim as i64] }
}

fn elements(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

/// New memory, whose elements must be written before they are read.
fn memory<T: Number>(device: &CudaDevice, elements: usize) -> Result<CudaSlice<T>> {
    // SAFETY: numbers of any bits are numbers; all of it is given to kernels that write it, or is padding that they write too.
    unsafe { device.alloc::<T>(elements) }
}

fn tensor<T: Number>(
    slice: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<candle_core::Shape>,
) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// The description of a call; its ridge is that in device memory.
fn describe(inputs: &Inputs) -> Result<Attention> {
    let (q, k, v) = (inputs.q.dims(), inputs.k.dims(), inputs.v.dims());
    let options = &inputs.options;
    let attention = Attention::builder()
        .batch(q[0])
        .heads(q[1])
        .kv_heads(k[1])
        .queries(q[2])
        .keys(k[2])
        .head_dim(q[3])
        .value_dim(v[3])
        .mask(options.mask.clone())
        .scale(inputs.scale)
        .solver(options.solver)
        .precision(options.precision)
        .build()
        .map_err(raised)?;
    if k != attention.key_shape() {
        return Err(shape("k", k, attention.key_shape(), "batch, KV heads, keys, head_dim"));
    }
    if v != attention.value_shape() {
        return Err(shape("v", v, attention.value_shape(), "batch, KV heads, keys, value_dim"));
    }
    if let Some(probe) = options.probe.as_ref().filter(|probe| probe.dims() != attention.query_shape()) {
        let meaning = "batch, query heads, queries, head_dim";
        return Err(shape("probe", probe.dims(), attention.query_shape(), meaning));
    }
    let per_query = [q[0], q[1], q[2]];
    let fits = match *inputs.ridge.dims() {
        [] => true,
        [heads] => heads == q[1],
        ref sizes => sizes.iter().zip(per_query).all(|(&size, full)| size == 1 || size == full),
    };
    if fits {
        Ok(attention)
    } else {
        let meaning = "batch, query heads, queries, with 1 where it is constant; or [query heads], or []";
        Err(shape("ridge", inputs.ridge.dims(), per_query, meaning))
    }
}

/// Strides of batch, query head and query, 0 along what is shared.
fn ridge_strides(ridge: &Tensor) -> [i32; 3] {
    let step = |size: usize, by: usize| if size == 1 { 0 } else { by as i32 };
    match *ridge.dims() {
        [heads] => [0, step(heads, 1), 0],
        [b, h, n] => [step(b, h * n), step(h, n), step(n, 1)],
        _ => [0; 3],
    }
}

pub fn forward(inputs: &Inputs) -> Result<Forward> {
    fn typed<T: Number>(inputs: &Inputs) -> Result<Forward> {
        let Device::Cuda(device) = inputs.q.device() else { unreachable!("the caller looked") };
        let (ordinal, engine) = engine(device)?;
        let attention = describe(inputs)?;
        let options = PlanOptions { bias: false, probe: inputs.options.probe.is_some() };
        let kind = (ordinal, T::DTYPE, attention.clone(), options);
        let plan =
            planned(&FORWARDS, kind, || engine.forward_plan::<T>(&attention, options).map_err(raised))?;
        let state_shape = plan.state_shape();

        // As the kernels read them, for the backward too.
        let (q, k, v) = (rows(&inputs.q)?, rows(&inputs.k)?, rows(&inputs.v)?);
        let ridge = inputs.ridge.contiguous()?;
        let given = match &inputs.options.probe {
            Some(probe) => {
                let [_, _, tokens, dims] = state_shape;
                let probe = probe.to_dtype(DType::F32)?;
                let (n, d) = (probe.dim(2)?, probe.dim(3)?);
                Some(probe.pad_with_zeros(2, 0, tokens - n)?.pad_with_zeros(3, 0, dims - d)?.contiguous()?)
            }
            None => None,
        };
        let rows = attention.batch() * attention.heads() * attention.queries();
        let mut out = memory::<T>(device, elements(attention.out_shape()))?;
        let mut lse = memory::<f32>(device, rows)?;
        let mut key_mean = memory::<f32>(device, elements(state_shape))?;
        let mut solved = match given {
            Some(_) => None,
            None => Some(memory::<f32>(device, elements(state_shape))?),
        };
        {
            let stream = device.cuda_stream();
            let (hq, hk, hv, hr) = (held(&q), held(&k), held(&v), held(&ridge));
            let hp = given.as_ref().map(held);
            let (q, _q) = hq.view::<T>(&stream)?;
            let (k, _k) = hk.view::<T>(&stream)?;
            let (v, _v) = hv.view::<T>(&stream)?;
            let (ridges, _ridges) = hr.ptr::<f32>(&stream)?;
            let probe = match &hp {
                Some(held) => Some(held.ptr::<f32>(&stream)?),
                None => None,
            };
            let (out, _out) = out.device_ptr_mut(&stream);
            let (lse, _lse) = lse.device_ptr_mut(&stream);
            let (key_mean, _key_mean) = key_mean.device_ptr_mut(&stream);
            let solved = solved.as_mut().map(|solved| solved.device_ptr_mut(&stream));
            let pointers = ForwardPointers {
                q,
                k,
                v,
                out: view(out, attention.out_shape()),
                bias: None,
                ridge: Some(DeviceRidge { ptr: ridges, strides: ridge_strides(&ridge) }),
                probe: probe.as_ref().map(|(ptr, _)| *ptr),
                lse: Some(lse),
                key_mean: Some(key_mean),
                probe_out: solved.as_ref().map(|(ptr, _)| *ptr),
                diagnostics: None,
            };
            // SAFETY: the stream is of the plan's GPU; what is read is held, and what is written was just taken in the
            // stream, with the sizes that the plan has.
            unsafe { plan.run(stream.cu_stream(), &pointers, None) }.map_err(raised)?;
        }
        let probe = match (given, solved) {
            (Some(probe), _) => probe,
            (None, Some(solved)) => tensor(solved, device, &state_shape[..]),
            (None, None) => unreachable!("there is one or the other"),
        };
        let of_rows = (attention.batch(), attention.heads(), attention.queries());
        let saved = Box::new(OnGpu {
            lse: tensor(lse, device, of_rows),
            key_mean: tensor(key_mean, device, &state_shape[..]),
            probe,
            inputs: [q, k, v, ridge],
            attention,
        });
        Ok(Forward { out: Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone())), saved })
    }
    with_type!(inputs.q.dtype(), T => typed::<T>(inputs))
}

struct OnGpu {
    attention: Attention,
    /// Queries, keys, values and ridges as the kernels read them.
    inputs: [Tensor; 4],
    /// `[B, HQ, N]`.
    lse: Tensor,
    /// `[B, HQ, N', D']`.
    key_mean: Tensor,
    /// As key_mean.
    probe: Tensor,
}

/// A log-sum-exp that makes every weight of its query infinite, and is not minus infinity, which says that there are none.
const SPOILT: f32 = -1e30;

impl OnGpu {
    /// The log-sum-exps, and far below any other where one is NaN or a row of `grad_out` is not finite: the kernels read
    /// what is not finite as zeros, and with such a sum the gradients of the query and of the keys that it sees, and no
    /// others, are no numbers.
    fn marked(&self, grad_out: &Tensor) -> Result<Tensor> {
        let sums = grad_out.to_dtype(DType::F32)?.sum(3)?;
        let lse = (&self.lse + (sums * 0.0)?)?;
        let spoilt = Tensor::full(SPOILT, lse.shape(), lse.device())?;
        lse.ne(&lse)?.where_cond(&spoilt, &lse)
    }

    fn typed<T: Number>(&self, given: &Inputs, grad_out: &Tensor) -> Result<Gradients> {
        let [q, k, v, ridge] = &self.inputs;
        let Device::Cuda(device) = q.device() else { unreachable!("the forward looked") };
        let (ordinal, engine) = engine(device)?;
        let a = &self.attention;
        let options = PlanOptions { bias: false, probe: given.options.probe.is_some() };
        let kind = (ordinal, T::DTYPE, a.clone(), options);
        let plan = planned(&BACKWARDS, kind, || engine.backward_plan::<T, T, T>(a, options).map_err(raised))?;
        let state_shape = plan.state_shape();
        let grad_out = rows(grad_out)?;
        let marked = self.marked(&grad_out)?.contiguous()?;
        let per_query = a.batch() * a.heads() * a.queries();
        let (keys, values) = (elements(a.key_shape()), elements(a.value_shape()));

        let mut dq = memory::<T>(device, elements(a.query_shape()))?;
        let mut dkv = memory::<T>(device, keys + values)?;
        let mut dridge = memory::<f32>(device, per_query)?;
        let mut dscale = memory::<f32>(device, per_query)?;
        let mut covariance = match options.probe {
            true => Some(memory::<f32>(device, elements(state_shape))?),
            false => None,
        };
        {
            let stream = device.cuda_stream();
            let (hq, hk, hv, hr) = (held(q), held(k), held(v), held(ridge));
            let (hg, hl) = (held(&grad_out), held(&marked));
            let (hm, hp) = (held(&self.key_mean), held(&self.probe));
            let (q, _q) = hq.view::<T>(&stream)?;
            let (k, _k) = hk.view::<T>(&stream)?;
            let (v, _v) = hv.view::<T>(&stream)?;
            let (ridges, _ridges) = hr.ptr::<f32>(&stream)?;
            let (grad_out, _grad_out) = hg.view::<T>(&stream)?;
            let (lse, _lse) = hl.ptr::<f32>(&stream)?;
            let (key_mean, _key_mean) = hm.ptr::<f32>(&stream)?;
            let (probe, _probe) = hp.ptr::<f32>(&stream)?;
            let (dq, _dq) = dq.device_ptr_mut(&stream);
            let (dkv, _dkv) = dkv.device_ptr_mut(&stream);
            let (dridge, _dridge) = dridge.device_ptr_mut(&stream);
            let (dscale, _dscale) = dscale.device_ptr_mut(&stream);
            let covariance = covariance.as_mut().map(|c| c.device_ptr_mut(&stream));
            let pointers = BackwardPointers {
                q,
                k,
                v,
                bias: None,
                ridge: Some(DeviceRidge { ptr: ridges, strides: ridge_strides(ridge) }),
                grad_out,
                lse,
                key_mean,
                probe,
                dq: view(dq, a.query_shape()),
                dk: view(dkv, a.key_shape()),
                dv: view(dkv + (keys * size_of::<T>()) as u64, a.value_shape()),
                dridge,
                dscale,
                dbias: None,
                covariance: covariance.as_ref().map(|(ptr, _)| *ptr),
                diagnostics: None,
            };
            // SAFETY: as in the forward.
            unsafe { plan.run(stream.cu_stream(), &pointers, None) }.map_err(raised)?;
        }
        let other = match covariance {
            Some(covariance) => {
                let [_, _, n, d] = a.query_shape();
                let covariance = tensor(covariance, device, &state_shape[..]);
                covariance.narrow(2, 0, n)?.narrow(3, 0, d)?.neg()?.to_dtype(T::DTYPE)?
            }
            None => {
                let per_query = tensor(dridge, device, (a.batch(), a.heads(), a.queries()));
                match *ridge.dims() {
                    [] => per_query.sum_all()?,
                    [1] => per_query.sum_all()?.reshape(1)?,
                    [_] => per_query.sum((0, 2))?,
                    ref sizes => {
                        let shared: Vec<usize> = (0..3).filter(|&axis| sizes[axis] == 1).collect();
                        if shared.is_empty() { per_query } else { per_query.sum_keepdim(shared)? }
                    }
                }
            }
        };
        Ok(Gradients {
            dq: tensor(dq, device, &a.query_shape()[..]),
            dkv: tensor(dkv, device, keys + values),
            other,
        })
    }
}

impl Saved for OnGpu {
    fn backward(&self, inputs: &Inputs, grad_out: &Tensor) -> Result<Gradients> {
        with_type!(inputs.q.dtype(), T => self.typed::<T>(inputs, grad_out))
    }
}
