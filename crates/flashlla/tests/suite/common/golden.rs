//! Cases whose outputs and gradients were computed by another program.

use super::{Data, Results};
use flashlla::{Attention, Mask, Ridge, Tensor};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// A case.
pub struct Golden {
    pub name: String,
    pub attention: Attention,
    pub data: Data,
    want: Vec<(&'static str, Tensor<f64>)>,
    /// λ ≤ 0.1 or logits beyond 50: gradients in `f32` are held to 1e-3.
    pub hard: bool,
}

fn read(path: &Path) -> Golden {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| {
        let view = file.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::F64);
        let data = view.data().chunks_exact(8).map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect();
        Tensor::new(data, view.shape())
    };
    let number = |name: &str| metadata[name].parse::<f64>().unwrap();

    let mut mask = if number("causal") != 0.0 { Mask::causal() } else { Mask::full() };
    mask = mask.q_offset(number("q_offset") as i64);
    if number("window") > 0.0 {
        mask = mask.window(number("window") as usize);
    }
    if !metadata["cu_seqlens"].is_empty() {
        mask = mask
            .cu_seqlens(metadata["cu_seqlens"].split(',').map(|x| x.parse().unwrap()).collect::<Vec<_>>());
    }
    let [q, k, v, grad_out, ridge] = ["q", "k", "v", "grad_out", "ridge"].map(tensor);
    let smallest = ridge.data().iter().copied().fold(f64::INFINITY, f64::min);
    let shape = ridge.shape().try_into().unwrap();
    let attention = Attention::builder_for(&q.view(), &k.view(), &v.view())
        .mask(mask)
        .scale(number("scale"))
        .ridge(Ridge::per_query(ridge.into_vec(), shape))
        .build()
        .unwrap();
    let names = ["out", "lse", "key_mean", "probe", "dq", "dk", "dv", "dridge"];
    let mut want: Vec<_> = names.into_iter().map(|name| (name, tensor(name))).collect();
    want.push(("dscale", Tensor::new(tensor("dscale").into_vec(), &[])));
    let largest = want[1].1.data().iter().fold(0.0, |a: f64, x| a.max(x.abs()));
    Golden {
        name: path.file_stem().unwrap().to_string_lossy().into(),
        attention,
        hard: smallest <= 0.1 || largest > 50.0,
        data: Data { q, k, v, grad_out, bias: None, probe: None },
        want,
    }
}

fn folder(path: PathBuf) -> Vec<Golden> {
    let mut files: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

impl Golden {
    /// Those in the repository, and those beside the project.
    pub fn all() -> Vec<Self> {
        // Where the tests run, which need not be where they were built.
        let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into());
        let here = Path::new(&here);
        let mut cases = folder(here.join("tests/golden"));
        assert_eq!(cases.len(), 8, "the cases kept in the repository");
        let shared = here.join("../../../shared/golden");
        if shared.is_dir() {
            let kept: Vec<String> = cases.iter().map(|case| case.name.clone()).collect();
            cases.extend(folder(shared).into_iter().filter(|case| !kept.contains(&case.name)));
            assert!(cases.len() >= 15, "{} cases", cases.len());
        } else {
            let required = std::env::var_os("FLASHLLA_REQUIRE_SHARED").is_some();
            assert!(!required, "FLASHLLA_REQUIRE_SHARED is set, but there is no {}", shared.display());
        }
        cases
    }

    pub fn results(&self) -> Results {
        let get = |name: &str| self.want.iter().find(|(n, _)| *n == name).unwrap().1.clone();
        Results {
            out: get("out"),
            lse: get("lse"),
            key_mean: get("key_mean"),
            probe: get("probe"),
            dq: get("dq"),
            dk: get("dk"),
            dv: get("dv"),
            dridge: get("dridge"),
            dscale: get("dscale"),
            dbias: None,
            dprobe: None,
            solve: Default::default(),
            second_solve: Default::default(),
        }
    }
}
