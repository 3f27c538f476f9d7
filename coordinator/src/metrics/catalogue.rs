//! Every metric, one entry each. `docs/metrics.md` is this table; a test compares them.

use metrics::Unit;

use super::{
    Kind::{Counter, Gauge, Histogram},
    Metric, buckets,
};

macro_rules! catalogue {
    ($($name:ident = $text:literal, $kind:expr, $unit:ident, [$($label:literal),*], $help:literal;)*) => {
        $(#[doc = $help] pub const $name: &str = $text;)*

        /// All of them, in the order of the documentation.
        pub static CATALOGUE: &[Metric] = &[$(Metric {
            name: $text,
            kind: $kind,
            unit: Unit::$unit,
            labels: &[$($label),*],
            help: $help,
        }),*];
    };
}

catalogue! {
    // Requests, tokens, devices.
    REQUESTS = "inference_requests_total", Counter, Count, ["endpoint", "status"],
        "Requests that ended, by endpoint and status (of HTTP; of gRPC the code in lower case; 499 and cancelled: the client left)";
    LATENCY = "inference_latency_seconds", Histogram(buckets::REQUEST), Seconds, ["endpoint"],
        "Wall time of requests, to the last byte of their answers";
    TOKENS = "tokens_generated_total", Counter, Count, [], "Tokens generated";
    PROMPT_TOKENS = "prompt_tokens_total", Counter, Count, [], "Prompt tokens received";
    BATCH_SIZE = "batch_size", Histogram(buckets::ROWS), Count, [], "Sequences in a step";
    QUEUE_LENGTH = "queue_length", Gauge, Count, ["group?"], "Sequences that wait for a seat or for blocks";
    RUNNING = "sequences_running", Gauge, Count, ["group?"], "Sequences that run";
    MEMORY_USED = "gpu_memory_used", Gauge, Bytes, ["group?", "rank"],
        "Bytes that the shard with this rank uses: of its device's memory weights and KV pages; on a CPU its resident memory";
    MEMORY_TOTAL = "gpu_memory_total", Gauge, Bytes, ["group?", "rank"],
        "Bytes that its device had for weights and KV pages when that shard started; on a CPU the shard's share of them, equal for all shards of its host";
    UTILIZATION = "gpu_utilization", Gauge, Count, ["group?", "rank"],
        "Share of the last second, 0 to 1, in which that shard's device computed steps; waiting for other ranks does not count";
    TTFT = "time_to_first_token_seconds", Histogram(buckets::FIRST_TOKEN), Seconds, [],
        "From a request's arrival to its first token";
    ITL = "inter_token_latency_seconds", Histogram(buckets::STEP), Seconds, [], "Between tokens of a sequence";
    KV_USED = "kv_blocks_used", Gauge, Count, ["group?"], "KV blocks that live sequences hold";
    KV_BLOCKS = "kv_blocks", Gauge, Count, ["group?"], "KV blocks there are";
    PREFIX_HITS = "prefix_cache_hit_tokens_total", Counter, Count, [], "Prompt tokens found in the prefix cache";
    PREFIX_QUERIES = "prefix_cache_query_tokens_total", Counter, Count, [], "Prompt tokens looked up in the prefix cache";
    PREEMPTIONS = "preemptions_total", Counter, Count, [],
        "Sequences put back to waiting because KV blocks ran out";
    STEP_SECONDS = "step_seconds", Histogram(buckets::STEP), Seconds, [], "Wall time of a step, measured by rank 0";
    SHARD_MEMORY = "shard_memory_bytes", Gauge, Bytes, ["group?", "kind", "rank", "shard"],
        "Memory of a shard with a rank, by kind: weights, kv, resident (the whole process)";

    // The cluster.
    IS_LEADER = "phalanx_is_leader", Gauge, Count, [], "1 if this coordinator leads, 0 if it stands by";
    TERM = "phalanx_term", Gauge, Count, [], "Term of this coordinator's leadership; 0 while it stands by";
    EPOCH = "phalanx_epoch", Gauge, Count, ["group?"], "Epoch of the group; 0 on a coordinator that does not lead";
    GROUP_SERVING = "phalanx_group_serving", Gauge, Count, ["group?"], "1 if the group serves, else 0";
    RANKS = "phalanx_ranks", Gauge, Count, ["group?"], "Ranks of the group's present formation";
    RANKS_WANTED = "phalanx_ranks_wanted", Gauge, Count, ["group?"], "Ranks that the group was asked to have";
    SHARDS = "phalanx_shards", Gauge, Count, ["group?", "role"],
        "Shards that are attached to the group, by role: rank, spare, joining, draining, drained";
    FAILOVERS = "phalanx_failovers_total", Counter, Count, ["cause", "group?"],
        "Formations of the group that ended, by cause: losses (lost, failed, silent, deadline, slow) and changes on purpose (drain, rollout, regroup, mirror)";
    REPLAYED = "phalanx_replayed_tokens_total", Counter, Count, [], "Tokens computed again after a loss";
    MOVED = "phalanx_moved_requests_total", Counter, Count, [],
        "Requests that went on at another group because their own was away";
    STALL = "phalanx_stall_seconds", Histogram(buckets::STALL), Seconds, [],
        "Running sequences: from the last token before a loss to the first after it";
    MIRROR_LAG = "phalanx_mirror_lag_steps", Gauge, Count, ["group?"],
        "Steps whose KV rows the mirrors lack; NaN while nobody has a whole copy";
    FENCED = "phalanx_fenced_messages_total", Counter, Count, [], "Messages of an old epoch that were dropped";
    STEP_PHASE = "phalanx_step_phase_seconds", Histogram(buckets::PART_OF_STEP), Seconds, ["group?", "phase", "rank"],
        "Parts of a step on each rank, by phase: compute (the rank's own work), collective (sums across ranks, waiting for others included)";
    SCHEDULE = "phalanx_schedule_seconds", Histogram(buckets::PART_OF_STEP), Seconds, ["group?"],
        "Time in which the scheduler takes in a step's result and plans the next step";
    TRACE_SPANS = "phalanx_trace_spans_total", Counter, Count, ["outcome"],
        "Spans of traces, by outcome: exported, dropped (no room, because the collector is slow or away), failed (the collector refused them or did not answer)";

    // Doors.
    DENIED = "phalanx_denied_requests_total", Counter, Count, ["reason"],
        "Requests without a key that is in force, by reason: missing, unknown, expired, early, for_others, unknown_signer";
    RATE_LIMITED = "phalanx_rate_limited_requests_total", Counter, Count, ["limit"],
        "Requests refused by a key's limit, by limit: requests, tokens, concurrency";
    RELOADS = "phalanx_reloads_total", Counter, Count, ["of"],
        "Files read again because they changed, by what they are: API keys, TLS certificate, token keys, deny-lists";
    RELOAD_FAILURES = "phalanx_reload_failures_total", Counter, Count, ["of"],
        "Changed files that can't be used, and what was before stays in force";
    AUDIT_FAILING = "phalanx_audit_failing", Gauge, Count, [], "1 while the audit log can't be written";
    AUDIT_LOST = "phalanx_audit_lost_lines_total", Counter, Count, [], "Requests that have no line in the audit log";
    GUARD_MATCHES = "phalanx_guard_matches_total", Counter, Count, ["direction", "kind"],
        "What the guard found in prompts (input) and answers (output), by kind: mail, phone, card, iban, ip, key, denylist";
    GUARD_BLOCKED = "phalanx_guard_blocked_total", Counter, Count, ["by", "direction"],
        "Requests refused (input) and answers ended (output), by what had them: a kind of match, or moderation";
    MODERATIONS = "phalanx_moderations_total", Counter, Count, ["direction", "verdict"],
        "Texts about which the moderation webhook was asked, by verdict: allowed, refused, failed (no answer in time, or a wrong one)";
    MODERATION_SECONDS = "phalanx_moderation_seconds", Histogram(buckets::REQUEST), Seconds, ["direction"],
        "From a question to the moderation webhook's answer, waiting for a place included";

    // Files and batches, on the leader.
    FILES = "phalanx_files", Gauge, Count, [], "Files that are kept";
    FILES_BYTES = "phalanx_files_bytes", Gauge, Bytes, [], "Bytes of the files that are kept";
    RESPONSE_CACHE_HITS = "phalanx_response_cache_hits_total", Counter, Count, [],
        "Requests that were answered with what an earlier run of the same request had (--response-cache)";
    RESPONSE_CACHE_MISSES = "phalanx_response_cache_misses_total", Counter, Count, [],
        "Requests that could have been, had there been an earlier run";
    RESPONSE_CACHE_BYTES = "phalanx_response_cache_bytes", Gauge, Bytes, [], "Memory of the answers that are kept for that";
    BATCHES_UNFINISHED = "phalanx_batches_unfinished", Gauge, Count, [], "Batches that are not over";
    BATCHES = "phalanx_batches_total", Counter, Count, ["status"],
        "Batches that are over, by status: completed, failed, expired, cancelled";
    BATCH_LINES = "phalanx_batch_lines_total", Counter, Count, ["outcome"],
        "Lines of batches that were answered, by outcome: completed, failed";

    // For dashboards that were made for vLLM. The engine is the group.
    VLLM_RUNNING = "vllm:num_requests_running", Gauge, Count, ["model_name", "engine"], "Sequences that run";
    VLLM_WAITING = "vllm:num_requests_waiting", Gauge, Count, ["model_name", "engine"], "Sequences that wait";
    VLLM_WAITING_BY_REASON = "vllm:num_requests_waiting_by_reason", Gauge, Count, ["model_name", "engine", "reason"],
        "Sequences that wait, by reason: capacity (a seat or blocks), deferred (choices that wait for the prompt of the first)";
    VLLM_KV_USAGE = "vllm:kv_cache_usage_perc", Gauge, Count, ["model_name", "engine"],
        "Share of the KV blocks that live sequences hold, 0 to 1";
    VLLM_GPU_CACHE_USAGE = "vllm:gpu_cache_usage_perc", Gauge, Count, ["model_name", "engine"],
        "The same under the name of older dashboards";
    VLLM_CACHE_CONFIG = "vllm:cache_config_info", Gauge, Count, ["model_name", "engine", "block_size", "enable_prefix_caching", "num_gpu_blocks"],
        "1 for the KV cache as it is: positions of a block, blocks of each rank, sharing of equal beginnings";
    VLLM_PREEMPTIONS = "vllm:num_preemptions_total", Counter, Count, ["model_name", "engine"],
        "Sequences put back to waiting because KV blocks ran out";
    VLLM_PROMPT_TOKENS = "vllm:prompt_tokens_total", Counter, Count, ["model_name", "engine"],
        "Prompt tokens of requests that began to run";
    VLLM_PROMPT_TOKENS_CACHED = "vllm:prompt_tokens_cached_total", Counter, Count, ["model_name", "engine"],
        "Those of them that the prefix cache had";
    VLLM_PROMPT_TOKENS_BY_SOURCE = "vllm:prompt_tokens_by_source_total", Counter, Count, ["model_name", "engine", "source"],
        "Prompt tokens by where their KV rows came from: local_compute, local_cache_hit";
    VLLM_GENERATION_TOKENS = "vllm:generation_tokens_total", Counter, Count, ["model_name", "engine"], "Tokens generated";
    VLLM_REQUEST_SUCCESS = "vllm:request_success_total", Counter, Count, ["model_name", "engine", "finished_reason"],
        "Choices that ended, by reason: stop, length, abort (the client left or its deadline passed), error";
    VLLM_PREFIX_QUERIES = "vllm:prefix_cache_queries_total", Counter, Count, ["model_name", "engine"],
        "Prompt tokens looked up in the prefix cache";
    VLLM_PREFIX_HITS = "vllm:prefix_cache_hits_total", Counter, Count, ["model_name", "engine"],
        "Prompt tokens found in the prefix cache";
    VLLM_TTFT = "vllm:time_to_first_token_seconds", Histogram(buckets::FIRST_TOKEN), Seconds, ["model_name", "engine"],
        "From a request's arrival to its first token";
    VLLM_ITL = "vllm:inter_token_latency_seconds", Histogram(buckets::STEP), Seconds, ["model_name", "engine"],
        "Between tokens of a sequence";
    VLLM_TPOT = "vllm:time_per_output_token_seconds", Histogram(buckets::STEP), Seconds, ["model_name", "engine"],
        "The same under the name of older dashboards";
    VLLM_REQUEST_TPOT = "vllm:request_time_per_output_token_seconds", Histogram(buckets::STEP), Seconds, ["model_name", "engine"],
        "Mean time between tokens, of each finished request's longest choice";
    VLLM_E2E = "vllm:e2e_request_latency_seconds", Histogram(buckets::REQUEST), Seconds, ["model_name", "engine"],
        "From arrival at the scheduler to the last token, of finished requests";
    VLLM_QUEUE_TIME = "vllm:request_queue_time_seconds", Histogram(buckets::REQUEST), Seconds, ["model_name", "engine"],
        "From arrival to the first step, of finished requests";
    VLLM_INFERENCE_TIME = "vllm:request_inference_time_seconds", Histogram(buckets::REQUEST), Seconds, ["model_name", "engine"],
        "From the first step to the last token, of finished requests";
    VLLM_PREFILL_TIME = "vllm:request_prefill_time_seconds", Histogram(buckets::REQUEST), Seconds, ["model_name", "engine"],
        "From the first step to the first token, of finished requests";
    VLLM_DECODE_TIME = "vllm:request_decode_time_seconds", Histogram(buckets::REQUEST), Seconds, ["model_name", "engine"],
        "From the first token to the last, of finished requests";
    VLLM_REQUEST_PROMPT = "vllm:request_prompt_tokens", Histogram(buckets::TOKENS), Count, ["model_name", "engine"],
        "Prompt tokens of finished requests";
    VLLM_REQUEST_GENERATION = "vllm:request_generation_tokens", Histogram(buckets::TOKENS), Count, ["model_name", "engine"],
        "Tokens that finished requests were given, all choices together";
    VLLM_REQUEST_MAX_GENERATION = "vllm:request_max_num_generation_tokens", Histogram(buckets::TOKENS), Count, ["model_name", "engine"],
        "Tokens of the longest choice of finished requests";
    VLLM_REQUEST_N = "vllm:request_params_n", Histogram(buckets::FEW), Count, ["model_name", "engine"],
        "Choices that finished requests asked for";
    VLLM_REQUEST_MAX_TOKENS = "vllm:request_params_max_tokens", Histogram(buckets::TOKENS), Count, ["model_name", "engine"],
        "Most tokens per choice that finished requests asked for";
    VLLM_REQUEST_KV_COMPUTED = "vllm:request_prefill_kv_computed_tokens", Histogram(buckets::TOKENS), Count, ["model_name", "engine"],
        "Prompt tokens of finished requests that the prefix cache did not have";
    VLLM_REQUEST_PREEMPTIONS = "vllm:request_num_preemptions", Histogram(buckets::FEW), Count, ["model_name", "engine"],
        "How often sequences of a finished request were put back to waiting";
    VLLM_ITERATION_TOKENS = "vllm:iteration_tokens_total", Histogram(buckets::ROWS), Count, ["model_name", "engine"],
        "Rows of a step: prompt tokens and generated ones";
    HTTP_REQUESTS = "http_requests_total", Counter, Count, ["handler", "method", "status"],
        "HTTP requests that were answered, by path, method and class of status (2xx); answers of other coordinators that pass through here are not among them";
}
