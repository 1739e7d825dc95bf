//! The loop.

use super::feed::with_batches;
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
        let (mut pending, mut count) = (start.pending, start.step - last);

        let bar = progress::training(&self.pace.bars, &self.pace.label, training.steps, start.step);
        let began = Instant::now();
        let seconds = || start.seconds + began.elapsed().as_secs_f64();
        let mut saved = Instant::now();
        let mut metrics = None;
        for step in start.step..training.steps {
            let rate = learning_rate(training, step);
            let batch = next(step);
            let loss = self.network.loss(&batch)?;
            let gradients = loss.backward().map_err(candle)?;
            let norm = optimizer.step(&gradients, rate).map_err(candle)?;
            let loss = f64::from(loss.to_scalar::<f32>().map_err(candle)?);
            if !(loss.is_finite() && norm.is_finite()) {
                bar.finish_and_clear();
                return self.end(Status::Diverged, step, [("loss".into(), loss)].into(), seconds());
            }
            pending = (pending.0 + loss, pending.1 + norm);
            count += 1;

            let made = step + 1;
            let end = made == training.steps;
            metrics = (end || made % training.evaluate_every == 0).then(|| self.evaluate()).transpose()?;
            if end || metrics.is_some() || made % training.log_every == 0 {
                let of = count as f64;
                let score = metrics.as_ref().and_then(|m| m.get(self.spec.task.score().name).copied());
                let (loss, gradient_norm) = (pending.0 / of, pending.1 / of);
                log.add(&Row {
                    step: made,
                    loss,
                    learning_rate: rate,
                    gradient_norm,
                    score,
                    seconds: seconds(),
                })?;
                (pending, count) = ((0.0, 0.0), 0);
            }
            if !end && saved.elapsed() >= self.pace.checkpoint_every {
                log.sync()?;
                let checkpoint = Checkpoint { step: made, seconds: seconds(), pending };
                checkpoint.save(&self.folder.checkpoint(), all, &optimizer)?;
                saved = Instant::now();
            }
            progress::trained(&bar, loss, batch.batch * batch.length);
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
