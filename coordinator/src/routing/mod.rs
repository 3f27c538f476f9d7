//! Which group gets a request, where there are several: the policy ([`machine`]), what each group has seen ([`prefixes`]),
//! and a [`Router`](router::Router) that takes requests as if it were one scheduler.

pub mod machine;
pub mod prefixes;
pub mod router;
pub mod told;
