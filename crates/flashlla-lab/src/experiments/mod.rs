//! The experiments: one module each, all listed in [`Experiment`].
//!
//! Each takes a base seed and a number of seeds, draws error bars from them, and gives the same numbers for the same seeds
//! whatever the number of threads. To add one that trains nothing, write a module with an `Options` that derives
//! [`clap::Args`], has [`Common`] in it, and a `run(&self) -> Result<Report>`; then list it here. One that trains is a task
//! (`crate::tasks`) and two files in [`trained`].

mod cost;
mod estimators;
mod held_out_recall;
mod mixers;
pub(crate) mod random;
mod rates;
mod recorded;
mod test_time_regression;
pub mod trained;

pub(crate) use estimators::Pairs;
#[cfg(test)]
pub(crate) use estimators::{row_errors, squared_norm};
pub(crate) use mixers::normalise;

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
    /// Time and memory of LLA, softmax, linear attention and MesaNet, and what conjugate-gradient steps buy
    Cost(cost::Options),
    /// Regression inside a sequence whose law changes: small models trained with each mixer
    #[command(after_long_help = TRAINED)]
    InContextRegression(trained::Options),
    /// Multi-query associative recall (Zoology): small models trained with each mixer
    #[command(after_long_help = TRAINED)]
    Mqar(trained::Options),
    /// Objects that change places: small models trained with each mixer
    #[command(after_long_help = TRAINED)]
    StateTracking(trained::Options),
    /// The bytes of a text: small models trained with each mixer
    #[command(after_long_help = TRAINED)]
    LanguageModel(TextOptions),
}

/// What `language-model` can be told.
#[derive(Debug, Args)]
pub struct TextOptions {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub options: trained::Options,
    /// The text, any file [default: the first book of Cicero's De finibus, which comes with the program]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
}

const TRAINED: &str = "\
Runs gather in the folder of results: started again after a stop, the command goes on where it was.

Examples:
  flashlla experiment mqar --quick
  flashlla experiment mqar --device cuda --shard 1/4
  flashlla experiment mqar --print-config > my.toml; flashlla sweep my.toml --out results/mine";

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
    /// Whether it trains models side by side, a thread each.
    pub fn side_by_side(&self) -> bool {
        match self {
            Self::InContextRegression(o) | Self::Mqar(o) | Self::StateTracking(o) => o.side_by_side(),
            Self::LanguageModel(o) => o.options.side_by_side(),
            _ => false,
        }
    }

    /// Runs it: checks where the results will go, computes, prints, writes.
    pub fn run(self) -> Result<()> {
        match self {
            Self::HeldOutRecall(o) => at_once(held_out_recall::NAME, &o.common, || o.run()),
            Self::Rates(o) => at_once(rates::NAME, &o.common, || o.run()),
            Self::TestTimeRegression(o) => at_once(test_time_regression::NAME, &o.common, || o.run()),
            Self::Cost(o) => at_once(cost::NAME, &o.common, || o.run()),
            Self::InContextRegression(o) => o.run("in-context-regression", None),
            Self::Mqar(o) => o.run("mqar", None),
            Self::StateTracking(o) => o.run("state-tracking", None),
            Self::LanguageModel(o) => o.options.run("language-model", o.text.as_deref()),
        }
    }
}

/// Runs an experiment that is either done or not.
fn at_once(name: &str, common: &Common, run: impl FnOnce() -> Result<Report> + Send) -> Result<()> {
    let out = common.out.clone().unwrap_or_else(|| PathBuf::from("results").join(name));
    let folder = Folder::prepare(&out)?;
    let pool = thread_pool(common.threads)?;
    let start = Instant::now();
    let report = pool.install(run)?;
    let seconds = start.elapsed().as_secs_f64();
    report.write(folder)?;
    show(&report, &out, seconds, common.json)
}

/// Prints what came out.
fn show(report: &Report, out: &std::path::Path, seconds: f64, json: bool) -> Result<()> {
    if json {
        let mut document = report.document();
        document["out"] = out.display().to_string().into();
        document["seconds"] = seconds.into();
        stdout::json(&document)
    } else {
        stdout::line(format_args!("{}\nResults in {} ({seconds:.0} s)", report.to_terminal(), out.display()))
    }
}

/// The place of the smallest number, the first of several; `None` when there is none that is not NaN.
fn smallest(values: impl IntoIterator<Item = f64>) -> Option<usize> {
    let numbers = values.into_iter().enumerate().filter(|(_, x)| !x.is_nan());
    numbers.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}
