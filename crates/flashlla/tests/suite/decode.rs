//! Decoding from caches, against the dense reference and against forwards over the whole sequence.

use crate::common::*;
use flashlla::{
    Attention, CacheShape, CacheView, Cpu, Element, Engine, Forward, KvCache, Mask, Precision, Reference,
    Ridge, Solver, Tensor, View, bf16, f16,
};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};

/// A random decoding.
#[derive(Debug, Clone)]
pub struct Setup {
    pub kv_heads: usize,
    pub group: usize,
    pub queries: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub lengths: Vec<usize>,
    pub mask: Mask,
    pub ridge: f64,
    pub ridge_per_query: bool,
    /// Of the bias, if there is one: whether it has a batch axis.
    pub bias: Option<bool>,
    pub probe: bool,
    pub solver: Solver,
    /// `None`: contiguous.
    pub page_size: Option<usize>,
    pub seed: u64,
}

impl Setup {
    pub fn new(lengths: &[usize], head_dim: usize) -> Self {
        Self {
            kv_heads: 1,
            group: 1,
            queries: 1,
            head_dim,
            value_dim: head_dim,
            lengths: lengths.to_vec(),
            mask: Mask::causal(),
            ridge: 1.0,
            ridge_per_query: false,
            bias: None,
            probe: false,
            solver: Solver::default(),
            page_size: None,
            seed: 1,
        }
    }

    /// The most tokens that a sequence can have, in whole pages.
    pub fn max_len(&self) -> usize {
        self.lengths.iter().max().unwrap_or(&0).max(&1).next_multiple_of(self.page_size.unwrap_or(1))
    }

    pub fn attention(&self) -> Attention {
        let (b, h, n) = (self.lengths.len(), self.kv_heads * self.group, self.queries);
        let ridge = if self.ridge_per_query {
            let values: Vec<f64> = (0..b * h * n).map(|i| self.ridge * (1.0 + i as f64 % 3.0)).collect();
            Ridge::per_query(values, [b, h, n])
        } else {
            Ridge::scalar(self.ridge)
        };
        Attention::builder()
            .batch(b)
            .heads(h)
            .kv_heads(self.kv_heads)
            .queries(n)
            .keys(self.max_len())
            .head_dim(self.head_dim)
            .value_dim(self.value_dim)
            .mask(self.mask.clone())
            .ridge(ridge)
            .solver(self.solver)
            .build()
            .unwrap()
    }

    pub fn data(&self) -> Data {
        let attention = self.attention();
        let mut data = Data::random(&attention, self.seed, Grid::Half);
        if let Some(batched) = self.bias {
            let shape = [if batched { self.lengths.len() } else { 1 }, self.kv_heads, self.max_len(), 1];
            data = data.with_bias(shape, self.seed, Grid::Half);
            // Some tokens are hidden.
            data.bias
                .as_mut()
                .unwrap()
                .data_mut()
                .iter_mut()
                .skip(3)
                .step_by(7)
                .for_each(|x| *x = f64::NEG_INFINITY);
        }
        if self.probe { data.with_probe(self.seed, Grid::Half) } else { data }
    }

    /// Decodes on an engine with everything stored as `T`.
    pub fn decode<T: Element>(&self, engine: &impl Engine, data: &Data) -> Decoded {
        let attention = self.attention();
        let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<T>);
        let stored = Stored::new(self, &k, &v);
        let cache = stored.view();
        let bias = data.bias.as_ref().map(cast::<T::Acc>);
        let probe = data.probe.as_ref().map(cast::<T::Acc>);
        let mut decoding = attention.decoding(q.view(), &cache).unwrap();
        if let Some(bias) = &bias {
            decoding = decoding.with_bias(bias.view()).unwrap();
        }
        if let Some(probe) = &probe {
            decoding = decoding.with_probe(probe.view()).unwrap();
        }
        Decoded::new(&engine.decode(&decoding).unwrap())
    }

    pub fn decode_as(&self, dtype: Dtype, data: &Data) -> Decoded {
        self.decode_on(&Cpu::new(), dtype, data)
    }

    pub fn decode_on(&self, cpu: &Cpu, dtype: Dtype, data: &Data) -> Decoded {
        match dtype {
            Dtype::F64 => self.decode::<f64>(cpu, data),
            Dtype::F32 => self.decode::<f32>(cpu, data),
            Dtype::Bf16 => self.decode::<bf16>(cpu, data),
            Dtype::F16 => self.decode::<f16>(cpu, data),
        }
    }

    pub fn reference(&self, data: &Data) -> Decoded {
        self.decode::<f64>(&Reference::default(), data)
    }
}

