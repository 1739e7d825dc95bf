//! One file for all kernels: a zstd frame around
//! `"FLLAKRN3"`, the index's length (u32, little endian), the index (JSON), and the cubins one after another.
//!
//! The index is `{"toolchain": "...", "kernels": [{"name", "entry", "arch", "dtype", "bm", "bn", "d", "high", "bias", "aligned",
//! "page_keys", "kind", "registers", "stack", "shared", "offset", "size"}, ..]}`, offsets counted from the first cubin.

use crate::{kernels::Kernel, toolchain::VERSION};
use anyhow::Result;
use serde_json::json;
use std::{fs, path::Path};

pub const MAGIC: &[u8; 8] = b"FLLAKRN3";

/// Writes the bundle, returns its size.
pub fn write(file: &Path, kernels: &[Kernel]) -> Result<usize> {
    let (mut index, mut blobs) = (Vec::new(), Vec::new());
    for k in kernels {
        let [bm, bn, d, high, bias, aligned, _, page_keys, kind] = k.variant.numbers;
        index.push(json!({
            "name": k.variant.name, "entry": k.variant.entry, "arch": k.arch, "dtype": k.variant.dtype, "bm": bm, "bn": bn, "d": d,
            "high": high == 1, "bias": bias == 1, "aligned": aligned == 1, "page_keys": page_keys, "kind": kind, "registers": k.facts.registers,
            "stack": k.facts.stack, "shared": k.facts.shared, "offset": blobs.len(), "size": k.cubin.len(),
        }));
        blobs.extend_from_slice(&k.cubin);
    }
    let index = serde_json::to_vec(&json!({ "toolchain": VERSION, "kernels": index }))?;
    let mut plain = MAGIC.to_vec();
    plain.extend(u32::try_from(index.len())?.to_le_bytes());
    plain.extend(index);
    plain.extend(blobs);
    let packed = zstd::encode_all(&plain[..], 19)?;
    fs::write(file, &packed)?;
    Ok(packed.len())
}
