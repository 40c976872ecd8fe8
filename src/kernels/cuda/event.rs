//! Places in the stream: uploads, downloads and the sampler wait for them, products are timed
//! between two.

use candle_core::Result;
use cudarc::driver::{result, sys};

use super::driver::{Driver, told};

/// A place in the stream that the host can wait for.
pub(super) struct Event(sys::CUevent);

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Makes an event that has come already.
    pub(super) fn new(driver: &Driver) -> Result<Self> {
        Self::with_flags(driver, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn with_flags(driver: &Driver, flags: sys::CUevent_flags) -> Result<Self> {
        driver.bind()?;
        Ok(Self(told("make an event", result::event::create(flags))?))
    }

    /// Puts the event behind everything that is in the stream now.
    pub(super) fn record(&self, driver: &Driver) -> Result<()> {
        // SAFETY: made by `with_flags`; the stream lives as long as the driver.
        told("record an event", unsafe {
            result::event::record(self.0, driver.stream())
        })
    }

    /// Waits until the stream has come to where the event was recorded last.
    ///
    /// # Errors
    /// When a kernel has faulted: the GPU cannot be used any more.
    pub(super) fn wait(&self, driver: &Driver) -> Result<()> {
        driver.bind()?;
        // SAFETY: made by `with_flags`.
        told("wait for the GPU", unsafe {
            result::event::synchronize(self.0)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `with_flags`, destroyed once; the driver waits with it until it has come.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// What was launched between two places in the stream.
pub(super) struct Span {
    start: Event,
    end: Event,
}

impl Span {
    /// Launches `work`, and waits for nothing.
    ///
    /// # Errors
    /// Those of `work`, or when the GPU has faulted.
    pub(super) fn of(driver: &Driver, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let start = Event::with_flags(driver, flags)?;
        let end = Event::with_flags(driver, flags)?;
        start.record(driver)?;
        work()?;
        end.record(driver)?;
        Ok(Self { start, end })
    }

    /// Waits for the work's end and returns how long it took, milliseconds.
    ///
    /// # Errors
    /// When a kernel has faulted: the GPU cannot be used any more.
    pub(super) fn milliseconds(&self, driver: &Driver) -> Result<f32> {
        self.end.wait(driver)?;
        // SAFETY: both were recorded, and the second has come.
        told("time", unsafe {
            result::event::elapsed(self.start.0, self.end.0)
        })
    }
}
