//! What the grammars of sequences allow next. Rank 0 alone knows: it has whole rows of logits.
//!
//! Compiling takes threads of its own; a mask is computed by one of them while the device computes the row that it is for.
//! A mask that nobody has begun yet when the row is there is computed by whoever wants it.

use std::{
    collections::VecDeque,
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use phalanx_cluster::{
    checkpoint::Checkpoint,
    grammar::{
        Automaton, Compiler, Grammar, GrammarError, Limits, Mask, STACK_BYTES, Thinking, ThoughtLimit, ThoughtPlace,
    },
    tokenizer::Tokenizer,
};
use phalanx_proto::v1::{self, grammar::Text, thought_limit::Place};

use crate::background::Share;

/// Threads that compile grammars and compute masks ahead: as many as processors, within these bounds.
const N_THREADS: RangeInclusive<usize> = 2..=4;
/// Compiled grammars that are kept for the next sequences.
const KEPT_AUTOMATA: usize = 32;

/// Why a sequence's grammar can't be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is this grammar's fault.
    #[error("{0}")]
    OfGrammar(GrammarError),
    /// This shard can't follow any.
    #[error("this shard can't follow grammars: {0}")]
    OfShard(String),
}

/// Makes the compiler of a model's vocabulary.
type MakeCompiler = Box<dyn Fn() -> Result<Compiler, GrammarError> + Send + Sync>;

/// Everything that sequences under grammars share: the model's vocabulary, compiled grammars, threads. Dropping it ends
/// the threads.
pub struct Grammars {
    shared: Arc<Shared>,
    queue: Option<mpsc::Sender<Arc<Followed>>>,
    /// Whether the vocabulary is looked at, or was.
    is_read: AtomicBool,
}

struct Shared {
    make: MakeCompiler,
    compiler: OnceLock<Result<Compiler, GrammarError>>,
    /// The latest ones last.
    compiled: Mutex<VecDeque<(Arc<v1::Grammar>, Automaton)>>,
}

/// A sequence's place in its grammar.
pub struct Followed {
    state: Mutex<State>,
    begun: Condvar,
}

enum State {
    /// Not compiled yet; with the output so far.
    New(Arc<v1::Grammar>, Vec<u32>),
    Begun {
        bounds: Box<Bounds>,
        /// Tokens that these have not taken yet.
        pending: Vec<u32>,
        allowed: Option<Allowed>,
    },
    Failed(Refusal),
}

/// What an output has to follow.
struct Bounds {
    automaton: Option<Automaton>,
    /// End-of-sequence tokens that are held back while there is anything else.
    held_back: Vec<u32>,
    thinking: Option<Thinking>,
}

/// What may come next.
#[derive(Debug, Clone, PartialEq)]
enum Allowed {
    All,
    Some(Mask),
}

impl Bounds {
    fn push(&mut self, token: u32) -> Result<(), GrammarError> {
        if let Some(thinking) = &mut self.thinking {
            thinking.push(token);
        }
        self.automaton.as_mut().map_or(Ok(()), |automaton| automaton.advance(token))
    }

    fn allowed(&mut self) -> Result<Allowed, GrammarError> {
        let required = self.thinking.as_ref().and_then(Thinking::required).map(Mask::only);
        let Some(automaton) = &mut self.automaton else {
            return Ok(required.map_or(Allowed::All, Allowed::Some));
        };
        let mut mask = automaton.mask()?;
        if !self.held_back.is_empty() && mask.has_other_than(&self.held_back) {
            mask.remove(&self.held_back);
        }
        // A thought ends where the grammar lets it.
        Ok(Allowed::Some(required.filter(|required| mask.has_all_of(required)).unwrap_or(mask)))
    }
}

impl Grammars {
    /// For a model.
    pub fn of_model(checkpoint: Arc<dyn Checkpoint>) -> Self {
        Self::new(Box::new(move || Compiler::new(&tokenizer_of(checkpoint.as_ref())?, Limits::default())))
    }

    fn new(make: MakeCompiler) -> Self {
        let shared = Arc::new(Shared { make, compiler: OnceLock::new(), compiled: Mutex::default() });
        let (queue, jobs) = mpsc::channel();
        let jobs = Arc::new(Mutex::new(jobs));
        let mut has_thread = false;
        let n_cores = thread::available_parallelism().map_or(1, usize::from);
        for idx in 0..n_cores.clamp(*N_THREADS.start(), *N_THREADS.end()) {
            let (shared, jobs) = (Arc::clone(&shared), Arc::clone(&jobs));
            let builder = thread::Builder::new().name(format!("grammar-{idx}")).stack_size(STACK_BYTES);
            match builder.spawn(move || serve(&shared, &jobs)) {
                Ok(_) => has_thread = true,
                Err(error) => tracing::error!(%error, "can't start a thread for grammars"),
            }
        }
        let queue = has_thread.then_some(queue);
        Self { shared, queue, is_read: AtomicBool::new(false) }
    }