/// Keys and values laid out as a setup says, with NaN wherever nothing is to be read.
struct Stored<T> {
    k: Vec<T>,
    v: Vec<T>,
    table: Vec<i32>,
    setup: Setup,
}

impl<T: Element> Stored<T> {
    fn new(setup: &Setup, k: &Tensor<T>, v: &Tensor<T>) -> Self {
        let (max_len, heads, batch) = (setup.max_len(), setup.kv_heads, setup.lengths.len());
        let size = setup.page_size.unwrap_or(max_len);
        let width = max_len / size;
        let pages = batch * width;
        let mut order: Vec<i32> = (0..pages as i32).collect();
        if setup.page_size.is_some() {
            order.shuffle(&mut StdRng::seed_from_u64(setup.seed));
        }
        let nan = T::from_real(f64::NAN);
        let lay = |from: &Tensor<T>| {
            let dim = from.shape()[3];
            let mut pool = vec![nan; pages * size * heads * dim];
            for (b, &length) in setup.lengths.iter().enumerate() {
                for (h, j) in (0..heads).flat_map(|h| (0..length).map(move |j| (h, j))) {
                    let (page, slot) = (order[b * width + j / size] as usize, j % size);
                    let row = if setup.page_size.is_some() {
                        (page * size + slot) * heads + h
                    } else {
                        (page * heads + h) * size + slot
                    };
                    let token = (b * heads + h) * max_len + j;
                    pool[row * dim..][..dim].copy_from_slice(&from.data()[token * dim..][..dim]);
                }
            }
            pool
        };
        Self { k: lay(k), v: lay(v), table: order, setup: setup.clone() }
    }

    fn view(&self) -> CacheView<'_, T> {
        let Setup { kv_heads: h, head_dim, value_dim, ref lengths, page_size, .. } = self.setup;
        match page_size {
            None => {
                let shape = |dim| [lengths.len(), h, self.setup.max_len(), dim];
                let (k, v) = (View::bhnd(&self.k, shape(head_dim)), View::bhnd(&self.v, shape(value_dim)));
                CacheView::contiguous(k.unwrap(), v.unwrap(), lengths).unwrap()
            }
            Some(size) => {
                let shape = |dim| [self.table.len(), size, h, dim];
                let (k, v) = (View::bnhd(&self.k, shape(head_dim)), View::bnhd(&self.v, shape(value_dim)));
                CacheView::paged(k.unwrap(), v.unwrap(), &self.table, lengths).unwrap()
            }
        }
    }
}

/// What a decoding gives, in `f64`.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    pub out: Tensor<f64>,
    pub lse: Tensor<f64>,
    pub key_mean: Tensor<f64>,
    pub probe: Tensor<f64>,
}

impl Decoded {
    pub fn new<A: flashlla::Real>(forward: &Forward<A>) -> Self {
        let state = &forward.state;
        assert_eq!(state.diagnostics.iterations.len(), state.lse.data().len());
        assert_eq!(state.diagnostics.residual.len(), state.lse.data().len());
        Self {
            out: cast(&forward.out),
            lse: cast(&state.lse),
            key_mean: cast(&state.key_mean),
            probe: cast(&state.probe),
        }
    }
}

