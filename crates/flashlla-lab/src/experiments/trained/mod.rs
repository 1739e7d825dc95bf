//! The trained experiments: `in-context-regression`, `mqar`, `state-tracking` and `language-model`.
//!
//! Each is a sweep whose file stands beside this one, in a full and in a quick size, and whose runs gather in the folder `runs`
//! of the results: started again, an experiment goes on where it was stopped. `docs/experiments.md` says what each is, what
//! should come out and what did.

mod look;
mod runs;
mod summary;

pub use look::look;
pub use runs::Ran;
pub use summary::report;

use super::Common;
use crate::options::Device;
use crate::report::{Folder, Report};
use crate::sweep::{self, Shard, Sweep};
use crate::tasks::TaskSpec;
use crate::train::{Pace, RunFolder};
use crate::{Error, Result, stdout};
use clap::Args;
use flashlla_candle::MixerKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the runs of an experiment or a sweep are, in its folder of results.
pub const RUNS: &str = "runs";

/// The experiments: their tasks' names, and the files of their quick versions.
const QUICK: [(&str, &str); 4] = [
    ("in-context-regression", include_str!("in_context_regression_quick.toml")),
    ("mqar", include_str!("mqar_quick.toml")),
    ("state-tracking", include_str!("state_tracking_quick.toml")),
    ("language-model", include_str!("language_model_quick.toml")),
];

/// How runs are done; results do not depend on it.
#[derive(Debug, Clone, Args)]
pub struct Running {
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,
    /// Do part I of N of the runs, for N processes that share the folder of results [default: 1/1]
    #[arg(long, value_name = "I/N", value_parser = <Shard as std::str::FromStr>::from_str, default_value = "1/1", hide_default_value = true)]
    pub shard: Shard,
    /// Runs at a time [default: one per thread on cpu, 1 on cuda]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub jobs: Option<u16>,
    /// Seconds of work that being killed may cost
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub checkpoint_every: u64,
}

impl Running {
    /// Runs at a time.
    fn jobs(&self, threads: usize) -> usize {
        match (self.jobs, self.device) {
            (Some(jobs), _) => jobs.into(),
            (None, Device::Cpu) => threads,
            (None, Device::Cuda) => 1,
        }
    }

    /// Whether runs go on side by side, a thread each.
    pub fn side_by_side(&self, threads: Option<u16>) -> bool {
        let threads = threads.map_or_else(crate::options::all_threads, usize::from);
        self.jobs(threads) >= threads
    }

    /// Does the runs in the folder `out` and reports on them, unless other processes are not done with theirs.
    pub fn run(&self, sweep: &Sweep, out: &Path, threads: Option<u16>) -> Result<Outcome> {
        let pace = Pace {
            device: candle_device(self.device)?,
            checkpoint_every: Duration::from_secs(self.checkpoint_every),
            label: String::new(),
            bars: crate::report::progress::several(),
        };
        let threads = threads.map_or_else(crate::options::all_threads, usize::from);
        sweep::run(sweep, self.shard, &out.join(RUNS), (self.jobs(threads), threads), &pace)?;
        let mut ran = vec![];
        for spec in &sweep.runs {
            ran.extend(Ran::read(&out.join(RUNS).join(spec.name()))?);
        }
        let (done, all) = (ran.len(), sweep.runs.len());
        let name = sweep.runs.first().map_or("", |run| run.task.name());
        match report(name, ran)? {
            Some(report) if done == all => Ok(Outcome::Whole(Box::new(report))),
            _ => Ok(Outcome::Part { done, all }),
        }
    }
}

/// What a call came to.
pub enum Outcome {
    /// All runs have ended.
    Whole(Box<Report>),
    /// Others have not.
    Part {
        /// Runs that have ended.
        done: usize,
        /// Runs of the sweep.
        all: usize,
    },
}

/// Candle's device.
pub fn candle_device(device: Device) -> Result<candle_core::Device> {
    match device {
        Device::Cpu => Ok(candle_core::Device::Cpu),
        Device::Cuda if cfg!(feature = "train-cuda") => {
            candle_core::Device::new_cuda(0).map_err(|error| Error::failed(format!("--device cuda: {error}")))
        }
        Device::Cuda => Err(Error::usage(
            "--device cuda: this program was built without it; build it with `--features train-cuda`, which needs nvcc, or use cpu",
        )),
    }
}

