//! The engine of a device that is chosen at run time.

use crate::options::Device;
use crate::{Error, Result};
use flashlla::{Cpu, Decoding, Element, Engine, OtherGradients, Problem, State, View, ViewMut};

/// The engine of any device.
#[derive(Debug, Clone)]
pub enum AnyEngine {
    /// The processor.
    Cpu(Cpu),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(flashlla::Cuda),
}

impl AnyEngine {
    /// Opens the device.
    pub fn open(device: Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu(Cpu::default())),
            #[cfg(feature = "cuda")]
            Device::Cuda => flashlla::Cuda::new().map(Self::Cuda).map_err(Error::failed),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => Err(Error::usage(
                "--device cuda: this program was built without it; build it with `--features cuda`, or use cpu",
            )),
        }
    }
}

impl Engine for AnyEngine {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> flashlla::Result<State<T::Acc>> {
        match self {
            Self::Cpu(engine) => engine.forward_into(problem, out),
            #[cfg(feature = "cuda")]
            Self::Cuda(engine) => engine.forward_into(problem, out),
        }
    }

    fn decode_into<T: Element, O: Element>(
        &self,
        decoding: &Decoding<T>,
        out: ViewMut<O>,
    ) -> flashlla::Result<State<T::Acc>> {
        match self {
            Self::Cpu(engine) => engine.decode_into(decoding, out),
            #[cfg(feature = "cuda")]
            Self::Cuda(engine) => engine.decode_into(decoding, out),
        }
    }

    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> flashlla::Result<OtherGradients<T::Acc>> {
        match self {
            Self::Cpu(engine) => engine.backward_into(problem, state, grad_out, dq, dk, dv),
            #[cfg(feature = "cuda")]
            Self::Cuda(engine) => engine.backward_into(problem, state, grad_out, dq, dk, dv),
        }
    }
}
