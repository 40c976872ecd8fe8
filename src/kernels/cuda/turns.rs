//! Pinned buffers that take turns, so that the host prepares one while the GPU still reads another.

use candle_core::Result;
use cudarc::driver::{result, sys};

use super::driver::{Driver, told};
use super::memory::Pinned;

/// A place in the stream that the host can wait for.
pub(super) struct Event(sys::CUevent);

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// Makes an event that has come already.
    pub(super) fn new(driver: &Driver) -> Result<Self> {
        driver.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        Ok(Self(told("make an event", result::event::create(flags))?))
    }

    /// Puts the event behind everything that is in the stream now.
    pub(super) fn record(&self, driver: &Driver) -> Result<()> {
        // SAFETY: made by `new`; the stream lives as long as the driver.
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
        // SAFETY: made by `new`.
        told("wait for the GPU", unsafe {
            result::event::synchronize(self.0)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; the driver waits with it until it has come.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Two buffers that are uploaded from in turn.
pub(super) struct Turns<T> {
    buffers: [(Pinned<T>, Event); 2],
    next: usize,
}

impl<T: Copy + Default> Turns<T> {
    /// Allocates twice `len` values.
    pub(super) fn new(driver: &Driver, len: usize) -> Result<Self> {
        let (first, second) = (Pinned::new(driver, len)?, Pinned::new(driver, len)?);
        Ok(Self {
            buffers: [(first, Event::new(driver)?), (second, Event::new(driver)?)],
            next: 0,
        })
    }

    /// Returns the buffer whose turn it is once its last upload has run, and the event to be
    /// recorded after the next one.
    pub(super) fn take(&mut self, driver: &Driver) -> Result<(&mut Pinned<T>, &Event)> {
        let (buffer, uploaded) = &mut self.buffers[self.next];
        self.next = 1 - self.next;
        uploaded.wait(driver)?;
        Ok((buffer, uploaded))
    }
}
