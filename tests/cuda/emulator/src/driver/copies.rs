//! The calls for memory: allocations, copies and fills, in stream order or at once.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

use super::allocations::{self, Owner, allocate, free, holds};
use super::device::{Device, config};
use super::registry::Handle;
use super::status::{Out, Outcome, Status, answer, put};
use super::stream::{Fault, Stream, Work};

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<'_, usize>, total: Out<'_, usize>) -> Status {
    answer(Device::current().and_then(|device| {
        put(free, allocations::free_bytes(device.ordinal))?;
        put(total, config().memory_bytes)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: Out<'_, u64>, num_bytes: usize) -> Status {
    answer(
        Device::current()
            .and_then(|device| put(address, allocate(Owner::Device(device.ordinal), num_bytes)?)),
    )
}

/// Waits for the GPU before the memory goes.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> Status {
    answer(Device::current().and_then(|device| {
        if address == 0 {
            return Ok(());
        }
        device.synchronize()?;
        free(address, |owner| owner != Owner::Host)
    }))
}

/// Memory of the pool is there at once; its freeing keeps to the stream's order.
#[unsafe(no_mangle)]
extern "C" fn cuMemAllocAsync(address: Out<'_, u64>, num_bytes: usize, stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| {
        if stream.is_capturing() {
            return Err(Status::CAPTURE_UNSUPPORTED);
        }
        put(
            address,
            allocate(Owner::Device(stream.device().ordinal), num_bytes)?,
        )
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(address: u64, stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| {
        if stream.is_capturing() {
            return Err(Status::CAPTURE_UNSUPPORTED);
        }
        match allocations::owner_of(address) {
            Some(Owner::Device(_)) => {}
            _ => return Err(Status::INVALID_VALUE),
        }
        stream.submit(Work::new(move || {
            free(address, |_| true).map_err(|status| Fault {
                status,
                text: format!("{address:#x} is freed twice"),
            })
        }));
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(address: Out<'_, u64>, num_bytes: usize, _flags: c_uint) -> Status {
    answer(Device::current().and_then(|_| put(address, allocate(Owner::Host, num_bytes)?)))
}

/// Waits for all GPUs, since any may use pinned memory.
#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: u64) -> Status {
    for ordinal in 0..config().num_gpus {
        // A faulted GPU's memory goes all the same.
        let _ = Device::get(ordinal as c_int).map(Device::synchronize);
    }
    answer(free(address, |owner| owner == Owner::Host))
}

/// One copy of rows, `width` bytes each; of one row, plain.
#[derive(Clone, Copy)]
struct Rows {
    target: u64,
    source: u64,
    pitches: [usize; 2],
    width: usize,
    height: usize,
}

impl Rows {
    fn plain(target: u64, source: u64, width: usize) -> Self {
        Self {
            target,
            source,
            pitches: [width; 2],
            width,
            height: 1,
        }
    }

    /// Returns the bytes from the first to the last of the rows.
    fn extent(&self, pitch: usize) -> usize {
        match (self.width, self.height) {
            (0, _) | (_, 0) => 0,
            (width, height) => pitch * (height - 1) + width,
        }
    }

    /// Checks that what should be the GPU's is allocated, so that a wrong address is refused at
    /// once.
    fn check(&self, is_device: [bool; 2]) -> Outcome {
        let [target, source] = is_device;
        let is_there =
            |is_device: bool, address, pitch| !is_device || holds(address, self.extent(pitch));
        let [target_pitch, source_pitch] = self.pitches;
        match is_there(target, self.target, target_pitch)
            && is_there(source, self.source, source_pitch)
        {
            true => Ok(()),
            false => Err(Status::INVALID_VALUE),
        }
    }

    /// Copies.
    ///
    /// # Safety
    /// Both ranges must be memory of this process.
    unsafe fn copy(&self) {
        for row in 0..self.height {
            let target = self.target as usize + row * self.pitches[0];
            let source = self.source as usize + row * self.pitches[1];
            // SAFETY: the caller's; ranges of a wrong program may overlap.
            unsafe { (target as *mut u8).copy_from(source as *const u8, self.width) };
        }
    }

    /// Copies in stream order. Memory of the host that is not pinned is read before the call
    /// returns, or written: as a driver does, which has nothing else to rely on.
    fn submit(self, stream: &Arc<Stream>, is_device: [bool; 2]) -> Outcome {
        self.check(is_device)?;
        let num_bytes = self.extent(self.pitches[1]);
        let is_pageable = |address| allocations::owner_of(address).is_none();
        let mut rows = self;
        let staged = if !is_device[1] && num_bytes > 0 && is_pageable(self.source) {
            if stream.is_capturing() {
                return Err(Status::CAPTURE_UNSUPPORTED);
            }
            let mut staged = vec![0u8; num_bytes];
            // SAFETY: the caller has that many bytes there, which the call may read.
            unsafe {
                staged
                    .as_mut_ptr()
                    .copy_from_nonoverlapping(self.source as *const u8, num_bytes)
            };
            // The vector's bytes stay where they are when it moves into the work.
            rows.source = staged.as_ptr() as u64;
            staged
        } else {
            Vec::new()
        };
        let work = Work::new(move || {
            let _ = &staged;
            // Freed meanwhile, they would be gone.
            rows.check(is_device).map_err(|_| Fault {
                status: Status::ILLEGAL_ADDRESS,
                text: format!(
                    "a copy from {:#x} to {:#x}: memory was freed",
                    rows.source, rows.target
                ),
            })?;
            // SAFETY: what is the GPU's was just checked; pinned memory lives until a wait; other
            // memory of the host is staged, or the call waits below.
            unsafe { rows.copy() };
            Ok(())
        });
        let place = stream.submit(work);
        match place {
            Some(place) if !is_device[0] && is_pageable(self.target) => {
                place.wait();
                stream.device().check()
            }
            None if !is_device[0] && is_pageable(self.target) => Err(Status::CAPTURE_UNSUPPORTED),
            _ => Ok(()),
        }
    }
}

fn copy(
    stream: Handle,
    target: u64,
    source: u64,
    num_bytes: usize,
    is_device: [bool; 2],
) -> Status {
    let rows = Rows::plain(target, source, num_bytes);
    answer(Stream::of(stream).and_then(|stream| rows.submit(&stream, is_device)))
}

fn copy_now(target: u64, source: u64, num_bytes: usize, is_device: [bool; 2]) -> Status {
    match copy(Handle::NULL, target, source, num_bytes, is_device) {
        Status::SUCCESS => {
            answer(Device::current().and_then(|device| device.default_stream().synchronize()))
        }
        refused => refused,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(
    target: u64,
    source: u64,
    num_bytes: usize,
    stream: Handle,
) -> Status {
    copy(stream, target, source, num_bytes, [true, false])
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(
    target: u64,
    source: u64,
    num_bytes: usize,
    stream: Handle,
) -> Status {
    copy(stream, target, source, num_bytes, [false, true])
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(
    target: u64,
    source: u64,
    num_bytes: usize,
    stream: Handle,
) -> Status {
    copy(stream, target, source, num_bytes, [true, true])
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(
    target: u64,
    _target_context: Handle,
    source: u64,
    _source_context: Handle,
    num_bytes: usize,
    stream: Handle,
) -> Status {
    copy(stream, target, source, num_bytes, [true, true])
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(target: u64, source: u64, num_bytes: usize) -> Status {
    copy_now(target, source, num_bytes, [true, false])
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(target: u64, source: u64, num_bytes: usize) -> Status {
    copy_now(target, source, num_bytes, [false, true])
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(target: u64, source: u64, num_bytes: usize) -> Status {
    copy_now(target, source, num_bytes, [true, true])
}

/// One end of a `CUDA_MEMCPY2D`.
#[repr(C)]
struct End {
    x_bytes: usize,
    y: usize,
    memory_type: c_int,
    host: u64,
    device: u64,
    array: *const c_void,
    pitch: usize,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
struct Memcpy2d {
    source: End,
    target: End,
    width: usize,
    height: usize,
}

impl End {
    /// Returns where the rows begin, and whether that is the GPU's.
    fn start(&self, width: usize) -> Outcome<(u64, bool)> {
        let (address, is_device) = match self.memory_type {
            1 => (self.host, false),
            2 => (self.device, true),
            _ => return Err(Status::NOT_SUPPORTED),
        };
        if self.x_bytes + width > self.pitch {
            return Err(Status::INVALID_VALUE);
        }
        Ok((
            address + (self.y * self.pitch + self.x_bytes) as u64,
            is_device,
        ))
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpy2DAsync_v2(copy: Option<&Memcpy2d>, stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| {
        let copy = copy.ok_or(Status::INVALID_VALUE)?;
        let (source, is_device_source) = copy.source.start(copy.width)?;
        let (target, is_device_target) = copy.target.start(copy.width)?;
        let pitches = [copy.target.pitch, copy.source.pitch];
        let rows = Rows {
            target,
            source,
            pitches,
            width: copy.width,
            height: copy.height,
        };
        rows.submit(&stream, [is_device_target, is_device_source])
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(target: u64, value: u8, num_bytes: usize, stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| {
        if !holds(target, num_bytes) {
            return Err(Status::INVALID_VALUE);
        }
        stream.submit(Work::new(move || {
            if !holds(target, num_bytes) {
                let text =
                    format!("{num_bytes} bytes at {target:#x} are filled after they were freed");
                return Err(Fault {
                    status: Status::ILLEGAL_ADDRESS,
                    text,
                });
            }
            // SAFETY: just checked; work on the same memory is ordered by streams.
            unsafe { allocations::fill(target, value, num_bytes) };
            Ok(())
        }));
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(target: u64, value: u8, num_bytes: usize) -> Status {
    match cuMemsetD8Async(target, value, num_bytes, Handle::NULL) {
        Status::SUCCESS => {
            answer(Device::current().and_then(|device| device.default_stream().synchronize()))
        }
        refused => refused,
    }
}
