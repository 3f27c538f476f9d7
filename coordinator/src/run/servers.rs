//! The listening sockets, and what answers behind them.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use axum::{Router, middleware};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tonic::service::Routes;

use super::{
    gate,
    incoming::{incoming, introduce},
    parts::{Foundation, Parts},
    renewal,
};
use crate::{
    admin::{
        self,
        control::{Leading, StandingBy},
        service::AdminService,
        slot::ControlSlot,
        status::StatusSource,
    },
    frontend::{
        self, FrontendState, connections, door,
        forward::{Gateway, Local, dial::Connector, grpc::InferenceGateway},
        grpc::InferenceService,
        prober::Prober,
    },
    leadership::{
        service::LeadershipService,
        standby::{StandbyCluster, StandbySubmit},
        switch::Switch,
    },
    security::tls::ServingTls,
    shard_link::ClusterService,
};

/// HTTP/2 window: a large message comes in without waiting for window updates.
const WINDOW_BYTES: u32 = 8 << 20;
/// Longest wait for answers to leave the process after their requests are finished.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A bound socket, and the address that it got.
pub fn bind(option: &str, address: SocketAddr) -> anyhow::Result<(tokio::net::TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).with_context(|| format!("--{option}: can't listen on {address}"))?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    Ok((tokio::net::TcpListener::from_std(listener)?, bound))
}

/// What the HTTP port shows, if it speaks TLS.
pub fn https(tls: &Arc<ServingTls>) -> Option<Arc<ServingTls>> {
    tls.is_for_clients().then(|| Arc::clone(tls))
}

/// The servers. They listen for the life of the process; what answers changes with leadership.
pub struct Servers {
    /// Ends only if something is wrong, or after [`Servers::stop_accepting`].
    pub http: JoinHandle<std::io::Result<()>>,
    /// The same.
    pub grpc: JoinHandle<Result<(), tonic::transport::Error>>,
    stopping: watch::Sender<bool>,
    /// All that HTTP requests may reach.
    endpoints: Router,
    /// What HTTP requests come to first.
    gateway: Gateway,
    /// What generations over gRPC come to first.
    inference: InferenceGateway,
    grpc_switch: Switch,
    standby_grpc: Router,
    /// What operators ask.
    control: ControlSlot,
}

impl Servers {
    /// Starts them, as a standby's.
    pub fn start(
        base: &Foundation,
        http: tokio::net::TcpListener,
        grpc: tokio::net::TcpListener,
    ) -> anyhow::Result<Self> {
        let (stopping, _) = watch::channel(false);
        let stopped = || {
            let mut stopping = stopping.subscribe();
            async move {
                // An error means that the process is being torn down.
                let _ = stopping.wait_for(|s| *s).await;
            }
        };
        let submit = Arc::new(StandbySubmit::new(base.view()));
        let served = base.model.served.clone();
        let limits = frontend::Limits::of(&base.config);
        let state = FrontendState::new(submit, served, limits.clone(), base.metrics.clone())
            .with_security(Arc::clone(&base.security))
            .with_grammars(Arc::clone(&base.model.grammars))
            .with_parsers(base.config.parsers.clone())
            .with_loading(Arc::clone(&base.loading))
            .with_prober(Prober::of_standby(base.view()));
        let is_shared = !base.store.is_exclusive();
        let inference = InferenceGateway::new(base.dialer.clone(), base.view(), is_shared);
        let control = ControlSlot::new(Arc::new(StandingBy::new(base.view())));
        let standby_grpc = grpc_services(base, state.clone(), &inference, &control)?
            .add_service(StandbyCluster::server(base.dialer.clone(), base.view()))
            .prepare()
            .into_axum_router();
        let grpc_switch = Switch::new(standby_grpc.clone());
        let mut doors = Router::new().fallback_service(grpc_switch.clone());
        if base.security.is_closed() {
            doors = doors.layer(middleware::from_fn_with_state(base.security.clone(), gate::recognize));
        }
        if base.security.audit().is_some() {
            doors = doors.layer(middleware::from_fn_with_state(base.security.clone(), gate::record));
        }
        if base.tls.is_for_cluster() {
            doors = doors.layer(middleware::from_fn(gate::admit));
        } else if base.tls.is_for_clients() {
            doors = doors.layer(middleware::from_fn(gate::demand_tls));
        }
        doors = doors.layer(middleware::from_fn(introduce));
        let grpc = tonic::transport::Server::builder()
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .add_routes(Routes::from(doors))
            .serve_with_incoming_shutdown(incoming(grpc, base.tls.clone()), stopped());

        let connector = Connector::new(base.config.cluster_tls.as_ref()).context("--cluster-cert")?;
        renewal::follow(base, &connector)?;
        let gateway = Gateway::new(base.view(), frontend::http_router(state), is_shared, &limits, connector);
        let admin = admin::http::router(Arc::new(control.clone()), base.config.admin_http);
        let router = admin.fallback_service(gateway.clone());
        let router = door::before(router, base.security.clone());
        let patience = connections::progress::Patience::new(base.config.client_write_timeout);
        let endpoints = router.clone();
        let http = tokio::spawn(connections::serve(http, router, patience, https(&base.tls), stopped()));
        let grpc = tokio::spawn(grpc);
        Ok(Self { http, grpc, stopping, endpoints, gateway, inference, grpc_switch, standby_grpc, control })
    }

