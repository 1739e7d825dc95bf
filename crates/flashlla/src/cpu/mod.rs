//! The blockwise CPU engine.
//!
//! A block of query rows against one head is one task; tasks run on rayon's threads. Inside a task everything is products of
//! small tiles (`product.rs`) on keys and values that were laid out for them once (`pack.rs`), with row operations in between
//! (`rowwise.rs`). A block's softmax weights are kept while its solve runs (they are a block's rows × keys, not N × M) unless
//! they outgrow `CACHED_WEIGHTS`; then they are recomputed from `q·k` in every pass. Each block ends its conjugate gradients
//! when all its rows have converged, and rows that are done leave the products.
//!
//! Every number is computed by one task in one order, whichever thread runs it: results do not depend on the thread count.

mod backward;
mod block;
mod cholesky;
mod decode;
mod direct;
mod forward;
mod pack;
mod product;
mod rows;
mod rowwise;
mod simd;
mod solve;
mod tasks;
mod widen;

#[cfg(feature = "cuda")]
pub(crate) use pack::Bad;
pub use simd::SimdReal;
pub use widen::Widen;

use crate::engine::{check_gradients, check_out};
use crate::{
    Decoding, Element, Engine, Error, OtherGradients, Precision, Problem, Real, Result, State, Tensor, View,
    ViewMut,
};
use rows::{Inputs, ReadRows, WriteRows};
use std::sync::atomic::{AtomicBool, Ordering};
use tasks::{BlockReport, Place, Sinks};

/// Every row of numbers is padded to a multiple of this: whole registers on any instruction set.
const LANES: usize = 16;
/// Keys of a tile: with `D = 64` in `f32`, a tile of keys is 16 KiB, a third of a first-level cache.
const TILE: usize = 64;
/// Query rows of a block: a multiple of the products' 6 rows; small enough that few rows wait for the slowest, large enough
/// that reading a tile of keys from the second-level cache costs little.
const BLOCK: usize = 48;
/// The product of a probe's norm and a key's above which a block in `f32` is computed again in `f64`: rounding then shows in the
/// sixth digit.
const HARD: f64 = 512.0;
/// The logit above which `f32` calls are computed in `f64`: weights lose about as many units in the last place.
const LARGE_LOGIT: f64 = 128.0;
/// The most bytes of softmax weights that a block keeps.
const CACHED_WEIGHTS: usize = 16 << 20;

/// The CPU engine: blockwise, multi-threaded (rayon's current thread pool), SIMD chosen at run time.
///
/// ```
/// use flashlla::{Attention, Cpu, Engine, View};
/// let x: Vec<f32> = (0..4 * 8).map(|i| (i as f32).sin()).collect();
/// let x = View::bnd(&x, [1, 4, 8])?;
/// let attention = Attention::builder_for(&x, &x, &x).build()?;
/// let forward = Cpu::new().forward(&attention.problem(x, x, x)?)?;
/// assert_eq!(forward.out.shape(), [1, 1, 4, 8]);
/// # Ok::<(), flashlla::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    arch: pulp::Arch,
    stop: Option<&'static AtomicBool>,
    unit: Option<decode::Unit>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// With the best instruction set that the machine has, and its matrix unit (AMX on Linux) where decoding gains by it.
    pub fn new() -> Self {
        Self { arch: pulp::Arch::new(), stop: None, unit: decode::Unit::get() }
    }

    /// Without the matrix unit, for `f32`'s own rounding where decoding would have 16 bits of each term: errors of some 1e-6 in place
    /// of 1e-5, in 1.3 to 2 times the time. Nothing changes where there is no such unit.
    pub fn without_matrix_unit(self) -> Self {
        Self { unit: None, ..self }
    }

    /// Lets another thread end a call: once `flag` is true no further block of queries or tile of keys is begun, and the call
    /// returns [`Error::Interrupted`] with its outputs written in part. The bits of a call that is not ended are the same.
    pub fn stopped_by(self, flag: &'static AtomicBool) -> Self {
        Self { stop: Some(flag), ..self }
    }

    fn run(&self) -> Run {
        Run { arch: self.arch, stop: self.stop, unit: self.unit }
    }

    /// The instruction set in use: `"avx512"`, `"avx2+fma"`, `"neon"` or `"plain"`.
    pub fn instruction_set(&self) -> &'static str {
        struct Width;
        impl pulp::WithSimd for Width {
            type Output = (usize, usize);
            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) -> (usize, usize) {
                (S::F32_LANES, S::REGISTER_COUNT)
            }
        }
        match self.arch.dispatch(Width).0 {
            16 => "avx512",
            8 => "avx2+fma",
            4 => "neon",
            _ => "plain",
        }
    }
}

