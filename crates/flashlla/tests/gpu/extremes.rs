//! Inputs at the edge of what 16-bit products can do: finite always, and right where they can be.

use super::*;

/// Names of the results that hold something that is not finite.
fn not_finite(results: &Results) -> Vec<&'static str> {
    let named = results.named().into_iter();
    named.filter(|(_, tensor)| tensor.data().iter().any(|x| !x.is_finite())).map(|(name, _)| name).collect()
}

impl Checks {
    /// Keys on a random walk, far apart for a small ridge. What comes out is finite, and no larger than what an exact solve gives, or
    /// softmax, where a solve was dropped.
    pub fn ill_conditioned(&self) {
        let (mut cases, mut failed, mut largest) = (0, 0, 0f64);
        for &dtype in &self.dtypes {
            for precision in [Precision::Standard, Precision::High] {
                let attention = Attention::builder()
                    .heads(2)
                    .queries(512)
                    .head_dim(self.widest.min(64))
                    .mask(Mask::causal())
                    .ridge(0.1)
                    .precision(precision)
                    .build()
                    .unwrap();
                let mut data = Data::random(&attention, 11, Grid::Half);
                for tensor in [&mut data.q, &mut data.k] {
                    let (length, width) = (tensor.shape()[2], tensor.shape()[3]);
                    for head in tensor.data_mut().chunks_mut(length * width) {
                        (width..head.len()).for_each(|i| head[i] = 0.7 * head[i] + head[i - width]);
                    }
                }
                cases += 1;
                let Ok(got) = try_run(dtype, &self.gpu, &attention, &data) else {
                    failed += 1;
                    continue;
                };
                let bad = not_finite(&got);
                let exact = run_as(Dtype::F64, Cpu::default(), &attention, &data).out;
                let size = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let times = size(got.out.data()) / size(exact.data()).max(size(data.v.data()));
                largest = largest.max(times);
                if !bad.is_empty() || times > 2.0 {
                    failed += 1;
                    println!(
                        "{dtype:?} {precision:?}: {bad:?} not finite, the output {times:.1} times the exact one"
                    );
                }
            }
        }
        self.enter(
            "ill-conditioned: finite",
            cases,
            failed,
            format!("output at most {largest:.2} times the exact one"),
        );
    }

    /// Rows of the output's gradient that get smaller and smaller, to below what f32 can square. Gradients are linear in them: a query's
    /// is as exact as the others' while its row is no smaller than fp16 beside the largest, and a number always.
    pub fn small_gradients(&self) {
        let (mut cases, mut failed, mut worst) = (0, 0, 0f64);
        for &dtype in &self.dtypes {
            for (queries, seed) in [(21, 1), (21, 2), (150, 3)] {
                let attention = Attention::builder()
                    .batch(4)
                    .heads(4)
                    .queries(queries)
                    .head_dim(32)
                    .mask(Mask::causal())
                    .ridge(0.2)
                    .build()
                    .unwrap();
                let mut data = Data::random(&attention, seed, Grid::Half);
                let power = |row: usize| (row * 7 + row / queries * 3) % 100;
                for (row, values) in data.grad_out.data_mut().chunks_mut(32).enumerate() {
                    values.iter_mut().for_each(|x| *x *= (-(power(row) as f64)).exp2());
                }
                cases += 1;
                let Ok(got) = try_run(dtype, &self.gpu, &attention, &data) else {
                    failed += 1;
                    continue;
                };
                let want = run_as(Dtype::F64, Cpu::default(), &attention, &data);
                let bad = not_finite(&got);
                let rows = got.dq.data().chunks(32).zip(want.dq.data().chunks(32)).enumerate();
                let error = rows
                    .filter(|(row, _)| power(*row) <= 8)
                    .map(|(_, (got, want))| relative_error(got, want, 1e-9))
                    .fold(0f64, f64::max);
                worst = worst.max(error);
                if !bad.is_empty() || error > 0.1 {
                    failed += 1;
                    println!(
                        "{dtype:?} {queries} queries: {bad:?} not finite, a row of dq errs by {error:.1e}"
                    );
                }
            }
        }
        self.enter(
            "small gradients: finite",
            cases,
            failed,
            format!("a row of dq errs by at most {worst:.1e}"),
        );
    }

    /// Keys whose mean is three times as large as their spread, in every coordinate: what they have in common is no part of the fit.
    pub fn common_mean(&self) {
        let mut errors = vec![];
        let mut failed = 0;
        for &dtype in &self.dtypes {
            for head_dim in [64, 128].into_iter().filter(|&d| d <= self.widest) {
                for (precision, ridge, limits) in
                    [(Precision::Standard, 1.0, [6e-3, 1.2e-2]), (Precision::High, 0.1, [4e-3, 1.2e-2])]
                {
                    let attention = Attention::builder()
                        .heads(2)
                        .queries(500)
                        .head_dim(head_dim)
                        .mask(Mask::causal())
                        .ridge(ridge)
                        .precision(precision)
                        .build()
                        .unwrap();
                    let mut data = Data::random(&attention, 5, Grid::Half);
                    data.k.data_mut().iter_mut().for_each(|x| *x = Grid::Half.round(*x + 3.0));
                    let Ok(got) = try_run(dtype, &self.gpu, &attention, &data) else {
                        failed += 1;
                        continue;
                    };
                    let want = run_as(Dtype::F64, Cpu::default(), &attention, &data);
                    let of = |name: &str| relative_error(got.get(name).data(), want.get(name).data(), 1e-3);
                    let pair = [of("out"), ["dq", "dk", "dv"].map(of).into_iter().fold(0f64, f64::max)];
                    if !(pair[0] <= limits[0] && pair[1] <= limits[1]) {
                        failed += 1;
                        println!(
                            "{dtype:?} D = {head_dim} {precision:?} ridge {ridge}: out {:.1e}, gradients {:.1e}",
                            pair[0], pair[1]
                        );
                    }
                    errors.push(pair);
                }
            }
        }
        self.enter_errors("keys with a mean of 3 spreads", failed, errors);
    }
}
