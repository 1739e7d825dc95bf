//! Decoding with queries in host memory: from caches there, which are gathered and uploaded with every call, and from those on the GPU.

use super::cache::DeviceCache;
use super::decode::{DecodePlan, DecodePointers, DevicePool, PoolLayout};
use super::driver::Memory;
use super::host::{Room, contiguous, device_view, write};
use super::{Cuda, lock};
use crate::attention::expect_shape;
use crate::decoding::{by_forward, check_out};
use crate::{
    Attention, Decoding, Diagnostics, Element, Error, Forward, Real, Result, State, Tensor, View, ViewMut,
};

/// Rows of `[.., dim]` with zeros behind up to `wide`.
fn widened<T: Element>(rows: Vec<T>, dim: usize, wide: usize) -> Vec<T> {
    if dim == wide {
        return rows;
    }
    let mut all = Vec::with_capacity(rows.len() / dim * wide);
    for row in rows.chunks_exact(dim) {
        all.extend_from_slice(row);
        all.resize(all.len() + wide - dim, T::default());
    }
    all
}

/// The tokens of a cache as `[B, H, longest, wide]`, zeros where there are none.
fn gathered<T: Element, S: Element>(
    decoding: &Decoding<T>,
    pool: View<T>,
    longest: usize,
    wide: usize,
    store: impl Fn(T) -> S,
) -> Vec<S> {
    let paging = decoding.cache().paging();
    let heads = pool.shape()[1];
    let mut rows = vec![S::default(); paging.sequences() * heads * longest * wide];
    for (b, &length) in paging.lengths().iter().enumerate() {
        for (head, token) in (0..heads).flat_map(|head| (0..length).map(move |token| (head, token))) {
            let (page, slot) = paging.place(b, token);
            let to = &mut rows[((b * heads + head) * longest + token) * wide..][..wide];
            pool.row(page, head, slot).for_each(|d, x| to[d] = store(x));
        }
    }
    rows
}

/// What one decoding on the GPU needs beside its plan.
struct Call<S> {
    q: Vec<S>,
    probe: Option<Vec<f32>>,
    pools: [DevicePool; 2],
    table: Option<u64>,
    lengths: u64,
    longest: usize,
}

impl<S: Element> Call<S> {
    /// Outputs and state, in the dims of the plan.
    fn run<A: Real>(
        self,
        plan: &DecodePlan,
        room: &Room,
        stream: super::RawStream,
    ) -> Result<(Vec<S>, State<A>)> {
        let a = plan.attention();
        let count = a.batch() * a.heads() * a.queries();
        let [q_shape, out_shape] = [a.query_shape(), a.out_shape()];
        let q = room.holding(&self.q)?;
        let given = self.probe.as_ref().map(|probe| room.holding(probe)).transpose()?;
        let out = room.empty::<S>(out_shape.iter().product())?;
        let (lse, key_mean) = (room.empty::<f32>(count)?, room.empty::<f32>(q_shape.iter().product())?);
        let probe = room.empty::<f32>(q_shape.iter().product())?;
        let (iterations, residual) = (room.empty::<u32>(count)?, room.empty::<f32>(count)?);
        let pointers = DecodePointers {
            q: device_view(&q, q_shape),
            k: self.pools[0],
            v: self.pools[1],
            table: self.table,
            lengths: self.lengths,
            out: device_view(&out, out_shape),
            ridge: None,
            scale: None,
            probe: given.as_ref().map(Memory::ptr),
            lse: Some(lse.ptr()),
            state: Some([key_mean.ptr(), probe.ptr()]),
            diagnostics: Some([iterations.ptr(), residual.ptr()]),
        };
        // SAFETY: all was allocated in these sizes, and lives until the reads below have waited for the stream.
        unsafe { plan.run(stream, &pointers, self.longest, None)? };
        let values = |memory: &Memory, shape: &[usize]| -> Result<Tensor<A>> {
            let data = room.read::<f32>(memory, shape.iter().product())?;
            Ok(Tensor::new(data.into_iter().map(A::of_f32).collect(), shape))
        };
        let state = State {
            lse: values(&lse, &q_shape[..3])?,
            key_mean: values(&key_mean, &q_shape)?,
            probe: match &self.probe {
                Some(given) => Tensor::new(given.iter().map(|&x| A::of_f32(x)).collect(), &q_shape),
                None => values(&probe, &q_shape)?,
            },
            diagnostics: Diagnostics {
                // The elements are integers under the type that downloads know.
                iterations: room.read::<f32>(&iterations, count)?.into_iter().map(f32::to_bits).collect(),
                residual: room.read(&residual, count)?,
                direct: 0,
                flop: 0,
            },
        };
        Ok((room.read(&out, out_shape.iter().product())?, state))
    }
}

