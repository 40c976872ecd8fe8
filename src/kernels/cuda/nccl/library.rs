//! NCCL's shared library, loaded while the program runs: the few functions that are used.
//!
//! The declarations are those of `nccl.h`, which have not changed since NCCL 2.7.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use candle_core::{Result, bail};
use cudarc::driver::sys::CUstream;

/// Where the library is looked for, in this order.
const PATHS: [&str; 5] = [
    "libnccl.so.2",
    "libnccl.so",
    "/usr/lib/x86_64-linux-gnu/libnccl.so.2",
    "/usr/lib/aarch64-linux-gnu/libnccl.so.2",
    "/usr/local/cuda/lib64/libnccl.so.2",
];
/// What NCCL is told where the user tells nothing else: no NVLink multicast, which some machines
/// forbid, and all connections are made at the start, not in the middle of a step.
const DEFAULTS: [(&str, &str); 2] = [("NCCL_NVLS_ENABLE", "0"), ("NCCL_RUNTIME_CONNECT", "0")];

/// `ncclComm_t`.
pub(super) type RawComm = *mut c_void;

/// `ncclUniqueId`: how the ranks of a group find each other.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub(in crate::kernels) struct UniqueId([u8; 128]);

/// `ncclDataType_t`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) enum DataType {
    Uint32 = 3,
    Float16 = 6,
    Float32 = 7,
    Bfloat16 = 9,
}

/// `ncclSum` of `ncclRedOp_t`.
const SUM: c_int = 0;
/// `ncclSuccess` and `ncclInProgress` of `ncclResult_t`.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

type ReduceFn = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    DataType,
    c_int,
    RawComm,
    CUstream,
) -> c_int;
type BroadcastFn = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    DataType,
    c_int,
    RawComm,
    CUstream,
) -> c_int;
type SendFn =
    unsafe extern "C" fn(*const c_void, usize, DataType, c_int, RawComm, CUstream) -> c_int;
type ReceiveFn =
    unsafe extern "C" fn(*mut c_void, usize, DataType, c_int, RawComm, CUstream) -> c_int;
type LastErrorFn = unsafe extern "C" fn(RawComm) -> *const c_char;

/// The loaded library.
pub(super) struct Library {
    /// What it was found as.
    path: &'static str,
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(RawComm) -> c_int,
    comm_destroy: unsafe extern "C" fn(RawComm) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(RawComm, *mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: Option<LastErrorFn>,
    all_reduce: ReduceFn,
    broadcast: BroadcastFn,
    send: SendFn,
    receive: ReceiveFn,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
}

impl Library {
    /// Loads the library, once.
    ///
    /// # Errors
    /// When there is none, with all that was tried, or it lacks a function.
    pub(super) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        match LIBRARY.get_or_init(Self::load) {
            Ok(library) => Ok(library),
            Err(message) => bail!("{message}"),
        }
    }

    fn load() -> std::result::Result<Self, String> {
        for (name, value) in DEFAULTS {
            if std::env::var_os(name).is_none() {
                // SAFETY: the engine comes here before it starts threads, and those of the server
                // read no environment.
                unsafe { std::env::set_var(name, value) };
            }
        }
        let mut tried = Vec::new();
        for path in PATHS {
            match open(path) {
                Ok(handle) => return Self::bind(handle, path),
                Err(error) => tried.push(format!("  {path}: {error}")),
            }
        }
        Err(format!(
            "NCCL was not found. Tried:\n{}\nInstall it (libnccl2 in NVIDIA's repository for Debian and \
             Ubuntu, or the wheel nvidia-nccl-cu13, whose lib folder goes into LD_LIBRARY_PATH)",
            tried.join("\n")
        ))
    }

    fn bind(handle: *mut c_void, path: &'static str) -> std::result::Result<Self, String> {
        // SAFETY: the fields have the types that nccl.h declares for these names.
        unsafe {
            Ok(Self {
                path,
                get_version: symbol(handle, path, "ncclGetVersion")?,
                get_unique_id: symbol(handle, path, "ncclGetUniqueId")?,
                comm_init_rank: symbol(handle, path, "ncclCommInitRank")?,
                comm_abort: symbol(handle, path, "ncclCommAbort")?,
                comm_destroy: symbol(handle, path, "ncclCommDestroy")?,
                comm_get_async_error: symbol(handle, path, "ncclCommGetAsyncError")?,
                get_error_string: symbol(handle, path, "ncclGetErrorString")?,
                // Since 2.13.
                get_last_error: symbol(handle, path, "ncclGetLastError").ok(),
                all_reduce: symbol(handle, path, "ncclAllReduce")?,
                broadcast: symbol(handle, path, "ncclBroadcast")?,
                send: symbol(handle, path, "ncclSend")?,
                receive: symbol(handle, path, "ncclRecv")?,
                group_start: symbol(handle, path, "ncclGroupStart")?,
                group_end: symbol(handle, path, "ncclGroupEnd")?,
            })
        }
    }

    /// Returns version and place, for people.
    pub(super) fn describe(&self) -> Result<String> {
        let mut version = 0;
        // SAFETY: writes one number.
        self.check("tell its version", unsafe {
            (self.get_version)(&raw mut version)
        })?;
        let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
        Ok(format!("NCCL {major}.{minor}.{patch} ({})", self.path))
    }

