//! The layer and its cache.

use crate::mixers::{config, error, made, random};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use flashlla_candle::{LocalLinearAttention, MixerConfig, MixerKind, mixer, seeded};

fn caching(kind: MixerKind) -> MixerConfig {
    MixerConfig {
        heads: 4,
        kv_heads: Some(2),
        head_dim: Some(6),
        rope: true,
        qk_norm: true,
        tolerance: Some(1e-13),
        ..config(kind)
    }
}

#[test]
fn a_cache_gives_what_the_whole_sequence_gives() {
    for kind in [MixerKind::LocalLinear, MixerKind::Parallax, MixerKind::Softmax] {
        for config in [caching(kind), MixerConfig { learn_scale: false, learn_ridge: false, ..caching(kind) }]
        {
            let (mixer, _) = made(&config, 3);
            let x = random(&[2, 40, config.dim], 4);
            let whole = mixer.forward(&x).unwrap();
            // A prompt longer than decoding takes at once, single tokens, and a few together.
            let mut cache = mixer.cache(40).unwrap();
            let (mut first, mut parts) = (0, vec![]);
            for tokens in [20, 1, 1, 5, 1, 12] {
                assert_eq!(cache.len(), first);
                parts.push(mixer.forward_cached(&x.narrow(1, first, tokens).unwrap(), &mut cache).unwrap());
                first += tokens;
            }
            let error = error(&Tensor::cat(&parts, 1).unwrap(), &whole);
            assert!(error < 1e-10, "{kind}: {error}");
            let full = mixer.forward_cached(&x.narrow(1, 0, 1).unwrap(), &mut cache).unwrap_err().to_string();
            assert!(full.contains("41 tokens") && full.contains("40"), "{full}");
            cache.reset();
            assert!(cache.is_empty() && cache.max_len() == 40);
        }
    }
}

#[test]
fn what_has_no_cache_says_so() {
    for kind in [MixerKind::Linear, MixerKind::Mesa, MixerKind::Mamba2] {
        assert!(made(&config(kind), 1).0.cache(10).is_none());
    }
    let config = MixerConfig { short_conv: true, ..config(MixerKind::LocalLinear) };
    assert!(made(&config, 1).0.cache(10).is_none());
}

#[test]
fn ridge_and_scale_start_where_they_are_told() {
    let config = MixerConfig { ridge: 0.25, kv_heads: Some(1), ..config(MixerKind::LocalLinear) };
    for (learned, ridges, scales) in [(true, vec![3], vec![1]), (false, vec![], vec![])] {
        let config = MixerConfig { learn_ridge: learned, learn_scale: learned, ..config.clone() };
        let parameters = VarMap::new();
        let layer =
            LocalLinearAttention::new(&config, seeded(&parameters, 1, DType::F32, &Device::Cpu)).unwrap();
        let (ridge, scale) = (layer.ridge().unwrap(), layer.scale().unwrap());
        assert_eq!((ridge.dims(), scale.dims()), (&ridges[..], &scales[..]));
        let near = |t: &Tensor, value: f32| {
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| (x - value).abs() < 1e-6)
        };
        assert!(near(&ridge, 0.25) && near(&scale, 0.5));
        let named = parameters.data().lock().unwrap().contains_key("log_ridge");
        assert_eq!(named, learned);
    }
}

/// Parameters stay in `f32`, activations are `bf16`.
#[test]
fn mixers_take_narrow_activations_over_wide_parameters() {
    for kind in MixerKind::ALL {
        let parameters = VarMap::new();
        let mixer = mixer(&config(kind), seeded(&parameters, 1, DType::F32, &Device::Cpu)).unwrap();
        let x = random(&[2, 10, 12], 2).to_dtype(DType::BF16).unwrap();
        let out = mixer.forward(&x).unwrap();
        assert_eq!(out.dtype(), DType::BF16);
        let wide = mixer.forward(&x.to_dtype(DType::F32).unwrap()).unwrap();
        let error = error(&out.to_dtype(DType::F64).unwrap(), &wide.to_dtype(DType::F64).unwrap());
        assert!(error < 0.05, "{kind}: {error}");
        let gradients = out.to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, var) in parameters.data().lock().unwrap().iter() {
            let gradient = gradients.get(var).unwrap_or_else(|| panic!("{kind}: {name} has no gradient"));
            assert_eq!(gradient.dtype(), DType::F32, "{kind}: {name}");
        }
    }
}
