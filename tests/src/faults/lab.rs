//! Starts a row's cluster, takes the reference, runs rounds, checks.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use tokio::runtime::Runtime;

use super::{
    compare::{Difference, compare},
    deployment::Deployment,
    eventually,
    load::{self, Job, Sizes},
    netns::Hosts,
    resources::{self, Held, Processors},
    round::{Load, Round},
    rows::{Epochs, Row},
    setup::{Network, Setup},
    stream::Record,
};
use crate::workload::Numbers;

/// Rounds of the full matrix of which one lasts as long as in production.
const LONG_ROUND_EACH: usize = 10;
/// Stalls of a round that are told with its log,
const STALLS: usize = 5;
/// and how far apart they must end to be of different moments.
const SAME_STALL: Duration = Duration::from_millis(50);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Decides requests and moments.
    pub seed: u64,
    /// Rounds of each row.
    pub rounds: usize,
    /// The full matrix: in the first round of a row, and then in each tenth, faults last as long as in production.
    pub full: bool,
    /// Says more.
    pub verbose: bool,
}

/// What a round came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Requests.
    pub requests: usize,
    /// Requests that did not end as they should.
    pub lost: usize,
    /// Against the reference.
    pub difference: Difference,
    /// From the fault to the first sign that the cluster knows.
    pub detection: Option<Duration>,
    /// From the fault to the first token of any stream after the longest silence of all.
    pub resumed: Duration,
    /// Largest gap between two tokens of a stream, after the fault.
    pub stall: Duration,
    /// The longest ones, each of another moment, and when they ended.
    pub longest_stalls: Vec<(Duration, Instant)>,
    /// Latest first token of a stream.
    pub first_token: Duration,
    /// Tokens computed again, as the coordinator counts them.
    pub replayed: f64,
    /// What is wrong besides.
    pub problems: Vec<String>,
    /// What coordinators and shards hold when all is well again.
    pub held: Vec<Held>,
    /// From the first request to the end of all checks.
    pub took: Duration,
    /// Share of this machine's processors that its host gave to others meanwhile, if it says so.
    pub stolen: Option<f64>,
}

impl Outcome {
    /// Whether every promise was kept.
    pub fn is_good(&self) -> bool {
        self.lost == 0 && self.difference.is_none() && self.problems.is_empty()
    }
}

/// All rounds of a row.
#[derive(Debug, Clone)]
pub struct Report {
    /// Name of the row.
    pub row: &'static str,
    /// What the fault is, in words.
    pub fault: &'static str,
    /// Model that was served.
    pub model: &'static str,
    /// Seed of all rounds.
    pub seed: u64,
    /// Largest gap between two tokens without a fault.
    pub quiet_gap: Duration,
    /// Latest first token without a fault.
    pub quiet_first_token: Duration,
    /// The rounds.
    pub outcomes: Vec<Outcome>,
    /// What is wrong with the row as a whole.
    pub problems: Vec<String>,
    /// From its start to its end.
    pub took: Duration,
}

impl Report {
    /// Whether every promise was kept in every round.
    pub fn is_good(&self) -> bool {
        self.problems.is_empty() && !self.outcomes.is_empty() && self.outcomes.iter().all(Outcome::is_good)
    }
}

struct Reference {
    records: Vec<Record>,
    all_tokens: u64,
    prefill: Duration,
    quiet_gap: Duration,
    steps: u64,
}

/// Runs a row.
pub fn run(row: &'static Row, options: &Options) -> Report {
    let began = Instant::now();
    let setup = (row.setup)();
    let mut report = Report {
        row: row.name,
        fault: row.fault,
        model: setup.model.name(),
        seed: options.seed,
        quiet_gap: Duration::ZERO,
        quiet_first_token: Duration::ZERO,
        outcomes: Vec::new(),
        problems: Vec::new(),
        took: Duration::ZERO,
    };
    // A thread of its own: it may move to another host, and all that it starts with it.
    let outcome = thread::scope(|scope| scope.spawn(|| run_on_hosts(row, setup, options, &mut report)).join());
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => report.problems.push(format!("{error:#}")),
        Err(_) => report.problems.push("the laboratory panicked, see above".to_owned()),
    }
    report.took = began.elapsed();
    report
}

fn run_on_hosts(row: &'static Row, setup: Setup, options: &Options, report: &mut Report) -> Result<()> {
    let hosts = match setup.network {
        Network::Loopback => None,
        Network::Hosts(joined) => Some(Arc::new(Hosts::start(1 + setup.own_shards.len(), joined)?)),
    };
    if let Some(hosts) = &hosts {
        hosts.enter(0)?;
    }
    run_rounds(row, setup, hosts.as_ref(), options, report)
}

