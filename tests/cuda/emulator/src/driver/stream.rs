//! Streams: each a host thread that does its work in order, so that GPUs and host overlap as they
//! do; and what is recorded of them: events and graphs.
//!
//! Time is counted, not measured: kernels and products move a stream's clock by fixed amounts, so
//! that what a program chooses by times is the same in each run.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::device::Device;
use super::registry::{Handle, Registry};
use super::status::{Outcome, Status};

/// What goes wrong while work runs.
#[derive(Debug)]
pub struct Fault {
    /// What all later calls answer.
    pub status: Status,
    /// For people.
    pub text: String,
}

/// Something that runs in stream order, once or, in a graph, many times.
pub struct Work {
    /// What its stream's clock advances by, nanoseconds.
    pub nanoseconds: u64,
    /// What is done.
    pub run: Box<dyn Fn() -> Result<(), Fault> + Send + Sync>,
}

impl Work {
    /// Makes work that takes no time.
    pub fn new(run: impl Fn() -> Result<(), Fault> + Send + Sync + 'static) -> Self {
        Self::lasting(0, run)
    }

    /// Makes work that takes some.
    pub fn lasting(
        nanoseconds: u64,
        run: impl Fn() -> Result<(), Fault> + Send + Sync + 'static,
    ) -> Self {
        Self {
            nanoseconds,
            run: Box::new(run),
        }
    }
}

/// A place in a stream: behind its first so many works.
#[derive(Clone)]
pub struct Place {
    stream: Arc<Stream>,
    num_works: u64,
}

impl Place {
    /// Waits until the stream has come there.
    pub fn wait(&self) {
        self.stream.wait_for(self.num_works);
    }

    /// Returns the stream's GPU.
    pub fn device(&self) -> &'static Device {
        self.stream.device
    }

    /// Returns whether the stream has come there.
    pub fn is_passed(&self) -> bool {
        self.stream.lock().num_done >= self.num_works
    }
}

struct Queued {
    work: Work,
    after: Vec<Place>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Queued>,
    num_submitted: u64,
    num_done: u64,
    /// What is recorded instead of run.
    capture: Option<Vec<Work>>,
    is_closed: bool,
}

/// A queue of work of one GPU.
pub struct Stream {
    device: &'static Device,
    kind: Kind,
    state: Mutex<State>,
    changed: Condvar,
    /// Its clock, nanoseconds.
    clock: AtomicU64,
}

/// Whom a stream waits for unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// For nobody.
    NonBlocking,
    /// For the default stream.
    Blocking,
    /// For all blocking ones: the stream of handle 0.
    Default,
}

/// All streams but the default ones.
pub static STREAMS: Registry<Stream> = Registry::new();

impl Stream {
    /// Starts a stream.
    pub fn start(device: &'static Device, kind: Kind) -> Arc<Self> {
        let stream = Arc::new(Self {
            device,
            kind,
            state: Mutex::default(),
            changed: Condvar::new(),
            clock: AtomicU64::new(0),
        });
        let worker = Arc::clone(&stream);
        let name = format!("emulated GPU {}", device.ordinal);
        let spawned = thread::Builder::new()
            .name(name)
            .stack_size(16 << 20)
            .spawn(move || worker.work());
        spawned.expect("threads can be started");
        if kind != Kind::Default {
            device.add_stream(&stream);
        }
        stream
    }

    /// Starts the default stream of a GPU.
    pub fn start_default(device: &'static Device) -> Arc<Self> {
        Self::start(device, Kind::Default)
    }

    /// Returns a handle's stream, which of 0 is the current GPU's default one.
    ///
    /// # Errors
    /// When there is none, or its GPU has faulted.
    pub fn of(handle: Handle) -> Outcome<Arc<Self>> {
        // 1 and 2 are the default stream by other names.
        if handle.0 <= 2 {
            return Ok(Arc::clone(Device::current()?.default_stream()));
        }
        let stream = STREAMS.get(handle)?;
        stream.device.check()?;
        Ok(stream)
    }

