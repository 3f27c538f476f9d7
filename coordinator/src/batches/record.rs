//! A batch: what clients see of it, how it goes from one status to the next, and what else is remembered.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::files::FilesError;
use crate::batch::input::Looked;

/// Batches of one key, or of all who have none, that are not over.
pub const MOST_UNFINISHED: usize = 1000;
/// Most lines of a batch.
pub const MOST_LINES: usize = 50_000;

/// What a batch is made of.
#[derive(Debug, Clone)]
pub struct NewBatch {
    /// Its name, if it must not be made twice.
    pub id: Option<String>,
    /// Where its lines are.
    pub input_file_id: String,
    /// Where they go.
    pub endpoint: String,
    /// How long it may take, as it was asked for.
    pub completion_window: String,
    /// The same in seconds.
    pub window_seconds: u64,
    /// Labels.
    pub metadata: Option<Map<String, Value>>,
    /// How long its results are kept.
    pub results_kept_seconds: u64,
}

/// Why something can't be done with a batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// There is none of this id, or it is somebody else's.
    #[error("no such batch")]
    Unknown,
    /// Its input is not there, or somebody else's.
    #[error("no such file")]
    UnknownFile,
    /// Its input is something else.
    #[error("the file's purpose is {0}, and must be batch")]
    WrongPurpose(String),
    /// There are enough of them.
    #[error("{MOST_UNFINISHED} batches are not over yet: wait for one, or cancel one")]
    TooMany,
    /// It is too late.
    #[error("the batch is over already")]
    Over,
    /// Files say no.
    #[error(transparent)]
    Files(#[from] FilesError),
}

/// Where a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its file is looked through, or waits for that.
    Validating,
    /// Its file can't be used.
    Failed,
    /// Its lines are asked for.
    InProgress,
    /// Its results become files.
    Finalizing,
    /// All is done.
    Completed,
    /// Its time was over before.
    Expired,
    /// It is about to end.
    Cancelling,
    /// It was ended.
    Cancelled,
}

impl Status {
    /// Ends that there are, as metrics spell them.
    pub const ENDS: [(Self, &'static str); 4] = [
        (Self::Failed, "failed"),
        (Self::Completed, "completed"),
        (Self::Expired, "expired"),
        (Self::Cancelled, "cancelled"),
    ];

    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        Self::ENDS.iter().any(|(end, _)| *end == self)
    }
}

/// Lines by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// In the file.
    pub total: usize,
    /// That have what they asked for.
    pub completed: usize,
    /// That have not.
    pub failed: usize,
}

/// Why a file can't be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errors {
    object: String,
    /// The first ones.
    pub data: Vec<LineError>,
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineError {
    /// What programs look at.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// The field, if one is wrong.
    pub param: Option<String>,
    /// The line, if one is wrong.
    pub line: Option<usize>,
}

/// A batch as OpenAI shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Nobody can guess it.
    pub id: String,
    /// `batch`.
    pub object: String,
    /// Where its lines go.
    pub endpoint: String,
    /// Why it failed.
    pub errors: Option<Errors>,
    /// Where it comes from.
    pub input_file_id: String,
    /// How long it may take.
    pub completion_window: String,
    /// Where it is.
    pub status: Status,
    /// Results of lines that have what they asked for, once it is over and if there are any.
    pub output_file_id: Option<String>,
    /// Results of the others.
    pub error_file_id: Option<String>,
    /// When it was made.
    pub created_at: u64,
    /// When its file was found good.
    pub in_progress_at: Option<u64>,
    /// When its time is over.
    pub expires_at: u64,
    /// When its last line was done.
    pub finalizing_at: Option<u64>,
    /// When all was done.
    pub completed_at: Option<u64>,
    /// When its file was found bad.
    pub failed_at: Option<u64>,
    /// When it ended because its time was over.
    pub expired_at: Option<u64>,
    /// When somebody wanted its end.
    pub cancelling_at: Option<u64>,
    /// When that had come.
    pub cancelled_at: Option<u64>,
    /// Of its lines.
    pub request_counts: Counts,
    /// Labels of whoever made it.
    pub metadata: Option<Map<String, Value>>,
}

impl Batch {
    /// Made at that time; its file waits to be looked through.
    pub fn new(id: String, new: NewBatch, now: u64) -> Self {
        Self {
            id,
            object: "batch".to_owned(),
            endpoint: new.endpoint,
            errors: None,
            input_file_id: new.input_file_id,
            completion_window: new.completion_window,
            status: Status::Validating,
            output_file_id: None,
            error_file_id: None,
            created_at: now,
            in_progress_at: None,
            expires_at: now.saturating_add(new.window_seconds),
            finalizing_at: None,
            completed_at: None,
            failed_at: None,
            expired_at: None,
            cancelling_at: None,
            cancelled_at: None,
            request_counts: Counts::default(),
            metadata: new.metadata,
        }
    }

