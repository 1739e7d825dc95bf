//! A training run in the middle, in a safetensors file that is there as a whole or not at all.

use super::{Optimizer, candle};
use crate::{Error, Result};
use candle_core::{Device, Tensor, Var};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

/// Before the names of weights; all other tensors are the optimiser's.
const WEIGHT: &str = "weight.";

/// What is in the file besides the tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Checkpoint {
    /// Steps made.
    pub step: u64,
    /// Seconds that they took.
    pub seconds: f64,
    /// Sums of the losses and gradient norms since the last line of the log.
    pub pending: (f64, f64),
}

/// Writes a file through `write` beside the wanted one, which it then replaces: whoever is killed here leaves the old one.
pub(super) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |error: std::io::Error| Error::failed(format!("{}: {error}", path.display()));
    // A fixed name: what a killed process left is overwritten by the next.
    let partial = path.with_extension("partial");
    write(&partial)?;
    // The contents must be on the disk before the name is, or a power cut could leave an empty file.
    File::open(&partial).and_then(|file| file.sync_all()).map_err(failed)?;
    fs::rename(&partial, path).map_err(failed)
}

impl Checkpoint {
    /// Writes the weights and the optimiser's state.
    pub fn save(self, path: &Path, weights: &BTreeMap<String, Var>, optimizer: &Optimizer) -> Result<()> {
        let mut tensors: Vec<(String, Tensor)> = optimizer.state();
        tensors
            .extend(weights.iter().map(|(name, var)| (format!("{WEIGHT}{name}"), var.as_tensor().clone())));
        // Numbers to the bit: what goes on must be what was.
        let numbers = [("seconds", self.seconds), ("losses", self.pending.0), ("norms", self.pending.1)];
        let about = [("step", self.step)].into_iter().chain(numbers.map(|(key, x)| (key, x.to_bits())));
        let about: HashMap<String, String> =
            about.map(|(key, value)| (key.into(), value.to_string())).collect();
        replace(path, |partial| {
            safetensors::serialize_to_file(tensors, Some(about), partial)
                .map_err(|error| Error::failed(format!("{}: {error}", path.display())))
        })
    }

    /// Reads a file into weights and optimiser; `None` where there is none.
    pub fn load(
        path: &Path,
        weights: &BTreeMap<String, Var>,
        optimizer: &mut Optimizer,
    ) -> Result<Option<Self>> {
        let failed = |error: &dyn std::fmt::Display| {
            Error::failed(format!("{}: {error}; remove it to start this run again", path.display()))
        };
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&error)),
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| failed(&error))?;
        let about = |key: &str| -> Result<u64> {
            let value = header.metadata().as_ref().and_then(|about| about.get(key)?.parse().ok());
            value.ok_or_else(|| failed(&format!("its metadata have no {key}")))
        };
        let number = |key: &str| about(key).map(f64::from_bits);
        let checkpoint = Self {
            step: about("step")?,
            seconds: number("seconds")?,
            pending: (number("losses")?, number("norms")?),
        };
        let tensors =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|error| failed(&error))?;
        for (name, var) in weights {
            let tensor = tensors
                .get(&format!("{WEIGHT}{name}"))
                .ok_or_else(|| failed(&format!("the weight {name} is missing")))?;
            var.set(&tensor.to_device(var.device()).map_err(candle)?).map_err(|error| failed(&error))?;
        }
        optimizer.restore(checkpoint.step, &tensors).map_err(|error| failed(&error))?;
        Ok(Some(checkpoint))
    }
}
