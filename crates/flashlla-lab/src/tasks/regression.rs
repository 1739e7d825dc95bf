//! In-context regression: predict values from keys, inside one sequence, on a stream whose law changes.

use super::{Batch, Inputs, Interface, Split, Targets, Task, stream, within};
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The options.
///
/// The stream is that of `test-time-regression`. A token is a pair, `[x, y, 0]`, or, once in every `query_every` tokens, a
/// question, `[x, 0, 1]`: a fresh x of the same segment whose y is wanted there and shown nowhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Regression {
    /// Dimension of x and of y.
    pub dim: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Tokens between changes of the law.
    pub segment: usize,
    /// One token in this many is a question.
    pub query_every: usize,
    /// Standard deviation of the noise on values of standard deviation 1.
    pub noise: f64,
}

impl Regression {
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        within("dim", self.dim, 1..=256)?;
        within("length", self.length, 2..=65536)?;
        within("segment", self.segment, 1..=self.length)?;
        within("query-every", self.query_every, 2..=self.length)?;
        match self.noise {
            noise if (0.0..=10.0).contains(&noise) => Ok(()),
            noise => Err(("noise", format!("must be from 0 to 10, not {noise}"))),
        }
    }
}

impl Task for Regression {
    fn interface(&self) -> Interface {
        Interface::Vectors { input: 2 * self.dim + 1, output: self.dim }
    }

    fn batch(&self, rng: &mut ChaCha8Rng, size: usize, _: Split) -> Batch {
        let (mut inputs, mut at, mut answers) = (vec![], vec![], vec![]);
        for sequence in 0..size {
            let pairs = stream(rng, self.length, self.segment, self.dim, self.noise);
            let rows = pairs.keys.chunks_exact(self.dim).zip(pairs.values.chunks_exact(self.dim));
            for (i, (x, y)) in rows.enumerate() {
                let asks = i % self.query_every == self.query_every - 1;
                inputs.extend(x.iter().map(|&x| x as f32));
                if asks {
                    inputs.extend(std::iter::repeat_n(0.0, self.dim));
                    at.push((sequence * self.length + i) as u32);
                    answers.extend(y.iter().map(|&y| y as f32));
                } else {
                    inputs.extend(y.iter().map(|&y| y as f32));
                }
                inputs.push(if asks { 1.0 } else { 0.0 });
            }
        }
        let (inputs, targets) = (Inputs::Vectors(inputs), Targets::Vectors(answers));
        Batch { batch: size, length: self.length, inputs, at, targets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: Regression = Regression { dim: 3, length: 40, segment: 20, query_every: 4, noise: 0.0 };

    #[test]
    fn questions_do_not_show_their_answers() {
        let batch = TASK.batch_at(1, Split::Training, 0, 2);
        let (Inputs::Vectors(inputs), Targets::Vectors(answers)) = (&batch.inputs, &batch.targets) else {
            panic!("vectors")
        };
        assert_eq!((inputs.len(), batch.at.len(), answers.len()), (2 * 40 * 7, 20, 60));
        for (i, token) in inputs.chunks_exact(7).enumerate() {
            let asks = batch.at.contains(&(i as u32));
            assert_eq!(token[6], if asks { 1.0 } else { 0.0 });
            assert_eq!(token[3..6] == [0.0; 3], asks, "token {i}");
        }
    }

    #[test]
    fn answers_follow_the_map_of_their_segment() {
        // Without noise, three pairs of a segment determine its map; the fourth token's answer must follow it.
        let batch = TASK.batch_at(2, Split::Evaluation, 5, 1);
        let (Inputs::Vectors(inputs), Targets::Vectors(answers)) = (&batch.inputs, &batch.targets) else {
            panic!("vectors")
        };
        for (segment, question) in [(0, 3), (20, 23)] {
            let token = |i: usize| &inputs[i * 7..][..7];
            let solve = |x: &[f32]| {
                let a = faer::Mat::<f64>::from_fn(3, 3, |r, c| token(segment + c)[r].into());
                let b = faer::Mat::<f64>::from_fn(3, 1, |r, _| x[r].into());
                use faer::linalg::solvers::Solve;
                a.full_piv_lu().solve(b)
            };
            let share = solve(&token(question)[..3]);
            let place = batch.at.iter().position(|&at| at as usize == question).unwrap();
            for e in 0..3 {
                let expected: f64 =
                    (0..3).map(|c| share[(c, 0)] * f64::from(token(segment + c)[3 + e])).sum();
                let given = f64::from(answers[place * 3 + e]);
                assert!((given - expected).abs() < 1e-3 * (1.0 + expected.abs()), "{given} {expected}");
            }
        }
    }
}
