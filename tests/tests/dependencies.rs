//! `deny.toml` holds, also where cargo-deny is not installed: licences, sources, and what must not be there.

use std::{collections::BTreeSet, fs, process::Command};

use phalanx_tests::process::repository;
use serde_json::Value;

/// What cargo knows of all packages of the lock file.
fn packages() -> Vec<Value> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(cargo);
    // What was built is there: nothing is fetched. What other systems would need may not be.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    command.args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", &platform]);
    command.current_dir(repository());
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo says JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

/// What stands between quotes in a text.
fn quoted(text: &str) -> Vec<String> {
    text.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

struct Rules {
    allowed: BTreeSet<String>,
    /// A crate and a licence that it alone may have.
    exceptions: Vec<(String, String)>,
    banned: BTreeSet<String>,
}

fn rules() -> Rules {
    let text = fs::read_to_string(repository().join("deny.toml")).expect("deny.toml");
    let text: String =
        text.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(|l| [l, "\n"]).collect();
    let between = |begin: &str, end: &str| {
        let (_, rest) = text.split_once(begin).unwrap_or_else(|| panic!("no {begin}"));
        rest.split_once(end).unwrap_or_else(|| panic!("no {end} behind {begin}")).0.to_owned()
    };
    let exceptions = quoted(&between("exceptions = [", "\n"));
    Rules {
        allowed: quoted(&between("\nallow = [", "]")).into_iter().collect(),
        exceptions: exceptions.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect(),
        banned: quoted(&between("\ndeny = [", "\n]")).into_iter().collect(),
    }
}

/// Whether an SPDX expression can be fulfilled with these licences. Older ones write `/` for OR.
fn is_allowed(expression: &str, is_ok: &impl Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    // `WITH` belongs to the licence before it.
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut words = words.as_slice();
    let allowed = any(&mut words, is_ok);
    assert!(words.is_empty(), "{expression}: {words:?} is left");
    allowed
}

fn any(words: &mut &[&str], is_ok: &impl Fn(&str) -> bool) -> bool {
    let mut is_one = all(words, is_ok);
    while let ["OR", rest @ ..] = *words {
        *words = rest;
        // Both sides are read, whatever the first says.
        is_one |= all(words, is_ok);
    }
    is_one
}

fn all(words: &mut &[&str], is_ok: &impl Fn(&str) -> bool) -> bool {
    let mut are_all = one(words, is_ok);
    while let ["AND", rest @ ..] = *words {
        *words = rest;
        are_all &= one(words, is_ok);
    }
    are_all
}

fn one(words: &mut &[&str], is_ok: &impl Fn(&str) -> bool) -> bool {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let allowed = any(words, is_ok);
            let [")", rest @ ..] = *words else { panic!("no ) before {words:?}") };
            *words = rest;
            allowed
        }
        [name, "WITH", exception, rest @ ..] => {
            *words = rest;
            is_ok(&format!("{name} WITH {exception}"))
        }
        [name, rest @ ..] => {
            *words = rest;
            is_ok(name)
        }
        [] => panic!("a licence is missing"),
    }
}

#[test]
fn expressions_are_read() {
    let ok = |name: &str| matches!(name, "MIT" | "ISC" | "A WITH B");
    for (expression, allowed) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("MIT/GPL-3.0", true),
        ("MIT AND GPL-3.0", false),
        ("MIT AND ISC", true),
        ("(GPL-3.0 OR MIT) AND ISC", true),
        ("GPL-3.0 OR MIT AND GPL-2.0", false),
        ("A WITH B", true),
        ("A", false),
    ] {
        assert_eq!(is_allowed(expression, &ok), allowed, "{expression}");
    }
}

#[test]
fn every_dependency_is_one_that_deny_toml_allows() {
    let Rules { allowed, exceptions, banned } = rules();
    assert!(allowed.len() > 3 && banned.len() > 2 && !exceptions.is_empty());
    let packages = packages();
    assert!(packages.len() > 200, "{}", packages.len());
    let mut wrong = Vec::new();
    for package in &packages {
        let name = package["name"].as_str().expect("a name");
        let ok = |licence: &str| {
            allowed.contains(licence) || exceptions.iter().any(|(of, also)| of == name && also == licence)
        };
        match package["license"].as_str() {
            Some(expression) if is_allowed(expression, &ok) => {}
            other => wrong.push(format!("{name}: the licence is {other:?}")),
        }
        if banned.contains(name) {
            wrong.push(format!("{name}: it must not be there"));
        }
        match package["source"].as_str() {
            None => assert!(name.starts_with("phalanx-"), "{name} lies here"),
            Some("registry+https://github.com/rust-lang/crates.io-index") => {}
            Some(other) => wrong.push(format!("{name}: it comes from {other}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