/// What a trained experiment can be told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub running: Running,
    /// Mixers, with commas: softmax, lla, parallax, linear, gla, deltanet, gated-deltanet, mesanet, mamba2, hyena [default:
    /// depends on the experiment]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub mixers: Vec<MixerKind>,
    /// Training steps of every run [default: depends on the experiment]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Print the experiment's settings as a file for `flashlla sweep`, and do nothing
    #[arg(long)]
    pub print_config: bool,
}

impl Options {
    /// Whether runs go on side by side, a thread each.
    pub fn side_by_side(&self) -> bool {
        self.running.side_by_side(self.common.threads)
    }

    /// The experiment of this name as a sweep.
    fn sweep(&self, name: &str, text: Option<&Path>) -> Result<Sweep> {
        let quick = QUICK.iter().find(|(task, _)| *task == name && self.common.quick).map(|(_, text)| *text);
        let mut sweep = Sweep::of_experiment(name, quick)?;
        let seeds = self.common.seeds.map(|_| self.common.seeds(1));
        let mut runs = vec![];
        for mut run in std::mem::take(&mut sweep.runs) {
            run.training.steps = self.steps.unwrap_or(run.training.steps);
            if let (TaskSpec::LanguageModel(task), Some(file)) = (&mut run.task, text) {
                // Results must not depend on where the program is called.
                let whole =
                    std::path::absolute(file).map_err(|error| Error::failed(format!("--text: {error}")))?;
                task.file = Some(whole);
            }
            run.seed = run.seed.wrapping_add(self.common.seed);
            let (own_seed, own_mixer) = ([run.seed], [run.model.mixer]);
            let mixers = if self.mixers.is_empty() { &own_mixer[..] } else { &self.mixers };
            for &seed in seeds.as_deref().unwrap_or(&own_seed) {
                for &mixer in mixers {
                    let mut run = run.clone();
                    (run.seed, run.model.mixer) = (seed, mixer);
                    if !runs.contains(&run) {
                        runs.push(run);
                    }
                }
            }
        }
        Ok(Sweep { runs })
    }

    /// Runs the experiment of this name, and prints and writes what came out.
    pub fn run(&self, name: &'static str, text: Option<&Path>) -> Result<()> {
        if self.print_config {
            let quick = QUICK.iter().find(|(task, _)| *task == name && self.common.quick);
            return stdout::write(quick.map_or(Sweep::text_of(name), |(_, text)| text));
        }
        let folder = if self.common.quick { format!("{name}-quick") } else { name.to_owned() };
        let out = self.common.out.clone().unwrap_or_else(|| PathBuf::from("results").join(folder));
        let sweep = self.sweep(name, text)?;
        finish(&self.running, &sweep, &out, self.common.threads, self.common.json)
    }
}

/// Runs a sweep, prints and writes what came out.
pub fn finish(running: &Running, sweep: &Sweep, out: &Path, threads: Option<u16>, json: bool) -> Result<()> {
    let folder = Folder::prepare_beside(out, Some(RUNS))?;
    let start = Instant::now();
    match running.run(sweep, out, threads)? {
        Outcome::Whole(report) => {
            report.write(folder)?;
            super::show(&report, out, start.elapsed().as_secs_f64(), json)
        }
        Outcome::Part { done, all } => stdout::line(format_args!(
            "{done} of {all} runs are done in {}; the same command does what is left, and `flashlla report {}` shows what there is",
            out.join(RUNS).display(),
            out.display()
        )),
    }
}

/// All runs that have ended under a folder of results.
pub fn gather(folder: &Path) -> Result<Vec<Ran>> {
    let failed = |error: std::io::Error| Error::failed(format!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    // Folders are listed in any order.
    paths.sort_unstable();
    let mut ran = vec![];
    for path in paths {
        if path.is_dir() && RunFolder::at(&path).spec()?.is_some() {
            ran.extend(Ran::read(&path)?);
        }
    }
    Ok(ran)
}
