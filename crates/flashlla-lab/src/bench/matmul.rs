//! What this machine's matrix products reach: the yardstick of every efficiency.

use faer::{Accum, Mat, Par, linalg::matmul::matmul};
use flashlla::Real;
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};
use std::time::{Duration, Instant};

/// The best rate, in flop per second, of products of large square matrices on the threads of the current pool.
pub fn rate<A: Real>() -> f64
where
    StandardNormal: Distribution<A>,
{
    [1024, 1536, 2048].into_iter().map(rate_of::<A>).fold(0.0, f64::max)
}

fn rate_of<A: Real>(size: usize) -> f64
where
    StandardNormal: Distribution<A>,
{
    let mut rng = StdRng::seed_from_u64(0);
    let mut normal = || Mat::<A>::from_fn(size, size, |_, _| StandardNormal.sample(&mut rng));
    let (a, b, mut c) = (normal(), normal(), normal());
    let mut best = Duration::MAX;
    let begin = Instant::now();
    // The first of at least three warms up; half a second steadies the clock of a small machine.
    let mut runs = 0;
    while runs < 3 || begin.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        matmul(&mut c, Accum::Replace, &a, &b, A::ONE, Par::rayon(0));
        best = best.min(start.elapsed());
        runs += 1;
    }
    std::hint::black_box(&c);
    2.0 * (size as f64).powi(3) / best.as_secs_f64()
}
