//! A model with its task: batches in, losses and scores out.

use super::{Precision, RunSpec, candle};
use crate::Result;
use crate::tasks::{Batch, Inputs, Interface, Split, Targets, Task};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::VarMap;
use flashlla_candle::{Model, seeded};
use std::collections::BTreeMap;
use std::path::Path;

/// A model for a task.
pub struct Network {
    model: Model,
    parameters: VarMap,
    interface: Interface,
    device: Device,
}

impl Network {
    /// Makes the model, its weights drawn from the run's seed.
    pub fn new(spec: &RunSpec, task: &dyn Task, device: &Device) -> Result<Self> {
        let interface = task.interface();
        let activations = match spec.training.precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        };
        // Every batch of a task has the same length.
        let length = task.batch_at(0, Split::Evaluation, 0, 1).length;
        let config = spec.model_config(interface, length);
        let parameters = VarMap::new();
        let builder = seeded(&parameters, spec.seed, DType::F32, device);
        let model = Model::new(&config, builder).map_err(candle)?.with_activations(activations);
        Ok(Self { model, parameters, interface, device: device.clone() })
    }

    /// All weights, by name.
    pub fn weights(&self) -> BTreeMap<String, Var> {
        let data = self.parameters.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// Writes the model to a file that `flashlla_candle::Model` can be loaded from.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.model.save(&self.parameters, path).map_err(candle)
    }

    /// The model's answers, `[answers, outputs]`, in 32 bits.
    fn answers(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let shape = (batch.batch, batch.length);
        let some = batch.at.len() < shape.0 * shape.1;
        let at = some.then(|| Tensor::from_slice(&batch.at, batch.at.len(), &self.device)).transpose()?;
        let out = match (&batch.inputs, self.interface) {
            (Inputs::Vectors(vectors), Interface::Vectors { input, .. }) => {
                let x = Tensor::from_slice(vectors, (shape.0, shape.1, input), &self.device)?;
                match &at {
                    Some(at) => self.model.forward_continuous_at(&x, at)?,
                    None => self.model.forward_continuous(&x)?.flatten_to(1)?,
                }
            }
            (Inputs::Tokens(tokens), _) => {
                let tokens = Tensor::from_slice(tokens, shape, &self.device)?;
                match &at {
                    Some(at) => self.model.forward_tokens_at(&tokens, at)?,
                    None => self.model.forward_tokens(&tokens)?.flatten_to(1)?,
                }
            }
            (Inputs::Vectors(_), _) => candle_core::bail!("a task of tokens has a batch of vectors"),
        };
        out.to_dtype(DType::F32)
    }

    /// The mean loss: cross-entropy in nats, or the mean squared error per coordinate.
    pub fn loss(&self, batch: &Batch) -> Result<Tensor> {
        let loss = || {
            let answers = self.answers(batch)?;
            self.loss_of(&answers, &batch.targets)
        };
        loss().map_err(candle)
    }

    fn loss_of(&self, answers: &Tensor, targets: &Targets) -> candle_core::Result<Tensor> {
        match targets {
            Targets::Tokens(tokens) => {
                let tokens = Tensor::from_slice(tokens, tokens.len(), &self.device)?;
                candle_nn::loss::cross_entropy(answers, &tokens)
            }
            Targets::Vectors(vectors) => {
                candle_nn::loss::mse(answers, &Tensor::from_slice(vectors, answers.shape(), &self.device)?)
            }
        }
    }

    /// Means over batches of evaluation data: `loss`, and `accuracy` and `bits`, or `mse`.
    pub fn evaluate(&self, task: &dyn Task, batches: u64, size: usize) -> Result<BTreeMap<String, f64>> {
        let mut sums = BTreeMap::<String, f64>::new();
        for number in 0..batches {
            let batch = task.batch_at(0, Split::Evaluation, number, size);
            for (name, value) in self.metrics(&batch).map_err(candle)? {
                *sums.entry(name.into()).or_default() += value / batches as f64;
            }
        }
        Ok(sums)
    }

    fn metrics(&self, batch: &Batch) -> candle_core::Result<Vec<(&'static str, f64)>> {
        let answers = self.answers(batch)?.detach();
        let loss = f64::from(self.loss_of(&answers, &batch.targets)?.to_scalar::<f32>()?);
        let mut metrics = vec![("loss", loss)];
        match &batch.targets {
            Targets::Vectors(_) => metrics.push(("mse", loss)),
            Targets::Tokens(tokens) => {
                let best = answers.argmax(D::Minus1)?.to_vec1::<u32>()?;
                let right = best.iter().zip(tokens).filter(|(a, b)| a == b).count();
                metrics.push(("accuracy", right as f64 / tokens.len() as f64));
                metrics.push(("bits", loss / std::f64::consts::LN_2));
            }
        }
        Ok(metrics)
    }
}
