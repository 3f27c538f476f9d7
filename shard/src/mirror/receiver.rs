//! The mirror's side: listens for ranks and takes their rows in, a thread for each.

use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use super::{
    fetch::{self, Frames},
    frame::FrameError,
    handshake::{self, HandshakeError, Purpose, Source, Verdict},
    lane::{KEEPALIVE, Target},
    store::{Store, StoreError, Writer},
};

/// Most connections at once, strangers' included; more are closed and may call again.
const MOST_CONNECTIONS: usize = 64;
/// A rank that sends not even signs of life for so long is gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(4 * KEEPALIVE.as_secs());
/// Pause after an error of the listener, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A mirror that listens. Dropping it closes all connections; the store remains.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    secret: Vec<u8>,
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    store: Store,
    secret: Vec<u8>,
    is_over: AtomicBool,
    links: Mutex<Vec<(u64, TcpStream)>>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Receiver {
    /// Listens at `address` and fills `store`.
    ///
    /// # Errors
    /// If the address can't be had, or the system has no thread or random bytes left.
    pub fn start(address: SocketAddr, store: Store) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let secret = handshake::nonce()?.to_vec();
        let shared = Shared { store, secret: secret.clone(), is_over: AtomicBool::new(false), links: Mutex::default() };
        let shared = Arc::new(shared);
        let receiver = Self { address, secret, shared: shared.clone() };
        thread::Builder::new().name("mirror-listen".to_owned()).spawn(move || listen(&listener, &shared))?;
        Ok(receiver)
    }

    /// What ranks on this machine need to send to it, `n_sources` of them. `shard_id`: its name in their logs.
    pub fn target(&self, shard_id: &str, n_sources: u32) -> Target {
        let (shard_id, address) = (shard_id.to_owned(), self.address.to_string());
        Target { shard_id, address, secret: self.secret.clone(), n_sources }
    }

    /// What it fills.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ranks must know.
    pub fn secret(&self) -> &[u8] {
        &self.secret
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        for (_, link) in self.shared.links().iter() {
            // One that is closed already is as good.
            let _closed = link.shutdown(Shutdown::Both);
        }
        // Wakes the listener. If it fails, the thread ends with the next caller.
        let _woken = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

impl Shared {
    pub(super) fn links(&self) -> MutexGuard<'_, Vec<(u64, TcpStream)>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(listener: &TcpListener, shared: &Arc<Shared>) {
    for id in 0.. {
        let accepted = listener.accept();
        if shared.is_over.load(Ordering::Acquire) {
            return;
        }
        let link = match accepted {
            Ok((link, _)) => link,
            Err(error) => {
                tracing::debug!("the mirror's listener: {error}");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let mut links = shared.links();
        if links.len() >= MOST_CONNECTIONS {
            continue;
        }
        let Ok(copy) = link.try_clone() else { continue };
        links.push((id, copy));
        drop(links);
        let of_thread = shared.clone();
        let body = move || {
            crate::background::Share::Little.bind();
            serve(&of_thread, link);
            of_thread.links().retain(|(other, _)| *other != id);
        };
        if let Err(error) = thread::Builder::new().name("mirror-take".to_owned()).spawn(body) {
            tracing::warn!("no thread for a mirrored rank: {error}");
            shared.links().retain(|(other, _)| *other != id);
        }
    }
}

fn serve(shared: &Shared, mut link: TcpStream) {
    // A caller that can't be heard is a stranger, or tries again.
    match take_rows(shared, &mut link) {
        Err(End::Store(error @ (StoreError::Full { .. } | StoreError::Short { .. } | StoreError::Kernel(_)))) => {
            tracing::warn!("mirror: {error}")
        }
        Err(End::Frame(error)) => tracing::warn!("mirror: a rank sends what is no frame: {error}"),
        Err(end) => tracing::debug!("mirror: a connection ended: {end}"),
        Ok(()) => {}
    }
    let _closed = link.shutdown(Shutdown::Both);
}

fn take_rows(shared: &Shared, link: &mut TcpStream) -> Result<(), End> {
    link.set_nodelay(true)?;
    let (purpose, source) = handshake::hear(link, &shared.secret)?;
    if purpose == Purpose::Fetch {
        return match shared.store.lend(&source) {
            Some(lent) => fetch::give(link, lent),
            None => Ok(handshake::answer(link, Verdict::Nothing)?),
        };
    }
    let writer = match shared.store.begin(&source) {
        Ok(writer) => writer,
        Err(verdict) => return Ok(handshake::answer(link, verdict)?),
    };
    handshake::answer(link, Verdict::Welcome)?;
    tracing::debug!(epoch = source.epoch, rank = source.rank, "mirroring");
    take_frames(link, &source, &writer)
}

/// Takes in frames until the connection ends.
pub(super) fn take_frames(link: &mut TcpStream, source: &Source, writer: &Writer) -> Result<(), End> {
    link.set_read_timeout(Some(SILENCE_LIMIT))?;
    let mut frames = Frames::new(source.stream());
    loop {
        let (content, rows) = frames.next::<End>(link)?;
        writer.write(content, rows)?;
    }
}
