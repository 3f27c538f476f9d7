//! A real Prometheus, configured as `deploy/` has it, scrapes a cluster under load that loses a rank: every query of the
//! dashboard and of the rules has an answer.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use phalanx_tests::{
    client::{get, post, post_stream},
    faults::{
        deployment::Deployment,
        free_port,
        setup::{Model, OwnShard, Setup, StoreKind},
        within,
    },
    process::{repository, signal_pid},
    programs::{
        address, deployed,
        prometheus::{Prometheus, Targets, obstacle, promtool},
    },
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// The job of coordinators in `deploy/prometheus/prometheus.yml`.
const JOB: &str = "phalanx";
/// Clients: more than may run and wait.
const CLIENTS: u32 = 8;
/// Longest wait for all answers. Reached only by a failing test.
const LIMIT: Duration = Duration::from_secs(300);
/// Panels that rightly show nothing but zeros here: there is one group, nobody is cut off for a while, copies keep up, and
/// no request fails.
const MAY_BE_ZERO: &[&str] = &["Moved requests", "Messages of an old epoch", "Lag of KV copies"];

/// A query of the dashboard, as Grafana sends it.
#[derive(Debug)]
struct Query {
    panel: String,
    text: String,
    /// Whether it is asked for the end of the time that is shown, not for all of it.
    instant: bool,
}

impl Query {
    /// Whether there is an answer, and where the load must have moved it one that is not zero.
    fn is_answered(&self, prometheus: &Prometheus, begin: SystemTime) -> bool {
        let numbers = if self.instant { prometheus.now(&self.text) } else { prometheus.since(&self.text, begin) };
        let numbers = numbers.unwrap_or_else(|e| panic!("{self:?}: {e:#}"));
        let may_be_zero = MAY_BE_ZERO.contains(&self.panel.as_str()) || self.text.contains("status=~\"5..");
        !numbers.is_empty() && (may_be_zero || numbers.iter().any(|number| *number > 0.0))
    }
}

/// The number of seconds behind a key of a YAML file.
fn interval(text: &str, key: &str) -> u32 {
    let (_, rest) = text.split_once(key).unwrap_or_else(|| panic!("no {key}"));
    let value = rest.trim_start_matches(':').split_whitespace().next().and_then(|v| v.strip_suffix('s')?.parse().ok());
    value.unwrap_or_else(|| panic!("{key} has no seconds"))
}

/// Variables in a query, as Grafana sets them: for the last hour, with what the provisioned data source says about scrapes.
fn with_variables(expr: &str) -> String {
    let source = deployed("grafana/provisioning/datasources/prometheus.yml", &[]).unwrap();
    let scrapes = interval(&source, "timeInterval");
    // An hour has less points than a panel is wide.
    let rate = (scrapes + scrapes).max(4 * scrapes);
    let text = expr.replace("$job", JOB).replace("$__rate_interval", &format!("{rate}s")).replace("$__range", "3600s");
    assert!(!text.contains('$'), "{text}: what is this variable?");
    text
}

fn collect(panels: &Value, found: &mut Vec<Query>) {
    for panel in panels.as_array().into_iter().flatten() {
        collect(&panel["panels"], found);
        let title = panel["title"].as_str().unwrap_or_default();
        let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(targets.is_empty(), panel["type"] == "row", "{title}: a panel without a query");
        for target in targets {
            let text = with_variables(target["expr"].as_str().expect("a query"));
            found.push(Query { panel: title.to_owned(), text, instant: target["instant"] == true });
        }
    }
}

/// All queries of the dashboard.
fn dashboard() -> Vec<Query> {
    let text = deployed("grafana/dashboards/phalanx.json", &[]).unwrap();
    let dashboard: Value = serde_json::from_str(&text).expect("the dashboard is JSON");
    let mut found = Vec::new();
    collect(&dashboard["panels"], &mut found);
    for annotation in dashboard["annotations"]["list"].as_array().into_iter().flatten() {
        if let Some(expr) = annotation["expr"].as_str() {
            let panel = annotation["name"].as_str().unwrap_or_default().to_owned();
            found.push(Query { panel, text: with_variables(expr), instant: false });
        }
    }
    found
}

/// Names in the rules of this kind.
fn ruled(kind: &str) -> BTreeSet<String> {
    let rules = deployed("prometheus/phalanx.rules.yml", &[]).unwrap();
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- ")?.strip_prefix(kind)?.strip_prefix(": "));
    names.map(str::to_owned).collect()
}

/// A chat template that speaks of tools, in few words.
const TEMPLATE: &str = "{% for message in messages %}{{ message['content'] }}{% endfor %}\
                        {% if tools %}<tool_call>{{ tools | tojson }}{% endif %}";

