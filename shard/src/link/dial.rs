//! Reaching coordinators: asks who leads, attaches, says from where.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use phalanx_cluster::error_text::with_causes;
use phalanx_proto::{
    dial::Dialer,
    v1::{
        CoordinatorMessage, Hello, LeaderRequest, LeaderResponse, ShardMessage, cluster_client::ClusterClient,
        leadership_client::LeadershipClient, shard_message::Message,
    },
};
use tokio::{net::UdpSocket, sync::mpsc, time};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint, Uri},
};

use super::Broken;

/// Longest wait for a coordinator to accept the connection, and then the stream.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for an answer to who leads.
const ASK_LIMIT: Duration = Duration::from_millis(500);
/// A plan that starts hundreds of long sequences is larger than gRPC's usual 4 MB.
const MESSAGE_LIMIT: usize = 256 << 20;
/// HTTP/2 window: a large plan goes out without waiting for window updates.
const WINDOW_BYTES: u32 = 8 << 20;

/// Names the leader in the metadata of a refusal, as `http://HOST:PORT`.
const LEADER_METADATA: &str = "phalanx-leader";

/// An open stream.
pub struct Attached {
    /// What the coordinator says.
    pub stream: Streaming<CoordinatorMessage>,
    /// What it is told.
    pub sender: mpsc::UnboundedSender<ShardMessage>,
}

/// Opens a stream and says hello.
pub async fn attach(dialer: &Dialer, uri: &Uri, hello: Hello) -> Result<Attached, Broken> {
    let failed = |error: &dyn std::error::Error| {
        let reason = with_causes(error);
        match dialer.advice(&reason) {
            Some(advice) => Broken::Advised { advice, reason },
            None => Broken::Connect(reason),
        }
    };
    let channel = endpoint(dialer, uri)
        .map_err(|error| failed(&error))?
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect()
        .await
        .map_err(|error| failed(&error))?;
    let mut client: ClusterClient<Channel> =
        ClusterClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT);
    let (sender, receiver) = mpsc::unbounded_channel();
    // The receiver is right here: sending can't fail.
    let _sent = sender.send(ShardMessage { message: Some(Message::Hello(hello)) });
    match time::timeout(CONNECT_LIMIT, client.attach(UnboundedReceiverStream::new(receiver))).await {
        Ok(Ok(response)) => Ok(Attached { stream: response.into_inner(), sender }),
        // Only what went wrong on the way has a cause; what a coordinator says has none.
        Ok(Err(status)) => match std::error::Error::source(&status) {
            Some(cause) => Err(failed(cause)),
            None => {
                let leader = status.metadata().get(LEADER_METADATA).and_then(|value| value.to_str().ok());
                Err(Broken::Refused { leader: leader.map(str::to_owned), status: Box::new(status) })
            }
        },
        Err(_) => Err(Broken::Connect(format!("no answer within {CONNECT_LIMIT:?}"))),
    }
}

/// A coordinator that can be asked, again and again over one connection.
#[derive(Clone)]
pub struct Oracle {
    /// Where it is.
    pub uri: Uri,
    client: LeadershipClient<Channel>,
}

impl Oracle {
    /// Connects when it is asked first. `None` if the address can't be dialled.
    pub fn new(dialer: &Dialer, uri: &Uri) -> Option<Self> {
        let endpoint = endpoint(dialer, uri).ok()?;
        Some(Self { uri: uri.clone(), client: LeadershipClient::new(endpoint.connect_lazy()) })
    }

    /// Who leads; says to a leader of an older term that there is a newer one. Nothing if it does not answer soon.
    pub async fn ask(&self, known_term: u64) -> Option<LeaderResponse> {
        let mut client = self.client.clone();
        let answer = time::timeout(ASK_LIMIT, client.leader(LeaderRequest { known_term })).await;
        answer.ok()?.ok().map(tonic::Response::into_inner)
    }
}

fn endpoint(dialer: &Dialer, uri: &Uri) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = dialer.endpoint(&uri.to_string())?;
    Ok(endpoint.connect_timeout(CONNECT_LIMIT).tcp_nodelay(true))
}

/// The address from which this machine talks to a coordinator: where others can reach it, most likely.
pub async fn local_address(coordinator: &Uri) -> Option<IpAddr> {
    let host = coordinator.host()?.trim_matches(['[', ']']);
    let port = coordinator.port_u16()?;
    for unspecified in ["0.0.0.0:0", "[::]:0"] {
        let any: SocketAddr = unspecified.parse().ok()?;
        // Connecting a datagram socket sends nothing: it asks for the route.
        let Ok(socket) = UdpSocket::bind(any).await else { continue };
        if socket.connect((host, port)).await.is_ok() {
            return socket.local_addr().ok().map(|address| address.ip());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_way_to_a_coordinator_has_an_address() {
        let address = local_address(&Uri::from_static("http://127.0.0.1:50051")).await;
        assert_eq!(address, Some(IpAddr::from([127, 0, 0, 1])));
        assert_eq!(local_address(&Uri::from_static("http://no.such.host.invalid:1")).await, None);
    }
}
