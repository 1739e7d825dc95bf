//! Decoding on a GPU, from caches in host memory and on the device, against the reference in `f64`.

use crate::common::*;
use crate::decode::{Setup, setup};
use crate::{Checks, SHARE};
use flashlla::cuda::{DecodeMethod, DeviceCache, PoolLayout};
use flashlla::{
    Attention, CacheShape, CacheView, Cpu, Element, Engine, Mask, Solver, Tensor, View, bf16, f16,
};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

/// Tokens of a tensor `[batch, heads, n, dim]`, in place.
fn tokens<E: Element>(
    tensor: &Tensor<E>,
    batch: usize,
    sequences: usize,
    first: usize,
    count: usize,
) -> View<'_, E> {
    let [_, h, n, d] = <[usize; 4]>::try_from(tensor.shape()).unwrap();
    let strides = [(h * n * d) as isize, (n * d) as isize, d as isize, 1];
    View::strided(tensor.data(), (batch * h * n + first) * d, [sequences, h, count, d], strides).unwrap()
}

/// The same `[batch, heads, n, dim]` with room for more tokens, zeros.
fn with_tokens(tensor: &Tensor<f64>, count: usize) -> Tensor<f64> {
    let [b, h, n, d] = <[usize; 4]>::try_from(tensor.shape()).unwrap();
    let mut all = vec![0.0; b * h * count * d];
    for (to, from) in all.chunks_exact_mut(count * d).zip(tensor.data().chunks_exact(n * d)) {
        to[..n * d].copy_from_slice(from);
    }
    Tensor::new(all, &[b, h, count, d])
}

/// Relative to what should be, or to a hundredth of a typical size where that is less.
fn error(got: &[f64], want: &[f64]) -> f64 {
    relative_error(got, want, 0.01 * (want.len() as f64).sqrt())
}

/// What the arithmetic leaves, to find mistakes; how large errors are is what the table says.
const ALLOWED: f64 = 1e-2;

/// NaN is.
fn too_far(error: f64, allowed: f64) -> bool {
    error.is_nan() || error > allowed
}

/// Outputs from a cache in host memory and from one on the device, or why there are none.
type Found = Result<Vec<Vec<f64>>, String>;

/// Keys and values with as many tokens as the caches have room for.
fn with_room(data: &Data, setup: &Setup) -> Data {
    let mut padded = data.clone();
    for tensor in [&mut padded.k, &mut padded.v] {
        *tensor = with_tokens(tensor, setup.max_len());
    }
    padded
}

/// Notes the errors of what was found with each type, and says which is no result or errs by more than 3e-3; how many do.
fn far<const N: usize>(
    what: &str,
    setup: &Setup,
    found: [(&str, Found); N],
    want: &[f64],
    measured: &mut Vec<[f64; 2]>,
) -> usize {
    let mut failed = 0;
    for (dtype, found) in found {
        match found {
            Err(problem) => {
                failed += 1;
                println!("{what}: {dtype} {problem}\n  {setup:?}");
            }
            Ok(found) => {
                for got in found {
                    let e = error(&got, want);
                    if too_far(e, 3e-3) {
                        failed += 1;
                        println!("{what}: {dtype} {e:.1e}\n  {setup:?}");
                    }
                    measured.push([e, 0.0]);
                }
            }
        }
    }
    failed
}

