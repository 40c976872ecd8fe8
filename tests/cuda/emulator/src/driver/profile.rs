//! Where the CPU's time goes: with `$EMULATED_PROFILE` set, a table of kernels and products at the
//! program's end.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, PoisonError};

#[derive(Default)]
struct Total {
    num_runs: u64,
    seconds: f64,
}

static TOTALS: LazyLock<Option<Mutex<BTreeMap<String, Total>>>> = LazyLock::new(|| {
    std::env::var_os("EMULATED_PROFILE")?;
    // SAFETY: a function that may run at the end: what it reads is never freed.
    unsafe { libc::atexit(print) };
    Some(Mutex::default())
});

/// Runs something and adds its time on this thread to what is called `name`.
pub fn timed<T>(name: &str, run: impl FnOnce() -> T) -> T {
    let Some(totals) = &*TOTALS else {
        return run();
    };
    let start = thread_seconds();
    let value = run();
    let seconds = thread_seconds() - start;
    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
    let total = totals.entry(name.to_owned()).or_default();
    total.num_runs += 1;
    total.seconds += seconds;
    value
}

/// Returns the CPU time of this thread.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}

extern "C" fn print() {
    let Some(totals) = &*TOTALS else {
        return;
    };
    let totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rows: Vec<_> = totals.iter().collect();
    rows.sort_by(|(_, a), (_, b)| b.seconds.total_cmp(&a.seconds));
    eprintln!(
        "{:>9} {:>8} {:>9}  run by the emulated GPUs",
        "seconds", "runs", "ms a run"
    );
    for (name, Total { num_runs, seconds }) in rows {
        let milliseconds = 1e3 * seconds / *num_runs as f64;
        eprintln!("{seconds:9.3} {num_runs:8} {milliseconds:9.3}  {name}");
    }
}
