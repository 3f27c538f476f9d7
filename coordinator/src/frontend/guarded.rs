//! A request's events as its client may see them: texts without what the [guard](crate::guard) finds, parts of answers only
//! once the moderation webhook has allowed them. Here, and nowhere behind, texts of all APIs pass.
//!
//! What comes out depends on the tokens only, not on when they come: an event keeps its text, however long it is held back.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream::FuturesUnordered};

use super::generation::Events;
use crate::{
    guard::{
        Direction, Guard, Tally,
        moderation::{self, Moderation, Objection, Question},
        transducer::{Piece, Transducer},
    },
    request::{Finish, Output, RequestError, RequestEvent, Usage},
};

/// A streamed answer is asked about when so many bytes of it are new.
const SEGMENT: usize = 512;
/// So many bytes of what was allowed before are told with each part.
const OVERLAP: usize = 1024;

/// Who looks at a request's texts, and for whom.
#[derive(Clone, Default)]
pub struct Watch {
    /// What must not be said.
    pub guard: Option<Arc<Guard>>,
    /// Whether a text may pass.
    pub moderation: Option<Arc<Moderation>>,
    /// What was found.
    pub tally: Arc<Tally>,
    /// How the request is called where somebody is asked.
    pub asker: Asker,
    /// When somebody is asked.
    pub segments: Segments,
}

/// Whose text it is.
#[derive(Debug, Clone, Default)]
pub struct Asker {
    /// Name of the request.
    pub request_id: String,
    /// Name of its key.
    pub key: Option<String>,
    /// Its endpoint.
    pub route: String,
}

impl Asker {
    /// A question about one of its texts.
    pub fn question(&self, direction: Direction, index: usize, text: String) -> Question {
        let Self { request_id, key, route } = self.clone();
        Question { request_id, key, route, direction, index, text, before: String::new(), is_last: true }
    }
}

/// In which pieces answers are asked about.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Segments {
    /// As they grow.
    #[default]
    Growing,
    /// In one: they are sent whole.
    Whole,
}

impl Watch {
    /// Whether nobody looks.
    pub fn is_off(&self) -> bool {
        self.guard.is_none() && self.moderation.is_none()
    }
}

/// How a choice goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    /// Its last event has come, but perhaps not passed.
    Ended,
}

struct Choice {
    text: Option<Transducer>,
    stage: Stage,
    /// Events of which nobody was asked yet.
    new: Vec<Output>,
    /// Events of the part that is being asked about.
    asked: Option<Vec<Output>>,
    /// The end of what was allowed.
    before: String,
}

type Verdict = BoxFuture<'static, (usize, Result<(), Objection>)>;

/// A request's events behind its watch.
pub struct Guarded {
    events: Option<Events>,
    watch: Watch,
    choices: Vec<Choice>,
    verdicts: FuturesUnordered<Verdict>,
    ready: VecDeque<RequestEvent>,
    /// What is told if the request ends before the scheduler says so.
    usage: Usage,
    finished: Option<Usage>,
    prompt_idx: usize,
    /// Whether a choice was ended here.
    is_cut: bool,
}

impl Guarded {
    /// Of a prompt with so many tokens, which has so many choices.
    pub fn new(events: Events, watch: Watch, prompt_idx: usize, n_prompt: usize, n: u32) -> Self {
        let rules = watch.guard.as_ref().map(|guard| guard.rules());
        let choice = |_| Choice {
            text: rules.clone().map(Transducer::new),
            stage: Stage::Open,
            new: Vec::new(),
            asked: None,
            before: String::new(),
        };
        Self {
            events: Some(events),
            choices: (0..n).map(choice).collect(),
            watch,
            verdicts: FuturesUnordered::new(),
            ready: VecDeque::new(),
            usage: Usage { prompt_tokens: u32::try_from(n_prompt).unwrap_or(u32::MAX), ..Usage::default() },
            finished: None,
            prompt_idx,
            is_cut: false,
        }
    }

    fn take(&mut self, event: RequestEvent) {
        match event {
            RequestEvent::PromptScored(_) => self.ready.push_back(event),
            RequestEvent::Output(output) => self.output(output),
            RequestEvent::Finished(usage) => {
                self.finished = Some(usage);
                self.events = None;
            }
            RequestEvent::Failed(_) => self.fail(event),
        }
    }

    fn fail(&mut self, event: RequestEvent) {
        self.events = None;
        self.verdicts.clear();
        self.choices.clear();
        self.ready.push_back(event);
    }

