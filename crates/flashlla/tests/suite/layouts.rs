//! Any strides and storage types for inputs and outputs, against contiguous tensors.

use crate::common::*;
use flashlla::{Attention, Element, Engine, Gradients, Strides, Tensor, View, ViewMut, bf16, f16};
use proptest::prelude::*;

/// Where the elements of a tensor `[batch, head, token, dim]` lie.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// Axes from the outermost in memory to the innermost.
    order: [usize; 4],
    reversed: [bool; 4],
    /// Unused places after each run along an axis.
    padding: [usize; 4],
    before: usize,
}

fn layout() -> impl Strategy<Value = Layout> {
    let order = Just([0, 1, 2, 3]).prop_shuffle();
    (order, any::<[bool; 4]>(), prop::array::uniform4(0usize..3), 0usize..4)
        .prop_map(|(order, reversed, padding, before)| Layout { order, reversed, padding, before })
}

impl Layout {
    /// The places needed, the offset of element (0, 0, 0, 0), and the strides.
    fn places(&self, shape: [usize; 4]) -> (usize, usize, Strides) {
        let (mut strides, mut distance, mut offset) = ([0; 4], 1 + self.padding[3], self.before);
        for axis in self.order.into_iter().rev() {
            strides[axis] = distance as isize;
            if self.reversed[axis] {
                offset += distance * shape[axis].saturating_sub(1);
                strides[axis] = -strides[axis];
            }
            distance = distance * shape[axis].max(1) + self.padding[axis];
        }
        (self.before + distance, offset, strides)
    }

    fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
        (0..shape.iter().product()).map(move |i: usize| {
            [
                i / (shape[1] * shape[2] * shape[3]),
                i / (shape[2] * shape[3]) % shape[1],
                i / shape[3] % shape[2],
                i % shape[3],
            ]
        })
    }

    fn place(offset: usize, strides: Strides, index: [usize; 4]) -> usize {
        let distance: isize = index.iter().zip(strides).map(|(&i, s)| i as isize * s).sum();
        (offset as isize + distance) as usize
    }

    /// Lays a tensor out, with the rest of the memory full of `filler`.
    fn scatter<T: Element>(&self, tensor: &Tensor<T>, filler: T) -> Scattered<T> {
        let shape = tensor.shape().try_into().unwrap();
        let (len, offset, strides) = self.places(shape);
        let mut memory = vec![filler; len];
        for (index, &x) in Self::indices(shape).zip(tensor.data()) {
            memory[Self::place(offset, strides, index)] = x;
        }
        Scattered { memory, offset, shape, strides }
    }
}

struct Scattered<T> {
    memory: Vec<T>,
    offset: usize,
    shape: [usize; 4],
    strides: Strides,
}

impl<T: Element> Scattered<T> {
    fn view(&self) -> View<'_, T> {
        View::strided(&self.memory, self.offset, self.shape, self.strides).unwrap()
    }

    fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::strided(&mut self.memory, self.offset, self.shape, self.strides).unwrap()
    }

    /// The elements in row-major order, and everything between them.
    fn gather(&self) -> (Vec<T>, Vec<T>) {
        let mut between: Vec<Option<T>> = self.memory.iter().copied().map(Some).collect();
        let inside = Layout::indices(self.shape)
            .map(|index| {
                between[Layout::place(self.offset, self.strides, index)].take().expect("places are disjoint")
            })
            .collect();
        (inside, between.into_iter().flatten().collect())
    }
}

const NAN: f64 = f64::NAN;