    /// Has a thread look at the vocabulary, once. It takes some tenths of a second, of idle processors only: sequences that need no
    /// grammar don't wait for those that might come. A sequence that needs it meanwhile has it looked at too.
    pub fn read_vocabulary(&self) {
        if self.is_read.swap(true, Ordering::Relaxed) {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let read = move || {
            Share::Leftovers.bind();
            // Why not, if not, is told to each sequence that needs it.
            if let Ok(made) = catch_unwind(AssertUnwindSafe(|| (shared.make)())) {
                let _made_meanwhile = shared.compiler.set(made);
            }
        };
        if let Err(error) = thread::Builder::new().name("vocabulary".to_owned()).stack_size(STACK_BYTES).spawn(read) {
            tracing::warn!(%error, "no thread looks at the vocabulary before it is needed");
        }
    }

    /// A sequence that is to follow a grammar; `output` is what there is of it.
    pub fn begin(&self, grammar: &Arc<v1::Grammar>, output: &[u32]) -> Arc<Followed> {
        let state = match self.queue {
            Some(_) => State::New(Arc::clone(grammar), output.to_vec()),
            None => State::Failed(Refusal::OfShard("it has no threads for them".to_owned())),
        };
        let followed = Arc::new(Followed { state: Mutex::new(state), begun: Condvar::new() });
        self.send(&followed);
        followed
    }

    /// Tells a sequence's next token; what follows it is found out meanwhile.
    pub fn push(&self, followed: &Arc<Followed>, token: u32) {
        match &mut *followed.lock() {
            State::New(_, output) => output.push(token),
            State::Begun { pending, allowed, .. } => {
                pending.push(token);
                *allowed = None;
            }
            State::Failed(_) => return,
        }
        self.send(followed);
    }

    /// Has the mask of a sequence computed.
    fn send(&self, followed: &Arc<Followed>) {
        if let Some(queue) = &self.queue {
            // The threads end when the queue does, not before.
            let _ = queue.send(Arc::clone(followed));
        }
    }
}

impl Followed {
    /// Of a sequence on a shard that can't follow any grammar.
    pub fn refused(reason: &str) -> Arc<Self> {
        let state = State::Failed(Refusal::OfShard(reason.to_owned()));
        Arc::new(Self { state: Mutex::new(state), begun: Condvar::new() })
    }

