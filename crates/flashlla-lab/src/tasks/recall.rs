//! Multi-query associative recall (Arora et al., "Zoology", 2023): pairs of key and value tokens first, then some of the keys
//! again, each of which must be answered with its value.

use super::{Batch, Inputs, Interface, Split, Targets, Task, within};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, seq::index};
use serde::{Deserialize, Serialize};

/// The options. As in Zoology, keys come from the lower half of the vocabulary and values from the upper; every key is asked
/// for once, after a gap drawn from a power law, and is followed by its value; all other places hold random tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Recall {
    /// Tokens there are.
    pub vocabulary: usize,
    /// Pairs to remember.
    pub pairs: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Exponent of the gaps' power law, `p(gap) ∝ gap^(power - 1)`.
    pub power: f64,
}

impl Recall {
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        within("vocabulary", self.vocabulary, 4..=1 << 20)?;
        within("pairs", self.pairs, 1..=(self.vocabulary / 2 - 1))?;
        if self.length < 4 * self.pairs || self.length > 65536 {
            let least = 4 * self.pairs;
            let what = format!(
                "must be from {least} (four tokens for each of {} pairs) to 65536, not {}",
                self.pairs, self.length
            );
            return Err(("length", what));
        }
        match self.power {
            power if power > 0.0 && power <= 10.0 => Ok(()),
            power => Err(("power", format!("must be above 0 and at most 10, not {power}"))),
        }
    }

    /// `pairs` different places out of `places`, place `i` with a weight of `(i + 1)^(power - 1)`.
    fn gaps(&self, rng: &mut ChaCha8Rng, places: usize) -> Vec<usize> {
        let weight = |i: usize| ((i + 1) as f64).powf(self.power - 1.0);
        // The range of weights is finite and positive whatever the power: drawing cannot fail.
        index::sample_weighted(rng, places, weight, self.pairs)
            .map_or_else(|_| vec![], |drawn| drawn.into_vec())
    }
}

impl Task for Recall {
    fn interface(&self) -> Interface {
        Interface::Tokens { vocabulary: self.vocabulary }
    }

    fn batch(&self, rng: &mut ChaCha8Rng, size: usize, _: Split) -> Batch {
        let half = self.vocabulary / 2;
        let (mut tokens, mut at, mut answers) = (vec![], vec![], vec![]);
        for sequence in 0..size {
            // Token 0 is neither key nor value, as in Zoology.
            let keys: Vec<u32> =
                index::sample(rng, half - 1, self.pairs).iter().map(|i| i as u32 + 1).collect();
            let values = index::sample(rng, self.vocabulary - half, self.pairs);
            let values: Vec<u32> = values.iter().map(|i| (i + half) as u32).collect();
            let start = tokens.len();
            tokens.extend(keys.iter().zip(&values).flat_map(|(&k, &v)| [k, v]));
            tokens.extend((2 * self.pairs..self.length).map(|_| rng.random_range(0..self.vocabulary as u32)));
            let mut asked: Vec<(usize, u32, u32)> = self
                .gaps(rng, (self.length - 2 * self.pairs) / 2)
                .iter()
                .zip(keys.iter().zip(&values))
                .map(|(gap, (&k, &v))| (2 * self.pairs + 2 * gap, k, v))
                .collect();
            asked.sort_unstable();
            for (place, key, value) in asked {
                tokens[start + place] = key;
                tokens[start + place + 1] = value;
                at.push((sequence * self.length + place) as u32);
                answers.push(value);
            }
        }
        Batch {
            batch: size,
            length: self.length,
            inputs: Inputs::Tokens(tokens),
            at,
            targets: Targets::Tokens(answers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_question_has_its_answer_among_the_pairs() {
        let task = Recall { vocabulary: 64, pairs: 7, length: 50, power: 0.01 };
        let batch = task.batch_at(3, Split::Training, 9, 20);
        let (Inputs::Tokens(tokens), Targets::Tokens(answers)) = (&batch.inputs, &batch.targets) else {
            panic!("tokens")
        };
        assert_eq!((tokens.len(), batch.at.len(), answers.len()), (20 * 50, 20 * 7, 20 * 7));
        assert!(batch.at.is_sorted() && tokens.iter().all(|&t| t < 64));
        let mut asked = vec![0; 20];
        for (&at, &answer) in batch.at.iter().zip(answers) {
            let sequence = at as usize / 50;
            let pairs: HashMap<u32, u32> =
                tokens[sequence * 50..][..14].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            assert_eq!(pairs.len(), 7, "keys differ");
            assert!(pairs.iter().all(|(&k, &v)| (1..32).contains(&k) && v >= 32));
            assert_eq!(pairs[&tokens[at as usize]], answer);
            assert_eq!(tokens[at as usize + 1], answer);
            assert!(at as usize % 50 >= 14);
            asked[sequence] += 1;
        }
        assert_eq!(asked, [7; 20]);
    }

    #[test]
    fn a_small_power_asks_early() {
        let mean = |power: f64| {
            let task = Recall { vocabulary: 64, pairs: 4, length: 216, power };
            let batch = task.batch_at(0, Split::Training, 0, 100);
            batch.at.iter().map(|at| f64::from(at % 216) - 8.0).sum::<f64>() / 400.0
        };
        // Uniform places have a mean near the middle, 103.
        assert!((mean(1.0) - 103.0).abs() < 10.0, "{}", mean(1.0));
        assert!(mean(0.01) < 70.0, "{}", mean(0.01));
    }

    #[test]
    fn the_shortest_sequence_is_all_questions() {
        let task = Recall { vocabulary: 64, pairs: 5, length: 20, power: 0.01 };
        task.check().unwrap();
        let batch = task.batch_at(0, Split::Training, 0, 1);
        assert_eq!(batch.at, [10, 12, 14, 16, 18]);
        assert_eq!(Recall { length: 19, ..task }.check().unwrap_err().0, "length");
    }
}
