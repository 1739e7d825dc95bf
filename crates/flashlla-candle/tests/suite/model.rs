//! Models: sizes, files, generation, learning.

use crate::mixers::error;
use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap, loss};
use flashlla_candle::{MixerConfig, MixerKind, Model, ModelConfig, Positions, read_config, seeded};

const CPU: Device = Device::Cpu;

fn config(kind: MixerKind) -> ModelConfig {
    let mixer = MixerConfig { rope: true, max_len: 32, ..MixerConfig::new(kind, 16, 2) };
    ModelConfig { mixer, mlp: Some(2.0), ..ModelConfig::tokens(11, 16, 2) }
}

fn model(config: &ModelConfig, dtype: DType) -> (Model, VarMap) {
    let parameters = VarMap::new();
    (Model::new(config, seeded(&parameters, 5, dtype, &CPU)).unwrap(), parameters)
}

fn tokens(n: usize) -> Tensor {
    let ids: Vec<u32> = (0..2 * n as u32).map(|i| (i * 7 + i / 3) % 11).collect();
    Tensor::from_vec(ids, (2, n), &CPU).unwrap()
}

#[test]
fn seeds_decide() {
    let config = config(MixerKind::GatedDeltaNet);
    let values = |seed| {
        let parameters = VarMap::new();
        let model = Model::new(&config, seeded(&parameters, seed, DType::F64, &CPU)).unwrap();
        model.forward_tokens(&tokens(5)).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    assert_eq!(values(1), values(1));
    assert_ne!(values(1), values(2));
}

#[test]
fn files_hold_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for kind in MixerKind::ALL {
        for tie_embeddings in [false, true] {
            let positions = Positions::Learned { max_len: 32 };
            let config = ModelConfig { tie_embeddings, positions, ..config(kind) };
            let (made, parameters) = model(&config, DType::F32);
            made.save(&parameters, &path).unwrap();
            assert_eq!(read_config(&path).unwrap(), *made.config());
            let read = Model::load(&path, DType::F32, &CPU).unwrap();
            let (a, b) = (made.forward_tokens(&tokens(6)).unwrap(), read.forward_tokens(&tokens(6)).unwrap());
            let same = |a: &Tensor, b: &Tensor| a.to_vec3::<f32>().unwrap() == b.to_vec3::<f32>().unwrap();
            assert!(same(&a, &b), "{kind}");
            let again = VarMap::new();
            let trainable = Model::load_into(&again, &path, DType::F32, &CPU).unwrap();
            assert!(same(&a, &trainable.forward_tokens(&tokens(6)).unwrap()), "{kind}");
            assert_eq!(again.all_vars().len(), parameters.all_vars().len());
        }
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing unfinished is left");
}

#[test]
fn files_that_are_no_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    let message = || Model::load(&path, DType::F32, &CPU).unwrap_err().to_string();
    assert!(message().starts_with("path:"), "{}", message());
    std::fs::write(&path, b"no").unwrap();
    assert!(message().starts_with("path:") && message().contains("other.safetensors"), "{}", message());
    candle_core::safetensors::save(&[("x".to_string(), tokens(2))].into(), &path).unwrap();
    assert!(message().contains("flashlla.model"), "{}", message());
}

#[test]
fn generation_from_a_cache_is_generation_without() {
    for kind in [MixerKind::LocalLinear, MixerKind::Parallax, MixerKind::Softmax, MixerKind::Mesa] {
        let (model, _) = model(&config(kind), DType::F64);
        let prompt = tokens(4);
        let generated = model.generate(&prompt, 6).unwrap();
        assert_eq!(generated.dims(), [2, 10]);
        let mut all = prompt;
        for _ in 0..6 {
            let logits = model.forward_tokens(&all).unwrap();
            let last = logits.narrow(1, logits.dim(1).unwrap() - 1, 1).unwrap();
            all = Tensor::cat(&[all, last.argmax(2).unwrap()], 1).unwrap();
        }
        assert_eq!(generated.to_vec2::<u32>().unwrap(), all.to_vec2::<u32>().unwrap(), "{kind}");
    }
}

