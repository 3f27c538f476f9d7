//! What `deploy/` names must exist: metrics, options, variables, sections of the docs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use phalanx_tests::process::repository;
use serde_json::Value;

/// Words between operands of a query.
const OPERATORS: &[&str] = &["and", "or", "unless", "offset", "bool"];
/// Words that a list of labels follows.
const LABEL_LISTS: &[&str] = &["by", "without", "on", "ignoring", "group_left", "group_right"];

fn read(path: impl AsRef<Path>) -> String {
    let path = repository().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files below `deploy/`, with their text.
fn deployed() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![repository().join("deploy")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())).flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with(".env") {
                let text = read(&path);
                found.push((path, text));
            }
        }
    }
    found
}

/// What follows the first `end`.
fn behind(text: &str, end: char) -> &str {
    text.split_once(end).map_or("", |(_, rest)| rest)
}

/// Every metric's name, and whether it is a histogram.
fn known_metrics() -> BTreeMap<String, bool> {
    // A test of the coordinator compares it with what the program has, another one with what it is scraped.
    let text = read("docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    rows.map(|(name, rest)| (name.to_owned(), rest.starts_with("histogram |"))).collect()
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// Values of a key in one of our YAML files: on the key's line, or folded below it.
fn yaml_values(text: &str, key: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut values = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let entry = line.trim_start().trim_start_matches("- ");
        let Some(value) = entry.strip_prefix(key).and_then(|rest| rest.strip_prefix(':')).map(str::trim) else {
            continue;
        };
        if value == ">-" {
            let folded = lines[index + 1..].iter().take_while(|l| indent(l) > indent(line)).map(|l| l.trim());
            values.push(folded.collect::<Vec<_>>().join(" "));
        } else {
            values.push(value.to_owned());
        }
    }
    values
}

/// Every query below a JSON value.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::String(query) if name == "expr" => found.push(query.clone()),
                    field => queries(field, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| queries(item, found)),
        _ => {}
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// What follows the label matchers whose brace was opened.
fn behind_matchers(mut text: &str) -> &str {
    loop {
        let Some(at) = text.find(['"', '}']) else { return "" };
        let rest = &text[at + 1..];
        if text[at..].starts_with('}') {
            return rest;
        }
        text = behind(rest, '"');
    }
}

/// The metrics that a query reads.
fn metrics_of(query: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut rest = query;
    while let Some(first) = rest.chars().next() {
        let after = &rest[first.len_utf8()..];
        rest = match first {
            '"' => behind(after, '"'),
            '{' => behind_matchers(after),
            '[' => behind(after, ']'),
            // A variable of the dashboard.
            '$' => after.trim_start_matches(is_word),
            // A number or a duration.
            c if c.is_ascii_digit() => after.trim_start_matches(|c| is_word(c) || c == '.'),
            c if is_word(c) => {
                let (word, after) = rest.split_at(rest.find(|c| !is_word(c)).unwrap_or(rest.len()));
                let next = after.trim_start();
                if LABEL_LISTS.contains(&word) {
                    behind(next, ')')
                } else {
                    let is_function = ["(", "by ", "without "].iter().any(|sign| next.starts_with(sign));
                    if !is_function && !OPERATORS.contains(&word) {
                        found.insert(word.to_owned());
                    }
                    after
                }
            }
            _ => after,
        };
    }
    found
}

#[test]
fn the_metrics_of_a_query_are_found() {
    let query = "sum by (job) (rate(a_total{x=~\"b}|c\",y=\"d\"}[5m])) / e:f:g and on (job, instance) h{job=\"$job\"} == 1 \
                 unless histogram_quantile(0.99, sum(i_bucket)) offset $__range > 1e3 or vector(0)";
    let want = ["a_total", "e:f:g", "h", "i_bucket"].map(str::to_owned);
    assert_eq!(metrics_of(query), BTreeSet::from(want));
}

#[test]
fn queries_read_metrics_that_there_are() {
    let known = known_metrics();
    assert!(
        known.contains_key("phalanx_epoch") && known["phalanx_stall_seconds"] && !known["queue_length"],
        "{known:?}"
    );
    let rules = read("deploy/prometheus/phalanx.rules.yml");
    let recorded: BTreeSet<String> = yaml_values(&rules, "record").into_iter().collect();
    let mut asked = yaml_values(&rules, "expr");
    let dashboard = read("deploy/grafana/dashboards/phalanx.json");
    queries(&serde_json::from_str(&dashboard).expect("the dashboard is JSON"), &mut asked);
    assert!(asked.len() > 50, "{} queries", asked.len());
    for query in asked {
        let metrics = metrics_of(&query);
        assert!(!metrics.is_empty(), "{query}");
        for name in metrics {
            let is_histogram = |name: &str| known.get(name) == Some(&true);
            let is_known = name == "up"
                || recorded.contains(&name)
                || known.get(&name) == Some(&false)
                || ["_bucket", "_sum", "_count"].iter().any(|s| name.strip_suffix(s).is_some_and(is_histogram));
            assert!(is_known, "{name}: no such metric, in {query}");
        }
    }
}

#[test]
fn the_chart_brings_the_same_rules() {
    let chart = read("deploy/helm/phalanx/files/phalanx.rules.yml");
    assert!(chart == read("deploy/prometheus/phalanx.rules.yml"), "copy deploy/prometheus/phalanx.rules.yml there");
}

#[test]
fn alerts_point_to_sections_that_there_are() {
    let rules = read("deploy/prometheus/phalanx.rules.yml");
    let alerts = yaml_values(&rules, "alert");
    let runbooks = yaml_values(&rules, "runbook");
    assert_eq!(alerts.len(), runbooks.len(), "an alert without advice");
    assert_eq!(alerts.len(), yaml_values(&rules, "summary").len());
    for (alert, runbook) in alerts.iter().zip(runbooks) {
        let mut words = runbook.split([',', ';']).next().unwrap_or_default().split_whitespace();
        let file = words.next().unwrap_or_default();
        let section = behind(&runbook, '"').split('"').next().unwrap_or_default();
        let docs = read(file);
        let has_section = docs.lines().any(|l| l.starts_with('#') && l.trim_start_matches('#').trim() == section);
        assert!(has_section, "{alert}: {file} has no section {section:?}");
    }
}

/// Options of a program without their dashes, and the variables that stand for them.
struct Options {
    flags: BTreeSet<String>,
    variables: BTreeSet<String>,
}

fn options(source: &str) -> Options {
    let text = read(source);
    let mut options = Options { flags: BTreeSet::new(), variables: BTreeSet::new() };
    for piece in text.split("#[arg(").skip(1) {
        let Some((attribute, rest)) = piece.split_once(")]") else { continue };
        let variable = attribute.split_once("env = \"").and_then(|(_, rest)| rest.split('"').next());
        options.variables.extend(variable.map(str::to_owned));
        let mut lines = rest.lines().map(str::trim);
        let field = lines.find_map(|l| l.strip_prefix("pub ").or_else(|| l.strip_prefix("pub(super) ")));
        if attribute.contains("long")
            && let Some((name, _)) = field.and_then(|f| f.split_once(':'))
        {
            options.flags.insert(name.replace('_', "-"));
        }
    }
    options
}

/// Variables that a text names.
fn variables(text: &str) -> impl Iterator<Item = String> {
    let names = text.split("PHALANX_").skip(1).map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(rest.len());
        &rest[..end]
    });
    names.filter(|name| !name.is_empty()).map(|name| format!("PHALANX_{name}"))
}

