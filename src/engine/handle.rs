//! The engine as the rest of the program sees it: submit a request, read its events.
//!
//! Behind a handle stands one engine thread, or one for each data-parallel replica; a request
//! goes to the one with the least load. Dropping a [`TokenStream`] aborts its sequence: its engine
//! thread sees the closed channel at its next step and frees the blocks.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::Instant;

use tokio::sync::{Notify, mpsc as event_channel};

use super::request::{GenerateRequest, TokenEvent};
use super::stats::{SharedStats, Stats};

/// What is fixed once the engine runs.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineInfo {
    /// Largest number of prompt and generated tokens of one sequence.
    pub max_model_len: usize,
    /// Number of logits.
    pub vocab_size: usize,
    /// Most sequences in one batch.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// Tokens a KV block holds.
    pub block_size: usize,
    /// Requests that may wait, at all replicas together, before `submit` refuses.
    pub max_num_waiting: usize,
    /// Data-parallel replicas, each with batches and a KV cache of its own.
    pub num_replicas: usize,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubmitError {
    /// Too many requests wait already; try again later.
    #[error("the waiting queue is full: {num_waiting} requests wait, {max_num_waiting} may")]
    QueueFull {
        /// Requests waiting now.
        num_waiting: usize,
        /// The limit.
        max_num_waiting: usize,
    },
    /// The engine thread has ended.
    #[error("the engine has stopped: {reason}")]
    EngineDead {
        /// What ended it.
        reason: String,
    },
    /// The engine drains before a shutdown.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// What a handle sends to the engine thread.
pub(super) enum Command {
    /// Take a request.
    Submit(Box<Submission>),
    /// End every sequence as [`super::FinishReason::Aborted`] and return from the loop.
    Stop,
}

/// A request on its way to the engine thread.
pub(super) struct Submission {
    pub(super) request: GenerateRequest,
    /// How many were submitted before it, whichever replica they went to.
    pub(super) number: u64,
    /// Where its events go.
    pub(super) events: event_channel::UnboundedSender<TokenEvent>,
    pub(super) submitted_at: Instant,
}

/// State that one engine thread and all handles share.
pub(super) struct Shared {
    pub(super) info: EngineInfo,
    pub(super) stats: SharedStats,
}

/// Why the engine has ended, once it has: told by a thread of it, or by a watchdog where that
/// thread hangs. All replicas have one: when any fails, the engine is dead.
#[derive(Default)]
pub(super) struct Death {
    reason: OnceLock<String>,
    told: Notify,
}

impl Death {
    /// Tells the reason, unless one was told before.
    pub(super) fn set(&self, reason: String) {
        let _ = self.reason.set(reason);
        self.told.notify_waiters();
    }

    fn get(&self) -> Option<String> {
        self.reason.get().cloned()
    }

    /// Waits until there is a reason.
    async fn wait(&self) {
        // Made before the look, so that what is told between the two is not missed.
        let told = self.told.notified();
        if self.reason.get().is_none() {
            told.await;
        }
    }
}

/// Held by every engine thread. The last one to let go tells that the engine was stopped, unless
/// a failure was told before.
pub(super) struct Running(pub(super) Arc<Death>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.set("it was stopped".to_owned());
    }
}

/// One engine thread as the handles see it.
pub(super) struct Replica {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) shared: Arc<Shared>,
}

impl Replica {
    fn num_waiting(&self) -> usize {
        let waiting = &self.shared.stats.num_requests_waiting;
        waiting.load(Ordering::Relaxed)
    }

    /// vLLM's measure (`DPLBAsyncMPClient`): who waits is yet to be computed from its beginning.
    fn load(&self) -> usize {
        let running = &self.shared.stats.num_requests_running;
        4 * self.num_waiting() + running.load(Ordering::Relaxed)
    }
}

/// A cloneable reference to a running engine, of one replica or of several.
#[derive(Clone)]
pub struct EngineHandle(Arc<Front>);

struct Front {
    info: EngineInfo,
    /// At least one.
    replicas: Vec<Replica>,
    death: Arc<Death>,
    queue: Mutex<Queue>,
}

/// Locked while a request finds its place, so that those of two threads see each other.
#[derive(Default)]
struct Queue {
    /// Requests submitted so far.
    num_submitted: u64,
    /// The replica that is taken next among equally loaded ones.
    turn: usize,
}

/// Where requests go.
struct Place {
    replica: usize,
    /// The first one's [`Submission::number`].
    number: u64,
}