/// Holds every result against others, each relative to the larger of what it should be and, since a single key's fit is 0
/// up to rounding, a hundredth of a typical size.
#[track_caller]
pub fn assert_decoded(what: &str, got: &Decoded, want: &Decoded, tolerance: Tolerance, ridge: f64) {
    for (name, got, want, allowed, typical) in [
        ("out", &got.out, &want.out, tolerance.out, 1.0),
        ("lse", &got.lse, &want.lse, tolerance.out, 1.0),
        ("key_mean", &got.key_mean, &want.key_mean, tolerance.out, 1.0),
        ("probe", &got.probe, &want.probe, tolerance.gradient, 1.0 / ridge),
    ] {
        assert_eq!(got.shape(), want.shape(), "{what}: {name}");
        let floor = 0.01 * typical * (want.data().len() as f64).sqrt();
        let error = relative_error(got.data(), want.data(), floor);
        assert!(error <= allowed, "{what}: {name} has a relative error of {error:.3e} > {allowed:.1e}");
    }
}

pub fn setup() -> impl Strategy<Value = Setup> {
    let sizes = (1usize..=2, prop::sample::select(vec![1usize, 2, 3, 8]), 1usize..=16);
    let dims =
        (prop::sample::select(vec![1usize, 3, 8, 16, 17, 40]), prop::sample::select(vec![1usize, 5, 16, 33]));
    let lengths = prop::collection::vec(prop_oneof![1 => Just(0usize), 8 => 1usize..300], 1..=3);
    let mask = (any::<bool>(), prop::option::of(1usize..80), any::<bool>());
    let ridge = (prop::sample::select(vec![10.0, 1.0, 0.3]), any::<bool>());
    let more = (prop::option::of(any::<bool>()), prop::bool::weighted(0.2));
    let solver = prop::sample::select(vec![Solver::default(), Solver::Direct]);
    let page_size = prop::option::of(prop::sample::select(vec![16usize, 32, 64, 128]));
    (sizes, dims, lengths, mask, ridge, more, solver, page_size, any::<u64>()).prop_map(
        |(
            sizes,
            dims,
            lengths,
            (causal, window, own),
            (ridge, per_query),
            (bias, probe),
            solver,
            page_size,
            seed,
        )| {
            let (kv_heads, group, queries) = sizes;
            let mut mask = if causal { Mask::causal() } else { Mask::full() };
            if let Some(window) = window {
                mask = mask.window(window);
            }
            if own {
                mask = mask.leave_one_out();
            }
            Setup {
                kv_heads,
                group,
                queries,
                head_dim: dims.0,
                value_dim: dims.1,
                // The cache holds the queries' own keys.
                lengths: lengths.into_iter().map(|n| if n == 0 { 0 } else { n.max(queries) }).collect(),
                mask,
                ridge,
                ridge_per_query: per_query,
                bias,
                probe,
                solver,
                page_size,
                seed,
            }
        },
    )
}

proptest! {
    #![proptest_config(cases(100))]

    #[test]
    fn any_decoding_agrees_with_the_reference(setup in setup()) {
        let data = setup.data();
        let want = setup.reference(&data);
        for dtype in Dtype::ALL {
            let tolerance = Tolerance::of(dtype, &setup.attention());
            assert_decoded(&format!("{dtype:?}"), &setup.decode_as(dtype, &data), &want, tolerance, setup.ridge);
        }
    }

    /// Whatever the pages and however they lie, the same bits: a layout is only where numbers are read from.
    #[test]
    fn pages_do_not_change_a_bit(setup in setup(), page_size in prop::sample::select(vec![16usize, 64, 256])) {
        // One length for all layouts, since a bias is as long as the cache.
        let whole = setup.max_len().next_multiple_of(256);
        let mut lengths = setup.lengths.clone();
        lengths[0] = whole;
        let contiguous = Setup { lengths, page_size: None, ..setup };
        let paged = Setup { page_size: Some(page_size), ..contiguous.clone() };
        let data = contiguous.data();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            prop_assert_eq!(contiguous.decode_as(dtype, &data), paged.decode_as(dtype, &data));
        }
    }
}

