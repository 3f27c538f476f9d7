//! Scripts in `tests/scheduler_scripts`: what the scheduler is told, a line `----`, and what it answers.
//!
//! ```text
//! limits block=4 rows=8 running=4     first; a new scheduler; cache=off: nothing is shared; replays=, patience=MS
//! serve blocks=6                      a group takes plans, at the next epoch; kept=STEP: with the pages of the last one
//! submit a prompt=5 max=2             prompt=3@9: 3 tokens from 9 on; prompts from 0 share their beginnings
//!     options: n=, logprobs, echo, eos, stop=TEXT, min=, deadline=MS, priority=,
//!     salt=TEXT: shares with requests of the same salt only; resume=7+3: tokens of an earlier life
//! result 1 a=7 b=3                    step 1's tokens, none if no logit is a number; prompt scores come by themselves; took=MS
//! hold | resume                       no plans until then; idle: no step is in flight
//! cancel a | lose [planned] | wait MS | status
//! ```
//!
//! `UPDATE_SCRIPTS=1 cargo test` writes the answers that came into the scripts: read the difference before you commit it.

mod fake;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use fake::{Letters, score};
use phalanx_cluster::seal::Seal;
use phalanx_coordinator::{
    request::{Request, RequestEvent, ResumedChoice, StopConditions},
    scheduler::{
        event::{Action, Event, Kept, Limits, Measure, Recovery},
        machine::Machine,
    },
    sequence::RequestKey,
};
use phalanx_proto::v1::{PromptScores, Sample, SamplingParams, StepPlan, StepResult};

const EOS: u32 = 25;

/// The sequence in each slot, and whether its prompt is scored.
type SlotNames = BTreeMap<u32, (String, bool)>;

struct Script {
    machine: Machine,
    names: Vec<String>,
    slots: SlotNames,
    plans: BTreeMap<u64, (StepPlan, SlotNames)>,
    epoch: u64,
    now: Instant,
}

/// A word's value behind `name=`.
fn value<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
}