/// What every task of a call is told: the instruction set, and whether to go on.
#[derive(Clone, Copy)]
struct Run {
    arch: pulp::Arch,
    stop: Option<&'static AtomicBool>,
    /// A matrix unit that may be used.
    unit: Option<decode::Unit>,
}

impl Run {
    fn goes_on(&self) -> bool {
        !self.stop.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

fn padded(n: usize, multiple: usize) -> usize {
    n.next_multiple_of(multiple)
}

/// Whether a problem is computed in `f64`.
fn in_f64<T: Element>(problem: &Problem<T>) -> bool {
    size_of::<T::Acc>() == 8 || problem.attention().precision() == Precision::High
}

// The engine itself is compiled here, once for each type of arithmetic, and not again in every crate that calls it.
macro_rules! compiled {
    ($t:ident, $forward:ident, $backward:ident) => {
        fn $forward(
            run: Run,
            inputs: &Inputs<$t>,
            places: &[Place],
            sinks: &Sinks<$t>,
        ) -> Result<Vec<BlockReport>> {
            tasks::forward(run, inputs, places, sinks).ok_or(Error::Interrupted)
        }
        fn $backward(
            run: Run,
            inputs: &Inputs<$t>,
            probe: &dyn ReadRows<$t>,
            grad_out: &dyn ReadRows<$t>,
            gradients: [&dyn WriteRows<$t>; 3],
        ) -> Result<(OtherGradients<$t>, f64)> {
            tasks::backward(run, inputs, probe, grad_out, gradients).ok_or(Error::Interrupted)
        }
    };
}
compiled!(f32, forward_f32, backward_f32);
compiled!(f64, forward_f64, backward_f64);

fn rounded<A: Real, B: Real>(tensor: Tensor<A>) -> Tensor<B> {
    let shape = tensor.shape().to_vec();
    Tensor::new(tensor.into_vec().into_iter().map(B::from_real).collect(), &shape)
}

fn rounded_gradients<A: Real, B: Real>(gradients: OtherGradients<A>) -> OtherGradients<B> {
    OtherGradients {
        dridge: rounded(gradients.dridge),
        dscale: B::from_real(gradients.dscale),
        dbias: gradients.dbias.map(rounded),
        dprobe: gradients.dprobe.map(rounded),
        diagnostics: gradients.diagnostics,
    }
}

/// A problem's views, held while they are read in the type of arithmetic.
struct Views<'a, T: Element> {
    problem: &'a Problem<'a, T>,
    qkv: [View<'a, T>; 3],
    bias: Option<View<'a, T::Acc>>,
    probe: Option<View<'a, T::Acc>>,
}

impl<'a, T: Element> Views<'a, T> {
    fn new(problem: &'a Problem<'a, T>) -> Self {
        Self {
            problem,
            qkv: [problem.q(), problem.k(), problem.v()],
            bias: problem.bias(),
            probe: problem.probe(),
        }
    }

    fn inputs<C: Real>(&self) -> Inputs<'_, C> {
        let [q, k, v] = &self.qkv;
        Inputs {
            attention: self.problem.attention(),
            q,
            k,
            v,
            bias: self.bias.as_ref().map(|bias| bias as &dyn ReadRows<C>),
            probe: self.probe.as_ref().map(|probe| probe as &dyn ReadRows<C>),
        }
    }
}

fn is_hard(block: &BlockReport) -> bool {
    // A residual that ends above where it began: there is less in the answer than in none.
    let diverged = block.solved.residual.iter().any(|&residual| residual > 1.0);
    block.reach > HARD || block.largest_logit > LARGE_LOGIT || diverged
}

/// Where a forward's results go, whatever the type of arithmetic.
struct Targets<'a, O, A> {
    out: ViewMut<'a, O>,
    lse: ViewMut<'a, A>,
    key_mean: ViewMut<'a, A>,
    probe: ViewMut<'a, A>,
}

impl<O: Element, A: Real> Targets<'_, O, A> {
    fn sinks<C: Real>(&self) -> Sinks<'_, C> {
        Sinks { out: &self.out, lse: &self.lse, key_mean: &self.key_mean, probe: &self.probe }
    }
}

