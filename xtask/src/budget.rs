//! What a cubin uses, read from it without a GPU, and what it may use.

use crate::{
    kernels::{Kernel, Variant},
    toolchain::Toolchain,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::Path;

/// Resources and instructions of one cubin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    pub registers: u32,
    /// Bytes of stack per thread: spills, inside loops or out.
    pub stack: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Tensor-core products (HGMMA, or HMMA and the like off Hopper).
    pub products: u32,
    /// Bulk tensor copies (UTMALDG).
    pub copies: u32,
    /// Local-memory accesses inside the innermost loops that run products.
    pub loop_spills: u32,
}

impl Facts {
    pub fn read(tools: &Toolchain, cubin: &Path) -> Result<Self> {
        let print = |flag: &str| -> Result<String> {
            let output = tools.tool("cuobjdump").arg(flag).arg(cubin).output()?;
            ensure!(
                output.status.success(),
                "cuobjdump {flag}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let usage = print("-res-usage")?;
        let number = |key: &str| -> Result<u32> {
            let at = usage.find(key).with_context(|| format!("cuobjdump printed no {key}"))? + key.len();
            Ok(usage[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse()?)
        };
        let sass = print("-sass")?;
        let code = instructions(&sass);
        let count =
            |words: &[&str]| code.iter().filter(|(_, t)| words.iter().any(|w| t.contains(w))).count() as u32;
        Ok(Self {
            registers: number("REG:")?,
            stack: number("STACK:")?,
            shared: number("SHARED:")?,
            products: count(&["HGMMA", "HMMA", "UTCHMMA", "UTCQMMA"]),
            copies: count(&["UTMALDG"]),
            loop_spills: loop_spills(&code),
        })
    }

    pub fn to_json(self) -> Value {
        json!({ "registers": self.registers, "stack": self.stack, "shared": self.shared, "products": self.products,
                "copies": self.copies, "loop_spills": self.loop_spills })
    }

    pub fn from_json(value: &Value) -> Result<Self> {
        let get = |key: &str| -> Result<u32> {
            Ok(value[key].as_u64().with_context(|| format!("no {key} in a kernel's facts"))? as u32)
        };
        Ok(Self {
            registers: get("registers")?,
            stack: get("stack")?,
            shared: get("shared")?,
            products: get("products")?,
            copies: get("copies")?,
            loop_spills: get("loop_spills")?,
        })
    }
}

/// (address, text) of every instruction in a disassembly.
fn instructions(sass: &str) -> Vec<(u64, &str)> {
    sass.lines()
        .filter_map(|line| {
            let (address, text) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
            let text = text.trim().split(';').next()?;
            (!text.is_empty() && !text.starts_with("/*")).then_some(())?;
            Some((u64::from_str_radix(address, 16).ok()?, text))
        })
        .collect()
}

/// Local loads and stores in the innermost loops with products. A jump back past an EXIT is no loop but a way out of line and back.
fn loop_spills(code: &[(u64, &str)]) -> u32 {
    let within = |a: u64, b: u64| code.iter().filter(move |(at, _)| (a..=b).contains(at));
    let loops: Vec<(u64, u64)> = code
        .iter()
        .filter(|(_, t)| t.contains("BRA"))
        .filter_map(|&(end, t)| {
            let start =
                u64::from_str_radix(t.rsplit("0x").next()?.trim(), 16).ok().filter(|_| t.contains("0x"))?;
            let real = start < end
                && within(start, end).any(|(_, t)| t.contains("HGMMA"))
                && !within(start, end).any(|(_, t)| t.contains("EXIT"));
            real.then_some((start, end))
        })
        .collect();
    let inner =
        loops.iter().filter(|&&(a, b)| !loops.iter().any(|&(c, d)| (c, d) != (a, b) && a <= c && d <= b));
    inner
        .map(|&(a, b)| within(a, b).filter(|(_, t)| t.contains("STL") || t.contains("LDL")).count() as u32)
        .max()
        .unwrap_or(0)
}

/// Most bytes of stack and most spills per trip of the inner loop: what the kernels had when they were measured, rounded up. The
/// variants that most calls use (`plain`) spill next to nothing inside their loops; two terms, a bias, and f32 tensors cost registers.
fn limits(variant: &Variant) -> (u32, u32) {
    match (variant.entry.as_str(), variant.is_plain()) {
        ("lla_forward" | "lla_backward_solve", true) if variant.is_for_long() => (512, 0),
        ("lla_forward", true) => (320, 0),
        ("lla_forward", false) => (1000, 150),
        ("lla_backward_solve", true) => (260, 0),
        ("lla_backward_solve", false) => (900, 110),
        ("lla_backward_query", _) => (560, 0),
        ("lla_backward_key", true) => (32, 0),
        ("lla_backward_key", false) => (32, 4),
        // At D = 128 the sums fill the registers: with pages of 16, or f32, they spill. So does the solve after them.
        ("lla_decode_split", true) => (32, 4),
        ("lla_decode_split", false) => (128, 90),
        ("lla_decode_whole", true) => (256, 4),
        ("lla_decode_whole", false) => (256, 90),
        ("lla_decode_fold", _) => (16, 0),
        ("lla_decode_step", _) => (32, 0),
        // Between the loops.
        ("lla_decode_together", _) => (128, 0),
        _ => (0, 0),
    }
}

/// Fails with one line per kernel that is over its budget.
pub fn check(kernels: &[Kernel]) -> Result<()> {
    let mut over = Vec::new();
    for k in kernels.iter().filter(|k| k.arch == "sm_90") {
        let (f, (stack, spills)) = (&k.facts, limits(&k.variant));
        if f.stack > stack || f.loop_spills > spills {
            over.push(format!(
                "{}: {} bytes of stack (at most {stack}), {} spills in the inner loop (at most {spills})",
                k.variant.name, f.stack, f.loop_spills
            ));
        }
        if k.variant.tensor() && (f.products == 0 || f.copies == 0) {
            over.push(format!(
                "{}: {} tensor-core products, {} bulk copies: there must be some of both",
                k.variant.name, f.products, f.copies
            ));
        }
    }
    if !over.is_empty() {
        bail!("kernels over budget\n{}", over.join("\n"));
    }
    println!("{} kernels within budget", kernels.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOP: &str = "
        /*0000*/ MOV R1, R2 ;
        /*0010*/ LDL R3, [R1] ;
        /*0020*/ HGMMA.64x64x16.F32 R56, gdesc[UR8], RZ ;
        /*0030*/ STL [R1], R3 ;
        /*0040*/ @P0 BRA 0x10 ;
        /*0050*/ LDL R4, [R1] ;
        /*0060*/ EXIT ;
        /*0070*/ BRA 0x20 ;
    ";

    #[test]
    fn spills_count_only_inside_the_product_loop() {
        let code = instructions(LOOP);
        assert_eq!(code.len(), 8);
        assert_eq!(loop_spills(&code), 2);
    }

    #[test]
    fn facts_survive_their_json() {
        let facts = Facts { registers: 128, stack: 8, shared: 4096, products: 12, copies: 4, loop_spills: 1 };
        assert_eq!(Facts::from_json(&facts.to_json()).unwrap(), facts);
    }
}