    /// Returns its GPU.
    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// Returns whether it waits for the default stream.
    pub fn is_blocking(&self) -> bool {
        self.kind == Kind::Blocking
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends work, or records it; returns the place behind it, none where it was recorded.
    pub fn submit(self: &Arc<Self>, work: Work) -> Option<Place> {
        let after = match self.kind {
            Kind::NonBlocking => Vec::new(),
            Kind::Blocking => self
                .device
                .used_default_stream()
                .iter()
                .map(|stream| stream.end())
                .collect(),
            Kind::Default => self
                .device
                .blocking_streams()
                .iter()
                .map(Self::end)
                .collect(),
        };
        let mut state = self.lock();
        if let Some(recorded) = &mut state.capture {
            recorded.push(work);
            return None;
        }
        state.queue.push_back(Queued { work, after });
        state.num_submitted += 1;
        let num_works = state.num_submitted;
        drop(state);
        self.changed.notify_all();
        Some(Place {
            stream: Arc::clone(self),
            num_works,
        })
    }

    /// Returns the place behind all that was submitted.
    pub fn end(self: &Arc<Self>) -> Place {
        let num_works = self.lock().num_submitted;
        Place {
            stream: Arc::clone(self),
            num_works,
        }
    }

    fn wait_for(&self, num_works: u64) {
        let mut state = self.lock();
        while state.num_done < num_works {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until nothing is left to do.
    pub fn wait_for_all(&self) {
        let num_works = self.lock().num_submitted;
        self.wait_for(num_works);
    }

    /// Waits, as `cuStreamSynchronize` does.
    ///
    /// # Errors
    /// When it is being recorded or the GPU has faulted.
    pub fn synchronize(&self) -> Outcome {
        if self.is_capturing() {
            return Err(Status::CAPTURE_UNSUPPORTED);
        }
        self.wait_for_all();
        self.device.check()
    }

    /// Lets the thread end once its work is done.
    pub fn close(self: &Arc<Self>) {
        self.lock().is_closed = true;
        self.changed.notify_all();
        self.device.remove_stream(self);
    }

    /// Returns whether work is recorded.
    pub fn is_capturing(&self) -> bool {
        self.lock().capture.is_some()
    }

    /// Begins to record.
    ///
    /// # Errors
    /// When it already does, or it is the default stream.
    pub fn begin_capture(&self) -> Outcome {
        let mut state = self.lock();
        if self.kind == Kind::Default || state.capture.is_some() {
            return Err(Status::CAPTURE_UNSUPPORTED);
        }
        state.capture = Some(Vec::new());
        Ok(())
    }

    /// Ends the recording and returns what was recorded.
    ///
    /// # Errors
    /// When nothing was begun.
    pub fn end_capture(&self) -> Outcome<Vec<Work>> {
        self.lock().capture.take().ok_or(Status::CAPTURE_UNMATCHED)
    }

    /// Runs work unless something has faulted before.
    fn run(&self, work: &Work) {
        if self.device.check().is_err() {
            return;
        }
        self.clock.fetch_add(work.nanoseconds, Ordering::AcqRel);
        if let Err(fault) = (work.run)() {
            self.device.fail(&fault);
        }
    }

    /// What the thread does.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            let Some(Queued { work, after }) = state.queue.pop_front() else {
                if state.is_closed {
                    return;
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            after.iter().for_each(Place::wait);
            self.run(&work);
            // What the work holds goes before anyone hears that it is done.
            drop(work);
            state = self.lock();
            state.num_done += 1;
            self.changed.notify_all();
        }
    }
}

/// Marks a place in a stream, and when it came to it.
#[derive(Default)]
pub struct Event {
    recorded: Mutex<Recorded>,
    /// The stream's clock then.
    nanoseconds: AtomicU64,
}

#[derive(Default)]
enum Recorded {
    #[default]
    Never,
    At(Place),
    InGraph,
}

/// All events.
pub static EVENTS: Registry<Event> = Registry::new();

impl Event {
    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the event behind what is in the stream.
    pub fn record(self: &Arc<Self>, stream: &Arc<Stream>) {
        let mut recorded = self.lock();
        let (event, place) = (Arc::clone(self), Arc::clone(stream));
        let work = Work::new(move || {
            let now = place.clock.load(Ordering::Acquire);
            event.nanoseconds.store(now, Ordering::Release);
            Ok(())
        });
        *recorded = stream.submit(work).map_or(Recorded::InGraph, Recorded::At);
    }

    /// Returns where it was recorded; none is nowhere, which counts as passed.
    ///
    /// # Errors
    /// When that was while a graph was recorded.
    pub fn place(&self) -> Outcome<Option<Place>> {
        match &*self.lock() {
            Recorded::Never => Ok(None),
            Recorded::At(place) => Ok(Some(place.clone())),
            Recorded::InGraph => Err(Status::CAPTURED_EVENT),
        }
    }

    /// Lets a stream wait for it.
    ///
    /// # Errors
    /// When a recording would wait for something outside of it, or the other way round.
    pub fn delay(&self, stream: &Arc<Stream>) -> Outcome {
        match (self.place(), stream.is_capturing()) {
            (Ok(None), _) => Ok(()),
            // One recording is one stream, which comes to its own events in order.
            (Err(_), true) => Ok(()),
            (Err(status), false) => Err(status),
            (Ok(Some(_)), true) => Err(Status::CAPTURE_ISOLATION),
            (Ok(Some(place)), false) => {
                stream.submit(Work::new(move || {
                    place.wait();
                    Ok(())
                }));
                Ok(())
            }
        }
    }

    /// Returns milliseconds from this event to a later one of the same stream.
    ///
    /// # Errors
    /// When either was not recorded or has not come.
    pub fn until(&self, end: &Self) -> Outcome<f32> {
        for event in [self, end] {
            let place = event.place()?.ok_or(Status::INVALID_HANDLE)?;
            if !place.is_passed() {
                return Err(Status::NOT_READY);
            }
        }
        let [start, end] = [self, end].map(|event| event.nanoseconds.load(Ordering::Acquire));
        Ok((end as f64 - start as f64) as f32 / 1e6)
    }
}

/// What was recorded of a stream.
pub struct Graph {
    device: &'static Device,
    works: Vec<Work>,
}

/// All graphs. One that is ready to run is the same under another handle.
pub static GRAPHS: Registry<Graph> = Registry::new();

impl Graph {
    /// Makes a graph of what was recorded.
    pub fn new(device: &'static Device, works: Vec<Work>) -> Self {
        Self { device, works }
    }

    /// Appends all of it to a stream.
    ///
    /// # Errors
    /// When the stream is another GPU's or is being recorded.
    pub fn launch(self: &Arc<Self>, stream: &Arc<Stream>) -> Outcome {
        if self.device.ordinal != stream.device().ordinal {
            return Err(Status::INVALID_HANDLE);
        }
        if stream.is_capturing() {
            return Err(Status::CAPTURE_UNSUPPORTED);
        }
        let (graph, place) = (Arc::clone(self), Arc::clone(stream));
        stream.submit(Work::new(move || {
            graph.works.iter().for_each(|work| place.run(work));
            Ok(())
        }));
        Ok(())
    }
}
