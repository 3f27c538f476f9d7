//! What frontends need to know of the model that the cluster serves.

use std::sync::Arc;

use phalanx_cluster::{
    chat_template::ChatTemplate, checkpoint::generation::GenerationDefaults, id::TokenId, tokenizer::Tokenizer,
};

use crate::model_facts::ModelFacts;

/// The served model, fixed for the life of the process.
#[derive(Clone)]
pub struct ServedModel {
    /// Names that requests may use; the first is the one in answers.
    pub names: Vec<String>,
    /// Most tokens of prompt and output together.
    pub max_model_len: usize,
    /// Rows of the output matrix: token ids are below.
    pub vocab: usize,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// How chats are rendered; `None` if the model has none.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Ids that end a sequence.
    pub eos: Vec<TokenId>,
    /// When the process began to serve it, Unix seconds.
    pub created: u64,
    /// What its checkpoint is.
    pub facts: ModelFacts,
    /// What the numbers of answers depend on beside the request.
    pub fingerprint: String,
    /// What requests that leave parameters out get.
    pub defaults: GenerationDefaults,
}

impl ServedModel {
    /// Its name in answers.
    pub fn name(&self) -> String {
        self.names.first().cloned().unwrap_or_default()
    }
}
