//! Adam's update, without the learning rate and the weight decay.

use candle_core::{Result, Tensor};

/// How fast the mean of the gradient and of its square forget; the second as usual for language models.
pub(super) const BETAS: (f64, f64) = (0.9, 0.95);
pub(super) const EPSILON: f64 = 1e-8;

/// `m̂ / (√v̂ + ε)` after taking up a gradient; `step` counts from 1.
pub(super) fn update(moments: &mut [Tensor], gradient: &Tensor, step: u64) -> Result<Tensor> {
    let power = i32::try_from(step).unwrap_or(i32::MAX);
    let mean = ((&moments[0] * BETAS.0)? + (gradient * (1.0 - BETAS.0))?)?;
    let square = ((&moments[1] * BETAS.1)? + (gradient.sqr()? * (1.0 - BETAS.1))?)?;
    let unbiased = (&mean / (1.0 - BETAS.0.powi(power)))?;
    let deviation = ((&square / (1.0 - BETAS.1.powi(power)))?.sqrt()? + EPSILON)?;
    moments[0] = mean;
    moments[1] = square;
    unbiased / deviation
}