/// Inputs scattered (NaN between them) give the bits that contiguous ones give.
fn scattered_inputs<T: Element>(engine: AnyEngine, attention: &Attention, data: &Data, layouts: &[Layout]) {
    let want = run::<T>(engine, attention, data);
    let nan = T::from_real(NAN);
    let lay =
        |turn: usize, tensor: &Tensor<f64>| layouts[turn % layouts.len()].scatter(&cast::<T>(tensor), nan);
    let (q, k, v, g) = (lay(0, &data.q), lay(1, &data.k), lay(2, &data.v), lay(3, &data.grad_out));
    let small = |turn: usize, tensor: &Option<Tensor<f64>>| {
        let nan = T::Acc::from_real(NAN);
        tensor.as_ref().map(|t| layouts[turn % layouts.len()].scatter(&cast::<T::Acc>(t), nan))
    };
    let (bias, probe) = (small(1, &data.bias), small(3, &data.probe));
    let mut problem = attention.problem(q.view(), k.view(), v.view()).unwrap();
    if let Some(bias) = &bias {
        problem = problem.with_bias(bias.view()).unwrap();
    }
    if let Some(probe) = &probe {
        problem = problem.with_probe(probe.view()).unwrap();
    }
    let forward = engine.forward(&problem).unwrap();
    let Gradients { dq, dk, dv, other } = engine.backward(&problem, &forward.state, g.view()).unwrap();
    for (name, got) in [
        ("out", &forward.out),
        ("lse", &forward.state.lse),
        ("key_mean", &forward.state.key_mean),
        ("probe", &forward.state.probe),
        ("dq", &dq),
        ("dk", &dk),
        ("dv", &dv),
        ("dridge", &other.dridge),
    ]
    .into_iter()
    .chain(other.dbias.iter().map(|t| ("dbias", t)))
    .chain(other.dprobe.iter().map(|t| ("dprobe", t)))
    {
        assert_eq!(cast::<f64>(got), *want.get(name), "{name} of {engine:?} in {}", T::NAME);
    }
}

