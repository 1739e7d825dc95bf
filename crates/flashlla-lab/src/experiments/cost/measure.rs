//! Time and memory of a piece of work.

use crate::Result;
use peak_alloc::PeakAlloc;
use std::time::{Duration, Instant};

/// Counts what the program has allocated. (Counting costs two additions per allocation.)
#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What a piece of work takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// The median of several runs.
    pub seconds: f64,
    /// The most that it had allocated at one time, on the host.
    pub bytes: usize,
}

/// Measures after one run that is not counted: at least 3 runs and at most 50, about half a second of them.
pub fn measure<R>(mut work: impl FnMut() -> Result<R>) -> Result<Cost> {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    drop(work()?);
    let bytes = MEMORY.peak_usage().saturating_sub(before);
    let (mut times, start) = (vec![], Instant::now());
    while times.len() < 3 || (times.len() < 50 && start.elapsed() < Duration::from_millis(500)) {
        let start = Instant::now();
        std::hint::black_box(work()?);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(Cost { seconds: times[times.len() / 2], bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_allocated_and_how_long_it_took_is_told() {
        let cost = measure(|| {
            let filled = std::hint::black_box(vec![1u8; 3 << 20]);
            std::thread::sleep(Duration::from_millis(2));
            drop(filled);
            Ok(std::hint::black_box(vec![1u8; 1 << 20]))
        })
        .unwrap();
        // Other tests allocate meanwhile.
        assert!(cost.bytes >= 3 << 20, "{}", cost.bytes);
        assert!(cost.seconds >= 2e-3);
    }
}