/// A token is answered with the one that followed it before; half of the vocabulary keys, half values.
#[test]
fn models_learn_to_recall() {
    for kind in [MixerKind::LocalLinear, MixerKind::Softmax, MixerKind::GatedDeltaNet] {
        let config = ModelConfig { mlp: None, positions: Positions::Learned { max_len: 8 }, ..config(kind) };
        let (model, parameters) = model(&config, DType::F32);
        let mut vars: Vec<_> = parameters.data().lock().unwrap().clone().into_iter().collect();
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        let settings = ParamsAdamW { lr: 1e-2, ..ParamsAdamW::default() };
        let mut optimizer = AdamW::new(vars.into_iter().map(|(_, var)| var).collect(), settings).unwrap();
        let (inputs, targets) = (tokens(8), tokens(9).narrow(1, 1, 8).unwrap());
        let step = |model: &Model| {
            let logits = model.forward_tokens(&inputs).unwrap().flatten_to(1).unwrap();
            loss::cross_entropy(&logits, &targets.flatten_all().unwrap()).unwrap()
        };
        let first = step(&model).to_scalar::<f32>().unwrap();
        for _ in 0..60 {
            optimizer.backward_step(&step(&model)).unwrap();
        }
        let last = step(&model).to_scalar::<f32>().unwrap();
        assert!(last < 0.3 * first, "{kind}: from {first} to {last}");
    }
}

#[test]
fn continuous_models_map_rows() {
    let config = ModelConfig { mlp: None, ..ModelConfig::continuous(5, 3, 16, 2) };
    let parameters = VarMap::new();
    let model = Model::new(&config, seeded(&parameters, 1, DType::F32, &CPU)).unwrap();
    let x = Tensor::randn(0f32, 1.0, (2, 9, 5), &CPU).unwrap();
    assert_eq!(model.forward_continuous(&x).unwrap().dims(), [2, 9, 3]);
    let message = |result: candle_core::Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(model.forward_continuous(&x.narrow(2, 0, 4).unwrap())).starts_with("x: shape [2, 9, 4]"));
    assert!(message(model.forward_tokens(&tokens(3))).contains("no vocabulary"));
}

#[test]
fn outputs_at_some_positions_are_those_of_all() {
    let at = [2u32, 7, 8];
    let chosen = Tensor::from_slice(&at, 3, &CPU).unwrap();
    let same = |some: Tensor, all: Tensor| {
        let all = all.flatten_to(1).unwrap().index_select(&chosen, 0).unwrap();
        assert_eq!(some.dims(), all.dims());
        let apart = (some - all).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(apart < 1e-5, "{apart}");
    };
    let (model, _) = model(&config(MixerKind::LocalLinear), DType::F32);
    let tokens = tokens(6);
    same(model.forward_tokens_at(&tokens, &chosen).unwrap(), model.forward_tokens(&tokens).unwrap());
    let wrong = model.forward_tokens_at(&tokens, &chosen.reshape((1, 3)).unwrap()).unwrap_err().to_string();
    assert!(wrong.starts_with("at: u32 [1, 3]"), "{wrong}");

    let config = ModelConfig { mlp: None, ..ModelConfig::continuous(5, 3, 16, 2) };
    let model = Model::new(&config, seeded(&VarMap::new(), 1, DType::F32, &CPU)).unwrap();
    let x = Tensor::randn(0f32, 1.0, (2, 9, 5), &CPU).unwrap();
    same(model.forward_continuous_at(&x, &chosen).unwrap(), model.forward_continuous(&x).unwrap());
}

#[test]
fn activations_can_be_narrow() {
    let config = config(MixerKind::LocalLinear);
    let (wide, parameters) = model(&config, DType::F32);
    let expected = wide.forward_tokens(&tokens(6)).unwrap();
    let narrow =
        Model::new(&config, seeded(&parameters, 5, DType::F32, &CPU)).unwrap().with_activations(DType::BF16);
    let out = narrow.forward_tokens(&tokens(6)).unwrap();
    assert_eq!(out.dtype(), DType::F32);
    let error = error(&out.to_dtype(DType::F64).unwrap(), &expected.to_dtype(DType::F64).unwrap());
    assert!(error < 0.05, "{error}");
}

#[test]
fn configurations_are_checked() {
    let refused = |config: ModelConfig, part: &str| {
        let error = Model::new(&config, seeded(&VarMap::new(), 0, DType::F32, &CPU)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let good = config(MixerKind::LocalLinear);
    refused(ModelConfig { layers: 0, ..good.clone() }, "layers: 0");
    refused(ModelConfig { vocab: Some(0), ..good.clone() }, "vocab: 0");
    refused(ModelConfig { mlp: Some(-1.0), ..good.clone() }, "mlp: -1");
    refused(ModelConfig { dim: 15, ..good.clone() }, "dim: 15");
    refused(ModelConfig { vocab: None, tie_embeddings: true, ..good.clone() }, "tie_embeddings");
    let json = serde_json::to_string(&good).unwrap().replace("\"layers\"", "\"layer\"");
    assert!(serde_json::from_str::<ModelConfig>(&json).unwrap_err().to_string().contains("layer"));
}
