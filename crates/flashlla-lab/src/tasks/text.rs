//! Language modelling: the bytes of a text, each predicted from those before it.

use super::{Batch, Inputs, Interface, Split, Targets, Task, within};
use crate::{Error, Result};
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The text that is read when none is given: the first book of Cicero's "De finibus bonorum et malorum" (45 BC), Latin, 49 kB,
/// as the crate `lipsum` ships it.
pub const DEFAULT_TEXT: &str = lipsum::LIBER_PRIMUS;

/// The options. The last tenth of the text is kept to be judged by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Text {
    /// Bytes that a sequence predicts.
    pub context: usize,
    /// A file; otherwise [`DEFAULT_TEXT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// The bytes to learn from and those to be judged by.
#[derive(Debug)]
pub struct Bytes {
    context: usize,
    training: Vec<u8>,
    evaluation: Vec<u8>,
}

impl Text {
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        within("context", self.context, 1..=65536)
    }

    pub(super) fn open(&self) -> Result<Bytes> {
        let (name, mut bytes) = match &self.file {
            None => ("the text that comes with the program".into(), DEFAULT_TEXT.as_bytes().to_vec()),
            Some(path) => {
                let name = path.display().to_string();
                let bytes = std::fs::read(path).map_err(|error| Error::failed(format!("{name}: {error}")))?;
                (name, bytes)
            }
        };
        let evaluation = bytes.split_off(bytes.len() - bytes.len() / 10);
        if bytes.len().min(evaluation.len()) <= self.context {
            let whole = bytes.len() + evaluation.len();
            return Err(Error::failed(format!(
                "{name}: {whole} bytes are too few; a context of {} needs at least {}, for a tenth is kept to be judged by",
                self.context,
                10 * (self.context + 1)
            )));
        }
        Ok(Bytes { context: self.context, training: bytes, evaluation })
    }
}

impl Task for Bytes {
    fn interface(&self) -> Interface {
        Interface::Tokens { vocabulary: 256 }
    }

    fn batch(&self, rng: &mut ChaCha8Rng, size: usize, split: Split) -> Batch {
        let bytes = match split {
            Split::Training => &self.training,
            Split::Evaluation => &self.evaluation,
        };
        let (mut tokens, mut answers) = (vec![], vec![]);
        for _ in 0..size {
            let start = rng.random_range(0..bytes.len() - self.context);
            let part = &bytes[start..=start + self.context];
            tokens.extend(part[..self.context].iter().map(|&b| u32::from(b)));
            answers.extend(part[1..].iter().map(|&b| u32::from(b)));
        }
        Batch {
            batch: size,
            length: self.context,
            inputs: Inputs::Tokens(tokens),
            at: (0..(size * self.context) as u32).collect(),
            targets: Targets::Tokens(answers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_answered_by_the_next_one_of_its_own_split() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Bytes that tell where they are: below 180 to learn from, the rest to be judged by.
        std::fs::write(file.path(), (0..200).collect::<Vec<u8>>()).unwrap();
        let task = Text { context: 7, file: Some(file.path().into()) }.open().unwrap();
        for (split, range) in [(Split::Training, 0..180), (Split::Evaluation, 180..200)] {
            let mut seen = [false; 200];
            for number in 0..50 {
                let batch = task.batch_at(0, split, number, 10);
                let (Inputs::Tokens(tokens), Targets::Tokens(answers)) = (&batch.inputs, &batch.targets)
                else {
                    panic!("tokens")
                };
                assert_eq!((tokens.len(), batch.at.len()), (70, 70));
                for (&token, &answer) in tokens.iter().zip(answers) {
                    assert!(answer == token + 1 && range.contains(&token) && range.contains(&answer));
                    seen[token as usize] = true;
                }
            }
            assert!(
                seen[range.start as usize..range.end as usize - 1].iter().all(|&s| s),
                "all of it is used"
            );
        }
    }

    #[test]
    fn a_text_too_short_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [b'a'; 69]).unwrap();
        let text = Text { context: 7, file: Some(file.path().into()) };
        assert!(text.open().unwrap_err().to_string().contains("69 bytes are too few"));
        let missing = Text { context: 7, file: Some("no/such/text".into()) };
        assert!(missing.open().unwrap_err().to_string().starts_with("no/such/text: "));
        assert!(Text { context: 1024, file: None }.open().is_ok());
    }
}
