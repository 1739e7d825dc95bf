//! The learning rate: a linear warm-up, then a cosine.

use super::TrainingSpec;

/// The learning rate of a step (from 0): up to `learning_rate` in `warmup` steps, then down to `final_rate` of it.
pub fn learning_rate(training: &TrainingSpec, step: u64) -> f64 {
    let TrainingSpec { learning_rate, warmup, steps, final_rate, .. } = *training;
    if step < warmup {
        return learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let done = (step - warmup) as f64 / (steps.saturating_sub(warmup + 1)).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
    learning_rate * (final_rate + (1.0 - final_rate) * cosine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{OptimizerKind, Precision};

    #[test]
    fn it_rises_to_its_peak_and_falls_to_its_end() {
        let training = TrainingSpec {
            steps: 110,
            batch: 1,
            optimizer: OptimizerKind::Adamw,
            learning_rate: 2.0,
            warmup: 10,
            final_rate: 0.1,
            weight_decay: 0.0,
            clip: 1.0,
            precision: Precision::F32,
            evaluate_every: 1,
            evaluate_batches: 1,
            log_every: 1,
        };
        let rates: Vec<f64> = (0..110).map(|step| learning_rate(&training, step)).collect();
        assert_eq!((rates[0], rates[4], rates[9], rates[10]), (0.2, 1.0, 2.0, 2.0));
        assert!(rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[109] - 0.2).abs() < 1e-12);
        let short = TrainingSpec { steps: 1, warmup: 0, ..training };
        assert_eq!(learning_rate(&short, 0), 2.0);
        assert!(learning_rate(&TrainingSpec { warmup: 5, ..short }, 0) > 0.0);
    }
}
