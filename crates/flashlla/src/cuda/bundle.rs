//! A bundle of compiled kernels: one file with an index and the cubins, each compressed by itself.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `FLLAKRN1` |
//! | 4 | length of the index, little-endian `u32` |
//! | that many | the index, JSON: an [`Index`] |
//! | the rest | the cubins, each one zstd frame; [`Kernel::offset`] counts from here |
//!
//! Cubins are compressed one by one so that a call unpacks and loads only the handful that it launches.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::io::Read;
use std::path::Path;

/// The first bytes of a bundle.
pub const MAGIC: &[u8; 8] = b"FLLAKRN1";
/// Version of the kernels' arguments that this library launches; a bundle of another one is refused.
pub const ABI: u32 = 1;

/// What a bundle holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Version of the kernels' arguments: [`ABI`].
    pub abi: u32,
    /// The oldest driver that can load the cubins, as `cuDriverGetVersion` numbers them (13000 is CUDA 13.0).
    pub driver: u32,
    /// What compiled them, for people.
    #[serde(default)]
    pub toolchain: String,
    /// Every compiled variant. Where several fit a call, the last of the largest [`Kernel::from_keys`] is taken.
    pub kernels: Vec<Kernel>,
}

/// One compiled variant of a kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// The kernel's name, such as `lla_solve`; its entry in the cubin is that and `_entry`.
    pub kernel: String,
    /// The architecture it runs on, such as `sm_90`.
    pub arch: String,
    /// The storage type it reads (that it writes, for `lla_output`): `bf16`, `f16` or `f32`; none where it touches neither.
    #[serde(default)]
    pub dtype: Option<String>,
    /// The head dimension that its tiles have; narrower heads are padded with zeros.
    pub head_dim: usize,
    /// Query rows of a tile block (rows, for kernels that only convert).
    pub block_queries: usize,
    /// Key rows of a tile.
    #[serde(default)]
    pub block_keys: usize,
    /// Search directions and probes in two terms.
    #[serde(default)]
    pub high: bool,
    /// Adds a bias to the logits.
    #[serde(default)]
    pub bias: bool,
    /// Reads and writes tensors 16 bytes at a time: their addresses, strides and widths must allow it.
    #[serde(default)]
    pub aligned: bool,
    /// The fewest keys from which this variant is the one to take.
    #[serde(default)]
    pub from_keys: usize,
    /// Worker warps of a tile block.
    #[serde(default)]
    pub warps: u32,
    /// Tile blocks per multiprocessor that it was compiled for.
    #[serde(default)]
    pub occupancy: u32,
    /// Registers per thread.
    #[serde(default)]
    pub registers: u32,
    /// Stack bytes per thread (spills).
    #[serde(default)]
    pub stack: u32,
    /// Static shared memory, bytes.
    #[serde(default)]
    pub shared: u32,
    /// Where its compressed cubin begins, counted from the end of the index.
    pub offset: usize,
    /// The length of its compressed cubin.
    pub bytes: usize,
}

/// What a call wants of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub kernel: &'a str,
    pub dtype: Option<&'a str>,
    pub head_dim: usize,
    pub high: bool,
    pub bias: bool,
    pub aligned: bool,
    pub keys: usize,
}

/// A bundle in memory.
#[derive(Debug, Clone)]
pub struct Bundle {
    data: Cow<'static, [u8]>,
    cubins: usize,
    index: Index,
    origin: String,
}

fn broken(origin: &str, what: impl std::fmt::Display) -> Error {
    Error::Cuda {
        problem: format!("the kernels in {origin} cannot be used: {what}"),
        remedy: "make them anew with `cargo xtask kernels`".into(),
    }
}

