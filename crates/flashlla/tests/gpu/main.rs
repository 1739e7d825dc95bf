//! The GPU engine on a GPU: golden cases, random problems, numbers that are not finite, empty problems, streams, time. Prints
//! what it measured and a short table last, and fails when an entry does.
//!
//! Without a GPU it says so and passes; set `FLASHLLA_REQUIRE_GPU` to have it fail. `FLASHLLA_KERNELS` names the kernels.

#[path = "../suite/common/mod.rs"]
#[allow(dead_code, unused_imports)]
mod common;
#[path = "../suite/decode.rs"]
#[allow(dead_code, unused_imports)]
mod decode;
mod decoding;
mod extremes;
#[path = "../suite/masks.rs"]
#[allow(dead_code, unused_imports)]
mod masks;
mod pointers;

use common::*;
use flashlla::{Attention, Cpu, Cuda, Engine, Mask, Precision};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use std::time::{Duration, Instant};

/// One line of the table.
#[derive(Default)]
struct Entry {
    what: String,
    cases: usize,
    failed: usize,
    note: String,
    /// Of outputs, and of the gradients of q, k and v.
    errors: Vec<[f64; 2]>,
}

/// Parts run in processes of their own: a fault on the GPU ends everything that its process does there.
const PART: &str = "FLASHLLA_GPU_PART";
/// Random problems of one part.
const SHARE: usize = 12;

impl Entry {
    /// As one line from a part to the whole.
    fn send(&self) {
        let errors: Vec<String> = self.errors.iter().map(|[a, b]| format!("{a:e}:{b:e}")).collect();
        println!("@\t{}\t{}\t{}\t{}\t{}", self.what, self.cases, self.failed, self.note, errors.join(","));
    }

    fn receive(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.strip_prefix("@\t")?.split('\t').collect();
        let [what, cases, failed, note, errors] = fields[..] else { return None };
        let pair = |text: &str| -> Option<[f64; 2]> {
            let (a, b) = text.split_once(':')?;
            Some([a.parse().ok()?, b.parse().ok()?])
        };
        Some(Self {
            what: what.into(),
            cases: cases.parse().ok()?,
            failed: failed.parse().ok()?,
            note: note.into(),
            errors: errors.split(',').filter_map(pair).collect(),
        })
    }

    fn measured(&self) -> String {
        if self.errors.is_empty() {
            return self.note.clone();
        }
        let of = |which: usize| {
            let mut values: Vec<f64> = self.errors.iter().map(|pair| pair[which]).collect();
            [0.5, 0.95, 1.0].map(|part| format!("{:.1e}", percentile(&mut values, part))).join(" ")
        };
        format!("out {}, dq dk dv {}", of(0), of(1))
    }
}

struct Checks {
    gpu: Cuda,
    /// What the kernels at hand can do: a bundle may have been compiled in part.
    dtypes: Vec<Dtype>,
    widest: usize,
}

/// Allowed errors of outputs and gradients: bounds on what the arithmetic leaves, to find mistakes. How large errors are is
/// what the table says.
fn allowed(precision: Precision, smallest_ridge: f64) -> [f64; 2] {
    match (precision, smallest_ridge) {
        (Precision::Standard, l) if l >= 1.0 => [2e-2, 4e-2],
        (Precision::Standard, l) if l >= 0.1 => [1e-1, 2e-1],
        (Precision::High, l) if l >= 1.0 => [4e-3, 2e-2],
        (Precision::High, l) if l >= 0.1 => [2e-2, 5e-2],
        _ => [3e-1, 5e-1],
    }
}

fn with_precision(attention: &Attention, precision: Precision) -> Attention {
    let a = attention;
    Attention::builder()
        .batch(a.batch())
        .heads(a.heads())
        .kv_heads(a.kv_heads())
        .queries(a.queries())
        .keys(a.keys())
        .head_dim(a.head_dim())
        .value_dim(a.value_dim())
        .mask(a.mask().clone())
        .scale(a.scale())
        .ridge(a.ridge().clone())
        .precision(precision)
        .build()
        .unwrap()
}

fn smallest_ridge(attention: &Attention) -> f64 {
    attention.ridge().values().iter().copied().fold(f64::INFINITY, f64::min)
}

/// Reads the results without panicking on an error of the engine.
fn try_run(dtype: Dtype, gpu: &Cuda, attention: &Attention, data: &Data) -> Result<Results, String> {
    let (gpu, attention, data) = (gpu.clone(), attention.clone(), data.clone());
    std::panic::catch_unwind(move || run_as(dtype, gpu, &attention, &data)).map_err(|panic| {
        panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic without words".into())
    })
}

