//! A scheduler's metrics. What is counted is the same series for all groups, but for the `vllm:*` names, which have the
//! group as their engine; gauges are each group's.

use std::time::Duration;

use metrics::{Counter, Histogram};

use super::{
    ending::{Ended, Ending, Times},
    event::{Limits, Measure, Status},
};
use crate::metrics::{self as names, GroupLabels, Present};

/// Handles of all of them.
pub struct Meters {
    gauges: Gauges,
    tokens: Counter,
    prompt_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
    replayed: Counter,
    fenced: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    stall: Histogram,
    step: Histogram,
    batch_size: Histogram,
    schedule: Histogram,
    engine: Engine,
}

/// Numbers of the present.
struct Gauges {
    waiting: Present,
    running: Present,
    blocks_used: Present,
    blocks: Present,
    engine_running: Present,
    engine_waiting: Present,
    engine_short: Present,
    engine_deferred: Present,
    engine_usage: [Present; 2],
    /// The KV cache as it was told, with its blocks.
    cache: Option<(usize, Present)>,
}

/// What is counted under the `vllm:*` names.
struct Engine {
    labels: GroupLabels,
    block_size: usize,
    prefix_caching: bool,
    preemptions: Counter,
    prompt_tokens: Counter,
    cached: Counter,
    computed: Counter,
    from_cache: Counter,
    tokens: Counter,
    ended: [Counter; 4],
    prefix_queries: Counter,
    prefix_hits: Counter,
    first_token: Histogram,
    inter_token: [Histogram; 2],
    rows: Histogram,
    requests: Requests,
}

/// Of finished requests.
struct Requests {
    whole: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    per_token: Histogram,
    prompt: Histogram,
    generated: Histogram,
    longest: Histogram,
    n: Histogram,
    max_tokens: Histogram,
    computed: Histogram,
    preemptions: Histogram,
}

fn counter(name: &'static str) -> Counter {
    metrics::counter!(name)
}

fn histogram(name: &'static str) -> Histogram {
    metrics::histogram!(name)
}

impl Meters {
    /// Makes them: all are there from now on, with nothing counted.
    pub fn new(labels: &GroupLabels, limits: &Limits) -> Self {
        Self {
            gauges: Gauges::new(labels),
            tokens: counter(names::TOKENS),
            prompt_tokens: counter(names::PROMPT_TOKENS),
            prefix_queries: counter(names::PREFIX_QUERIES),
            prefix_hits: counter(names::PREFIX_HITS),
            preemptions: counter(names::PREEMPTIONS),
            replayed: counter(names::REPLAYED),
            fenced: counter(names::FENCED),
            first_token: histogram(names::TTFT),
            inter_token: histogram(names::ITL),
            stall: histogram(names::STALL),
            step: histogram(names::STEP_SECONDS),
            batch_size: histogram(names::BATCH_SIZE),
            schedule: metrics::histogram!(names::SCHEDULE, labels.own.clone()),
            engine: Engine::new(labels, limits),
        }
    }

    /// Shows the present state.
    pub fn show(&mut self, status: &Status) {
        self.gauges.show(status, &self.engine);
    }

    /// Records what the scheduler itself took for a step's result and the plans that followed.
    pub fn scheduled(&self, took: Duration) {
        self.schedule.record(took);
    }

