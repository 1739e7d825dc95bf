//! Local Linear Attention.

pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod element;
mod engine;
mod error;
mod mask;
pub mod reference;
mod ridge;
mod solver;
mod tensor;
mod view;

pub use attention::{Attention, AttentionBuilder, Problem};
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use element::{Element, Real};
pub use engine::{Diagnostics, Engine, Forward, Gradients, OtherGradients, State};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use mask::{Mask, Visible};
pub use reference::Reference;
pub use ridge::Ridge;
pub use solver::{Precision, Solver};
pub use tensor::Tensor;
pub use view::{Shape, Strides, View, ViewMut};
