//! The engine thread: takes commands in order and answers the coordinator.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::v1::{
    Failed, Form, HeldPages, LoadProgress, Prepare, Prepared, Retire, Serve, ShardMessage, StepPlan,
    shard_message::Message,
};
use tokio::sync::mpsc::UnboundedSender;

use super::{
    ahead::{Ahead, LoadedAhead, Stock},
    checkpoints::Checkpoints,
    held::Held,
    interrupt::Interrupt,
    kept::KeptPages,
    machine::{Action, EngineMachine, Event},
    rank::{EngineError, Rank, RankConfig, Resources},
    slice::Slices,
    standing::Standing,
    vitals::Vitals,
};
use crate::{failpoint, model::LoadError};

/// Least time between two reports of loading.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// How long there is no step to run until there is time for what a step might have to wait for.
const IDLE_AFTER: Duration = Duration::from_millis(5);

/// The engine's stack: more than it needs for layers, because masks of deeply nested grammars are computed there too.
const STACK_BYTES: usize = 16 << 20;

/// What the engine thread is told.
pub enum Command {
    /// There is a coordinator; answers go there. It has as many answers in flight as the coordinator has sent plans.
    Attached(UnboundedSender<ShardMessage>),
    /// The coordinator is gone: leave the group, keep weights and pages until another says what it wants.
    Detached,
    /// Load slices ahead.
    Prepare(Prepare),
    /// A thread that loads ahead is done.
    LoadedAhead(LoadedAhead),
    /// Take a rank.
    Form(Form),
    /// Allocate pages.
    Serve(Serve),
    /// Execute a step.
    Plan(StepPlan),
    /// Leave the group.
    Retire(Retire),
    /// End the thread.
    End,
}

/// A command, and when it was given.
pub struct Envelope {
    /// [`Interrupt::generation`] at that time.
    pub generation: u64,
    /// What to do.
    pub command: Command,
}

/// What others may look at while the engine works.
pub struct Shown {
    /// The step under way.
    pub vitals: Vitals,
    /// Which pages there are.
    pub held: Held,
    /// What it was told, and what came of it.
    pub standing: Standing,
}

/// The engine thread.
pub type EngineThread = thread::JoinHandle<Result<(), EnginePanic>>;

/// Starts the engine thread. It ends when it is told to, or when it panics; its result says which.
///
/// # Errors
/// If the system has no thread left.
pub fn spawn(
    config: RankConfig,
    interrupt: Interrupt,
    shown: Shown,
) -> std::io::Result<(mpsc::Sender<Envelope>, EngineThread)> {
    let (sender, commands) = mpsc::channel();
    let mut worker = Worker {
        config,
        interrupt,
        shown,
        machine: EngineMachine::default(),
        answers: None,
        rank: None,
        slices: Slices::default(),
        checkpoints: Checkpoints::default(),
        ahead: Ahead::new(sender.clone()),
    };
    let thread = thread::Builder::new()
        .name("engine".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || worker.run(&commands))?;
    Ok((sender, thread))
}

/// The engine thread panicked: a bug. The process should end.
#[derive(Debug, thiserror::Error)]
#[error("the engine panicked: {0}")]
pub struct EnginePanic(String);

struct Worker {
    config: RankConfig,
    interrupt: Interrupt,
    shown: Shown,
    machine: EngineMachine,
    answers: Option<UnboundedSender<ShardMessage>>,
    rank: Option<Rank>,
    /// That no rank uses: of the last group, or loaded ahead.
    slices: Slices,
    checkpoints: Checkpoints,
    ahead: Ahead,
}

