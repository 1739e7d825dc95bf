//! Whole layers on the same shapes, through Candle, and the bare operator against softmax attention on the same engine.

use super::measure::{Cost, measure};
use super::{Shape, normal};
use crate::device::AnyEngine;
use crate::options::Device;
use crate::{Error, Result};
use candle_core::{DType, Device as CandleDevice, Tensor as CandleTensor, Var};
use candle_nn::VarMap;
use flashlla::{Attention, Engine, Mask, Problem, Tensor};
use flashlla_candle::mixers::mixer;
use flashlla_candle::{MixerConfig, MixerKind, seeded};

/// The layers that are compared.
pub const LAYERS: [MixerKind; 4] =
    [MixerKind::Softmax, MixerKind::Linear, MixerKind::Mesa, MixerKind::LocalLinear];

/// A forward, and a forward with its backward.
#[derive(Debug, Clone, Copy)]
pub struct Passes {
    /// Without gradients.
    pub forward: Cost,
    /// Of the inputs and of all weights.
    pub both: Cost,
}

/// A layer with its projections, causal, in f32.
pub fn layer(kind: MixerKind, shape: Shape, device: &CandleDevice) -> Result<Passes> {
    let run = || -> candle_core::Result<(Cost, Cost)> {
        let config = MixerConfig {
            max_len: shape.tokens,
            ..MixerConfig::new(kind, shape.heads * shape.dim, shape.heads)
        };
        let weights = VarMap::new();
        let layer = mixer(&config, seeded(&weights, 0, DType::F32, device))?;
        let count = shape.batch * shape.tokens * config.dim;
        let x =
            CandleTensor::from_vec(normal::<f32>(1, count), (shape.batch, shape.tokens, config.dim), device)?;
        let x = Var::from_tensor(&x)?;
        let done = |error: Error| candle_core::Error::Msg(error.to_string());
        let forward = measure(|| {
            let out = layer.forward(&x.as_detached_tensor()).map_err(Error::failed)?;
            device.synchronize().map_err(Error::failed)?;
            Ok(out)
        });
        let both = measure(|| {
            let gradients = layer.forward(x.as_tensor()).and_then(|out| out.sqr()?.sum_all()?.backward());
            let gradients = gradients.map_err(Error::failed)?;
            device.synchronize().map_err(Error::failed)?;
            Ok(gradients)
        });
        Ok((forward.map_err(done)?, both.map_err(done)?))
    };
    let (forward, both) = run().map_err(|error| Error::failed(format!("cost: {kind}: {error}")))?;
    Ok(Passes { forward, both })
}

/// The operator alone: Local Linear Attention, or softmax attention as the same engine with a probe of 0 computes it.
pub fn operator(shape: Shape, softmax: bool, device: Device) -> Result<Passes> {
    let engine = AnyEngine::open(device)?;
    let Shape { batch, heads, tokens, dim } = shape;
    let attention = Attention::builder().batch(batch).heads(heads).queries(tokens).head_dim(dim);
    let attention = attention.mask(Mask::causal()).ridge(1.0).build().map_err(Error::failed)?;
    let size = [batch, heads, tokens, dim];
    let random = |seed: u64| Tensor::new(normal::<f32>(seed, size.iter().product()), &size);
    let (q, k, v, grad_out) = (random(1), random(2), random(3), random(4));
    let zero = Tensor::<f32>::zeros(&size);
    let problem: Problem<f32> = attention.problem(q.view(), k.view(), v.view()).map_err(Error::failed)?;
    let problem = if softmax { problem.with_probe(zero.view()).map_err(Error::failed)? } else { problem };
    let mut out = Tensor::<f32>::zeros(&size);
    let forward = measure(|| engine.forward_into(&problem, out.view_mut()).map_err(Error::failed))?;
    let both = measure(|| {
        let state = engine.forward_into(&problem, out.view_mut()).map_err(Error::failed)?;
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Tensor::<f32>::zeros(&size));
        let gradients = engine.backward_into(
            &problem,
            &state,
            grad_out.view(),
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
        );
        gradients.map_err(Error::failed)?;
        Ok((dq, dk, dv))
    })?;
    Ok(Passes { forward, both })
}