    /// Records a measurement.
    pub fn record(&self, measure: &Measure) {
        match measure {
            Measure::PromptTokens(n) => self.prompt_tokens.increment(*n as u64),
            Measure::PrefixLookup { n_queried, n_hit } => {
                for queries in [&self.prefix_queries, &self.engine.prefix_queries] {
                    queries.increment(*n_queried as u64);
                }
                for hits in [&self.prefix_hits, &self.engine.prefix_hits] {
                    hits.increment(*n_hit as u64);
                }
            }
            Measure::Prefilling { n_prompt, n_cached } => self.engine.prefilling(*n_prompt as u64, *n_cached as u64),
            Measure::Preempted => {
                self.preemptions.increment(1);
                self.engine.preemptions.increment(1);
            }
            Measure::FirstToken(after) => {
                self.first_token.record(*after);
                self.engine.first_token.record(*after);
            }
            Measure::InterToken(after) => {
                self.inter_token.record(*after);
                self.engine.inter_token.iter().for_each(|gap| gap.record(*after));
            }
            Measure::Token => {
                self.tokens.increment(1);
                self.engine.tokens.increment(1);
            }
            Measure::Replayed(n) => self.replayed.increment(*n as u64),
            Measure::Stalled(by) => self.stall.record(*by),
            Measure::Step { n_sequences, n_rows, took } => {
                self.batch_size.record(*n_sequences as f64);
                self.step.record(*took);
                self.engine.rows.record(*n_rows as f64);
            }
            Measure::Fenced => self.fenced.increment(1),
            Measure::Completed(ending) => self.engine.ended(*ending).increment(1),
            Measure::Ended(ended) => self.engine.request(ended),
        }
    }
}

impl Gauges {
    fn new(labels: &GroupLabels) -> Self {
        let own = |name| Present::new(name, labels.own.clone());
        let engine = |name| Present::new(name, labels.engine.clone());
        let waiting = |reason: &str| {
            Present::new(names::VLLM_WAITING_BY_REASON, labels.engine_with([("reason", reason.to_owned())]))
        };
        Self {
            waiting: own(names::QUEUE_LENGTH),
            running: own(names::RUNNING),
            blocks_used: own(names::KV_USED),
            blocks: own(names::KV_BLOCKS),
            engine_running: engine(names::VLLM_RUNNING),
            engine_waiting: engine(names::VLLM_WAITING),
            engine_short: waiting("capacity"),
            engine_deferred: waiting("deferred"),
            engine_usage: [names::VLLM_KV_USAGE, names::VLLM_GPU_CACHE_USAGE].map(engine),
            cache: None,
        }
    }

    fn show(&mut self, status: &Status, engine: &Engine) {
        self.waiting.set(status.n_waiting as f64);
        self.running.set(status.n_running as f64);
        self.blocks_used.set(status.n_blocks_used as f64);
        self.blocks.set(status.n_blocks as f64);
        self.engine_running.set(status.n_running as f64);
        self.engine_waiting.set(status.n_waiting as f64);
        self.engine_short.set(status.n_waiting.saturating_sub(status.n_held) as f64);
        self.engine_deferred.set(status.n_held as f64);
        let usage = status.n_blocks_used as f64 / status.n_blocks.max(1) as f64;
        self.engine_usage.iter().for_each(|gauge| gauge.set(usage));
        let told = self.cache.as_ref().map_or(0, |(n_blocks, _)| *n_blocks);
        // Between two formations the last one's stands.
        if status.n_blocks > 0 && status.n_blocks != told {
            self.cache = None;
            let shown = engine.cache_of(status.n_blocks);
            shown.set(1.0);
            self.cache = Some((status.n_blocks, shown));
        }
    }
}

