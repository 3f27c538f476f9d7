//! The process in which grammars are tried.

use std::{path::PathBuf, process::Stdio, time::Duration};

use phalanx_cluster::grammar::{Grammar, GrammarError, MAX_BYTES};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::Mutex,
    time::timeout,
};

use super::{
    Refusal, Verdict,
    trial::{self, Answer, COMMAND, Question, TOO_LONG},
};

/// Longest wait for the process to look at the vocabulary.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a trial. It says nothing about the grammar: the process bounds its own time, and gives way to others.
const TRIAL_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for other trials.
const TURN_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait for the end of a process that has closed its output.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Starts the process when it is needed, and again when it was killed.
pub struct TrialProcess {
    /// Where it takes the tokenizer from.
    path: PathBuf,
    running: Mutex<Option<Running>>,
}

struct Running {
    questions: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// Dies with this.
    child: Child,
}

impl TrialProcess {
    pub fn new(path: PathBuf) -> Self {
        Self { path, running: Mutex::new(None) }
    }

    /// Tries a grammar. One at a time: nobody gets more than a part of one processor by sending many.
    pub async fn try_out(&self, grammar: &Grammar) -> Verdict {
        if grammar.text().len() > MAX_BYTES {
            return Err(Refusal::OfGrammar(GrammarError::TooLong { got: grammar.text().len() }.to_string()));
        }
        let turn = timeout(TURN_LIMIT, self.running.lock()).await;
        let mut slot = turn.map_err(|_| Refusal::Busy(format!("others took {} s", TURN_LIMIT.as_secs())))?;
        // Taken out: whoever gives up in the middle leaves no process behind that answers somebody else's question.
        let mut running = match slot.take() {
            Some(running) => running,
            None => self.start().await?,
        };
        match timeout(TRIAL_LIMIT, running.ask(grammar)).await {
            Ok(Ok(answer)) => {
                *slot = Some(running);
                answer.refused.map_or(Ok(()), |reason| Err(Refusal::OfGrammar(reason)))
            }
            Ok(Err(error)) => {
                let reason = running.last_words().await;
                tracing::warn!(%error, reason, "a grammar ended the process that tried it");
                Err(Refusal::OfGrammar(reason))
            }
            // Whether it is a good one is not known.
            Err(_) => Err(Refusal::Busy(format!("it was not tried within {} s", TRIAL_LIMIT.as_secs()))),
        }
    }

    async fn start(&self) -> Result<Running, Refusal> {
        let busy = |error: String| {
            tracing::error!(error, "the process that tries grammars can't be started");
            Refusal::Busy("the server's log says why".to_owned())
        };
        // This very program, also when its file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).arg(&self.path).process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|error| busy(error.to_string()))?;
        let (Some(questions), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(busy("it has no pipes".to_owned()));
        };
        let mut running = Running { questions, answers: BufReader::new(answers).lines(), child };
        match timeout(START_LIMIT, running.answer()).await {
            Ok(Ok(_)) => Ok(running),
            Ok(Err(error)) => Err(busy(error.to_string())),
            Err(_) => Err(busy(format!("not ready within {} s", START_LIMIT.as_secs()))),
        }
    }
}

impl Running {
    async fn ask(&mut self, grammar: &Grammar) -> anyhow::Result<Answer> {
        let mut line = serde_json::to_vec(&Question::from(grammar))?;
        line.push(b'\n');
        self.questions.write_all(&line).await?;
        self.questions.flush().await?;
        self.answer().await
    }

    /// What a grammar did to the process, which has closed its output.
    async fn last_words(&mut self) -> String {
        let status = timeout(END_LIMIT, self.child.wait()).await.ok().and_then(Result::ok);
        match status.and_then(|status| status.code()) {
            Some(code) if code == i32::from(TOO_LONG) => {
                let limit = trial::TRIAL_LIMIT.as_millis();
                format!("takes more than {limit} ms of processor time to compile: make it simpler")
            }
            _ => "makes the compiler crash, or takes too much memory: make it simpler".to_owned(),
        }
    }

    async fn answer(&mut self) -> anyhow::Result<Answer> {
        let line = self.answers.next_line().await?;
        Ok(serde_json::from_str(&line.ok_or_else(|| anyhow::anyhow!("it has ended"))?)?)
    }
}