/// Contexts long enough to be cut into splits, which are merged; all ways to solve.
#[test]
fn splits_are_merged() {
    for (queries, group) in [(1, 1), (1, 2), (3, 1)] {
        for solver in [Solver::default(), Solver::Direct, Solver::Cg { tolerance: 1e-12, max_iters: 500 }] {
            let setup = Setup {
                queries,
                group,
                value_dim: 9,
                solver,
                mask: Mask::causal().window(9001),
                ..Setup::new(&[10_000, 4097], 24)
            };
            let mut data = setup.data();
            // Scores that rise along the context, so that what weights are relative to moves from split to split.
            data.bias = Some(Tensor::new(
                (0..10_000).map(|j| Grid::Half.round(j as f64 / 400.0)).collect(),
                &[1, 1, 10_000, 1],
            ));
            let want = setup.reference(&data);
            for dtype in [Dtype::F64, Dtype::F32] {
                let got = setup.decode_as(dtype, &data);
                let what = format!("{queries} {group} {solver:?} {dtype:?}");
                assert_decoded(&what, &got, &want, Tolerance::promised(dtype, false), 1.0);
            }
        }
    }
}

/// Contexts and head dimensions for which processors with a matrix unit form moments there and others look at tokens where they lie, with
/// keys far from zero and tokens that are hidden, from pages.
#[test]
fn one_query_against_many_keys() {
    let steps = Solver::Cg { tolerance: 1e-12, max_iters: 500 };
    for (head_dim, value_dim) in [(64, 64), (32, 96), (40, 17), (104, 72), (128, 128), (20, 5), (80, 48)] {
        // Keys with a mean of less than two spreads are taken as they are, others less a reference key.
        let default = Solver::default();
        for (mean, ridge, solver) in
            [(0.0, 0.3, default), (1.7, 1.0, default), (10.0, 10.0, default), (3.0, 1.0, steps)]
        {
            for page_size in [None, Some(32)] {
                let setup = Setup {
                    solver,
                    kv_heads: 2,
                    value_dim,
                    ridge,
                    bias: page_size.map(|_| true),
                    mask: Mask::causal().window(900).leave_one_out(),
                    page_size,
                    ..Setup::new(&[1000, 777], head_dim)
                };
                let mut data = setup.data();
                for x in data.k.data_mut() {
                    *x = Grid::Half.round(*x + mean);
                }
                let want = setup.reference(&data);
                for dtype in Dtype::ALL {
                    for (cpu, unit) in [(Cpu::new(), "any"), (Cpu::new().without_matrix_unit(), "none")] {
                        let what = format!(
                            "{dtype:?} {head_dim} {value_dim} {mean} {page_size:?}, matrix unit: {unit}"
                        );
                        let got = setup.decode_on(&cpu, dtype, &data);
                        assert_decoded(&what, &got, &want, Tolerance::promised(dtype, false), ridge);
                    }
                }
            }
        }
    }
}

