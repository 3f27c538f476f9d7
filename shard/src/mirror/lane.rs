//! The thread that sends a rank's frames to one mirror. Between it and the engine lies a bounded queue.

use std::{
    collections::VecDeque,
    net::{TcpStream, ToSocketAddrs},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use super::{
    frame::{self, Content, Header},
    handshake::{self, HandshakeError, Purpose, Source, Verdict},
};

/// Most bytes of frames that wait to be sent.
const QUEUE_BYTES: usize = 32 << 20;
/// Buffers that are kept for the next frames, and the largest that is.
const SPARE_BUFFERS: usize = 8;
const SPARE_BUFFER_BYTES: usize = 2 * frame::MOST_ROW_BYTES;
/// Pauses between attempts to connect grow from here
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// to here.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Longest time to connect, and for the mirror to take bytes.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
pub(super) const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// A sign of life is sent after this long without a frame.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(5);
/// How long the last frames have to leave when the group is over.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Where rows are copied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name of the shard, for the log.
    pub shard_id: String,
    /// HOST:PORT.
    pub address: String,
    /// Of its mirror.
    pub secret: Vec<u8>,
    /// Ranks that copy their rows there.
    pub n_sources: u32,
}

impl Target {
    /// Connects, and hears what it says.
    pub(super) fn call(&self, purpose: Purpose, source: &Source) -> Result<(TcpStream, Verdict), HandshakeError> {
        let mut error = std::io::Error::other("the address has no meaning");
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                Ok(mut link) => {
                    link.set_nodelay(true)?;
                    let verdict = handshake::call(&mut link, &self.secret, purpose, source)?;
                    return Ok((link, verdict));
                }
                Err(other) => error = other,
            }
        }
        Err(error.into())
    }
}

/// The engine's end of a lane.
#[derive(Debug)]
pub(super) struct Lane(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Frame>,
    queued_bytes: usize,
    spare: Vec<Vec<u8>>,
    /// Counts connections. A new one knows nothing.
    connection: u64,
    is_connected: bool,
    /// When the engine is done with it; frames of before may still leave.
    ended: Option<Instant>,
}

#[derive(Debug)]
struct Frame {
    bytes: Vec<u8>,
    step: u64,
    through: Option<u64>,
}

impl Lane {
    /// Starts the thread.
    pub(super) fn start(source: Source, target: Target) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let sender = Sender { shared: shared.clone(), source, target };
        thread::Builder::new().name("mirror-send".to_owned()).spawn(move || sender.run())?;
        Ok(Self(shared))
    }

    /// The number of the connection, if there is one.
    pub(super) fn connection(&self) -> Option<u64> {
        let state = self.0.lock();
        state.is_connected.then_some(state.connection)
    }

    /// A buffer for a frame with `row_bytes` of rows, if there is room for it.
    pub(super) fn buffer(&self, row_bytes: usize) -> Option<Vec<u8>> {
        let mut state = self.0.lock();
        let has_room = state.queue.is_empty() || state.queued_bytes + row_bytes <= QUEUE_BYTES;
        has_room.then(|| state.spare.pop().unwrap_or_default())
    }

    /// Sends a frame; it is dropped if the connection is another by now.
    pub(super) fn send(&self, connection: u64, bytes: Vec<u8>, step: u64, through: Option<u64>) {
        let mut state = self.0.lock();
        if state.is_connected && state.connection == connection {
            state.queued_bytes += bytes.len();
            state.queue.push_back(Frame { bytes, step, through });
            drop(state);
            self.0.changed.notify_one();
        } else {
            state.recycle(bytes);
        }
    }

    /// Gives a buffer back that was not needed.
    pub(super) fn give_back(&self, bytes: Vec<u8>) {
        self.0.lock().recycle(bytes);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.0.lock().ended = Some(Instant::now());
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete in itself, so a panicking thread leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn recycle(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS && bytes.capacity() <= SPARE_BUFFER_BYTES {
            self.spare.push(bytes);
        }
    }

    fn disconnect(&mut self) {
        self.is_connected = false;
        self.queued_bytes = 0;
        while let Some(frame) = self.queue.pop_front() {
            self.recycle(frame.bytes);
        }
    }
}