fn run_rounds(
    row: &'static Row,
    setup: Setup,
    hosts: Option<&Arc<Hosts>>,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let runtime = Arc::new(Runtime::new()?);
    let sizes = row.sizes.map_or_else(|| Sizes::of(setup.model), |sizes| sizes(setup.model));
    let jobs = match row.long_prompts {
        Some(n_tokens) => load::long(options.seed, sizes.vocab, n_tokens, sizes.tokens),
        None => load::mix(options.seed, sizes),
    };
    let plain = Setup { own_shards: setup.own_shards.iter().map(|_| Default::default()).collect(), ..setup.clone() };
    let mut deployment = Deployment::start_on(&runtime, if row.fresh { &plain } else { &setup }, hosts)?;
    let reference = reference(&runtime, &mut deployment, &jobs)?;
    report.quiet_gap = reference.quiet_gap;
    report.quiet_first_token = reference.prefill;
    for index in 0..options.rounds {
        let seed = options.seed.wrapping_mul(1000).wrapping_add(index as u64);
        if row.fresh {
            report.problems.extend(deployment.end());
            let mut numbers = Numbers(seed);
            let setup = row.arm.map_or_else(|| setup.clone(), |arm| arm(setup.clone(), reference.steps, &mut numbers));
            deployment = Deployment::start_on(&runtime, &setup, hosts)?;
        }
        let began = Instant::now();
        let is_long = options.full && index % LONG_ROUND_EACH == 0;
        let outcome = round(row, &runtime, &mut deployment, &jobs, &reference, Numbers(seed), is_long);
        let failed = !outcome.as_ref().is_ok_and(Outcome::is_good);
        if failed || options.verbose {
            eprintln!("---- {} round {index}, seed {}: log since its start ----", row.name, options.seed);
            for (at, line) in deployment.log_since(began) {
                eprintln!("{:8.3} {line}", (at - began).as_secs_f64());
            }
            for (stall, ended) in outcome.iter().flat_map(|o| &o.longest_stalls) {
                eprintln!("{:8.3} a stall of {} ms has ended", (*ended - began).as_secs_f64(), stall.as_millis());
            }
        }
        let outcome = outcome.with_context(|| format!("round {index}"))?;
        eprintln!("{}", super::report::line(row.name, index, &outcome));
        report.outcomes.push(outcome);
    }
    let held: Vec<_> = report.outcomes.iter().map(|o| o.held.as_slice()).collect();
    report.problems.extend(resources::leaks(&held));
    report.problems.extend(deployment.end());
    Ok(())
}

fn reference(runtime: &Runtime, deployment: &mut Deployment, jobs: &[Job]) -> Result<Reference> {
    let steps = deployment.metric("step_seconds_count");
    let began = Instant::now();
    let records = Load::start(runtime, deployment, jobs, None, false)?.finish(runtime);
    let records: Vec<Record> = records.into_iter().map(|(_, record)| record).collect();
    for (record, job) in records.iter().zip(jobs) {
        ensure!(record.error.is_none(), "{} without any fault: {:?}", job.kind, record.error);
        let n_tokens: usize = record.choices.iter().map(|c| c.tokens.len()).sum();
        ensure!(n_tokens > 0, "{} without any fault: no tokens", job.kind);
    }
    deployment.wait_whole()?;
    let all_tokens = records.iter().flat_map(|r| &r.choices).map(|c| c.tokens.len() as u64).sum();
    let prefill = records.iter().filter_map(Record::first_token).max().unwrap_or_default();
    let quiet_gap = records.iter().map(|r| r.longest_gap(began)).max().unwrap_or_default();
    let steps = deployment.metric("step_seconds_count") - steps;
    Ok(Reference { records, all_tokens, prefill, quiet_gap, steps: steps as u64 })
}