/// Outputs of another storage type in scattered memory are rounded, and nothing between them is touched.
fn scattered_outputs<T: Element, O: Element>(
    engine: AnyEngine,
    attention: &Attention,
    data: &Data,
    layouts: &[Layout],
) {
    let want = run::<T>(engine, attention, data);
    let (q, k, v) = (cast::<T>(&data.q), cast::<T>(&data.k), cast::<T>(&data.v));
    let grad_out = cast::<T>(&data.grad_out);
    let bias = data.bias.as_ref().map(cast::<T::Acc>);
    let probe = data.probe.as_ref().map(cast::<T::Acc>);
    let mut problem = attention.problem(q.view(), k.view(), v.view()).unwrap();
    if let Some(bias) = &bias {
        problem = problem.with_bias(bias.view()).unwrap();
    }
    if let Some(probe) = &probe {
        problem = problem.with_probe(probe.view()).unwrap();
    }
    let filler = O::from_real(-77.0f64);
    let lay = |turn: usize, shape: [usize; 4]| {
        layouts[turn % layouts.len()]
            .scatter(&Tensor::new(vec![filler; shape.iter().product()], &shape), filler)
    };
    let mut out = lay(2, attention.out_shape());
    let mut dq = lay(1, attention.query_shape());
    let mut dk = lay(0, attention.key_shape());
    let mut dv = lay(3, attention.value_shape());
    let state = engine.forward_into(&problem, out.view_mut()).unwrap();
    engine
        .backward_into(&problem, &state, grad_out.view(), dq.view_mut(), dk.view_mut(), dv.view_mut())
        .unwrap();
    for (name, scattered) in [("out", &out), ("dq", &dq), ("dk", &dk), ("dv", &dv)] {
        let (inside, between) = scattered.gather();
        let touched = between.iter().any(|x| x.to_real::<f64>() != -77.0);
        assert!(!touched, "{name}: memory between the elements was written ({engine:?})");
        // Half a unit in the last place of the narrower of the two types, and twice that for rounding twice.
        let unit = match O::NAME {
            "bf16" => 2f64.powi(-8),
            "f16" => 2f64.powi(-11),
            _ => 2f64.powi(-24).max(if T::NAME == "f64" && O::NAME == "f64" { 0.0 } else { 2f64.powi(-24) }),
        };
        for (got, want) in inside.iter().map(|x| x.to_real::<f64>()).zip(want.get(name).data()) {
            let exact = T::NAME == "f64" && O::NAME == "f64";
            // Below 2^-14 f16 has fixed steps.
            let smallest = if O::NAME == "f16" { 2f64.powi(-25) } else { 1e-38 };
            let allowed = if exact { 0.0 } else { want.abs() * unit * 2.01 + smallest };
            assert!(
                (got - want).abs() <= allowed,
                "{name} as {}: {got:e} for {want:e} ({engine:?} in {})",
                O::NAME,
                T::NAME
            );
        }
    }
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn strides_and_storage_types_do_not_matter(mut case in case(200_000), layouts in prop::collection::vec(layout(), 4)) {
        case.grid = Grid::Half;
        let (attention, data) = (case.attention(), case.data());
        for engine in AnyEngine::exact() {
            scattered_inputs::<f64>(engine, &attention, &data, &layouts);
            scattered_inputs::<f32>(engine, &attention, &data, &layouts);
            scattered_inputs::<bf16>(engine, &attention, &data, &layouts);
            scattered_inputs::<f16>(engine, &attention, &data, &layouts);
            scattered_outputs::<f64, f64>(engine, &attention, &data, &layouts);
            scattered_outputs::<f64, f32>(engine, &attention, &data, &layouts);
            scattered_outputs::<f32, f64>(engine, &attention, &data, &layouts);
            scattered_outputs::<f32, f16>(engine, &attention, &data, &layouts);
            scattered_outputs::<bf16, bf16>(engine, &attention, &data, &layouts);
            scattered_outputs::<f16, f32>(engine, &attention, &data, &layouts);
        }
    }

    /// Keys and values with stride 0 along batch and head are one head repeated.
    #[test]
    fn stride_zero_repeats(mut case in case(500_000), along_tokens: bool) {
        case.grid = Grid::Half;
        case.kv_heads = 2;
        let (attention, data) = (case.attention(), case.data());
        let ([b, h, m, d], dv) = (attention.key_shape(), attention.value_dim());
        let (ms, md) = if along_tokens { (1, 0) } else { (m, d as isize) };
        let mv = if along_tokens { 0 } else { dv as isize };
        let keys: Vec<f32> = data.k.data()[..ms * d].iter().map(|&x| x as f32).collect();
        let values: Vec<f32> = data.v.data()[..ms * dv].iter().map(|&x| x as f32).collect();
        let repeated = |one: &[f32], width: usize| -> Tensor<f64> {
            let head: Vec<f64> = one.iter().copied().cycle().take(m * width).map(f64::from).collect();
            Tensor::new(head.repeat(b * h), &[b, h, m, width])
        };
        let repeated = Data { k: repeated(&keys, d), v: repeated(&values, dv), bias: None, probe: None, ..data };
        let (q, grad_out) = (cast::<f32>(&repeated.q), cast::<f32>(&repeated.grad_out));
        let k = View::strided(&keys, 0, [b, h, m, d], [0, 0, md, 1]).unwrap();
        let v = View::strided(&values, 0, [b, h, m, dv], [0, 0, mv, 1]).unwrap();
        for engine in AnyEngine::exact() {
            let want = run::<f32>(engine, &attention, &repeated);
            let problem = attention.problem(q.view(), k, v).unwrap();
            let forward = engine.forward(&problem).unwrap();
            let gradients = engine.backward(&problem, &forward.state, grad_out.view()).unwrap();
            let got = [("out", forward.out), ("dq", gradients.dq), ("dk", gradients.dk), ("dv", gradients.dv)];
            for (name, got) in got {
                prop_assert_eq!(&cast::<f64>(&got), want.get(name), "{} of {:?}", name, engine);
            }
        }
    }
}