    /// Goes on to a status, at that time.
    pub fn move_to(&mut self, status: Status, now: u64) {
        let at = match status {
            Status::Validating => None,
            Status::Failed => Some(&mut self.failed_at),
            Status::InProgress => Some(&mut self.in_progress_at),
            Status::Finalizing => Some(&mut self.finalizing_at),
            Status::Completed => Some(&mut self.completed_at),
            Status::Expired => Some(&mut self.expired_at),
            Status::Cancelling => Some(&mut self.cancelling_at),
            Status::Cancelled => Some(&mut self.cancelled_at),
        };
        self.status = status;
        if let Some(at) = at {
            *at = Some(now);
        }
    }

    /// Takes in what a look at its file has found: it is in progress then, or has failed.
    pub fn judge(&mut self, looked: &Looked, now: u64) {
        let data = faults(looked, &self.endpoint);
        self.request_counts = Counts { total: looked.n_lines, ..Counts::default() };
        if data.is_empty() {
            return self.move_to(Status::InProgress, now);
        }
        self.errors = Some(Errors { object: "list".to_owned(), data });
        self.move_to(Status::Failed, now);
    }

    /// Its file could not be read.
    pub fn fail(&mut self, code: &str, message: String, now: u64) {
        let data = vec![LineError { code: code.to_owned(), message, param: None, line: None }];
        self.errors = Some(Errors { object: "list".to_owned(), data });
        self.move_to(Status::Failed, now);
    }
}

/// What is wrong with a file.
fn faults(looked: &Looked, endpoint: &str) -> Vec<LineError> {
    let whole = |code: &str, message: String| LineError { code: code.to_owned(), message, param: None, line: None };
    if looked.n_lines == 0 {
        return vec![whole("empty_file", "the file has no lines".to_owned())];
    }
    if looked.n_lines > MOST_LINES {
        let message = format!("the file has {} lines, at most {MOST_LINES} are possible: make several", looked.n_lines);
        return vec![whole("too_many_lines", message)];
    }
    let bad = looked.bad.iter().map(|bad| LineError {
        code: bad.error.code().unwrap_or("invalid_line").to_owned(),
        message: bad.error.message().to_owned(),
        param: bad.error.param().map(str::to_owned),
        line: Some(bad.number),
    });
    let doubles = looked.doubles.iter().map(|(_, [first, second])| LineError {
        code: "duplicate_custom_id".to_owned(),
        message: format!("has the custom_id of line {first}: give each line its own"),
        param: Some("custom_id".to_owned()),
        line: Some(*second),
    });
    let elsewhere = looked.urls.iter().filter(|url| **url != endpoint).map(|url| LineError {
        code: "mismatched_endpoint".to_owned(),
        message: format!("a line goes to {url}, and the batch to {endpoint}: make a batch for each"),
        param: Some("url".to_owned()),
        line: None,
    });
    bad.chain(doubles).chain(elsewhere).collect()
}

/// A batch as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// What clients see.
    pub batch: Batch,
    /// Name of the key whose it is; `None` where everybody may ask.
    pub owner: Option<String>,
    /// What its results are called, before clients see them.
    pub output: String,
    /// The same of what went wrong.
    pub error: String,
    /// How long its results are kept, from their end on.
    pub results_kept_seconds: u64,
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::batch::input::look;

    fn batch() -> Batch {
        let new = NewBatch {
            id: None,
            input_file_id: "file-1".to_owned(),
            endpoint: "/v1/completions".to_owned(),
            completion_window: "24h".to_owned(),
            window_seconds: 24 * 3600,
            metadata: None,
            results_kept_seconds: 1,
        };
        Batch::new("batch_1".to_owned(), new, 1)
    }

    fn judged(text: &str) -> Batch {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        fs::write(&path, text).unwrap();
        let mut batch = batch();
        batch.judge(&look(&path).unwrap(), 5);
        batch
    }

    fn line(id: &str, url: &str) -> String {
        format!(r#"{{"custom_id":"{id}","method":"POST","url":"{url}","body":{{}}}}"#) + "\n"
    }

    #[test]
    fn files_are_found_good_or_bad() {
        let good = judged(&[line("a", "/v1/completions"), line("b", "/v1/completions")].concat());
        assert_eq!((good.status, good.in_progress_at, good.request_counts.total), (Status::InProgress, Some(5), 2));
        for (text, code, at) in [
            (String::new(), "empty_file", None),
            ("nonsense".to_owned(), "invalid_json_line", Some(1)),
            (line("a", "/v1/completions").repeat(2), "duplicate_custom_id", Some(2)),
            (line("a", "/v1/responses"), "mismatched_endpoint", None),
            (line("a", "/v1/nothing"), "invalid_value", Some(1)),
            ((0..=MOST_LINES).map(|n| line(&n.to_string(), "/v1/completions")).collect(), "too_many_lines", None),
        ] {
            let bad = judged(&text);
            assert_eq!((bad.status, bad.failed_at), (Status::Failed, Some(5)), "{code}");
            let first = &bad.errors.unwrap().data[0];
            assert_eq!((first.code.as_str(), first.line), (code, at));
        }
    }

    #[test]
    fn statuses_are_spelt_as_openai_spells_them() {
        let spelt = |status: Status| serde_json::to_value(status).unwrap();
        assert_eq!(spelt(Status::InProgress), "in_progress");
        for (status, name) in Status::ENDS {
            assert_eq!(spelt(status), name);
        }
        assert!(!Status::Cancelling.is_over() && Status::Expired.is_over());
    }
}
