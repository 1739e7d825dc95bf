//! The operator as a node of Candle's graph.

use super::joint::{join, part};
use super::{AttentionOptions, cpu};
use candle_core::{CpuStorage, CustomOp3, Device, Error, Layout, Result, Shape, Storage, Tensor};
use std::sync::Mutex;

/// The tensors and options of a call, out of the graph.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub ridge: Tensor,
    pub scale: f64,
    /// With the probe out of the graph too.
    pub options: AttentionOptions,
}

/// What a forward computes.
pub struct Forward {
    /// `[B, HQ, N, DV]`, contiguous.
    pub out: Storage,
    /// What its backward starts from.
    pub saved: Box<dyn Saved>,
}

/// What a forward saved.
pub trait Saved: Send + Sync {
    /// The gradients of all inputs.
    fn backward(&self, inputs: &Inputs, grad_out: &Tensor) -> Result<Gradients>;
}

/// The gradients of a call.
pub struct Gradients {
    /// `[B, HQ, N, D]`.
    pub dq: Tensor,
    /// `dk` and `dv` in row-major order, one behind the other.
    pub dkv: Tensor,
    /// Of the probe, when there is one, or else of the ridge.
    pub other: Tensor,
}

/// The operator with everything checked but sizes and values.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    ridge: &Tensor,
    scale: f64,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let inputs = Inputs {
        q: q.detach(),
        k: k.detach(),
        v: v.detach(),
        ridge: ridge.detach(),
        scale,
        options: AttentionOptions { probe: options.probe.as_ref().map(Tensor::detach), ..options.clone() },
    };
    let Forward { out, saved } = match q.device() {
        Device::Cpu => cpu::forward(&inputs)?,
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::cuda::forward(&inputs)?,
        other => {
            let place = format!("on {:?}", other.location());
            let cuda = if cfg!(feature = "cuda") { "" } else { " built with the feature `cuda`" };
            return Err(crate::error::value("q", place, format!("on the CPU, or on a GPU{cuda}")));
        }
    };
    let shape = Shape::from((q.dim(0)?, q.dim(1)?, q.dim(2)?, v.dim(3)?));
    let node = |joined| Node { inputs, saved, joined, shape, out: Mutex::new(Some(out)) };
    let other = options.probe.as_ref().unwrap_or(ridge);
    if other.track_op() {
        q.apply_op3(&join(k, v)?, other, node(true))
    } else {
        q.apply_op3(k, v, node(false))
    }
}

struct Node {
    inputs: Inputs,
    saved: Box<dyn Saved>,
    /// Whether the node's inputs are q, k joined with v, and the probe or ridge, rather than q, k and v.
    joined: bool,
    shape: Shape,
    /// What the forward computed, until the node is made.
    out: Mutex<Option<Storage>>,
}

impl Node {
    fn out(&self) -> Result<Storage> {
        let out = self.out.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        out.ok_or_else(|| Error::msg("flashlla: the node of a call was applied a second time"))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        "local-linear-attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.out()? {
            Storage::Cpu(out) => Ok((out, self.shape.clone())),
            _ => Err(Error::msg("flashlla: the output of a call on the CPU is not there")),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        match self.out()? {
            Storage::Cuda(out) => Ok((out, self.shape.clone())),
            _ => Err(Error::msg("flashlla: the output of a call on a GPU is not there")),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Gradients { dq, dkv, other } = self.saved.backward(&self.inputs, grad_out)?;
        if self.joined {
            Ok((Some(dq), Some(dkv), Some(other)))
        } else {
            let (dk, dv) = part(&dkv, self.inputs.k.shape(), self.inputs.v.shape())?;
            Ok((Some(dq), Some(dk), Some(dv)))
        }
    }
}
