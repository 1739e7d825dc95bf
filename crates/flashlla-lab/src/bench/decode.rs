//! `flashlla bench --op decode`: one step of generation against a cache, as a share of the rate at which the same cache can
//! merely be summed, or on a GPU copied.

use super::{BenchArgs, repeat};
use crate::device::AnyEngine;
use crate::files::Stored;
use crate::options::{Device, Dtype, thread_pool};
use crate::summary::duration;
use crate::{Error, Result, stdout};
use clap::Args;
use flashlla::{Attention, AttentionBuilder, CacheView, Cpu, Diagnostics, Engine, Tensor, View};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::io::IsTerminal;

/// The options of `--op decode`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Decode (--op decode)")]
pub struct DecodeArgs {
    /// Tokens that each sequence's cache holds; may be given more than once [default: 2048 16384]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Vec<u32>,

    /// Sequences; may be given more than once [default: 1]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub batch: Vec<u16>,

    /// Key and value heads [default: 8]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub kv_heads: Option<u16>,

    /// Query heads per KV head; may be given more than once [default: 1]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    pub group: Vec<u16>,

    /// New queries per sequence [default: 1]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub queries: Option<u16>,

    /// Head dimension; may be given more than once [default: 64]
    #[arg(long, value_name = "D", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub dim: Vec<u16>,

    /// Pages of so many tokens, a power of two from 16, on the CPU in random order [default: contiguous]
    #[arg(long, value_name = "TOKENS", value_parser = page_size)]
    pub page_size: Option<usize>,
}