fn error_named(errors: &[(&str, f64)], name: &str) -> f64 {
    errors.iter().find(|(n, _)| *n == name).map_or(0.0, |(_, e)| *e)
}

fn percentile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(((values.len() - 1) as f64 * part) as usize).copied().unwrap_or(0.0)
}

impl Checks {
    fn enter(&self, what: impl Into<String>, cases: usize, failed: usize, note: impl Into<String>) {
        Entry { what: what.into(), cases, failed, note: note.into(), errors: vec![] }.send();
    }

    fn enter_errors(&self, what: impl Into<String>, failed: usize, errors: Vec<[f64; 2]>) {
        let (what, cases) = (what.into(), errors.len());
        Entry { what, cases, failed, errors, ..Default::default() }.send();
    }

    fn golden(&self, number: usize) {
        let mut all = Golden::all();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all = all.split_off(number.min(all.len()));
        all.truncate(1);
        all.retain(|case| case.attention.head_dim().max(case.attention.value_dim()) <= self.widest);
        for precision in [Precision::Standard, Precision::High] {
            for dtype in self.dtypes.clone() {
                let (mut failed, mut measured) = (0, vec![]);
                for case in &all {
                    let attention = with_precision(&case.attention, precision);
                    let mut data = case.data.clone();
                    for tensor in [&mut data.q, &mut data.k, &mut data.v, &mut data.grad_out] {
                        *tensor = match dtype {
                            Dtype::Bf16 => cast(&cast::<flashlla::bf16>(tensor)),
                            Dtype::F16 => cast(&cast::<flashlla::f16>(tensor)),
                            _ => cast(&cast::<f32>(tensor)),
                        };
                    }
                    let want = run::<f64>(Cpu::default(), &case.attention, &data);
                    let got = match try_run(dtype, &self.gpu, &attention, &data) {
                        Ok(got) => got,
                        Err(error) => {
                            println!("{} {dtype:?} {precision:?}: {error}", case.name);
                            failed += 1;
                            measured.push([f64::INFINITY; 2]);
                            continue;
                        }
                    };
                    let errors = errors(&attention, &data, &got, &want);
                    let [out, gradient] = allowed(precision, smallest_ridge(&attention));
                    let e = |name| error_named(&errors, name);
                    let gradients = e("dq").max(e("dk")).max(e("dv"));
                    measured.push([e("out"), gradients]);
                    let ok = e("out") <= out && gradients <= gradient;
                    failed += usize::from(!ok);
                    println!(
                        "{:<22} {dtype:?} {precision:?} out {:.1e} lse {:.1e} probe {:.1e} dq {:.1e} dk {:.1e} dv {:.1e} dridge {:.1e} \
                         steps {} residual {:.1e}{}",
                        case.name,
                        e("out"),
                        e("lse"),
                        e("probe"),
                        e("dq"),
                        e("dk"),
                        e("dv"),
                        e("dridge"),
                        got.solve.max_iterations(),
                        got.solve.worst_residual(),
                        if ok { "" } else { "  FAILED" }
                    );
                }
                if !measured.is_empty() {
                    self.enter_errors(format!("golden {dtype:?} {precision:?}"), failed, measured);
                }
            }
        }
    }

    fn random(&self, share: usize) {
        let mut runner = TestRunner::deterministic();
        let strategy = case(3_000_000);
        let mut kinds: Vec<(&str, Vec<[f64; 2]>, usize)> = [
            "random Standard λ<0.3",
            "random Standard λ<3",
            "random Standard λ≥3",
            "random High λ<0.3",
            "random High λ<3",
            "random High λ≥3",
        ]
        .map(|name| (name, vec![], 0))
        .into();
        let (mut wide, mut wide_failed) = (0, 0);
        for number in 0..(share + 1) * SHARE {
            let mut case = strategy.new_tree(&mut runner).unwrap().current();
            if number < share * SHARE {
                continue;
            }
            case.grid = Grid::Half;
            let dtype = self.dtypes[number % self.dtypes.len()];
            let precision = if number % 2 == 0 { Precision::Standard } else { Precision::High };
            let attention = with_precision(&case.attention(), precision);
            let data = case.data();
            let result = try_run(dtype, &self.gpu, &attention, &data);
            if attention.head_dim().max(attention.value_dim()) > self.widest {
                wide += 1;
                wide_failed += usize::from(
                    !result.is_err_and(|error| error.contains("head_dim") || error.contains("value_dim")),
                );
                continue;
            }
            let kind = usize::from(case.ridge >= 0.3) + usize::from(case.ridge >= 3.0);
            let kind = &mut kinds[kind + if precision == Precision::High { 3 } else { 0 }];
            let want = run::<f64>(Cpu::default(), &case.attention(), &data);
            match result {
                Err(error) => {
                    println!("{number}: {error}\n  {dtype:?} {attention:?}");
                    kind.1.push([f64::INFINITY; 2]);
                    kind.2 += 1;
                }
                Ok(got) => {
                    let errors = errors(&attention, &data, &got, &want);
                    let e = |name| error_named(&errors, name);
                    let gradients = e("dq").max(e("dk")).max(e("dv"));
                    let [out, gradient] = allowed(precision, smallest_ridge(&attention));
                    if !(e("out") <= out && gradients <= gradient) {
                        kind.2 += 1;
                        let shown: Vec<String> = errors.iter().map(|(n, e)| format!("{n} {e:.1e}")).collect();
                        println!(
                            "{number}: {}\n  {dtype:?} bias {:?} {attention:?}",
                            shown.join(" "),
                            case.bias
                        );
                    }
                    kind.1.push([e("out"), gradients]);
                }
            }
        }
        for (name, errors, failed) in kinds {
            if !errors.is_empty() {
                self.enter_errors(name, failed, errors);
            }
        }
        self.enter(format!("dims above {} refused", self.widest), wide, wide_failed, "");
    }

