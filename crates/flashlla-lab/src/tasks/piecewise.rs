//! A stream of keys and values whose law changes from segment to segment.

use crate::experiments::{Pairs, normalise, random};
use rand::rngs::ChaCha8Rng;

/// Segments one after another, each with its own centre of keys and its own linear map from keys to values.
///
/// A segment's keys are a centre plus independent normal noise, both with standard deviation 1 per coordinate, scaled to
/// norm √dim; its map has normal entries of variance 1/dim; values get normal noise of standard deviation `noise`.
pub fn stream(rng: &mut ChaCha8Rng, length: usize, segment: usize, dim: usize, noise: f64) -> Pairs {
    let (mut keys, mut values) = (vec![], vec![]);
    for _ in 0..length.div_ceil(segment) {
        let centre = random::normals(rng, dim);
        let map = random::normals(rng, dim * dim);
        let mut rows = random::normals(rng, segment * dim);
        rows.iter_mut().zip(centre.iter().cycle()).for_each(|(x, c)| *x += c);
        normalise(&mut rows, dim);
        let errors = random::normals(rng, segment * dim);
        for (key, errors) in rows.chunks_exact(dim).zip(errors.chunks_exact(dim)) {
            let dot =
                |row: &[f64]| row.iter().zip(key).map(|(a, k)| a * k).sum::<f64>() / (dim as f64).sqrt();
            values.extend(map.chunks_exact(dim).zip(errors).map(|(row, e)| dot(row) + noise * e));
        }
        keys.extend(rows);
    }
    keys.truncate(length * dim);
    values.truncate(length * dim);
    Pairs { dim, value_dim: dim, keys, values }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::{row_errors, squared_norm};
    use crate::report::Summary;

    const NOISE: f64 = 0.1;

    #[test]
    fn a_stream_has_segments_of_one_map_each() {
        let pairs = stream(&mut random::stream(0, 0), 96, 32, 4, NOISE);
        assert_eq!((pairs.len(), pairs.values.len()), (96, 96 * 4));
        for key in pairs.keys.chunks_exact(4) {
            assert!((squared_norm(key) - 4.0).abs() < 1e-12);
        }
        // Inside one segment a linear model leaves the noise; across two it does not.
        let part = |from: usize, to: usize| Pairs {
            keys: pairs.keys[from * 4..to * 4].to_vec(),
            values: pairs.values[from * 4..to * 4].to_vec(),
            ..pairs
        };
        let left = |part: Pairs| {
            let out = part.global_linear(&part.keys, 1e-9).unwrap();
            Summary::of(&row_errors(&out, &part.values, 4)).mean / 4.0
        };
        assert!(left(part(0, 32)) < 2.0 * NOISE * NOISE);
        assert!(left(part(0, 64)) > 10.0 * NOISE * NOISE);
    }
}
