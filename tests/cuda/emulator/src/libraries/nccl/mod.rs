//! NCCL between the GPUs of one process: a group's operations meet in stream order, and the last to
//! come computes.
//!
//! An operation whose others never come waits until its communicator is aborted, as NCCL's kernels
//! do.

mod group;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::driver::registry::{Handle, Registry};
use crate::driver::status::{Out, Status, put};
use crate::driver::stream::{Fault, Stream, Work};

use group::{Collective, Comm, Group, Part, Type};

/// An `ncclResult_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
struct NcclStatus(c_int);

impl NcclStatus {
    const SUCCESS: Self = Self(0);
    const CUDA_ERROR: Self = Self(1);
    const INVALID_ARGUMENT: Self = Self(4);
    const INVALID_USAGE: Self = Self(5);
}

impl From<Status> for NcclStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::INVALID_VALUE | Status::INVALID_HANDLE => Self::INVALID_ARGUMENT,
            _ => Self::CUDA_ERROR,
        }
    }
}

type NcclOutcome<T = ()> = Result<T, NcclStatus>;

fn answer(outcome: NcclOutcome) -> NcclStatus {
    outcome.err().unwrap_or(NcclStatus::SUCCESS)
}

fn known(dtype: c_int) -> NcclOutcome<Type> {
    Type::of(dtype).ok_or(NcclStatus::INVALID_ARGUMENT)
}

/// What NCCL's version is said to be: 2.28.9.
const VERSION: c_int = 22_809;

/// `ncclUniqueId`: the group's number, then zeros.
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u64; 16]);

static GROUPS: Mutex<Option<HashMap<u64, Arc<Group>>>> = Mutex::new(None);
static COMMS: Registry<Comm> = Registry::new();

/// An operation of a group of operations, which begins when the group ends.
struct Pending {
    is_receive: bool,
    stream: Arc<Stream>,
    work: Work,
}

thread_local! {
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
    static DEPTH: RefCell<usize> = const { RefCell::new(0) };
}

fn submit(
    stream: Arc<Stream>,
    is_receive: bool,
    run: impl Fn() -> Result<(), Fault> + Send + Sync + 'static,
) {
    PENDING.with_borrow_mut(|pending| {
        pending.push(Pending {
            is_receive,
            stream,
            work: Work::new(run),
        })
    });
    if DEPTH.with_borrow(|&depth| depth == 0) {
        submit_pending();
    }
}

