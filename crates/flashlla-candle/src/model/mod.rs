//! [`Model`]: a small decoder-only model over any mixer.

mod config;
mod file;
mod generate;

pub use config::{ModelConfig, Positions};
pub use file::read_config;
pub use generate::Cache;

use crate::error::value;
use crate::mixers::{Mixer, mixer};
use crate::nn::{Projection, RmsNorm};
use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

/// A decoder-only model: pre-norm blocks of a mixer and, if wanted, a gated MLP, with residual connections.
///
/// Parameters stay in the type of the builder that they were made from; activations are in that type too unless
/// [`Model::with_activations`] says otherwise.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarMap;
/// use flashlla_candle::{MixerConfig, Model, ModelConfig, seeded};
/// let mut config = ModelConfig::tokens(50, 32, 2);
/// config.mixer = MixerConfig::new("lla".parse()?, 32, 4);
/// let parameters = VarMap::new();
/// let model = Model::new(&config, seeded(&parameters, 1, DType::F32, &Device::Cpu))?;
/// let tokens = Tensor::new(&[[1u32, 5, 9, 2]], &Device::Cpu)?;
/// assert_eq!(model.forward_tokens(&tokens)?.dims(), [1, 4, 50]);
/// assert_eq!(model.generate(&tokens, 3)?.dims(), [1, 7]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    activations: DType,
    input: Input,
    positions: Option<Tensor>,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Projection,
}

#[derive(Debug)]
enum Input {
    /// `[vocab, dim]`.
    Embedding(Tensor),
    Projection(Projection),
}

#[derive(Debug)]
struct Block {
    mixer_norm: RmsNorm,
    mixer: Box<dyn Mixer>,
    mlp: Option<(RmsNorm, Mlp)>,
}

/// `down(silu(gate(x)) ⊙ up(x))` (Shazeer, 2020).
#[derive(Debug)]
struct Mlp {
    gate: Projection,
    up: Projection,
    down: Projection,
}

impl Mlp {
    fn new(dim: usize, ratio: f64, vb: VarBuilder) -> Result<Self> {
        let hidden = ((dim as f64 * ratio).round() as usize).max(1);
        Ok(Self {
            gate: Projection::new(dim, hidden, false, vb.pp("gate"))?,
            up: Projection::new(dim, hidden, false, vb.pp("up"))?,
            down: Projection::new(hidden, dim, false, vb.pp("down"))?,
        })
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&(self.gate.forward(x)?.silu()? * self.up.forward(x)?)?)
    }
}

impl Model {
    /// A model of `config`'s sizes, its parameters from `vb`.
    pub fn new(config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let config = config.checked()?;
        let dim = config.dim;
        let small = Init::Randn { mean: 0.0, stdev: 0.02 };
        let input = match config.vocab {
            Some(vocab) => Input::Embedding(vb.get_with_hints((vocab, dim), "embedding.weight", small)?),
            None => Input::Projection(Projection::new(config.input_dim, dim, true, vb.pp("input"))?),
        };
        let positions = match config.positions {
            Positions::None => None,
            Positions::Learned { max_len } => {
                Some(vb.get_with_hints((max_len, dim), "positions.weight", small)?)
            }
        };
        let head = match &input {
            Input::Embedding(weight) if config.tie_embeddings => Projection::tied(weight.clone()),
            _ => Projection::new(
                dim,
                config.vocab.unwrap_or(config.output_dim),
                config.vocab.is_none(),
                vb.pp("head"),
            )?,
        };
        let block = |i: usize| {
            let vb = vb.pp(format!("blocks.{i}"));
            let norm = |name: &str| RmsNorm::new(dim, config.norm_eps, vb.pp(name));
            let mlp = match config.mlp {
                Some(ratio) => Some((norm("mlp_norm")?, Mlp::new(dim, ratio, vb.pp("mlp"))?)),
                None => None,
            };
            let mixer = mixer(&config.mixer, vb.pp("mixer"))?;
            Ok(Block { mixer_norm: norm("mixer_norm")?, mixer, mlp })
        };
        Ok(Self {
            activations: vb.dtype(),
            input,
            positions,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: RmsNorm::new(dim, config.norm_eps, vb.pp("norm"))?,
            head,
            config,
        })
    }

