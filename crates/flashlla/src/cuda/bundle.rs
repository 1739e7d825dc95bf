//! A bundle of compiled kernels: one file with an index and the cubins, made by `cargo xtask kernels`.
//!
//! It is one zstd frame around
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `FLLAKRN3` |
//! | 4 | length of the index, little-endian `u32` |
//! | that many | the index, JSON: an [`Index`] |
//! | the rest | the cubins; [`Kernel::offset`] counts from here |

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::Path;

/// The first bytes inside the frame; the digit is the version of the index and of the kernels' arguments.
pub const MAGIC: &[u8; 8] = b"FLLAKRN3";
/// The most bytes that a bundle may unpack to, against damaged ones.
const LARGEST: u64 = 1 << 30;
/// The oldest driver that can load the cubins unless the index says otherwise, as `cuDriverGetVersion` numbers them: CUDA
/// 13.0, on which cubins of the 13.5 tools were run.
const DRIVER: u32 = 13000;

/// What a bundle holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// The version of the compiler, for people.
    #[serde(default)]
    pub toolchain: String,
    /// The oldest driver that can load the cubins, as `cuDriverGetVersion` numbers them (13000 is CUDA 13.0).
    #[serde(default = "default_driver")]
    pub driver: u32,
    /// Every compiled variant.
    pub kernels: Vec<Kernel>,
}

fn default_driver() -> u32 {
    DRIVER
}

/// One compiled variant of a kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Its unique name.
    pub name: String,
    /// The kernel's name, such as `lla_forward`; the symbol in the cubin is that and `_entry`.
    pub entry: String,
    /// The architecture it runs on, such as `sm_90`.
    pub arch: String,
    /// The storage type of the caller's tensors that it reads or writes: `bf16`, `f16` or `f32`; empty where it touches none.
    pub dtype: String,
    /// Query rows of a tile block (chunk rows, for kernels that only convert).
    #[serde(rename = "bm")]
    pub block_queries: usize,
    /// Key rows of a tile, 0 where there are none.
    #[serde(rename = "bn")]
    pub block_keys: usize,
    /// The head dimension that its tiles have; narrower heads are padded with zeros.
    #[serde(rename = "d")]
    pub head_dim: usize,
    /// Search directions and probes in two terms.
    pub high: bool,
    /// Adds a bias to the logits.
    pub bias: bool,
    /// Reads and writes tensors 16 bytes at a time: their addresses, strides and widths must allow it.
    pub aligned: bool,
    /// Finds keys and values through a block table, in pages of a multiple of so many; 0: without one.
    #[serde(default)]
    pub page_keys: usize,
    /// Which of a kernel's kinds, where there are several.
    #[serde(default)]
    pub kind: u32,
    /// Registers per thread.
    #[serde(default)]
    pub registers: u32,
    /// Stack bytes per thread (spills).
    #[serde(default)]
    pub stack: u32,
    /// Static shared memory, bytes.
    #[serde(default)]
    pub shared: u32,
    /// Where its cubin begins, counted from the end of the index.
    pub offset: usize,
    /// The length of its cubin.
    pub size: usize,
}

/// What a call wants of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub entry: &'a str,
    pub dtype: &'a str,
    pub head_dim: usize,
    pub high: bool,
    pub bias: bool,
    pub aligned: bool,
    pub kind: u32,
}

/// A bundle in memory.
#[derive(Debug, Clone)]
pub struct Bundle {
    data: Vec<u8>,
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
        Self::parse(&data, path.display().to_string())
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
    pub fn parse(packed: &[u8], origin: String) -> Result<Self> {
        let mut data = vec![];
        let frame = ruzstd::decoding::StreamingDecoder::new(packed);
        let frame = frame.map_err(|_| broken(&origin, "it is no bundle of kernels"))?;
        let unpacked = frame.take(LARGEST).read_to_end(&mut data);
        unpacked.map_err(|error| broken(&origin, format!("it does not unpack: {error}")))?;
        let Some(rest) = data.strip_prefix(MAGIC.as_slice()) else {
            return Err(broken(&origin, "it is no bundle of this version's kernels"));
        };
        let json =
            rest.split_first_chunk::<4>().and_then(|(n, rest)| rest.get(..u32::from_le_bytes(*n) as usize));
        let Some(json) = json else {
            return Err(broken(&origin, "its index is cut short"));
        };
        let index: Index = serde_json::from_slice(json)
            .map_err(|error| broken(&origin, format!("its index does not read: {error}")))?;
        let cubins = MAGIC.len() + 4 + json.len();
        let room = data.len() - cubins;
        for k in &index.kernels {
            if k.offset.checked_add(k.size).is_none_or(|end| end > room) {
                return Err(broken(&origin, format!("the cubin of {} is cut short", k.name)));
            }
            if k.head_dim == 0 || k.block_queries == 0 {
                return Err(broken(&origin, format!("{} has tiles of no size", k.name)));
            }
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

    /// The place in the index of the variant to launch on `arch`: with a page size, that for the largest such pages.
    pub(crate) fn find(&self, arch: &str, wanted: Wanted, page_size: Option<usize>) -> Option<usize> {
        let fits = |k: &Kernel| {
            k.entry == wanted.entry
                && k.arch == arch
                && k.dtype == wanted.dtype
                && k.head_dim == wanted.head_dim
                && k.high == wanted.high
                && k.bias == wanted.bias
                && k.aligned == wanted.aligned
                && k.kind == wanted.kind
                && (k.page_keys > 0) == page_size.is_some()
                && page_size.is_none_or(|size| size.is_multiple_of(k.page_keys))
        };
        let fitting = self.index.kernels.iter().enumerate().filter(|(_, k)| fits(k));
        // The first of equals.
        fitting.rev().max_by_key(|(_, k)| k.page_keys).map(|(place, _)| place)
    }

    /// The head dimensions that a kernel was compiled for, ascending.
    pub(crate) fn head_dims(&self, arch: &str, entry: &str) -> Vec<usize> {
        let fitting = self.index.kernels.iter().filter(|k| k.entry == entry && k.arch == arch);
        let mut all: Vec<usize> = fitting.map(|k| k.head_dim).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The cubin of one of the index's kernels.
    pub fn cubin(&self, kernel: &Kernel) -> &[u8] {
        &self.data[self.cubins + kernel.offset..][..kernel.size]
    }
}
