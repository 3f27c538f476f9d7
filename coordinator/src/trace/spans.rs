//! What happened to a request, as spans.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{
    Answered, SpanContext, Work,
    otlp::{ERROR, INTERNAL, KeyValue, SERVER, Span, Status, attribute},
};
use crate::scheduler::ending::{Ended, Ending};

/// Statuses that are our own faults: those of HTTP begin with 5.
const GRPC_FAULTS: [&str; 5] = ["internal", "unavailable", "unknown", "deadline_exceeded", "data_loss"];

/// Turns moments of this process into times of day.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    at: Instant,
    since_1970: Duration,
}

impl Clock {
    pub(super) fn new() -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { at: Instant::now(), since_1970 }
    }

    fn unix_nanos(&self, moment: Instant) -> u64 {
        let time = match moment.checked_duration_since(self.at) {
            Some(after) => self.since_1970.saturating_add(after),
            None => self.since_1970.saturating_sub(self.at.saturating_duration_since(moment)),
        };
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    }

    fn span(&self, name: &str, context: SpanContext, parent: Option<[u8; 8]>, from: Instant, to: Instant) -> Span {
        Span {
            trace_id: context.trace.to_vec(),
            span_id: context.span.to_vec(),
            parent_span_id: parent.map(|span| span.to_vec()).unwrap_or_default(),
            name: name.to_owned(),
            kind: INTERNAL,
            start_time_unix_nano: self.unix_nanos(from),
            end_time_unix_nano: self.unix_nanos(to.max(from)),
            ..Span::default()
        }
    }

    /// The request's own span.
    pub(super) fn answered(&self, answered: Answered) -> Span {
        let Answered { context, parent, endpoint, status, request_id, arrived, ended } = answered;
        let is_grpc = !endpoint.starts_with('/');
        let name = if is_grpc { endpoint.clone() } else { format!("POST {endpoint}") };
        let mut attributes = vec![attribute("phalanx.request_id", request_id.as_str())];
        if is_grpc {
            attributes.push(attribute("rpc.system", "grpc"));
            attributes.push(attribute("rpc.response.status_code", status.as_str()));
        } else {
            attributes.push(attribute("http.request.method", "POST"));
            attributes.push(attribute("http.route", endpoint.as_str()));
            attributes.extend(status.parse().ok().map(|code: u64| attribute("http.response.status_code", code)));
        }
        let is_fault = status.starts_with('5') || GRPC_FAULTS.contains(&status.as_str());
        let failed = is_fault.then(|| Status { code: ERROR, message: String::new() });
        Span { kind: SERVER, attributes, status: failed, ..self.span(&name, context, parent, arrived, ended) }
    }

    /// What the scheduler and the ranks did for it, in the span of the request.
    pub(super) fn ended(&self, ended: &Ended, work: &[Work], request: SpanContext, model: &str) -> Vec<Span> {
        let times = ended.times;
        let end = times.last_token.unwrap_or(ended.at);
        let part = |name, from, to, attributes: Vec<KeyValue>| {
            let span = self.span(name, request.child(), Some(request.span), from, to);
            Span { attributes, ..span }
        };
        let about = attribute("phalanx.scheduler_id", ended.id.as_str());
        let queued_to = times.admitted.unwrap_or(ended.at);
        let mut spans = vec![part("queue", times.arrived, queued_to, vec![about.clone()])];
        if let Some(admitted) = times.admitted {
            let prefilled = times.first_token.unwrap_or(end);
            spans.push(part(
                "prefill",
                admitted,
                prefilled,
                vec![
                    about.clone(),
                    attribute("gen_ai.request.model", model),
                    attribute("gen_ai.usage.input_tokens", u64::from(ended.usage.prompt_tokens)),
                    attribute("phalanx.cached_tokens", u64::from(ended.usage.cached_tokens)),
                ],
            ));
        }
        if let Some(first) = times.first_token {
            spans.push(part(
                "decode",
                first,
                end,
                vec![
                    about.clone(),
                    attribute("gen_ai.request.model", model),
                    attribute("gen_ai.usage.output_tokens", u64::from(ended.usage.completion_tokens)),
                    attribute("gen_ai.response.finish_reason", ended.ending.name()),
                    attribute("phalanx.preemptions", u64::from(ended.n_preempted)),
                ],
            ));
        }
        let seconds = |us: u64| us as f64 / 1e6;
        let began = times.admitted.unwrap_or(ended.at);
        spans.extend(work.iter().map(|work| {
            part(
                "shard",
                began,
                ended.at,
                vec![
                    about.clone(),
                    attribute("phalanx.rank", work.rank as u64),
                    attribute("phalanx.shard", work.shard.as_str()),
                    attribute("phalanx.steps", work.steps),
                    attribute("phalanx.compute_seconds", seconds(work.compute_us)),
                    attribute("phalanx.collective_seconds", seconds(work.collective_us)),
                ],
            )
        }));
        if ended.ending == Ending::Error
            && let Some(last) = spans.last_mut()
        {
            last.status = Some(Status { code: ERROR, message: "the request failed".to_owned() });
        }
        spans
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{request::Usage, scheduler::ending::Times, sequence::RequestKey};

    #[test]
    fn parts_of_a_request_follow_each_other_in_its_span() {
        let clock = Clock::new();
        let arrived = clock.at + Duration::from_secs(1);
        let at = |ms| arrived + Duration::from_millis(ms);
        let ended = Ended {
            key: RequestKey(1),
            id: "cmpl-1".to_owned(),
            ending: Ending::Length,
            times: Times { arrived, admitted: Some(at(5)), first_token: Some(at(25)), last_token: Some(at(90)) },
            at: at(91),
            usage: Usage { prompt_tokens: 7, completion_tokens: 9, cached_tokens: 0 },
            longest: 9,
            n: 1,
            n_open: 0,
            max_tokens: 9,
            n_preempted: 0,
        };
        let work = Work { rank: 1, shard: "s".to_owned(), steps: 9, compute_us: 40_000, collective_us: 2000 };
        let request = SpanContext::drawn(1.0).unwrap();
        let spans = clock.ended(&ended, &[work], request, "m");
        let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["queue", "prefill", "decode", "shard"]);
        for pair in spans[..3].windows(2) {
            assert_eq!(pair[0].end_time_unix_nano, pair[1].start_time_unix_nano);
        }
        assert_eq!(spans[2].end_time_unix_nano - spans[0].start_time_unix_nano, 90_000_000);
        assert!(spans.iter().all(|s| s.parent_span_id == request.span && s.trace_id == request.trace));
        assert!(spans[3].attributes.contains(&attribute("phalanx.compute_seconds", 0.04)));

        let waiting =
            Ended { times: Times { admitted: None, first_token: None, last_token: None, ..ended.times }, ..ended };
        assert_eq!(clock.ended(&waiting, &[], request, "m").len(), 1, "it never ran");
    }
}
