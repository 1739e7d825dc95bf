//! What the tests of the program share: files of tensors, and the program run on them.
#![allow(dead_code)] // Every test file uses some of it.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A tensor in `f64`, whatever the file says.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Tensor {
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len());
        Self { shape: shape.to_vec(), data }
    }

    /// Normally distributed; every seed is another tensor.
    pub fn normal(seed: u64, shape: &[usize]) -> Self {
        let numbers = StdRng::seed_from_u64(seed).sample_iter(StandardNormal);
        Self::new(shape, numbers.take(shape.iter().product()).collect())
    }

    pub fn filled(value: f64, shape: &[usize]) -> Self {
        Self::new(shape, vec![value; shape.iter().product()])
    }

    /// Axes 1 and 2 exchanged.
    pub fn swapped(&self) -> Self {
        let [b, h, n, d] = self.shape[..] else { panic!("four axes") };
        let mut data = Vec::new();
        for b in 0..b {
            for n in 0..n {
                for h in 0..h {
                    data.extend(&self.data[((b * self.shape[1] + h) * self.shape[2] + n) * d..][..d]);
                }
            }
        }
        Self::new(&[b, n, h, d], data)
    }

    pub fn reshaped(&self, shape: &[usize]) -> Self {
        Self::new(shape, self.data.clone())
    }

    /// Every element through `f`.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { shape: self.shape.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// Relative Frobenius error against `truth`; anything that is not a number is an infinite error.
    pub fn error(&self, truth: &Tensor) -> f64 {
        assert_eq!(self.shape, truth.shape);
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let difference = square(&mut self.data.iter().zip(&truth.data).map(|(a, b)| a - b)).sqrt();
        let size = square(&mut truth.data.iter().copied()).sqrt();
        let error = if size == 0.0 { difference } else { difference / size };
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// The contents of a file.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    pub tensors: BTreeMap<String, (Dtype, Tensor)>,
    pub metadata: BTreeMap<String, String>,
}

impl Contents {
    /// `q [1, 2, 12, 8]`, `k` and `v` of the same shape, in f64.
    pub fn sample() -> Self {
        let shape = [1, 2, 12, 8];
        Self::default()
            .with("q", Tensor::normal(1, &shape))
            .with("k", Tensor::normal(2, &shape))
            .with("v", Tensor::normal(3, &shape))
            .with("grad_out", Tensor::normal(4, &shape))
    }

    pub fn with(self, name: &str, tensor: Tensor) -> Self {
        self.with_as(Dtype::F64, name, tensor)
    }

    pub fn with_as(mut self, dtype: Dtype, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.into(), (dtype, tensor));
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.tensors.remove(name).expect("a tensor to remove");
        self
    }

    pub fn saying(mut self, key: &str, value: &str) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Every tensor through `f`.
    pub fn map(mut self, f: impl Fn(&str, Tensor) -> Tensor) -> Self {
        for (name, (_, tensor)) in &mut self.tensors {
            *tensor = f(name, tensor.clone());
        }
        self
    }

    pub fn get(&self, name: &str) -> &Tensor {
        &self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    pub fn dtype(&self, name: &str) -> Dtype {
        self.tensors[name].0
    }

    pub fn bytes(&self) -> Vec<u8> {
        let encoded: Vec<_> = (self.tensors.iter())
            .map(|(name, (dtype, tensor))| {
                let bytes: Vec<u8> = match dtype {
                    Dtype::F64 => tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                    Dtype::F32 => tensor.data.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
                    Dtype::BF16 => {
                        tensor.data.iter().flat_map(|&x| half::bf16::from_f64(x).to_le_bytes()).collect()
                    }
                    Dtype::F16 => {
                        tensor.data.iter().flat_map(|&x| half::f16::from_f64(x).to_le_bytes()).collect()
                    }
                    Dtype::I64 => tensor.data.iter().flat_map(|&x| (x as i64).to_le_bytes()).collect(),
                    other => panic!("no test writes {other}"),
                };
                (name, *dtype, tensor.shape.clone(), bytes)
            })
            .collect();
        let views = encoded.iter().map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let metadata: HashMap<String, String> = self.metadata.clone().into_iter().collect();
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = tensors
            .iter()
            .map(|(name, view)| {
                let bytes = view.data();
                let data = match view.dtype() {
                    Dtype::F64 => {
                        bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
                    }
                    Dtype::F32 => bytes
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                        .collect(),
                    other => panic!("no result is {other}"),
                };
                (name.to_string(), (view.dtype(), Tensor::new(view.shape(), data)))
            })
            .collect();
        Self { tensors, metadata }
    }
}

/// A folder of its own for one test, and the program run in it.
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// The names of all files, in order.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs the program in the folder.
    pub fn run(&self, args: &[&str]) -> Output {
        program().args(args).current_dir(self.folder.path()).output().unwrap()
    }

    /// Runs `attend` on the contents and returns what it wrote.
    pub fn attend(&self, contents: &Contents, args: &[&str]) -> Contents {
        self.put("in.safetensors", &contents.bytes());
        let mut all = vec!["attend", "in.safetensors", "-o", "out.safetensors"];
        all.extend(args);
        let output = self.run(&all);
        assert!(output.status.success(), "{all:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        Contents::read(&self.path("out.safetensors"))
    }
}

/// The program, with nothing of this process's environment that changes what it does.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flashlla"));
    command.env_remove("RAYON_NUM_THREADS");
    command
}
