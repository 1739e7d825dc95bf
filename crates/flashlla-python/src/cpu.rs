//! Forward and backward in host memory.

use crate::describe::Options;
use crate::raised;
use crate::tensor::{Dtype, HostTensor, with_type};
use crate::threads::interruptible;
use flashlla::{Attention, Element, Engine, Problem, Real, Ridge, Solver, State};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

/// What a forward reads.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Inputs {
    pub q: HostTensor,
    pub k: HostTensor,
    pub v: HostTensor,
    /// λ as `[B or 1, HQ or 1, N or 1]`.
    ridge: Option<HostTensor>,
    /// `[B or 1, HQ or H or 1, M, 1]` in the type of sums.
    pub bias: Option<HostTensor>,
    /// `[B, HQ, N, D]` in the type of sums.
    pub probe: Option<HostTensor>,
    options: Options,
}

impl Inputs {
    fn attention(&self) -> PyResult<Attention> {
        self.described(self.k.shape, self.v.shape)
    }

    /// The description of a call with keys and values of these sizes.
    pub fn described(&self, k: [usize; 4], v: [usize; 4]) -> PyResult<Attention> {
        let same = self.q.dtype;
        for (argument, tensor) in [("k", &self.k), ("v", &self.v)] {
            if tensor.dtype != same {
                return Err(PyTypeError::new_err(format!("{argument}: its dtype must be that of q")));
            }
        }
        let ridge = match &self.ridge {
            None => None,
            Some(ridge) => {
                let [_, b, h, n] = ridge.shape;
                // SAFETY: Python vouches for its tensors.
                let values = with_type!(ridge.dtype, R => unsafe { ridge.values::<R, f64>()? });
                Some(Ridge::broadcast(values, [b, h, n]))
            }
        };
        let resolution = Solver::default_tolerance(same == Dtype::F64 || self.options.high());
        self.options.attention(self.q.shape, k, v, ridge, resolution)
    }

    /// # Safety
    /// The tensors must hold what they say while the problem lives.
    unsafe fn problem<'a, T: Element>(&self, attention: &'a Attention) -> PyResult<Problem<'a, T>> {
        // SAFETY: the caller's.
        unsafe {
            let mut problem =
                attention.problem(self.q.view::<T>()?, self.k.view()?, self.v.view()?).map_err(raised)?;
            if let Some(bias) = &self.bias {
                problem = problem.with_bias(bias.view()?).map_err(raised)?;
            }
            if let Some(probe) = &self.probe {
                problem = problem.with_probe(probe.view()?).map_err(raised)?;
            }
            Ok(problem)
        }
    }
}

/// What a forward or a decoding writes beside its outputs, each only where it is given.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Results {
    /// In the type of sums, contiguous, as the next two are.
    lse: Option<HostTensor>,
    key_mean: Option<HostTensor>,
    probe: Option<HostTensor>,
    /// int32 under the name f32.
    iterations: Option<HostTensor>,
    residual: Option<HostTensor>,
}

impl Results {
    /// # Safety
    /// The tensors must be Python's to write.
    pub unsafe fn fill<A: Real>(self, state: &State<A>) -> PyResult<()> {
        // SAFETY: the caller's.
        unsafe {
            for (to, from) in
                [(&self.lse, &state.lse), (&self.key_mean, &state.key_mean), (&self.probe, &state.probe)]
            {
                to.as_ref().map(|to| to.fill(from.data())).transpose()?;
            }
            self.iterations.map(|to| to.fill(&state.diagnostics.iterations)).transpose()?;
            self.residual.map(|to| to.fill(&state.diagnostics.residual)).transpose()?;
        }
        Ok(())
    }
}

/// Computes a forward. `out` is written in any layout, in the dtype of q.
#[pyfunction]
pub fn cpu_forward(py: Python<'_>, inputs: Inputs, out: HostTensor, results: Results) -> PyResult<()> {
    let attention = inputs.attention()?;
    with_type!(inputs.q.dtype, T => {
        // SAFETY: Python vouches for its tensors, and holds on to them until this returns.
        unsafe {
            let problem = inputs.problem::<T>(&attention)?;
            let out = out.view_mut::<T>()?;
            results.fill(&interruptible(py, |cpu| cpu.forward_into(&problem, out))?)
        }
    })
}

/// What a backward writes beside dq, dk and dv: contiguous tensors in the type of sums, in the shapes of the inputs.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Others {
    ridge: Option<HostTensor>,
    bias: Option<HostTensor>,
    probe: Option<HostTensor>,
}

/// Computes the gradients of `Σ out · grad_out`; `state` is (lse, key_mean, probe) of the forward. Returns the scale's.
#[pyfunction]
pub fn cpu_backward(
    py: Python<'_>,
    inputs: Inputs,
    state: (HostTensor, HostTensor, HostTensor),
    grad_out: HostTensor,
    gradients: (HostTensor, HostTensor, HostTensor),
    others: Others,
) -> PyResult<f64> {
    let attention = inputs.attention()?;
    let a = &attention;
    with_type!(inputs.q.dtype, T => {
        // SAFETY: Python vouches for its tensors, and holds on to them until this returns.
        unsafe {
            let problem = inputs.problem::<T>(a)?;
            let state = State::<<T as Element>::Acc> {
                lse: state.0.owned(&[a.batch(), a.heads(), a.queries()])?,
                key_mean: state.1.owned(&a.query_shape())?,
                probe: state.2.owned(&a.query_shape())?,
                diagnostics: Default::default(),
            };
            let grad_out = grad_out.view::<T>()?;
            let (dq, dk, dv) =
                (gradients.0.view_mut::<T>()?, gradients.1.view_mut()?, gradients.2.view_mut()?);
            let other = interruptible(py, |cpu| cpu.backward_into(&problem, &state, grad_out, dq, dk, dv))?;
            others.ridge.map(|to| to.fill(other.dridge.data())).transpose()?;
            others.bias.zip(other.dbias).map(|(to, from)| to.fill(from.data())).transpose()?;
            others.probe.zip(other.dprobe).map(|(to, from)| to.fill(from.data())).transpose()?;
            Ok(other.dscale.as_f64())
        }
    })
}
