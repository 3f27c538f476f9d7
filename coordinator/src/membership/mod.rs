//! Who is here: the attached shards, and the group that is made of them.

pub mod actor;
