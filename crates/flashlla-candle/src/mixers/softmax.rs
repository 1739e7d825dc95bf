//! Softmax attention with a learned scale per key head, as Local Linear Attention has it.

use super::{Mixer, MixerConfig};
use crate::heads::Heads;
use crate::layer::KvCache;
use crate::nn::{causal_bias, repeated, widened};
use crate::operator::wide;
use candle_core::{CpuStorage, CustomOp1, D, Error, Layout, Result, Shape, Storage, Tensor};
use candle_nn::{Init, VarBuilder, ops};
use std::sync::Mutex;

/// `out_i = Σ_{j ≤ i} softmax_j(scale q_i·k_j) v_j` (Vaswani et al., 2017), `scale = head_dim^-0.5 · exp(log_scale)` per
/// key head.
#[derive(Debug)]
pub struct Softmax {
    heads: Heads,
    log_scale: Option<Tensor>,
}

impl Softmax {
    pub fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(config, true, &vb)?;
        let few = vb.to_dtype(wide(vb.dtype())?);
        let log_scale = if config.learn_scale {
            Some(few.get_with_hints(heads.kv_heads, "log_scale", Init::Const(0.0))?)
        } else {
            None
        };
        Ok(Self { heads, log_scale })
    }

    /// Of queries that are the last of the tokens that there are keys of.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (heads, kv_heads) = (self.heads.heads, self.heads.kv_heads);
        let (k, v) = (repeated(k, heads)?, repeated(v, heads)?);
        let logits = widened(&(q.contiguous()?.matmul(&k.t()?)? * (self.heads.width as f64).powf(-0.5))?)?;
        let logits = match &self.log_scale {
            Some(log) => {
                let scale = log.exp()?.reshape((kv_heads, 1))?.broadcast_as((kv_heads, heads / kv_heads))?;
                logits.broadcast_mul(&scale.reshape((heads, 1, 1))?.to_dtype(logits.dtype())?)?
            }
            None => logits,
        };
        causal_softmax(&logits)?.to_dtype(v.dtype())?.matmul(&v)
    }
}

impl Mixer for Softmax {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [q, k, v] = self.heads.project(x, 0)?;
        self.heads.merge(&self.attend(&q, &k, &v)?, x)
    }

    fn cache(&self, max_len: usize) -> Option<KvCache> {
        (!self.heads.has_convs()).then(|| KvCache::new(max_len))
    }

    fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let x = x.detach();
        let [q, k, v] = self.heads.project(&x, cache.len())?;
        let (k, v) = cache.append(&k, &v)?;
        Ok(self.heads.merge(&self.attend(&q.detach(), &k, &v)?, &x)?.detach())
    }
}

/// Softmax over the keys that a query sees, of logits `[B, HQ, N, M]`: Candle's fused one, which has no gradient, with
/// its gradient. As single operations, mask and all, each remembered for its gradient, it costs more time and memory.
fn causal_softmax(logits: &Tensor) -> Result<Tensor> {
    let hidden = causal_bias(logits.dim(2)?, logits.dim(3)?, logits.dtype(), logits.device())?;
    let weights = ops::softmax_last_dim(&logits.detach().broadcast_add(&hidden)?)?;
    let (storage, layout) = weights.storage_and_layout();
    logits.apply_op1(CausalSoftmax { weights: Mutex::new(Some(storage.try_clone(layout)?)) })
}

struct CausalSoftmax {
    /// Until the node is made.
    weights: Mutex<Option<Storage>>,
}

impl CausalSoftmax {
    fn weights(&self) -> Result<Storage> {
        let weights = self.weights.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        weights.ok_or_else(|| Error::Msg("softmax: the node of a call was applied a second time".into()))
    }
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.weights()? {
            Storage::Cpu(weights) => Ok((weights, layout.shape().clone())),
            _ => Err(Error::Msg("softmax: its weights are not on the CPU".into())),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        match self.weights()? {
            Storage::Cuda(weights) => Ok((weights, layout.shape().clone())),
            _ => Err(Error::Msg("softmax: its weights are not on a GPU".into())),
        }
    }

    fn bwd(&self, _: &Tensor, weights: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let part = (gradient * weights)?;
        let mean = part.sum_keepdim(D::Minus1)?;
        (part - weights.broadcast_mul(&mean)?).map(Some)
    }
}