    /// One number that is not finite reaches those that see it and nobody else.
    fn not_finite(&self) {
        let bad_rows = |tensor: &flashlla::Tensor<f64>| -> Vec<bool> {
            let width = if tensor.shape().len() == 4 { tensor.shape()[3] } else { 1 };
            tensor.data().chunks(width).map(|row| row.iter().any(|x| !x.is_finite())).collect()
        };
        let (mut cases, mut failed, mut slowest) = (0, 0, Duration::ZERO);
        for (which, mask) in [0, 1, 2, 3].into_iter().flat_map(|which| {
            [Mask::causal(), Mask::causal().window(33), Mask::full().cu_seqlens([0, 6, 48, 48, 161])]
                .map(|mask| (which, mask))
        }) {
            for poison in [f64::NAN, f64::INFINITY] {
                if which == 3 && poison.is_infinite() {
                    continue; // an infinite gradient is scaled, not compared
                }
                let attention = Attention::builder()
                    .heads(2)
                    .kv_heads(1)
                    .queries(161)
                    .head_dim(40)
                    .value_dim(24)
                    .mask(mask.clone())
                    .build()
                    .unwrap();
                let mut data = Data::random(&attention, 7, Grid::Half);
                let tensor = [&mut data.q, &mut data.k, &mut data.v, &mut data.grad_out]
                    .into_iter()
                    .nth(which)
                    .unwrap();
                let width = tensor.shape()[3];
                tensor.data_mut()[70 * width + 3] = poison;
                let want = run::<f64>(Cpu::default(), &attention, &data);
                let start = Instant::now();
                let got = try_run(Dtype::Bf16, &self.gpu, &attention, &data);
                slowest = slowest.max(start.elapsed());
                cases += 1;
                let Ok(mut got) = got else {
                    failed += 1;
                    continue;
                };
                let mut want = want;
                let mut wrong = vec![];
                for name in ["out", "dq", "dk", "dv"] {
                    let (g, w) = (bad_rows(got.get(name)), bad_rows(want.get(name)));
                    if g != w {
                        let list = |rows: &[bool]| (0..rows.len()).filter(|&i| rows[i]).collect::<Vec<_>>();
                        wrong.push(format!("{name}: not finite in {:?}, expected {:?}", list(&g), list(&w)));
                    }
                }
                for results in [&mut got, &mut want] {
                    for tensor in [&mut results.out, &mut results.dq, &mut results.dk, &mut results.dv] {
                        let (rows, width) = (bad_rows(tensor), tensor.shape()[3]);
                        for (row, _) in tensor.data_mut().chunks_mut(width).zip(rows).filter(|(_, bad)| *bad)
                        {
                            row.fill(0.0);
                        }
                    }
                }
                for name in ["out", "dq", "dk", "dv"] {
                    let error = relative_error(got.get(name).data(), want.get(name).data(), 1e-3);
                    if error > 2e-2 {
                        wrong.push(format!("{name}: error {error:.1e} in the others"));
                    }
                }
                if !wrong.is_empty() {
                    failed += 1;
                    println!("{poison} in tensor {which}, {mask:?}: {}", wrong.join("; "));
                }
            }
        }
        self.enter("NaN and infinities", cases, failed, format!("slowest {slowest:.1?}"));
    }

