//! The CPU engine.
use crate::{Element, Engine, OtherGradients, Problem, Reference, Result, State, View, ViewMut};

/// Placeholder for the SIMD operations of a type of arithmetic.
pub trait SimdReal {}
impl SimdReal for f32 {}
impl SimdReal for f64 {}

/// The CPU engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {}

impl Engine for Cpu {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        Reference::default().forward_into(problem, out)
    }
    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> Result<OtherGradients<T::Acc>> {
        Reference::default().backward_into(problem, state, grad_out, dq, dk, dv)
    }
}
