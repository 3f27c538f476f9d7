//! What a parser finds in a text.

/// A piece of an answer. Pieces of one kind that follow each other are one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// For the reader.
    Content(String),
    /// What the model thought on its way.
    Thought(String),
    /// A call begins.
    Call {
        /// Of the tool.
        name: String,
        /// What the model calls the call, if it has a name for it.
        id: Option<String>,
    },
    /// Arguments of the call that began last: JSON as the model wrote it.
    Arguments(String),
}

/// Parts in order, as they are found.
#[derive(Debug, Default)]
pub struct Found {
    parts: Vec<Part>,
    n_calls: usize,
}

impl Found {
    /// Adds text for the reader.
    pub fn content(&mut self, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Content(last)) => last.push_str(text),
            _ => self.parts.push(Part::Content(text.to_owned())),
        }
    }

    /// Adds to what the model thought.
    pub fn thought(&mut self, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Thought(last)) => last.push_str(text),
            _ => self.parts.push(Part::Thought(text.to_owned())),
        }
    }

    /// Begins a call.
    pub fn call(&mut self, name: &str) {
        self.n_calls += 1;
        self.parts.push(Part::Call { name: name.to_owned(), id: None });
    }

    /// Begins a call that the model has named.
    pub fn call_with_id(&mut self, name: &str, id: &str) {
        self.n_calls += 1;
        self.parts.push(Part::Call { name: name.to_owned(), id: Some(id.to_owned()) });
    }

    /// Adds to the arguments of the last call.
    pub fn arguments(&mut self, text: &str) {
        match self.parts.last_mut() {
            _ if text.is_empty() => {}
            Some(Part::Arguments(last)) => last.push_str(text),
            _ => self.parts.push(Part::Arguments(text.to_owned())),
        }
    }

    /// Calls that have begun so far.
    pub fn n_calls(&self) -> usize {
        self.n_calls
    }

    /// What was found since the last time.
    pub fn take(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }
}