    fn empty(&self) {
        let base =
            || Attention::builder().batch(2).heads(4).kv_heads(2).queries(5).keys(7).head_dim(3).value_dim(2);
        let blank = [
            base().batch(0),
            base().queries(0),
            base().keys(0),
            base().queries(0).keys(0),
            base().keys(0).mask(Mask::causal().window(2).leave_one_out()),
            base().mask(Mask::causal().q_offset(-100)),
            base().queries(0).keys(0).mask(Mask::full().cu_seqlens([0, 0, 0])),
        ];
        let cases = blank.len();
        let mut failed = 0;
        for (number, builder) in blank.into_iter().enumerate() {
            let attention = builder.build().unwrap();
            let data =
                Data::random(&attention, 1, Grid::Half).with_bias([1, 2, attention.keys(), 1], 2, Grid::Half);
            match try_run(Dtype::Bf16, &self.gpu, &attention, &data) {
                Err(error) => {
                    failed += 1;
                    println!("empty {number}: {error}");
                }
                Ok(got) => {
                    let wrong: Vec<&str> = got
                        .named()
                        .into_iter()
                        .filter(|(name, tensor)| {
                            let expected = if *name == "lse" { f64::NEG_INFINITY } else { 0.0 };
                            tensor.data().iter().any(|&x| x != expected)
                        })
                        .map(|(name, _)| name)
                        .collect();
                    if !wrong.is_empty() {
                        failed += 1;
                        println!("empty {number}: {wrong:?} are not blank");
                    }
                }
            }
        }
        self.enter("nothing to compute or to see", cases, failed, "");
    }

    /// Two threads, each in a stream of its own, get the bits that each gets alone; and so does a second run.
    fn streams(&self) {
        let make = |seed: u64, n: usize, d: usize| {
            let attention = Attention::builder()
                .heads(4)
                .queries(n)
                .head_dim(d)
                .mask(Mask::causal())
                .ridge(1.0)
                .build()
                .unwrap();
            let data = Data::random(&attention, seed, Grid::Half);
            (attention, data)
        };
        let problems = [make(1, 700, 64), make(2, 333, self.widest)];
        let bits = |r: &Results| -> Vec<u64> {
            r.named()
                .into_iter()
                .flat_map(|(_, t)| t.data().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                .collect()
        };
        let alone =
            [0, 1].map(|i| try_run(Dtype::Bf16, &self.gpu, &problems[i].0, &problems[i].1).map(|r| bits(&r)));
        let (mut cases, mut failed) = (0, 0);
        for _ in 0..10 {
            let together: Vec<_> = std::thread::scope(|scope| {
                let started = problems.each_ref().map(|(attention, data)| {
                    scope.spawn(|| try_run(Dtype::Bf16, &self.gpu, attention, data))
                });
                started.map(|thread| thread.join().unwrap().map(|r| bits(&r))).into()
            });
            for (together, alone) in together.into_iter().zip(&alone) {
                cases += 1;
                failed += usize::from(together.is_err() || &together != alone);
            }
        }
        self.enter("two streams, the same bits", cases, failed, "");
    }

    fn first(&self, start: Instant, opened: Duration) {
        let attention = Attention::builder().queries(200).head_dim(64).mask(Mask::causal()).build().unwrap();
        let data = Data::random(&attention, 1, Grid::Half);
        let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<flashlla::bf16>);
        let problem = attention.problem(q.view(), k.view(), v.view()).unwrap();
        let first = self.gpu.forward(&problem);
        let total = start.elapsed();
        let late = first.is_err() || total > Duration::from_secs(1);
        let note = format!(
            "engine {opened:.1?}, first result after {total:.1?}{}",
            first.err().map_or(String::new(), |error| format!(", {error}"))
        );
        self.enter("first call", 1, usize::from(late), note);
    }

    fn times(&self) {
        let widest = self.widest;
        for (heads, n, d) in [(16, 4096, 64), (8, 4096, 128)].into_iter().filter(|shape| shape.2 <= widest) {
            let attention = Attention::builder()
                .heads(heads)
                .queries(n)
                .head_dim(d)
                .mask(Mask::causal())
                .build()
                .unwrap();
            let data = Data::random(&attention, 3, Grid::Half);
            let [q, k, v, g] = [&data.q, &data.k, &data.v, &data.grad_out].map(cast::<flashlla::bf16>);
            let problem = attention.problem(q.view(), k.view(), v.view()).unwrap();
            let mut note = String::new();
            for _ in 0..2 {
                let start = Instant::now();
                let state = match self.gpu.forward(&problem) {
                    Ok(forward) => forward.state,
                    Err(error) => return self.enter("time", 1, 1, error.to_string()),
                };
                let forward = start.elapsed();
                let start = Instant::now();
                let backward = self.gpu.backward(&problem, &state, g.view());
                note = format!(
                    "host to host: forward {forward:.1?}, backward {:.1?}{}",
                    start.elapsed(),
                    backward.err().map_or(String::new(), |e| format!(" ({e})"))
                );
            }
            self.enter(format!("time {heads} x {n} x {d} bf16"), 1, 0, note);
        }
    }
}

