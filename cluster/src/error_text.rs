//! Errors as people read them.

/// An error with everything that lies under it: transports say the reason at the bottom only.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    #[derive(Debug, thiserror::Error)]
    #[error("the door is shut")]
    struct Shut(#[source] StoreError);

    #[test]
    fn the_reason_at_the_bottom_is_said() {
        let reason = StoreError::Unavailable { at: "a:1".to_owned(), reason: "nobody listens".to_owned() };
        assert_eq!(with_causes(&Shut(reason)), "the door is shut: the store at a:1 does not answer: nobody listens");
    }
}
