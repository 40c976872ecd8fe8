//! The GPUs, what they are said to be, and their primary contexts.

use std::cell::Cell;
use std::env;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::str::FromStr;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use super::registry::Handle;
use super::status::{Out, Outcome, Status, answer, put};
use super::stream::{Fault, Stream};

/// What the environment says that the GPUs are.
#[derive(Debug)]
pub struct Config {
    /// `$EMULATED_GPUS`, 1 unless set.
    pub num_gpus: usize,
    /// `$EMULATED_CAPABILITY`: 8.0 unless set, 8.6, 8.9 or 9.0.
    pub capability: (u32, u32),
    /// `$EMULATED_MULTIPROCESSORS`, 4 unless set: kernels that fill a GPU with blocks take longer
    /// with more.
    pub num_multiprocessors: u32,
    /// `$EMULATED_MEMORY_MIB`, 4096 unless set.
    pub memory_bytes: usize,
    /// Whether cuBLASLt's products count as faster than kernels: `$EMULATED_CUBLASLT`, `fast`
    /// unless set, or `slow`.
    pub has_fast_products: bool,
}

static CONFIG: LazyLock<Config> = LazyLock::new(|| Config {
    num_gpus: setting("EMULATED_GPUS", "a number of GPUs up to 64", 1, |&num| {
        num <= 64
    }),
    capability: {
        let tenths = setting(
            "EMULATED_CAPABILITY",
            "8.0, 8.6, 8.9 or 9.0",
            8.0,
            |tenths| [8.0, 8.6, 8.9, 9.0].contains(tenths),
        );
        let tenths = (tenths * 10f64).round() as u32;
        (tenths / 10, tenths % 10)
    },
    num_multiprocessors: setting(
        "EMULATED_MULTIPROCESSORS",
        "a number from 1 to 1024",
        4,
        |num| (1..=1024).contains(num),
    ),
    memory_bytes: setting(
        "EMULATED_MEMORY_MIB",
        "MiB of a GPU's memory",
        4096usize,
        |&mib| mib < 1 << 30,
    ) << 20,
    has_fast_products: setting(
        "EMULATED_CUBLASLT",
        "fast or slow",
        "fast".to_owned(),
        |word: &String| ["fast", "slow"].contains(&word.as_str()),
    ) == "fast",
});

/// Returns what the environment says.
///
/// # Panics
/// When it says something that cannot be.
pub fn config() -> &'static Config {
    &CONFIG
}

fn setting<T: FromStr>(name: &str, wanted: &str, default: T, is_valid: impl Fn(&T) -> bool) -> T {
    let Ok(text) = env::var(name) else {
        return default;
    };
    let value = text.parse().ok().filter(is_valid);
    value.unwrap_or_else(|| panic!("{name} is {text:?}; the emulated CUDA driver wants {wanted}"))
}

/// One GPU, which is also its primary context.
pub struct Device {
    /// Its number.
    pub ordinal: usize,
    /// The first fault, which every later call answers with.
    fault: OnceLock<Status>,
    streams: Mutex<Vec<Arc<Stream>>>,
    default_stream: OnceLock<Arc<Stream>>,
    /// GPUs whose memory this one's kernels may use.
    peers: Mutex<Vec<usize>>,
}

static DEVICES: LazyLock<Vec<Device>> = LazyLock::new(|| {
    let device = |ordinal| Device {
        ordinal,
        fault: OnceLock::new(),
        streams: Mutex::default(),
        default_stream: OnceLock::new(),
        peers: Mutex::default(),
    };
    (0..config().num_gpus).map(device).collect()
});

thread_local! {
    static CURRENT: Cell<Option<&'static Device>> = const { Cell::new(None) };
}

/// Contexts' handles are the GPU's number and this.
const CONTEXTS: usize = 0x100;

