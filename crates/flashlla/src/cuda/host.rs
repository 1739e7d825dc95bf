//! The engine's interface for tensors in host memory: upload, compute, download.

use super::driver::{Memory, Stream};
use super::spoilt::{Spoilt, bad_tokens, rows, seen_by_marked};
use super::{
    BackwardPlan, BackwardPointers, Cuda, DeviceBias, DeviceView, ForwardPlan, ForwardPointers, PlanOptions,
    lock,
};
use crate::engine::{check_gradients, check_out};
use crate::{
    Attention, Decoding, Diagnostics, Element, Engine, Gradients, OtherGradients, Precision, Problem, Real,
    Result, Solver, State, Tensor, View, ViewMut,
};
use std::borrow::Cow;

/// The elements of a view as `[batch, head, token, dim]` in row-major order.
pub(super) fn contiguous<'a, T: Element>(view: View<'a, T>) -> Cow<'a, [T]> {
    let [b, h, n, d] = view.shape();
    let len = b * h * n * d;
    let expected = [h * n * d, n * d, d, 1];
    let in_place = (0..4).all(|i| view.shape()[i] <= 1 || view.strides()[i] == expected[i] as isize);
    if in_place && len > 0 {
        // SAFETY: a view's elements are borrowed for 'a; with these strides they are `len` neighbours from the first on.
        return Cow::Borrowed(unsafe { std::slice::from_raw_parts(view.as_ptr(), len) });
    }
    let mut data = Vec::with_capacity(len);
    for batch in 0..b {
        for head in 0..h {
            for token in 0..n {
                view.row(batch, head, token).for_each(|_, x| data.push(x));
            }
        }
    }
    Cow::Owned(data)
}

/// A contiguous tensor on the device.
pub(super) fn device_view(memory: &Memory, [_, h, n, d]: [usize; 4]) -> DeviceView {
    DeviceView { ptr: memory.ptr(), strides: [(h * n * d) as i64, (n * d) as i64, d as i64] }
}

/// The rows of `[.., N, D]` in those of `[.., N', D']`, zeros elsewhere.
fn padded<A: Real>(rows: &[A], [b, h, n, d]: [usize; 4], [_, _, np, dp]: [usize; 4]) -> Vec<f32> {
    let mut wide = vec![0.0; b * h * np * dp];
    for (head, rows) in rows.chunks_exact((n * d).max(1)).enumerate() {
        for (i, row) in rows.chunks_exact(d).enumerate() {
            let to = &mut wide[(head * np + i) * dp..][..d];
            to.iter_mut().zip(row).for_each(|(to, x)| *to = x.as_f32());
        }
    }
    wide
}

/// The opposite.
fn cropped<A: Real>(wide: &[f32], shape @ [_, _, n, d]: [usize; 4], [_, _, np, dp]: [usize; 4]) -> Tensor<A> {
    let rows = wide.chunks_exact((np * dp).max(1)).flat_map(|head| head.chunks_exact(dp).take(n));
    Tensor::new(rows.flat_map(|row| row[..d].iter().map(|&x| A::of_f32(x))).collect(), &shape)
}

/// Device memory for the time of one call. The context must be current.
pub(super) struct Room<'a> {
    context: &'a super::Context,
    stream: &'a Stream,
}

impl<'a> Room<'a> {
    pub fn new(context: &'a super::Context, stream: &'a Stream) -> Self {
        Self { context, stream }
    }

    /// A tensor, contiguous.
    pub fn tensor<T: Element>(&self, view: View<T>) -> Result<(Memory<'a>, DeviceView)> {
        let memory = self.holding(&contiguous(view))?;
        let place = device_view(&memory, view.shape());
        Ok((memory, place))
    }

    pub fn empty<T>(&self, len: usize) -> Result<Memory<'a>> {
        Memory::new(self.context, self.stream.raw(), len * size_of::<T>())
    }

    pub fn holding<T: Copy>(&self, data: &[T]) -> Result<Memory<'a>> {
        let memory = self.empty::<T>(data.len())?;
        memory.upload(data)?;
        Ok(memory)
    }

    /// What the memory holds when all that is in the stream is done. Waits for that.
    pub fn read<T: Element>(&self, memory: &Memory, len: usize) -> Result<Vec<T>> {
        let mut data = vec![T::default(); len];
        // SAFETY: the vector stays where it is until the stream has been synchronised, right below.
        let copied = unsafe { memory.download(&mut data) };
        self.stream.synchronize().and(copied)?;
        Ok(data)
    }
}