    /// With activations in another type than the parameters: `bf16` over `f32` parameters, say, which are then cast
    /// wherever they are used and have `f32` gradients.
    pub fn with_activations(self, dtype: DType) -> Self {
        Self { activations: dtype, ..self }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Tokens `u32 [B, N]` to logits `[B, N, vocab]`, `f32` unless activations are `f64`.
    pub fn forward_tokens(&self, tokens: &Tensor) -> Result<Tensor> {
        self.head(&self.hidden(&self.embedded(tokens)?)?)
    }

    /// The logits of [`Model::forward_tokens`] at the positions `at`, `u32 [A]` counted through the batch (`sequence * N +
    /// position`; a GPU doesn't check that they are in it): `[A, vocab]`. Where few positions count, this saves most of the output
    /// layer.
    pub fn forward_tokens_at(&self, tokens: &Tensor, at: &Tensor) -> Result<Tensor> {
        self.head_at(&self.hidden(&self.embedded(tokens)?)?, at)
    }

    /// The outputs of [`Model::forward_continuous`] at the positions `at`, as in [`Model::forward_tokens_at`]: `[A, output_dim]`.
    pub fn forward_continuous_at(&self, x: &Tensor, at: &Tensor) -> Result<Tensor> {
        self.head_at(&self.hidden(&self.projected(x)?)?, at)
    }

    /// Inputs `[B, N, input_dim]` to outputs `[B, N, output_dim]`, `f32` unless activations are `f64`.
    pub fn forward_continuous(&self, x: &Tensor) -> Result<Tensor> {
        self.head(&self.hidden(&self.projected(x)?)?)
    }

    /// The input layer of `[B, N, input_dim]`.
    fn projected(&self, x: &Tensor) -> Result<Tensor> {
        let Input::Projection(input) = &self.input else {
            return Err(value("x", "a tensor of numbers", "tokens: the model has a vocabulary"));
        };
        crate::nn::expect_input(x, self.config.input_dim)?;
        self.placed(input.forward(&x.to_dtype(self.activations)?)?, 0)
    }

    /// The embeddings of `u32 [B, N]`.
    fn embedded(&self, tokens: &Tensor) -> Result<Tensor> {
        self.embedded_from(tokens, 0)
    }

    fn embedded_from(&self, tokens: &Tensor, first: usize) -> Result<Tensor> {
        let Input::Embedding(weight) = &self.input else {
            return Err(value("tokens", "tokens", "a tensor of numbers: the model has no vocabulary"));
        };
        let (b, n) = match *tokens.dims() {
            [b, n] => (b, n),
            _ => return Err(crate::error::shape("tokens", tokens.dims(), "two sizes", "batch, tokens")),
        };
        if tokens.dtype() != DType::U32 {
            return Err(value("tokens", tokens.dtype().as_str(), "u32"));
        }
        let rows = weight.index_select(&tokens.flatten_all()?, 0)?.to_dtype(self.activations)?;
        self.placed(rows.reshape((b, n, self.config.dim))?, first)
    }

    /// With learned positions added.
    fn placed(&self, x: Tensor, first: usize) -> Result<Tensor> {
        let Some(positions) = &self.positions else { return Ok(x) };
        let (n, max_len) = (x.dim(1)?, positions.dim(0)?);
        if first + n > max_len {
            return Err(value(
                "x",
                format!("{} tokens", first + n),
                format!("at most {max_len} (positions)"),
            ));
        }
        x.broadcast_add(&positions.narrow(0, first, n)?.to_dtype(x.dtype())?)
    }

    fn hidden(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for block in &self.blocks {
            x = (&x + block.mixer.forward(&block.mixer_norm.forward(&x)?)?)?;
            x = block.after(x)?;
        }
        Ok(x)
    }

    fn head_at(&self, x: &Tensor, at: &Tensor) -> Result<Tensor> {
        let rows = x.flatten_to(1)?;
        if at.dtype() != DType::U32 || at.rank() != 1 {
            let given = format!("{} {:?}", at.dtype().as_str(), at.dims());
            return Err(value("at", given, "u32 with one size, the number of positions"));
        }
        self.head(&rows.index_select(at, 0)?)
    }

    fn head(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.head.forward(&self.norm.forward(x)?)?;
        if out.dtype() == DType::F64 { Ok(out) } else { out.to_dtype(DType::F32) }
    }
}

impl Block {
    /// The MLP's part.
    fn after(&self, x: Tensor) -> Result<Tensor> {
        match &self.mlp {
            Some((norm, mlp)) => &x + mlp.forward(&norm.forward(&x)?)?,
            None => Ok(x),
        }
    }
}
