//! Every metric name with its help text. Code records through the `metrics` macros with these constants.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Requests, by `endpoint` and `status` (HTTP status, or gRPC code in lower case).
pub const REQUESTS: &str = "inference_requests_total";
/// Wall time of requests.
pub const LATENCY: &str = "inference_latency_seconds";
/// Tokens generated.
pub const TOKENS: &str = "tokens_generated_total";
/// Prompt tokens received.
pub const PROMPT_TOKENS: &str = "prompt_tokens_total";
/// Sequences in the last step.
pub const BATCH_SIZE: &str = "batch_size";
/// Requests that wait for admission.
pub const QUEUE_LENGTH: &str = "queue_length";
/// Sequences that run.
pub const RUNNING: &str = "sequences_running";
/// From arrival to the first token.
pub const TTFT: &str = "time_to_first_token_seconds";
/// Between tokens of a sequence.
pub const ITL: &str = "inter_token_latency_seconds";
/// KV blocks in use (referenced by live sequences).
pub const KV_USED: &str = "kv_blocks_used";
/// KV blocks there are.
pub const KV_TOTAL: &str = "kv_blocks_total";
/// Prompt tokens found in the prefix cache.
pub const PREFIX_HITS: &str = "prefix_cache_hit_tokens_total";
/// Prompt tokens looked up in the prefix cache.
pub const PREFIX_QUERIES: &str = "prefix_cache_query_tokens_total";
/// Sequences put back to waiting because blocks ran out.
pub const PREEMPTIONS: &str = "preemptions_total";
/// Wall time of a step as rank 0 measures it.
pub const STEP_SECONDS: &str = "step_seconds";
/// Memory per shard, by `shard`, `rank` and `kind` (weights, kv, resident).
pub const SHARD_MEMORY: &str = "shard_memory_bytes";
/// Whether this coordinator leads.
pub const IS_LEADER: &str = "phalanx_is_leader";
/// Epoch of the group; by `group` if there are several, as are the gauges of schedulers.
pub const EPOCH: &str = "phalanx_epoch";
/// Groups formed again after a loss, by `cause`.
pub const FAILOVERS: &str = "phalanx_failovers_total";
/// Tokens whose keys and values were computed again after a loss.
pub const REPLAYED: &str = "phalanx_replayed_tokens_total";
/// Requests that went on at another group because their own was away.
pub const MOVED: &str = "phalanx_moved_requests_total";
/// From the last token before a loss to the first after it, of each running sequence.
pub const STALL: &str = "phalanx_stall_seconds";
/// Steps whose KV rows the mirrors lack; NaN while nobody has a whole copy.
pub const MIRROR_LAG: &str = "phalanx_mirror_lag_steps";
/// Messages of an old epoch that were dropped.
pub const FENCED: &str = "phalanx_fenced_messages_total";
/// Requests without a key that is in force, by `reason`.
pub const DENIED: &str = "phalanx_denied_requests_total";
/// Requests refused by a key's limit, by `limit`.
pub const RATE_LIMITED: &str = "phalanx_rate_limited_requests_total";
/// Files (keys, certificates) that were read again because they changed, by what they are (`of`).
pub const RELOADS: &str = "phalanx_reloads_total";
/// Such files that could not be used: what was before stays in force.
pub const RELOAD_FAILURES: &str = "phalanx_reload_failures_total";
/// Whether the audit log can't be written.
pub const AUDIT_FAILING: &str = "phalanx_audit_failing";
/// Requests that have no line in it.
pub const AUDIT_LOST: &str = "phalanx_audit_lost_lines_total";

/// Tells the recorder all names, units and help texts.
pub fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "Requests, by endpoint and status");
    describe_histogram!(LATENCY, Unit::Seconds, "Wall time of requests, by endpoint");
    describe_counter!(TOKENS, Unit::Count, "Tokens generated");
    describe_counter!(PROMPT_TOKENS, Unit::Count, "Prompt tokens received");
    describe_gauge!(BATCH_SIZE, Unit::Count, "Sequences in the last step");
    describe_gauge!(QUEUE_LENGTH, Unit::Count, "Requests that wait for admission");
    describe_gauge!(RUNNING, Unit::Count, "Sequences that run");
    describe_histogram!(TTFT, Unit::Seconds, "From a request's arrival to its first token");
    describe_histogram!(ITL, Unit::Seconds, "Between tokens of a sequence");
    describe_gauge!(KV_USED, Unit::Count, "KV blocks that live sequences hold");
    describe_gauge!(KV_TOTAL, Unit::Count, "KV blocks there are");
    describe_counter!(PREFIX_HITS, Unit::Count, "Prompt tokens found in the prefix cache");
    describe_counter!(PREFIX_QUERIES, Unit::Count, "Prompt tokens looked up in the prefix cache");
    describe_counter!(PREEMPTIONS, Unit::Count, "Sequences put back to waiting because KV blocks ran out");
    describe_histogram!(STEP_SECONDS, Unit::Seconds, "Wall time of a step, measured by rank 0");
    describe_gauge!(SHARD_MEMORY, Unit::Bytes, "Memory of a shard, by shard, rank and kind (weights, kv, resident)");
    describe_gauge!(IS_LEADER, Unit::Count, "1 if this coordinator leads, 0 if it stands by");
    describe_gauge!(EPOCH, Unit::Count, "Epoch of the group");
    describe_counter!(FAILOVERS, Unit::Count, "Groups formed again after a loss, by cause");
    describe_counter!(REPLAYED, Unit::Count, "Tokens computed again after a loss");
    describe_counter!(MOVED, Unit::Count, "Requests that went on at another group because their own was away");
    describe_histogram!(
        STALL,
        Unit::Seconds,
        "Running sequences: from the last token before a loss to the first after it"
    );
    describe_gauge!(MIRROR_LAG, Unit::Count, "Steps whose KV rows the mirrors lack; NaN while nobody has a whole copy");
    describe_counter!(FENCED, Unit::Count, "Messages of an old epoch that were dropped");
    describe_counter!(DENIED, Unit::Count, "Requests without a key that is in force, by reason");
    describe_counter!(RATE_LIMITED, Unit::Count, "Requests refused by a key's limit, by limit");
    describe_gauge!(AUDIT_FAILING, Unit::Count, "1 while the audit log can't be written");
    describe_counter!(AUDIT_LOST, Unit::Count, "Requests that have no line in the audit log");
    describe_counter!(RELOADS, Unit::Count, "Files read again because they changed, by what they are");
    describe_counter!(RELOAD_FAILURES, Unit::Count, "Changed files that can't be used: the old ones stay in force");
}