fn number<T: std::str::FromStr>(words: &[&str], name: &str, default: T) -> T {
    value(words, name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is not a number")))
}

impl Script {
    fn new(words: &[&str]) -> Self {
        let limits = Limits {
            block_size: number(words, "block", 4),
            max_step_rows: number(words, "rows", 16),
            max_running: number(words, "running", 4),
            max_model_len: 100,
            vocab: 26,
            prefix_caching: value(words, "cache") != Some("off"),
        };
        let recovery = Recovery {
            max_replays: number(words, "replays", 3),
            no_group_timeout: Duration::from_millis(number(words, "patience", 60_000)),
        };
        Self {
            machine: Machine::new(limits, recovery, vec![EOS], Box::new(Letters)),
            names: Vec::new(),
            slots: BTreeMap::new(),
            plans: BTreeMap::new(),
            epoch: 0,
            now: Instant::now(),
        }
    }

    fn command(&mut self, line: &str) -> String {
        let words: Vec<_> = line.split_whitespace().collect();
        let event = match words[0] {
            "limits" => {
                *self = Self::new(&words);
                return String::new();
            }
            "serve" => {
                self.epoch += 1;
                self.slots.clear();
                self.plans.clear();
                let kept = value(&words, "kept")
                    .map(|step| Kept::Rows { epoch: self.epoch - 1, through_step: step.parse().expect("step number") });
                Event::GroupServing { epoch: self.epoch, n_blocks: number(&words, "blocks", 100), kept }
            }
            "lose" => Event::GroupLost { epoch: self.epoch, is_planned: words.contains(&"planned") },
            "hold" => Event::Hold { epoch: self.epoch },
            "resume" => Event::Resume { epoch: self.epoch },
            "submit" => {
                self.names.push(words[1].to_owned());
                Event::Submit(RequestKey(self.names.len() as u64 - 1), Box::new(self.request(&words)))
            }
            "cancel" => Event::Cancel(self.key(words[1])),
            "result" => Event::Stepped(self.result(&words)),
            "wait" => {
                self.now += Duration::from_millis(words[1].parse().expect("milliseconds"));
                Event::Tick
            }
            "status" => {
                let s = self.machine.status();
                let (waiting, running, used) = (s.n_waiting, s.n_running, s.n_blocks_used);
                return format!("waiting={waiting} running={running} used={used}\n");
            }
            other => panic!("unknown command {other}"),
        };
        let actions = self.machine.step(self.now, event);
        self.machine.check();
        actions.into_iter().map(|action| self.describe(action)).collect()
    }

    fn key(&self, name: &str) -> RequestKey {
        let idx = self.names.iter().rposition(|n| n == name);
        RequestKey(idx.unwrap_or_else(|| panic!("nobody is called {name}")) as u64)
    }

    fn request(&self, words: &[&str]) -> Request {
        let (len, first) = match value(words, "prompt").map(|v| v.split_once('@').unwrap_or((v, "0"))) {
            Some((len, first)) => (len.parse::<u32>().expect("length"), first.parse::<u32>().expect("token")),
            None => (1, 0),
        };
        Request {
            id: words[1].to_owned(),
            prompt: (first..first + len).map(|t| t % EOS).collect(),
            n: number(words, "n", 1),
            sampling: SamplingParams {
                // Tells the sequences of a plan apart; `describe` undoes it.
                seed: (self.names.len() as u64 - 1) << 8,
                prompt_logprobs: words.contains(&"echo").then_some(0),
                min_tokens: number(words, "min", 0),
                ..SamplingParams::default()
            },
            max_tokens: number(words, "max", 4),
            is_open_ended: words.contains(&"open"),
            stop: StopConditions {
                strings: value(words, "stop").map(str::to_owned).into_iter().collect(),
                ignore_eos: !words.contains(&"eos"),
                ..StopConditions::default()
            },
            deadline: value(words, "deadline")
                .map(|ms| self.now + Duration::from_millis(ms.parse().expect("milliseconds"))),
            priority: number(words, "priority", 0),
            cache_root: value(words, "salt").map_or(Seal::EMPTY, Seal::root),
            resume: value(words, "resume")
                .map(|tokens| ResumedChoice {
                    tokens: tokens.split('+').map(|t| t.parse().expect("token")).collect(),
                    scores: Vec::new(),
                })
                .into_iter()
                .collect(),
        }
    }

    /// A result from `name=token` words: one for each sampled row of the step.
    fn result(&mut self, words: &[&str]) -> StepResult {
        let step = words[1].parse().expect("step number");
        let (plan, slots) = self.plans.remove(&step).unwrap_or_else(|| panic!("step {step} was not planned"));
        let (mut samples, mut prompt_scores) = (Vec::new(), Vec::new());
        for chunk in &plan.chunks {
            let (name, is_scored) = &slots[&chunk.sequence];
            if chunk.sample {
                let token = value(words, name).unwrap_or_else(|| panic!("step {step} samples {name}"));
                let failed = token == "none";
                let token_id = if failed { 0 } else { token.parse().expect("token") };
                samples.push(Sample { sequence: chunk.sequence, token_id, failed, ..Sample::default() });
            }
            if *is_scored {
                let scores = (chunk.start + 1..=chunk.start + chunk.len).map(|p| score(0, p)).collect();
                prompt_scores.push(PromptScores { sequence: chunk.sequence, start: chunk.start + 1, scores });
            }
        }
        let compute_us = number::<u64>(words, "took", 0) * 1000;
        StepResult { epoch: plan.epoch, step, samples, prompt_scores, compute_us, ..StepResult::default() }
    }

    fn describe(&mut self, action: Action) -> String {
        match action {
            Action::SendPlan(plan) => self.describe_plan(plan),
            Action::Emit(key, event) => {
                let name = &self.names[key.0 as usize];
                match event {
                    RequestEvent::PromptScored(scores) => format!("{name}: prompt of {} scored\n", scores.len() + 1),
                    RequestEvent::Output(o) => {
                        let finish = o.finish.map(|f| format!(" {f:?}")).unwrap_or_default();
                        format!("{name}[{}]: {:?} {:?}{finish}\n", o.index, o.token_ids, o.text)
                    }
                    RequestEvent::Finished(u) => {
                        let (prompt, cached, output) = (u.prompt_tokens, u.cached_tokens, u.completion_tokens);
                        format!("{name}: finished prompt={prompt} cached={cached} output={output}\n")
                    }
                    RequestEvent::Failed(error) => format!("{name}: failed: {error}\n"),
                }
            }
            Action::Measure(Measure::Preempted) => "preempted\n".to_owned(),
            Action::Measure(Measure::Fenced) => "fenced\n".to_owned(),
            Action::Measure(Measure::Replayed(n)) => format!("{n} replayed\n"),
            Action::Measure(Measure::Stalled(by)) => format!("stalled for {} ms\n", by.as_millis()),
            Action::Measure(_) | Action::Admitted(_) => String::new(),
            Action::Idle(epoch) => format!("idle in epoch {epoch}\n"),
            Action::Recovered { stall, .. } if stall.is_zero() => String::new(),
            Action::Recovered { stall, .. } => format!("all go on after {} ms\n", stall.as_millis()),
            Action::Warn(reason) => format!("warning: {reason}\n"),
        }
    }

    fn describe_plan(&mut self, plan: StepPlan) -> String {
        let mut line = format!("step {}:", plan.step);
        if !plan.dropped.is_empty() {
            let names: Vec<_> = plan.dropped.iter().map(|slot| self.slots[slot].0.clone()).collect();
            let _ = write!(line, " drop {};", names.join(" "));
        }
        let mut blocks = BTreeMap::new();
        for start in &plan.started {
            let sampling = start.sampling.as_ref().expect("a start has parameters");
            let name = self.name_of(sampling.seed);
            self.slots.insert(start.sequence, (name, sampling.prompt_logprobs.is_some()));
            blocks.insert(start.sequence, format!(" blocks {:?}", start.blocks));
        }
        for append in &plan.appended {
            blocks.insert(append.sequence, format!(" append {:?}", append.blocks));
        }
        let chunks = plan.chunks.iter().map(|c| {
            let sample = if c.sample { " sample" } else { "" };
            let blocks = blocks.get(&c.sequence).map(String::as_str).unwrap_or_default();
            format!(" {} rows {}..{}{sample}{blocks}", self.slots[&c.sequence].0, c.start, c.start + c.len)
        });
        line += &chunks.collect::<Vec<_>>().join(",");
        self.plans.insert(plan.step, (plan, self.slots.clone()));
        line + "\n"
    }

    /// Choice 0 has its request's seed, the others are named by their number.
    fn name_of(&self, seed: u64) -> String {
        for (idx, name) in self.names.iter().enumerate() {
            for choice in 0..4_u64 {
                let of_choice = ((idx as u64) << 8).wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                if of_choice == seed {
                    return if choice == 0 { name.clone() } else { format!("{name}{choice}") };
                }
            }
        }
        panic!("no choice has seed {seed}")
    }
}

/// Runs a script; gives it back with the answers that came.
fn replay(text: &str) -> String {
    let mut script = Script::new(&[]);
    let mut got = String::new();
    for (idx, case) in text.trim_end().split("\n\n").enumerate() {
        let (commands, _) = case.split_once("\n----").unwrap_or_else(|| panic!("case {idx} has no ----: {case}"));
        let mut answers = String::new();
        for line in commands.lines().filter(|l| !l.starts_with('#')) {
            let answer = script.command(line);
            // Shown if a later command can't be done.
            print!("{line}\n{answer}");
            answers += &answer;
        }
        let _ = write!(got, "{commands}\n----\n{answers}\n");
    }
    got.trim_end().to_owned() + "\n"
}

#[test]
fn the_scheduler_answers_as_the_scripts_say() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scheduler_scripts");
    let mut paths: Vec<_> = std::fs::read_dir(&folder).expect("the folder is there").flatten().collect();
    paths.sort_by_key(std::fs::DirEntry::path);
    assert!(paths.len() >= 7, "{} scripts", paths.len());
    let mut differing = String::new();
    for path in paths.iter().map(std::fs::DirEntry::path) {
        let want = std::fs::read_to_string(&path).expect("a script is text");
        let got = replay(&want);
        if got != want && std::env::var_os("UPDATE_SCRIPTS").is_some() {
            std::fs::write(&path, got).expect("a script can be written");
        } else if got != want {
            let _ = write!(differing, "\n=== {} answers:\n{got}", path.display());
        }
    }
    assert!(differing.is_empty(), "{differing}");
}
