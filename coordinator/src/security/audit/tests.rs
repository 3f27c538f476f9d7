use std::{fs, path::Path};

use serde_json::Value;

use super::*;
use crate::guard::{Direction, Tally};

fn config(path: &Path, on_error: OnError) -> AuditConfig {
    AuditConfig { path: path.to_owned(), max_bytes: 1 << 20, keep: 2, on_error, content: true }
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn each_request_has_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let log = AuditLog::start(&config(&path, OnError::Refuse)).unwrap();
    let headers = [("x-phalanx-client", "10.0.0.7:1234")];
    let headers = headers.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect();
    let origin = Origin::new(&headers, "id-1".to_owned(), "POST", "/v1/completions");
    let account = Account::new(&log, log.ticket().await.unwrap(), origin);
    account.asked("m".to_owned(), 3);
    account.prompt(|| "a \"b\"\nc".to_owned());
    account.answered(1, "x", 1);
    account.answered(1, "y", 2);
    let tally = Tally::default();
    tally.found(Direction::Output, &["mail", "mail"]);
    account.close(Some("team".to_owned()), "200", Duration::from_millis(1500), &tally);
    let refused = Line::short(Origin::default(), None, "401", Duration::ZERO);
    log.ticket().await.unwrap().write(&refused);
    log.flush(LIMIT).await;
    let lines = lines(&path);
    assert_eq!(lines.len(), 2);
    let want = serde_json::json!({
        "time": lines[0]["time"], "key": "team", "request_id": "id-1", "client": "10.0.0.7:1234", "method": "POST",
        "route": "/v1/completions", "model": "m", "prompt_tokens": 3, "output_tokens": 3, "status": "200",
        "duration_ms": 1500, "output_matches": {"mail": 2}, "prompts": ["a \"b\"\nc"], "outputs": ["", "xy"],
    });
    assert_eq!(lines[0], want);
    assert!(lines[0]["time"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
    assert_eq!((&lines[1]["status"], &lines[1]["key"]), (&Value::from("401"), &Value::Null));
}

#[tokio::test]
async fn what_can_not_be_recorded_is_not_served() {
    let log = AuditLog::start(&config(Path::new("/dev/full"), OnError::Refuse)).unwrap();
    log.ticket().await.unwrap().write(&Line::short(Origin::default(), None, "200", Duration::ZERO));
    let refused = async {
        while log.ticket().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, refused).await.expect("the thread has tried to write");
    assert_eq!(log.check(), Err(NotRecorded));
}

#[tokio::test]
async fn who_says_so_serves_without_records() {
    let log = AuditLog::start(&config(Path::new("/dev/full"), OnError::Ignore)).unwrap();
    for _ in 0..3 {
        log.ticket().await.unwrap().write(&Line::short(Origin::default(), None, "200", Duration::ZERO));
        log.flush(LIMIT).await;
    }
    assert!(log.is_failing.load(Ordering::Relaxed) && log.check().is_ok());
}
