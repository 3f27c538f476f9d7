//! `coordinator grammar-trial TOKENIZER`: compiles grammars from its standard input, one JSON object a line, and says on its
//! standard output what is wrong with each. Started by a coordinator, ends with it.

use std::{
    ffi::OsString,
    io::{BufRead, Write},
    path::PathBuf,
    process::ExitCode,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow};
use phalanx_cluster::{
    checkpoint,
    grammar::{Compiler, Grammar, GrammarError, Limits, STACK_BYTES},
    tokenizer::Tokenizer,
};
use rustix::{
    process::{Resource, Rlimit, setrlimit},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};

/// Name of the command.
pub const COMMAND: &str = "grammar-trial";

/// Longest that compiling may take, in processor time: a shard does it while others wait for their next token.
const COMPILE_LIMIT: Duration = Duration::from_millis(200);
/// Processor time after which a trial is ended, whatever it is at. (Of the clock there is no bound that would not refuse good
/// grammars on a busy machine.)
pub(super) const TRIAL_LIMIT: Duration = Duration::from_millis(600);
/// Status with which the process ends then.
pub(super) const TOO_LONG: u8 = 3;
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Memory that the process may take.
const MEMORY_BYTES: u64 = 1 << 30;
/// How far the process stands back behind those that compute.
const NICENESS: i32 = 10;
/// Longest message about a grammar, in characters.
const LONGEST_REASON: usize = 500;

/// A line in.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Question {
    JsonSchema(String),
    Regex(String),
    Lark(String),
}

/// A line out.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    /// What is wrong; nothing, if nothing is.
    pub refused: Option<String>,
}

impl From<&Grammar> for Question {
    fn from(grammar: &Grammar) -> Self {
        match grammar.clone() {
            Grammar::JsonSchema(text) => Self::JsonSchema(text),
            Grammar::Regex(text) => Self::Regex(text),
            Grammar::Lark(text) => Self::Lark(text),
        }
    }
}

impl From<Question> for Grammar {
    fn from(question: Question) -> Self {
        match question {
            Question::JsonSchema(text) => Self::JsonSchema(text),
            Question::Regex(text) => Self::Regex(text),
            Question::Lark(text) => Self::Lark(text),
        }
    }
}

/// The command. The first of `args` is its name.
pub fn main_from(args: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(path) = args.skip(1).map(PathBuf::from).next() else {
        eprintln!("usage: coordinator {COMMAND} TOKENIZER (started by the coordinator itself)");
        return ExitCode::from(2);
    };
    match serve(path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{COMMAND}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(path: PathBuf) -> anyhow::Result<()> {
    let (sender, questions) = mpsc::channel();
    let (trial, watched) = mpsc::channel();
    thread::Builder::new().name("watch".to_owned()).spawn(move || watch(&watched))?;
    let compiling = move || -> anyhow::Result<()> {
        let compiler = open(path)?;
        bound()?;
        // Says that it is ready.
        answer(None)?;
        for question in questions {
            trial.send(Trial::Begins).map_err(|_| anyhow!("nobody watches"))?;
            let refused = refusal(&compiler, question);
            trial.send(Trial::IsOver).map_err(|_| anyhow!("nobody watches"))?;
            answer(refused)?;
        }
        Ok(())
    };
    let thread = thread::Builder::new().name("compile".to_owned()).stack_size(STACK_BYTES).spawn(move || {
        if let Err(error) = compiling() {
            eprintln!("{COMMAND}: {error:#}");
            std::process::exit(1);
        }
    })?;
    for line in std::io::stdin().lock().lines() {
        let question = serde_json::from_str::<Question>(&line?).context("a question is no JSON")?;
        sender.send(question).map_err(|_| anyhow!("the compiler has ended"))?;
    }
    // Whoever asked has gone: so does this process, whatever it is at.
    drop(thread);
    std::process::exit(0);
}

fn open(path: PathBuf) -> anyhow::Result<Compiler> {
    let embedded = if path.is_file() { checkpoint::open(&path)?.tokenizer()? } else { None };
    let tokenizer = match embedded {
        Some(gguf) => Tokenizer::from_gguf(&gguf)?,
        None => Tokenizer::from_folder(&path)?,
    };
    Ok(Compiler::new(&tokenizer, Limits::default())?)
}

/// Bounds the process's memory, and lets others go first.
fn bound() -> anyhow::Result<()> {
    let limit = Rlimit { current: Some(MEMORY_BYTES), maximum: Some(MEMORY_BYTES) };
    setrlimit(Resource::Data, limit).context("the memory can't be bounded")?;
    // Not everybody may, and it is no condition.
    let _ = rustix::process::nice(NICENESS);
    Ok(())
}

/// A trial begins, or is over.
enum Trial {
    Begins,
    IsOver,
}

/// Ends the process if a trial takes too long.
fn watch(trials: &mpsc::Receiver<Trial>) {
    while let Ok(Trial::Begins) = trials.recv() {
        let begun = process_time();
        while let Err(RecvTimeoutError::Timeout) = trials.recv_timeout(LOOK_EVERY) {
            if process_time().saturating_sub(begun) > TRIAL_LIMIT {
                std::process::exit(TOO_LONG.into());
            }
        }
    }
}

/// Processor time of the whole process.
fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn answer(refused: Option<String>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &Answer { refused })?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn refusal(compiler: &Compiler, question: Question) -> Option<String> {
    let begun = processor_time();
    let tried = try_out(compiler, &question.into());
    let took = processor_time().saturating_sub(begun);
    match tried {
        Err(error) => Some(error.to_string().chars().take(LONGEST_REASON).collect()),
        Ok(()) if took > COMPILE_LIMIT => Some(format!(
            "takes {} ms to compile, at most {} are possible: make it simpler",
            took.as_millis(),
            COMPILE_LIMIT.as_millis()
        )),
        Ok(()) => None,
    }
}

/// Of this thread, from the kernel's statistics: the first number is time on processors, in ns.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

/// Compiles a grammar and computes what may come first.
pub(super) fn try_out(compiler: &Compiler, grammar: &Grammar) -> Result<(), GrammarError> {
    compiler.compile(grammar)?.mask()?;
    Ok(())
}
