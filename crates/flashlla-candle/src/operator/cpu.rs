//! Calls on tensors in host memory.

use super::AttentionOptions;
use super::node::{Forward, Gradients, Inputs, Saved};
use crate::error::raised;
use candle_core::{DType, Device, Layout, Result, Storage, StorageRef, Tensor, WithDType};
use flashlla::{
    Attention, AttentionBuilder, CacheView, Cpu, Element, Engine, Ridge, State, View, ViewMut, bf16, f16,
};

/// A storage type of Candle's and of the operator's, and the type that sums have beside it.
trait Number: Element<Acc: WithDType> + WithDType {}
impl<T: Element<Acc: WithDType> + WithDType> Number for T {}

/// Calls `$body` with the type that a [`DType`] names.
macro_rules! with_type {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F64 => {
                type $t = f64;
                $body
            }
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
            other => Err(crate::error::value("q", other.as_str(), "f64, f32, bf16 or f16")),
        }
    };
}

/// A tensor's memory, for as long as it is looked at.
struct Held<'a>(StorageRef<'a>, &'a Layout);

fn held(tensor: &Tensor) -> Held<'_> {
    let (storage, layout) = tensor.storage_and_layout();
    Held(storage, layout)
}

impl Held<'_> {
    fn view<T: Number>(&self) -> Result<View<'_, T>> {
        let Storage::Cpu(storage) = &*self.0 else {
            return Err(crate::error::value("q", "a tensor on another device", "on the CPU"));
        };
        let [s0, s1, s2, s3] = self.1.stride() else { unreachable!("the ranks were checked") };
        let strides = [s0, s1, s2, s3].map(|&s| s as isize);
        View::strided(
            storage.as_slice::<T>()?,
            self.1.start_offset(),
            self.1.shape().dims4()?.into(),
            strides,
        )
        .map_err(raised)
    }
}

/// The description of a call.
fn describe(
    builder: AttentionBuilder,
    ridge: &Tensor,
    scale: f64,
    options: &AttentionOptions,
) -> Result<Attention> {
    let values = ridge.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let ridge = match *ridge.dims() {
        [] => Ridge::scalar(values[0]),
        [_] => Ridge::per_head(values),
        _ => Ridge::per_query(values, ridge.dims3()?.into()),
    };
    builder
        .mask(options.mask.clone())
        .scale(scale)
        .ridge(ridge)
        .solver(options.solver)
        .precision(options.precision)
        .build()
        .map_err(raised)
}

pub fn forward(inputs: &Inputs) -> Result<Forward> {
    fn typed<T: Number>(inputs: &Inputs) -> Result<Forward> {
        let (q, k, v) = (held(&inputs.q), held(&inputs.k), held(&inputs.v));
        let (q, k, v) = (q.view::<T>()?, k.view::<T>()?, v.view::<T>()?);
        let builder = Attention::builder_for(&q, &k, &v);
        let attention = describe(builder, &inputs.ridge, inputs.scale, &inputs.options)?;
        let mut out = vec![T::default(); attention.out_shape().iter().product()];
        let state = with_problem(&attention, [q, k, v], inputs, |problem| {
            let out = ViewMut::bhnd(&mut out, attention.out_shape()).map_err(raised)?;
            Cpu::new().forward_into(problem, out).map_err(raised)
        })?;
        let saved = Box::new(OnCpu::<T> { attention, state });
        Ok(Forward { out: Storage::Cpu(T::to_cpu_storage_owned(out)), saved })
    }
    with_type!(inputs.q.dtype(), T => typed::<T>(inputs))
}

