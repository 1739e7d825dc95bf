//! Sweeps: many runs from one file, restartable, and split between processes.

mod file;
mod runner;

pub use file::Sweep;
pub use runner::{Shard, run};