impl Engine for Cpu {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        check_out(problem, &out)?;
        let a = problem.attention();
        let views = Views::new(problem);
        let places = tasks::places(a);
        let rows = [a.batch(), a.heads(), a.queries()];
        let mut lse = Tensor::zeros(&[rows[0], rows[1], rows[2], 1]);
        let (mut key_mean, mut probe) = (Tensor::zeros(&a.query_shape()), Tensor::zeros(&a.query_shape()));
        let sinks: Targets<O, T::Acc> =
            Targets { out, lse: lse.view_mut(), key_mean: key_mean.view_mut(), probe: probe.view_mut() };
        let mut blocks = if in_f64(problem) {
            forward_f64(self.run(), &views.inputs(), &places, &sinks.sinks())?
        } else {
            forward_f32(self.run(), &views.inputs(), &places, &sinks.sinks())?
        };
        if !in_f64(problem) {
            // With few keys and a small λ the probe is about |k̄ − q| / λ, and single precision no longer resolves what it is
            // multiplied with. Those blocks, mostly a sequence's first, are done again; so are those with very large logits.
            let (hard, again): (Vec<usize>, Vec<Place>) =
                (0..).zip(&places).filter(|&(i, _)| is_hard(&blocks[i])).map(|(i, p)| (i, p.clone())).unzip();
            if !again.is_empty() {
                let done = forward_f64(self.run(), &views.inputs(), &again, &sinks.sinks())?;
                for (i, block) in hard.into_iter().zip(done) {
                    let flop = blocks[i].flop + block.flop;
                    blocks[i] = BlockReport { flop, ..block };
                }
            }
        }
        let diagnostics = tasks::gathered(blocks.into_iter().map(|block| (block.solved, block.flop)));
        Ok(State { lse: Tensor::new(lse.into_vec(), &rows), key_mean, probe, diagnostics })
    }

    fn decode_into<T: Element, O: Element>(
        &self,
        decoding: &Decoding<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        decode::decode_into(self.run(), decoding, out)
    }

    fn backward_into<T: Element, G: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        state: &State<T::Acc>,
        grad_out: View<G>,
        dq: ViewMut<O>,
        dk: ViewMut<O>,
        dv: ViewMut<O>,
    ) -> Result<OtherGradients<T::Acc>> {
        check_gradients(problem, state, &grad_out, [&dq, &dk, &dv])?;
        let (views, probe) = (Views::new(problem), state.probe.view());
        let gradients: [&ViewMut<O>; 3] = [&dq, &dk, &dv];
        let precise = || {
            let gradients = gradients.map(|view| view as &dyn WriteRows<f64>);
            Ok(rounded_gradients(backward_f64(self.run(), &views.inputs(), &probe, &grad_out, gradients)?.0))
        };
        if in_f64(problem) {
            return precise();
        }
        let single = gradients.map(|view| view as &dyn WriteRows<f32>);
        let (other, largest_logit) = backward_f32(self.run(), &views.inputs(), &probe, &grad_out, single)?;
        if largest_logit <= LARGE_LOGIT {
            return Ok(rounded_gradients(other));
        }
        let mut again: OtherGradients<T::Acc> = precise()?;
        again.diagnostics.flop += other.diagnostics.flop; // The first attempt was work too, as in the forward.
        Ok(again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attention;

    #[test]
    fn a_call_ends_when_it_is_told_to() {
        static STOP: AtomicBool = AtomicBool::new(false);
        let x: Vec<f32> = (0..200 * 8).map(|i| (i as f32).sin()).collect();
        let x = View::bnd(&x, [1, 200, 8]).unwrap();
        let attention = Attention::builder_for(&x, &x, &x).build().unwrap();
        let problem = attention.problem(x, x, x).unwrap();
        let cpu = Cpu::new().stopped_by(&STOP);
        let forward = cpu.forward(&problem).unwrap();
        assert_eq!(forward, Cpu::new().forward(&problem).unwrap());
        STOP.store(true, Ordering::Relaxed);
        assert_eq!(cpu.forward(&problem).unwrap_err(), Error::Interrupted);
        assert_eq!(cpu.backward(&problem, &forward.state, x).unwrap_err(), Error::Interrupted);
    }

    /// Every instruction set that this machine can run.
    pub fn architectures() -> Vec<pulp::Arch> {
        let mut all = vec![pulp::Arch::Scalar, pulp::Arch::new()];
        #[cfg(target_arch = "x86_64")]
        if let Some(v3) = pulp::x86::V3::try_new() {
            all.push(pulp::Arch::V3(v3));
        }
        all
    }
}
