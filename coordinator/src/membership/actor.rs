//! The actor that knows who is attached, and supervises the group.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use phalanx_cluster::id::ShardId;
use phalanx_proto::v1::{Hello, Shutdown, coordinator_message::Message};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};

use crate::{
    group::{
        actor::{Group, GroupConfig, GroupMsg},
        machine::{Cause, Origin},
    },
    shard_link::LinkHandle,
};

/// Where the group's actor is; it changes when the actor is started again.
#[derive(Clone)]
pub struct GroupAddress(Arc<RwLock<ActorRef<GroupMsg>>>);

impl GroupAddress {
    /// The present one.
    pub fn get(&self) -> ActorRef<GroupMsg> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, actor: ActorRef<GroupMsg>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = actor;
    }
}

/// What the actor is told.
pub enum MembershipMsg {
    /// A stream was opened. The answer says whether it may stay, else why not.
    Attach {
        /// What the shard said of itself.
        hello: Box<Hello>,
        /// Leads to it.
        link: LinkHandle,
        /// For the answer.
        reply: RpcReplyPort<Result<(), String>>,
    },
    /// A stream ended.
    Detached {
        /// Whose.
        from: Origin,
        /// Which one.
        stream: u64,
        /// What kind of loss.
        cause: Cause,
        /// Why.
        reason: String,
    },
    /// Where the group is.
    Group(RpcReplyPort<GroupAddress>),
    /// Tell all shards to end.
    Shutdown {
        /// Why.
        reason: String,
        /// Answered when the messages are queued.
        reply: RpcReplyPort<()>,
    },
}

/// The actor. Ends with an error if it can't have a group: the process then ends too.
pub struct Membership;

/// What it knows.
pub struct State {
    members: BTreeMap<ShardId, (Hello, LinkHandle)>,
    group: GroupAddress,
    config: Arc<GroupConfig>,
}

impl Actor for Membership {
    type Msg = MembershipMsg;
    type State = State;
    type Arguments = GroupConfig;

    async fn pre_start(
        &self,
        myself: ActorRef<MembershipMsg>,
        config: GroupConfig,
    ) -> Result<State, ActorProcessingErr> {
        let config = Arc::new(config);
        let (group, _) = Actor::spawn_linked(None, Group, Arc::clone(&config), myself.get_cell()).await?;
        Ok(State { members: BTreeMap::new(), group: GroupAddress(Arc::new(RwLock::new(group))), config })
    }

    async fn handle(
        &self,
        _myself: ActorRef<MembershipMsg>,
        message: MembershipMsg,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            MembershipMsg::Attach { hello, link, reply } => {
                let answer = state.attach(*hello, link);
                // A caller that gave up closes the stream, which detaches the shard again.
                let _ = reply.send(answer);
            }
            MembershipMsg::Detached { from, stream, cause, reason } => state.detach(from, stream, cause, reason),
            MembershipMsg::Group(reply) => {
                let _ = reply.send(state.group.clone());
            }
            MembershipMsg::Shutdown { reason, reply } => {
                state.tell_group(GroupMsg::Ending);
                for (_, link) in state.members.values() {
                    link.send(Message::Shutdown(Shutdown { reason: reason.clone() }));
                }
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<MembershipMsg>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let cause = match event {
            SupervisionEvent::ActorFailed(_, error) => error.to_string(),
            SupervisionEvent::ActorTerminated(_, _, reason) => reason.unwrap_or_else(|| "it stopped".to_owned()),
            _ => return Ok(()),
        };
        tracing::error!(cause, "the group's actor has ended; starting it again");
        state.config.after_crash(&cause);
        let config = Arc::clone(&state.config);
        let (group, _) = Actor::spawn_linked(None, Group, config, myself.get_cell()).await?;
        for (hello, link) in state.members.values() {
            let arrived = GroupMsg::Arrived { hello: Box::new(hello.clone()), link: link.clone() };
            group.cast(arrived).map_err(|e| format!("the new group's actor has ended: {e}"))?;
        }
        state.group.set(group);
        Ok(())
    }
}

impl State {
    fn attach(&mut self, hello: Hello, link: LinkHandle) -> Result<(), String> {
        let shard = link.origin().shard.clone();
        if let Some((old, old_link)) = self.members.get(&shard) {
            if old.incarnation != hello.incarnation {
                // Its process may be dead without our knowing yet: the newcomer dials again until that is clear.
                return Err(format!(
                    "a shard named {shard} (pid {} on another stream) is attached: give this one another --shard-id",
                    old.pid
                ));
            }
            // The same process lost its connection before we did.
            let old_link = old_link.clone();
            let reason = "it attached again".to_owned();
            self.detach(old_link.origin().clone(), old_link.stream(), Cause::Lost, reason);
            old_link.close();
        }
        tracing::info!(
            %shard,
            pid = hello.pid,
            device = hello.device,
            threads = hello.threads,
            host = hello.host_id,
            "attached"
        );
        self.members.insert(shard, (hello.clone(), link.clone()));
        self.tell_group(GroupMsg::Arrived { hello: Box::new(hello), link });
        Ok(())
    }

    fn detach(&mut self, from: Origin, stream: u64, cause: Cause, reason: String) {
        match self.members.get(&from.shard) {
            Some((_, link)) if link.stream() == stream => {
                tracing::info!(shard = %from.shard, reason, "detached");
                self.members.remove(&from.shard);
                self.tell_group(GroupMsg::Left { from, cause, reason });
            }
            // Replaced meanwhile.
            _ => {}
        }
    }

    fn tell_group(&self, message: GroupMsg) {
        if self.group.get().cast(message).is_err() {
            // Supervision starts another one and tells it of all members.
            tracing::debug!("the group's actor has ended");
        }
    }
}
