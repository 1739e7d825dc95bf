//! Bytecode from the kernel crate, cubins from the assembler, in parallel and only what changed.

use crate::{
    budget::{self, Facts},
    bundle,
    toolchain::{Toolchain, VERSION},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What the command line asks for.
pub struct Request {
    pub archs: Vec<String>,
    pub only: Option<String>,
    pub check: bool,
}

impl Default for Request {
    fn default() -> Self {
        Self { archs: vec!["sm_90".into()], only: None, check: false }
    }
}

/// One line of the kernel compiler's list.
pub struct Variant {
    pub name: String,
    pub entry: String,
    pub dtype: String,
    /// bm, bn, d, high, bias, aligned, tensor, page_keys, kind
    pub numbers: [u32; 9],
}

impl Variant {
    fn parse(line: &str) -> Result<Self> {
        let f: Vec<&str> = line.split('\t').collect();
        ensure!(f.len() == 12, "unexpected line from the kernel compiler: {line:?}");
        let mut numbers = [0; 9];
        for (n, s) in numbers.iter_mut().zip(&f[3..]) {
            *n = s.parse().with_context(|| format!("unexpected number {s:?} from the kernel compiler"))?;
        }
        Ok(Self { name: f[0].into(), entry: f[1].into(), dtype: f[2].into(), numbers })
    }

    /// One term, no bias, 16-bit tensors: what most calls use.
    pub fn is_plain(&self) -> bool {
        self.dtype != "f32" && self.numbers[3] == 0 && self.numbers[4] == 0
    }

    /// Larger tiles, for queries that see many keys: they spill more between the loops.
    pub fn is_for_long(&self) -> bool {
        self.numbers[8] == 2
    }

    /// Whether it must use tensor cores and bulk copies.
    pub fn tensor(&self) -> bool {
        self.numbers[6] == 1
    }
}

/// A compiled variant.
pub struct Kernel {
    pub variant: Variant,
    pub arch: String,
    pub cubin: Vec<u8>,
    pub facts: Facts,
}

pub fn run(request: &Request) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let folder = target.join("kernels");
    fs::create_dir_all(&folder)?;
    let tools = Toolchain::set_up(&folder)?;
    let mut all = Vec::new();
    for arch in &request.archs {
        all.extend(compile(&tools, &folder.join(arch), arch, request)?);
    }
    if request.check {
        budget::check(&all)?;
    }
    if request.only.is_none() {
        let file = folder.join("flashlla-kernels.bundle");
        let size = bundle::write(&file, &all)?;
        println!("{}: {} kernels, {size} bytes", file.display(), all.len());
    }
    Ok(())
}

fn compile(tools: &Toolchain, folder: &Path, arch: &str, request: &Request) -> Result<Vec<Kernel>> {
    fs::create_dir_all(folder)?;
    eprintln!("building the kernels' bytecode for {arch}");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["run", "--release", "--quiet", "--package", "flashlla-kernels", "--"])
        .arg(folder)
        .arg(arch)
        .args(&request.only)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .env("CUDA_TOOLKIT_PATH", &tools.root)
        .env("LIBCLANG_PATH", &tools.libclang)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the kernel compiler failed");
    let list: Vec<Variant> =
        String::from_utf8(output.stdout)?.lines().map(Variant::parse).collect::<Result<_>>()?;
    let (next, fresh) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(v) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match assemble(tools, folder, arch, &v.name) {
                        Ok(true) => eprintln!(
                            "[{}/{}] {}",
                            fresh.fetch_add(1, Ordering::Relaxed) + 1,
                            list.len(),
                            v.name
                        ),
                        Ok(false) => {}
                        Err(e) => failed.lock().expect("no panics").push(format!("{}: {e:#}", v.name)),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panics");
    if !failed.is_empty() {
        bail!("{arch}: {} of {} kernels failed\n{}", failed.len(), list.len(), failed.join("\n"));
    }
    list.into_iter()
        .map(|variant| {
            let at = |end: &str| folder.join(format!("{}.{end}", variant.name));
            let facts = serde_json::from_slice::<serde_json::Value>(&fs::read(at("json"))?)?;
            Ok(Kernel {
                cubin: fs::read(at("cubin"))?,
                facts: Facts::from_json(&facts)?,
                arch: arch.into(),
                variant,
            })
        })
        .collect()
}

/// Bytecode to cubin and its facts; false if both were current.
fn assemble(tools: &Toolchain, folder: &Path, arch: &str, name: &str) -> Result<bool> {
    let at = |end: &str| folder.join(format!("{name}.{end}"));
    // The kernel compiler leaves unchanged bytecode untouched, so that times tell.
    let newer = |a: &str, b: &str| -> bool {
        let time = |end: &str| fs::metadata(at(end)).and_then(|m| m.modified()).ok();
        time(a).zip(time(b)).is_some_and(|(a, b)| a >= b)
    };
    let key = format!("{VERSION} {arch}");
    let assembled = fs::read_to_string(at("key")).is_ok_and(|k| k == key) && newer("cubin", "bc");
    if assembled && newer("json", "cubin") {
        return Ok(false);
    }
    if !assembled {
        let output = tools
            .tool("tileiras")
            .arg(format!("--gpu-name={arch}"))
            .arg(at("bc"))
            .arg("-o")
            .arg(at("cubin"))
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        fs::write(at("key"), key)?;
    }
    let facts = Facts::read(tools, &at("cubin"))?;
    fs::write(at("json"), serde_json::to_vec(&facts.to_json())?)?;
    Ok(true)
}