impl Checks {
    /// The outputs from a cache in host memory, stored as they were given, and from one on the device.
    fn decode_as<T: Element>(&self, setup: &Setup, data: &Data) -> Found {
        let attention = setup.attention();
        let mut found = vec![];
        let (q, k, v) = (cast::<T>(&data.q), cast::<T>(&data.k), cast::<T>(&data.v));
        let cache = CacheView::contiguous(k.view(), v.view(), &setup.lengths).map_err(|e| e.to_string())?;
        let bias = data.bias.as_ref().map(cast::<T::Acc>);
        let probe = data.probe.as_ref().map(cast::<T::Acc>);
        let mut decoding = attention.decoding(q.view(), &cache).map_err(|e| e.to_string())?;
        if let Some(bias) = &bias {
            decoding = decoding.with_bias(bias.view()).map_err(|e| e.to_string())?;
        }
        if let Some(probe) = &probe {
            decoding = decoding.with_probe(probe.view()).map_err(|e| e.to_string())?;
        }
        let mut out = Tensor::<T>::zeros(&attention.out_shape());
        self.gpu.decode_into(&decoding, out.view_mut()).map_err(|e| e.to_string())?;
        found.push(cast::<f64>(&out).into_vec());

        let whole = setup.head_dim.is_multiple_of(8) && setup.value_dim.is_multiple_of(8);
        if !whole || bias.is_some() || probe.is_some() || attention.mask().is_leave_one_out() {
            return Ok(found);
        }
        let shape = CacheShape {
            sequences: setup.lengths.len(),
            kv_heads: setup.kv_heads,
            head_dim: setup.head_dim,
            value_dim: setup.value_dim,
            max_len: setup.max_len(),
        };
        let mut cache = match setup.page_size {
            None => DeviceCache::<T>::contiguous_on(&self.gpu, shape),
            Some(size) => {
                let pages = shape.sequences * setup.max_len().div_ceil(size);
                DeviceCache::<T>::paged_on(&self.gpu, shape, size, pages)
            }
        }
        .map_err(|e| e.to_string())?;
        // In two pieces each, now this sequence and now that.
        for part in 0..2 {
            for (b, &length) in setup.lengths.iter().enumerate() {
                let middle = (setup.seed as usize + b) % (length + 1);
                let (first, count) = if part == 0 { (0, middle) } else { (middle, length - middle) };
                let (k, v) = (tokens(&k, b, 1, first, count), tokens(&v, b, 1, first, count));
                cache.append_to(b, k, v).map_err(|e| e.to_string())?;
            }
        }
        let forward = cache.decode(&attention, q.view()).map_err(|e| e.to_string())?;
        let state_is_finite = forward.state.probe.data().iter().all(|x| x.to_real::<f64>().is_finite());
        found.push(if state_is_finite {
            cast::<f64>(&forward.out).into_vec()
        } else {
            vec![f64::NAN; out.data().len()]
        });
        Ok(found)
    }

