//! The actor that knows who is attached, and supervises the groups.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use phalanx_cluster::id::{Epoch, ShardId};
use phalanx_proto::v1::{Hello, Shutdown, coordinator_message::Message};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};

use super::{
    groups::{GroupAddress, Groups},
    machine::{Action, Event, Former, MembershipMachine},
};
use crate::{
    group::{
        actor::{Group, GroupConfig, GroupMsg, GroupStart, ToMembership, kind_of},
        drained, epochs,
        machine::{Cause, Origin},
    },
    shard_link::LinkHandle,
};

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
    /// Where the groups are.
    Groups(RpcReplyPort<Groups>),
    /// A group's actor says something.
    FromGroup(usize, ToMembership),
    /// The machine wanted to be woken.
    Tick,
    /// Tell all shards to end.
    Shutdown {
        /// Why.
        reason: String,
        /// Answered when the messages are queued.
        reply: RpcReplyPort<()>,
    },
}

/// The actor. Ends with an error if it can't have its groups: the process then ends too.
pub struct Membership;

/// What it knows.
pub struct State {
    members: BTreeMap<ShardId, (Hello, LinkHandle)>,
    groups: Groups,
    configs: Vec<Arc<GroupConfig>>,
    machine: MembershipMachine,
    myself: ActorRef<MembershipMsg>,
    /// When the next `Tick` was asked for.
    tick_at: Option<Instant>,
}

impl Actor for Membership {
    type Msg = MembershipMsg;
    type State = State;
    type Arguments = Vec<GroupConfig>;

    async fn pre_start(
        &self,
        myself: ActorRef<MembershipMsg>,
        configs: Vec<GroupConfig>,
    ) -> Result<State, ActorProcessingErr> {
        let configs: Vec<Arc<GroupConfig>> = configs.into_iter().map(Arc::new).collect();
        let (mut addresses, mut former) = (Vec::new(), Vec::new());
        for config in &configs {
            addresses.push(GroupAddress::new(start(&myself, config).await?));
            let ranks = epochs::load(&*config.store, config.index).await?.ranks;
            let drained = drained::load(&*config.store, config.index).await?;
            former.push(Former { ranks, drained });
        }
        let world_size = configs.first().map_or(1, |config| config.settings.world_size);
        let machine = MembershipMachine::new(world_size, former);
        let groups = Groups::new(addresses);
        Ok(State { members: BTreeMap::new(), groups, configs, machine, myself, tick_at: None })
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
            MembershipMsg::Groups(reply) => {
                let _ = reply.send(state.groups.clone());
            }
            MembershipMsg::FromGroup(group, ToMembership::Stands(standing)) => {
                state.step(Event::Stands { group, standing });
            }
            MembershipMsg::FromGroup(group, ToMembership::Released { ticket, given }) => {
                state.step(Event::Released { group, ticket, given });
            }
            MembershipMsg::Tick => {
                state.tick_at = None;
                state.step(Event::Tick);
            }
            MembershipMsg::Shutdown { reason, reply } => {
                for group in state.groups.all() {
                    tell(group, GroupMsg::Ending);
                }
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
        let (actor, cause) = match event {
            SupervisionEvent::ActorFailed(actor, error) => (actor, error.to_string()),
            SupervisionEvent::ActorTerminated(actor, _, reason) => {
                (actor, reason.unwrap_or_else(|| "it stopped".to_owned()))
            }
            _ => return Ok(()),
        };
        let index = state.groups.all().iter().position(|group| group.get().get_id() == actor.get_id());
        let Some(index) = index else { return Ok(()) };
        tracing::error!(group = index, cause, "a group's actor has ended; starting it again");
        state.configs[index].after_crash(&cause);
        let group = start(&myself, &state.configs[index]).await?;
        state.groups.all()[index].set(group);
        // Its shards before all else that it is told.
        for shard in state.machine.members(index).cloned().collect::<Vec<_>>() {
            state.join(&shard, index, Epoch::default());
        }
        state.step(Event::Restarted(index));
        Ok(())
    }
}

/// Starts a group's actor.
async fn start(
    myself: &ActorRef<MembershipMsg>,
    config: &Arc<GroupConfig>,
) -> Result<ActorRef<GroupMsg>, ActorProcessingErr> {
    let (membership, index) = (myself.clone(), config.index);
    let membership = Box::new(move |message| {
        if membership.cast(MembershipMsg::FromGroup(index, message)).is_err() {
            tracing::debug!("membership has ended before a group");
        }
    });
    let start = GroupStart { config: Arc::clone(config), membership };
    let (group, _) = Actor::spawn_linked(None, Group, start, myself.get_cell()).await?;
    Ok(group)
}

fn tell(group: &GroupAddress, message: GroupMsg) {
    if group.get().cast(message).is_err() {
        // Supervision starts another one and tells it of all its members.
        tracing::debug!("a group's actor has ended");
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
        let (stream, kind) = (link.stream(), kind_of(&hello));
        self.members.insert(shard.clone(), (hello, link));
        self.step(Event::Arrived { shard, stream, kind });
        Ok(())
    }

    fn detach(&mut self, from: Origin, stream: u64, cause: Cause, reason: String) {
        match self.members.get(&from.shard) {
            Some((_, link)) if link.stream() == stream => {
                tracing::info!(shard = %from.shard, reason, "detached");
                self.members.remove(&from.shard);
                let shard = from.shard.clone();
                self.step_because(Event::Left(shard), Some((from, cause, reason)));
            }
            // Replaced meanwhile.
            _ => {}
        }
    }

    fn step(&mut self, event: Event) {
        self.step_because(event, None);
    }

    /// `loss` is what a group is told when its shard is gone.
    fn step_because(&mut self, event: Event, mut loss: Option<(Origin, Cause, String)>) {
        let now = Instant::now();
        let actions = self.machine.step(now, event);
        // Before shards say anything to their new group.
        self.groups.place(self.machine.places(), self.machine.spares());
        for action in actions {
            match action {
                Action::Join { shard, group, knows } => self.join(&shard, group, knows),
                Action::Leave { group, .. } => {
                    if let (Some((from, cause, reason)), Some(group)) = (loss.take(), self.groups.all().get(group)) {
                        tell(group, GroupMsg::Left { from, cause, reason });
                    }
                }
                Action::Release { group, ticket, given } => {
                    if let Some(group) = self.groups.all().get(group) {
                        tell(group, GroupMsg::Release { ticket, given });
                    }
                }
                Action::SetAside(shard) => {
                    let kind = self.members.get(&shard).map(|(hello, _)| kind_of(hello)).unwrap_or_default();
                    tracing::warn!(%shard, kind, "computes other bits than the shards that are here: it gets no rank");
                }
            }
        }
        if let Some(at) = self.machine.wakes_at(now)
            && self.tick_at.is_none_or(|tick_at| at < tick_at)
        {
            self.tick_at = Some(at);
            self.myself.send_after(at.saturating_duration_since(now), || MembershipMsg::Tick);
        }
    }

    fn join(&self, shard: &ShardId, group: usize, knows: Epoch) {
        let (Some((hello, link)), Some(address)) = (self.members.get(shard), self.groups.all().get(group)) else {
            return;
        };
        tracing::debug!(%shard, group, "joins");
        tell(address, GroupMsg::Arrived { hello: Box::new(hello.clone()), link: link.clone(), knows });
    }
}
