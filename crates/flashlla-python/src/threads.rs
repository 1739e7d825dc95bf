//! The threads of the CPU engine, and waiting for them in a way that Ctrl-C can end.

use crate::raised;
use flashlla::Cpu;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// How often a waiting call looks for signals.
const PATIENCE: Duration = Duration::from_millis(50);

/// The pool in use, of the process that made it.
static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
/// Flags that no call is using. There are as many as there ever were calls at a time.
static FLAGS: Mutex<Vec<&'static AtomicBool>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn build(threads: usize) -> PyResult<Arc<ThreadPool>> {
    let name = |i| format!("flashlla-{i}");
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
    pool.map(Arc::new).map_err(|error| PyRuntimeError::new_err(format!("threads: {error}")))
}

/// Puts a pool in place of the one there is.
fn replace(place: &mut Option<(u32, Arc<ThreadPool>)>, pool: Arc<ThreadPool>) {
    let process = std::process::id();
    if let Some((owner, old)) = place.replace((process, pool))
        && owner != process
    {
        // After a fork the old pool's threads do not exist here; ending them would wait for ever.
        std::mem::forget(old);
    }
}

fn pool() -> PyResult<Arc<ThreadPool>> {
    let mut place = lock(&POOL);
    match &*place {
        Some((owner, pool)) if *owner == std::process::id() => Ok(pool.clone()),
        _ => {
            let pool = build(0)?;
            replace(&mut place, pool.clone());
            Ok(pool)
        }
    }
}

/// The number of threads that CPU calls use.
#[pyfunction]
pub fn get_num_threads() -> PyResult<usize> {
    Ok(pool()?.current_num_threads())
}

/// Sets the number of threads that CPU calls use from now on.
#[pyfunction]
pub fn set_num_threads(threads: i64) -> PyResult<()> {
    let Some(threads) = usize::try_from(threads).ok().filter(|n| (1..=1024).contains(n)) else {
        return Err(PyValueError::new_err(format!(
            "threads: {threads} is not allowed; it must be from 1 to 1024"
        )));
    };
    let pool = build(threads)?;
    replace(&mut lock(&POOL), pool);
    Ok(())
}

/// Runs `work` on the pool with Python's lock released. When a signal raises in the meantime (Ctrl-C), the engine is stopped
/// at its next block and the exception comes back; `work` is over in any case.
pub fn interruptible<R: Send>(
    py: Python<'_>,
    work: impl FnOnce(Cpu) -> flashlla::Result<R> + Send,
) -> PyResult<R> {
    let pool = pool()?;
    let flag: &'static AtomicBool = match lock(&FLAGS).pop() {
        Some(flag) => flag,
        None => Box::leak(Box::default()),
    };
    flag.store(false, Ordering::Relaxed);
    let result = py.detach(|| {
        pool.in_place_scope(|scope| {
            let (sender, receiver) = channel();
            scope.spawn(move |_| {
                // The receiver is gone only if this call panics.
                let _ = sender.send(work(Cpu::new().stopped_by(flag)));
            });
            loop {
                match receiver.recv_timeout(PATIENCE) {
                    Ok(result) => return result.map_err(raised),
                    Err(RecvTimeoutError::Timeout) => {
                        if let Err(raised) = Python::attach(|py| py.check_signals()) {
                            flag.store(true, Ordering::Relaxed);
                            return Err(raised);
                        }
                    }
                    // The work panicked; the scope passes that on when it ends.
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err(PyRuntimeError::new_err("the engine failed"));
                    }
                }
            }
        })
    });
    lock(&FLAGS).push(flag);
    result
}