    pub fn decode(&self, share: usize) {
        let mut runner = TestRunner::deterministic();
        let strategy = setup();
        let (mut failed, mut measured) = (0, vec![]);
        for number in 0..(share + 1) * SHARE {
            let mut setup = strategy.new_tree(&mut runner).unwrap().current();
            if number < share * SHARE {
                continue;
            }
            setup.solver = Solver::default();
            // Dims that caches on the device can have, in two cases of three.
            if number % 3 > 0 {
                (setup.head_dim, setup.value_dim) =
                    ([8, 64, 80, 128][number % 4], [16, 64, 40, 128][number / 4 % 4]);
                (setup.bias, setup.probe) = (None, false);
            }
            let data = setup.data();
            let want = setup.reference(&data).out.into_vec();
            let dtype = self.dtypes[number % self.dtypes.len()];
            let setup_now = setup.clone();
            let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match dtype {
                Dtype::F32 => self.decode_as::<f32>(&setup_now, &data),
                Dtype::F16 => self.decode_as::<f16>(&setup_now, &data),
                _ => self.decode_as::<bf16>(&setup_now, &data),
            }));
            match found {
                Ok(Ok(found)) => {
                    for (where_from, got) in ["host", "device"].into_iter().zip(found) {
                        let e = error(&got, &want);
                        if too_far(e, ALLOWED) {
                            failed += 1;
                            println!("decode {number} from {where_from}: {e:.1e}\n  {dtype:?} {setup:?}");
                        }
                        measured.push([e, 0.0]);
                    }
                }
                Ok(Err(problem)) => {
                    failed += 1;
                    println!("decode {number}: {problem}\n  {dtype:?} {setup:?}");
                }
                Err(_) => {
                    failed += 1;
                    println!("decode {number}: a panic\n  {dtype:?} {setup:?}");
                }
            }
        }
        self.enter_errors("decode, ridge 0.3 to 10", failed, measured);
    }

    /// Queries that share a KV head, many enough to be solved together: masks, pages, types, a ridge that leaves some of them to their
    /// moments, and a bad key that only the last token's queries see.
    pub fn shared(&self) {
        let (mut failed, mut measured) = (0, vec![]);
        // As many tiles of queries as 112 multiprocessors take at once.
        let short: Vec<usize> = (0..14).map(|sequence: usize| 260 - 20 * sequence).collect();
        for (head_dim, lengths, method) in [
            (64, vec![2900, 2800, 700], DecodeMethod::Passes),
            (128, vec![2200, 2100, 0], DecodeMethod::Passes),
            (64, short.clone(), DecodeMethod::Together),
            (128, short, DecodeMethod::Together),
        ] {
            let (longest, sequences) = (lengths[0], lengths.len());
            let masks = [Mask::causal(), Mask::causal().window(longest - 50), Mask::full()];
            for (mask, ridge) in masks.into_iter().zip([10.0, 1.0, 0.1]) {
                let mut setup = Setup::new(&lengths, head_dim);
                (setup.group, setup.queries, setup.mask, setup.ridge) = (8, 16, mask, ridge);
                // Enough tiles of queries for what is decoded together.
                setup.kv_heads = 1 + usize::from(method == DecodeMethod::Together);
                setup.ridge_per_query = ridge == 1.0;
                let data = setup.data();
                let want = setup.decode::<f64>(&Cpu::default(), &data).out.into_vec();
                for page_size in [None, Some(16), Some(64)] {
                    setup.page_size = page_size;
                    let padded = with_room(&data, &setup);
                    let layout = PoolLayout {
                        pages: sequences * page_size.map_or(1, |size| setup.max_len() / size),
                        page_size: page_size.unwrap_or(longest),
                        paged: page_size.is_some(),
                    };
                    let plan = self.gpu.decode_plan::<bf16>(&setup.attention(), layout).unwrap();
                    if plan.method(longest) != method {
                        failed += 1;
                        println!("shared: {:?}\n  {setup:?}", plan.method(longest));
                    }
                    let found = [
                        ("bf16", self.decode_as::<bf16>(&setup, &padded)),
                        ("f16", self.decode_as::<f16>(&setup, &padded)),
                    ];
                    failed += far("shared", &setup, found, &want, &mut measured);
                }
                setup.page_size = None;
                if setup.mask.is_causal() {
                    let mut data = data.clone();
                    let row = (longest - 1) * head_dim;
                    data.k.data_mut()[row..][..head_dim].fill(f64::NAN);
                    for got in self.decode_as::<bf16>(&setup, &data).unwrap() {
                        // Of the first sequence's first KV head the last tokens, one in 16, see it.
                        let (own, other) = got.split_at(8 * 16 * head_dim);
                        let (own_want, other_want) = want.split_at(own.len());
                        for (row, (got, want)) in
                            own.chunks_exact(head_dim).zip(own_want.chunks_exact(head_dim)).enumerate()
                        {
                            let wrong = if row % 16 == 15 {
                                got.iter().any(|x| !x.is_nan())
                            } else {
                                too_far(error(got, want), 3e-2)
                            };
                            if wrong {
                                failed += 1;
                                println!(
                                    "shared: beside a bad key row {row} errs by {:.1e}",
                                    error(got, want)
                                );
                                println!("  {setup:?}");
                            }
                        }
                        let e = error(other, other_want);
                        if too_far(e, 3e-2) {
                            failed += 1;
                            println!("shared: a bad key in another cache errs by {e:.1e}\n  {setup:?}");
                        }
                    }
                }
            }
        }
        self.enter_errors("decode together, ridge 0.1 to 30", failed, measured);
    }

    /// Contexts that are split over the keys, next to some that are short or empty: masks, pages, types, values of another dimension than
    /// keys, given probes, and keys that are mostly zeros, of which a solve's residual may leave nothing.
    pub fn split(&self) {
        let (mut failed, mut measured) = (0, vec![]);
        for (head_dim, value_dim) in [(64, 40), (128, 128), (72, 128)] {
            let masks = [Mask::causal(), Mask::causal().window(1500), Mask::full()];
            for (mask, page_size) in masks.into_iter().zip([None, Some(16), Some(64)]) {
                for (probe, sparse) in [(false, false), (true, false), (false, true)] {
                    let mut setup = Setup::new(&[2500, 700, 3, 0], head_dim);
                    (setup.value_dim, setup.group, setup.queries) = (value_dim, 2, 3);
                    (setup.mask, setup.ridge_per_query, setup.probe) = (mask.clone(), true, probe);
                    let mut data = setup.data();
                    if sparse {
                        // A one in each row, here and there.
                        for (tensor, step) in [(&mut data.q, 7), (&mut data.k, 13)] {
                            for (row, x) in tensor.data_mut().chunks_exact_mut(head_dim).enumerate() {
                                x.fill(0.0);
                                x[row * step % head_dim] = 1.0;
                            }
                        }
                    }
                    let want = setup.decode::<f64>(&Cpu::default(), &data).out.into_vec();
                    setup.page_size = page_size;
                    let padded = with_room(&data, &setup);
                    let found = [
                        ("bf16", self.decode_as::<bf16>(&setup, &padded)),
                        ("f16", self.decode_as::<f16>(&setup, &padded)),
                        ("f32", self.decode_as::<f32>(&setup, &padded)),
                    ];
                    let what = if sparse { "split, sparse" } else { "split" };
                    failed += far(what, &setup, found, &want, &mut measured);
                }
            }
        }
        self.enter_errors("decode, contexts that are split", failed, measured);
    }

    /// A prompt and 200 tokens, one or several at a time, from a paged and a contiguous cache on the device, against one forward;
    /// forks, speculation that is taken back, lengths of zero, bad numbers.
    pub fn generate(&self) {
        let (mut cases, mut failed, mut worst) = (0, 0, 0f64);
        for (paged, d) in [(false, 64), (true, 64), (false, 128), (true, 128)] {
            cases += 1;
            match self.generation(paged, d) {
                Ok(e) if e <= 4e-3 => worst = worst.max(e),
                Ok(e) => {
                    failed += 1;
                    println!("generation, paged {paged}, D {d}: error {e:.1e}");
                }
                Err(problem) => {
                    failed += 1;
                    println!("generation, paged {paged}, D {d}: {problem}");
                }
            }
        }
        self.enter("prompt and 200 tokens bf16", cases, failed, format!("largest error {worst:.1e}"));
        let problem = self.bad_numbers().err();
        let note = problem.clone().unwrap_or_default();
        self.enter("decode: NaN stays with its row", 1, usize::from(problem.is_some()), note);
    }

    fn generation(&self, paged: bool, d: usize) -> Result<f64, String> {
        let say = |e: flashlla::Error| e.to_string();
        let (prompt, n, h, group, b) = (70, 270, 2, 2, 3);
        let builder = || Attention::builder().batch(b).heads(h * group).kv_heads(h).head_dim(d).ridge(1.0);
        let attention = builder().queries(n).mask(Mask::causal()).build().map_err(say)?;
        let data = Data::random(&attention, 11, Grid::Half);
        let [q, k, v] = [&data.q, &data.k, &data.v].map(cast::<bf16>);
        let whole = Cpu::new().forward(&attention.problem(q.view(), k.view(), v.view()).map_err(say)?);
        let whole = whole.map_err(say)?.out;
        // One sequence more than is in use, for a beam.
        let shape = CacheShape { sequences: b + 1, kv_heads: h, head_dim: d, value_dim: d, max_len: n + 2 };
        let mut cache = match paged {
            true => DeviceCache::<bf16>::paged_on(&self.gpu, shape, 16, (b + 1) * 17),
            false => DeviceCache::contiguous_on(&self.gpu, shape),
        }
        .map_err(say)?;
        for i in 0..b {
            cache.append_to(i, tokens(&k, i, 1, 0, prompt), tokens(&v, i, 1, 0, prompt)).map_err(say)?;
        }
        let (mut at, mut error) = (prompt, 0f64);
        for (step, count) in [1, 1, 1, 5, 1, 16].into_iter().cycle().enumerate() {
            let count = count.min(n - at);
            if count == 0 {
                break;
            }
            if step % 5 == 2 {
                // A speculation of two tokens that does not hold, and a beam that writes to its own copy of a page.
                cache.append_to(1, tokens(&k, 1, 1, 3, 2), tokens(&v, 1, 1, 3, 2)).map_err(say)?;
                cache.truncate(1, at).map_err(say)?;
                cache.fork(2, b).map_err(say)?;
                cache.append_to(b, tokens(&v, 0, 1, 0, 1), tokens(&k, 0, 1, 0, 1)).map_err(say)?;
            }
            for i in 0..b {
                cache.append_to(i, tokens(&k, i, 1, at, count), tokens(&v, i, 1, at, count)).map_err(say)?;
            }
            // The beam's queries are those of sequence 0, and nobody looks at what they find.
            let now = tokens(&q, 0, b, at, count);
            let mut rows = Vec::with_capacity((b + 1) * h * group * count * d);
            for (i, head, row) in
                (0..=b).flat_map(|i| (0..h * group).flat_map(move |j| (0..count).map(move |r| (i, j, r))))
            {
                rows.extend((0..d).map(|x| now.at(i % b, head, row, x)));
            }
            let now = Tensor::new(rows, &[b + 1, h * group, count, d]);
            if cache.len(b) > 0 && cache.len(b) < count {
                cache.free(b).map_err(say)?;
            }
            let one =
                Attention::builder_for_device_cache(&now.view(), &cache).ridge(1.0).build().map_err(say)?;
            let got = cache.decode(&one, now.view()).map_err(say)?.out;
            let want = tokens(&whole, 0, b, at, count);
            let mut all = vec![];
            for (i, head, row) in
                (0..b).flat_map(|i| (0..h * group).flat_map(move |j| (0..count).map(move |r| (i, j, r))))
            {
                all.extend((0..d).map(|x| f64::from(want.at(i, head, row, x))));
            }
            let got: Vec<f64> = got.data()[..all.len()].iter().map(|&x| f64::from(x)).collect();
            error = error.max(relative_error(&got, &all, 0.0));
            if error.is_nan() || got.iter().any(|x| x.is_nan()) {
                return Err(format!("not a number at token {at}"));
            }
            cache.free(b).map_err(say)?;
            at += count;
        }
        Ok(error)
    }

    /// A number that is not finite spoils the rows that see it, whole, and no others; nor do pages in no use.
    fn bad_numbers(&self) -> Result<(), String> {
        let say = |e: flashlla::Error| e.to_string();
        let setup = Setup { kv_heads: 2, group: 2, queries: 3, ..Setup::new(&[300, 290], 64) };
        let data = setup.data();
        let clean = setup.reference(&data).out.into_vec();
        for (which, poison) in [("k", f64::NAN), ("v", f64::INFINITY), ("v", f64::NAN), ("k", f64::INFINITY)]
        {
            let mut data = data.clone();
            let tensor = if which == "k" { &mut data.k } else { &mut data.v };
            // Sequence 1, KV head 1, the token of its second query: the last two see it.
            tensor.data_mut()[((2 + 1) * setup.max_len() + 288) * 64 + 5] = poison;
            let found = self.decode_as::<bf16>(&setup, &data)?;
            for (where_from, got) in ["host", "device"].into_iter().zip(found) {
                for (row, (got, want)) in got.chunks(64).zip(clean.chunks(64)).enumerate() {
                    let (b, head, i) = (row / 12, row / 3 % 4, row % 3);
                    let sees = b == 1 && head / 2 == 1 && i >= 1;
                    let bad = got.iter().filter(|x| x.is_nan()).count();
                    if bad != if sees { 64 } else { 0 } || !sees && too_far(error(got, want), ALLOWED) {
                        return Err(format!(
                            "{poison} in {which} from {where_from}: {bad} of row {row} are NaN"
                        ));
                    }
                }
            }
        }
        // What an overflow of fp16 would spoil comes out right from the host, and not wrong from the device.
        let mut data = data.clone();
        data.v.data_mut()[(2 * setup.max_len() + 200) * 64] = 3e5;
        let want = setup.reference(&data).out.into_vec();
        for (where_from, got) in ["host", "device"].into_iter().zip(self.decode_as::<bf16>(&setup, &data)?) {
            for (row, (got, want)) in got.chunks(64).zip(want.chunks(64)).enumerate() {
                let spoilt = where_from == "device" && got.iter().all(|x| x.is_nan());
                let e = relative_error(got, want, 0.0);
                if !spoilt && too_far(e, 2e-2) {
                    return Err(format!("a value of 3e5 from {where_from}: error {e:.1e} in row {row}"));
                }
            }
        }
        let shape = CacheShape { sequences: 2, kv_heads: 1, head_dim: 64, value_dim: 64, max_len: 32 };
        let mut cache = DeviceCache::<f16>::paged_on(&self.gpu, shape, 16, 2).map_err(say)?;
        let x = Tensor::<f16>::zeros(&[1, 1, 20, 64]);
        cache.append_to(0, x.view(), x.view()).map_err(say)?;
        match cache.append_to(1, x.view(), x.view()) {
            Err(flashlla::Error::CacheFull { .. }) if cache.lengths() == [20, 0] => Ok(()),
            other => Err(format!("a full cache gave {other:?}")),
        }
    }
}