#[test]
fn named_layouts_are_what_they_say() {
    let attention = Attention::builder()
        .batch(2)
        .heads(3)
        .kv_heads(1)
        .queries(29)
        .head_dim(6)
        .value_dim(5)
        .build()
        .unwrap();
    let data = Data::random(&attention, 9, Grid::F32);
    let want = run::<f32>(AnyEngine::cpu(), &attention, &data);
    // [B, N, H, D] for the queries; [B, N, D] for the one head of keys and values is the same memory as [B, H, N, D].
    let mut q = vec![0f32; data.q.data().len()];
    for (i, &x) in data.q.data().iter().enumerate() {
        let (b, h, n, d) = (i / (3 * 29 * 6), i / (29 * 6) % 3, i / 6 % 29, i % 6);
        q[((b * 29 + n) * 3 + h) * 6 + d] = x as f32;
    }
    let (k, v) = (cast::<f32>(&data.k), cast::<f32>(&data.v));
    let (q, k, v) = (
        View::bnhd(&q, [2, 29, 3, 6]).unwrap(),
        View::bnd(k.data(), [2, 29, 6]).unwrap(),
        View::bnd(v.data(), [2, 29, 5]).unwrap(),
    );
    assert_eq!(Attention::builder_for(&q, &k, &v).build().unwrap(), attention);
    let problem = attention.problem(q, k, v).unwrap();
    let mut out = vec![0f32; 2 * 29 * 3 * 5];
    AnyEngine::cpu().forward_into(&problem, ViewMut::bnhd(&mut out, [2, 29, 3, 5]).unwrap()).unwrap();
    for (i, &x) in want.out.data().iter().enumerate() {
        let (b, h, n, d) = (i / (3 * 29 * 5), i / (29 * 5) % 3, i / 5 % 29, i % 5);
        assert_eq!(f64::from(out[((b * 29 + n) * 3 + h) * 5 + d]), x);
    }
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_views_are_read_and_written_in_place() {
    use ndarray::{Array3, Array4, Axis, s};
    let attention = Attention::builder()
        .batch(2)
        .heads(4)
        .kv_heads(2)
        .queries(21)
        .head_dim(7)
        .value_dim(3)
        .mask(flashlla::Mask::causal())
        .build()
        .unwrap();
    let data = Data::random(&attention, 4, Grid::F64);
    let want = run::<f64>(AnyEngine::cpu(), &attention, &data);
    let array = |t: &Tensor<f64>| {
        let shape: [usize; 4] = t.shape().try_into().unwrap();
        Array4::from_shape_vec(shape, t.data().to_vec()).unwrap()
    };
    // Queries every second token of a longer array; keys with tokens before heads; values back to front.
    let mut q = Array4::from_elem((2, 4, 42, 7), f64::NAN);
    q.slice_mut(s![.., .., ..;2, ..]).assign(&array(&data.q));
    let k = array(&data.k).permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
    let v = array(&data.v).slice(s![.., .., ..;-1, ..]).as_standard_layout().into_owned();
    let mut v = v.view();
    v.invert_axis(Axis(2));
    let q = View::try_from(q.slice(s![.., .., ..;2, ..])).unwrap();
    let k = View::try_from(k.view().permuted_axes([0, 2, 1, 3])).unwrap();
    let problem = attention.problem(q, k, View::try_from(v).unwrap()).unwrap();
    let mut out = Array4::from_elem((2, 21, 4, 5), -1.0);
    let into = out.slice_mut(s![.., .., .., 1..4]).permuted_axes([0, 2, 1, 3]);
    AnyEngine::cpu().forward_into(&problem, ViewMut::try_from(into).unwrap()).unwrap();
    assert_eq!(out.slice(s![.., .., .., 1..4]).permuted_axes([0, 2, 1, 3]), array(&want.out));
    assert!(out.slice(s![.., .., .., 0]).iter().chain(out.slice(s![.., .., .., 4])).all(|&x| x == -1.0));

    let three = Array3::from_shape_fn((2, 5, 3), |(b, n, d)| (b * 100 + n * 10 + d) as f32);
    let view = View::try_from(three.view()).unwrap();
    assert_eq!((view.shape(), view.at(1, 0, 4, 2)), ([2, 1, 5, 3], 142.0));
    assert_eq!(want.out.clone().into_ndarray().shape(), [2, 4, 21, 3]);
}
