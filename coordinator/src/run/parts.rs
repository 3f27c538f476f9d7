//! What a leader has and a standby has not: scheduler, membership, group.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, bail};
use metrics_exporter_prometheus::PrometheusHandle;
use phalanx_cluster::{id::ShardId, store::MembershipStore};
use phalanx_proto::{dial::Dialer, v1::Form};
use ractor::{Actor, ActorRef, rpc::CallResult};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    batches::service::{self as batches, Batches},
    config::{Config, KvMirror},
    frontend::{
        self, FrontendState,
        response_cache::{self, ResponseCache},
    },
    group::{
        self,
        actor::{GroupConfig, GroupMsg, Notice},
        loading::Loading,
        machine::{MirrorTo, OWNERS_LIMIT, Settings},
    },
    leadership::{
        LeadershipView, Session, actor::LeadershipHandle, journal_feed::ReplicatedJournal, service::FeedSlot, shards,
    },
    membership::{
        actor::{Membership, MembershipMsg},
        groups::Groups,
    },
    metrics::{self as names, GroupLabels},
    model::OpenedModel,
    routing::{machine::Settings as Routing, router::Router},
    scheduler::{
        self,
        actor::{SchedulerConfig, SchedulerHandle},
        event::{Limits, Recovery},
        handle::{GroupEvent, Submit},
    },
    security::{self, Security, tls::ServingTls},
    shard_link,
};

/// Failed formations in a row, before anything was served, after which local shards are not tried again.
const GIVE_UP_AFTER: u32 = 3;
/// How long a group may be away before its requests go to another one: most groups are back before.
const LEAVE_AFTER: Duration = Duration::from_secs(1);
/// Longest wait for an answer of our own actors.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// Between looks at what is still running at the end.
const END_POLL: Duration = Duration::from_millis(20);
/// Longest wait for shards elsewhere to take their farewell.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// What the process has for its whole life.
pub struct Foundation {
    /// As resolved.
    pub config: Config,
    /// Where membership lives.
    pub store: Arc<dyn MembershipStore>,
    /// Opened on leaders and standbys alike, so that a takeover is quick.
    pub model: OpenedModel,
    /// How other coordinators are reached.
    pub dialer: Dialer,
    /// Of the process.
    pub metrics: PrometheusHandle,
    /// Says who leads.
    pub leadership: LeadershipHandle,
    /// Who may ask, and how much.
    pub security: Arc<Security>,
    /// What clients and the cluster are shown.
    pub tls: Arc<ServingTls>,
    /// What former leaders said of their requests.
    pub journal: Arc<ReplicatedJournal>,
    /// What this leader says of its own.
    pub feed: FeedSlot,
    /// How far this process is with starting.
    pub loading: Arc<Loading>,
}

impl Foundation {
    /// Who leads.
    pub fn view(&self) -> LeadershipView {
        self.leadership.view()
    }
}

/// The actors of one leadership.
pub struct Parts {
    /// In which leadership.
    pub session: Session,
    /// They own requests, each those of its group.
    pub schedulers: Vec<SchedulerHandle>,
    /// They end only if something is wrong.
    pub scheduler_tasks: Vec<JoinHandle<()>>,
    /// Owns shards.
    pub membership: ActorRef<MembershipMsg>,
    /// Ends only if something is wrong.
    pub membership_task: JoinHandle<()>,
    /// Where the groups are.
    pub groups: Groups,
    /// Behind all endpoints.
    pub state: FrontendState,
    /// Files and batches, if there are any.
    pub batches: Option<Batches>,
    /// What the groups say.
    pub notices: mpsc::UnboundedReceiver<Notice>,
}