impl EngineHandle {
    /// Connects a handle to engine threads that read the other ends of `replicas`' commands.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn new(replicas: Vec<Replica>, death: Arc<Death>) -> Self {
        let mut info = replicas[0].shared.info.clone();
        for replica in &replicas {
            // Their GPUs may have left unequal room: a request must fit wherever it goes.
            info.max_model_len = info.max_model_len.min(replica.shared.info.max_model_len);
        }
        Self(Arc::new(Front {
            info,
            replicas,
            death,
            queue: Mutex::default(),
        }))
    }

    /// Queues a request at the replica with the least load and returns the stream of its events.
    ///
    /// # Errors
    /// [`SubmitError`] when the queue is full or the engine has ended.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, SubmitError> {
        let Place { replica, number } = self.take_place(1)?;
        self.send(replica, number, request)
    }

    /// Queues the choices of one prompt, all or none, and returns their streams in order. They go
    /// to one replica, which computes the prompt once and keeps its blocks once.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn submit_choices(
        &self,
        requests: Vec<GenerateRequest>,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        let Place { replica, number } = self.take_place(requests.len())?;
        let numbered = requests.into_iter().zip(number..);
        numbered
            .map(|(request, number)| self.send(replica, number, request))
            .collect()
    }

    /// Chooses a replica for so many requests and counts them as waiting there.
    fn take_place(&self, num_requests: usize) -> Result<Place, SubmitError> {
        if let Some(reason) = self.death() {
            return Err(SubmitError::EngineDead { reason });
        }
        let Front {
            info,
            replicas,
            queue,
            ..
        } = &*self.0;
        // Nothing in there can be half done.
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        let num_waiting = replicas.iter().map(Replica::num_waiting).sum();
        if num_waiting + num_requests > info.max_num_waiting {
            return Err(SubmitError::QueueFull {
                num_waiting,
                max_num_waiting: info.max_num_waiting,
            });
        }
        let loads: Vec<usize> = replicas.iter().map(Replica::load).collect();
        let place = Place {
            replica: least_loaded(&loads, queue.turn),
            number: queue.num_submitted,
        };
        queue.turn = place.replica + 1;
        queue.num_submitted += num_requests as u64;
        let waiting = &replicas[place.replica].shared.stats.num_requests_waiting;
        waiting.fetch_add(num_requests, Ordering::Relaxed);
        Ok(place)
    }

    fn send(
        &self,
        replica: usize,
        number: u64,
        request: GenerateRequest,
    ) -> Result<TokenStream, SubmitError> {
        let (sender, receiver) = event_channel::unbounded_channel();
        let submission = Submission {
            request,
            number,
            events: sender,
            submitted_at: Instant::now(),
        };
        let Replica { commands, shared } = &self.0.replicas[replica];
        if commands
            .send(Command::Submit(Box::new(submission)))
            .is_err()
        {
            let waiting = &shared.stats.num_requests_waiting;
            waiting.fetch_sub(1, Ordering::Relaxed);
            let reason = self
                .death()
                .unwrap_or_else(|| "its thread has ended".to_owned());
            return Err(SubmitError::EngineDead { reason });
        }
        Ok(TokenStream {
            receiver,
            death: Arc::clone(&self.0.death),
            replica,
        })
    }

    /// Returns why the engine has ended, or `None` while all of it runs.
    pub fn death(&self) -> Option<String> {
        self.0.death.get()
    }

    /// Returns what is fixed once the engine runs.
    pub fn info(&self) -> &EngineInfo {
        &self.0.info
    }

    /// Returns the present counters, summed over the replicas.
    pub fn stats(&self) -> Stats {
        self.replica_stats().into_iter().sum()
    }

    /// Returns the present counters of each replica.
    pub fn replica_stats(&self) -> Vec<Stats> {
        let replicas = self.0.replicas.iter();
        replicas
            .map(|replica| replica.shared.stats.snapshot())
            .collect()
    }

    /// Asks the engine threads to end all sequences and return.
    pub fn stop(&self) {
        for replica in &self.0.replicas {
            // A closed channel means that the thread has ended already.
            let _ = replica.commands.send(Command::Stop);
        }
    }
}

/// Returns the replica with the least load, the first from `turn` on where several have.
fn least_loaded(loads: &[usize], turn: usize) -> usize {
    let turn = turn % loads.len();
    let order = (turn..loads.len()).chain(0..turn);
    order.min_by_key(|&replica| loads[replica]).unwrap_or(turn)
}