    /// Makes the id of a new group.
    pub(super) fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes one id.
        self.check("make the id of a group", unsafe {
            (self.get_unique_id)(&raw mut id)
        })?;
        Ok(id)
    }

    /// Joins a group on the GPU whose context is current; returns when all ranks have.
    pub(super) fn join(&self, id: UniqueId, rank: usize, world_size: usize) -> Result<RawComm> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: writes one communicator.
        let joined =
            unsafe { (self.comm_init_rank)(&raw mut comm, world_size as c_int, id, rank as c_int) };
        self.check("join the group", joined)?;
        Ok(comm)
    }

    /// Lets all kernels of a communicator end and frees it.
    ///
    /// # Safety
    /// It must be one that [`Self::join`] returned and that nobody uses afterwards.
    pub(super) unsafe fn abort(&self, comm: RawComm) {
        // SAFETY: passed on. It is the way out of an error, so another one is no news.
        let _ = unsafe { (self.comm_abort)(comm) };
    }

    /// Frees a communicator whose work is done.
    ///
    /// # Safety
    /// As [`Self::abort`].
    pub(super) unsafe fn destroy(&self, comm: RawComm) {
        // SAFETY: passed on.
        let _ = unsafe { (self.comm_destroy)(comm) };
    }

    /// Checks that nothing has gone wrong in what a communicator has in work.
    ///
    /// # Safety
    /// The communicator must live.
    pub(super) unsafe fn check_comm(&self, comm: RawComm) -> Result<()> {
        let mut state = SUCCESS;
        // SAFETY: writes one number.
        let asked = unsafe { (self.comm_get_async_error)(comm, &raw mut state) };
        self.check("tell the state of the group", asked)?;
        self.check("go on", state)
    }

    /// Adds `count` numbers over all ranks, in their place, in stream order.
    ///
    /// # Safety
    /// `values` must hold that many numbers on the GPU of the communicator, which must live.
    pub(super) unsafe fn all_reduce(
        &self,
        values: *mut c_void,
        count: usize,
        dtype: DataType,
        (comm, stream): (RawComm, CUstream),
    ) -> Result<()> {
        // SAFETY: passed on.
        self.check("add", unsafe {
            (self.all_reduce)(values, values, count, dtype, SUM, comm, stream)
        })
    }

    /// Gives rank `root`'s `count` numbers to all ranks, in their place, in stream order.
    ///
    /// # Safety
    /// As [`Self::all_reduce`].
    pub(super) unsafe fn broadcast(
        &self,
        (values, count): (*mut c_void, usize),
        dtype: DataType,
        root: usize,
        (comm, stream): (RawComm, CUstream),
    ) -> Result<()> {
        // SAFETY: passed on.
        self.check("broadcast", unsafe {
            (self.broadcast)(values, values, count, dtype, root as c_int, comm, stream)
        })
    }

    /// Sends `count` numbers to rank `to`, in stream order.
    ///
    /// # Safety
    /// As [`Self::all_reduce`].
    pub(super) unsafe fn send(
        &self,
        (values, count): (*const c_void, usize),
        dtype: DataType,
        to: usize,
        (comm, stream): (RawComm, CUstream),
    ) -> Result<()> {
        // SAFETY: passed on.
        self.check("send", unsafe {
            (self.send)(values, count, dtype, to as c_int, comm, stream)
        })
    }

    /// Receives `count` numbers from rank `from`, in stream order.
    ///
    /// # Safety
    /// As [`Self::all_reduce`].
    pub(super) unsafe fn receive(
        &self,
        (values, count): (*mut c_void, usize),
        dtype: DataType,
        from: usize,
        (comm, stream): (RawComm, CUstream),
    ) -> Result<()> {
        // SAFETY: passed on.
        self.check("receive", unsafe {
            (self.receive)(values, count, dtype, from as c_int, comm, stream)
        })
    }

    /// Makes one operation of those that `work` calls.
    pub(super) fn together(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        // SAFETY: takes and touches nothing of ours.
        self.check("begin a group of operations", unsafe {
            (self.group_start)()
        })?;
        let done = work();
        // Also after an error: what was begun must end.
        // SAFETY: as above.
        let ended = self.check("end a group of operations", unsafe { (self.group_end)() });
        done.and(ended)
    }

    fn check(&self, what: &str, result: c_int) -> Result<()> {
        if matches!(result, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: a text that the library keeps.
            false => unsafe { CStr::from_ptr(text) }
                .to_string_lossy()
                .trim()
                .to_owned(),
        };
        // SAFETY: takes any number.
        let error = text(unsafe { (self.get_error_string)(result) });
        // SAFETY: takes no communicator too.
        let last = |get: LastErrorFn| text(unsafe { get(std::ptr::null_mut()) });
        let last = self.get_last_error.map(last).unwrap_or_default();
        bail!("NCCL cannot {what}: {error} ({last}); NCCL_DEBUG=INFO tells more")
    }
}

fn open(path: &str) -> std::result::Result<*mut c_void, String> {
    let name = CString::new(path).map_err(|error| error.to_string())?;
    // SAFETY: the library's initialisers are NCCL's; dlerror's text is read before the next call.
    unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        match handle.is_null() {
            false => Ok(handle),
            true => Err(loading_error()),
        }
    }
}

/// Returns a function of the library.
///
/// # Safety
/// `F` must be the type of a pointer to it.
unsafe fn symbol<F: Copy>(
    handle: *mut c_void,
    path: &str,
    name: &str,
) -> std::result::Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    let c_name = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: the handle is open; the caller vouches for the type.
    unsafe {
        let address = libc::dlsym(handle, c_name.as_ptr());
        match address.is_null() {
            true => Err(format!("{path} has no {name}: it is no NCCL 2.7 or newer")),
            false => Ok(std::mem::transmute_copy(&address)),
        }
    }
}

/// Returns why the last call failed.
fn loading_error() -> String {
    // SAFETY: a text of this thread, or null.
    unsafe {
        let text = libc::dlerror();
        match text.is_null() {
            true => "no reason given".to_owned(),
            false => CStr::from_ptr(text).to_string_lossy().into_owned(),
        }
    }
}