impl Parts {
    /// Starts them.
    pub async fn start(base: &Foundation, session: Session) -> anyhow::Result<Self> {
        let (mut schedulers, mut scheduler_tasks) = (Vec::new(), Vec::new());
        for index in 0..base.config.replicas as usize {
            let (scheduler, task) = SchedulerHandle::spawn(scheduler_config(base, index), None)
                .await
                .context("the scheduler can't be started")?;
            schedulers.push(scheduler);
            scheduler_tasks.push(task);
        }
        let router = (schedulers.len() > 1).then(|| {
            let settings = Routing {
                groups: schedulers.len(),
                block_size: base.config.block_size as usize,
                prefix_caching: base.config.enable_prefix_caching,
                leave_after: LEAVE_AFTER,
            };
            Router::new(settings, schedulers.iter().map(|s| Arc::new(s.clone()) as Arc<dyn Submit>).collect())
        });
        let expected = (expected(&*base.store).await, std::time::Instant::now() + OWNERS_LIMIT);
        let (notice_sender, notices) = mpsc::unbounded_channel();
        let groups = schedulers.iter().enumerate().map(|(index, scheduler)| {
            let (router, scheduler) = (router.clone(), scheduler.clone());
            let tell = Box::new(move |event| {
                if let Some(router) = &router {
                    router.group_event(index, &event);
                }
                scheduler.group_event(event);
            });
            group_config(base, session, index, tell, notice_sender.clone(), expected.clone())
        });
        let (membership, membership_task) =
            Actor::spawn(None, Membership, groups.collect()).await.context("membership can't be started")?;
        let groups = match membership.call(MembershipMsg::Groups, Some(CALL_LIMIT)).await {
            Ok(CallResult::Success(groups)) => groups,
            _ => bail!("membership does not answer"),
        };
        let submit: Arc<dyn Submit> = match (router, schedulers.first()) {
            (Some(router), _) => Arc::new(router),
            (None, Some(scheduler)) => Arc::new(scheduler.clone()),
            (None, None) => bail!("there is no group"),
        };
        let (config, served) = (&base.config, base.model.served.clone());
        let state = FrontendState::new(submit, served, frontend::Limits::of(config), base.metrics.clone())
            .with_security(Arc::clone(&base.security))
            .with_grammars(Arc::clone(&base.model.grammars))
            .with_parsers(base.config.parsers.clone())
            .with_journal(Arc::clone(&base.journal))
            .with_loading(Arc::clone(&base.loading))
            .with_response_cache(config.response_cache.map(ResponseCache::new));
        base.feed.set(Some(state.streams()));
        let batches = config.files.clone().map(|files| {
            Batches::start(
                files,
                frontend::http_router(state.clone()),
                Arc::clone(&base.security),
                lines_at_once(config),
            )
        });
        let state = state.with_batches(batches.clone());
        Ok(Self { session, schedulers, scheduler_tasks, membership, membership_task, groups, state, batches, notices })
    }

    /// Ends the schedulers: what still runs fails as unavailable.
    pub fn stop_schedulers(&self) {
        self.schedulers.iter().for_each(SchedulerHandle::stop);
    }

    /// Ends them because somebody else leads. Shards stay as they are: their streams end with the leadership.
    pub async fn stop(self) {
        self.stop_batches().await;
        self.stop_schedulers();
        self.membership.stop(Some("another coordinator leads".to_owned()));
        for task in self.scheduler_tasks.into_iter().chain([self.membership_task]) {
            if timeout(CALL_LIMIT, task).await.is_err() {
                tracing::warn!("an actor of the leadership does not end");
            }
        }
    }

    /// Gives up the lines of batches that run: whoever leads next goes on with them.
    async fn stop_batches(&self) {
        if let Some(batches) = &self.batches {
            batches.stop().await;
        }
    }

    /// Waits until no request lives, or the time is over.
    pub async fn finish_requests(&self, limit: Duration) {
        self.stop_batches().await;
        let deadline = Instant::now() + limit;
        let mut is_told = false;
        loop {
            let states = self.schedulers.iter().map(|scheduler| scheduler.status(CALL_LIMIT));
            let states = futures::future::join_all(states).await;
            let n_requests: usize = states.into_iter().flatten().map(|s| s.n_requests).sum();
            if n_requests == 0 {
                return;
            }
            if !is_told {
                is_told = true;
                tracing::info!(n_requests, limit_s = limit.as_secs(), "waiting for running requests");
            }
            if Instant::now() >= deadline {
                tracing::warn!(n_requests, "the time is over: running requests are given up");
                return;
            }
            sleep(END_POLL).await;
        }
    }

    /// Tells all shards to end, and waits until they have heard it.
    pub async fn dismiss_shards(&self) {
        let message = |reply| MembershipMsg::Shutdown { reason: "the coordinator ends".to_owned(), reply };
        if !matches!(self.membership.call(message, Some(CALL_LIMIT)).await, Ok(CallResult::Success(()))) {
            return;
        }
        let deadline = Instant::now() + FAREWELL_LIMIT;
        while Instant::now() < deadline {
            let mut is_empty = true;
            for group in self.groups.all() {
                let status = group.get().call(GroupMsg::Status, Some(CALL_LIMIT)).await;
                is_empty &= !matches!(status, Ok(CallResult::Success(status)) if !status.members.is_empty());
            }
            if is_empty {
                return;
            }
            sleep(END_POLL).await;
        }
    }
}

