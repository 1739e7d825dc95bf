//! The bodies of the fuzz targets, here so that ordinary tests run them too.

use crate::files::TensorFile;
use crate::inputs::{InputArgs, Inputs};
use flashlla::{Attention, Cpu, Element, Engine, Mask, Ridge, Solver, bf16, f16};
use std::io::Cursor;

/// Reads the bytes as `attend` does, in every type; computes when that is quick.
pub fn read_any_file(bytes: &[u8]) {
    for backward in [false, true] {
        for parallax in [false, true] {
            let args = InputArgs { backward, parallax, ..Default::default() };
            read_as::<f64>(bytes, &args);
            read_as::<f32>(bytes, &args);
            read_as::<bf16>(bytes, &args);
            read_as::<f16>(bytes, &args);
        }
    }
}

fn read_as<T: Element>(bytes: &[u8], args: &InputArgs) {
    let Ok(mut file) = TensorFile::new(Cursor::new(bytes), "file") else { return };
    let Ok(inputs) = Inputs::<T>::read(&mut file, args) else { return };
    let a = &inputs.attention;
    if work(a).is_none_or(|work| work > 1 << 14) {
        return;
    }
    let problem = inputs.problem().expect("the inputs were checked");
    let forward = Cpu::default().forward(&problem).expect("a problem can be computed");
    if let Some(grad_out) = &inputs.grad_out {
        let gradients = Cpu::default().backward(&problem, &forward.state, inputs.view(grad_out));
        gradients.expect("a problem's gradients can be computed");
    }
}

/// A measure of the work that a description asks for; `None` when it does not fit in a number.
fn work(a: &Attention) -> Option<usize> {
    let sizes = [a.batch().max(1), a.heads(), a.queries() + 1, a.keys() + 1, a.head_dim() + a.value_dim()];
    sizes.into_iter().try_fold(1usize, usize::checked_mul)
}

/// Numbers to describe a call with.
#[derive(Debug, Clone)]
pub struct Numbers {
    /// Batch, query heads, KV heads, queries, keys, head and value dimension.
    pub sizes: [usize; 7],
    /// Which of the optional sizes are given.
    pub given: u8,
    /// Causal, leave one out.
    pub flags: [bool; 2],
    /// The position of query 0.
    pub q_offset: i64,
    /// The window.
    pub window: Option<usize>,
    /// Running sums of sequence lengths.
    pub cu_seqlens: Option<Vec<usize>>,
    /// The scale.
    pub scale: Option<f64>,
    /// The ridge's values and shape.
    pub ridge: (Vec<f64>, [usize; 3]),
    /// Tolerance and steps.
    pub solver: Option<(f64, usize)>,
}

impl Numbers {
    /// Any bytes as numbers: mostly small ones, for those lead furthest, with the extremes between them.
    pub fn decode(bytes: &[u8]) -> Self {
        let mut bytes = bytes.iter().copied();
        let mut byte = move || bytes.next().unwrap_or(0);
        let mut size = || match byte() {
            small @ 0..=239 => usize::from(small % 20),
            240..=243 => usize::from(byte()) << 8 | usize::from(byte()),
            244..=247 => usize::MAX >> (byte() % 64),
            _ => usize::from_le_bytes(std::array::from_fn(|_| byte())),
        };
        let real = |n: usize| match n % 20 {
            0 => 0.0,
            1 => -1.0,
            2 => f64::NAN,
            3 => f64::INFINITY,
            4 => f64::MIN_POSITIVE,
            _ => n as f64 / 8.0,
        };
        let sizes = std::array::from_fn(|_| size());
        let (given, flags, options) = (size() as u8, size(), size());
        let option = |bit: usize| options >> bit & 1 == 1;
        let q_offset = (size() as i64).wrapping_sub(size() as i64);
        let window = option(0).then(&mut size);
        let cu_seqlens = option(1).then(|| (0..size() % 6).map(|_| size()).collect());
        let scale = option(2).then(|| real(size()));
        let shape = std::array::from_fn(|_| size());
        let ridge = ((0..size() % 9).map(|_| real(size())).collect(), shape);
        let solver = option(3).then(|| (real(size()), size()));
        let flags = [flags & 1 == 1, flags & 2 == 2];
        Self { sizes, given, flags, q_offset, window, cu_seqlens, scale, ridge, solver }
    }
}

/// Builds a description of any numbers. One that is accepted keeps its promises.
pub fn build_any(numbers: &Numbers) {
    let [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = numbers.sizes;
    let mut mask = if numbers.flags[0] { Mask::causal() } else { Mask::full() }.q_offset(numbers.q_offset);
    if numbers.flags[1] {
        mask = mask.leave_one_out();
    }
    if let Some(window) = numbers.window {
        mask = mask.window(window);
    }
    if let Some(sums) = &numbers.cu_seqlens {
        mask = mask.cu_seqlens(sums.clone());
    }
    let (values, shape) = numbers.ridge.clone();
    let mut builder = Attention::builder()
        .queries(queries)
        .head_dim(head_dim)
        .mask(mask)
        .ridge(Ridge::broadcast(values, shape));
    let given = |bit: u8| numbers.given & (1 << bit) != 0;
    if given(0) {
        builder = builder.batch(batch);
    }
    if given(1) {
        builder = builder.heads(heads);
    }
    if given(2) {
        builder = builder.kv_heads(kv_heads);
    }
    if given(3) {
        builder = builder.keys(keys);
    }
    if given(4) {
        builder = builder.value_dim(value_dim);
    }
    if let Some(scale) = numbers.scale {
        builder = builder.scale(scale);
    }
    if let Some((tolerance, max_iters)) = numbers.solver {
        builder = builder.solver(Solver::Cg { tolerance, max_iters });
    }
    match builder.build() {
        Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error:?}"),
        Ok(a) => {
            assert!(a.heads() == a.group() * a.kv_heads() && a.scale().is_finite());
            for shape in [a.query_shape(), a.key_shape(), a.value_shape(), a.out_shape()] {
                let bytes = shape.iter().try_fold(8usize, |n, &size| n.checked_mul(size));
                assert!(bytes.is_some_and(|bytes| bytes <= isize::MAX as usize), "{shape:?}");
            }
            let ends = [0, 1, queries / 2, queries.saturating_sub(1)];
            for i in ends.into_iter().filter(|&i| i < queries) {
                let visible = a.mask().visible(i, a.keys());
                assert!(visible.start <= visible.end && visible.end <= a.keys());
                assert!(visible.skip.is_none_or(|skip| visible.start <= skip && skip < visible.end));
                assert!(visible.count() <= a.keys());
                if a.batch() > 0 {
                    assert!(a.ridge().at(a.batch() - 1, a.heads() - 1, i) > 0.0);
                }
            }
        }
    }
}
