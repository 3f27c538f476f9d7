//! Who is here: the attached shards, and the groups that are made of them.

pub mod actor;
pub mod groups;
pub mod machine;