/// Two coordinators, two ranks and a spare with ports of their own, an etcd.
fn setup(health: &[u16], template: &str) -> Setup {
    let shard =
        |port: &u16| OwnShard { always: vec!["--health-port".to_owned(), port.to_string()], ..OwnShard::default() };
    let setup = Setup {
        coordinators: 2,
        store: StoreKind::Etcd(1),
        own_shards: health.iter().map(shard).collect(),
        ..Setup::own(Model::Tiny, 1)
    };
    // So few blocks that sequences are put back, and so few seats that requests wait and are refused.
    let few = ["--kv-cache-memory", "256KiB", "--max-num-seqs", "3", "--max-num-queued-reqs", "2"];
    setup.with(&few).with(&["--chat-template", template, "--tool-call-parser", "hermes"])
}

/// What clients do until they are told to stop.
fn load(client: u32, http: &[String], stop: &AtomicBool) {
    let tool = json!({"type": "function", "function": {"name": "note", "parameters": {
        "type": "object", "properties": {"what": {"type": "string", "maxLength": 8}}, "required": ["what"],
        "additionalProperties": false,
    }}});
    for turn in client.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let url = |path: &str| format!("{}/v1/{path}", http[turn as usize % http.len()]);
        let messages = json!([{"role": "user", "content": format!("Client {client}")}]);
        let (url, body) = match turn % 4 {
            0 => {
                // A prompt with a beginning that others have too, and an answer that outgrows its share of blocks.
                let prompt: Vec<u32> = (0..48).map(|at| if at < 32 { 40 } else { 50 + client + at }).collect();
                (url("completions"), json!({"prompt": prompt, "max_tokens": 200, "ignore_eos": true, "stream": true}))
            }
            1 => (url("chat/completions"), json!({"messages": messages, "max_tokens": 120, "ignore_eos": true})),
            2 => {
                let pattern = json!({"regex": "[a-f]{20,40}"});
                (url("completions"), json!({"prompt": "Letters:", "max_tokens": 60, "structured_outputs": pattern}))
            }
            _ => {
                let choice = json!({"type": "function", "function": {"name": "note"}});
                let call = json!({"messages": messages, "max_tokens": 60, "tools": [tool], "tool_choice": choice});
                (url("chat/completions"), call)
            }
        };
        if body["stream"] == true {
            match post_stream(&url, &body) {
                Ok(events) => events.for_each(|event| drop(event.expect("the stream goes on"))),
                Err(error) => assert!(error.to_string().contains("status 429"), "{url}: {error:#}"),
            }
            continue;
        }
        let answer = post(&url, &body).expect("somebody answers");
        assert!(matches!(answer.status, 200 | 429), "{url}: {answer:?}");
        if answer.status == 429 {
            // As clients do that were refused.
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Clients in threads of their own, which end when this is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<()>>,
}

impl Load {
    fn start(http: &[String]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |client| {
            let (http, stop) = (http.to_vec(), Arc::clone(&stop));
            thread::spawn(move || load(client, &http, &stop))
        };
        let clients = (0..CLIENTS).map(client).collect();
        Self { stop, clients }
    }

    /// Whether all still do what they do.
    fn goes_on(&self) -> bool {
        self.clients.iter().all(|client| !client.is_finished())
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| client.join().expect("every request was answered or refused"));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Waits until every target of the configuration answers Prometheus.
fn wait_up(prometheus: &Prometheus) {
    let mut last = Value::Null;
    let all_up = within(LIMIT, "all targets are up", || {
        last = prometheus.ask("targets?state=active", &[]).unwrap()["activeTargets"].take();
        let targets = last.as_array().map_or(&[][..], Vec::as_slice);
        targets.len() == 7 && targets.iter().all(|target| target["health"] == "up")
    });
    assert!(all_up.is_ok(), "{last:#}");
}

/// Waits until each of these is so, and says which are not.
fn wait_all<T: std::fmt::Debug>(what: &str, mut pending: Vec<T>, load: &Load, is_so: impl Fn(&T) -> bool) {
    let outcome = within(LIMIT, what, || {
        assert!(load.goes_on(), "a client has ended");
        pending.retain(|one| !is_so(one));
        pending.is_empty()
    });
    assert!(outcome.is_ok(), "{what}: not {pending:#?}");
}

/// Rules and panels that count requests count those of every API.
fn every_generation_is_counted(prometheus: &Prometheus) {
    let rules = deployed("prometheus/phalanx.rules.yml", &[]).unwrap();
    let texts = dashboard().into_iter().map(|query| query.text).chain([rules]);
    let patterns: BTreeSet<_> = texts
        .flat_map(|text| {
            let patterns = text.split("endpoint=~\"").skip(1).map(|rest| rest.split('"').next().unwrap_or_default());
            patterns.map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(patterns.len(), 1, "{patterns:?}");
    // Clients can leave while something is generated, and only then: nobody has left yet, but the series are there.
    for pattern in patterns {
        let of = |sign: &str| format!("inference_requests_total{{status=\"499\",endpoint{sign}\"{pattern}\"}}");
        assert!(prometheus.now(&of("=~")).unwrap().len() > 10, "{pattern}");
        let missing = prometheus.ask("query", &[("query", &of("!~"))]).unwrap();
        assert_eq!(missing["result"], json!([]), "{pattern}");
    }
}

#[test]
fn every_panel_and_every_rule_has_data() {
    if let Some(why) = obstacle() {
        println!("skipped: {why}");
        return;
    }
    let runtime = Arc::new(tokio::runtime::Runtime::new().unwrap());
    let health = [free_port(), free_port(), free_port()];
    let template = tempfile::NamedTempFile::new().unwrap();
    fs::write(template.path(), TEMPLATE).unwrap();
    let setup = setup(&health, template.path().to_str().unwrap());
    let deployment = Deployment::start(&runtime, &setup).expect("the cluster starts");
    let etcd = deployment.etcd.as_ref().expect("it has one").url();
    let http: Vec<_> = deployment.coordinators.iter().map(|c| c.http.clone()).collect();
    let targets = Targets {
        coordinators: [address(&http[0]), address(&http[1])],
        shards: health.map(|port| format!("127.0.0.1:{port}")),
        etcd: address(&etcd),
    };
    let begin = SystemTime::now();
    let prometheus = Prometheus::start(&targets).expect("Prometheus starts");
    let (good, said) =
        promtool(&["check", "config", prometheus.config().to_str().unwrap()], &repository(), "").unwrap();
    assert!(good, "{said}");
    wait_up(&prometheus);
    // What the dashboard offers as clusters.
    let jobs = prometheus.ask("label/job/values?match[]=phalanx_is_leader", &[]).unwrap();
    assert_eq!(jobs, json!([JOB]));

    every_generation_is_counted(&prometheus);

    let load = Load::start(&http);
    wait_all("requests run", vec!["sequences_running"], &load, |name| deployment.metric(name) > 0.0);
    let lost = deployment.rank(1).expect("there is a rank 1");
    signal_pid(lost.pid, Signal::KILL);

    let queries = dashboard();
    assert!(queries.len() > 40, "{} queries", queries.len());
    wait_all("panels have data", queries, &load, |query| query.is_answered(&prometheus, begin));
    let records = ruled("record");
    assert!(records.len() > 15, "{records:?}");
    wait_all("rules have recorded", records.into_iter().collect(), &load, |name| {
        prometheus.now(name).is_ok_and(|numbers| !numbers.is_empty())
    });
    let rules = || prometheus.ask("rules", &[]).unwrap()["groups"].take();
    wait_all("rules are evaluated", vec!["ok"], &load, |health| {
        let groups = rules();
        let mut all = groups.as_array().into_iter().flatten().flat_map(|g| g["rules"].as_array().into_iter().flatten());
        all.all(|rule| rule["health"] == *health)
    });
    let alerts = prometheus.ask("rules?type=alert", &[]).unwrap();
    let alerts = alerts["groups"].as_array().into_iter().flatten().flat_map(|group| group["rules"].as_array());
    let loaded: BTreeSet<_> = alerts.flatten().filter_map(|alert| Some(alert["name"].as_str()?.to_owned())).collect();
    assert_eq!(loaded, ruled("alert"));
    // Somebody is told of what happens, and of nothing that does not.
    wait_all("the refusals are noticed", vec!["ALERTS{alertname=\"PhalanxRefusesRequests\"}"], &load, |alert| {
        prometheus.now(alert).is_ok_and(|numbers| !numbers.is_empty())
    });
    let firing = "ALERTS{alertstate=\"firing\",severity=\"critical\"}";
    assert_eq!(prometheus.now(firing).unwrap(), Vec::<f64>::new(), "the cluster serves");
    // The lost shard was started again.
    wait_up(&prometheus);
    load.end();

    for target in targets.coordinators.iter().chain(&targets.shards) {
        let metrics = get(&format!("http://{target}/metrics")).unwrap().body;
        let (good, said) = promtool(&["check", "metrics"], &repository(), &metrics).unwrap();
        // docs/metrics.md: names that others have chosen.
        let others = |line: &str| line.starts_with("vllm:") || line.starts_with("gpu_memory_total ");
        let wrong: Vec<_> = said.lines().filter(|line| !others(line)).collect();
        assert!(wrong.is_empty() && good == said.is_empty(), "{target}: {wrong:?}");
    }
    drop(prometheus);
    assert_eq!(deployment.end(), Vec::<String>::new());
}

#[test]
fn promtool_is_content_with_the_rules() {
    if let Some(why) = obstacle() {
        println!("skipped: {why}");
        return;
    }
    let folder: PathBuf = repository().join("deploy/prometheus");
    for args in [["check", "rules", "phalanx.rules.yml"], ["test", "rules", "phalanx.rules.test.yml"]] {
        let (good, said) = promtool(&args, &folder, "").unwrap();
        assert!(good && !said.contains("FAILED"), "{args:?}: {said}");
    }
    // A rate needs the scrapes that Grafana believes in.
    let config = fs::read_to_string(folder.join("prometheus.yml")).unwrap();
    let (_, own) = config.split_once("job_name: phalanx\n").expect("the job of coordinators");
    let source = deployed("grafana/provisioning/datasources/prometheus.yml", &[]).unwrap();
    assert_eq!(interval(own, "scrape_interval"), interval(&source, "timeInterval"));
}