impl DecodeArgs {
    /// The first option that was given.
    pub fn given(&self) -> Option<&'static str> {
        let all = [
            ("--context", !self.context.is_empty()),
            ("--batch", !self.batch.is_empty()),
            ("--kv-heads", self.kv_heads.is_some()),
            ("--group", !self.group.is_empty()),
            ("--queries", self.queries.is_some()),
            ("--dim", !self.dim.is_empty()),
            ("--page-size", self.page_size.is_some()),
        ];
        all.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// What was given, or else the default.
fn or<'a, T>(given: &'a [T], default: &'a [T]) -> &'a [T] {
    if given.is_empty() { default } else { given }
}

fn page_size(text: &str) -> Result<usize, String> {
    let size: Option<usize> = text.parse().ok();
    size.filter(|size| size.is_power_of_two() && *size >= flashlla::cache::MIN_PAGE_SIZE)
        .ok_or_else(|| "must be a power of two from 16".into())
}

/// One line of the results.
#[derive(Debug, serde::Serialize)]
struct Line {
    op: &'static str,
    batch: usize,
    kv_heads: usize,
    group: usize,
    queries: usize,
    context: usize,
    head_dim: usize,
    dtype: Dtype,
    page_size: Option<usize>,
    ridge: f64,
    threads: usize,
    repeats: u16,
    seconds: f64,
    fastest_seconds: f64,
    bytes: usize,
    bytes_per_second: f64,
    /// At which the cache is summed (CPU) or copied (GPU, bytes read and written).
    yardstick_bytes_per_second: f64,
    share: f64,
    iterations_max: u32,
    direct: usize,
    flop_per_second: f64,
}

/// Runs it.
pub fn run<T: Stored>(args: &BenchArgs) -> Result<()>
where
    StandardNormal: Distribution<T::Acc>,
{
    if !args.shape.is_empty() {
        return Err(Error::usage(
            "--shape: --op decode takes --batch, --kv-heads, --context and --dim instead",
        ));
    }
    AnyEngine::open(args.device)?;
    let table = !args.json && std::io::stdout().is_terminal();
    if table {
        stdout::line(
            "batch kv_heads group queries context  dim         time     GB/s  all GB/s  share  iterations direct",
        )?;
    }
    let o = &args.decode;
    thread_pool(args.threads)?.install(|| {
        let contexts = or(&o.context, &[2048, 16384]);
        let (batches, groups) = (or(&o.batch, &[1]), or(&o.group, &[1]));
        for (&dim, &context) in
            or(&o.dim, &[64]).iter().flat_map(|dim| contexts.iter().map(move |n| (dim, n)))
        {
            for (&batch, &group) in batches.iter().flat_map(|batch| groups.iter().map(move |g| (batch, g))) {
                let line = measure::<T>(args, [batch.into(), group.into(), context as usize, dim.into()])?;
                if table { stdout::line(row(&line))? } else { stdout::json(&line)? }
            }
        }
        Ok(())
    })
}

fn kv_heads(args: &DecodeArgs) -> usize {
    usize::from(args.kv_heads.unwrap_or(8))
}

fn row(line: &Line) -> String {
    format!(
        "{:>5} {:>8} {:>5} {:>7} {:>7} {:>4} {:>12} {:>8.2} {:>9.2} {:>6} {:>11} {:>6}",
        line.batch,
        line.kv_heads,
        line.group,
        line.queries,
        line.context,
        line.head_dim,
        duration(line.seconds),
        line.bytes_per_second / 1e9,
        line.yardstick_bytes_per_second / 1e9,
        format!("{:.0} %", line.share * 100.0),
        line.iterations_max,
        line.direct
    )
}

fn measure<T: Stored>(args: &BenchArgs, [batch, group, context, dim]: [usize; 4]) -> Result<Line>
where
    StandardNormal: Distribution<T::Acc>,
{
    let o = &args.decode;
    let (kv_heads, queries) = (kv_heads(o), usize::from(o.queries.unwrap_or(1)));
    let size = o.page_size.unwrap_or(context);
    let pages = batch * context.div_ceil(size);
    let mut rng = StdRng::seed_from_u64(args.seed);
    let (k, v) = (
        pool::<T>(&mut rng, pages * size * kv_heads * dim),
        pool::<T>(&mut rng, pages * size * kv_heads * dim),
    );
    let q = Tensor::new(
        (&mut rng)
            .sample_iter(StandardNormal)
            .take(batch * kv_heads * group * queries * dim)
            .map(|x: T::Acc| T::from_real(x))
            .collect(),
        &[batch, kv_heads * group, queries, dim],
    );
    let given = Given { args, q, k, v, batch, pages, size, context, dim };
    let mut measured = match args.device {
        Device::Cpu => given.on_cpu(&mut rng)?,
        #[cfg(feature = "cuda")]
        Device::Cuda => given.on_gpu()?,
        #[cfg(not(feature = "cuda"))]
        Device::Cuda => unreachable!("refused before"),
    };
    let times = &mut measured.times;
    times.sort_by(f64::total_cmp);
    let seconds = (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0;
    let bytes = 2 * batch * kv_heads * context * dim * size_of::<T>();
    let bytes_per_second = bytes as f64 / seconds;
    Ok(Line {
        op: "decode",
        batch,
        kv_heads,
        group,
        queries,
        context,
        head_dim: dim,
        dtype: args.dtype,
        page_size: o.page_size,
        ridge: args.ridge,
        threads: rayon::current_num_threads(),
        repeats: args.repeats,
        seconds,
        fastest_seconds: times[0],
        bytes,
        bytes_per_second,
        yardstick_bytes_per_second: measured.yardstick,
        share: bytes_per_second / measured.yardstick,
        iterations_max: measured.diagnostics.max_iterations(),
        direct: measured.diagnostics.direct,
        flop_per_second: measured.diagnostics.flop as f64 / seconds,
    })
}

/// What is decoded.
struct Given<'a, T: Stored> {
    args: &'a BenchArgs,
    q: Tensor<T>,
    /// Pools of `pages` pages of `size` tokens.
    k: Vec<T>,
    v: Vec<T>,
    batch: usize,
    pages: usize,
    size: usize,
    context: usize,
    dim: usize,
}

struct Measured {
    /// Seconds of each decoding.
    times: Vec<f64>,
    /// Bytes per second at which the cache is summed or copied.
    yardstick: f64,
    diagnostics: Diagnostics,
}

fn failed(error: flashlla::Error) -> Error {
    Error::failed(error)
}

impl<T: Stored> Given<'_, T> {
    fn attention(&self, builder: AttentionBuilder) -> Result<Attention> {
        let args = self.args;
        builder
            .ridge(args.ridge)
            .solver(args.solver.solver(size_of::<T::Acc>() == 8, self.dim)?)
            .precision(args.solver.precision.into())
            .build()
            .map_err(|error| Error::usage(format_args!("--op decode: {error}")))
    }

    fn on_cpu(&self, rng: &mut impl Rng) -> Result<Measured> {
        let Self { args, q, k, v, batch, pages, size, context, dim } = self;
        let kv_heads = kv_heads(&args.decode);
        let lengths = vec![*context; *batch];
        let cache = match args.decode.page_size {
            None => {
                let shape = [*batch, kv_heads, *size, *dim];
                let view = |data| View::bhnd(data, shape).map_err(failed);
                CacheView::contiguous(view(k)?, view(v)?, &lengths)
            }
            Some(_) => {
                let shape = [*pages, *size, kv_heads, *dim];
                let view = |data| View::bnhd(data, shape).map_err(failed);
                let mut table: Vec<i32> = (0..*pages as i32).collect();
                table.shuffle(rng);
                CacheView::paged(view(k)?, view(v)?, &table, &lengths)
            }
        }
        .map_err(failed)?;
        let attention = self.attention(Attention::builder_for_cache(&q.view(), &cache))?;
        let decoding = attention.decoding(q.view(), &cache).map_err(failed)?;
        let mut sum = || Ok(std::hint::black_box(sum::<T>(k) + sum::<T>(v)));
        sum()?;
        let (sums, _) = repeat(args.repeats, &mut sum)?;
        let mut out = Tensor::<T::Acc>::zeros(&attention.out_shape());
        let mut decode = || Cpu::new().decode_into(&decoding, out.view_mut()).map_err(failed);
        decode()?;
        let (times, last) = repeat(args.repeats, &mut decode)?;
        // Of the sums the fastest: what the memory gives when nothing disturbs it.
        let seconds = sums.into_iter().fold(f64::INFINITY, f64::min);
        let yardstick = ((k.len() + v.len()) * size_of::<T>()) as f64 / seconds;
        Ok(Measured { times, yardstick, diagnostics: last.diagnostics })
    }

