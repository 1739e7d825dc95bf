//! The matrix unit of newer x86 processors (AMX): sums of products of 16 × 32 and 32 × 16 `bf16` numbers in `f32`.
//!
//! Its registers, tiles of 16 rows of 64 bytes, are unknown to the compiler: what is in them begins and ends within a block of assembly.
//! Only their configuration lasts longer, as long as a [`Tiles`].

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Keys that one product sums over.
pub const STEP: usize = 32;
/// Rows and columns of a tile of sums.
pub const SIDE: usize = 16;

/// A tile of an operand. On the left, row `i` is 32 numbers of one row of the matrix. On the right, row `p` is 16 columns of the pair of
/// rows `2 p` and `2 p + 1`, the former in the lower halves.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Operand(pub [[u32; SIDE]; SIDE]);

impl Operand {
    pub const ZERO: Self = Self([[0; SIDE]; SIDE]);
}

/// A tile of sums, by rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Sums(pub [[f32; SIDE]; SIDE]);

impl Sums {
    pub const ZERO: Self = Self([[0.0; SIDE]; SIDE]);
}

/// Proof that the processor has the unit and that the operating system lets this process use it.
#[derive(Debug, Clone, Copy)]
pub struct Unit(());

impl Unit {
    /// Asked for once per process. Permission is for all its threads, also those to come.
    pub fn get() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(|| has_instructions() && permitted()).then_some(Self(()))
    }
}

#[allow(unused_unsafe)] // The function was unsafe in older versions of Rust.
fn has_instructions() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let all = AMX_BF16 | AMX_TILE;
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        // SAFETY: processors with AVX-512 have the instruction.
        && unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & all == all }
}

/// Asks Linux for the state that tiles need, which it does not keep for a process unasked (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call that reads and writes no memory; the kernel changes the registers named, and no others.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// A number as a `bf16` and what that leaves of it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Terms(pub [Operand; 2]);

impl Terms {
    pub const ZERO: Self = Self([Operand::ZERO; 2]);
}

/// Memory that will be read soon: where it begins, and the distance of its lines.
#[derive(Clone, Copy)]
pub struct Lines {
    pub start: *const u8,
    pub step: usize,
}

impl Lines {
    /// Lines that are asked for beside every step of a product.
    pub const PER_STEP: usize = 4;

    /// Asks for one of them. Into the second-level cache: the first is full of operands.
    #[inline(always)]
    pub fn ask(self, number: usize) {
        let line = self.start.wrapping_add(number * self.step);
        // SAFETY: a prefetch of any address is no access.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast()) };
    }
}

/// Right operands, one for every step.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// Numbers that are `bf16` exactly.
    Exact(&'a [Operand]),
    Terms(&'a [Terms]),
}

impl Right<'_> {
    fn steps(&self) -> usize {
        match self {
            Self::Exact(x) => x.len(),
            Self::Terms(x) => x.len(),
        }
    }
}

