//! Connecting every two ranks: the higher one calls, the lower one listens, and both prove that they know the secret.
//!
//! ```text
//! caller   Hello     magic, byte order, epoch, world size, from, to, nonce
//! listener Challenge verdict, nonce, proof over Hello and nonce
//! caller   Answer    proof over the same, under another label
//! listener Welcome   one byte
//! ```
//!
//! A refused caller tries again until the time limit: the listener may not have heard of the epoch yet. Strangers can
//! keep no rank from connecting: each handshake has its own thread and its own time limit.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    rand::{GetRandomFlags, getrandom},
};

use super::super::{AbortFlag, CollectiveConfig, CollectiveError, auth};

const MAGIC: [u8; 8] = *b"PhalTCP1";
const NONCE_BYTES: usize = 32;
const HELLO_BYTES: usize = MAGIC.len() + 1 + 8 + 3 * 4 + NONCE_BYTES;
const CHALLENGE_BYTES: usize = 1 + NONCE_BYTES + auth::PROOF_BYTES;
const WELCOME: [u8; 1] = [b'w'];

/// Verdicts in a challenge.
const ACCEPTED: u8 = 0;
const OTHER_EPOCH: u8 = 1;
const OTHER_SHAPE: u8 = 2;

const LISTENER_LABEL: &str = "phalanx tcp listener";
const CALLER_LABEL: &str = "phalanx tcp caller";

/// How often waits look whether they are still wanted.
const WAKE_INTERVAL: Duration = Duration::from_millis(10);
/// Pause before calling again.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// Longest time for one connection and its handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(3);
/// A rank to whose host no connection can be made for so long is cut off: waiting longer would only keep others waiting. One
/// that is late, because it still fetches its model, takes connections already.
const UNREACHABLE_LIMIT: Duration = Duration::from_secs(3);
/// Most callers that are heard at once; more are closed and may call again.
const MOST_HANDSHAKES: usize = 64;

enum Event {
    Linked {
        rank: usize,
        link: TcpStream,
    },
    Failed {
        rank: usize,
        reason: String,
    },
    /// There is no point in waiting for it.
    Unreachable {
        rank: usize,
        reason: String,
    },
}

/// Why a call failed.
enum CallError {
    /// No connection could be made.
    Connect(String),
    /// The other side is there, but not ready, or it refuses.
    Handshake(String),
}

impl From<String> for CallError {
    fn from(reason: String) -> Self {
        Self::Handshake(reason)
    }
}

impl From<&str> for CallError {
    fn from(reason: &str) -> Self {
        Self::Handshake(reason.to_owned())
    }
}

/// What all threads of one connecting share.
struct Shared {
    config: CollectiveConfig,
    deadline: Instant,
    /// Nobody waits for the links any more.
    over: AtomicBool,
    n_handshakes: AtomicUsize,
}

/// Ends the threads when connecting ends, however it does.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

/// Connects to all ranks; the connection to a rank is at its index.
pub(super) fn connect(
    config: &CollectiveConfig,
    listener: Option<&TcpListener>,
    abort: &AbortFlag,
) -> Result<Vec<Option<TcpStream>>, CollectiveError> {
    let listens = config.rank + 1 < config.world_size;
    let listener = listener.filter(|_| listens);
    if listens && listener.is_none() {
        return Err(config.setup(format!("rank {} needs a listener for the ranks above it", config.rank)));
    }
    if let Some(listener) = listener {
        listener.set_nonblocking(true).map_err(|error| config.setup(format!("the listener: {error}")))?;
    }
    let shared = Arc::new(Shared {
        config: config.clone(),
        deadline: Instant::now() + config.time_limit,
        over: AtomicBool::new(false),
        n_handshakes: AtomicUsize::new(0),
    });
    let _over = Over(shared.clone());
    let (events_in, events) = channel();
    for peer in 0..config.rank {
        // Detached: looking up a name can't be interrupted.
        spawn(&shared, &events_in, move |shared, events| call_until_linked(&shared, peer, &events))?;
    }
    gather_links(&shared, listener, &events_in, &events, abort)
}

fn spawn(
    shared: &Arc<Shared>,
    events: &Sender<Event>,
    body: impl FnOnce(Arc<Shared>, Sender<Event>) + Send + 'static,
) -> Result<(), CollectiveError> {
    let (thread_shared, events) = (shared.clone(), events.clone());
    thread::Builder::new()
        .name("collective-tcp".to_owned())
        .spawn(move || body(thread_shared, events))
        .map(drop)
        .map_err(|error| shared.config.setup(format!("no thread for a connection: {error}")))
}

