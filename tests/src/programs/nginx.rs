//! A real NGINX with the configuration of `deploy/nginx`.

use std::{fs, process::Command};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::{address, deployed};
use crate::{
    client::get,
    faults::{PATIENCE, free_port, tools, within},
    process::{Process, children, is_alive, signal_pid},
};

/// A coordinator that it balances.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// `http://HOST:PORT` of the HTTP APIs.
    pub http: String,
    /// `http://HOST:PORT` of gRPC.
    pub grpc: String,
}

/// A request as the access log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Method and path.
    pub request: String,
    /// Status that the client got.
    pub status: u16,
    /// `HOST:PORT` of who was asked, in order; none if nobody was.
    pub upstreams: Vec<String>,
}

/// The server, ended when dropped.
pub struct Nginx {
    process: Process,
    /// `http://HOST:PORT` of HTTP.
    pub http: String,
    /// `http://HOST:PORT` of gRPC.
    pub grpc: String,
    // Removed after the processes are gone: declared last.
    _dir: tempfile::TempDir,
}

/// What is missing for it; `None` if nothing is.
pub fn obstacle() -> Option<String> {
    tools::unpacked("nginx", "nginx").err().map(|e| format!("{e:#}"))
}

impl Nginx {
    /// Starts it before two coordinators and waits until it answers.
    pub fn start(upstreams: [Upstream; 2]) -> Result<Self> {
        let program = tools::unpacked("nginx", "nginx")?;
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (port, grpc_port) = (free_port(), free_port());
        let main = [("/run/nginx.pid", path("nginx.pid")), ("/etc/nginx/conf.d", path("conf.d"))];
        let [first, second] = upstreams;
        let servers = [
            ("server coordinator-1:8000", format!("server {}", address(&first.http))),
            ("server coordinator-2:8000", format!("server {}", address(&second.http))),
            ("server coordinator-1:50051", format!("server {}", address(&first.grpc))),
            ("server coordinator-2:50051", format!("server {}", address(&second.grpc))),
            ("    listen 8080;", format!("    listen 127.0.0.1:{port};")),
            ("    listen 50051 http2;", format!("    listen 127.0.0.1:{grpc_port} http2;")),
        ];
        fs::create_dir(dir.path().join("conf.d"))?;
        fs::write(dir.path().join("nginx.conf"), deployed("nginx/nginx.conf", &main)?)?;
        fs::write(dir.path().join("conf.d/phalanx.conf"), deployed("nginx/phalanx.conf", &servers)?)?;
        // Where packages have these folders is the package's business.
        let folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let folders = folders.map(|name| format!("{name}_temp_path {};\n", path(name)));
        fs::write(dir.path().join("conf.d/folders.conf"), folders.concat())?;

        let mut command = Command::new(program);
        command.arg("-p").arg(dir.path()).arg("-c").arg(dir.path().join("nginx.conf"));
        // Root's workers would become another user, who can't read this folder.
        let user = if rustix::process::geteuid().is_root() { " user root;" } else { "" };
        command.args(["-g", &format!("daemon off;{user}")]);
        let at = |port: u16| format!("http://127.0.0.1:{port}");
        let mut nginx = Self { process: Process::run(command), http: at(port), grpc: at(grpc_port), _dir: dir };
        nginx.wait_answering()?;
        Ok(nginx)
    }

    fn wait_answering(&mut self) -> Result<()> {
        let url = format!("{}/livez", self.http);
        let mut ended = None;
        let outcome = within(PATIENCE, "NGINX answers", || {
            ended = self.process.ended();
            ended.is_some() || get(&url).is_ok_and(|answer| answer.status == 200)
        });
        ensure!(ended.is_none(), "NGINX ended at its start:\n{}", self.process.log());
        outcome
    }

    /// Requests that are over, in the order of their ends, but for those of [`Nginx::start`].
    pub fn accesses(&self) -> Vec<Access> {
        let log = self.process.log();
        log.lines().filter_map(access).filter(|access| access.request != "GET /livez").collect()
    }

    /// Everything that it wrote.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// A line of the access log, if it is one.
fn access(line: &str) -> Option<Access> {
    let (_, rest) = line.split_once(" \"")?;
    let (request, rest) = rest.split_once("\" ")?;
    let (_, upstreams) = rest.split_once(" upstream=")?;
    let (upstreams, _) = upstreams.split_once(" connect=")?;
    let upstreams = upstreams.split([',', ' ']).filter(|word| !word.is_empty() && *word != "-" && *word != ":");
    Some(Access {
        request: request.to_owned(),
        status: rest.split(' ').next()?.parse().ok()?,
        upstreams: upstreams.map(str::to_owned).collect(),
    })
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // A killed master would leave its workers behind.
        let workers = children(self.process.pid());
        self.process.signal(Signal::TERM);
        let gone = within(PATIENCE, "NGINX ends", || self.process.ended().is_some());
        if gone.is_err() || workers.iter().any(|pid| is_alive(*pid)) {
            workers.iter().for_each(|pid| signal_pid(*pid, Signal::KILL));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_access_log_are_understood() {
        let line = "2026-01-01T00:00:00+00:00 127.0.0.1 \"POST /v1/completions\" 200 12B 0.1s \
                    upstream=127.0.0.1:1, 127.0.0.1:2 connect=-, 0.000 header=-, 0.1 id=x";
        let upstreams = vec!["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()];
        let wanted = Access { request: "POST /v1/completions".to_owned(), status: 200, upstreams };
        assert_eq!(access(line), Some(wanted));
        let nobody = "t 127.0.0.1 \"GET /metrics\" 404 12B 0.0s upstream=- connect=- header=- id=x";
        assert_eq!(access(nobody).map(|a| (a.status, a.upstreams)), Some((404, Vec::new())));
        assert_eq!(access("2026/01/01 00:00:00 [warn] 1#1: something"), None);
    }
}