impl Worker {
    fn run(&mut self, commands: &mpsc::Receiver<Envelope>) -> Result<(), EnginePanic> {
        while let Some(envelope) = self.next(commands) {
            let step = match &envelope.command {
                Command::End => break,
                Command::Plan(plan) => Some(plan.step),
                _ => None,
            };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take(envelope))) {
                let panic = EnginePanic(message_of(panic.as_ref()));
                tracing::error!("{panic}");
                let (epoch, step) = (self.machine.epoch(), step.unwrap_or(0));
                self.answer(Message::Failed(Failed { epoch, step, error: panic.to_string() }));
                return Err(panic);
            }
            // Steps change what pages hold, not which there are.
            if step.is_none() {
                self.shown.held.set(self.held_pages());
            }
        }
        self.ahead.stop();
        self.leave();
        Ok(())
    }

    /// Of the rank, else of those that were kept.
    fn held_pages(&self) -> Option<HeldPages> {
        let of_rank = self.rank.as_ref().and_then(Rank::held);
        of_rank.or_else(|| self.slices.values().find_map(|weights| weights.kept.as_ref().map(KeptPages::held)))
    }

    /// The next command. While there is none, mirrors catch up, and memory is touched that steps will write.
    fn next(&mut self, commands: &mpsc::Receiver<Envelope>) -> Option<Envelope> {
        let (mut mirrored, mut may_prefault) = (Instant::now(), true);
        loop {
            let look = self.rank.as_ref().and_then(Rank::mirror_next_look);
            let look = look.map(|look| look.saturating_sub(mirrored.elapsed()));
            let pause = may_prefault.then_some(IDLE_AFTER);
            let Some(wait) = look.into_iter().chain(pause).min() else { return commands.recv().ok() };
            match commands.recv_timeout(wait) {
                Ok(envelope) => return Some(envelope),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            match &mut self.rank {
                Some(rank) if look.is_some_and(|look| look <= wait) => {
                    rank.mirror_catch_up();
                    mirrored = Instant::now();
                }
                Some(rank) => may_prefault = rank.prefault(),
                None => may_prefault = false,
            }
        }
    }

    fn take(&mut self, Envelope { generation, command }: Envelope) {
        let now = Instant::now();
        self.shown.standing.told(&command, now);
        if !matches!(command, Command::LoadedAhead(_)) {
            self.interrupt.heed(generation, now);
        }
        let keeps_pages = !matches!(&command, Command::Retire(retire) if !retire.keep_kv);
        let event = match &command {
            Command::Attached(answers) => {
                self.answers = Some(answers.clone());
                return;
            }
            Command::Prepare(_) | Command::LoadedAhead(_) => return self.load_ahead(command),
            Command::End => return,
            Command::Detached => {
                self.answers = None;
                Event::Detached
            }
            Command::Retire(retire) => Event::Retire { epoch: retire.epoch },
            // What has been overtaken is not begun.
            Command::Form(_) | Command::Serve(_) | Command::Plan(_) if self.is_over(generation) => return,
            Command::Form(form) => Event::Form { epoch: form.epoch },
            Command::Serve(serve) => Event::Serve { epoch: serve.epoch },
            Command::Plan(plan) => Event::Plan { epoch: plan.epoch, step: plan.step },
        };
        let action = self.machine.step(&event);
        let step = if let Event::Plan { step, .. } = event { step } else { 0 };
        let has_run = action == Action::Run;
        let result = match (action, command) {
            (Action::Load, Command::Form(form)) => self.form(&form, generation),
            (Action::Allocate, Command::Serve(serve)) => self.serve(&serve),
            (Action::Run, Command::Plan(plan)) => self.plan(plan),
            (Action::Refuse(reason), _) => Err(EngineError::OutOfOrder(reason)),
            (Action::Leave, _) => {
                self.leave();
                if !keeps_pages {
                    self.slices.values_mut().for_each(|weights| weights.drop_pages());
                }
                return;
            }
            _ => return,
        };
        match result {
            Ok(answer) => {
                self.machine.step(&Event::Done);
                self.answer(answer);
                // Behind the result: nobody waits for it.
                if let Some(rank) = self.rank.as_mut().filter(|_| has_run) {
                    rank.after_step();
                }
            }
            Err(error) => {
                self.machine.step(&Event::Failed);
                let interrupted =
                    self.is_over(generation) || matches!(error, EngineError::Load(LoadError::Interrupted));
                self.leave();
                if !interrupted {
                    let epoch = self.machine.epoch();
                    tracing::error!(epoch, step, "{error}");
                    self.answer(Message::Failed(Failed { epoch, step, error: error.to_string() }));
                }
            }
        }
    }

    fn load_ahead(&mut self, command: Command) {
        let stock = Stock {
            config: &self.config,
            checkpoints: &mut self.checkpoints,
            slices: &mut self.slices,
            in_use: self.rank.as_ref().map(Rank::slice),
        };
        let prepared: Vec<Prepared> = match command {
            Command::Prepare(prepare) => self.ahead.prepare(prepare, stock),
            Command::LoadedAhead(loaded) => self.ahead.take(loaded, stock),
            _ => return,
        };
        prepared.into_iter().for_each(|prepared| self.answer(Message::Prepared(prepared)));
    }

    fn form(&mut self, form: &Form, generation: u64) -> Result<Message, EngineError> {
        failpoint::form();
        self.ahead.stop();
        self.leave();
        let begun = Instant::now();
        let abort = self.interrupt.abort_flag(generation);
        let (answers, epoch) = (self.answers.clone(), form.epoch);
        let mut reported = begun;
        let mut progress = |p: crate::model::loader::Progress| {
            if reported.elapsed() >= PROGRESS_INTERVAL || p.done_bytes == p.total_bytes {
                reported = Instant::now();
                let message = LoadProgress { epoch, done_bytes: p.done_bytes, total_bytes: p.total_bytes };
                send(answers.as_ref(), Message::LoadProgress(message));
            }
        };
        let resources =
            Resources { config: &self.config, checkpoints: &mut self.checkpoints, slices: &mut self.slices };
        let (rank, loaded) = Rank::form(form, resources, &abort, &mut progress)?;
        tracing::info!(
            epoch,
            rank = form.rank,
            world_size = form.world_size,
            collective = rank.collective_name(),
            weight_bytes = loaded.weight_bytes,
            kv_blocks = loaded.kv_blocks,
            kv_kept_through_step = loaded.kv_kept_through_step,
            elapsed_ms = begun.elapsed().as_millis() as u64,
            "loaded"
        );
        self.rank = Some(rank);
        Ok(Message::Loaded(loaded))
    }

    fn serve(&mut self, serve: &Serve) -> Result<Message, EngineError> {
        let rank = self.rank.take().ok_or_else(|| EngineError::OutOfOrder("serve without a rank".to_owned()))?;
        let (rank, ready) = rank.serve(serve)?;
        tracing::info!(
            epoch = serve.epoch,
            kv_blocks = serve.kv_blocks,
            kv_bytes = ready.kv_bytes,
            resident_bytes = ready.resident_bytes,
            "ready"
        );
        self.rank = Some(rank);
        if let Some(store) = &self.config.mirror {
            store.forget_before(serve.epoch);
        }
        Ok(Message::Ready(ready))
    }

    fn plan(&mut self, plan: StepPlan) -> Result<Message, EngineError> {
        let rank = self.rank.as_mut().ok_or_else(|| EngineError::OutOfOrder("step without a rank".to_owned()))?;
        let _underway = self.shown.vitals.begin(plan.epoch, plan.step, Instant::now());
        failpoint::step();
        rank.run(plan).map(Message::StepResult)
    }

    /// Gives up the rank; keeps weights and pages.
    fn leave(&mut self) {
        if let Some(rank) = self.rank.take() {
            let weights = rank.into_weights();
            self.slices.put(weights.key.clone(), weights);
        }
    }

    fn is_over(&self, generation: u64) -> bool {
        self.interrupt.generation() != generation
    }

    fn answer(&self, message: Message) {
        self.shown.standing.said(&message, Instant::now());
        send(self.answers.as_ref(), message);
    }
}

fn send(answers: Option<&UnboundedSender<ShardMessage>>, message: Message) {
    if let Some(answers) = answers {
        // A closed channel means that the link is gone: `Detached` is on its way.
        let _gone = answers.send(ShardMessage { message: Some(message) });
    }
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}