/// A problem's inputs, contiguous, in the type that the kernels read.
struct Inputs<'a, T: Element, S: Element> {
    problem: &'a Problem<'a, T>,
    q: Cow<'a, [S]>,
    k: Cow<'a, [S]>,
    v: Cow<'a, [S]>,
    /// `[B or 1, HQ or 1, M]` and the strides of the first two.
    bias: Option<(Vec<f32>, [i32; 2])>,
}

impl<'a, T: Element> Inputs<'a, T, T> {
    fn new(problem: &'a Problem<'a, T>) -> Self {
        Self::of(problem, contiguous)
    }
}

impl<'a, T: Element> Inputs<'a, T, f32> {
    /// The same numbers in `f32`, for outputs in another type than the inputs': the kernels write the type that they read.
    fn widened(problem: &'a Problem<'a, T>) -> Self {
        Self::of(problem, |view| contiguous(view).iter().map(|x| x.to_real()).collect())
    }
}

impl<'a, T: Element, S: Element> Inputs<'a, T, S> {
    fn of(problem: &'a Problem<'a, T>, take: impl Fn(View<'a, T>) -> Cow<'a, [S]>) -> Self {
        let a = problem.attention();
        let bias = problem.bias().map(|view| {
            let [b, h, m, _] = view.shape();
            let heads = if h == 1 { 1 } else { a.heads() };
            let mut values = Vec::with_capacity(b * heads * m);
            for batch in 0..b {
                for head in 0..heads {
                    let (batch, head) = a.bias_place(view.shape(), batch, head);
                    values.extend((0..m).map(|j| view.at(batch, head, j, 0).to_real::<f32>()));
                }
            }
            let stride = |size: usize, by: usize| if size == 1 { 0 } else { by as i32 };
            (values, [stride(b, heads * m), stride(heads, m)])
        });
        Self { problem, q: take(problem.q()), k: take(problem.k()), v: take(problem.v()), bias }
    }

    fn spoilt(&self) -> Spoilt {
        let bias = self.bias.as_ref().map(|(values, strides)| (&values[..], *strides));
        Spoilt::new(self.problem.attention(), [&self.q, &self.k, &self.v], bias)
    }

    fn options(&self) -> PlanOptions {
        PlanOptions { bias: self.bias.is_some(), probe: self.problem.probe().is_some() }
    }

    fn device_bias(&self, memory: &Option<Memory>) -> Option<DeviceBias> {
        let ((_, strides), memory) = self.bias.as_ref().zip(memory.as_ref())?;
        Some(DeviceBias { ptr: memory.ptr(), strides: *strides })
    }

    /// Uploads, computes, downloads.
    fn forward(&self, plan: &ForwardPlan, stream: &Stream) -> Result<(Vec<S>, State<T::Acc>)> {
        let a = self.problem.attention();
        let context = plan.context();
        let _entered = context.enter()?;
        let room = Room::new(context, stream);
        let count = a.batch() * a.heads() * a.queries();
        let state_shape = plan.state_shape();
        let state_len: usize = state_shape.iter().product();

        let (q, k, v) = (room.holding(&self.q)?, room.holding(&self.k)?, room.holding(&self.v)?);
        let bias = self.bias.as_ref().map(|(values, _)| room.holding(values)).transpose()?;
        let given = self.problem.probe();
        let probe = match given {
            Some(view) => room.holding(&padded(&contiguous(view), a.query_shape(), state_shape))?,
            None => room.empty::<f32>(state_len)?,
        };
        let out = room.empty::<S>(count * a.value_dim())?;
        let (lse, key_mean) = (room.empty::<f32>(count)?, room.empty::<f32>(state_len)?);
        let (iterations, residual) = (room.empty::<u32>(count)?, room.empty::<f32>(count)?);
        let pointers = ForwardPointers {
            q: device_view(&q, a.query_shape()),
            k: device_view(&k, a.key_shape()),
            v: device_view(&v, a.value_shape()),
            out: device_view(&out, a.out_shape()),
            bias: self.device_bias(&bias),
            ridge: None,
            probe: given.is_some().then_some(probe.ptr()),
            lse: Some(lse.ptr()),
            key_mean: Some(key_mean.ptr()),
            probe_out: given.is_none().then_some(probe.ptr()),
            diagnostics: Some([iterations.ptr(), residual.ptr()]),
        };
        // SAFETY: the stream is of this GPU, and all memory was just taken in it with the sizes that the plan has. What is
        // not finite is dealt with on the host, where a bias that hides it is known.
        unsafe { plan.run_parts(stream.raw(), &pointers, None, false)? };
        let out = room.read(&out, count * a.value_dim())?;
        let shape = [a.batch(), a.heads(), a.queries()];
        let lse = room.read::<f32>(&lse, count)?.into_iter().map(T::Acc::of_f32).collect();
        let mean = room.read::<f32>(&key_mean, state_len)?;
        let probe = match given {
            Some(view) => Tensor::new(contiguous(view).into_owned(), &a.query_shape()),
            None => cropped(&room.read::<f32>(&probe, state_len)?, a.query_shape(), state_shape),
        };
        let diagnostics = match given {
            Some(_) => {
                Diagnostics { iterations: vec![0; count], residual: vec![0.0; count], ..Default::default() }
            }
            None => self.diagnostics(&room, &iterations, &residual)?,
        };
        let key_mean = cropped(&mean, a.query_shape(), state_shape);
        Ok((out, State { lse: Tensor::new(lse, &shape), key_mean, probe, diagnostics }))
    }

    fn diagnostics(&self, room: &Room, iterations: &Memory, residual: &Memory) -> Result<Diagnostics> {
        let a = self.problem.attention();
        let len = a.batch() * a.heads() * a.queries();
        // Counts are integers under the type that downloads know.
        let iterations = room.read::<f32>(iterations, len)?.into_iter().map(f32::to_bits).collect();
        Ok(Diagnostics { iterations, residual: room.read(residual, len)?, direct: 0, flop: 0 })
    }

    /// Uploads, computes, downloads; gradients as the kernels leave them, those of ridge, scale and bias summed.
    fn backward<G: Element>(
        &self,
        plan: &BackwardPlan,
        stream: &Stream,
        state: &State<T::Acc>,
        grad_out: &[G],
        silent: &[bool],
    ) -> Result<Gradients<f32>> {
        let a = self.problem.attention();
        let context = plan.context();
        let _entered = context.enter()?;
        let room = Room::new(context, stream);
        let count = a.batch() * a.heads() * a.queries();
        let state_shape = plan.state_shape();
        let state_len: usize = state_shape.iter().product();

        let (q, k, v) = (room.holding(&self.q)?, room.holding(&self.k)?, room.holding(&self.v)?);
        let bias = self.bias.as_ref().map(|(values, _)| room.holding(values)).transpose()?;
        let grad = room.holding(grad_out)?;
        // A query that is out of it has weights of 0 (its lse is infinite) and no probe.
        let zip = state.lse.data().iter().zip(silent);
        let lse: Vec<f32> = zip.map(|(x, &silent)| if silent { f32::INFINITY } else { x.as_f32() }).collect();
        let lse = room.holding(&lse)?;
        let kept = |tensor: &Tensor<T::Acc>| {
            let mut data = tensor.data().to_vec();
            for (row, _) in data.chunks_exact_mut(a.head_dim()).zip(silent).filter(|(_, silent)| **silent) {
                row.fill(T::Acc::ZERO);
            }
            room.holding(&padded(&data, a.query_shape(), state_shape))
        };
        let (key_mean, probe) = (kept(&state.key_mean)?, kept(&state.probe)?);
        let (keys, values) = (a.batch() * a.kv_heads() * a.keys(), a.batch() * a.heads() * a.keys());
        let dq = room.empty::<f32>(count * a.head_dim())?;
        let (dk, dv) = (room.empty::<f32>(keys * a.head_dim())?, room.empty::<f32>(keys * a.value_dim())?);
        let (dridge, dscale) = (room.empty::<f32>(count)?, room.empty::<f32>(count)?);
        let dbias = bias.as_ref().map(|_| room.empty::<f32>(values)).transpose()?;
        let covariance = room.empty::<f32>(state_len)?;
        let (iterations, residual) = (room.empty::<u32>(count)?, room.empty::<f32>(count)?);
        let pointers = BackwardPointers {
            q: device_view(&q, a.query_shape()),
            k: device_view(&k, a.key_shape()),
            v: device_view(&v, a.value_shape()),
            bias: self.device_bias(&bias),
            ridge: None,
            grad_out: device_view(&grad, a.out_shape()),
            lse: lse.ptr(),
            key_mean: key_mean.ptr(),
            probe: probe.ptr(),
            dq: device_view(&dq, a.query_shape()),
            dk: device_view(&dk, a.key_shape()),
            dv: device_view(&dv, a.value_shape()),
            dridge: dridge.ptr(),
            dscale: dscale.ptr(),
            dbias: dbias.as_ref().map(Memory::ptr),
            covariance: Some(covariance.ptr()),
            diagnostics: Some([iterations.ptr(), residual.ptr()]),
        };
        // SAFETY: as in the forward.
        unsafe { plan.run(stream.raw(), &pointers, None)? };

        let given = self.problem.probe().is_some();
        let tensor = |memory: &Memory, shape: [usize; 4]| -> Result<Tensor<f32>> {
            Ok(Tensor::new(room.read(memory, shape.iter().product())?, &shape))
        };
        let mut ridge_sums = vec![0f64; a.ridge().values().len()];
        if !given {
            for ((b, h, i), x) in rows(a).zip(room.read::<f32>(&dridge, count)?) {
                ridge_sums[a.ridge().index(b, h, i)] += f64::from(x);
            }
        }
        let scale_sum: f64 = room.read::<f32>(&dscale, count)?.into_iter().map(f64::from).sum();
        let dbias = match (self.problem.bias(), &dbias) {
            (Some(view), Some(memory)) => {
                let shape = view.shape();
                let mut sums = vec![0f64; shape.iter().product()];
                for (at, x) in room.read::<f32>(memory, values)?.into_iter().enumerate() {
                    let (row, j) = (at / a.keys(), at % a.keys());
                    let (b, h) = a.bias_place(shape, row / a.heads(), row % a.heads());
                    sums[(b * shape[1] + h) * a.keys() + j] += f64::from(x);
                }
                Some(Tensor::new(sums.into_iter().map(|x| x as f32).collect(), &shape))
            }
            _ => None,
        };
        let dprobe = match given {
            true => {
                let c = room.read::<f32>(&covariance, state_len)?;
                let mut dprobe = cropped::<f32>(&c, a.query_shape(), state_shape);
                dprobe.data_mut().iter_mut().for_each(|x| *x = 0.0 - *x);
                Some(dprobe)
            }
            false => None,
        };
        let diagnostics = match given || count == 0 {
            true => {
                Diagnostics { iterations: vec![0; count], residual: vec![0.0; count], ..Default::default() }
            }
            false => self.diagnostics(&room, &iterations, &residual)?,
        };
        let mut dq = tensor(&dq, a.query_shape())?;
        if count == 0 {
            dq.data_mut().fill(0.0);
        }
        Ok(Gradients {
            dq,
            dk: tensor(&dk, a.key_shape())?,
            dv: tensor(&dv, a.value_shape())?,
            other: OtherGradients {
                dridge: Tensor::new(ridge_sums.into_iter().map(|x| x as f32).collect(), a.ridge().shape()),
                dscale: scale_sum as f32,
                dbias,
                dprobe,
                diagnostics,
            },
        })
    }
}

/// Floating-point operations of a pass's matrix products over the pairs that the mask leaves: `fixed` numbers of the
/// products' common side for every pair, and `step` more for every step of the solve.
fn flop(a: &Attention, iterations: &[u32], fixed: usize, step: usize) -> u64 {
    let pairs: Vec<u64> = (0..a.queries()).map(|i| a.mask().visible(i, a.keys()).count() as u64).collect();
    let row = |(row, &steps): (usize, &u32)| {
        2 * pairs[row % pairs.len()] * (fixed as u64 + u64::from(steps) * step as u64)
    };
    iterations.iter().enumerate().map(row).sum()
}

/// Writes contiguous results into a view.
pub(super) fn write<S: Element, O: Element>(from: &[S], to: &ViewMut<O>) {
    let [_, heads, n, d] = to.shape();
    let mut values = vec![0f32; d];
    for (row, from) in from.chunks_exact(d).enumerate() {
        values.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_real());
        // SAFETY: the view is exclusively this thread's.
        unsafe { to.write_row(row / n / heads, row / n % heads, row % n, &values) };
    }
}