/// Accepts and collects until every rank has a link.
fn gather_links(
    shared: &Arc<Shared>,
    listener: Option<&TcpListener>,
    events_in: &Sender<Event>,
    events: &Receiver<Event>,
    abort: &AbortFlag,
) -> Result<Vec<Option<TcpStream>>, CollectiveError> {
    let config = &shared.config;
    let mut links: Vec<Option<TcpStream>> = (0..config.world_size).map(|_| None).collect();
    let mut failures: Vec<Option<String>> = vec![None; config.world_size];
    loop {
        while let Ok(event) = events.try_recv() {
            match event {
                // A caller that gave up its first connection replaces it.
                Event::Linked { rank, link } => links[rank] = Some(link),
                Event::Failed { rank, reason } => failures[rank] = Some(reason),
                Event::Unreachable { rank, reason } => return Err(config.setup(format!("rank {rank}: {reason}"))),
            }
        }
        let Some(missing) = (0..config.world_size).find(|rank| *rank != config.rank && links[*rank].is_none()) else {
            return Ok(links);
        };
        let _waiting = abort.waiting_for(missing);
        if abort.is_aborted() {
            return Err(CollectiveError::Aborted { epoch: config.epoch });
        }
        if Instant::now() >= shared.deadline {
            return Err(match failures[missing].take() {
                Some(reason) => config.setup(format!("rank {missing}: {reason}")),
                None => CollectiveError::Timeout { epoch: config.epoch, rank: missing, after: config.time_limit },
            });
        }
        let Some(listener) = listener else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let limit = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        // Whatever it says, accepting tells.
        let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit));
        match listener.accept() {
            Ok((link, _)) if shared.n_handshakes.load(Ordering::Relaxed) < MOST_HANDSHAKES => {
                shared.n_handshakes.fetch_add(1, Ordering::Relaxed);
                spawn(shared, events_in, move |shared, events| {
                    answer(&shared, link, &events);
                    shared.n_handshakes.fetch_sub(1, Ordering::Relaxed);
                })?;
            }
            // Dropped, which closes it.
            Ok(_) => {}
            Err(error) if is_transient(error.kind()) => {}
            // Out of descriptors or memory: that may pass, and the time limit ends it.
            Err(error) => {
                failures[missing] = Some(format!("accepting connections: {error}"));
                thread::sleep(RETRY_INTERVAL);
            }
        }
    }
}

fn is_transient(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted | ErrorKind::ConnectionAborted)
}

