//! One trainer for all tasks and mixers.
//!
//! A [`RunSpec`] says everything that a run's result depends on; a [`RunFolder`] holds what came out of it so far. [`train`]
//! brings a folder from wherever it is to the end: killed at any point and started again, it ends with the same log, weights
//! and result (to the bit on a CPU) as if it had never stopped.

mod checkpoint;
mod feed;
mod folder;
mod log;
mod network;
mod optimizer;
mod schedule;
mod spec;
mod tally;
mod trainer;

pub use checkpoint::Checkpoint;
pub use folder::{Finished, RunFolder, Status};
pub use log::{Log, Row};
pub use network::Network;
pub use optimizer::{Optimizer, OptimizerKind};
pub use schedule::learning_rate;
pub use spec::{ModelSpec, Precision, RunSpec, TrainingSpec};
pub use trainer::{Pace, train};

use crate::Error;

/// What Candle reports, as one of our errors: these are computations that could not be done.
fn candle(error: candle_core::Error) -> Error {
    // Candle appends a backtrace, on lines of its own, when one is asked for.
    Error::failed(error.to_string().lines().next().unwrap_or_default())
}
