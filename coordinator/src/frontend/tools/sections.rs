//! Text in which calls stand in sections of their own, between marks.

use super::{Parser, found::Found};

/// What a character means to the body of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// More must follow.
    More,
    /// A call is complete; the section may go on.
    CallDone,
    /// The section is complete.
    Done,
    /// A call is complete, the section ended behind it, and what came since then does not belong to it.
    Past,
    /// It can't stand here.
    Wrong,
}

/// What stands in a section: calls.
pub trait Body: Send {
    /// Takes the next character.
    fn push(&mut self, c: char, found: &mut Found) -> Step;
}

/// How a section begins.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    /// With one of these, wherever it stands. None is the beginning of another.
    pub marks: &'static [&'static str],
    /// Or with this character, which belongs to the body, if nothing but blanks stands before it in the whole text.
    pub first: Option<char>,
}

/// Reads text and sections. What can't be a call after all is text: nothing is lost but blanks next to calls, and marks.
pub struct Sections<B> {
    prose: Prose,
    inside: Option<Inside<B>>,
    body: Box<dyn Fn(&str) -> B + Send>,
}

/// A section that has begun.
struct Inside<B> {
    body: B,
    /// What was read since its beginning or its last complete call, as long as no call has begun in it.
    raw: String,
    /// Calls before that.
    n_calls: usize,
}

impl<B: Body> Sections<B> {
    /// At the beginning of a text. `body` makes what reads a section.
    pub fn new(opening: Opening, body: impl Fn() -> B + Send + 'static) -> Self {
        Self::marked(opening, move |_| body())
    }

    /// The same where the body has to know the mark that it stands behind.
    pub fn marked(opening: Opening, body: impl Fn(&str) -> B + Send + 'static) -> Self {
        Self { prose: Prose::new(opening), inside: None, body: Box::new(body) }
    }

    fn push_inside(&mut self, mut inside: Inside<B>, c: char, found: &mut Found) {
        match inside.body.push(c, found) {
            Step::More => {
                if found.n_calls() == inside.n_calls {
                    inside.raw.push(c);
                }
                self.inside = Some(inside);
            }
            Step::CallDone => {
                inside.raw.clear();
                inside.n_calls = found.n_calls();
                self.inside = Some(inside);
            }
            Step::Done => {}
            Step::Past => {
                for c in inside.raw.chars().chain([c]) {
                    self.push(c, found);
                }
            }
            Step::Wrong => {
                if found.n_calls() == inside.n_calls {
                    found.content(&inside.raw);
                }
                self.push(c, found);
            }
        }
    }
}

impl<B: Body> Parser for Sections<B> {
    fn push(&mut self, c: char, found: &mut Found) {
        if let Some(inside) = self.inside.take() {
            return self.push_inside(inside, c, found);
        }
        match self.prose.push(c, found) {
            Read::Text => {}
            Read::Mark(raw) => {
                self.inside = Some(Inside { body: (self.body)(raw.trim_start()), raw, n_calls: found.n_calls() });
            }
            Read::First(raw) => {
                let inside = Inside { body: (self.body)(""), raw, n_calls: found.n_calls() };
                self.push_inside(inside, c, found);
            }
        }
    }

    fn finish(&mut self, found: &mut Found) {
        match self.inside.take() {
            // Behind a complete call, blanks and the beginning of a closing mark.
            Some(inside) if found.n_calls() == inside.n_calls && inside.raw.trim().is_empty() => {}
            Some(inside) if found.n_calls() == inside.n_calls => found.content(&inside.raw),
            Some(_) => {}
            None => self.prose.finish(found),
        }
    }
}

/// What a character of a text means.
pub enum Read {
    /// It is text, or may be.
    Text,
    /// A mark ends with it. The mark, and blanks before it.
    Mark(String),
    /// A section begins with it. Blanks before it.
    First(String),
}

/// Reads text up to a mark. What may become a mark is held back, and so are blanks, for they may stand before one.
pub struct Prose {
    opening: Opening,
    blanks: String,
    /// What may become a mark.
    begun: String,
    is_at_start: bool,
}

impl Prose {
    /// At the beginning of a text.
    pub fn new(opening: Opening) -> Self {
        Self { opening, blanks: String::new(), begun: String::new(), is_at_start: true }
    }

    /// Takes the next character.
    pub fn push(&mut self, c: char, found: &mut Found) -> Read {
        if self.begun.is_empty() && c.is_whitespace() {
            self.blanks.push(c);
            return Read::Text;
        }
        if std::mem::replace(&mut self.is_at_start, false) && Some(c) == self.opening.first {
            return Read::First(std::mem::take(&mut self.blanks));
        }
        self.begun.push(c);
        if self.opening.marks.contains(&self.begun.as_str()) {
            let mark = std::mem::take(&mut self.begun);
            return Read::Mark(std::mem::take(&mut self.blanks) + &mark);
        }
        // Text is what no mark can begin in any more.
        while !self.opening.marks.iter().any(|mark| mark.starts_with(&self.begun)) {
            found.content(&std::mem::take(&mut self.blanks));
            found.content(self.begun.remove(0).encode_utf8(&mut [0; 4]));
            let n_blank = self.begun.len() - self.begun.trim_start().len();
            self.blanks.extend(self.begun.drain(..n_blank));
            if self.begun.is_empty() {
                break;
            }
        }
        Read::Text
    }

    /// What is held back is text, but for blanks behind the last call.
    pub fn finish(&mut self, found: &mut Found) {
        if found.n_calls() == 0 || !self.begun.is_empty() {
            found.content(&std::mem::take(&mut self.blanks));
            found.content(&std::mem::take(&mut self.begun));
        }
    }
}

/// Reads the end of a section: blanks, then one of some marks.
#[derive(Debug)]
pub struct Closing {
    marks: &'static [&'static str],
    held: String,
}

impl Closing {
    /// Before it.
    pub fn new(marks: &'static [&'static str]) -> Self {
        Self { marks, held: String::new() }
    }

    /// Takes the next character: the mark that is complete, if one is; an error if none can come.
    pub fn push(&mut self, c: char) -> Result<Option<&'static str>, ()> {
        if self.held.is_empty() && c.is_whitespace() {
            return Ok(None);
        }
        self.held.push(c);
        match self.marks.iter().find(|mark| mark.starts_with(&self.held)) {
            Some(mark) if mark.len() == self.held.len() => Ok(Some(mark)),
            Some(_) => Ok(None),
            None => Err(()),
        }
    }
}
