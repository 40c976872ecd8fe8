//! Pinned buffers that take turns, so that the host prepares one while the GPU still reads another.

use candle_core::Result;

use super::driver::Driver;
use super::event::Event;
use super::memory::Pinned;

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