#[test]
fn a_prompt_and_200_tokens_equal_one_forward() {
    fn check<T: Element>(tolerance: f64, paged: bool) {
        let (prompt, steps, h, group, d, dv) = (70, 200, 2, 2, 16, 12);
        let n = prompt + steps;
        let attention = Attention::builder()
            .heads(h * group)
            .kv_heads(h)
            .queries(n)
            .head_dim(d)
            .value_dim(dv)
            .mask(Mask::causal())
            .ridge(1.0)
            .build()
            .unwrap();
        let data = Data::random(&attention, 11, Grid::Half);
        let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<T>);
        let whole = Cpu::new().forward(&attention.problem(q.view(), k.view(), v.view()).unwrap()).unwrap();
        let shape = CacheShape { sequences: 1, kv_heads: h, head_dim: d, value_dim: dv, max_len: n };
        let mut cache =
            if paged { KvCache::<T>::paged(shape, 16, 17) } else { KvCache::contiguous(shape) }.unwrap();
        // Tokens of a tensor [1, heads, n, dim], in place.
        fn tokens<E: Element>(tensor: &Tensor<E>, first: usize, count: usize) -> View<'_, E> {
            let [_, h, n, d] = <[usize; 4]>::try_from(tensor.shape()).unwrap();
            let strides = [0, (n * d) as isize, d as isize, 1];
            View::strided(tensor.data(), first * d, [1, h, count, d], strides).unwrap()
        }
        cache.append(tokens(&k, 0, prompt), tokens(&v, 0, prompt)).unwrap();
        let mut at = prompt;
        // One by one, and now and then several at a time.
        for count in [1, 1, 1, 5, 1, 16].into_iter().cycle() {
            let count = count.min(n - at);
            if count == 0 {
                break;
            }
            cache.append(tokens(&k, at, count), tokens(&v, at, count)).unwrap();
            let (view, q) = (cache.view(), tokens(&q, at, count));
            let one = Attention::builder_for_cache(&q, &view).ridge(1.0).build().unwrap();
            let got = Cpu::new().decode(&one.decoding(q, &view).unwrap()).unwrap();
            for (name, got, want) in
                [("out", &got.out, &whole.out), ("probe", &got.state.probe, &whole.state.probe)]
            {
                let want = tokens(want, at, count);
                let all: Vec<f64> = (0..h * group)
                    .flat_map(|head| (0..count).map(move |i| (head, i)))
                    .flat_map(|(head, i)| {
                        (0..want.shape()[3]).map(move |x| want.at(0, head, i, x).to_real::<f64>())
                    })
                    .collect();
                assert_close(name, cast::<f64>(got).data(), &all, tolerance);
            }
            at += count;
        }
        assert_eq!((at, cache.len(0)), (n, n));
    }
    for paged in [false, true] {
        check::<f64>(1e-10, paged);
        check::<f32>(2e-5, paged);
        check::<bf16>(2e-5, paged);
        check::<f16>(2e-5, paged);
    }
}

/// The accuracy that is promised for `bf16` caches, outputs rounded to `bf16` too; also where all keys have a common mean ten
/// times their spread.
#[test]
fn errors_of_bf16_caches() {
    for (mean, head_dim) in [(0.0, 64), (1.7, 64), (10.0, 64), (0.0, 128), (1.7, 128), (10.0, 128)] {
        for (ridge, allowed) in [(10.0, 2.5e-3), (1.0, 2.5e-3), (0.1, 5e-3)] {
            for group in [1, 4] {
                let setup = Setup { group, ridge, ..Setup::new(&[2048, 700], head_dim) };
                let mut data = setup.data();
                data.k.data_mut().iter_mut().for_each(|x| *x = bf16::from_f64(*x + mean).to_f64());
                data.q.data_mut().iter_mut().for_each(|x| *x = bf16::from_f64(*x + mean / 10.0).to_f64());
                let (got, want) = (setup.decode_as(Dtype::Bf16, &data), setup.reference(&data));
                let rounded: Vec<f64> = got.out.data().iter().map(|&x| bf16::from_f64(x).to_f64()).collect();
                let error = relative_error(&rounded, want.out.data(), 0.0);
                assert!(
                    error <= allowed,
                    "mean {mean}, D {head_dim}, ridge {ridge}, group {group}: {error:.2e}"
                );
                // Before that rounding, f32's own.
                let error = relative_error(got.out.data(), want.out.data(), 0.0);
                assert!(
                    error <= 1e-4,
                    "mean {mean}, D {head_dim}, ridge {ridge}, group {group}: {error:.2e}"
                );
            }
        }
    }
}

#[test]
fn in_high_precision_all_is_f64() {
    let setup = Setup { ridge: 1e-3, ..Setup::new(&[900], 20) };
    let data = setup.data();
    let attention = Attention::builder().keys(900).queries(1).head_dim(20).mask(Mask::causal()).ridge(1e-3);
    let attention = attention.precision(Precision::High).build().unwrap();
    let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<f32>);
    let cache = CacheView::contiguous(k.view(), v.view(), &[900]).unwrap();
    let got = Cpu::new().decode(&attention.decoding(q.view(), &cache).unwrap()).unwrap();
    let tolerance = Tolerance { out: 3e-7, gradient: 3e-7 };
    assert_decoded("high", &Decoded::new(&got), &setup.reference(&data), tolerance, 1e-3);
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let setup = Setup { kv_heads: 2, group: 2, ..Setup::new(&[9000, 5000], 32) };
    let single = Setup { group: 1, ..setup.clone() };
    for setup in [setup, single] {
        let data = setup.data();
        let on = |threads| {
            let pool = rayon_pool(threads);
            pool.install(|| setup.decode_as(Dtype::Bf16, &data))
        };
        assert_eq!(on(1), on(3));
    }
}

