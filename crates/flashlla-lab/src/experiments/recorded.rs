//! Keys and values recorded from a model: read from safetensors files, or from the cut that comes with the program.

use super::estimators::Pairs;
use crate::Result;
use crate::files::TensorFile;
use std::io::{Cursor, Read, Seek};
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
    heads(
        TensorFile::new(Cursor::new(SHIPPED), "the data that comes with the program")?,
        "MiniLM",
        max_tokens,
    )
}

/// All heads of a file with `k [B, H, N, D]` and `v [B, H, N, DV]`.
pub fn read(path: &Path, max_tokens: usize) -> Result<Vec<Head>> {
    let stem = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
    heads(TensorFile::open(path)?, &stem, max_tokens)
}

fn heads<R: Read + Seek>(mut file: TensorFile<R>, stem: &str, max_tokens: usize) -> Result<Vec<Head>> {
    let [k, v] = ["k", "v"].map(|name| {
        let tensor = file.read::<f64>(name)?;
        let shape: [usize; 4] = tensor.shape().try_into().map_err(|_| {
            let given = tensor.shape();
            file.error(format_args!("{name}: shape {given:?}; it must be [batch, heads, tokens, dimension]"))
        })?;
        match tensor.data().iter().position(|x| !x.is_finite()) {
            Some(i) => Err(file.error(format_args!(
                "{name}: element {i} is {}; every element must be finite",
                tensor.data()[i]
            ))),
            None => Ok((shape, tensor.into_vec())),
        }
    });
    let (([b, h, n, d], k), (v_shape, v)) = (k?, v?);
    let failed = |what: String| file.error(what);
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
    let labels: Vec<&str> = match file.metadata("batch") {
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

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use std::collections::HashMap;

    fn file(k: (&[usize], &[f32]), v: (&[usize], &[f32])) -> Vec<u8> {
        let [kb, vb] = [k.1, v.1].map(|x| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        let tensors = [("k", (k.0, &kb)), ("v", (v.0, &vb))]
            .map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap()));
        safetensors::serialize(tensors, None::<HashMap<String, String>>).unwrap()
    }

    fn parse(bytes: Vec<u8>, max_tokens: usize) -> Result<Vec<Head>> {
        heads(TensorFile::new(Cursor::new(bytes), "f.safetensors")?, "f", max_tokens)
    }

    #[test]
    fn the_shipped_data_is_small_named_and_licensed() {
        assert!(SHIPPED.len() < 300_000);
        let heads = shipped(usize::MAX).unwrap();
        assert_eq!((heads.len(), heads[0].pairs.len(), heads[0].pairs.dim), (8, 256, 32));
        assert_eq!((heads[5].source.as_str(), heads[5].head), ("MiniLM layer 4", 1));
        let file = TensorFile::new(Cursor::new(SHIPPED), "shipped").unwrap();
        assert!(file.metadata("license").unwrap().contains("Apache-2.0"));
        assert!(file.metadata("source").unwrap().contains("all-MiniLM-L6-v2"));
    }

    #[test]
    fn heads_are_cut_from_the_right_places() {
        let numbers: Vec<f32> = (0..2 * 3 * 20 * 2).map(|i| i as f32).collect();
        let bytes = file((&[2, 3, 20, 2], &numbers), (&[2, 3, 20, 1], &numbers[..120]));
        let heads = parse(bytes, 17).unwrap();
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
            (b"nonsense".to_vec(), "not a safetensors file"),
            (file((&[32, 2], &ones), (shape, &ones)), "k: shape [32, 2]"),
            (file((shape, &ones), (&[1, 2, 16, 2], &ones)), "must be [1, 1, 32, value_dim]"),
            (file((shape, &ones), (shape, &bad)), "v: element 7 is NaN"),
            (file((&[1, 4, 8, 2], &ones), (&[1, 4, 8, 2], &ones)), "8 tokens"),
        ] {
            let error = parse(bytes, 1000).unwrap_err().to_string();
            assert!(error.starts_with("f.safetensors: ") && error.contains(expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(read(Path::new("/no/such/file"), 10).unwrap_err().to_string().starts_with("/no/such/file: "));
    }
}
