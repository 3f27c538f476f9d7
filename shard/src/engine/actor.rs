//! The engine as an actor: a mailbox in front of its thread. Knows what interrupts what.

use std::{sync::mpsc, time::Instant};

use phalanx_proto::v1::{ShardMessage, coordinator_message::Message};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    held::Held,
    interrupt::Interrupt,
    rank::RankConfig,
    standing::Standing,
    vitals::Vitals,
    worker::{self, Command, EngineThread, Envelope, Shown},
};
use crate::mirror::Store;

/// What the engine is told. The coordinator bounds its mailbox: it has a few plans in flight.
pub enum EngineMsg {
    /// There is a coordinator; answers go there.
    Attached(UnboundedSender<ShardMessage>),
    /// It is gone.
    Detached,
    /// It said something.
    Coordinator(Box<Message>),
}

/// The actor.
pub struct Engine;

/// Its state.
pub struct EngineState {
    thread: mpsc::Sender<Envelope>,
    interrupt: Interrupt,
    /// Of the last group; a form that is not later is stale and must not interrupt.
    epoch: u64,
}

/// A started engine.
pub struct EngineHandle {
    /// Its mailbox.
    pub actor: ActorRef<EngineMsg>,
    /// Ends what it does.
    pub interrupt: Interrupt,
    /// What it does.
    pub vitals: Vitals,
    /// Where it stands.
    pub standing: Standing,
    /// Which pages it has.
    pub held: Held,
    /// What it keeps of other ranks.
    pub mirror: Option<Store>,
    /// Its thread.
    pub thread: EngineThread,
}

/// Starts thread and actor.
///
/// # Errors
/// If the system has no thread left.
pub async fn start(config: RankConfig) -> anyhow::Result<EngineHandle> {
    let (interrupt, vitals, held) = (Interrupt::default(), Vitals::default(), Held::default());
    let (mirror, standing) = (config.mirror.clone(), Standing::default());
    let shown = Shown { vitals: vitals.clone(), held: held.clone(), standing: standing.clone() };
    let (sender, thread) = worker::spawn(config, interrupt.clone(), shown)?;
    let (actor, _ends_with_the_process) = Actor::spawn(None, Engine, (sender, interrupt.clone())).await?;
    Ok(EngineHandle { actor, interrupt, vitals, standing, held, mirror, thread })
}

impl Actor for Engine {
    type Msg = EngineMsg;
    type State = EngineState;
    type Arguments = (mpsc::Sender<Envelope>, Interrupt);

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        (thread, interrupt): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(EngineState { thread, interrupt, epoch: 0 })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let command = match message {
            EngineMsg::Attached(answers) => Command::Attached(answers),
            EngineMsg::Detached => {
                state.epoch = 0;
                state.interrupt.advance(Instant::now());
                Command::Detached
            }
            EngineMsg::Coordinator(message) => match *message {
                Message::Form(form) => {
                    if form.epoch <= state.epoch {
                        tracing::warn!(epoch = form.epoch, known = state.epoch, "a form of an old epoch is ignored");
                        return Ok(());
                    }
                    state.epoch = form.epoch;
                    state.interrupt.advance(Instant::now());
                    Command::Form(form)
                }
                Message::Retire(retire) => {
                    if retire.epoch == state.epoch {
                        state.interrupt.advance(Instant::now());
                    }
                    Command::Retire(retire)
                }
                Message::Serve(serve) => Command::Serve(serve),
                Message::StepPlan(plan) => Command::Plan(plan),
                Message::Prepare(prepare) => Command::Prepare(prepare),
                // The link's own.
                Message::Welcome(_) | Message::Heartbeat(_) | Message::Shutdown(_) => return Ok(()),
            },
        };
        let generation = state.interrupt.generation();
        if state.thread.send(Envelope { generation, command }).is_err() {
            // The thread has ended: the process is about to.
            myself.stop(Some("the engine thread has ended".to_owned()));
        }
        Ok(())
    }

    async fn post_stop(&self, _myself: ActorRef<Self::Msg>, state: &mut Self::State) -> Result<(), ActorProcessingErr> {
        let end = Envelope { generation: state.interrupt.generation(), command: Command::End };
        // It may have ended before.
        let _ended = state.thread.send(end);
        Ok(())
    }
}