/// Sets rows of `width` numbers.
fn fill_rows<A: Element>(data: &mut [A], width: usize, rows: impl IntoIterator<Item = bool>, value: A) {
    for (row, _) in data.chunks_exact_mut(width).zip(rows).filter(|(_, fill)| *fill) {
        row.fill(value);
    }
}

impl Cuda {
    /// The outputs in the type of the inputs as they are uploaded.
    fn compute<T: Element, S: Element>(&self, inputs: &Inputs<T, S>) -> Result<(Vec<S>, State<T::Acc>)> {
        let problem = inputs.problem;
        let a = problem.attention();
        let high = a.precision() == Precision::High;
        let plan = ForwardPlan::new::<S>(&self.inner, a, inputs.options(), high)?;
        let stream = self.inner.stream()?;
        let (mut out, mut state) = inputs.forward(&plan, &stream)?;
        if matches!(a.solver(), Solver::Auto { .. })
            && !high
            && plan.unconverged(&state.diagnostics)
            && let Ok(plan) = ForwardPlan::new::<S>(&self.inner, a, inputs.options(), true)
        {
            (out, state) = inputs.forward(&plan, &stream)?;
        }
        lock(&self.inner.streams).push(stream);

        let (d, dv) = (a.head_dim(), a.value_dim());
        // Weights: qk, pk. A step: qk, dk, wk. Outputs: qk, xk, wv.
        state.diagnostics.flop = flop(a, &state.diagnostics.iterations, 4 * d + dv, 3 * d);

        // Rows that see nothing are blank; rows that see something that is not finite are not numbers.
        let spoilt = inputs.spoilt();
        let blind: Vec<bool> = rows(a).map(|(_, _, i)| a.mask().visible(i, a.keys()).count() == 0).collect();
        let bad = rows(a).map(|(b, h, i)| spoilt.at(a, b, h, i) != [false, false]);
        fill_rows(&mut out, dv, bad, S::from_real(f32::NAN));
        fill_rows(&mut out, dv, blind.iter().copied(), S::default());
        fill_rows(state.lse.data_mut(), 1, blind.iter().copied(), T::Acc::NEG_INFINITY);
        fill_rows(state.key_mean.data_mut(), d, blind.iter().copied(), T::Acc::ZERO);
        if problem.probe().is_none() {
            fill_rows(state.probe.data_mut(), d, blind.iter().copied(), T::Acc::ZERO);
        }
        for (row, _) in blind.iter().enumerate().filter(|(_, blind)| **blind) {
            (state.diagnostics.iterations[row], state.diagnostics.residual[row]) = (0, 0.0);
        }
        Ok((out, state))
    }
}

