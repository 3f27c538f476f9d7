//! What models think before they answer, between marks.

use super::{
    budget::ThoughtMarks,
    found::Found,
    sections::{Opening, Prose, Read},
};

/// How thoughts are marked.
pub struct Thoughts {
    /// What the form is called.
    pub names: &'static [&'static str],
    /// What they begin with.
    pub open: &'static [&'static str],
    /// What ends them.
    pub close: &'static [&'static str],
    /// Whether an answer begins with them even if nothing says so.
    pub is_assumed: bool,
    /// Whether a model with this chat template marks them so.
    pub is_that_of: fn(&str) -> bool,
}

/// All forms; the first that fits a template is its.
pub static THOUGHTS: &[&Thoughts] = &[&DEEPSEEK_R1, &MISTRAL, &GRANITE, &QWEN3];

static DEEPSEEK_R1: Thoughts = Thoughts {
    names: &["deepseek_r1"],
    open: &["<think>"],
    close: &["</think>"],
    is_assumed: true,
    // Those that can be told not to think close the mark in the prompt.
    is_that_of: |template| template.contains("<｜Assistant｜>") && template.contains("</think>"),
};

static QWEN3: Thoughts = Thoughts {
    names: &["qwen3", "deepseek_v3", "glm45", "kimi_k2", "think"],
    open: &["<think>"],
    close: &["</think>"],
    is_assumed: false,
    is_that_of: |template| template.contains("</think>"),
};

static MISTRAL: Thoughts = Thoughts {
    names: &["mistral"],
    open: &["[THINK]"],
    close: &["[/THINK]"],
    is_assumed: false,
    is_that_of: |template| template.contains("[THINK]"),
};

static GRANITE: Thoughts = Thoughts {
    names: &["granite"],
    open: &["Here is my thought process:", "Here's my thought process:"],
    close: &["Here is my response:", "Here's my response:"],
    is_assumed: false,
    is_that_of: |template| template.contains("Here is my thought process:"),
};

/// Where an answer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Thoughts may come first.
    Open,
    /// In thoughts: the prompt has begun them, or they always come first.
    Inside,
    /// Behind thoughts.
    Behind,
}

impl Thoughts {
    /// Where they begin and end.
    pub fn marks(&self) -> ThoughtMarks {
        let end = self.close.first().copied().unwrap_or_default();
        ThoughtMarks { open: self.open, close: self.close, end, end_again: None }
    }

    /// Where the answer to a prompt begins. `is_fresh` says that the prompt ends with the beginning of an answer.
    pub fn start(&self, prompt: &str, is_fresh: bool) -> Start {
        let prompt = prompt.trim_end();
        let ends_with = |marks: &[&str]| marks.iter().any(|mark| prompt.ends_with(mark));
        match (ends_with(self.open), ends_with(self.close)) {
            (true, _) => Start::Inside,
            (_, true) => Start::Behind,
            _ if !is_fresh => Start::Behind,
            _ if self.is_assumed => Start::Inside,
            _ => Start::Open,
        }
    }
}

/// Finds the end of thoughts.
pub struct Splitter {
    form: &'static Thoughts,
    at: At,
    has_thought: bool,
}

enum At {
    /// Before the opening mark, which may not come; what of it is there.
    Begin {
        held: String,
        is_inside: bool,
    },
    Inside(Prose),
    /// Blanks behind the closing mark.
    Closed,
    Behind,
}

impl Splitter {
    /// At the beginning of an answer.
    pub fn new(form: &'static Thoughts, start: Start) -> Self {
        let begin = |is_inside| At::Begin { held: String::new(), is_inside };
        let at = match start {
            Start::Open => begin(false),
            Start::Inside => begin(true),
            Start::Behind => At::Behind,
        };
        Self { form, at, has_thought: false }
    }

    /// Whether what comes is thought.
    pub fn is_inside(&self) -> bool {
        matches!(&self.at, At::Inside(_) | At::Begin { is_inside: true, .. })
    }

    /// Takes the next character. Gives text that is not thought.
    pub fn push(&mut self, c: char, found: &mut Found) -> Option<String> {
        match &mut self.at {
            At::Behind => Some(c.to_string()),
            At::Closed if c.is_whitespace() => None,
            At::Closed => {
                self.at = At::Behind;
                Some(c.to_string())
            }
            At::Begin { held, is_inside } => {
                held.push(c);
                let begun = held.trim_start();
                if begun.is_empty() || self.form.open.iter().any(|mark| mark.starts_with(begun)) {
                    if self.form.open.contains(&begun) {
                        self.at = At::Inside(self.prose());
                    }
                    return None;
                }
                let held = std::mem::take(held);
                if !*is_inside {
                    self.at = At::Behind;
                    return Some(held);
                }
                self.at = At::Inside(self.prose());
                for c in held.chars() {
                    self.inside(c, found);
                }
                None
            }
            At::Inside(_) => {
                self.inside(c, found);
                None
            }
        }
    }

    fn prose(&self) -> Prose {
        Prose::new(Opening { marks: self.form.close, first: None })
    }

    fn inside(&mut self, c: char, found: &mut Found) {
        let At::Inside(prose) = &mut self.at else { return };
        // Blanks at the beginning say nothing.
        if !self.has_thought && c.is_whitespace() {
            return;
        }
        self.has_thought = true;
        let mut read = Found::default();
        let step = prose.push(c, &mut read);
        tell(read, found);
        if let Read::Mark(_) = step {
            self.at = At::Closed;
        }
    }

    /// The answer ends. Gives text that is not thought.
    pub fn finish(&mut self, found: &mut Found) -> Option<String> {
        match std::mem::replace(&mut self.at, At::Behind) {
            At::Begin { held, is_inside: false } => Some(held),
            At::Begin { held, is_inside: true } => {
                found.thought(held.trim_start());
                None
            }
            At::Inside(mut prose) => {
                let mut read = Found::default();
                prose.finish(&mut read);
                tell(read, found);
                None
            }
            At::Closed | At::Behind => None,
        }
    }
}

fn tell(mut read: Found, found: &mut Found) {
    for part in read.take() {
        if let super::found::Part::Content(text) = part {
            found.thought(&text);
        }
    }
}
