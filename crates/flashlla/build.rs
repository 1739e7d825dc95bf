//! Embeds the GPU kernels when there are any.
//!
//! With feature `cuda`: the bundle that `FLASHLLA_KERNELS` names, or else `target/kernels/flashlla-kernels.bundle` of the workspace
//! (where `cargo xtask kernels` writes it). Without one the library builds all the same and looks for a bundle at run time.

use std::path::PathBuf;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(flashlla_kernels)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=FLASHLLA_KERNELS");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let bundle = match std::env::var_os("FLASHLLA_KERNELS") {
        Some(path) => PathBuf::from(path),
        None => {
            let here = std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo");
            PathBuf::from(here).join("../../target/kernels/flashlla-kernels.bundle")
        }
    };
    // A path that does not exist must not be watched: cargo would take the crate for changed every time.
    if let Ok(bundle) = bundle.canonicalize() {
        println!("cargo::rerun-if-changed={}", bundle.display());
        println!("cargo::rustc-env=FLASHLLA_EMBEDDED_KERNELS={}", bundle.display());
        println!("cargo::rustc-cfg=flashlla_kernels");
    }
}
