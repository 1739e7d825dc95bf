//! Parameters drawn reproducibly.

use candle_core::{DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::init::{Init, NormalOrUniform};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{VarBuilder, VarMap};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};

/// A builder that adds what it makes to `parameters`, drawn from `seed` and the parameter's name: the same values on
/// every device, in whatever order they are asked for. (Candle's own generator can't be seeded on the CPU.) Parameters
/// that are there already are given as they are.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::VarMap;
/// use flashlla_candle::{Model, ModelConfig, seeded};
/// let (parameters, config) = (VarMap::new(), ModelConfig::tokens(50, 32, 1));
/// let model = Model::new(&config, seeded(&parameters, 7, DType::F32, &Device::Cpu))?;
/// assert!(!parameters.all_vars().is_empty());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn seeded<'a>(parameters: &VarMap, seed: u64, dtype: DType, device: &Device) -> VarBuilder<'a> {
    let backend = Seeded { parameters: parameters.clone(), seed };
    VarBuilder::from_backend(Box::new(backend), dtype, device.clone())
}

struct Seeded {
    parameters: VarMap,
    seed: u64,
}

impl Seeded {
    fn draw(&self, name: &str, shape: &Shape, init: Init) -> Result<Vec<f32>> {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        // FNV-1a: any hash that never changes will do.
        let hash =
            name.bytes().fold(0xcbf29ce484222325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100000001b3));
        key[8..16].copy_from_slice(&hash.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        let count = shape.elem_count();
        let normal = |mean: f64, deviation: f64, rng: &mut ChaCha8Rng| {
            let distribution = Normal::new(mean, deviation).map_err(Error::wrap)?;
            Ok((0..count).map(|_| distribution.sample(rng) as f32).collect())
        };
        let uniform = |low: f64, high: f64, rng: &mut ChaCha8Rng| {
            let distribution = Uniform::new(low, high).map_err(Error::wrap)?;
            Ok((0..count).map(|_| distribution.sample(rng) as f32).collect())
        };
        match init {
            Init::Const(value) => Ok(vec![value as f32; count]),
            Init::Randn { mean, stdev } => normal(mean, stdev, &mut rng),
            Init::Uniform { lo, up } => uniform(lo, up, &mut rng),
            Init::Kaiming { dist, fan, non_linearity } => {
                let deviation = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
                match dist {
                    NormalOrUniform::Normal => normal(0.0, deviation, &mut rng),
                    NormalOrUniform::Uniform => {
                        let bound = 3f64.sqrt() * deviation;
                        uniform(-bound, bound, &mut rng)
                    }
                }
            }
        }
    }
}

impl SimpleBackend for Seeded {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut parameters = self.parameters.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(there) = parameters.get(name) {
            if there.shape() != &shape {
                return Err(crate::error::shape(
                    name,
                    there.dims(),
                    shape.dims(),
                    "as the configuration says",
                ));
            }
            return Ok(there.as_tensor().clone());
        }
        let values = Tensor::from_vec(self.draw(name, &shape, init)?, shape, &Device::Cpu)?;
        let new = Var::from_tensor(&values.to_dtype(dtype)?.to_device(device)?)?;
        let tensor = new.as_tensor().clone();
        parameters.insert(name.to_string(), new);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        Err(Error::msg(format!("{name}: a parameter can't be drawn without its shape")))
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let parameters = self.parameters.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        parameters.contains_key(name)
    }
}