/// The first `dim` of `wide` columns.
fn narrowed<A: Real>(tensor: Tensor<A>, [b, h, n, wide]: [usize; 4], dim: usize) -> Tensor<A> {
    if dim == wide {
        return tensor;
    }
    let rows = tensor.data().chunks_exact(wide).flat_map(|row| row[..dim].iter().copied());
    Tensor::new(rows.collect(), &[b, h, n, dim])
}

/// Logits, and both sums of products, over what is seen.
fn flop(a: &Attention, pairs: usize) -> u64 {
    2 * pairs as u64 * (a.head_dim() * (1 + a.head_dim() + a.value_dim())) as u64
}

/// From a cache in host memory.
pub fn decode_into<T: Element, O: Element>(
    cuda: &Cuda,
    decoding: &Decoding<T>,
    out: ViewMut<O>,
) -> Result<State<T::Acc>> {
    check_out(decoding, &out)?;
    super::plan::dtype::<T>()?;
    let a = decoding.attention();
    let longest = decoding.cache().lengths().iter().copied().max().unwrap_or(0);
    let whole = |dim: usize| dim.next_multiple_of(8);
    // What the kernels of decoding do not know, a forward does; and that says what is not allowed.
    let widest = cuda.inner.bundle.head_dims(&cuda.inner.architecture, "lla_decode_merge");
    let fits = widest.last().is_some_and(|&w| whole(a.head_dim().max(a.value_dim())) <= w);
    let direct = matches!(a.solver(), crate::Solver::Direct);
    if !fits || direct || longest == 0 || decoding.bias().is_some() || a.mask().is_leave_one_out() {
        return by_forward(cuda, decoding, out);
    }
    let (values, mut state) = if O::NAME == T::NAME {
        let (values, state) = gather_and_run(cuda, decoding, longest, |x| x)?;
        (values.iter().map(|x| x.to_real::<f32>()).collect::<Vec<f32>>(), state)
    } else {
        // The kernels write the type that they read.
        gather_and_run::<T, f32>(cuda, decoding, longest, |x| x.to_real())?
    };
    if values.iter().any(|x| x.is_nan()) {
        // Something is not finite, or beyond fp16 beside the rest: a forward tells which, and what is right.
        return by_forward(cuda, decoding, out);
    }
    write(&values, &out);
    let rows = (0..a.batch()).flat_map(|b| (0..a.queries()).map(move |i| (b, i)));
    let pairs: usize = rows.map(|(b, i)| decoding.visible(b, i).count()).sum();
    state.diagnostics.flop = flop(a, a.heads() * pairs);
    Ok(state)
}

