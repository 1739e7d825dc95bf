//! NVIDIA's compiler wheels in a virtual environment under the target folder, and libclang.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Tile IR's assembler must agree with the libraries it loads; the rest are headers and tools that print what is in a cubin.
pub const VERSION: &str = "13.5.37";
const WHEELS: &[&str] = &[
    "nvidia-cuda-tileiras==13.5.37",
    "nvidia-cuda-nvcc==13.5.37",
    "nvidia-nvvm==13.5.37",
    "nvidia-cuda-runtime==13.5.*",
    "nvidia-curand",
    "nvidia-cuda-cuobjdump==13.5.37",
    "nvidia-cuda-nvdisasm==13.5.37",
];

/// Where the tools are.
pub struct Toolchain {
    /// The wheels' `cu13` folder: `bin`, `include`, `lib`.
    pub root: PathBuf,
    /// Folder of libclang.
    pub libclang: PathBuf,
}

impl Toolchain {
    /// Installs what is missing under `folder`.
    pub fn set_up(folder: &Path) -> Result<Self> {
        let libclang = libclang()?;
        let venv = folder.join("venv");
        let done = venv.join(format!("installed-{VERSION}"));
        if !done.exists() {
            eprintln!("installing NVIDIA's compiler wheels ({VERSION}) into {}", venv.display());
            run(Command::new("python3").args(["-m", "venv"]).arg(&venv))
                .context("python3 -m venv failed; on Debian: apt-get install python3-venv")?;
            run(Command::new(venv.join("bin/pip")).args(["install", "--quiet"]).args(WHEELS))?;
            fs::write(&done, "")?;
        }
        let lib = fs::read_dir(venv.join("lib"))?.next().context("the virtual environment is empty")??.path();
        let root = lib.join("site-packages/nvidia/cu13");
        ensure!(
            root.join("bin/tileiras").exists(),
            "no tileiras in {}: delete {} and try again",
            root.display(),
            venv.display()
        );
        Ok(Self { root, libclang })
    }

    /// A command of the toolchain, with its neighbours on the path.
    pub fn tool(&self, name: &str) -> Command {
        let bin = self.root.join("bin");
        let mut command = Command::new(bin.join(name));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", bin.display()));
        command
    }
}

fn libclang() -> Result<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("LIBCLANG_PATH").map(PathBuf::from).into_iter().collect();
    if let Ok(list) = fs::read_dir("/usr/lib") {
        let llvm = list
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("llvm-")));
        folders.extend(llvm.map(|p| p.join("lib")));
    }
    folders
        .extend(["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"].map(PathBuf::from));
    for folder in folders {
        let Ok(list) = fs::read_dir(&folder) else { continue };
        if list.flatten().any(|e| {
            e.file_name().to_string_lossy().starts_with("libclang")
                && e.file_name().to_string_lossy().contains(".so")
                && !e.file_name().to_string_lossy().starts_with("libclang-cpp")
        }) {
            return Ok(folder);
        }
    }
    bail!(
        "libclang is missing, which building the kernel compiler needs: on Debian, apt-get install libclang-dev (or set LIBCLANG_PATH)"
    )
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(status.success(), "{:?} failed: {status}", command.get_program());
    Ok(())
}
