//! How far a client has read: the ids of events.
//!
//! An id is `N0,N1,…`: tokens of each choice that the client has once it has the event. Where an event brings no token
//! (the role before the first, the reason after the last) `.K` follows: events since the one that brought the last token.
//! After the last choice's end `;1` says that usage is told, `;2` that the stream is over.
//!
//! Choices grow independently: which of them is ahead may differ between the run in which an event was sent and the run
//! that goes on. What one choice's events are never does. So what counts is the place within each choice.

use std::{fmt, str::FromStr};

/// Longest list of choices that is read: more can't be asked for.
const MOST_CHOICES: usize = 1 << 16;

/// A place among the events of one choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Tokens up to here.
    tokens: u32,
    /// Events since the one that brought the last of them.
    more: u32,
}

impl Place {
    /// The place after the tokens that a gRPC client says that it has.
    pub fn after(tokens: u32) -> Self {
        Self { tokens, more: 0 }
    }

    /// Tokens up to here.
    pub fn tokens(self) -> u32 {
        self.tokens
    }

    /// The place after an event with so many new tokens.
    #[must_use]
    pub fn step(self, n_tokens: usize) -> Self {
        match u32::try_from(n_tokens) {
            Ok(0) => Self { more: self.more.saturating_add(1), ..self },
            Ok(n) => Self { tokens: self.tokens.saturating_add(n), more: 0 },
            Err(_) => Self { tokens: u32::MAX, more: 0 },
        }
    }
}

/// What comes after the choices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tail {
    /// Choices may go on.
    #[default]
    Open,
    /// Usage is told.
    Usage,
    /// The end is told.
    Done,
}

/// A place in a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position {
    choices: Vec<Place>,
    tail: Tail,
}

impl Position {
    /// After so many tokens of each choice.
    pub fn after_tokens(counts: &[u32]) -> Self {
        Self { choices: counts.iter().copied().map(Place::after).collect(), tail: Tail::Open }
    }

    /// The place in a choice.
    pub fn choice(&self, index: usize) -> Place {
        self.choices.get(index).copied().unwrap_or_default()
    }

    /// Choices that the position names.
    pub fn n_choices(&self) -> usize {
        self.choices.len()
    }

    /// What comes after the choices.
    pub fn tail(&self) -> Tail {
        self.tail
    }

    /// Goes on to a place in a choice; whether it was not there yet.
    pub fn reach(&mut self, index: usize, place: Place) -> bool {
        if self.choices.len() <= index {
            self.choices.resize(index + 1, Place::default());
        }
        let here = &mut self.choices[index];
        let is_new = place > *here;
        *here = place.max(*here);
        is_new
    }

    /// Goes on behind the choices; whether it was not there yet.
    pub fn reach_tail(&mut self, tail: Tail) -> bool {
        let is_new = tail > self.tail;
        self.tail = tail.max(self.tail);
        is_new
    }

    /// Names all choices, of which there are so many.
    pub fn widen(&mut self, n_choices: usize) {
        if self.choices.len() < n_choices {
            self.choices.resize(n_choices, Place::default());
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, place) in self.choices.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", place.tokens)?;
            if place.more > 0 {
                write!(f, ".{}", place.more)?;
            }
        }
        match self.tail {
            Tail::Open => Ok(()),
            Tail::Usage => f.write_str(";1"),
            Tail::Done => f.write_str(";2"),
        }
    }
}

impl FromStr for Position {
    type Err = &'static str;

    /// `KEY:` may stand in front.
    fn from_str(id: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "must be the id of an event, such as 3,5 or 3.1,5.1;1";
        let counts = id.rsplit_once(':').map_or(id, |(_, counts)| counts);
        let (counts, tail) = match counts.split_once(';') {
            None => (counts, Tail::Open),
            Some((counts, "1")) => (counts, Tail::Usage),
            Some((counts, "2")) => (counts, Tail::Done),
            Some(_) => return Err(WRONG),
        };
        // `u32` alone would take a sign.
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|_| digits).ok_or(WRONG)
        };
        let place = |text: &str| -> Result<Place, Self::Err> {
            match text.split_once('.') {
                None => Ok(Place { tokens: number(text)?, more: 0 }),
                Some((tokens, more)) => Ok(Place { tokens: number(tokens)?, more: number(more)? }),
            }
        };
        let choices = counts.split(',').take(MOST_CHOICES).map(place).collect::<Result<_, _>>()?;
        Ok(Self { choices, tail })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_read_as_written() {
        for id in ["0", "3", "3,5", "0.1,4.2", "3.1,5.1;1", "3,5;2"] {
            assert_eq!(id.parse::<Position>().unwrap().to_string(), id);
        }
        assert_eq!("a:b:3,4".parse::<Position>().unwrap(), Position::after_tokens(&[3, 4]));
        for wrong in ["", ",", "3,", "x", "-1", "+1", "3.", "3.x", "3;0", "3;3", "3;", "99999999999", "3 ", "k:"] {
            assert!(wrong.parse::<Position>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn events_without_tokens_have_a_place_of_their_own() {
        let begin = Place::default();
        let role = begin.step(0);
        let token = role.step(1);
        let finish = token.step(0);
        assert!(begin < role && role < token && token < finish);
        assert_eq!((token, finish.tokens()), (Place::after(1), 1));
        assert_eq!(token.step(usize::MAX).tokens(), u32::MAX);
    }

    #[test]
    fn what_the_client_has_is_not_new() {
        let mut position: Position = "2,1".parse().unwrap();
        assert!(!position.reach(0, Place::after(1)) && !position.reach(0, Place::after(2)));
        assert!(position.reach(0, Place::after(3)) && position.reach(2, Place::after(1)));
        assert_eq!(position.to_string(), "3,1,1");
        assert!(
            position.reach_tail(Tail::Usage) && !position.reach_tail(Tail::Usage) && position.reach_tail(Tail::Done)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[0-9,.;:x-]{0,12}") {
            if let Ok(position) = text.parse::<Position>() {
                let again: Position = position.to_string().parse().unwrap();
                prop_assert_eq!(again, position);
            }
        }
    }
}
