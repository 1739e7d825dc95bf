//! `cargo xtask kernels`: compiles the GPU kernels into one bundle. Needs no GPU and no CUDA installation.

mod budget;
mod bundle;
mod kernels;
mod toolchain;

use anyhow::{Result, bail};

const USAGE: &str = "\
usage: cargo xtask kernels [--arch sm_90[,sm_100,..]] [--only NAMES] [--check]

Compiles every kernel variant for the asked architectures (default sm_90; releases: sm_80,sm_86,sm_89,sm_90,sm_100,sm_103,sm_120)
and writes target/kernels/flashlla-kernels.bundle. --check also holds each kernel to its budget of registers, stack, spills in the
inner loop, and demands tensor-core and bulk-copy instructions; --only compiles a part and writes no bundle: kernels whose names hold
all pieces of one of the patterns in NAMES, such as 'forward_bf16*h0,decode'.";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("kernels") => {
            let mut request = kernels::Request::default();
            let mut rest = args[1..].iter();
            while let Some(arg) = rest.next() {
                match (arg.as_str(), rest.as_slice().first()) {
                    ("--check", _) => request.check = true,
                    ("--arch", Some(list)) => {
                        request.archs = list.split(',').map(String::from).collect();
                        rest.next();
                    }
                    ("--only", Some(names)) => {
                        request.only = Some(names.to_string());
                        rest.next();
                    }
                    (other, _) => bail!("unknown or incomplete argument {other:?}\n{USAGE}"),
                }
            }
            kernels::run(&request)
        }
        _ => bail!("{USAGE}"),
    }
}