/// Shards that were attached to the last leader, and where each was seen. They are not members before they attach here.
async fn expected(store: &dyn MembershipStore) -> BTreeMap<ShardId, String> {
    let records = match timeout(CALL_LIMIT, shards::recorded(store)).await {
        Ok(Ok(records)) => records,
        Ok(Err(error)) => {
            tracing::warn!(%error, "the store does not say which shards to expect: waiting for none in particular");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!("the store does not say in time which shards to expect: waiting for none in particular");
            Vec::new()
        }
    };
    for record in &records {
        let (shard, host, pid) = (&record.shard_id, &record.host, record.pid);
        tracing::info!(shard, host, pid, coordinator = record.coordinator_id, term = record.term, "seen before");
    }
    records.into_iter().map(|record| (ShardId(record.shard_id), record.host)).collect()
}

/// Lines of batches that are asked for at once: a quarter of the seats stays free, so that clients who wait need not wait for one.
fn lines_at_once(config: &Config) -> usize {
    let n_seats = (config.max_num_seqs as usize).saturating_mul(config.replicas as usize);
    n_seats - n_seats / 4
}

/// Labels of what is measured of a group.
fn labels(base: &Foundation, index: usize) -> GroupLabels {
    GroupLabels::new(&base.model.served.name(), index, base.config.replicas as usize)
}

/// Begins to count: every metric of leaders is there from now on, also on a coordinator that never leads.
pub fn begin_to_count(base: &Foundation) {
    for index in 0..base.config.replicas as usize {
        let labels = labels(base, index);
        drop(scheduler::meters::Meters::new(&labels, &limits(base)));
        drop(group::meters::Meters::new(&labels, base.config.tensor_parallel_size as usize));
    }
    frontend::observe::begin_to_count();
    security::begin_to_count();
    batches::begin_to_count();
    response_cache::begin_to_count();
    drop(metrics::counter!(names::MOVED));
    for outcome in ["exported", "dropped", "failed"] {
        drop(metrics::counter!(names::TRACE_SPANS, "outcome" => outcome));
    }
}

fn limits(base: &Foundation) -> Limits {
    let (config, served) = (&base.config, &base.model.served);
    Limits {
        block_size: config.block_size as usize,
        max_step_rows: config.max_num_batched_tokens as usize,
        max_running: config.max_num_seqs as usize,
        max_model_len: served.max_model_len,
        vocab: served.vocab,
        prefix_caching: config.enable_prefix_caching,
    }
}

fn scheduler_config(base: &Foundation, index: usize) -> SchedulerConfig {
    let (config, served) = (&base.config, &base.model.served);
    SchedulerConfig {
        limits: limits(base),
        recovery: Recovery { max_replays: config.max_replays, no_group_timeout: config.no_group_timeout },
        eos: served.eos.clone(),
        detokenizers: Box::new(served.tokenizer.as_ref().clone()),
        max_queued_requests: config.max_num_queued_reqs as usize,
        max_queued_tokens: config.max_num_queued_tokens as usize,
        labels: labels(base, index),
    }
}

fn group_config(
    base: &Foundation,
    session: Session,
    index: usize,
    scheduler: Box<dyn Fn(GroupEvent) + Send + Sync>,
    notices: mpsc::UnboundedSender<Notice>,
    expected: (BTreeMap<ShardId, String>, std::time::Instant),
) -> GroupConfig {
    let (config, model) = (&base.config, &base.model);
    let served = &model.served;
    // Shards that join from elsewhere may be mended while we wait.
    let gives_up = config.local_shards > 0;
    let view = base.view();
    GroupConfig {
        index,
        labels: labels(base, index),
        settings: Settings {
            world_size: config.tensor_parallel_size as usize,
            give_up_after: gives_up.then_some(GIVE_UP_AFTER),
            regroup_after: config.regroup_after,
            mirror_to: match config.kv_mirror {
                KvMirror::Spare => MirrorTo::Spare,
                KvMirror::Buddy => MirrorTo::Buddy,
                KvMirror::Off => MirrorTo::Nowhere,
            },
            silent_after: shard_link::silent_after(config.heartbeat_timeout),
        },
        name: served.names.first().cloned().unwrap_or_default(),
        form: Form {
            model: model.location.clone(),
            model_hash: model.identity.clone(),
            dtype: config.dtype.as_str().to_owned(),
            block_size: config.block_size,
            kv_cache_bytes: config.kv_cache_memory.unwrap_or(0),
            max_step_rows: config.max_num_batched_tokens,
            max_sequences: config.max_num_seqs,
            max_model_len: u32::try_from(served.max_model_len).unwrap_or(u32::MAX),
            term: session.term,
            ..Form::default()
        },
        expected,
        leads: Box::new(move || view.session().is_some_and(|s| s.number == session.number)),
        store: Arc::clone(&base.store),
        scheduler,
        notices,
        loading: Arc::clone(&base.loading),
        serving: Mutex::new(None),
    }
}
