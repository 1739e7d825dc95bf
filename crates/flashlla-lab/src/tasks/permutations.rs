//! State tracking: objects in a row, swaps of two places, and where every object is in the end.

use super::{Batch, Inputs, Interface, Split, Targets, Task, within};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The options. Object `i` starts at place `i`. A sequence is `swaps` instructions, each one token that names two different
/// places whose objects change places, and then one token per object that asks for its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Permutations {
    /// Objects, and places.
    pub objects: usize,
    /// Instructions of a sequence.
    pub swaps: usize,
}

impl Permutations {
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        within("objects", self.objects, 2..=64)?;
        within("swaps", self.swaps, 1..=65536)
    }

    /// The token of the swap of places `a < b`: after the questions, which are also the answers.
    fn swap(&self, a: usize, b: usize) -> u32 {
        // Pairs in the order (0, 1), (0, 2), (1, 2), (0, 3), ...
        (self.objects + b * (b - 1) / 2 + a) as u32
    }
}

impl Task for Permutations {
    fn interface(&self) -> Interface {
        Interface::Tokens { vocabulary: self.objects + self.objects * (self.objects - 1) / 2 }
    }

    fn batch(&self, rng: &mut ChaCha8Rng, size: usize, _: Split) -> Batch {
        let length = self.swaps + self.objects;
        let (mut tokens, mut at, mut answers) = (vec![], vec![], vec![]);
        for sequence in 0..size {
            // Which object is at a place.
            let mut row: Vec<usize> = (0..self.objects).collect();
            for _ in 0..self.swaps {
                let b = rng.random_range(0..self.objects);
                let a = (b + rng.random_range(1..self.objects)) % self.objects;
                row.swap(a, b);
                tokens.push(self.swap(a.min(b), a.max(b)));
            }
            let mut places = vec![0; self.objects];
            row.iter().enumerate().for_each(|(place, &object)| places[object] = place as u32);
            tokens.extend(0..self.objects as u32);
            at.extend((0..self.objects).map(|i| (sequence * length + self.swaps + i) as u32));
            answers.extend(places);
        }
        Batch { batch: size, length, inputs: Inputs::Tokens(tokens), at, targets: Targets::Tokens(answers) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: Permutations = Permutations { objects: 5, swaps: 12 };

    #[test]
    fn answers_are_what_the_swaps_do() {
        let Interface::Tokens { vocabulary } = TASK.interface() else { panic!("tokens") };
        let mut names = vec![None; vocabulary];
        for b in 0..5 {
            (0..b).for_each(|a| names[TASK.swap(a, b) as usize] = Some((a, b)));
        }
        assert_eq!(names.iter().flatten().count(), 10, "every swap has its own token");
        let batch = TASK.batch_at(0, Split::Training, 4, 8);
        let (Inputs::Tokens(tokens), Targets::Tokens(answers)) = (&batch.inputs, &batch.targets) else {
            panic!("tokens")
        };
        for (tokens, answers) in tokens.chunks_exact(17).zip(answers.chunks_exact(5)) {
            // Follow each object by itself, rather than all of them at once.
            for (object, &answer) in answers.iter().enumerate() {
                let place = tokens[..12].iter().fold(object, |place, &token| match names[token as usize] {
                    Some((a, b)) if place == a => b,
                    Some((a, b)) if place == b => a,
                    Some(_) => place,
                    None => panic!("an instruction is not a question"),
                });
                assert_eq!(answer as usize, place);
            }
            assert_eq!(tokens[12..], [0, 1, 2, 3, 4]);
        }
        assert_eq!(batch.at[..6], [12, 13, 14, 15, 16, 29]);
    }

    #[test]
    fn all_swaps_are_as_likely() {
        let batch = TASK.batch_at(0, Split::Training, 0, 1000);
        let Inputs::Tokens(tokens) = &batch.inputs else { panic!("tokens") };
        let mut counts = [0.0f64; 15];
        tokens.iter().for_each(|&t| counts[t as usize] += 1.0);
        // 12,000 swaps of ten kinds: a standard deviation of 33 each.
        assert!(counts[5..].iter().all(|count| (count - 1200.0).abs() < 165.0), "{counts:?}");
    }
}