fn rayon_pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// Two or three keys a thousand units long at a ridge of 1e-5: single precision cannot solve that, and what it says of its residual shows it.
#[test]
fn what_single_precision_cannot_solve_is_solved_in_double() {
    for (length, dim) in [(2, 40), (2, 64), (3, 64), (2, 128), (3, 128)] {
        for seed in 0..10 {
            let setup = Setup { ridge: 1e-5, seed, ..Setup::new(&[length], dim) };
            let mut data = setup.data();
            data.k.data_mut().iter_mut().for_each(|x| *x *= 1024.0);
            data.q.data_mut().iter_mut().for_each(|x| *x /= 1024.0);
            let want = setup.decode_as(Dtype::F64, &data);
            let got = setup.decode_as(Dtype::F32, &data);
            assert_close(&format!("{length} {dim} {seed}"), got.out.data(), want.out.data(), 1e-5);
        }
    }
}

/// The first step of a solve is along the query times the scale: no direction at a scale of 0, the other way round at a negative one.
#[test]
fn one_query_at_any_scale() {
    let setup = Setup::new(&[900], 64);
    let data = setup.data();
    for scale in [0.0, -0.125, 1e-4, 1.0] {
        fn decode<T: Element>(engine: &impl Engine, data: &Data, scale: f64) -> Decoded {
            let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<T>);
            let cache = CacheView::contiguous(k.view(), v.view(), &[900]).unwrap();
            let attention =
                Attention::builder_for_cache(&q.view(), &cache).ridge(1.0).scale(scale).build().unwrap();
            Decoded::new(&engine.decode(&attention.decoding(q.view(), &cache).unwrap()).unwrap())
        }
        let want = decode::<f64>(&Reference::default(), &data, scale);
        let (double, single) =
            (decode::<f64>(&Cpu::new(), &data, scale), decode::<f32>(&Cpu::new(), &data, scale));
        assert_decoded("f64", &double, &want, Tolerance::promised(Dtype::F64, false), 1.0);
        assert_decoded("f32", &single, &want, Tolerance::promised(Dtype::F32, false), 1.0);
    }
}

/// Numbers of a token that lie apart are read one by one, and give what others give; so do tokens that lie in the other order.
#[test]
fn a_cache_whose_numbers_lie_apart() {
    for dim in [5, 64] {
        let setup = Setup::new(&[700], dim);
        let data = setup.data();
        let attention = setup.attention();
        let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<f32>);
        let apart = |x: &Tensor<f32>| -> Vec<f32> { x.data().iter().flat_map(|&x| [x, f32::NAN]).collect() };
        let (k_apart, v_apart) = (apart(&k), apart(&v));
        let view = |data| View::strided(data, 0, [1, 1, 700, dim], [0, 0, 2 * dim as isize, 2]).unwrap();
        let turned =
            |x: &Tensor<f32>| -> Vec<f32> { x.data().chunks(dim).rev().flatten().copied().collect() };
        let (k_turned, v_turned) = (turned(&k), turned(&v));
        let back =
            |data| View::strided(data, 699 * dim, [1, 1, 700, dim], [0, 0, -(dim as isize), 1]).unwrap();
        let want = setup.reference(&data);
        for (k, v) in [
            (view(&k_apart), view(&v_apart)),
            (k.view(), view(&v_apart)),
            (view(&k_apart), v.view()),
            (back(&k_turned), back(&v_turned)),
        ] {
            let cache = CacheView::contiguous(k, v, &[700]).unwrap();
            let got = Cpu::new().decode(&attention.decoding(q.view(), &cache).unwrap()).unwrap();
            assert_decoded("apart", &Decoded::new(&got), &want, Tolerance::promised(Dtype::F32, false), 1.0);
        }
    }
}

