//! The extension module under the Python package `flashlla`: thin functions on addresses, shapes and strides.
//!
//! What a tensor of PyTorch or an array of NumPy is, how its gradients are recorded, and what users read about it stands in
//! `python/flashlla`; here a call is described, checked and handed to an engine, with Python's lock released.
//!
//! The Python side vouches for what its tensors say of themselves: that their memory is alive for the call, holds what shape,
//! strides and dtype describe, and, for outputs, is used by nothing else.

mod cpu;
mod cuda;
mod decode;
mod describe;
mod tensor;
mod threads;

use flashlla::Error;
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// A library's error as Python spells it. The messages name the argument already.
fn raised(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Cuda { .. } => PyRuntimeError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

#[pymodule]
mod _flashlla {
    use super::*;

    #[pymodule_export]
    use cpu::{cpu_backward, cpu_forward};
    #[pymodule_export]
    use cuda::{BackwardPlan, ForwardPlan, cuda_backward_plan, cuda_forward_plan, cuda_info};
    #[pymodule_export]
    use decode::{
        CacheFullError, CacheWriter, DecodePlan, Pages, cpu_decode, cuda_cache_writer, cuda_decode_plan,
    };
    #[pymodule_export]
    use threads::{get_num_threads, set_num_threads};

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))?;
        m.add("MAX_HEAD_DIM", flashlla::MAX_HEAD_DIM)
    }

    /// The instruction set that the CPU engine uses.
    #[pyfunction]
    fn instruction_set() -> &'static str {
        flashlla::Cpu::new().instruction_set()
    }
}