#[test]
fn options_are_those_of_the_programs() {
    let mut coordinator = options("coordinator/src/config/flags.rs");
    let mut shard = options("shard/src/config/flags.rs");
    // Of its log, which has no option.
    shard.variables.insert("PHALANX_LOG".to_owned());
    let source = read("coordinator/src/config/gathered.rs");
    let (_, others) = source.split_once("OTHER_VARIABLES").expect("the list of variables that are no options");
    coordinator.variables.extend(variables(others.split(';').next().unwrap_or_default()));
    assert!(coordinator.flags.contains("tensor-parallel-size") && shard.flags.contains("leave-timeout"));
    let all = Options {
        flags: coordinator.flags.union(&shard.flags).cloned().collect(),
        variables: coordinator.variables.union(&shard.variables).cloned().collect(),
    };
    let mut n_flags = 0;
    for (path, text) in deployed() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A coordinator ends at once if there is a variable that it does not know.
        let known = match &*name {
            name if name.starts_with("coordinator") => &coordinator,
            name if name.starts_with("shard") => &shard,
            _ => &all,
        };
        for variable in variables(&text) {
            assert!(known.variables.contains(&variable), "{}: {variable}", path.display());
        }
        // Arguments in lists: each has its line.
        for line in text.lines() {
            let item = line.trim_start().trim_start_matches("- ").trim_start_matches(['"', '\'']);
            let Some(flag) = item.strip_prefix("--").map(|f| f.split(|c| !is_flag(c)).next().unwrap_or_default())
            else {
                continue;
            };
            if !flag.is_empty() && line.trim_start().starts_with("- ") {
                n_flags += 1;
                assert!(known.flags.contains(flag), "{}: --{flag}", path.display());
            }
        }
    }
    assert!(n_flags > 20, "{n_flags} options");
}

fn is_flag(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'
}

#[test]
fn shards_have_time_to_leave() {
    let flags = read("shard/src/config/flags.rs");
    let (_, default) = flags.rsplit_once("leave_timeout: ").expect("a default");
    let default: u32 = default.split(',').next().unwrap_or_default().parse().expect("seconds");
    let unit = read("deploy/systemd/phalanx-shard.service");
    let given = unit.lines().find_map(|l| l.strip_prefix("TimeoutStopSec=")).expect("a limit");
    assert!(given.parse::<u32>().expect("seconds") > default);
}
