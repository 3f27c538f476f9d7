//! A real Prometheus with the configuration and rules of `deploy/prometheus`, and its `promtool`.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::deployed;
use crate::{
    client::get,
    faults::{PATIENCE, free_port, tools, within},
    process::Process,
};

/// What it scrapes: `HOST:PORT` each.
#[derive(Debug, Clone)]
pub struct Targets {
    /// Coordinators.
    pub coordinators: [String; 2],
    /// Own ports of shards.
    pub shards: [String; 3],
    /// The store.
    pub etcd: String,
}

/// The server, ended when dropped.
pub struct Prometheus {
    process: Process,
    url: String,
    dir: tempfile::TempDir,
}

/// What is missing for it; `None` if nothing is.
pub fn obstacle() -> Option<String> {
    tools::unpacked("prometheus", "prometheus").err().map(|e| format!("{e:#}"))
}

impl Prometheus {
    /// Starts it and waits until it answers. It asks every second, where the configuration has longer pauses.
    pub fn start(targets: &Targets) -> Result<Self> {
        let program = tools::unpacked("prometheus", "prometheus")?;
        let dir = tempfile::tempdir()?;
        let own = format!("127.0.0.1:{}", free_port());
        let rules = dir.path().join("rules");
        let quoted = |address: &String| format!("\"{address}\"");
        let [first, second] = targets.coordinators.each_ref().map(quoted);
        let [a, b, c] = targets.shards.each_ref().map(quoted);
        let changes = [
            ("\"coordinator-1:8000\"", first),
            ("\"coordinator-2:8000\"", second),
            ("\"shard-1:50102\"", a),
            ("\"shard-2:50102\"", b),
            ("\"shard-3:50102\"", c),
            ("\"etcd:2379\"", quoted(&targets.etcd)),
            ("\"localhost:9090\"", quoted(&own)),
            ("/etc/prometheus/rules", rules.display().to_string()),
            ("scrape_interval: 15s", "scrape_interval: 1s".to_owned()),
            ("evaluation_interval: 15s", "evaluation_interval: 1s".to_owned()),
            ("scrape_interval: 5s", "scrape_interval: 1s".to_owned()),
        ];
        fs::create_dir(&rules)?;
        let every_second = [("interval: 15s", "interval: 1s".to_owned())];
        fs::write(rules.join("phalanx.rules.yml"), deployed("prometheus/phalanx.rules.yml", &every_second)?)?;
        let config = dir.path().join("prometheus.yml");
        fs::write(&config, deployed("prometheus/prometheus.yml", &changes)?)?;

        let mut command = Command::new(program);
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()));
        command.arg(format!("--web.listen-address={own}"));
        let mut prometheus = Self { process: Process::run(command), url: format!("http://{own}"), dir };
        prometheus.wait_ready()?;
        Ok(prometheus)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let url = format!("{}/-/ready", self.url);
        let mut ended = None;
        let outcome = within(PATIENCE, "Prometheus is ready", || {
            ended = self.process.ended();
            ended.is_some() || get(&url).is_ok_and(|answer| answer.status == 200)
        });
        ensure!(ended.is_none(), "Prometheus ended at its start:\n{}", self.process.log());
        outcome
    }

    /// The configuration that it runs with.
    pub fn config(&self) -> std::path::PathBuf {
        self.dir.path().join("prometheus.yml")
    }

    /// Asks its API; the answer's `data`.
    pub fn ask(&self, path: &str, form: &[(&str, &str)]) -> Result<Value> {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let url = format!("{}/api/v1/{path}", self.url);
        let mut response =
            if form.is_empty() { agent.get(&url).call()? } else { agent.post(&url).send_form(form.iter().copied())? };
        let text = response.body_mut().read_to_string()?;
        let mut answer: Value = serde_json::from_str(&text).with_context(|| format!("{path}: {text}"))?;
        ensure!(answer["status"] == "success", "{path} {form:?}: {text}");
        Ok(answer["data"].take())
    }

    /// The numbers that a query has now.
    pub fn now(&self, query: &str) -> Result<Vec<f64>> {
        let found = self.ask("query", &[("query", query)])?;
        Ok(numbers(&found, "value"))
    }

    /// The numbers that a query has had at each second since a moment.
    pub fn since(&self, query: &str, begin: SystemTime) -> Result<Vec<f64>> {
        let seconds = |moment: SystemTime| moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let (begin, end) = (seconds(begin).to_string(), seconds(SystemTime::now()).to_string());
        let form = [("query", query), ("start", &begin), ("end", &end), ("step", "1")];
        let found = self.ask("query_range", &form)?;
        Ok(numbers(&found, "values"))
    }
}

/// Numbers of all series in an answer; those that are no numbers are left out.
fn numbers(found: &Value, field: &str) -> Vec<f64> {
    let series = found["result"].as_array().into_iter().flatten();
    let samples = series.flat_map(|series| match &series[field] {
        Value::Array(samples) if field == "values" => samples.clone(),
        sample => vec![sample.clone()],
    });
    let values = samples.filter_map(|sample| sample[1].as_str()?.parse::<f64>().ok());
    values.filter(|value| value.is_finite()).collect()
}

/// Runs `promtool`: whether it is content, and what it says.
pub fn promtool(args: &[&str], dir: &Path, input: &str) -> Result<(bool, String)> {
    // It lies beside the server, also where the package was unpacked.
    let server = tools::unpacked("prometheus", "prometheus")?;
    let mut child = Command::new(server.with_file_name("promtool"))
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool")?;
    let Some(mut stdin) = child.stdin.take() else { bail!("promtool has no input") };
    // It may end without having read all.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let outcome = child.wait_with_output()?;
    let said = [outcome.stdout, outcome.stderr].concat();
    Ok((outcome.status.success(), String::from_utf8_lossy(&said).into_owned()))
}