/// What is received comes last, so that two ranks may send to each other in one group.
fn submit_pending() {
    let mut pending = PENDING.take();
    pending.sort_by_key(|operation| operation.is_receive);
    for Pending { stream, work, .. } in pending {
        stream.submit(work);
    }
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(version: Out<'_, c_int>) -> NcclStatus {
    answer(put(version, VERSION).map_err(NcclStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: Out<'_, UniqueId>) -> NcclStatus {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut words = [0; 16];
    words[0] = NEXT.fetch_add(1, Ordering::Relaxed);
    answer(put(id, UniqueId(words)).map_err(NcclStatus::from))
}

/// Returns when all ranks have joined.
#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRank(
    comm: Out<'_, Handle>,
    num_ranks: c_int,
    id: UniqueId,
    rank: c_int,
) -> NcclStatus {
    let (Ok(num_ranks), Ok(rank)) = (usize::try_from(num_ranks), usize::try_from(rank)) else {
        return NcclStatus::INVALID_ARGUMENT;
    };
    if rank >= num_ranks {
        return NcclStatus::INVALID_ARGUMENT;
    }
    let group = {
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        let group = groups.get_or_insert_default().entry(id.0[0]);
        Arc::clone(group.or_insert_with(|| Arc::new(Group::new(num_ranks))))
    };
    let joined = Comm::join(group, rank);
    answer(put(comm, COMMS.enter(Arc::new(joined))).map_err(NcclStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(comm: Handle) -> NcclStatus {
    answer(
        COMMS
            .remove(comm)
            .map(|comm| comm.abort())
            .map_err(NcclStatus::from),
    )
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(comm: Handle) -> NcclStatus {
    answer(COMMS.remove(comm).map(|_| ()).map_err(NcclStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(comm: Handle, error: Out<'_, NcclStatus>) -> NcclStatus {
    let ask = || {
        COMMS.get(comm)?;
        put(error, NcclStatus::SUCCESS)
    };
    answer(ask().map_err(NcclStatus::from))
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(status: NcclStatus) -> *const c_char {
    let text = match status {
        NcclStatus::SUCCESS => c"no error",
        NcclStatus::CUDA_ERROR => c"unhandled cuda error",
        NcclStatus::INVALID_ARGUMENT => c"invalid argument",
        NcclStatus::INVALID_USAGE => c"invalid usage",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetLastError(_comm: Handle) -> *const c_char {
    c"".as_ptr()
}

fn collective(
    part: impl FnOnce(Type) -> Part,
    dtype: c_int,
    comm: Handle,
    stream: Handle,
) -> NcclStatus {
    let start = || {
        let comm = COMMS.get(comm)?;
        let part = Part {
            rank: comm.rank,
            ..part(known(dtype)?)
        };
        if let Collective::Broadcast { root } = part.collective
            && root >= comm.group.num_ranks
        {
            return Err(NcclStatus::INVALID_ARGUMENT);
        }
        submit(Stream::of(stream)?, false, move || comm.meet(part));
        Ok(())
    };
    answer(start())
}

#[unsafe(no_mangle)]
extern "C" fn ncclAllReduce(
    source: u64,
    target: u64,
    count: usize,
    dtype: c_int,
    operation: c_int,
    comm: Handle,
    stream: Handle,
) -> NcclStatus {
    // `ncclSum` alone.
    if operation != 0 {
        return NcclStatus::INVALID_ARGUMENT;
    }
    let part = |dtype| Part {
        rank: 0,
        collective: Collective::Sum,
        source,
        target,
        count,
        dtype,
    };
    collective(part, dtype, comm, stream)
}

#[unsafe(no_mangle)]
extern "C" fn ncclBroadcast(
    source: u64,
    target: u64,
    count: usize,
    dtype: c_int,
    root: c_int,
    comm: Handle,
    stream: Handle,
) -> NcclStatus {
    let Ok(root) = usize::try_from(root) else {
        return NcclStatus::INVALID_ARGUMENT;
    };
    let part = |dtype| Part {
        rank: 0,
        collective: Collective::Broadcast { root },
        source,
        target,
        count,
        dtype,
    };
    collective(part, dtype, comm, stream)
}

/// Returns the communicator, the other rank and the stream of something sent or received.
fn route(
    comm: Handle,
    other: c_int,
    stream: Handle,
) -> NcclOutcome<(Arc<Comm>, usize, Arc<Stream>)> {
    let comm = COMMS.get(comm)?;
    let other = usize::try_from(other)
        .ok()
        .filter(|&other| other < comm.group.num_ranks);
    Ok((
        comm,
        other.ok_or(NcclStatus::INVALID_ARGUMENT)?,
        Stream::of(stream)?,
    ))
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(
    source: u64,
    count: usize,
    dtype: c_int,
    to: c_int,
    comm: Handle,
    stream: Handle,
) -> NcclStatus {
    let start = || {
        let (comm, to, stream) = route(comm, to, stream)?;
        let num_bytes = count * known(dtype)?.num_bytes();
        submit(stream, false, move || comm.send(source, num_bytes, to));
        Ok(())
    };
    answer(start())
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(
    target: u64,
    count: usize,
    dtype: c_int,
    from: c_int,
    comm: Handle,
    stream: Handle,
) -> NcclStatus {
    let start = || {
        let (comm, from, stream) = route(comm, from, stream)?;
        let num_bytes = count * known(dtype)?.num_bytes();
        submit(stream, true, move || comm.receive(target, num_bytes, from));
        Ok(())
    };
    answer(start())
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> NcclStatus {
    DEPTH.with_borrow_mut(|depth| *depth += 1);
    NcclStatus::SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> NcclStatus {
    let depth = DEPTH.with_borrow_mut(|depth| {
        let was_begun = *depth > 0;
        *depth = depth.saturating_sub(1);
        was_begun.then_some(*depth)
    });
    match depth {
        None => return NcclStatus::INVALID_USAGE,
        Some(0) => submit_pending(),
        Some(_) => {}
    }
    NcclStatus::SUCCESS
}
