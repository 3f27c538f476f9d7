//! The `Leadership` gRPC service: who leads, and the journal for standbys.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{FutureExt, Stream, StreamExt, stream};
use phalanx_proto::v1::{
    JournalEntry, JournalRequest, JournalSynced, LeaderRequest, LeaderResponse,
    journal_entry::What,
    leadership_server::{self, LeadershipServer},
};
use tonic::{Request, Response, Status};

use super::{View, actor::LeadershipHandle, journal_feed::JournalFeed};

/// The journal of the present leadership. Clones are the same.
#[derive(Clone, Default)]
pub struct FeedSlot(Arc<Mutex<Option<Arc<dyn JournalFeed>>>>);

impl FeedSlot {
    /// Standbys are told from this one from now on.
    pub fn set(&self, feed: Option<Arc<dyn JournalFeed>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = feed;
    }

    fn get(&self) -> Option<Arc<dyn JournalFeed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The service. It answers on leaders and standbys alike.
pub struct LeadershipService {
    leadership: LeadershipHandle,
    feed: FeedSlot,
}

impl LeadershipService {
    /// As a gRPC service.
    pub fn server(leadership: LeadershipHandle, feed: FeedSlot) -> LeadershipServer<Self> {
        LeadershipServer::new(Self { leadership, feed })
    }
}

fn response(view: &View) -> LeaderResponse {
    match &view.leader {
        Some(leader) => LeaderResponse {
            term: leader.term,
            is_leader: view.session.is_some(),
            coordinator_id: leader.record.coordinator_id.clone(),
            http_address: leader.record.http_address.clone(),
            grpc_address: leader.record.grpc_address.clone(),
        },
        None => LeaderResponse::default(),
    }
}

#[tonic::async_trait]
impl leadership_server::Leadership for LeadershipService {
    type JournalStream = Pin<Box<dyn Stream<Item = Result<JournalEntry, Status>> + Send>>;

    async fn leader(&self, request: Request<LeaderRequest>) -> Result<Response<LeaderResponse>, Status> {
        let known_term = request.get_ref().known_term;
        let view = self.leadership.view().get();
        if view.session.is_some_and(|s| known_term > s.term) {
            // Anybody may say anything: the store decides, and if it is silent, the claim does.
            self.leadership.challenge(known_term);
        }
        Ok(Response::new(response(&view)))
    }

    /// Never ends while this coordinator leads: its end tells a standby that something happened to the leader.
    async fn journal(&self, request: Request<JournalRequest>) -> Result<Response<Self::JournalStream>, Status> {
        let mut view = self.leadership.view();
        let Some(session) = view.session() else {
            return Err(Status::failed_precondition("this coordinator does not lead"));
        };
        tracing::info!(standby = request.get_ref().coordinator_id, "a standby follows");
        let entries = match self.feed.get() {
            Some(feed) => feed.subscribe(),
            None => {
                let synced = JournalEntry { key: String::new(), what: Some(What::Synced(JournalSynced {})) };
                stream::iter([synced]).chain(stream::pending()).boxed()
            }
        };
        let ended = async move { view.ended(session.number).await }.boxed();
        Ok(Response::new(Box::pin(entries.map(Ok).take_until(ended))))
    }
}
