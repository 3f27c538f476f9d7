//! A TCP proxy whose two directions can be held up, delayed or cut: a network that fails, without being root.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use crate::workload::Numbers;

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weather {
    /// Bytes to the server wait until this ends, as if packets were lost.
    pub hold_up: bool,
    /// Bytes to the client wait.
    pub hold_down: bool,
    /// Connections are reset, and new ones too.
    pub cut: bool,
    /// Every byte comes so much later, in each direction.
    pub delay: Duration,
    /// So many of a hundred pieces are lost and sent again: they, and all behind them, come 200 ms later.
    pub loss_percent: u8,
}

/// TCP's least time before a lost packet is sent again (Linux).
const RESEND: Duration = Duration::from_millis(200);

/// A proxy, gone when dropped.
pub struct Proxy {
    /// Where it listens, on loopback.
    pub port: u16,
    weather: watch::Sender<Weather>,
    carried: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Forwards connections to `target`.
    pub fn start(runtime: &Handle, target: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let (weather, watched) = watch::channel(Weather::default());
        let carried = Arc::new(AtomicU64::new(0));
        let _inside = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        let task = runtime.spawn(accept(listener, target, watched, Arc::clone(&carried)));
        Ok(Self { port, weather, carried, task })
    }

    /// Changes what happens to bytes from now on.
    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Bytes carried so far.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, weather: watch::Receiver<Weather>, carried: Arc<AtomicU64>) {
    while let Ok((client, _)) = listener.accept().await {
        if !weather.borrow().cut {
            tokio::spawn(carry(client, target, weather.clone(), Arc::clone(&carried)));
        }
    }
}

async fn carry(client: TcpStream, target: SocketAddr, mut weather: watch::Receiver<Weather>, carried: Arc<AtomicU64>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    // Small messages must not wait for each other: the proxy should be invisible while all is well.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let up = one_way(client_in, server_out, weather.clone(), |w| w.hold_up, Arc::clone(&carried));
    let down = one_way(server_in, client_out, weather.clone(), |w| w.hold_down, carried);
    tokio::select! {
        _ = up => {}
        _ = down => {}
        // Dropping both sockets ends the connection for both.
        _ = weather.wait_for(|w| w.cut) => {}
    }
}

async fn one_way(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    held: fn(&Weather) -> bool,
    carried: Arc<AtomicU64>,
) -> io::Result<()> {
    let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    let arrivals = weather.clone();
    let read = async move {
        let mut buffer = vec![0; 64 << 10];
        let mut numbers = Numbers(1);
        loop {
            let n = from.read(&mut buffer).await?;
            let weather = *arrivals.borrow();
            let is_lost = numbers.below(100) < u64::from(weather.loss_percent);
            let due = Instant::now() + weather.delay + if is_lost { RESEND } else { Duration::ZERO };
            if n == 0 || queue.send((due, buffer[..n].to_vec())).await.is_err() {
                return io::Result::Ok(());
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = queued.recv().await {
            sleep_until(due).await;
            while held(&weather.borrow_and_update()) {
                if weather.changed().await.is_err() {
                    // The laboratory ends.
                    sleep(Duration::from_secs(1)).await;
                }
            }
            to.write_all(&bytes).await?;
            carried.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write)?;
    Ok(())
}
