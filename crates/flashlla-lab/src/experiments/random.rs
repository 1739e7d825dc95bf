//! Random numbers that are the same on every machine and with every number of threads.

use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// An independent generator for each seed and each purpose.
pub fn stream(seed: u64, purpose: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(purpose);
    rng
}

/// Independent standard normal numbers.
pub fn normals(rng: &mut ChaCha8Rng, count: usize) -> Vec<f64> {
    StandardNormal.sample_iter(rng).take(count).collect()
}