/// One part, in this process.
fn part(name: &str) {
    let start = Instant::now();
    let gpu = match Cuda::new() {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("not run: {error}");
            std::process::exit(1);
        }
    };
    let opened = start.elapsed();
    let kernels = &gpu.bundle().index().kernels;
    let has = |dtype: &str| kernels.iter().any(|k| k.entry == "lla_forward" && k.dtype == dtype);
    let dtypes = [(Dtype::Bf16, "bf16"), (Dtype::F16, "f16"), (Dtype::F32, "f32")];
    let dtypes = dtypes.into_iter().filter(|(_, name)| has(name)).map(|(dtype, _)| dtype).collect();
    let widest =
        kernels.iter().filter(|k| k.entry == "lla_backward_solve").map(|k| k.head_dim).max().unwrap_or(0);
    if name == "first" {
        println!("{}, {}, driver {}", gpu.name(), gpu.architecture(), gpu.driver_version());
        println!("{} kernels; {dtypes:?}, head dimensions up to {widest}", kernels.len());
    }
    let checks = Checks { gpu, dtypes, widest };
    // Panics are caught and counted; their words are printed by the checks.
    std::panic::set_hook(Box::new(|_| {}));
    let (name, number) = name.split_once(' ').unwrap_or((name, "0"));
    let number = number.parse().expect("a number");
    match name {
        "first" => checks.first(start, opened),
        "times" => checks.times(),
        "golden" => checks.golden(number),
        "empty" => checks.empty(),
        "finite" => checks.not_finite(),
        "ill" => checks.ill_conditioned(),
        "small" => checks.small_gradients(),
        "mean" => checks.common_mean(),
        "streams" => checks.streams(),
        "decode" => checks.decode(number),
        "shared" => checks.shared(),
        "split" => checks.split(),
        "generate" => checks.generate(),
        "pointers" => checks.pointers(number),
        _ => checks.random(number),
    }
}

fn main() {
    if let Ok(name) = std::env::var(PART) {
        return part(&name);
    }
    if let Err(error) = Cuda::new() {
        println!("not run: {error}");
        let required = std::env::var_os("FLASHLLA_REQUIRE_GPU").is_some();
        std::process::exit(i32::from(required));
    }
    let start = Instant::now();
    let cases = std::env::var("FLASHLLA_GPU_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(480usize);
    let mut parts: Vec<String> = [
        "first", "times", "empty", "finite", "ill", "small", "mean", "streams", "shared", "split", "generate",
    ]
    .map(String::from)
    .into();
    parts.extend((0..Golden::all().len()).map(|number| format!("golden {number}")));
    parts.extend((0..Checks::pointer_parts()).map(|number| format!("pointers {number}")));
    parts.extend((0..cases.div_ceil(SHARE)).map(|number| format!("random {number}")));
    parts.extend((0..cases.div_ceil(4 * SHARE)).map(|number| format!("decode {number}")));
    let program = std::env::current_exe().expect("this program");
    let mut table: Vec<Entry> = vec![];
    let mut lost = 0;
    for part in parts {
        let output =
            std::process::Command::new(&program).env(PART, &part).output().expect("this program again");
        let text = String::from_utf8_lossy(&output.stdout);
        let mut received = 0;
        for line in text.lines() {
            let Some(new) = Entry::receive(line) else {
                println!("{part}: {line}");
                continue;
            };
            received += 1;
            match table.iter_mut().find(|entry| entry.what == new.what) {
                Some(entry) => {
                    entry.cases += new.cases;
                    entry.failed += new.failed;
                    entry.errors.extend(new.errors);
                }
                None => table.push(new),
            }
        }
        if !output.status.success() || received == 0 && !part.starts_with("golden") {
            lost += 1;
            println!("{part}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
    }
    println!("\n{:<32} {:>6} {:>6}  measured (errors: median, 95 %, largest)", "check", "cases", "failed");
    for entry in &table {
        println!("{:<32} {:>6} {:>6}  {}", entry.what, entry.cases, entry.failed, entry.measured());
    }
    println!("{lost} parts ended early; {:.0?} in all", start.elapsed());
    std::process::exit(i32::from(lost > 0 || table.iter().any(|entry| entry.failed > 0)));
}
