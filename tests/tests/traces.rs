//! Traces of requests, as a collector gets them.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
};

use phalanx_tests::{
    client::metric,
    golden,
    process::{Cluster, Process, wait_until},
};
use prost::Message;
use rustix::process::Signal;
use serde_json::json;
use tonic::{
    codegen::{BoxFuture, Service, http},
    server::{NamedService, UnaryService},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// The protocol as a collector reads it: opentelemetry-proto 1.x.
mod wire {
    use prost::Message;

    #[derive(Message)]
    pub struct Request {
        #[prost(message, repeated, tag = "1")]
        pub resources: Vec<ResourceSpans>,
    }
    /// Unset: everything was taken.
    #[derive(Message)]
    pub struct Answer {
        #[prost(message, optional, tag = "1")]
        pub partial: Option<Partial>,
    }
    #[derive(Message)]
    pub struct Partial {
        #[prost(int64, tag = "1")]
        pub rejected: i64,
        #[prost(string, tag = "2")]
        pub reason: String,
    }
    #[derive(Message)]
    pub struct ResourceSpans {
        #[prost(message, repeated, tag = "2")]
        pub scopes: Vec<ScopeSpans>,
    }
    #[derive(Message)]
    pub struct ScopeSpans {
        #[prost(message, repeated, tag = "2")]
        pub spans: Vec<Span>,
    }
    #[derive(Message, Clone)]
    pub struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub span_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "4")]
        pub parent: Vec<u8>,
        #[prost(string, tag = "5")]
        pub name: String,
        #[prost(int32, tag = "6")]
        pub kind: i32,
        #[prost(fixed64, tag = "7")]
        pub start: u64,
        #[prost(fixed64, tag = "8")]
        pub end: u64,
        #[prost(message, repeated, tag = "9")]
        pub attributes: Vec<KeyValue>,
    }
    #[derive(Message, Clone)]
    pub struct KeyValue {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(message, optional, tag = "2")]
        pub value: Option<AnyValue>,
    }
    #[derive(Message, Clone)]
    pub struct AnyValue {
        #[prost(string, tag = "1")]
        pub text: String,
        #[prost(int64, tag = "3")]
        pub integer: i64,
        #[prost(double, tag = "4")]
        pub number: f64,
    }
}

