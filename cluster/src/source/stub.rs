//! A tiny HTTP server on loopback, for tests: files, redirects, ranges, and the ways in which servers fail.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What is at a path.
#[derive(Clone, Default)]
pub(super) struct Page {
    pub(super) body: Vec<u8>,
    pub(super) headers: Vec<(&'static str, String)>,
    /// Sent instead of the body.
    pub(super) redirect: Option<String>,
    /// The first answers break off after so many bytes of body, one entry each.
    pub(super) breaks: Vec<usize>,
    /// The first so many answers are status 503.
    pub(super) unavailable: usize,
    /// `Range` is not understood.
    pub(super) no_ranges: bool,
}

#[derive(Default)]
struct Site {
    pages: HashMap<String, Page>,
    /// Each request's path, `Range` and `Authorization`.
    log: Vec<(String, Option<String>, Option<String>)>,
}

pub(super) struct Stub {
    pub(super) url: String,
    site: Arc<Mutex<Site>>,
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

impl Stub {
    pub(super) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let site: Arc<Mutex<Site>> = Arc::default();
        let served = site.clone();
        let name = format!("stub {}", NEXT.fetch_add(1, Ordering::Relaxed));
        std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    // A client that goes away is its own affair.
                    drop(answer(stream, &served));
                }
            })
            .unwrap();
        Self { url, site }
    }

    pub(super) fn put(&self, path: &str, page: Page) {
        self.site.lock().unwrap().pages.insert(path.to_owned(), page);
    }

    /// `Range` headers of the requests for a path.
    pub(super) fn ranges(&self, path: &str) -> Vec<Option<String>> {
        self.site.lock().unwrap().log.iter().filter(|(p, ..)| p == path).map(|(_, range, _)| range.clone()).collect()
    }

    pub(super) fn authorizations(&self, path: &str) -> Vec<Option<String>> {
        self.site.lock().unwrap().log.iter().filter(|(p, ..)| p == path).map(|(.., a)| a.clone()).collect()
    }

    pub(super) fn n_requests(&self) -> usize {
        self.site.lock().unwrap().log.len()
    }
}

/// One request, one answer, one connection.
fn answer(stream: TcpStream, site: &Mutex<Site>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let range = headers.get("range").cloned();
    let (page, cut) = {
        let mut site = site.lock().unwrap();
        site.log.push((path.clone(), range.clone(), headers.get("authorization").cloned()));
        let Some(page) = site.pages.get_mut(&path) else {
            return respond(stream, "404 Not Found", &[], b"", 0);
        };
        if page.unavailable > 0 {
            page.unavailable -= 1;
            return respond(stream, "503 Service Unavailable", &[], b"", 0);
        }
        let cut = if page.breaks.is_empty() { usize::MAX } else { page.breaks.remove(0) };
        (page.clone(), cut)
    };
    let mut sent = page.headers.clone();
    if let Some(target) = page.redirect {
        sent.push(("Location", target));
        return respond(stream, "302 Found", &sent, b"", 0);
    }
    let first = range.filter(|_| !page.no_ranges).and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let last = if last.is_empty() { page.body.len().checked_sub(1)? } else { last.parse().ok()? };
        Some((first.parse::<usize>().ok()?, last))
    });
    match first {
        Some((first, _)) if first >= page.body.len() => respond(stream, "416 Range Not Satisfiable", &sent, b"", 0),
        Some((first, last)) => {
            sent.push(("Content-Range", format!("bytes {first}-{last}/{}", page.body.len())));
            respond(stream, "206 Partial Content", &sent, &page.body[first..=last], cut)
        }
        None => respond(stream, "200 OK", &sent, &page.body, cut),
    }
}

fn respond(
    mut stream: TcpStream,
    status: &str,
    headers: &[(&'static str, String)],
    body: &[u8],
    cut: usize,
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    stream.write_all(&body[..body.len().min(cut)])?;
    stream.flush()
}
