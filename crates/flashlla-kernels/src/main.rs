//! Writes the Tile IR bytecode of every variant: `flashlla-kernels OUT_DIR ARCH [NAMES [BM,BN,WARPS,PER_SM]]`, the last to try
//! other tile sizes, worker warps and tile blocks per SM on the kernels that have products.
//!
//! NAMES are patterns with commas between: a kernel is built if its name holds all pieces of one, in order; `*` stands between pieces.
//!
//! One line per variant goes to standard output, for `cargo xtask kernels`:
//! `name entry dtype bm bn d high bias aligned tensor page_keys kind`, tab-separated.

use std::{env, error::Error, fs, path::PathBuf};

/// The compiler clones syntax trees all the time: with the system's allocator half of its time goes there.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [out, arch, rest @ ..] = args.as_slice() else {
        return Err("usage: flashlla-kernels OUT_DIR ARCH [NAMES [BM,BN,WARPS,PER_SM]]".into());
    };
    let names = rest.first().map_or("", String::as_str);
    let tiles = match rest.get(1) {
        None => None,
        Some(text) => {
            let numbers: Vec<i32> = text.split(',').map(str::parse).collect::<Result<_, _>>()?;
            let [bm, bn, warps, per_sm] = numbers[..] else {
                return Err(format!("tiles are BM,BN,WARPS,PER_SM, not {text}").into());
            };
            Some((bm, bn, warps, per_sm))
        }
    };
    let variants = flashlla_kernels::variants::with_tiles(tiles);
    let patterns: Vec<&str> = names.split(',').collect();
    if let Some(idle) = patterns.iter().find(|pattern| !variants.iter().any(|v| fits(&v.name, pattern))) {
        return Err(format!("no kernel is named {idle}").into());
    }
    let list: Vec<_> =
        variants.into_iter().filter(|v| patterns.iter().any(|pattern| fits(&v.name, pattern))).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        let work = || -> Result<(), String> {
            while let Some(v) = list.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                let code = v.bytecode(arch).map_err(|e| format!("{}: {e}", v.name))?;
                let file: PathBuf = [out.as_str(), &format!("{}.bc", v.name)].iter().collect();
                // An unchanged file keeps its time, so that what is built from it counts as current.
                if fs::read(&file).ok().as_deref() != Some(&code[..]) {
                    fs::write(&file, &code).map_err(|e| format!("{}: {e}", file.display()))?;
                }
            }
            Ok(())
        };
        // The compiler's recursion needs more than a thread's usual stack.
        let run: Vec<_> = (0..threads)
            .map(|_| std::thread::Builder::new().stack_size(256 << 20).spawn_scoped(scope, work))
            .collect::<Result<_, _>>()?;
        for thread in run {
            thread.join().map_err(|_| "the kernel compiler panicked")??;
        }
        Ok(())
    })?;
    for v in &list {
        let flag = u8::from;
        println!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
            v.name,
            v.entry,
            v.dtype,
            v.bm,
            v.bn,
            v.d,
            flag(v.high),
            flag(v.bias),
            flag(v.aligned),
            flag(v.tensor),
            v.page_keys,
            v.kind
        );
    }
    Ok(())
}

/// Whether a name holds all pieces of a pattern, in order.
fn fits(name: &str, pattern: &str) -> bool {
    pattern.split('*').try_fold(name, |rest, piece| Some(rest.split_once(piece)?.1)).is_some()
}
