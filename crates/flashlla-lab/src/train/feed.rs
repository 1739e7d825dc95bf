//! Batches of training data, made before they are wanted.

use crate::tasks::{Batch, Split, Task};
use std::sync::mpsc::{Receiver, sync_channel};

/// Gives `body` a source of the training batches `numbers`, which it must ask for in their order and may stop asking for.
///
/// With `ahead` of 0 each is made when it is asked for. Otherwise so many threads make the next ones meanwhile, which pays where
/// something else than this processor does the training.
pub fn with_batches<R>(
    task: &dyn Task,
    seed: u64,
    size: usize,
    numbers: std::ops::Range<u64>,
    ahead: usize,
    body: impl FnOnce(&mut dyn FnMut(u64) -> Batch) -> R,
) -> R {
    let make = move |number| task.batch_at(seed, Split::Training, number, size);
    if ahead == 0 {
        return body(&mut { make });
    }
    std::thread::scope(|scope| {
        let sources: Vec<Receiver<Batch>> = (0..ahead)
            .map(|first| {
                let (send, receive) = sync_channel(0);
                let numbers = numbers.clone().skip(first).step_by(ahead);
                // Nobody listens any more once the body has returned.
                scope.spawn(move || numbers.map(make).try_for_each(|batch| send.send(batch)));
                receive
            })
            .collect();
        body(&mut |number| {
            let source = &sources[(number - numbers.start) as usize % ahead];
            source.recv().expect("a batch whose number is in the range, asked for in order")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Permutations;

    #[test]
    fn batches_made_ahead_are_those_made_when_wanted() {
        let task = Permutations { objects: 3, swaps: 4 };
        let some = |ahead, wanted| {
            with_batches(&task, 7, 2, 5..16, ahead, |next| (5..wanted).map(next).collect::<Vec<_>>())
        };
        let plain = some(0, 16);
        assert_ne!(plain[0], plain[1]);
        for ahead in [1, 3, 20] {
            assert_eq!(some(ahead, 16), plain);
            assert_eq!(some(ahead, 9), plain[..4], "a body that stops early");
        }
    }
}
