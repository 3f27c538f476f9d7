//! What the engine may do when: epochs and the order of steps. Pure.
//!
//! ```text
//! Idle --Form--> Loading --ok--> Loaded --Serve--> Allocating --ok--> Serving --Plan--> Stepping --ok--> Serving
//!   any --Form of a later epoch--> Loading      any --Retire, Detached--> Idle      any --failure--> Failed
//! ```
//!
//! **Invariant.** Nothing of an epoch that is over has an effect; after a failure nothing but a later epoch has.

/// What happens to the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Take part in the group of this epoch.
    Form {
        /// Of the group.
        epoch: u64,
    },
    /// Allocate KV pages and take plans.
    Serve {
        /// Of the group.
        epoch: u64,
    },
    /// Execute a step.
    Plan {
        /// Of the group.
        epoch: u64,
        /// Counts from 1 in each epoch.
        step: u64,
    },
    /// Leave the group.
    Retire {
        /// Of the group.
        epoch: u64,
    },
    /// The link to the coordinator is gone: the group is over.
    Detached,
    /// What the last action set out to do is done.
    Done,
    /// What the last action set out to do could not be done.
    Failed,
}

/// What the engine is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Load the slice and connect to the other ranks.
    Load,
    /// Allocate KV pages.
    Allocate,
    /// Execute the plan.
    Run,
    /// Drop sequences and collective; keep the weights, and the KV pages until it is known that nobody wants them.
    Leave,
    /// Say that this can't be done.
    Refuse(String),
    /// Nothing: it is of another epoch, or a consequence of a failure that was told already.
    Ignore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Loading,
    Loaded,
    Allocating,
    Serving,
    Stepping,
    Failed,
}

/// State of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineMachine {
    epoch: u64,
    phase: Phase,
    last_step: u64,
}

impl Default for EngineMachine {
    fn default() -> Self {
        Self { epoch: 0, phase: Phase::Idle, last_step: 0 }
    }
}

impl EngineMachine {
    /// Epoch of the current or last group.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Takes an event in and says what to do.
    pub fn step(&mut self, event: &Event) -> Action {
        match *event {
            Event::Form { epoch } => self.form(epoch),
            Event::Serve { epoch } if epoch == self.epoch => self.serve(),
            Event::Plan { epoch, step } if epoch == self.epoch => self.plan(step),
            Event::Retire { epoch } if epoch == self.epoch => {
                self.phase = Phase::Idle;
                Action::Leave
            }
            Event::Serve { .. } | Event::Plan { .. } | Event::Retire { .. } => Action::Ignore,
            Event::Detached => {
                // Another coordinator may count epochs differently.
                *self = Self::default();
                Action::Leave
            }
            Event::Done => {
                self.phase = match self.phase {
                    Phase::Loading => Phase::Loaded,
                    Phase::Allocating | Phase::Stepping => Phase::Serving,
                    other => other,
                };
                Action::Ignore
            }
            Event::Failed => {
                self.phase = Phase::Failed;
                Action::Ignore
            }
        }
    }

    fn form(&mut self, epoch: u64) -> Action {
        if epoch <= self.epoch {
            return Action::Ignore;
        }
        *self = Self { epoch, phase: Phase::Loading, last_step: 0 };
        Action::Load
    }

    fn serve(&mut self) -> Action {
        match self.phase {
            Phase::Loaded => {
                self.phase = Phase::Allocating;
                Action::Allocate
            }
            Phase::Failed | Phase::Idle => Action::Ignore,
            _ => self
                .refuse(format!("serve of epoch {} while {:?}: want it once, after loading", self.epoch, self.phase)),
        }
    }

    fn plan(&mut self, step: u64) -> Action {
        match self.phase {
            Phase::Serving if step == self.last_step + 1 => {
                self.last_step = step;
                self.phase = Phase::Stepping;
                Action::Run
            }
            Phase::Serving => {
                self.refuse(format!("step {step} of epoch {}: want step {}", self.epoch, self.last_step + 1))
            }
            Phase::Failed | Phase::Idle => Action::Ignore,
            _ => {
                self.refuse(format!("step {step} of epoch {} while {:?}: want it after ready", self.epoch, self.phase))
            }
        }
    }

