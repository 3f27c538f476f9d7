//! Output tokens to text: whole characters, and stop strings.

pub mod decode;
pub mod stop;