/// What is not finite makes the outputs of the queries that see it NaN, and no others.
#[test]
fn bad_numbers_stay_with_those_that_see_them() {
    let steps = Solver::Cg { tolerance: 1e-12, max_iters: 500 };
    for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (solver, group, queries) in
            [(Solver::default(), 1, 1), (Solver::Direct, 2, 3), (Solver::default(), 2, 4), (steps, 1, 1)]
        {
            let window = 100;
            let setup = Setup {
                kv_heads: 2,
                group,
                queries,
                solver,
                mask: Mask::causal().window(window),
                page_size: Some(16),
                ..Setup::new(&[300, 290], 16)
            };
            let clean = setup.data();
            let want = setup.reference(&clean);
            let (max_len, t) = (setup.max_len(), queries);
            // Sequence 1, KV head 1, and a token that only some of its queries see: the last query's window ends at 289.
            for token in [290 - t, 289, 290 - window - t + 1, 290 - window, 290 - window - t, 10] {
                for which in ["k", "v"] {
                    let mut data = clean.clone();
                    let tensor = if which == "k" { &mut data.k } else { &mut data.v };
                    tensor.data_mut()[((2 + 1) * max_len + token) * 16 + 5] = poison;
                    for dtype in [Dtype::F64, Dtype::F32, Dtype::Bf16, Dtype::F16] {
                        let mut got = setup.decode_as(dtype, &data);
                        let mut want = want.clone();
                        for (row, (got, want)) in got
                            .out
                            .data_mut()
                            .chunks_mut(16)
                            .zip(want.out.data_mut().chunks_mut(16))
                            .enumerate()
                        {
                            let (b, head, i) = (row / (2 * group * t), row / t % (2 * group), row % t);
                            let last = 290 - t + i;
                            let sees = b == 1 && head / group == 1 && token <= last && token + window > last;
                            let what =
                                format!("{poison} in {which} {token}, {dtype:?} {solver:?}: row {row}");
                            assert_eq!(got.iter().all(|x| x.is_nan()), sees, "{what}");
                            assert_eq!(got.iter().any(|x| x.is_nan()), sees, "{what}");
                            if sees {
                                got.fill(0.0);
                                want.fill(0.0);
                            }
                        }
                        assert_close(
                            "the others",
                            got.out.data(),
                            want.out.data(),
                            Tolerance::promised(dtype, false).out,
                        );
                    }
                }
            }
            // A bad query is its own.
            let mut data = clean.clone();
            data.q.data_mut()[16 + 3] = poison;
            let got = setup.decode_as(Dtype::F32, &data);
            let bad: Vec<bool> =
                got.out.data().chunks(16).map(|row| row.iter().any(|x| x.is_nan())).collect();
            assert_eq!(bad.iter().position(|&bad| bad), Some(1));
            assert_eq!(bad.iter().filter(|&&bad| bad).count(), 1);
        }
    }
}

#[test]
fn one_key_and_equal_keys_give_the_mean_value() {
    let setup = Setup { ridge: 1e-6, ..Setup::new(&[1, 40], 8) };
    let mut data = setup.data();
    let key = data.k.data()[..8].to_vec();
    data.k.data_mut().chunks_mut(8).for_each(|row| row.copy_from_slice(&key));
    let mean: Vec<f64> =
        (0..8).map(|d| (40..80).map(|j| data.v.data()[j * 8 + d]).sum::<f64>() / 40.0).collect();
    for dtype in Dtype::ALL {
        let got = setup.decode_as(dtype, &data);
        let tolerance = Tolerance::promised(dtype, false).out;
        assert_close("one", &got.out.data()[..8], &data.v.data()[..8], tolerance);
        assert_close("equal", &got.out.data()[8..], &mean, tolerance);
    }
}