impl Engine for Cuda {
    fn forward_into<T: Element, O: Element>(
        &self,
        problem: &Problem<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        check_out(problem, &out)?;
        super::plan::dtype::<T>()?;
        if O::NAME == T::NAME {
            let (values, state) = self.compute(&Inputs::new(problem))?;
            write(&values, &out);
            return Ok(state);
        }
        let (values, state) = self.compute(&Inputs::widened(problem))?;
        write(&values, &out);
        Ok(state)
    }

    fn decode_into<T: Element, O: Element>(
        &self,
        decoding: &Decoding<T>,
        out: ViewMut<O>,
    ) -> Result<State<T::Acc>> {
        super::host_decode::decode_into(self, decoding, out)
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
        let a = problem.attention();
        let inputs = Inputs::new(problem);
        let high = a.precision() == Precision::High;
        let plan = BackwardPlan::new::<T, G, f32>(&self.inner, a, inputs.options(), high)?;
        let grad_out = contiguous(grad_out);

        // Queries whose own row, or a key they see, is not finite are out of every product; a value spoils less.
        let spoilt = inputs.spoilt();
        let bad_grad = bad_tokens(&grad_out, a.out_shape());
        let finite = |tensor: &Tensor<T::Acc>, row: usize, width: usize| {
            tensor.data()[row * width..][..width].iter().all(|x| x.is_finite())
        };
        let mut marks = vec![[false; 2]; rows(a).count()];
        for (row, (b, h, i)) in rows(a).enumerate() {
            let [keys, values] = spoilt.at(a, b, h, i);
            // Without a key (none visible, or all hidden by their bias) there is nothing to spoil.
            let lse = state.lse.data()[row];
            let sees = lse != T::Acc::NEG_INFINITY && a.mask().visible(i, a.keys()).count() > 0;
            let own = !lse.is_finite()
                || bad_grad[b * a.heads() + h].at(i)
                || !finite(&state.probe, row, a.head_dim())
                || !finite(&state.key_mean, row, a.head_dim());
            let silent = keys || sees && own;
            marks[row] = [silent || sees && values, silent];
        }
        let silent: Vec<bool> = marks.iter().map(|m| m[1]).collect();
        let spoilt: Vec<bool> = marks.iter().map(|m| m[0]).collect();

        let stream = self.inner.stream()?;
        let mut gradients = inputs.backward(&plan, &stream, state, &grad_out, &silent)?;
        if matches!(a.solver(), Solver::Auto { .. })
            && !high
            && plan.unconverged(&gradients.other.diagnostics)
            && let Ok(plan) = BackwardPlan::new::<T, G, f32>(&self.inner, a, inputs.options(), true)
        {
            gradients = inputs.backward(&plan, &stream, state, &grad_out, &silent)?;
        }
        lock(&self.inner.streams).push(stream);

        let other = &mut gradients.other;
        let (d, value_dim) = (a.head_dim(), a.value_dim());
        // c: qk, gv, wk. A step: 3 D. By query: qk, gv, xk, yk, wk. By key: qk, gv, xk, yk, three of dk, dv.
        let (steps, fixed) = (&other.diagnostics.iterations, 13 * d + 4 * value_dim);
        other.diagnostics.flop = flop(a, steps, fixed, 3 * d);
        let blind = || rows(a).map(|(_, _, i)| a.mask().visible(i, a.keys()).count() == 0);
        fill_rows(gradients.dq.data_mut(), d, blind(), 0.0);
        fill_rows(gradients.dq.data_mut(), d, spoilt.iter().copied(), f32::NAN);
        if let Some(dprobe) = &mut other.dprobe {
            fill_rows(dprobe.data_mut(), d, blind(), 0.0);
            fill_rows(dprobe.data_mut(), d, spoilt.iter().copied(), f32::NAN);
        }
        if spoilt.contains(&true) {
            other.dscale = f32::NAN;
            for ((b, h, i), _) in rows(a).zip(&spoilt).filter(|(_, spoilt)| **spoilt) {
                if problem.probe().is_none() {
                    other.dridge.data_mut()[a.ridge().index(b, h, i)] = f32::NAN;
                }
            }
            let keys = seen_by_marked(a, &spoilt);
            fill_rows(gradients.dk.data_mut(), d, keys.iter().copied(), f32::NAN);
            if let (Some(dbias), Some(view)) = (&mut other.dbias, problem.bias()) {
                for (at, _) in keys.iter().enumerate().filter(|(_, spoilt)| **spoilt) {
                    let (head, j) = (at / a.keys(), at % a.keys());
                    for in_group in 0..a.group() {
                        let h = head % a.kv_heads() * a.group() + in_group;
                        let (b, h) = a.bias_place(view.shape(), head / a.kv_heads(), h);
                        dbias.data_mut()[(b * view.shape()[1] + h) * a.keys() + j] = f32::NAN;
                    }
                }
            }
            let keys = seen_by_marked(a, &silent);
            fill_rows(gradients.dv.data_mut(), value_dim, keys, f32::NAN);
        }
        write(gradients.dq.data(), &dq);
        write(gradients.dk.data(), &dk);
        write(gradients.dv.data(), &dv);
        let wide = |tensor: Tensor<f32>| {
            let shape = tensor.shape().to_vec();
            Tensor::new(tensor.into_vec().into_iter().map(T::Acc::of_f32).collect(), &shape)
        };
        let other = gradients.other;
        Ok(OtherGradients {
            dridge: wide(other.dridge),
            dscale: T::Acc::of_f32(other.dscale),
            dbias: other.dbias.map(wide),
            dprobe: other.dprobe.map(wide),
            diagnostics: other.diagnostics,
        })
    }
}