    /// Queries come from the host and outputs go back to it, which is waited for: some 0.1 ms. `scripts/gpu_decode.py` times the
    /// kernels alone.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self) -> Result<Measured> {
        use flashlla::cuda::DeviceCache;
        let Self { args, q, k, v, batch, context, dim, .. } = self;
        let (batch, context, dim) = (*batch, *context, *dim);
        let kv_heads = kv_heads(&args.decode);
        let cuda = flashlla::Cuda::new().map_err(failed)?;
        // One sequence more, as room for a copy.
        let shape = flashlla::CacheShape {
            sequences: batch + 1,
            kv_heads,
            head_dim: dim,
            value_dim: dim,
            max_len: context,
        };
        let tokens = |data| View::bhnd(data, [1, kv_heads, context, dim]).map_err(failed);
        let each = kv_heads * context * dim;
        let fill = |cache: &mut DeviceCache<T>| -> Result<()> {
            for b in 0..batch {
                let (k, v) = (tokens(&k[b * each..][..each])?, tokens(&v[b * each..][..each])?);
                cache.append_to(b, k, v).map_err(failed)?;
            }
            Ok(())
        };
        let mut contiguous = DeviceCache::<T>::contiguous_on(&cuda, shape).map_err(failed)?;
        fill(&mut contiguous)?;
        let mut copy = || -> Result<()> {
            contiguous.fork(0, batch).map_err(failed)?;
            contiguous.free(batch).map_err(failed)
        };
        copy()?;
        let (copies, ()) = repeat(args.repeats, &mut copy)?;
        let seconds = copies.into_iter().fold(f64::INFINITY, f64::min);
        let yardstick = (2 * 2 * each * size_of::<T>()) as f64 / seconds;
        let cache = match args.decode.page_size {
            None => contiguous,
            Some(size) => {
                drop(contiguous);
                let pages = batch * context.div_ceil(size);
                let mut cache = DeviceCache::<T>::paged_on(&cuda, shape, size, pages).map_err(failed)?;
                fill(&mut cache)?;
                cache
            }
        };
        // The sequence in no use has a query too, which sees nothing.
        let [heads, queries] = [q.shape()[1], q.shape()[2]];
        let mut rows = q.data().to_vec();
        rows.resize(rows.len() + heads * queries * dim, T::default());
        let q = Tensor::new(rows, &[batch + 1, heads, queries, dim]);
        let attention = self.attention(Attention::builder_for_device_cache(&q.view(), &cache))?;
        let mut decode = || cache.decode(&attention, q.view()).map_err(failed);
        decode()?;
        let (times, last) = repeat(args.repeats, &mut decode)?;
        Ok(Measured { times, yardstick, diagnostics: last.state.diagnostics })
    }
}

/// Normally distributed numbers: a block of them, over and over from different places, since drawing each would take minutes.
fn pool<T: Stored>(rng: &mut impl Rng, len: usize) -> Vec<T>
where
    StandardNormal: Distribution<T::Acc>,
{
    const DRAWN: usize = 1 << 18;
    let drawn: Vec<T> =
        rng.sample_iter(StandardNormal).take(DRAWN).map(|x: T::Acc| T::from_real(x)).collect();
    // A stride without a common divisor with the block's length; each round begins one place further.
    (0..len).map(|i| drawn[(i % DRAWN * 7919 + i / DRAWN) % DRAWN]).collect()
}

/// The sum of all numbers, in the widest registers there are: as fast as memory can be read on the threads of the pool.
fn sum<T: Stored>(numbers: &[T]) -> u64 {
    numbers
        .par_chunks(1 << 15)
        .map(|part| {
            // What does not fill a word at the ends is left out.
            let (_, words, _) = bytemuck::pod_align_to::<T, u64>(part);
            words.iter().fold(0u64, |sum, &word| sum.wrapping_add(word))
        })
        .reduce(|| 0, u64::wrapping_add)
}