fn round(
    row: &'static Row,
    runtime: &Runtime,
    deployment: &mut Deployment,
    jobs: &[Job],
    reference: &Reference,
    numbers: Numbers,
    is_long: bool,
) -> Result<Outcome> {
    if row.mirrored {
        eventually("all KV rows are mirrored", || deployment.mirror_lag() == Some(0))?;
    }
    let (epoch, failovers) = (deployment.epoch(), deployment.failovers());
    let replayed = deployment.replayed();
    let lives = deployment.coordinator_pids();
    let key = format!("fault-{}-{}", row.name, numbers.0);
    let load = Load::start(runtime, deployment, jobs, row.resumes.then_some(key.as_str()), row.repeats)?;
    let mut faulty = Round {
        deployment: &mut *deployment,
        load: &load,
        numbers,
        all_tokens: reference.all_tokens,
        prefill: reference.prefill,
        injected: None,
        runtime,
        full: is_long,
    };
    let (started, processors) = (Instant::now(), Processors::now());
    let fault = (row.inject)(&mut faulty);
    let injected = faulty.injected.unwrap_or(started);
    let (clients, records): (Vec<usize>, Vec<Record>) = load.finish(runtime).into_iter().unzip();
    fault.context("the fault could not be made")?;
    let detection = detection(deployment, injected, failovers, row);
    let longest_stalls = longest_stalls(&records, injected);
    let mut outcome = Outcome {
        requests: records.len(),
        lost: 0,
        difference: Difference::default(),
        detection,
        resumed: resumed(&records, injected),
        stall: longest_stalls.first().map_or(Duration::ZERO, |(stall, _)| *stall),
        longest_stalls,
        first_token: records.iter().filter_map(Record::first_token).max().unwrap_or_default(),
        replayed: 0.0,
        problems: Vec::new(),
        held: Vec::new(),
        took: Duration::ZERO,
        stolen: None,
    };
    judge(&mut outcome, &clients, &records, reference, jobs);
    if let Err(error) = deployment.wait_whole() {
        outcome.problems.push(format!("the cluster does not recover: {error:#}"));
        return Ok(outcome);
    }
    if eventually("KV blocks are free", || deployment.metric("kv_blocks_used") == 0.0).is_err() {
        outcome.problems.push(format!("{} KV blocks stay in use", deployment.metric("kv_blocks_used")));
    }
    // Who was started again counts from 0.
    let grown = |(pid, n): (u32, f64)| n - replayed.get(&pid).copied().unwrap_or(0.0);
    outcome.replayed = deployment.replayed().into_iter().map(grown).sum();
    if let Some(share) = row.most_replayed {
        let held: usize = records.iter().map(|r| r.held_at(injected)).sum();
        if outcome.replayed > held as f64 * share {
            let replayed = outcome.replayed;
            outcome.problems.push(format!("{replayed} of {held} tokens were computed again in spite of copies"));
        }
    }
    let grown = deployment.epoch() - epoch;
    match row.epochs {
        Epochs::Same if grown != 0.0 => outcome.problems.push(format!("the epoch grew by {grown}")),
        Epochs::Grow if grown <= 0.0 => outcome.problems.push(format!("the epoch changed by {grown}")),
        _ => {}
    }
    // A coordinator that was started again counts from 0.
    let counted = deployment.failovers() - failovers;
    if row.epochs == Epochs::Grow && lives == deployment.coordinator_pids() && counted < 1.0 {
        outcome.problems.push(format!("phalanx_failovers_total changed by {counted}"));
    }
    // What a burst of requests left behind in allocators and connection pools should have settled.
    thread::sleep(Duration::from_millis(200));
    outcome.held = deployment.held();
    outcome.took = started.elapsed();
    outcome.stolen = processors.zip(Processors::now()).and_then(|(before, now)| now.stolen_since(before));
    Ok(outcome)
}

/// From the fault to the end of the longest silence of all streams together.
fn resumed(records: &[Record], injected: Instant) -> Duration {
    let mut arrivals: Vec<_> =
        records.iter().flat_map(|r| &r.arrivals).filter(|at| **at >= injected).copied().collect();
    arrivals.push(injected);
    arrivals.sort_unstable();
    let longest = arrivals.windows(2).max_by_key(|pair| pair[1] - pair[0]);
    longest.map_or(Duration::ZERO, |pair| pair[1] - injected)
}

/// The longest gaps between two tokens of any stream, the longest first. Of those that end with the same step there is one.
fn longest_stalls(records: &[Record], injected: Instant) -> Vec<(Duration, Instant)> {
    let mut gaps: Vec<_> = records.iter().flat_map(|record| record.gaps(injected)).collect();
    gaps.sort_unstable_by_key(|(gap, _)| std::cmp::Reverse(*gap));
    let mut longest: Vec<(Duration, Instant)> = Vec::new();
    for (gap, ended) in gaps {
        let is_apart = |other: Instant| ended.max(other) - ended.min(other) > SAME_STALL;
        if longest.len() < STALLS && longest.iter().all(|(_, other)| is_apart(*other)) {
            longest.push((gap, ended));
        }
    }
    longest
}

fn judge(outcome: &mut Outcome, clients: &[usize], records: &[Record], reference: &Reference, jobs: &[Job]) {
    for (&index, record) in clients.iter().zip(records) {
        let (expected, job) = (&reference.records[index], &jobs[index]);
        if let Some(error) = &record.error {
            outcome.lost += 1;
            let n_tokens: usize = record.choices.iter().map(|c| c.tokens.len()).sum();
            outcome.problems.push(format!("stream {index} ({}) lost after {n_tokens} tokens: {error}", job.kind));
            continue;
        }
        let difference = compare(expected, record);
        if !difference.is_none() {
            outcome.problems.push(format!("stream {index} ({}): {difference:?}", job.kind));
        }
        outcome.difference = outcome.difference.plus(difference);
    }
}

/// The first line of a log above INFO since the fault, or that says that a member is lost.
fn detection(deployment: &Deployment, injected: Instant, failovers: f64, row: &Row) -> Option<Duration> {
    if row.epochs == Epochs::Same && deployment.failovers() <= failovers {
        return None;
    }
    let lines = deployment.log_since(injected);
    let signs = [" WARN ", " ERROR ", " detached ", ": taking over", "handing leadership over"];
    let sign = lines.iter().find(|(_, line)| signs.iter().any(|sign| line.contains(sign)));
    sign.map(|(at, _)| *at - injected)
}