    /// What may come next; `None` is everything.
    ///
    /// # Errors
    /// If the grammar can't be followed.
    pub fn mask(&self) -> Result<Option<Mask>, Refusal> {
        let mut state = self.lock();
        while let State::New(..) = *state {
            state = self.begun.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        advance(&mut state);
        match &*state {
            State::Begun { allowed: Some(Allowed::All), .. } => Ok(None),
            State::Begun { allowed: Some(Allowed::Some(mask)), .. } => Ok(Some(mask.clone())),
            State::Failed(refusal) => Err(refusal.clone()),
            // `advance` leaves a mask or a refusal.
            State::Begun { .. } | State::New(..) => Err(Refusal::OfShard("no mask was computed".to_owned())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Who panics with it has marked the sequence as failed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compiles if need be, takes pending tokens, computes the mask.
    fn work(&self, shared: &Shared) {
        let mut state = self.lock();
        if let State::New(grammar, output) = &mut *state {
            let (grammar, output) = (Arc::clone(grammar), std::mem::take(output));
            let begun = catch_unwind(AssertUnwindSafe(|| shared.begin(&grammar, output)));
            *state = begun.unwrap_or_else(|_| Err(panicked())).unwrap_or_else(State::Failed);
            self.begun.notify_all();
        }
        advance(&mut state);
    }
}

/// Takes pending tokens and finds out what may come next, if it is not known.
fn advance(state: &mut State) {
    let State::Begun { bounds, pending, allowed } = state else { return };
    if allowed.is_some() {
        return;
    }
    let work = || -> Result<Allowed, GrammarError> {
        pending.drain(..).try_for_each(|token| bounds.push(token))?;
        bounds.allowed()
    };
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(found)) => *allowed = Some(found),
        Ok(Err(error)) => *state = State::Failed(Refusal::OfGrammar(error)),
        Err(_) => *state = State::Failed(panicked()),
    }
}

fn panicked() -> Refusal {
    Refusal::OfGrammar(GrammarError::Stuck("the grammar engine panicked; see the shard's log".to_owned()))
}

impl Shared {
    fn compiler(&self) -> Result<&Compiler, Refusal> {
        let made = self.compiler.get_or_init(|| (self.make)());
        made.as_ref().map_err(|error| Refusal::OfShard(error.to_string()))
    }

    fn begin(&self, grammar: &Arc<v1::Grammar>, output: Vec<u32>) -> Result<State, Refusal> {
        let compiler = self.compiler()?;
        if compiler.fingerprint() != grammar.vocabulary {
            return Err(Refusal::OfShard("its model's vocabulary is not the coordinator's".to_owned()));
        }
        let limit = grammar.thoughts.as_ref().map(limit_of_wire).transpose()?;
        let automaton = match (&grammar.text, &limit) {
            (None, Some(_)) => None,
            _ => Some(self.automaton(compiler, grammar)?),
        };
        let held_back = if grammar.ignore_eos { compiler.eos().to_vec() } else { Vec::new() };
        let thinking = limit.map(|limit| Thinking::new(Arc::new(limit), compiler.vocabulary()));
        let bounds = Box::new(Bounds { automaton, held_back, thinking });
        Ok(State::Begun { bounds, pending: output, allowed: None })
    }

    /// The grammar before the first token.
    fn automaton(&self, compiler: &Compiler, grammar: &Arc<v1::Grammar>) -> Result<Automaton, Refusal> {
        let kept = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, automaton)) = kept().iter().find(|(known, _)| known.text == grammar.text) {
            return Ok(automaton.copy());
        }
        let automaton = compiler.compile(&of_wire(grammar)?).map_err(Refusal::OfGrammar)?;
        let mut kept = kept();
        if kept.len() == KEPT_AUTOMATA {
            kept.pop_front();
        }
        kept.push_back((Arc::clone(grammar), automaton.copy()));
        Ok(automaton)
    }
}

fn of_wire(grammar: &v1::Grammar) -> Result<Grammar, Refusal> {
    match grammar.text.clone() {
        Some(Text::JsonSchema(text)) => Ok(Grammar::JsonSchema(text)),
        Some(Text::Regex(text)) => Ok(Grammar::Regex(text)),
        Some(Text::Lark(text)) => Ok(Grammar::Lark(text)),
        None => Err(Refusal::OfShard("the plan has a grammar of a kind that is not known here".to_owned())),
    }
}

fn limit_of_wire(limit: &v1::ThoughtLimit) -> Result<ThoughtLimit, Refusal> {
    let place = match limit.place() {
        Place::Begun => ThoughtPlace::Begun,
        Place::First => ThoughtPlace::First,
        Place::Anywhere => ThoughtPlace::Anywhere,
        Place::Unspecified => {
            return Err(Refusal::OfShard("the plan limits thoughts in a way that is not known here".to_owned()));
        }
    };
    let v1::ThoughtLimit { tokens, opens, closes, end, end_again, .. } = limit.clone();
    Ok(ThoughtLimit { tokens, opens, closes, place, end, end_again })
}

fn serve(shared: &Shared, queue: &Mutex<mpsc::Receiver<Arc<Followed>>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(followed) => followed.work(shared),
            Err(mpsc::RecvError) => return,
        }
    }
}

