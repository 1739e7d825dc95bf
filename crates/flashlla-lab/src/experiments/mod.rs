//! The experiments: one module each, all listed in [`Experiment`].
//!
//! None of them trains anything. Each takes a base seed and a number of seeds, draws error bars from them, and gives the
//! same numbers for the same seeds whatever the number of threads. To add one, write a module with an `Options` that
//! derives [`clap::Args`], has [`Common`] in it, and a `run(&self) -> Result<Report>`; then list it here.

mod estimators;
mod held_out_recall;
mod mixers;
mod random;
mod rates;
mod recorded;
mod test_time_regression;

use crate::options::thread_pool;
use crate::report::{Folder, Report};
use crate::{Result, stdout};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Instant;

/// The experiments that `flashlla experiment` can run.
#[derive(Debug, Subcommand)]
pub enum Experiment {
    /// Predict every value from its key, the pair removed: softmax, ridge regression and LLA on a real model's tensors
    HeldOutRecall(held_out_recall::Options),
    /// How fast the three estimators' errors fall with the length of the context, against the theory
    Rates(rates::Options),
    /// Regression at test time on a stream that changes: softmax, linear attention, MesaNet and LLA
    TestTimeRegression(test_time_regression::Options),
}

/// What every experiment can be told.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// How many seeds the error bars come from [default: depends on the experiment]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    seeds: Option<u64>,
    /// The first seed; the others follow it
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Folder for CSV, JSON, SVG and PNG files [default: results/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// A smaller run, seconds instead of minutes
    #[arg(long)]
    quick: bool,
    /// Threads to compute with [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Common {
    /// The seeds to run.
    fn seeds(&self, default: u64) -> Vec<u64> {
        (0..self.seeds.unwrap_or(default)).map(|i| self.seed.wrapping_add(i)).collect()
    }
}

impl Experiment {
    /// Runs it: checks where the results will go, computes, prints, writes.
    pub fn run(self) -> Result<()> {
        let (name, common) = match &self {
            Self::HeldOutRecall(options) => (held_out_recall::NAME, &options.common),
            Self::Rates(options) => (rates::NAME, &options.common),
            Self::TestTimeRegression(options) => (test_time_regression::NAME, &options.common),
        };
        let out = common.out.clone().unwrap_or_else(|| PathBuf::from("results").join(name));
        let json = common.json;
        let folder = Folder::prepare(&out)?;
        let pool = thread_pool(common.threads)?;
        let start = Instant::now();
        let report = pool.install(|| self.report())?;
        let seconds = start.elapsed().as_secs_f64();
        report.write(folder)?;
        if json {
            let mut document = report.document();
            document["out"] = out.display().to_string().into();
            document["seconds"] = seconds.into();
            stdout::json(&document)
        } else {
            stdout::line(format_args!(
                "{}\nResults in {} ({seconds:.0} s)",
                report.to_terminal(),
                out.display()
            ))
        }
    }

    /// Computes everything and writes nothing.
    pub fn report(&self) -> Result<Report> {
        match self {
            Self::HeldOutRecall(options) => options.run(),
            Self::Rates(options) => options.run(),
            Self::TestTimeRegression(options) => options.run(),
        }
    }
}

/// The place of the smallest number, the first of several; `None` when there is none that is not NaN.
fn smallest(values: impl IntoIterator<Item = f64>) -> Option<usize> {
    let numbers = values.into_iter().enumerate().filter(|(_, x)| !x.is_nan());
    numbers.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}
