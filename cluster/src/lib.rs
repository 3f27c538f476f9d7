//! Who is in the cluster and who does what: membership stores, the partition plan, checkpoint reading, tokenizers.

pub mod byte_size;
pub mod chat_template;
pub mod checkpoint;
pub mod error_text;
pub mod grammar;
pub mod hex;
pub mod id;
pub mod manual;
pub mod model_config;
pub mod partition;
pub mod rope;
pub mod seal;
pub mod source;
pub mod store;
pub mod tls;
pub mod tokenizer;
pub mod watched;
pub mod web;