fn gather_and_run<T: Element, S: Element>(
    cuda: &Cuda,
    decoding: &Decoding<T>,
    longest: usize,
    store: impl Fn(T) -> S + Copy,
) -> Result<(Vec<S>, State<T::Acc>)> {
    let a = decoding.attention();
    let (d, dv) = (a.head_dim(), a.value_dim());
    let (wide, wide_v) = (d.next_multiple_of(8), dv.next_multiple_of(8));
    let same = Attention::builder()
        .batch(a.batch())
        .heads(a.heads())
        .kv_heads(a.kv_heads())
        .queries(a.queries())
        .keys(longest)
        .head_dim(wide)
        .value_dim(wide_v)
        .mask(a.mask().clone())
        .scale(a.scale())
        .ridge(a.ridge().clone())
        .solver(a.solver())
        .precision(a.precision())
        .build()?;
    let layout = PoolLayout { pages: a.batch(), page_size: longest, paged: false };
    let plan = cuda.decode_plan::<S>(&same, layout)?;
    let keys = gathered(decoding, decoding.cache().k(), longest, wide, store);
    let values = gathered(decoding, decoding.cache().v(), longest, wide_v, store);
    let lengths: Vec<i32> = decoding.cache().lengths().iter().map(|&n| n as i32).collect();
    let q: Vec<S> = contiguous(decoding.q()).iter().map(|&x| store(x)).collect();
    let probe = decoding.probe().map(|probe| {
        let rows = contiguous(probe).iter().map(|x| x.to_real::<f32>()).collect();
        widened(rows, d, wide)
    });

    let stream = cuda.inner.stream()?;
    let result = {
        let _entered = cuda.inner.context.enter()?;
        let room = Room::new(&cuda.inner.context, &stream);
        let (k, v) = (room.holding(&keys)?, room.holding(&values)?);
        let lengths = room.holding(&lengths)?;
        let pool = |memory: &Memory, dim: usize| {
            let head = (longest * dim) as i64;
            DevicePool { ptr: memory.ptr(), strides: [head * a.kv_heads() as i64, head, dim as i64] }
        };
        let call = Call {
            q: widened(q, d, wide),
            probe,
            pools: [pool(&k, wide), pool(&v, wide_v)],
            table: None,
            lengths: lengths.ptr(),
            longest,
        };
        call.run::<T::Acc>(&plan, &room, stream.raw())
    };
    lock(&cuda.inner.streams).push(stream);
    let (out, mut state) = result?;
    let shape = plan.attention().query_shape();
    state.key_mean = narrowed(state.key_mean, shape, d);
    state.probe = narrowed(state.probe, shape, d);
    if dv < wide_v {
        let out = out.chunks_exact(wide_v).flat_map(|row| row[..dv].iter().copied()).collect();
        return Ok((out, state));
    }
    Ok((out, state))
}

impl<T: Element> DeviceCache<T> {
    /// Decodes: the outputs of `q [B, HQ, t, D]`, which look at this cache, as [`Engine::decode`](crate::Engine::decode) gives them. The
    /// description is that of [`Attention::builder_for_device_cache`]. For queries on the GPU there is [`Cuda::decode_plan`].
    pub fn decode(&self, attention: &Attention, q: View<T>) -> Result<Forward<T::Acc>> {
        let (a, shape) = (attention, self.shape());
        expect_shape("q", q.shape(), a.query_shape(), "batch, query heads, queries, head_dim")?;
        let given = [shape.sequences, shape.kv_heads, shape.max_len, shape.head_dim];
        expect_shape("cache", given, a.key_shape(), "batch, KV heads, most tokens, head_dim")?;
        if shape.value_dim != a.value_dim() {
            let allowed = format!("the description's {}", a.value_dim());
            return Err(Error::value("cache", format!("value_dim {}", shape.value_dim), allowed));
        }
        a.check_decoding(self.lengths())?;
        let cuda = self.engine();
        let plan = cuda.decode_plan::<T>(a, self.layout())?;
        let stream = cuda.inner.stream()?;
        let result = {
            let _entered = cuda.inner.context.enter()?;
            let room = Room::new(&cuda.inner.context, &stream);
            let call = Call {
                q: contiguous(q).into_owned(),
                probe: None,
                pools: [self.k_pool(), self.v_pool()],
                table: self.table_ptr(),
                lengths: self.lengths_ptr(),
                longest: self.lengths().iter().copied().max().unwrap_or(0),
            };
            call.run::<T::Acc>(&plan, &room, stream.raw())
        };
        lock(&cuda.inner.streams).push(stream);
        let (out, state) = result?;
        let out = out.iter().map(|x| x.to_real()).collect();
        Ok(Forward { out: Tensor::new(out, &a.out_shape()), state })
    }
}

impl Attention {
    /// [`Attention::builder_for_cache`] for a cache on a GPU.
    pub fn builder_for_device_cache<T: Element>(
        q: &View<T>,
        cache: &DeviceCache<T>,
    ) -> crate::AttentionBuilder {
        let ([batch, heads, queries, head_dim], shape) = (q.shape(), cache.shape());
        Self::builder()
            .batch(batch)
            .heads(heads)
            .kv_heads(shape.kv_heads)
            .queries(queries)
            .keys(shape.max_len)
            .head_dim(head_dim)
            .value_dim(shape.value_dim)
            .mask(crate::Mask::causal())
    }
}
