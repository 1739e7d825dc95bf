//! Two inputs of a custom operator as one, for the sake of their gradients.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

/// Joins two tensors of one type into a flat tensor of the graph that stands for both: it has as many elements as they have
/// together, all 0, and its gradient is their gradients in row-major order, one behind the other.
///
/// Nobody needs to read it; its zeros are there because a tensor must have its elements.
pub fn join(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.apply_op2(b, Join)
}

/// The two parts of a joint's gradient, as views of it.
pub fn part(joint: &Tensor, a: &Shape, b: &Shape) -> Result<(Tensor, Tensor)> {
    let (first, second) = (a.elem_count(), b.elem_count());
    Ok((joint.narrow(0, 0, first)?.reshape(a)?, joint.narrow(0, first, second)?.reshape(b)?))
}

struct Join;

impl CustomOp2 for Join {
    fn name(&self) -> &'static str {
        "flashlla-join"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        _: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let shape = Shape::from(a_layout.shape().elem_count() + b_layout.shape().elem_count());
        let dtype: DType = a.dtype();
        Ok((candle_core::cpu_backend::CpuDevice.zeros_impl(&shape, dtype)?, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &candle_core::CudaStorage,
        a_layout: &Layout,
        _: &candle_core::CudaStorage,
        b_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        let shape = Shape::from(a_layout.shape().elem_count() + b_layout.shape().elem_count());
        Ok((a.device().zeros_impl(&shape, a.dtype())?, shape))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (a, b) = part(gradient, a.shape(), b.shape())?;
        Ok((Some(a), Some(b)))
    }
}