/// The events of one sequence. Dropping it aborts the sequence.
pub struct TokenStream {
    receiver: event_channel::UnboundedReceiver<TokenEvent>,
    death: Arc<Death>,
    replica: usize,
}

impl TokenStream {
    /// Returns the number of the replica that generates the sequence, from 0.
    pub fn replica(&self) -> usize {
        self.replica
    }

    /// Waits for the next event; `None` after the last one, or when the engine died.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        tokio::select! {
            biased;
            event = self.receiver.recv() => event,
            // An engine that hangs in a step lets go of no channel.
            () = self.death.wait() => self.receiver.try_recv().ok(),
        }
    }

    /// Like [`Self::next`], from a thread that may block.
    pub fn next_blocking(&mut self) -> Option<TokenEvent> {
        self.receiver.blocking_recv()
    }

    /// Returns the next event if it is there already.
    pub fn try_next(&mut self) -> Option<TokenEvent> {
        self.receiver.try_recv().ok()
    }
}

/// Starts an engine without a model: `script` answers each request with its events.
///
/// An event list that ends without a `finish` leaves the stream open until `stop`, so tests can
/// hold a request in flight.
#[cfg(test)]
pub(crate) fn mock_engine(
    info: EngineInfo,
    script: impl FnMut(&GenerateRequest) -> Vec<TokenEvent> + Send + 'static,
) -> EngineHandle {
    let (death, script) = (Arc::<Death>::default(), Arc::new(Mutex::new(script)));
    let replicas = (0..info.num_replicas).map(|_| {
        let (commands, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            info: info.clone(),
            stats: SharedStats::default(),
        });
        let (stats, script) = (Arc::clone(&shared), Arc::clone(&script));
        let death = Arc::clone(&death);
        std::thread::spawn(move || {
            answer_commands(&receiver, &stats.stats, |request| {
                script.lock().unwrap()(request)
            });
            death.set("the mock engine was stopped".to_owned());
        });
        Replica { commands, shared }
    });
    let replicas = replicas.collect();
    EngineHandle::new(replicas, death)
}

/// One thread of a [`mock_engine`].
#[cfg(test)]
fn answer_commands(
    commands: &mpsc::Receiver<Command>,
    stats: &SharedStats,
    script: impl Fn(&GenerateRequest) -> Vec<TokenEvent>,
) {
    let mut open = Vec::new();
    while let Ok(Command::Submit(submission)) = commands.recv() {
        let Submission {
            request, events, ..
        } = *submission;
        stats.num_requests_waiting.fetch_sub(1, Ordering::Relaxed);
        let mut finished = false;
        for event in script(&request) {
            finished |= event.is_last();
            let _ = events.send(event);
        }
        if !finished {
            open.push(events);
        }
        open.retain(|events| !events.is_closed());
    }
}

#[cfg(test)]
mod tests {
    use super::super::SamplingParams;
    use super::*;

    #[tokio::test]
    async fn a_failure_of_one_replica_ends_the_streams_of_all() {
        let info = EngineInfo {
            max_model_len: 8,
            vocab_size: 8,
            max_num_seqs: 8,
            max_num_batched_tokens: 8,
            block_size: 16,
            max_num_waiting: 8,
            num_replicas: 2,
        };
        let engine = mock_engine(info, |_| Vec::new());
        let request = || GenerateRequest {
            request_id: "held".to_owned(),
            prompt_token_ids: vec![1],
            sampling_params: SamplingParams::default(),
            priority: 0,
        };
        let mut streams = [(); 2].map(|()| engine.submit(request()).unwrap());
        assert_eq!(streams.each_ref().map(TokenStream::replica), [0, 1]);
        engine.0.death.set("replica 1: by a test".to_owned());
        for stream in &mut streams {
            assert_eq!(stream.next().await, None);
        }
        let refused = engine.submit(request()).err().unwrap();
        let reason = "replica 1: by a test".to_owned();
        assert_eq!(refused, SubmitError::EngineDead { reason });
    }

    #[test]
    fn the_least_load_wins_and_equal_ones_take_turns() {
        assert_eq!(least_loaded(&[5, 4, 4], 0), 1);
        assert_eq!(least_loaded(&[5, 4, 4], 2), 2);
        assert_eq!(least_loaded(&[5, 4, 4], 3), 1);
        assert_eq!(least_loaded(&[7], 1), 0);
        let mut turn = 0;
        let taken = [0; 5].map(|_| {
            let replica = least_loaded(&[1; 3], turn);
            turn = replica + 1;
            replica
        });
        assert_eq!(taken, [0, 1, 2, 0, 1]);
    }
}