impl Device {
    /// Returns GPU `ordinal`.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn get(ordinal: c_int) -> Outcome<&'static Self> {
        let device = usize::try_from(ordinal)
            .ok()
            .and_then(|ordinal| DEVICES.get(ordinal));
        device.ok_or(Status::INVALID_DEVICE)
    }

    /// Returns the GPU whose context is current on this thread.
    ///
    /// # Errors
    /// When none is, or that GPU has faulted.
    pub fn current() -> Outcome<&'static Self> {
        let device = CURRENT.get().ok_or(Status::INVALID_CONTEXT)?;
        device.check()?;
        Ok(device)
    }

    fn of_context(context: Handle) -> Outcome<&'static Self> {
        let ordinal = context
            .0
            .checked_sub(CONTEXTS)
            .ok_or(Status::INVALID_CONTEXT)?;
        DEVICES.get(ordinal).ok_or(Status::INVALID_CONTEXT)
    }

    fn context(&self) -> Handle {
        Handle(CONTEXTS + self.ordinal)
    }

    /// Checks that nothing has faulted.
    ///
    /// # Errors
    /// The first fault's status.
    pub fn check(&self) -> Outcome {
        self.fault.get().map_or(Ok(()), |&status| Err(status))
    }

    /// Takes note of a fault; the first one is printed.
    pub fn fail(&self, fault: &Fault) {
        if self.fault.set(fault.status).is_ok() {
            eprintln!("emulated GPU {}: {}", self.ordinal, fault.text);
        }
    }

    fn lock_streams(&self) -> MutexGuard<'_, Vec<Arc<Stream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a stream that waiting for the GPU waits for.
    pub fn add_stream(&self, stream: &Arc<Stream>) {
        self.lock_streams().push(Arc::clone(stream));
    }

    /// Forgets a stream that is destroyed.
    pub fn remove_stream(&self, stream: &Arc<Stream>) {
        self.lock_streams()
            .retain(|other| !Arc::ptr_eq(other, stream));
    }

    /// Returns the streams that wait for the default stream and that it waits for.
    pub fn blocking_streams(&self) -> Vec<Arc<Stream>> {
        self.lock_streams()
            .iter()
            .filter(|stream| stream.is_blocking())
            .cloned()
            .collect()
    }

    /// Returns the default stream if anything has used it.
    pub fn used_default_stream(&self) -> Option<&Arc<Stream>> {
        self.default_stream.get()
    }

    /// Returns the stream of handle 0.
    pub fn default_stream(&'static self) -> &'static Arc<Stream> {
        self.default_stream
            .get_or_init(|| Stream::start_default(self))
    }

    /// Waits for all streams.
    ///
    /// # Errors
    /// When something has faulted.
    pub fn synchronize(&self) -> Outcome {
        let streams = self.lock_streams().clone();
        streams
            .iter()
            .chain(self.default_stream.get())
            .for_each(|stream| stream.wait_for_all());
        self.check()
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> Status {
    match (flags, config().num_gpus) {
        (0, 0) => Status::NO_DEVICE,
        (0, _) => Status::SUCCESS,
        _ => Status::INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<'_, c_int>) -> Status {
    answer(put(version, 13_000))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<'_, c_int>) -> Status {
    answer(put(count, DEVICES.len() as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: Out<'_, c_int>, ordinal: c_int) -> Status {
    answer(Device::get(ordinal).and_then(|_| put(device, ordinal)))
}

/// # Safety
/// `name` must have room for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Status {
    answer(Device::get(device).and_then(|_| {
        let (major, minor) = config().capability;
        let text = format!("Emulated GPU {major}.{minor}");
        let len = usize::try_from(len).unwrap_or(0);
        if name.is_null() || len == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let num_bytes = text.len().min(len - 1);
        // SAFETY: `num_bytes` and the zero fit into the caller's `len` bytes.
        unsafe {
            name.copy_from_nonoverlapping(text.as_ptr().cast(), num_bytes);
            name.add(num_bytes).write(0);
        }
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(num_bytes: Out<'_, usize>, device: c_int) -> Status {
    answer(Device::get(device).and_then(|_| put(num_bytes, config().memory_bytes)))
}

/// Shared memory that a block may have at most, bytes.
pub fn max_shared_bytes() -> u32 {
    match config().capability {
        (8, 0) => 163 << 10,
        (8, _) => 99 << 10,
        _ => 227 << 10,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(
    value: Out<'_, c_int>,
    attribute: c_int,
    device: c_int,
) -> Status {
    answer(Device::get(device).and_then(|_| {
        let config = config();
        let found = match attribute {
            // Threads of a block, and its sizes.
            1..=3 => 1024,
            4 => 64,
            // Sizes of a grid.
            5 => i32::MAX,
            6 | 7 => 65_535,
            // Shared memory of a block unless it asks, constant memory, threads of a warp.
            8 => 48 << 10,
            9 => 64 << 10,
            10 => 32,
            // Registers of a block, clock in kHz.
            12 => 65_536,
            13 => 1_000_000,
            16 => config.num_multiprocessors as c_int,
            // Maps host memory, concurrent kernels, unified addressing.
            19 | 31 | 41 => 1,
            // Level 2 cache, threads of a multiprocessor.
            38 => 32 << 20,
            39 => 2048,
            75 => config.capability.0 as c_int,
            76 => config.capability.1 as c_int,
            // Shared memory of a multiprocessor, registers of one, cooperative launches.
            81 => max_shared_bytes() as c_int + 1024,
            82 => 65_536,
            95 => 1,
            97 => max_shared_bytes() as c_int,
            // Memory pools, clusters.
            115 => 1,
            120 => c_int::from(config.capability >= (9, 0)),
            _ => 0,
        };
        put(value, found)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: Out<'_, Handle>, device: c_int) -> Status {
    answer(Device::get(device).and_then(|device| put(context, device.context())))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    answer(Device::get(device).map(|_| ()))
}

/// Contexts of one's own are not made, so none is destroyed.
#[unsafe(no_mangle)]
extern "C" fn cuCtxDestroy_v2(_context: Handle) -> Status {
    Status::INVALID_CONTEXT
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: Out<'_, Handle>) -> Status {
    answer(put(
        context,
        CURRENT.get().map_or(Handle::NULL, Device::context),
    ))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: Out<'_, c_int>) -> Status {
    answer(Device::current().and_then(|current| put(device, current.ordinal as c_int)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> Status {
    if context == Handle::NULL {
        CURRENT.set(None);
        return Status::SUCCESS;
    }
    answer(Device::of_context(context).map(|device| CURRENT.set(Some(device))))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    answer(Device::current().and_then(Device::synchronize))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceCanAccessPeer(
    can_access: Out<'_, c_int>,
    device: c_int,
    peer: c_int,
) -> Status {
    answer(Device::get(device).and_then(|_| {
        Device::get(peer)?;
        put(can_access, c_int::from(device != peer))
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxEnablePeerAccess(context: Handle, flags: c_uint) -> Status {
    answer(Device::current().and_then(|device| {
        let peer = Device::of_context(context)?.ordinal;
        if flags != 0 || peer == device.ordinal {
            return Err(Status::INVALID_VALUE);
        }
        let mut peers = device.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.contains(&peer) {
            return Err(Status::PEER_ACCESS_ALREADY_ENABLED);
        }
        peers.push(peer);
        Ok(())
    }))
}

/// The pool's handle is its GPU's context.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetDefaultMemPool(pool: Out<'_, Handle>, device: c_int) -> Status {
    answer(Device::get(device).and_then(|device| put(pool, device.context())))
}

/// Memory of pools is as any other, so that access needs no more than the context's.
#[unsafe(no_mangle)]
extern "C" fn cuMemPoolSetAccess(
    pool: Handle,
    accesses: *const c_void,
    num_accesses: usize,
) -> Status {
    answer(
        Device::of_context(pool).and_then(|_| match accesses.is_null() && num_accesses > 0 {
            true => Err(Status::INVALID_VALUE),
            false => Ok(()),
        }),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuMemPoolSetAttribute(
    pool: Handle,
    _attribute: c_int,
    value: *const c_void,
) -> Status {
    answer(
        Device::of_context(pool).and_then(|_| match value.is_null() {
            true => Err(Status::INVALID_VALUE),
            false => Ok(()),
        }),
    )
}
