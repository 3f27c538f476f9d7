//! Calls whose name stands before their arguments: `f[ARGS]{…}`.

use super::{
    Names,
    found::Found,
    json::{ObjectScan, Scan},
    sections::{Body, Step},
};

/// Longest name, with what may stand behind it.
const LONGEST_HEAD: usize = 256;

enum At {
    /// In the name, or in the mark behind it.
    Head(String),
    Arguments(ObjectScan),
}

/// Reads one.
pub struct NamedCall {
    names: Names,
    /// What may stand between name and arguments; one of them must, unless the arguments follow at once.
    marks: &'static [&'static str],
    /// Begins something between the two that says nothing.
    aside: Option<&'static str>,
    at: At,
}

impl NamedCall {
    /// Before its name.
    pub fn new(names: &Names, marks: &'static [&'static str], aside: Option<&'static str>) -> Self {
        Self { names: names.clone(), marks, aside, at: At::Head(String::new()) }
    }
}

impl Body for NamedCall {
    fn push(&mut self, c: char, found: &mut Found) -> Step {
        match &mut self.at {
            At::Head(head) if c == '{' => {
                let mut name = head.trim_end();
                for mark in self.marks {
                    name = name.strip_suffix(mark).unwrap_or(name).trim_end();
                }
                if let Some(aside) = self.aside {
                    name = name.split_once(aside).map_or(name, |(name, _)| name);
                }
                let name = name.trim();
                if !self.names.contains(name) {
                    return Step::Wrong;
                }
                found.call(name);
                self.at = At::Arguments(ObjectScan::new());
            }
            At::Head(head) => {
                head.push(c);
                return if head.len() <= LONGEST_HEAD { Step::More } else { Step::Wrong };
            }
            At::Arguments(_) => {}
        }
        let At::Arguments(scan) = &mut self.at else { return Step::More };
        let step = scan.push(c);
        if step != Scan::Wrong {
            found.arguments(c.encode_utf8(&mut [0; 4]));
        }
        match step {
            Scan::More => Step::More,
            Scan::Done => Step::CallDone,
            Scan::Wrong => Step::Wrong,
        }
    }
}