    fn output(&mut self, mut output: Output) {
        let index = output.index as usize;
        let Some(choice) = self.choices.get_mut(index) else {
            let reason = format!("the scheduler made a choice {index}");
            return self.fail(RequestEvent::Failed(RequestError::Internal(reason)));
        };
        if choice.stage == Stage::Ended {
            return;
        }
        let n_tokens = u32::try_from(output.token_ids.len()).unwrap_or(u32::MAX);
        self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(n_tokens);
        if let Some(text) = &mut choice.text {
            let Piece { text: mut shown, mut found, mut blocked } = text.push(&output.text);
            if output.finish.is_some() && blocked.is_none() {
                let rest = text.finish();
                shown.push_str(&rest.text);
                found.extend(rest.found);
                blocked = rest.blocked;
            }
            if !found.is_empty() {
                self.watch.tally.found(Direction::Output, &found);
            }
            output.text = shown;
            if let Some(kind) = blocked {
                self.watch.tally.blocked(Direction::Output, kind);
                output.finish = Some(Finish::ContentFilter);
                self.is_cut = true;
            }
        }
        if output.finish.is_some() {
            choice.stage = Stage::Ended;
        }
        if self.watch.moderation.is_none() {
            self.ready.push_back(RequestEvent::Output(output));
        } else {
            choice.new.push(output);
            self.ask(index);
        }
        self.end_early();
    }

    /// Asks about what is new of a choice, if it is time and nothing is being asked.
    fn ask(&mut self, index: usize) {
        let Some(moderation) = &self.watch.moderation else { return };
        let Some(choice) = self.choices.get_mut(index) else { return };
        let is_whole = self.watch.segments == Segments::Whole;
        let waits = is_whole && choice.stage == Stage::Open;
        if choice.asked.is_some() || choice.new.is_empty() || waits {
            return;
        }
        // Parts are the same however fast their verdicts come.
        let mut n_bytes = 0;
        let full = choice.new.iter().position(|output| {
            n_bytes += output.text.len();
            !is_whole && n_bytes >= SEGMENT
        });
        let n_events = match (full, choice.stage) {
            (Some(last), _) => last + 1,
            (None, Stage::Ended) => choice.new.len(),
            (None, Stage::Open) => return,
        };
        let part: Vec<Output> = choice.new.drain(..n_events).collect();
        let is_last = choice.stage == Stage::Ended && choice.new.is_empty();
        let text: String = part.iter().map(|output| output.text.as_str()).collect();
        if text.is_empty() {
            self.ready.extend(part.into_iter().map(RequestEvent::Output));
            return;
        }
        choice.asked = Some(part);
        let question = Question {
            before: choice.before.clone(),
            is_last,
            ..self.watch.asker.question(Direction::Output, index, text)
        };
        let verdict = Arc::clone(moderation).ask(question).map(move |verdict| (index, verdict));
        self.verdicts.push(verdict.boxed());
    }

    fn judge(&mut self, index: usize, verdict: Result<(), Objection>) {
        let Some(choice) = self.choices.get_mut(index) else { return };
        let part = choice.asked.take().unwrap_or_default();
        match verdict {
            Ok(()) => {
                for output in part {
                    choice.before.push_str(&output.text);
                    self.ready.push_back(RequestEvent::Output(output));
                }
                let cut = choice.before.len().saturating_sub(OVERLAP);
                let cut = (cut..choice.before.len()).find(|at| choice.before.is_char_boundary(*at)).unwrap_or(0);
                choice.before.drain(..cut);
                self.ask(index);
            }
            Err(Objection::Refused(_)) => {
                choice.stage = Stage::Ended;
                choice.new.clear();
                self.is_cut = true;
                self.watch.tally.blocked(Direction::Output, moderation::BY);
                let finish = Some(Finish::ContentFilter);
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                self.ready.push_back(RequestEvent::Output(Output { index, finish, ..Output::default() }));
                self.end_early();
            }
            Err(Objection::Unknown) => self.fail(RequestEvent::Failed(RequestError::Unmoderated)),
        }
    }

    /// What nobody is going to be told need not be computed.
    fn end_early(&mut self) {
        let is_over = self.choices.iter().all(|choice| choice.stage == Stage::Ended);
        if self.is_cut && is_over && self.events.take().is_some() {
            self.finished = Some(self.usage);
        }
    }

    /// The end, once all before it is told.
    fn end(&mut self) -> Option<RequestEvent> {
        let is_told = self.verdicts.is_empty() && self.choices.iter().all(|choice| choice.new.is_empty());
        self.finished.take_if(|_| is_told).map(RequestEvent::Finished)
    }
}

impl Stream for Guarded {
    type Item = (usize, RequestEvent);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.watch.is_off() {
            return this.events.as_mut().map_or(Poll::Ready(None), |events| events.poll_next_unpin(context));
        }
        loop {
            if let Some(event) = this.ready.pop_front().or_else(|| this.end()) {
                return Poll::Ready(Some((this.prompt_idx, event)));
            }
            if let Poll::Ready(Some((index, verdict))) = this.verdicts.poll_next_unpin(context) {
                this.judge(index, verdict);
                continue;
            }
            let Some(events) = &mut this.events else {
                return if this.verdicts.is_empty() { Poll::Ready(None) } else { Poll::Pending };
            };
            match events.poll_next_unpin(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => this.events = None,
                Poll::Ready(Some((_, event))) => this.take(event),
            }
        }
    }
}