    fn refuse(&mut self, reason: String) -> Action {
        self.phase = Phase::Failed;
        Action::Refuse(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving(epoch: u64) -> EngineMachine {
        let mut machine = EngineMachine::default();
        assert_eq!(machine.step(&Event::Form { epoch }), Action::Load);
        machine.step(&Event::Done);
        assert_eq!(machine.step(&Event::Serve { epoch }), Action::Allocate);
        machine.step(&Event::Done);
        machine
    }

    fn run(machine: &mut EngineMachine, epoch: u64, step: u64) -> Action {
        let action = machine.step(&Event::Plan { epoch, step });
        if action == Action::Run {
            machine.step(&Event::Done);
        }
        action
    }

    #[test]
    fn steps_run_in_order() {
        let mut machine = serving(3);
        assert_eq!(run(&mut machine, 3, 1), Action::Run);
        assert_eq!(run(&mut machine, 3, 2), Action::Run);
        assert_eq!(run(&mut machine, 3, 4), Action::Refuse("step 4 of epoch 3: want step 3".into()));
        // Told once; what follows is a consequence.
        assert_eq!(run(&mut machine, 3, 3), Action::Ignore);
    }

    #[test]
    fn a_step_is_not_run_twice() {
        let mut machine = serving(1);
        assert_eq!(run(&mut machine, 1, 1), Action::Run);
        assert!(matches!(run(&mut machine, 1, 1), Action::Refuse(_)));
    }

    #[test]
    fn older_epochs_have_no_effect() {
        let mut machine = serving(5);
        let before = machine.clone();
        assert_eq!(run(&mut machine, 4, 1), Action::Ignore);
        assert_eq!(machine.step(&Event::Form { epoch: 5 }), Action::Ignore);
        assert_eq!(machine.step(&Event::Retire { epoch: 4 }), Action::Ignore);
        assert_eq!(machine.step(&Event::Serve { epoch: 6 }), Action::Ignore);
        assert_eq!(machine, before);
    }

    #[test]
    fn a_later_epoch_replaces_a_failed_one() {
        let mut machine = serving(1);
        assert_eq!(machine.step(&Event::Plan { epoch: 1, step: 1 }), Action::Run);
        machine.step(&Event::Failed);
        assert_eq!(run(&mut machine, 1, 2), Action::Ignore);
        assert_eq!(machine.step(&Event::Form { epoch: 2 }), Action::Load);
    }

    #[test]
    fn a_failed_load_does_not_serve() {
        let mut machine = EngineMachine::default();
        machine.step(&Event::Form { epoch: 1 });
        machine.step(&Event::Failed);
        assert_eq!(machine.step(&Event::Serve { epoch: 1 }), Action::Ignore);
        assert_eq!(machine.step(&Event::Plan { epoch: 1, step: 1 }), Action::Ignore);
    }

    #[test]
    fn plans_before_ready_are_refused() {
        let mut machine = EngineMachine::default();
        machine.step(&Event::Form { epoch: 1 });
        machine.step(&Event::Done);
        assert!(matches!(machine.step(&Event::Plan { epoch: 1, step: 1 }), Action::Refuse(_)));
    }

    #[test]
    fn after_detaching_epochs_count_anew() {
        let mut machine = serving(9);
        assert_eq!(machine.step(&Event::Detached), Action::Leave);
        assert_eq!(machine.step(&Event::Form { epoch: 1 }), Action::Load);
    }

    #[test]
    fn retiring_leaves() {
        let mut machine = serving(2);
        assert_eq!(machine.step(&Event::Retire { epoch: 2 }), Action::Leave);
        assert_eq!(run(&mut machine, 2, 1), Action::Ignore);
        assert_eq!(machine.step(&Event::Form { epoch: 3 }), Action::Load);
    }
}
