//! The file that a batch comes from: looked through once before anything is asked for, then read line by line.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use tokio::sync::mpsc;

use super::{
    line::{BadLine, LONGEST_LINE, Parsed, id_of, parse},
    outcome::Which,
};

/// Lines that are read ahead.
const AHEAD: usize = 16;

/// What a first look has found.
#[derive(Debug, Default)]
pub struct Looked {
    /// Lines, empty ones aside.
    pub n_lines: usize,
    /// Lines that are no requests, the first ones of them.
    pub bad: Vec<BadLine>,
    /// Names that stand twice, the first ones, with both lines.
    pub doubles: Vec<(String, [usize; 2])>,
    /// Where requests go.
    pub urls: BTreeSet<&'static str>,
    ids: BTreeMap<Which, usize>,
}

impl Looked {
    /// Whether the file has such a line.
    pub fn has(&self, which: &Which) -> bool {
        self.ids.contains_key(which)
    }
}

/// Bad lines and doubles that are remembered.
const MOST_SHOWN: usize = 100;

/// Looks a file through. Takes time.
///
/// # Errors
/// If it can't be read.
pub fn look(path: &Path) -> io::Result<Looked> {
    let mut looked = Looked::default();
    for_each(path, |parsed| {
        looked.n_lines += 1;
        let number = number(&parsed);
        let which = which(&parsed);
        match looked.ids.get(&which) {
            Some(first) if looked.doubles.len() < MOST_SHOWN => {
                looked.doubles.push((id_of(&parsed).unwrap_or_default().to_owned(), [*first, number]));
            }
            Some(_) => {}
            None => drop(looked.ids.insert(which, number)),
        }
        match parsed {
            Ok(line) => drop(looked.urls.insert(line.url)),
            Err(bad) if looked.bad.len() < MOST_SHOWN => looked.bad.push(bad),
            Err(_) => {}
        }
        true
    })?;
    Ok(looked)
}

fn number(parsed: &Parsed) -> usize {
    match parsed {
        Ok(line) => line.number,
        Err(bad) => bad.number,
    }
}

/// By what an output knows a line.
pub fn which(parsed: &Parsed) -> Which {
    id_of(parsed).map_or_else(|| Which::Numbered(number(parsed)), |id| Which::Named(id.to_owned()))
}

/// Reads a file's lines on a thread of its own, but for those that are done.
pub fn read(path: &Path, done: BTreeSet<Which>) -> mpsc::Receiver<io::Result<Parsed>> {
    let (sender, lines) = mpsc::channel(AHEAD);
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let read = for_each(&path, |parsed| {
            // An error means that nobody wants them any more.
            done.contains(&which(&parsed)) || sender.blocking_send(Ok(parsed)).is_ok()
        });
        if let Err(error) = read {
            let _gone = sender.blocking_send(Err(error));
        }
    });
    lines
}

/// Calls `take` with each line that is not empty, until it says no.
fn for_each(path: &Path, mut take: impl FnMut(Parsed) -> bool) -> io::Result<()> {
    let mut reader = BufReader::new(File::open(path)?);
    let mut text = Vec::new();
    for number in 1.. {
        text.clear();
        // One byte more than there may be shows that there are too many.
        let n_bytes = reader.by_ref().take(LONGEST_LINE as u64 + 1).read_until(b'\n', &mut text)?;
        if n_bytes == 0 {
            break;
        }
        if text.len() > LONGEST_LINE && text.last() != Some(&b'\n') {
            skip_line(&mut reader)?;
        }
        if !text.trim_ascii().is_empty() && !take(parse(number, text.trim_ascii_end())) {
            break;
        }
    }
    Ok(())
}

fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let n_bytes = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(n_bytes);
        if end.is_some() || n_bytes == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn line(id: &str) -> String {
        format!(r#"{{"custom_id":"{id}","method":"POST","url":"/v1/completions","body":{{"prompt":"x"}}}}"#)
    }

    #[tokio::test]
    async fn files_are_looked_through_before_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        let text = [line("a"), String::new(), "nonsense".to_owned(), line("b"), line("a")].join("\r\n");
        fs::write(&path, text).unwrap();
        let looked = look(&path).unwrap();
        assert_eq!((looked.n_lines, looked.bad.len(), looked.urls.len()), (4, 1, 1));
        assert_eq!(looked.doubles, [("a".to_owned(), [1, 5])]);
        assert!(looked.has(&Which::Named("b".to_owned())) && looked.has(&Which::Numbered(3)));
        assert!(!looked.has(&Which::Named("c".to_owned())));

        let done = BTreeSet::from([Which::Named("a".to_owned()), Which::Numbered(3)]);
        let mut lines = read(&path, done);
        let next = lines.recv().await.unwrap().unwrap().unwrap();
        assert_eq!((next.custom_id.as_str(), next.number), ("b", 4));
        assert!(lines.recv().await.is_none());
    }

    #[test]
    fn a_line_that_is_too_long_takes_no_memory_and_hides_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        fs::write(&path, [vec![b'x'; LONGEST_LINE + 70_000], format!("\n{}", line("a")).into_bytes()].concat())
            .unwrap();
        let looked = look(&path).unwrap();
        assert_eq!((looked.n_lines, looked.bad.len()), (2, 1));
        assert!(looked.has(&Which::Named("a".to_owned())));
        assert!(looked.bad[0].error.message().contains("longer"), "{}", looked.bad[0].error);
    }
}