/// Calls a lower rank until it takes this one in.
fn call_until_linked(shared: &Shared, peer: usize, events: &Sender<Event>) {
    let address = &shared.config.peers[peer].address;
    let mut unreached_since = Instant::now();
    while !shared.is_over() {
        let event = match call(shared, peer) {
            Ok(link) => Event::Linked { rank: peer, link },
            Err(CallError::Handshake(reason)) => {
                unreached_since = Instant::now();
                Event::Failed { rank: peer, reason: format!("{address}: {reason}") }
            }
            Err(CallError::Connect(reason)) if unreached_since.elapsed() >= UNREACHABLE_LIMIT => {
                Event::Unreachable { rank: peer, reason: format!("{address} can't be reached: {reason}") }
            }
            Err(CallError::Connect(reason)) => Event::Failed { rank: peer, reason: format!("{address}: {reason}") },
        };
        let linked = matches!(event, Event::Linked { .. });
        if events.send(event).is_err() || linked {
            return;
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

fn call(shared: &Shared, peer: usize) -> Result<TcpStream, CallError> {
    let config = &shared.config;
    let deadline = shared.handshake_deadline();
    let addresses =
        config.peers[peer].address.to_socket_addrs().map_err(|error| CallError::Connect(error.to_string()))?;
    let mut failure = "the name has no address".to_owned();
    let link = addresses.into_iter().find_map(|address| {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        TcpStream::connect_timeout(&address, left).inspect_err(|error| failure = error.to_string()).ok()
    });
    let mut link = Timed::new(shared, link.ok_or(CallError::Connect(failure))?, deadline)?;

    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8] = byte_order();
    hello[9..17].copy_from_slice(&config.epoch.to_le_bytes());
    hello[17..21].copy_from_slice(&(config.world_size as u32).to_le_bytes());
    hello[21..25].copy_from_slice(&(config.rank as u32).to_le_bytes());
    hello[25..29].copy_from_slice(&(peer as u32).to_le_bytes());
    hello[29..].copy_from_slice(&nonce()?);
    link.write(&hello)?;

    let challenge: [u8; CHALLENGE_BYTES] = link.read()?;
    match challenge[0] {
        ACCEPTED => {}
        OTHER_EPOCH => return Err(format!("it is not forming epoch {}", config.epoch).into()),
        OTHER_SHAPE => return Err("it has another world size, rank, byte order or version".into()),
        other => return Err(format!("it answered {other}, which is no verdict").into()),
    }
    let message = transcript(&hello, &challenge[1..1 + NONCE_BYTES]);
    let mut proof = [0; auth::PROOF_BYTES];
    proof.copy_from_slice(&challenge[1 + NONCE_BYTES..]);
    if !auth::verify(&config.secret, LISTENER_LABEL, &message, &proof) {
        return Err("it does not know the secret of the epoch".into());
    }
    link.write(&auth::prove(&config.secret, CALLER_LABEL, &message))?;
    let welcome: [u8; 1] = link.read().map_err(|reason| format!("it refused this rank: {reason}"))?;
    if welcome != WELCOME {
        return Err("it sent something else than a welcome".into());
    }
    Ok(link.finish()?)
}

/// Hears one caller.
fn answer(shared: &Shared, link: TcpStream, events: &Sender<Event>) {
    let mut rank = None;
    let event = match try_answer(shared, link, &mut rank) {
        Ok((rank, link)) => Event::Linked { rank, link },
        Err(reason) => {
            // A stranger's failure is nobody's.
            let Some(rank) = rank else { return };
            Event::Failed { rank, reason: format!("a caller with this rank: {reason}") }
        }
    };
    // Nobody waits any more: dropping the link tells the caller.
    let _ = events.send(event);
}

fn try_answer(shared: &Shared, link: TcpStream, claimed: &mut Option<usize>) -> Result<(usize, TcpStream), String> {
    let config = &shared.config;
    let mut link = Timed::new(shared, link, shared.handshake_deadline())?;
    let hello: [u8; HELLO_BYTES] = link.read()?;
    let number =
        |start: usize| u32::from_le_bytes([hello[start], hello[start + 1], hello[start + 2], hello[start + 3]]);
    let (world_size, from, to) = (number(17) as usize, number(21) as usize, number(25) as usize);
    if hello[..8] != MAGIC {
        return Err("it does not speak this protocol".to_owned());
    }
    let mut challenge = [0; CHALLENGE_BYTES];
    if hello[9..17] != config.epoch.to_le_bytes() {
        challenge[0] = OTHER_EPOCH;
        link.write(&challenge)?;
        return Err("it belongs to another epoch".to_owned());
    }
    let fits = from > config.rank && from < config.world_size && to == config.rank;
    if hello[8] != byte_order() || world_size != config.world_size || !fits {
        challenge[0] = OTHER_SHAPE;
        link.write(&challenge)?;
        return Err(format!("it calls rank {to} as rank {from} of {world_size}"));
    }
    *claimed = Some(from);
    let nonce = nonce()?;
    let message = transcript(&hello, &nonce);
    challenge[0] = ACCEPTED;
    challenge[1..1 + NONCE_BYTES].copy_from_slice(&nonce);
    challenge[1 + NONCE_BYTES..].copy_from_slice(&auth::prove(&config.secret, LISTENER_LABEL, &message));
    link.write(&challenge)?;
    let proof: [u8; auth::PROOF_BYTES] = link.read()?;
    if !auth::verify(&config.secret, CALLER_LABEL, &message, &proof) {
        return Err("it does not know the secret of the epoch".to_owned());
    }
    link.write(&WELCOME)?;
    Ok((from, link.finish()?))
}

/// What both proofs are over.
fn transcript(hello: &[u8; HELLO_BYTES], nonce: &[u8]) -> Vec<u8> {
    [hello, nonce].concat()
}

fn nonce() -> Result<[u8; NONCE_BYTES], String> {
    let mut nonce = [0; NONCE_BYTES];
    match getrandom(&mut nonce, GetRandomFlags::empty()) {
        Ok(NONCE_BYTES) => Ok(nonce),
        Ok(n) => Err(format!("the system gave {n} random bytes, want {NONCE_BYTES}")),
        Err(errno) => Err(format!("the system gives no random bytes: {errno}")),
    }
}

/// Sums travel as they lie in memory.
fn byte_order() -> u8 {
    u8::from(cfg!(target_endian = "big"))
}

impl Shared {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire) || Instant::now() >= self.deadline
    }

    fn handshake_deadline(&self) -> Instant {
        self.deadline.min(Instant::now() + HANDSHAKE_LIMIT)
    }
}

/// A connection during its handshake: reads and writes end at the deadline, or when nobody waits for it any more.
struct Timed<'a> {
    shared: &'a Shared,
    link: TcpStream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    fn new(shared: &'a Shared, link: TcpStream, deadline: Instant) -> Result<Self, String> {
        link.set_nonblocking(false)
            .and_then(|()| link.set_nodelay(true))
            .and_then(|()| link.set_read_timeout(Some(WAKE_INTERVAL)))
            .and_then(|()| link.set_write_timeout(Some(HANDSHAKE_LIMIT)))
            .map_err(|error| error.to_string())?;
        Ok(Self { shared, link, deadline })
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        let mut n = 0;
        while n < N {
            match self.link.read(&mut bytes[n..]) {
                Ok(0) => return Err("it closed the connection".to_owned()),
                Ok(more) => n += more,
                Err(error) if is_transient(error.kind()) => {
                    if self.shared.over.load(Ordering::Acquire) || Instant::now() >= self.deadline {
                        return Err("it did not finish the handshake in time".to_owned());
                    }
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(bytes)
    }

    /// A fresh socket holds a whole handshake: this never waits for a peer that follows the protocol.
    fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.link.write_all(bytes).map_err(|error| error.to_string())
    }

    fn finish(self) -> Result<TcpStream, String> {
        self.link.set_nonblocking(true).map_err(|error| error.to_string())?;
        Ok(self.link)
    }
}