/// Joins a description with its tensors for the time of `then`.
fn with_problem<T: Number, R>(
    attention: &Attention,
    [q, k, v]: [View<T>; 3],
    inputs: &Inputs,
    then: impl FnOnce(&flashlla::Problem<T>) -> Result<R>,
) -> Result<R> {
    // Probes are few beside keys and values; the engine takes them in the type of its sums.
    let probe = match &inputs.options.probe {
        Some(probe) => Some(probe.to_dtype(<T::Acc as WithDType>::DTYPE)?),
        None => None,
    };
    match &probe {
        None => then(&attention.problem(q, k, v).map_err(raised)?),
        Some(probe) => {
            if probe.dims() != attention.query_shape() {
                let meaning = "batch, query heads, queries, head_dim";
                return Err(crate::error::shape("probe", probe.dims(), attention.query_shape(), meaning));
            }
            let probe = held(probe);
            let problem = attention.problem(q, k, v).map_err(raised)?;
            then(&problem.with_probe(probe.view::<T::Acc>()?).map_err(raised)?)
        }
    }
}

struct OnCpu<T: Element> {
    attention: Attention,
    state: State<T::Acc>,
}

impl<T: Number> Saved for OnCpu<T> {
    fn backward(&self, inputs: &Inputs, grad_out: &Tensor) -> Result<Gradients> {
        let Self { attention, state } = self;
        let (q, k, v) = (held(&inputs.q), held(&inputs.k), held(&inputs.v));
        let grad_out = held(grad_out);
        let [query, key, value] = [attention.query_shape(), attention.key_shape(), attention.value_shape()];
        let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
        let mut dq = vec![T::default(); elements(query)];
        let mut dkv = vec![T::default(); elements(key) + elements(value)];
        let (dk, dv) = dkv.split_at_mut(elements(key));
        let views = [q.view::<T>()?, k.view::<T>()?, v.view::<T>()?];
        let other = with_problem(attention, views, inputs, |problem| {
            let dq = ViewMut::bhnd(&mut dq, query).map_err(raised)?;
            let (dk, dv) =
                (ViewMut::bhnd(dk, key).map_err(raised)?, ViewMut::bhnd(dv, value).map_err(raised)?);
            Cpu::new().backward_into(problem, state, grad_out.view::<T>()?, dq, dk, dv).map_err(raised)
        })?;
        let length = dkv.len();
        let other = match other.dprobe {
            Some(dprobe) => Tensor::from_vec(dprobe.into_vec(), &query, &Device::Cpu)?.to_dtype(T::DTYPE)?,
            None => Tensor::from_vec(other.dridge.into_vec(), inputs.ridge.shape(), &Device::Cpu)?,
        };
        Ok(Gradients {
            dq: Tensor::from_vec(dq, &query, &Device::Cpu)?,
            dkv: Tensor::from_vec(dkv, length, &Device::Cpu)?,
            other,
        })
    }
}

/// The last `t` queries `q [B, HQ, t, D]` of sequences whose keys and values are all there, `k [B, H, M, D]` and `v [B,
/// H, M, DV]`, on the CPU and out of the graph: one pass over the keys.
pub(crate) fn decode(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ridge: &Tensor,
    scale: f64,
    options: &AttentionOptions,
) -> Result<Tensor> {
    fn typed<T: Number>(
        [q, k, v]: [&Tensor; 3],
        ridge: &Tensor,
        scale: f64,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        let lengths = vec![k.dim(2)?; k.dim(0)?];
        let (q, k, v) = (held(q), held(k), held(v));
        let (q, k, v) = (q.view::<T>()?, k.view::<T>()?, v.view::<T>()?);
        let cache = CacheView::contiguous(k, v, &lengths).map_err(raised)?;
        let attention = describe(Attention::builder_for_cache(&q, &cache), ridge, scale, options)?;
        let decoding = attention.decoding(q, &cache).map_err(raised)?;
        let mut out = vec![T::default(); attention.out_shape().iter().product()];
        let view = ViewMut::bhnd(&mut out, attention.out_shape()).map_err(raised)?;
        Cpu::new().decode_into(&decoding, view).map_err(raised)?;
        Tensor::from_vec(out, &attention.out_shape(), &Device::Cpu)
    }
    with_type!(q.dtype(), T => typed::<T>([q, k, v], ridge, scale, options))
}