/// What the thread owns.
struct Sender {
    shared: Arc<Shared>,
    source: Source,
    target: Target,
}

/// Why a connection ended.
enum End {
    /// The engine is done.
    Over,
    Broken(std::io::Error),
}

impl Sender {
    fn run(self) {
        crate::background::Share::Little.bind();
        let Source { epoch, rank, .. } = self.source;
        let shard = &self.target.shard_id;
        let mut pause = FIRST_PAUSE;
        let mut is_logged = false;
        while self.shared.lock().ended.is_none() {
            match self.connect() {
                Ok((link, Verdict::Welcome)) => {
                    tracing::info!(epoch, rank, mirror = %shard, "KV rows are mirrored");
                    (pause, is_logged) = (FIRST_PAUSE, false);
                    let end = self.send_frames(link);
                    self.shared.lock().disconnect();
                    match end {
                        End::Over => return,
                        End::Broken(error) => {
                            tracing::info!(epoch, rank, mirror = %shard, "the mirror is lost: {error}; dialling again");
                        }
                    }
                }
                Ok((_, verdict)) => {
                    tracing::info!(epoch, rank, mirror = %shard, ?verdict, "the mirror takes no rows of this epoch");
                    return;
                }
                Err(error) if !is_logged => {
                    is_logged = true;
                    tracing::info!(epoch, rank, mirror = %shard, "the mirror can't be reached: {error}");
                }
                Err(_) => {}
            }
            self.sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn connect(&self) -> Result<(TcpStream, Verdict), HandshakeError> {
        let source = Source { n_sources: self.target.n_sources, ..self.source };
        let (link, verdict) = self.target.call(Purpose::Send, &source)?;
        link.set_write_timeout(Some(WRITE_LIMIT))?;
        Ok((link, verdict))
    }

    /// Sends frames until the connection breaks or the engine is done.
    fn send_frames(&self, mut link: TcpStream) -> End {
        let stream = self.source.stream();
        let mut state = self.shared.lock();
        state.connection += 1;
        state.is_connected = true;
        drop(state);
        // What the last frame said, to be said again as a sign of life.
        let (mut step, mut through) = (0, None);
        loop {
            let mut bytes = match self.next_frame() {
                Next::Frame(frame) => {
                    (step, through) = (frame.step, frame.through);
                    frame.bytes
                }
                Next::Nothing => {
                    let mut bytes = Vec::new();
                    Header::begin(&stream, Content { step, through, ranges: &[], seals: &[] }, &mut bytes);
                    bytes
                }
                Next::Over => return End::Over,
            };
            let n_bytes = bytes.len();
            let sent = frame::send(&mut bytes, &mut link);
            let mut state = self.shared.lock();
            state.queued_bytes = state.queued_bytes.saturating_sub(n_bytes);
            state.recycle(bytes);
            if let Err(error) = sent {
                return End::Broken(error);
            }
        }
    }

    fn next_frame(&self) -> Next {
        let mut state = self.shared.lock();
        let begun = Instant::now();
        loop {
            if state.ended.is_some_and(|at| state.queue.is_empty() || at.elapsed() > END_LIMIT) {
                return Next::Over;
            }
            if let Some(frame) = state.queue.pop_front() {
                return Next::Frame(frame);
            }
            let Some(left) = KEEPALIVE.checked_sub(begun.elapsed()) else { return Next::Nothing };
            let (changed, _) = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = changed;
        }
    }

    /// Pauses, unless the engine is done.
    fn sleep(&self, pause: Duration) {
        let state = self.shared.lock();
        let is_needed = |state: &mut State| state.ended.is_none();
        let _woken =
            self.shared.changed.wait_timeout_while(state, pause, is_needed).unwrap_or_else(PoisonError::into_inner);
    }
}

enum Next {
    Frame(Frame),
    /// For a while.
    Nothing,
    Over,
}
