//! Keys and values recorded from a model: read from safetensors files, or from the cut that comes with the program.

use super::estimators::Pairs;
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// Two layers of all-MiniLM-L6-v2, four heads each, 256 tokens; its metadata says more.
const SHIPPED: &[u8] = include_bytes!("../../data/minilm_kv.safetensors");

/// One head's pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Which layer, batch entry or file.
    pub source: String,
    /// The head's number there.
    pub head: usize,
    /// Its keys and values.
    pub pairs: Pairs,
}

/// The heads that come with the program.
pub fn shipped(max_tokens: usize) -> Result<Vec<Head>> {
    heads(SHIPPED, "the data that comes with the program", "MiniLM", max_tokens)
}

/// All heads of a file with `k [B, H, N, D]` and `v [B, H, N, DV]`.
pub fn read(path: &Path, max_tokens: usize) -> Result<Vec<Head>> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|error| failed(&name, format!("cannot be read: {error}")))?;
    let stem = path.file_stem().map_or(name.clone(), |stem| stem.to_string_lossy().into_owned());
    heads(&bytes, &name, &stem, max_tokens)
}

fn failed(file: &str, what: String) -> Error {
    Error::failed(format!("--input: {file}: {what}"))
}

fn heads(bytes: &[u8], file: &str, stem: &str, max_tokens: usize) -> Result<Vec<Head>> {
    let failed = |what: String| failed(file, what);
    let broken = |error| failed(format!("is not a readable safetensors file ({error})"));
    let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let tensor = |name: &str, meaning: &str| {
        let names = || tensors.names().join(", ");
        let tensor =
            tensors.tensor(name).map_err(|_| failed(format!("has no tensor {name}, only: {}", names())))?;
        let shape: [usize; 4] = tensor
            .shape()
            .try_into()
            .map_err(|_| failed(format!("{name}: shape {:?}; it must be {meaning}", tensor.shape())))?;
        let numbers = numbers(&tensor).ok_or_else(|| {
            failed(format!("{name}: dtype {:?}; it must be F64, F32, F16 or BF16", tensor.dtype()))
        })?;
        if let Some(i) = numbers.iter().position(|x| !x.is_finite()) {
            return Err(failed(format!(
                "{name}: element {i} is {}; every element must be finite",
                numbers[i]
            )));
        }
        Ok((shape, numbers))
    };
    let ([b, h, n, d], k) = tensor("k", "[batch, heads, tokens, head_dim]")?;
    let (v_shape, v) = tensor("v", "[batch, heads, tokens, value_dim]")?;
    let value_dim = v_shape[3];
    if v_shape[..3] != [b, h, n] {
        return Err(failed(format!("v: shape {v_shape:?}; it must be [{b}, {h}, {n}, value_dim] like k")));
    }
    let tokens = n.min(max_tokens);
    if tokens < 16 {
        return Err(failed(format!("k: {tokens} tokens; at least 16 are needed to leave one out")));
    }
    if b * h * d * value_dim == 0 {
        return Err(failed(format!("k and v: shapes {:?} and {v_shape:?} hold nothing", [b, h, n, d])));
    }
    let labels: Vec<&str> = match metadata.metadata().as_ref().and_then(|m| m.get("batch")) {
        Some(labels) => labels.split(',').map(str::trim).collect(),
        None => vec![],
    };
    let source = |batch: usize| match labels.get(batch) {
        Some(label) if labels.len() == b => format!("{stem} {label}"),
        _ if b > 1 => format!("{stem} [{batch}]"),
        _ => stem.to_owned(),
    };
    let row = |x: &[f64], width: usize, i: usize| x[i * n * width..][..tokens * width].to_vec();
    let head = |i| Head {
        source: source(i / h),
        head: i % h,
        pairs: Pairs { dim: d, value_dim, keys: row(&k, d, i), values: row(&v, value_dim, i) },
    };
    Ok((0..b * h).map(head).collect())
}

/// As `f64`; `None` for types that are not numbers of the operator's.
fn numbers(tensor: &TensorView) -> Option<Vec<f64>> {
    let bytes = tensor.data();
    Some(match tensor.dtype() {
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn file(k: (&[usize], &[f32]), v: (&[usize], &[f32])) -> Vec<u8> {
        let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let (kb, vb) = (bytes(k.1), bytes(v.1));
        let tensors = [("k", (k.0, &kb)), ("v", (v.0, &vb))]
            .map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap()));
        safetensors::serialize(tensors, None::<HashMap<String, String>>).unwrap()
    }

    #[test]
    fn the_shipped_data_is_small_named_and_licensed() {
        assert!(SHIPPED.len() < 300_000);
        let heads = shipped(usize::MAX).unwrap();
        assert_eq!((heads.len(), heads[0].pairs.len(), heads[0].pairs.dim), (8, 256, 32));
        assert_eq!((heads[5].source.as_str(), heads[5].head), ("MiniLM layer 4", 1));
        let (_, metadata) = SafeTensors::read_metadata(SHIPPED).unwrap();
        let metadata = metadata.metadata().clone().unwrap();
        assert!(metadata["license"].contains("Apache-2.0") && metadata["source"].contains("MiniLM"));
    }

    #[test]
    fn heads_are_cut_from_the_right_places() {
        let numbers: Vec<f32> = (0..2 * 3 * 20 * 2).map(|i| i as f32).collect();
        let bytes = file((&[2, 3, 20, 2], &numbers), (&[2, 3, 20, 1], &numbers[..120]));
        let heads = heads(&bytes, "f", "f", 17).unwrap();
        assert_eq!((heads.len(), heads[4].source.as_str(), heads[4].head), (6, "f [1]", 1));
        assert_eq!(
            (heads[4].pairs.len(), heads[4].pairs.keys[0], heads[4].pairs.values[16]),
            (17, 160.0, 96.0)
        );
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_in_one_line() {
        let ones = [1f32; 64];
        let mut bad = ones;
        bad[7] = f32::NAN;
        let shape: &[usize] = &[1, 1, 32, 2];
        for (bytes, expected) in [
            (b"nonsense".to_vec(), "not a readable safetensors file"),
            (file((&[32, 2], &ones), (shape, &ones)), "k: shape [32, 2]"),
            (file((shape, &ones), (&[1, 2, 16, 2], &ones)), "must be [1, 1, 32, value_dim]"),
            (file((shape, &ones), (shape, &bad)), "v: element 7 is NaN"),
            (file((&[1, 4, 8, 2], &ones), (&[1, 4, 8, 2], &ones)), "8 tokens"),
        ] {
            let error = heads(&bytes, "f.safetensors", "f", 1000).unwrap_err().to_string();
            assert!(error.starts_with("--input: f.safetensors: ") && error.contains(expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(read(Path::new("/no/such/file"), 10).unwrap_err().to_string().contains("cannot be read"));
    }
}