/// Takes spans until the test ends.
struct Collector {
    url: String,
    spans: Arc<Mutex<Vec<wire::Span>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let spans: Arc<Mutex<Vec<wire::Span>>> = Arc::default();
        let taken = Arc::clone(&spans);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let taken = Arc::clone(&taken);
                thread::spawn(move || {
                    let mut reader = BufReader::new(stream);
                    while let Some(body) = read_request(&mut reader) {
                        let request = wire::Request::decode(&body[..]).expect("spans are well formed");
                        taken.lock().expect("no reader panics").extend(spans_of(request));
                        let answer =
                            b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
                        if reader.get_mut().write_all(answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { url, spans }
    }

    /// What came of a trace, by name.
    fn of(&self, trace: &str) -> BTreeMap<String, Vec<wire::Span>> {
        by_name(&self.spans, trace)
    }
}

/// Spans of a trace, by name.
fn by_name(spans: &Mutex<Vec<wire::Span>>, trace: &str) -> BTreeMap<String, Vec<wire::Span>> {
    let mut found: BTreeMap<String, Vec<wire::Span>> = BTreeMap::new();
    for span in spans.lock().expect("no reader panics").iter().filter(|span| hex(&span.trace_id) == trace) {
        found.entry(span.name.clone()).or_default().push(span.clone());
    }
    found
}

fn spans_of(request: wire::Request) -> impl Iterator<Item = wire::Span> {
    request.resources.into_iter().flat_map(|r| r.scopes).flat_map(|s| s.spans)
}

/// A collector's service, as opentelemetry-proto's `trace_service.proto` names it.
#[derive(Clone, Default)]
struct TraceService {
    spans: Arc<Mutex<Vec<wire::Span>>>,
    /// The header `x-key` of each call.
    keys: Arc<Mutex<Vec<String>>>,
    /// Spans of each call that it refuses.
    refuses: i64,
}

impl TraceService {
    /// Takes spans until the runtime ends. Returns where.
    async fn start(self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(self).serve_with_incoming(incoming));
        url
    }
}

impl NamedService for TraceService {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl Service<http::Request<tonic::body::Body>> for TraceService {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        assert_eq!(request.uri().path(), format!("/{}/Export", Self::NAME));
        let export = Export(self.clone());
        Box::pin(async move {
            Ok(tonic::server::Grpc::new(tonic_prost::ProstCodec::default()).unary(export, request).await)
        })
    }
}

struct Export(TraceService);

impl UnaryService<wire::Request> for Export {
    type Response = wire::Answer;
    type Future = BoxFuture<tonic::Response<wire::Answer>, tonic::Status>;

    fn call(&mut self, request: tonic::Request<wire::Request>) -> Self::Future {
        let key = request.metadata().get("x-key").and_then(|key| key.to_str().ok()).unwrap_or_default().to_owned();
        self.0.keys.lock().expect("no reader panics").push(key);
        self.0.spans.lock().expect("no reader panics").extend(spans_of(request.into_inner()));
        let partial = wire::Partial { rejected: self.0.refuses, reason: "it is full".to_owned() };
        Box::pin(async move { Ok(tonic::Response::new(wire::Answer { partial: Some(partial) })) })
    }
}

/// Body of the next request; `None` at the end of the connection.
fn read_request(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let (mut line, mut length) = (String::new(), 0);
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    assert_eq!(line.trim_end(), "POST /v1/traces HTTP/1.1");
    loop {
        line.clear();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let line = line.trim_end().to_ascii_lowercase();
        match line.split_once(": ") {
            Some(("content-length", n)) => length = n.parse().expect("a length"),
            Some(("content-type", kind)) => assert_eq!(kind, "application/x-protobuf"),
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok().map(|()| body)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn integer(span: &wire::Span, key: &str) -> i64 {
    let found = span.attributes.iter().find(|a| a.key == key).and_then(|a| a.value.as_ref());
    found.unwrap_or_else(|| panic!("{} has no {key}: {:?}", span.name, span.attributes)).integer
}

fn start(collector: &str, options: &[&str]) -> Cluster {
    let args = ["--kv-cache-memory", "32MiB", "--otlp-traces-endpoint", collector, "--otlp-sample-ratio", "0"];
    let args = [&args[..], options].concat();
    Cluster::start(&golden::tiny("llama"), &args)
}

/// A completion of eight tokens, of a trace of the client's.
fn complete(http: &str, trace: &str, flags: &str) {
    let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": true}).to_string();
    let request = agent.post(format!("{http}/v1/completions")).header("content-type", "application/json");
    let answer = request.header("traceparent", format!("00-{trace}-{CLIENT}-{flags}")).send(body.as_bytes());
    assert_eq!(answer.expect("it is answered").status().as_u16(), 200);
}

#[test]
fn a_client_s_trace_goes_on_through_queue_prefill_decode_and_ranks() {
    let collector = Collector::start();
    let cluster = start(&collector.url, &[]);
    let unsampled = TRACE.replace('4', "5");
    complete(&cluster.http, &unsampled, "00");
    complete(&cluster.http, TRACE, "01");
    wait_until("all spans have come", || collector.of(TRACE).values().map(Vec::len).sum::<usize>() >= 6);
    let mut spans = collector.of(TRACE);
    let names: Vec<&str> = spans.keys().map(String::as_str).collect();
    assert_eq!(names, ["POST /v1/completions", "decode", "prefill", "queue", "shard"]);
    let shards = spans.remove("shard").expect("ranks have spans");
    let [request, decode, prefill, queue] = spans.into_values().collect::<Vec<_>>().try_into().expect("four names");
    let (request, decode, prefill, queue) = (&request[0], &decode[0], &prefill[0], &queue[0]);
    assert_eq!((hex(&request.parent).as_str(), request.kind), (CLIENT, 2), "the client's span is the parent");
    for part in shards.iter().chain([decode, prefill, queue]) {
        assert_eq!(part.parent, request.span_id, "{}", part.name);
        assert!(request.start <= part.start && part.start <= part.end, "{part:?}");
    }
    assert!(queue.end == prefill.start && prefill.end == decode.start, "one follows the other");
    assert_eq!((integer(prefill, "gen_ai.usage.input_tokens"), integer(decode, "gen_ai.usage.output_tokens")), (3, 8));
    assert_eq!(integer(request, "http.response.status_code"), 200);
    let mut ranks: Vec<i64> = shards.iter().map(|span| integer(span, "phalanx.rank")).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [0, 1]);
    assert!(shards.iter().all(|span| integer(span, "phalanx.steps") > 0));
    assert!(collector.of(&unsampled).is_empty(), "its client wanted none");
    assert!(metric(&cluster.http, "phalanx_trace_spans_total{outcome=\"exported\"}") >= 6.0);
    assert!(cluster.interrupt().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_go_over_grpc_as_opentelemetry_s_variables_say() {
    let service = TraceService { refuses: 1, ..TraceService::default() };
    let url = service.clone().start().await;
    let variables = [
        "env".to_owned(),
        format!("OTEL_EXPORTER_OTLP_ENDPOINT={url}"),
        "OTEL_EXPORTER_OTLP_PROTOCOL=grpc".to_owned(),
        "OTEL_EXPORTER_OTLP_HEADERS=x-key=a%20secret".to_owned(),
    ];
    let model = golden::tiny("llama").display().to_string();
    let args = [
        &model,
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--tensor-parallel-size",
        "1",
        "--threads-per-shard",
        "1",
        "--kv-cache-memory",
        "32MiB",
        "--otlp-sample-ratio",
        "0",
    ];
    let mut coordinator = Process::start_in(&variables, "coordinator", &args.map(str::to_owned));
    let ready = coordinator.wait_for_line("phalanx ready ");
    let http = ready.split_whitespace().find(|word| word.starts_with("http://")).expect("an address").to_owned();
    complete(&http, TRACE, "01");
    wait_until("all spans have come", || by_name(&service.spans, TRACE).values().map(Vec::len).sum::<usize>() >= 5);
    let names: Vec<String> = by_name(&service.spans, TRACE).into_keys().collect();
    assert_eq!(names, ["POST /v1/completions", "decode", "prefill", "queue", "shard"]);
    let keys = service.keys.lock().expect("no reader panics").clone();
    assert!(!keys.is_empty() && keys.iter().all(|key| key == "a secret"), "{keys:?}");
    let told = |outcome: &str| metric(&http, &format!("phalanx_trace_spans_total{{outcome=\"{outcome}\"}}"));
    wait_until("spans that were refused are counted", || told("failed") >= 1.0);
    assert!(told("failed") + told("exported") >= 5.0);
    let log = coordinator.log();
    assert!(log.contains("it is full") && !log.contains("secret"), "{log}");
    coordinator.signal(Signal::INT);
    assert!(coordinator.wait().success());
}

#[test]
fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let gone = format!("http://{}", listener.local_addr().expect("it is bound"));
    drop(listener);
    for protocol in ["http/protobuf", "grpc"] {
        let cluster = start(&gone, &["--otlp-traces-protocol", protocol]);
        complete(&cluster.http, TRACE, "01");
        let lost = || metric(&cluster.http, "phalanx_trace_spans_total{outcome=\"failed\"}");
        wait_until("its spans are counted as lost", || lost() >= 6.0);
        complete(&cluster.http, TRACE, "01");
        assert!(cluster.interrupt().success());
    }
}
