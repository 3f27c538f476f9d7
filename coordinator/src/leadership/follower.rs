//! A standby's connection to its leader: fills the copy of the journal, and tells death from slowness.
//!
//! The kernel closes a dead process's sockets at once: the stream breaks, and its port refuses connections. A process that
//! is stopped or starved accepts connections still: then the lease decides.

use std::{io::ErrorKind, sync::Arc, time::Duration};

use phalanx_cluster::error_text::with_causes;
use phalanx_proto::{
    dial::Dialer,
    v1::{JournalRequest, leadership_client::LeadershipClient},
};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{Leader, actor::LeadershipHandle, journal_feed::JournalSink};

/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Pause before the leader is dialled again.
const REDIAL_PAUSE: Duration = Duration::from_millis(100);
/// A dead host says nothing: these notice.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const PING_LIMIT: Duration = Duration::from_secs(2);
/// A process that dies closes its sockets one after the other: its port may be open for a moment longer.
const PROBES: u32 = 20;
const PROBE_PAUSE: Duration = Duration::from_millis(10);
const PROBE_LIMIT: Duration = Duration::from_millis(250);
/// A snapshot's largest message.
const MESSAGE_LIMIT: usize = 64 << 20;

/// Follows whoever leads, for the life of the process.
pub async fn follow(dialer: Dialer, leadership: LeadershipHandle, journal: Arc<dyn JournalSink>) {
    let mut view = leadership.view();
    loop {
        let seen = view.wait_for(|v| v.session.is_none() && v.leader.is_some()).await;
        let Some(leader) = seen.leader else { continue };
        let mut others = leadership.view();
        let is_over = tokio::select! {
            was_attached = listen(&dialer, &seen.me.coordinator_id, &leader, &*journal) => {
                // An address that never answered may be wrong: nothing follows from its silence.
                if was_attached && is_dead(&leader.record.grpc_address).await {
                    leadership.leader_died(leader.term);
                }
                false
            }
            _ = others.wait_for(|v| v.session.is_some() || v.leader.as_ref() != Some(&leader)) => true,
        };
        if !is_over {
            sleep(REDIAL_PAUSE).await;
        }
    }
}

/// Takes the leader's journal until the stream ends; says whether there was one.
async fn listen(dialer: &Dialer, own_name: &str, leader: &Leader, journal: &dyn JournalSink) -> bool {
    let attach = async {
        let endpoint = dialer
            .endpoint(&leader.record.grpc_address)
            .map_err(|e| with_causes(&e))?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_LIMIT)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|e| with_causes(&e))?;
        let mut client = LeadershipClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
        let request = JournalRequest { coordinator_id: own_name.to_owned() };
        let answer = timeout(CONNECT_LIMIT, client.journal(request)).await.map_err(|e| e.to_string())?;
        Ok::<_, String>(answer.map_err(|status| with_causes(&status))?.into_inner())
    };
    let mut stream = match attach.await {
        Ok(stream) => stream,
        Err(reason) => {
            // What a certificate is wrong for does not mend itself: that is said aloud.
            match dialer.advice(&reason) {
                Some(advice) => tracing::warn!(leader = leader.record.coordinator_id, reason, "{advice}"),
                None => tracing::debug!(leader = leader.record.coordinator_id, reason, "the leader can't be followed"),
            }
            return false;
        }
    };
    tracing::info!(leader = leader.record.coordinator_id, term = leader.term, "following");
    loop {
        match stream.message().await {
            Ok(Some(entry)) => journal.apply(entry),
            Ok(None) => return true,
            Err(status) => {
                tracing::debug!(%status, "the leader's stream broke");
                return true;
            }
        }
    }
}

/// Whether a process that listened at an address has closed it.
async fn is_dead(address: &str) -> bool {
    for _ in 0..PROBES {
        match timeout(PROBE_LIMIT, TcpStream::connect(address)).await {
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => return true,
            // Reset while it waited to be accepted: ask again.
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionReset => {}
            Ok(Ok(_)) => {}
            _ => return false,
        }
        sleep(PROBE_PAUSE).await;
    }
    false
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_death_and_silence_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // Nobody accepts, as of a process that is stopped.
        assert!(!is_dead(&address).await);
        drop(listener);
        assert!(is_dead(&address).await);
    }
}
