//! The loop.

use super::feed::with_batches;
use super::tally::Tally;
use super::{
    Checkpoint, Finished, Log, Network, Optimizer, Row, RunFolder, RunSpec, Status, candle, learning_rate,
};
use crate::Result;
use crate::report::progress;
use crate::tasks::{Batch, Task};
use candle_core::{Device, Var};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a run's result does not depend on.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Where to compute.
    pub device: Device,
    /// How much work a kill may cost.
    pub checkpoint_every: Duration,
    /// In front of the progress bar.
    pub label: String,
    /// The bars of runs that go on side by side.
    pub bars: indicatif::MultiProgress,
}

/// Trains a run to its end, from wherever it is. The folder must have been claimed.
pub fn train(spec: &RunSpec, folder: &RunFolder, pace: &Pace) -> Result<Finished> {
    if let Some(finished) = folder.finished()? {
        return Ok(finished);
    }
    let task = spec.task.open()?;
    let network = Network::new(spec, &*task, &pace.device)?;
    let run = Run { spec, folder, pace, task: &*task, network };
    run.train()
}

struct Run<'a> {
    spec: &'a RunSpec,
    folder: &'a RunFolder,
    pace: &'a Pace,
    task: &'a dyn Task,
    network: Network,
}

impl Run<'_> {
    /// Threads that make batches while a GPU trains. On a processor they would only be in the way of the training.
    fn ahead(&self) -> usize {
        if self.pace.device.is_cpu() { 0 } else { rayon::current_num_threads().min(4) }
    }

    fn train(&self) -> Result<Finished> {
        let training = &self.spec.training;
        let all = self.network.weights();
        let mut optimizer = Optimizer::new(training, &all).map_err(candle)?;
        let start = Checkpoint::load(&self.folder.checkpoint(), &all, &mut optimizer)?;
        let start = start.unwrap_or(Checkpoint { step: 0, seconds: 0.0, pending: (0.0, 0.0) });
        let steps = start.step..training.steps;
        with_batches(self.task, self.spec.seed, training.batch, steps, self.ahead(), |next| {
            self.train_on(next, &all, optimizer, start)
        })
    }

    /// From a checkpoint to the end.
    fn train_on(
        &self,
        next: &mut dyn FnMut(u64) -> Batch,
        all: &BTreeMap<String, Var>,
        mut optimizer: Optimizer,
        start: Checkpoint,
    ) -> Result<Finished> {
        let training = &self.spec.training;
        let mut log = Log::open(&self.folder.log(), start.step)?;
        let last = self.folder.rows()?.last().map_or(0, |row| row.step);
        let mut tally = Tally::new(start.pending, start.step - last);

        let bar = progress::training(&self.pace.bars, &self.pace.label, training.steps, start.step);
        let began = Instant::now();
        let seconds = || start.seconds + began.elapsed().as_secs_f64();
        let diverged = |(step, loss)| {
            bar.finish_and_clear();
            self.end(Status::Diverged, step, [("loss".into(), loss)].into(), seconds())
        };
        let mut saved = Instant::now();
        let mut metrics = None;
        for step in start.step..training.steps {
            let rate = learning_rate(training, step);
            let batch = next(step);
            let loss = self.network.loss(&batch)?;
            let gradients = loss.backward().map_err(candle)?;
            tally.add(step, optimizer.step(&loss, &gradients, rate).map_err(candle)?);

            let made = step + 1;
            let end = made == training.steps;
            let evaluates = end || made % training.evaluate_every == 0;
            let logs = evaluates || made % training.log_every == 0;
            let saves = !end && saved.elapsed() >= self.pace.checkpoint_every;
            // A processor has done the step by now; a GPU need not.
            if (logs || saves || self.pace.device.is_cpu())
                && let Some(at) = tally.read()?
            {
                return diverged(at);
            }
            metrics = evaluates.then(|| self.evaluate()).transpose()?;
            if logs {
                let score = metrics.as_ref().and_then(|m| m.get(self.spec.task.score().name).copied());
                let (loss, gradient_norm) = tally.means();
                log.add(&Row {
                    step: made,
                    loss,
                    learning_rate: rate,
                    gradient_norm,
                    score,
                    seconds: seconds(),
                })?;
            }
            if saves {
                log.sync()?;
                let checkpoint = Checkpoint { step: made, seconds: seconds(), pending: tally.sums };
                checkpoint.save(&self.folder.checkpoint(), all, &optimizer)?;
                saved = Instant::now();
            }
            progress::trained(&bar, tally.loss, batch.batch * batch.length);
        }
        bar.finish_and_clear();
        let metrics = metrics.map_or_else(|| self.evaluate(), Ok)?;
        self.end(Status::Finished, training.steps, metrics, seconds())
    }

    fn evaluate(&self) -> Result<BTreeMap<String, f64>> {
        let training = &self.spec.training;
        self.network.evaluate(self.task, training.evaluate_batches, training.batch)
    }

    fn end(
        &self,
        status: Status,
        steps: u64,
        mut metrics: BTreeMap<String, f64>,
        seconds: f64,
    ) -> Result<Finished> {
        // JSON has no numbers that are not finite.
        metrics.retain(|_, value| value.is_finite());
        self.network.save(&self.folder.weights())?;
        let device = if self.pace.device.is_cpu() { "cpu" } else { "cuda" };
        let parameters = self.network.weights().values().map(|var| var.elem_count()).sum();
        let finished = Finished { status, steps, metrics, parameters, seconds, device: device.into() };
        self.folder.finish(&finished)?;
        Ok(finished)
    }
}