/// The unit's registers, configured on this thread for as long as this lives.
pub struct Tiles {
    /// Neither sent nor shared: the configuration is one thread's.
    _here: PhantomData<*mut ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` was made with a `Unit`.
        unsafe {
            asm!("tilerelease", out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                out("tmm6") _, out("tmm7") _, options(nostack));
        }
    }
}

/// A loop over steps: `x` and `y` are the pair of operands, `z` the one that both are multiplied with. `in_x` and `in_z` are the bytes
/// of their steps.
///
/// Few tiles are in use of eight: the processor renames tiles with what is left, which is little where two threads share a core. With
/// seven in use, loads were measured to wait for products, at a third of the rate.
macro_rules! steps {
    ($steps:expr, $sums:expr, $lines:expr, $x:expr, $y:expr, $z:expr, $in_x:literal, $in_z:literal, $($line:literal),+) => {
        asm!(
            "tileloadd tmm0, [{c0} + {row}*1]",
            "tileloadd tmm1, [{c1} + {row}*1]",
            "2: // {line} {next}", // which not every list of instructions uses
            $($line,)+
            concat!("add {x}, ", $in_x),
            concat!("add {y}, ", $in_x),
            concat!("add {z}, ", $in_z),
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c0} + {row}*1], tmm0",
            "tilestored [{c1} + {row}*1], tmm1",
            c0 = in(reg) $sums[0].0.as_mut_ptr(),
            c1 = in(reg) $sums[1].0.as_mut_ptr(),
            x = inout(reg) $x => _,
            y = inout(reg) $y => _,
            z = inout(reg) $z => _,
            steps = inout(reg) $steps => _,
            row = in(reg) 64u64,
            line = inout(reg) $lines.start => _,
            next = in(reg) $lines.step,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl Tiles {
    pub fn new(_: Unit) -> Self {
        /// Eight tiles of 16 rows of 64 bytes.
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut all =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        all.bytes[..8].fill(64);
        all.rows[..8].fill(16);
        // SAFETY: a `Unit` says that the instruction is there and allowed; the configuration is one that all processors with it have.
        unsafe {
            asm!("ldtilecfg [{all}]", all = in(reg) &all, out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack, readonly));
        }
        Self { _here: PhantomData }
    }

    /// `sums[i] += left[i] · right`, where a product of two second terms is left out.
    pub fn add(&self, sums: [&mut Sums; 2], left: [&[Terms]; 2], right: Right, lines: Lines) {
        let steps = right.steps();
        assert!(steps > 0 && left.iter().all(|left| left.len() == steps), "steps of a product");
        let [x, y] = left.map(<[Terms]>::as_ptr);
        // SAFETY: the tiles are configured; operands and sums are 16 rows of 64 bytes, one after the other, and there are as many
        // operands as steps.
        unsafe {
            match right {
                Right::Exact(right) => steps!(
                    steps,
                    sums,
                    lines,
                    x,
                    y,
                    right.as_ptr(),
                    2048,
                    1024,
                    "tileloadd tmm2, [{x} + {row}*1]",
                    "tileloadd tmm4, [{z} + {row}*1]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm2, [{y} + {row}*1]",
                    "tdpbf16ps tmm1, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm2, [{x} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm2, [{y} + {row}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}"
                ),
                Right::Terms(right) => steps!(
                    steps,
                    sums,
                    lines,
                    x,
                    y,
                    right.as_ptr(),
                    2048,
                    2048,
                    "tileloadd tmm2, [{x} + {row}*1 + 1024]",
                    "tileloadd tmm4, [{z} + {row}*1]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm2, [{y} + {row}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm2, [{x} + {row}*1]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm3, [{y} + {row}*1]",
                    "tdpbf16ps tmm1, tmm3, tmm4",
                    "prefetcht1 byte ptr [{line}]",
                    "add {line}, {next}",
                    "tileloadd tmm4, [{z} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "tdpbf16ps tmm1, tmm3, tmm4"
                ),
            }
        }
    }

    /// `sums[i] += left · right[i]`, where the left is exact.
    pub fn add_exact(&self, sums: [&mut Sums; 2], left: &[Operand], right: [Right; 2]) {
        let lines = Lines { start: left.as_ptr().cast(), step: 0 };
        let steps = left.len();
        assert!(steps > 0 && right.iter().all(|right| right.steps() == steps), "steps of a product");
        let z = left.as_ptr();
        // SAFETY: as above.
        unsafe {
            match right {
                [Right::Exact(x), Right::Exact(y)] => steps!(
                    steps,
                    sums,
                    lines,
                    x.as_ptr(),
                    y.as_ptr(),
                    z,
                    1024,
                    1024,
                    "tileloadd tmm4, [{z} + {row}*1]",
                    "tileloadd tmm2, [{x} + {row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm2",
                    "tileloadd tmm2, [{y} + {row}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm2"
                ),
                [Right::Terms(x), Right::Terms(y)] => steps!(
                    steps,
                    sums,
                    lines,
                    x.as_ptr(),
                    y.as_ptr(),
                    z,
                    2048,
                    1024,
                    "tileloadd tmm4, [{z} + {row}*1]",
                    "tileloadd tmm2, [{x} + {row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm2",
                    "tileloadd tmm2, [{y} + {row}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm2",
                    "tileloadd tmm2, [{x} + {row}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm2",
                    "tileloadd tmm2, [{y} + {row}*1 + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm2"
                ),
                _ => panic!("right operands of one kind"),
            }
        }
    }
}
