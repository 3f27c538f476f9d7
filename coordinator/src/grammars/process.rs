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
    trial::{Answer, COMMAND, Question},
};

/// Longest wait for the process to look at the vocabulary.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Longest that a trial may take. Much more than compiling may: the process gives way to others.
const TRIAL_LIMIT: Duration = Duration::from_secs(3);
/// Longest wait for other trials.
const TURN_LIMIT: Duration = Duration::from_secs(10);

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
    _child: Child,
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
                tracing::warn!(%error, "a grammar ended the process that tried it");
                Err(Refusal::OfGrammar(
                    "makes the compiler crash, or takes too much memory: make it simpler".to_owned(),
                ))
            }
            Err(_) => {
                let reason = format!("takes more than {} s to compile: make it simpler", TRIAL_LIMIT.as_secs());
                Err(Refusal::OfGrammar(reason))
            }
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
        let mut running = Running { questions, answers: BufReader::new(answers).lines(), _child: child };
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

    async fn answer(&mut self) -> anyhow::Result<Answer> {
        let line = self.answers.next_line().await?;
        Ok(serde_json::from_str(&line.ok_or_else(|| anyhow::anyhow!("it has ended"))?)?)
    }
}
