//! Models in safetensors files, their configuration in the metadata.

use super::{Model, ModelConfig};
use crate::error::value;
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The key of the configuration, JSON, in a file's metadata.
const KEY: &str = "flashlla.model";

impl Model {
    /// Writes `parameters` and the model's configuration to a safetensors file, to appear there whole or not at all.
    pub fn save(&self, parameters: &VarMap, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(parameters, path, HashMap::new())
    }

    /// The same with more metadata.
    pub fn save_with(
        &self,
        parameters: &VarMap,
        path: impl AsRef<Path>,
        mut metadata: HashMap<String, String>,
    ) -> Result<()> {
        let tensors: BTreeMap<String, Tensor> = {
            let parameters = parameters.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            parameters.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect()
        };
        metadata.insert(KEY.into(), serde_json::to_string(&self.config).map_err(Error::wrap)?);
        let path = path.as_ref();
        // In the same folder, so that it can be renamed.
        let unfinished = path.with_extension(format!("unfinished-{}", std::process::id()));
        safetensors::serialize_to_file(tensors, Some(metadata), &unfinished)
            .map_err(Error::wrap)
            .and_then(|()| std::fs::rename(&unfinished, path).map_err(Error::wrap))
            .inspect_err(|_| drop(std::fs::remove_file(&unfinished)))
    }

    /// Reads a model, its parameters in `dtype` on `device` (not to be trained; for that see [`Model::load_into`]).
    pub fn load(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let data = std::fs::read(&path).map_err(|e| unreadable(path.as_ref(), e))?;
        let config = config_in(&data, path.as_ref())?;
        Self::new(&config, VarBuilder::from_buffered_safetensors(data, dtype, device)?)
    }

    /// Reads a model whose parameters become variables of `parameters`, to be trained on.
    pub fn load_into(
        parameters: &VarMap,
        path: impl AsRef<Path>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let config = read_config(&path)?;
        let mut parameters = parameters.clone();
        let model = Self::new(&config, VarBuilder::from_varmap(&parameters, dtype, device))?;
        parameters.load(path)?;
        Ok(model)
    }
}

/// The configuration in a model's file.
pub fn read_config(path: impl AsRef<Path>) -> Result<ModelConfig> {
    let path = path.as_ref();
    config_in(&std::fs::read(path).map_err(|e| unreadable(path, e))?, path)
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    value("path", format!("{} ({error})", path.display()), "a file that can be read")
}

fn config_in(data: &[u8], path: &Path) -> Result<ModelConfig> {
    let named =
        |what: String| value("path", format!("{} ({what})", path.display()), "a model's safetensors file");
    let (_, header) = safetensors::SafeTensors::read_metadata(data).map_err(|e| named(e.to_string()))?;
    let json = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
    let json = json.ok_or_else(|| named(format!("no {KEY} in its metadata")))?;
    serde_json::from_str(json).map_err(|e| named(format!("{KEY}: {e}")))
}