impl Bundle {
    /// Reads a bundle from a file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let data = std::fs::read(path).map_err(|error| Error::Cuda {
            problem: format!("the kernels in {} cannot be read: {error}", path.display()),
            remedy: "give the path of a file made by `cargo xtask kernels`".into(),
        })?;
        Self::parse(data, path.display().to_string())
    }

    /// The bundle that was embedded when the library was built, if one was.
    pub fn embedded() -> Option<Result<Self>> {
        #[cfg(flashlla_kernels)]
        {
            static DATA: &[u8] = include_bytes!(env!("FLASHLLA_EMBEDDED_KERNELS"));
            Some(Self::parse(DATA, "this program".into()))
        }
        #[cfg(not(flashlla_kernels))]
        None
    }

    /// Reads a bundle from memory; `origin` is what errors call it.
    pub fn parse(data: impl Into<Cow<'static, [u8]>>, origin: String) -> Result<Self> {
        let data = data.into();
        let Some(rest) = data.strip_prefix(MAGIC.as_slice()) else {
            return Err(broken(&origin, "it is no bundle of kernels"));
        };
        let Some((length, rest)) = rest.split_first_chunk::<4>() else {
            return Err(broken(&origin, "it is cut short"));
        };
        let Some(json) = rest.get(..u32::from_le_bytes(*length) as usize) else {
            return Err(broken(&origin, "its index is cut short"));
        };
        // The version is looked at before the rest, whose form it decides.
        #[derive(Deserialize)]
        struct Version {
            abi: u32,
        }
        let index = |error: serde_json::Error| broken(&origin, format!("its index does not read: {error}"));
        let version: Version = serde_json::from_slice(json).map_err(index)?;
        if version.abi != ABI {
            let what = format!("they are for interface {}, this library has {ABI}", version.abi);
            return Err(broken(&origin, what));
        }
        let index: Index = serde_json::from_slice(json).map_err(index)?;
        let cubins = MAGIC.len() + 4 + json.len();
        let room = data.len() - cubins;
        if let Some(k) = index.kernels.iter().find(|k| k.offset.checked_add(k.bytes).is_none_or(|e| e > room))
        {
            return Err(broken(&origin, format!("the cubin of {} is cut short", k.kernel)));
        }
        if let Some(k) = index.kernels.iter().find(|k| k.head_dim == 0 || k.block_queries == 0) {
            return Err(broken(&origin, format!("{} has tiles of no size", k.kernel)));
        }
        Ok(Self { data, cubins, index, origin })
    }

    /// What it holds.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Where it came from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The architectures it has kernels for, sorted.
    pub fn architectures(&self) -> Vec<&str> {
        let mut all: Vec<&str> = self.index.kernels.iter().map(|k| k.arch.as_str()).collect();
        all.sort_unstable_by_key(|arch| (arch.len(), *arch));
        all.dedup();
        all
    }

    /// The architecture among them whose cubins run on a device of compute capability `major.minor`: its own, or, before
    /// 9.0, an earlier one of the same major version (later ones use instructions of one architecture only).
    pub fn architecture_for(&self, (major, minor): (i32, i32)) -> Option<&str> {
        let of = |minor: i32| format!("sm_{major}{minor}");
        let earliest = if major < 9 { 0 } else { minor };
        (earliest..=minor)
            .rev()
            .find_map(|minor| self.architectures().into_iter().find(|arch| *arch == of(minor)))
    }

    /// The place in the index of the variant to launch on `arch`.
    pub(crate) fn find(&self, arch: &str, wanted: Wanted) -> Option<usize> {
        let fits = |k: &Kernel| {
            k.kernel == wanted.kernel
                && k.arch == arch
                && k.dtype.as_deref() == wanted.dtype
                && k.head_dim == wanted.head_dim
                && k.high == wanted.high
                && k.bias == wanted.bias
                && k.aligned == wanted.aligned
                && k.from_keys <= wanted.keys
        };
        let candidates = self.index.kernels.iter().enumerate().filter(|(_, k)| fits(k));
        candidates.max_by_key(|(_, k)| k.from_keys).map(|(i, _)| i)
    }

    /// The head dimensions that `kernel` was compiled for, ascending.
    pub(crate) fn head_dims(&self, arch: &str, kernel: &str) -> Vec<usize> {
        let mut all: Vec<usize> = self
            .index
            .kernels
            .iter()
            .filter(|k| k.kernel == kernel && k.arch == arch)
            .map(|k| k.head_dim)
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Unpacks the cubin of one of the index's kernels.
    pub fn cubin(&self, kernel: &Kernel) -> Result<Vec<u8>> {
        let packed = &self.data[self.cubins + kernel.offset..][..kernel.bytes];
        let fail = |error: String| broken(&self.origin, format!("the cubin of {}: {error}", kernel.kernel));
        let mut cubin = vec![];
        ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(|error| fail(error.to_string()))?
            .read_to_end(&mut cubin)
            .map_err(|error| fail(error.to_string()))?;
        Ok(cubin)
    }
}

/// Writes a bundle: `kernels` with the cubin of each. Their offsets and lengths are filled in.
pub fn pack(mut index: Index, cubins: &[Vec<u8>]) -> Vec<u8> {
    assert_eq!(index.kernels.len(), cubins.len(), "a cubin for every kernel");
    let mut blob = vec![];
    for (kernel, cubin) in index.kernels.iter_mut().zip(cubins) {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let packed = ruzstd::encoding::compress_to_vec(cubin.as_slice(), level);
        (kernel.offset, kernel.bytes) = (blob.len(), packed.len());
        blob.extend(packed);
    }
    let json = serde_json::to_vec(&index).expect("an index is plain data");
    let length = u32::try_from(json.len()).expect("an index is small");
    [MAGIC.as_slice(), &length.to_le_bytes(), &json, &blob].concat()
}
