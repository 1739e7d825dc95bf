//! `flashlla info`: what this program and this machine are.

use crate::{Result, stdout};
use clap::Args;
use flashlla::Cpu;

/// The options of `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Print it as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// What `info` shows.
#[derive(Debug, serde::Serialize)]
pub struct Info {
    version: &'static str,
    target: String,
    cpu: Option<String>,
    /// The instruction set that the engine chooses at run time.
    simd: &'static str,
    /// Those of the features the engine could use that this CPU has.
    features: Vec<&'static str>,
    logical_cpus: usize,
    /// The threads a command uses unless told.
    threads: usize,
    /// What `--device` can be.
    devices: Vec<String>,
}

impl Info {
    /// Asks the machine.
    pub fn new() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            cpu: cpu(),
            simd: Cpu::new().instruction_set(),
            features: features(),
            logical_cpus: std::thread::available_parallelism().map_or(1, usize::from),
            threads: rayon::current_num_threads(),
            devices: devices(),
        }
    }
}

impl Default for Info {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs the command.
pub fn run(args: &InfoArgs) -> Result<()> {
    let info = Info::new();
    if args.json {
        return stdout::json(&info);
    }
    let features = if info.features.is_empty() { "none of interest".into() } else { info.features.join(" ") };
    stdout::line(format_args!("flashlla  {} ({})", info.version, info.target))?;
    if let Some(cpu) = &info.cpu {
        stdout::line(format_args!("cpu       {cpu}"))?;
    }
    stdout::line(format_args!("simd      {}", info.simd))?;
    stdout::line(format_args!("features  {features}"))?;
    stdout::line(format_args!("threads   {} of {} logical CPUs", info.threads, info.logical_cpus))?;
    stdout::line(format_args!("devices   {}", info.devices.join(", ")))
}

/// What `--device` can be here.
fn devices() -> Vec<String> {
    #[allow(unused_mut)]
    let mut devices = vec!["cpu".to_string()];
    #[cfg(feature = "cuda")]
    match flashlla::Cuda::new() {
        Ok(gpu) => devices.push(format!("cuda ({})", gpu.name())),
        Err(error) => devices.push(format!("no cuda ({error})")),
    }
    devices
}

#[cfg(target_arch = "x86_64")]
fn cpu() -> Option<String> {
    let brand = raw_cpuid::CpuId::new().get_processor_brand_string()?.as_str().trim().to_string();
    (!brand.is_empty()).then_some(brand)
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu() -> Option<String> {
    None
}

macro_rules! detected {
    ($detect:ident: $($feature:tt)*) => {
        [$(($feature, std::arch::$detect!($feature))),*].into_iter().filter(|f| f.1).map(|f| f.0).collect()
    };
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    detected!(is_x86_feature_detected: "sse4.2" "avx" "avx2" "fma" "f16c" "avx512f" "avx512dq" "avx512bw" "avx512vl" "avx512bf16" "avx512fp16")
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<&'static str> {
    detected!(is_aarch64_feature_detected: "neon" "fp16" "bf16" "sve")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<&'static str> {
    vec![]
}