impl Engine {
    fn new(labels: &GroupLabels, limits: &Limits) -> Self {
        let counter = |name: &'static str| metrics::counter!(name, labels.engine.clone());
        let histogram = |name: &'static str| metrics::histogram!(name, labels.engine.clone());
        let labelled = |name: &'static str, label: &'static str, value: &str| {
            metrics::counter!(name, labels.engine_with([(label, value.to_owned())]))
        };
        let source = |source: &str| labelled(names::VLLM_PROMPT_TOKENS_BY_SOURCE, "source", source);
        let ended = |how: Ending| labelled(names::VLLM_REQUEST_SUCCESS, "finished_reason", how.name());
        Self {
            labels: labels.clone(),
            block_size: limits.block_size,
            prefix_caching: limits.prefix_caching,
            preemptions: counter(names::VLLM_PREEMPTIONS),
            prompt_tokens: counter(names::VLLM_PROMPT_TOKENS),
            cached: counter(names::VLLM_PROMPT_TOKENS_CACHED),
            computed: source("local_compute"),
            from_cache: source("local_cache_hit"),
            tokens: counter(names::VLLM_GENERATION_TOKENS),
            ended: Ending::ALL.map(ended),
            prefix_queries: counter(names::VLLM_PREFIX_QUERIES),
            prefix_hits: counter(names::VLLM_PREFIX_HITS),
            first_token: histogram(names::VLLM_TTFT),
            inter_token: [names::VLLM_ITL, names::VLLM_TPOT].map(histogram),
            rows: histogram(names::VLLM_ITERATION_TOKENS),
            requests: Requests {
                whole: histogram(names::VLLM_E2E),
                queue: histogram(names::VLLM_QUEUE_TIME),
                inference: histogram(names::VLLM_INFERENCE_TIME),
                prefill: histogram(names::VLLM_PREFILL_TIME),
                decode: histogram(names::VLLM_DECODE_TIME),
                per_token: histogram(names::VLLM_REQUEST_TPOT),
                prompt: histogram(names::VLLM_REQUEST_PROMPT),
                generated: histogram(names::VLLM_REQUEST_GENERATION),
                longest: histogram(names::VLLM_REQUEST_MAX_GENERATION),
                n: histogram(names::VLLM_REQUEST_N),
                max_tokens: histogram(names::VLLM_REQUEST_MAX_TOKENS),
                computed: histogram(names::VLLM_REQUEST_KV_COMPUTED),
                preemptions: histogram(names::VLLM_REQUEST_PREEMPTIONS),
            },
        }
    }

    fn cache_of(&self, n_blocks: usize) -> Present {
        let config = [
            ("block_size", self.block_size.to_string()),
            ("enable_prefix_caching", if self.prefix_caching { "True" } else { "False" }.to_owned()),
            ("num_gpu_blocks", n_blocks.to_string()),
        ];
        Present::new(names::VLLM_CACHE_CONFIG, self.labels.engine_with(config))
    }

    fn prefilling(&self, n_prompt: u64, n_cached: u64) {
        self.prompt_tokens.increment(n_prompt);
        self.cached.increment(n_cached);
        self.from_cache.increment(n_cached);
        self.computed.increment(n_prompt.saturating_sub(n_cached));
    }

    fn ended(&self, ending: Ending) -> &Counter {
        &self.ended[ending as usize]
    }

    fn request(&self, ended: &Ended) {
        if matches!(ended.ending, Ending::Abort | Ending::Error) {
            self.ended(ended.ending).increment(ended.n_open as u64);
            return;
        }
        let (to, usage) = (&self.requests, ended.usage);
        let Times { arrived, admitted, first_token, last_token } = ended.times;
        let last = last_token.unwrap_or(ended.at);
        to.whole.record(last.saturating_duration_since(arrived));
        if let Some(admitted) = admitted {
            to.queue.record(admitted.saturating_duration_since(arrived));
            to.inference.record(last.saturating_duration_since(admitted));
            to.prefill.record(first_token.unwrap_or(last).saturating_duration_since(admitted));
        }
        if let Some(first) = first_token {
            let decode = last.saturating_duration_since(first);
            to.decode.record(decode);
            if ended.longest > 1 {
                to.per_token.record(decode.as_secs_f64() / (ended.longest - 1) as f64);
            }
        }
        to.prompt.record(f64::from(usage.prompt_tokens));
        to.generated.record(f64::from(usage.completion_tokens));
        to.longest.record(ended.longest as f64);
        to.n.record(f64::from(ended.n));
        to.max_tokens.record(f64::from(ended.max_tokens));
        to.computed.record(f64::from(usage.prompt_tokens.saturating_sub(usage.cached_tokens)));
        to.preemptions.record(f64::from(ended.n_preempted));
    }
}
