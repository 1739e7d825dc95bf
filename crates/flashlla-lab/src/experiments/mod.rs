//! The experiments: one module each, all listed in [`Experiment`].

use crate::{Error, Result};
use clap::Subcommand;

/// The experiments that `flashlla experiment` can run.
#[derive(Debug, Subcommand)]
pub enum Experiment {
    /// Predict every value from its key, the pair removed: softmax, ridge regression and LLA on real tensors
    HeldOutRecall,
    /// Convergence rates of the three estimators
    Rates,
    /// Regression at test time without training
    TestTimeRegression,
}

impl Experiment {
    /// Runs it.
    pub fn run(self) -> Result<()> {
        Err(Error::failed("this experiment is not built yet"))
    }
}