/// The tokenizer that lies in the checkpoint, or beside it.
fn tokenizer_of(checkpoint: &dyn Checkpoint) -> Result<Tokenizer, GrammarError> {
    let wrong = |error: String| GrammarError::Vocabulary(error);
    let path: &Path = checkpoint.path();
    match checkpoint.tokenizer().map_err(|error| wrong(error.to_string()))? {
        Some(gguf) => Tokenizer::from_gguf(&gguf).map_err(|error| wrong(error.to_string())),
        None => Tokenizer::from_folder(path).map_err(|error| wrong(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/arch-tokenizer"));
        Tokenizer::from_folder(folder).expect("a good tokenizer")
    }

    fn grammars() -> Grammars {
        Grammars::new(Box::new(|| Compiler::new(&tokenizer(), Limits::default())))
    }

    fn regex(text: &str) -> v1::Grammar {
        let vocabulary = phalanx_cluster::grammar::fingerprint(&tokenizer());
        v1::Grammar { text: Some(Text::Regex(text.to_owned())), vocabulary, ..v1::Grammar::default() }
    }

    fn token(text: &str) -> u32 {
        let ids = tokenizer().encode(text, false).expect("text");
        assert_eq!(ids.len(), 1, "{text:?} is one token");
        ids[0]
    }

    #[test]
    fn a_replayed_sequence_is_where_it_was() {
        let grammars = grammars();
        let grammar = Arc::new(regex("ab[ab]c"));
        let first = grammars.begin(&grammar, &[]);
        let (a, b) = (token("a"), token("b"));
        for token in [a, b, a] {
            assert!(first.mask().expect("a good grammar").expect("a mask").allows(token));
            grammars.push(&first, token);
        }
        let again = grammars.begin(&grammar, &[a, b]);
        grammars.push(&again, a);
        let mask = again.mask().expect("a good grammar").expect("a mask");
        assert_eq!(Some(&mask), first.mask().expect("a good grammar").as_ref());
        assert!(mask.allows(token("c")) && !mask.allows(a));
    }

    #[test]
    fn the_end_is_held_back_while_there_is_anything_else() {
        let grammars = grammars();
        let held_back = Arc::new(v1::Grammar { ignore_eos: true, ..regex("aa?") });
        let end = tokenizer().eos_ids()[0];
        let a = token("a");
        for (grammar, is_held_back) in [(held_back, true), (Arc::new(regex("aa?")), false)] {
            let followed = grammars.begin(&grammar, &[a]);
            let mask = followed.mask().expect("a good grammar").expect("a mask");
            assert_eq!((mask.allows(a), mask.allows(end)), (true, !is_held_back));
            grammars.push(&followed, a);
            let mask = followed.mask().expect("a good grammar").expect("a mask");
            assert_eq!((mask.allows(a), mask.allows(end)), (false, true));
        }
    }

    fn limit(tokens: u32) -> v1::ThoughtLimit {
        v1::ThoughtLimit {
            tokens,
            place: Place::Begun.into(),
            opens: vec!["<think>".to_owned()],
            closes: vec!["</think>".to_owned()],
            end: tokenizer().encode("</think>", false).expect("text"),
            end_again: Vec::new(),
        }
    }

    #[test]
    fn a_thought_ends_with_or_without_a_grammar() {
        let grammars = grammars();
        let end = limit(0).end;
        for text in ["(?s:.*)", r"x+</think>\n?yes", r"[a-z]*</think>[0-9]"] {
            let bound = Arc::new(v1::Grammar { thoughts: Some(limit(3)), ..regex(text) });
            let free = Arc::new(v1::Grammar { text: None, ..v1::Grammar::clone(&bound) });
            let x = token("x");
            for grammar in [bound, free] {
                let followed = grammars.begin(&grammar, &[x]);
                for token in [x, x].into_iter().chain(end.iter().copied()) {
                    let mask = followed.mask().expect("a good grammar");
                    if token == x {
                        assert!(mask.is_none_or(|mask| mask.allows(x) && mask.has_other_than(&[x])));
                    } else {
                        assert_eq!(mask, Some(Mask::only(token)), "{text}");
                    }
                    grammars.push(&followed, token);
                }
                let behind = followed.mask().expect("a good grammar");
                assert_eq!(behind.is_none(), grammar.text.is_none());
                let replayed: Vec<u32> = [x; 3].into_iter().chain(end[..1].iter().copied()).collect();
                let again = grammars.begin(&grammar, &replayed).mask().expect("a good grammar");
                assert_eq!(again, Some(Mask::only(end[1])), "{text}");
            }
        }
        // What a grammar wants is stronger.
        let digits = Arc::new(v1::Grammar { thoughts: Some(limit(0)), ..regex("[0-9]{2}</think>") });
        let mask = grammars.begin(&digits, &[]).mask().expect("a good grammar").expect("a mask");
        assert!(mask.allows(token("1")) && !mask.allows(end[0]));
    }

    #[test]
    fn what_cant_be_followed_ends_its_own_sequence() {
        let grammars = grammars();
        let strayed = grammars.begin(&Arc::new(regex("b+")), &[token("a")]);
        assert!(matches!(strayed.mask(), Err(Refusal::OfGrammar(GrammarError::Stuck(_)))));
        grammars.push(&strayed, token("b"));
        assert!(strayed.mask().is_err(), "for good");
        let wrong = grammars.begin(&Arc::new(regex("(b")), &[]);
        assert!(matches!(wrong.mask(), Err(Refusal::OfGrammar(GrammarError::Refused(_)))));
        let other = grammars.begin(&Arc::new(v1::Grammar { vocabulary: 7, ..regex("b") }), &[]);
        assert!(matches!(other.mask(), Err(Refusal::OfShard(_))));
        let unknown = grammars.begin(&Arc::new(v1::Grammar { text: None, ..regex("b") }), &[]);
        assert!(matches!(unknown.mask(), Err(Refusal::OfShard(_))));
        assert!(grammars.begin(&Arc::new(regex("b+")), &[]).mask().is_ok(), "others go on");
    }

    #[test]
    fn a_model_without_an_end_follows_none() {
        let grammars = Grammars::new(Box::new(|| Err(GrammarError::NoEnd)));
        assert!(matches!(grammars.begin(&Arc::new(regex("b+")), &[]).mask(), Err(Refusal::OfShard(_))));
    }
}
