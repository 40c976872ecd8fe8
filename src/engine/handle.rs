//! The engine as the rest of the program sees it: submit a request, read its events.
//!
//! Dropping a [`TokenStream`] aborts its sequence: the engine thread sees the closed channel at
//! its next step and frees the blocks.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, mpsc};
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
    /// Requests that may wait before `submit` refuses.
    pub max_num_waiting: usize,
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
    /// Where its events go.
    pub(super) events: event_channel::UnboundedSender<TokenEvent>,
    pub(super) submitted_at: Instant,
}

/// State that the engine thread and all handles share.
pub(super) struct Shared {
    pub(super) info: EngineInfo,
    pub(super) stats: SharedStats,
    pub(super) death: Arc<Death>,
}

/// Why the engine has ended, once it has: told by its thread, or by the watchdog where that thread
/// hangs.
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

/// A cloneable reference to a running engine.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Connects a handle to an engine thread that reads `commands`' other end.
    pub(super) fn new(commands: mpsc::Sender<Command>, shared: Arc<Shared>) -> Self {
        Self { commands, shared }
    }

    /// Queues a request and returns the stream of its events.
    ///
    /// # Errors
    /// [`SubmitError`] when the queue is full or the engine has ended.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, SubmitError> {
        if let Some(reason) = self.death() {
            return Err(SubmitError::EngineDead { reason });
        }
        let max_num_waiting = self.shared.info.max_num_waiting;
        let waiting = &self.shared.stats.num_requests_waiting;
        let num_waiting = waiting.fetch_add(1, Ordering::Relaxed);
        if num_waiting >= max_num_waiting {
            waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(SubmitError::QueueFull {
                num_waiting,
                max_num_waiting,
            });
        }
        let (sender, receiver) = event_channel::unbounded_channel();
        let submission = Submission {
            request,
            events: sender,
            submitted_at: Instant::now(),
        };
        let command = Command::Submit(Box::new(submission));
        if self.commands.send(command).is_err() {
            waiting.fetch_sub(1, Ordering::Relaxed);
            let reason = self
                .death()
                .unwrap_or_else(|| "its thread has ended".to_owned());
            return Err(SubmitError::EngineDead { reason });
        }
        let death = Arc::clone(&self.shared.death);
        Ok(TokenStream { receiver, death })
    }

    /// Returns why the engine has ended, or `None` while it runs.
    pub fn death(&self) -> Option<String> {
        self.shared.death.get()
    }

    /// Returns what is fixed once the engine runs.
    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// Returns the present counters.
    pub fn stats(&self) -> Stats {
        self.shared.stats.snapshot()
    }

    /// Asks the engine thread to end all sequences and return.
    pub fn stop(&self) {
        // A closed channel means that the thread has ended already.
        let _ = self.commands.send(Command::Stop);
    }
}

/// The events of one sequence. Dropping it aborts the sequence.
pub struct TokenStream {
    receiver: event_channel::UnboundedReceiver<TokenEvent>,
    death: Arc<Death>,
}

impl TokenStream {
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
    mut script: impl FnMut(&GenerateRequest) -> Vec<TokenEvent> + Send + 'static,
) -> EngineHandle {
    let (commands, receiver) = mpsc::channel();
    let shared = Arc::new(Shared {
        info,
        stats: SharedStats::default(),
        death: Arc::default(),
    });
    let handle = EngineHandle::new(commands, Arc::clone(&shared));
    std::thread::spawn(move || {
        let mut open = Vec::new();
        while let Ok(Command::Submit(submission)) = receiver.recv() {
            let Submission {
                request, events, ..
            } = *submission;
            shared
                .stats
                .num_requests_waiting
                .fetch_sub(1, Ordering::Relaxed);
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
        shared.death.set("the mock engine was stopped".to_owned());
    });
    handle
}