    /// From now on these parts answer.
    pub fn lead(&self, base: &Foundation, parts: &Parts) -> anyhow::Result<()> {
        let timeout = base.config.heartbeat_timeout;
        let join_token = base.config.join_token.clone();
        let (membership, groups) = (parts.membership.clone(), parts.groups.clone());
        let shards = base.leadership.shards();
        let status = StatusSource::new(groups.clone(), parts.schedulers.clone(), base.view());
        let status = status.with_leases(shards.clone());
        let shape = Arc::new(base.model.shape.clone());
        let leading = Leading::new(groups.clone(), status.clone(), base.leadership.clone(), shape)
            .with_streams(parts.state.streams());
        self.control.set(Arc::new(leading));
        let cluster = ClusterService::server(membership, groups, status, timeout, base.view(), shards, join_token);
        let services = grpc_services(base, parts.state.clone(), &self.inference, &self.control)?.add_service(cluster);
        self.grpc_switch.set(services.prepare().into_axum_router());
        let router = frontend::http_router(parts.state.clone());
        let session = parts.session.number;
        self.gateway.set(Some(Local { session, endpoints: router }));
        let inference = Arc::new(InferenceService::new(parts.state.clone()));
        self.inference.set(Some(Local { session, endpoints: inference }));
        Ok(())
    }

    /// All that HTTP requests may reach, for this process itself.
    pub fn endpoints(&self) -> Router {
        self.endpoints.clone()
    }

    /// From now on a standby answers.
    pub fn stand_by(&self, base: &Foundation) {
        self.control.set(Arc::new(StandingBy::new(base.view())));
        self.grpc_switch.set(self.standby_grpc.clone());
        self.gateway.set(None);
        self.inference.set(None);
    }

    /// Waits until no answer of another coordinator passes through here.
    pub async fn idle(&self) {
        self.gateway.idle().await;
        self.inference.idle().await;
    }

    /// Takes no new connections; requests that run go on.
    pub fn stop_accepting(&self) {
        self.stopping.send_replace(true);
    }

    /// Lets answers over HTTP leave.
    pub async fn flush_http(&mut self) {
        if !self.http.is_finished() && timeout(FLUSH_LIMIT, &mut self.http).await.is_err() {
            tracing::debug!("HTTP connections are still open");
        }
    }

    /// Lets answers over gRPC leave: an answer that is complete may still wait to be written. Only once shards are gone:
    /// their streams are among those that are waited for.
    pub async fn flush_grpc(&mut self) {
        if !self.grpc.is_finished() && timeout(FLUSH_LIMIT, &mut self.grpc).await.is_err() {
            tracing::debug!("gRPC streams are still open");
        }
    }

    /// Closes all connections.
    pub fn abort(&self) {
        self.http.abort();
        self.grpc.abort();
    }
}

/// What leaders and standbys have in common.
fn grpc_services(
    base: &Foundation,
    state: FrontendState,
    inference: &InferenceGateway,
    control: &ControlSlot,
) -> anyhow::Result<Routes> {
    let routes = frontend::grpc::grpc_routes_with(state, inference.clone()).context("gRPC reflection")?;
    let leadership = LeadershipService::server(base.leadership.clone(), base.feed.clone());
    Ok(routes.add_service(leadership).add_service(AdminService::server(Arc::new(control.clone()))))
}
