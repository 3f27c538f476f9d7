//! Flags, environment and file become one checked configuration.
//!
//! Precedence: flags, then environment, then file, then defaults.

mod flags;

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{Parser, error::ErrorKind};
use figment::{
    Figment,
    providers::{Format, Serialized, Toml},
};
use phalanx_cluster::{
    byte_size::ByteSize,
    error_text::with_causes,
    tls::{ClusterTls, ClusterTlsError},
};
use phalanx_kernels::{collective, ops::Precision};
use phalanx_proto::dial::Dialer;
use tonic::transport::Uri;

use self::flags::{Addresses, DEFAULTS, Merged, MirrorMemory};
pub use self::flags::{Flags, LogFormat};
use crate::device::{self, DeviceConfig};
#[cfg(any(debug_assertions, feature = "failpoints"))]
use crate::failpoint::Failpoint;

/// What a shard runs with; checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Coordinators, in the order in which they are tried.
    pub coordinators: Vec<Uri>,
    /// Device.
    pub device: DeviceConfig,
    /// Where this shard listens for ranks of other hosts.
    pub listen: SocketAddr,
    /// Where they reach it; `None` for where it listens.
    pub advertise: Option<Advertised>,
    /// Proof that it may join; empty for none.
    pub join_token: String,
    /// How coordinators are dialled.
    pub dialer: Dialer,
    /// What it shows them, if it does.
    pub cluster_tls: Option<ClusterTls>,
    /// Longest wait for leave.
    pub leave_timeout: Duration,
    /// Most bytes of copies of other ranks' rows; 0 for no copies, `None` for a share of what is free.
    pub mirror_memory: Option<u64>,
    /// Where they are taken in.
    pub mirror_listen: SocketAddr,
    /// Where probes are answered, if anywhere.
    pub health: Option<SocketAddr>,
    /// Stable name.
    pub shard_id: String,
    /// Collective; `None` for the fastest that fits.
    pub collective: Option<String>,
    /// How the log looks.
    pub log_format: LogFormat,
    /// Whether to end with the parent process.
    pub exit_with_parent: bool,
    /// Faults, for tests.
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    pub failpoints: Vec<Failpoint>,
}

/// Where others reach this shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// A name or an address.
    pub host: String,
    /// `None` for the one that is listened on.
    pub port: Option<u16>,
}

impl Advertised {
    /// `HOST:PORT` of a listener on this port.
    pub fn address(&self, listening: u16) -> String {
        let port = self.port.unwrap_or(listening);
        if self.host.contains(':') { format!("[{}]:{port}", self.host) } else { format!("{}:{port}", self.host) }
    }
}

/// An option that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Help or version was asked for, or the command line can't be parsed.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// The file, or a value in it.
    #[error("configuration: {0}")]
    Merge(Box<figment::Error>),
    /// A value.
    #[error("--{option} {value}: {reason}")]
    Value {
        /// Name of the flag.
        option: &'static str,
        /// As given.
        value: String,
        /// What is wrong and what would do.
        reason: String,
    },
    /// An option that has no default is not there.
    #[error("--{option} is missing: {hint}")]
    Missing {
        /// Name of the flag.
        option: &'static str,
        /// What to give.
        hint: &'static str,
    },
}

impl Config {
    /// Of a command line (the program's name first), the environment and the file that they name.
    ///
    /// # Errors
    /// Says which option is wrong and what would do.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, ConfigError> {
        Self::from_flags(&Flags::try_parse_from(args)?)
    }

    fn from_flags(flags: &Flags) -> Result<Self, ConfigError> {
        let mut figment = Figment::from(Serialized::defaults(DEFAULTS));
        if let Some(file) = &flags.config {
            // figment takes a missing file for an empty one.
            if let Err(error) = std::fs::metadata(file) {
                return Err(value("config", file.display().to_string(), error.to_string()));
            }
            figment = figment.merge(Toml::file_exact(file));
        }
        let merged: Merged = figment
            .merge(Serialized::defaults(flags))
            .extract()
            .map_err(|error| ConfigError::Merge(Box::new(error)))?;
        merged.check(flags)
    }
}

impl Merged {
    fn check(self, flags: &Flags) -> Result<Config, ConfigError> {
        let texts = match self.coordinator {
            Addresses::List(texts) => texts,
            Addresses::Text(text) => text.split(',').map(str::to_owned).collect(),
        };
        let refused = |ClusterTlsError { option, value, reason }| ConfigError::Value { option, value, reason };
        let cluster_tls = ClusterTls::read(self.cluster_ca, self.cluster_cert, self.cluster_key).map_err(refused)?;
        let dialer = match &cluster_tls {
            Some(tls) => Dialer::with_certificates(&tls.ca, &tls.certificate, &tls.key)
                .map_err(|error| refused(tls.unusable(with_causes(&error))))?,
            None => Dialer::default(),
        };
        let coordinators =
            texts.iter().map(|text| coordinator(text.trim(), dialer.scheme())).collect::<Result<Vec<_>, _>>()?;
        if coordinators.is_empty() {
            let hint = "give the coordinator's gRPC address, such as http://127.0.0.1:50051";
            return Err(ConfigError::Missing { option: "coordinator", hint });
        }
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = self.threads.unwrap_or_else(cores);
        if !(1..=1024).contains(&threads) {
            return Err(value("threads", threads.to_string(), "want 1 to 1024"));
        }
        let isa = device::isa_of(&self.isa).map_err(|error| value("isa", self.isa.clone(), error.to_string()))?;
        let device = DeviceConfig { name: self.device, threads, isa };
        // A device that is not here should be known before the coordinator counts on it.
        device.open(Precision::Auto).map_err(|error| value("device", device.name.clone(), error.to_string()))?;
        let advertise = self.advertise.as_deref().map(advertised).transpose()?;
        let listen = listen(self.listen.as_deref(), advertise.as_ref())?;
        let mirror_memory = self.mirror_memory.map(mirror_memory).transpose()?;
        let mirror_listen = match self.mirror_listen.as_deref() {
            Some(text) => socket("mirror-listen", text)?,
            None => SocketAddr::new(listen.ip(), 0),
        };
        let health = health(self.health_port, self.health_host.as_deref())?;
        let join_token = join_token(self.join_token, self.join_token_file)?;
        let kinds: Vec<&str> = collective::KINDS.iter().map(|kind| kind.name).collect();
        let collective = match self.collective.as_str() {
            "auto" => None,
            name if kinds.contains(&name) => Some(self.collective),
            _ => return Err(value("collective", self.collective, format!("want auto, {}", kinds.join(", ")))),
        };
        let shard_id = self.shard_id.unwrap_or_else(crate::host::default_shard_id);
        if shard_id.is_empty() || shard_id.len() > 128 || shard_id.chars().any(|c| c.is_control() || c == '/') {
            let reason = "want 1 to 128 characters without slashes and control characters";
            return Err(value("shard-id", shard_id, reason));
        }
        Ok(Config {
            coordinators,
            device,
            listen,
            advertise,
            join_token,
            dialer,
            cluster_tls,
            leave_timeout: Duration::from_secs(u64::from(self.leave_timeout)),
            mirror_memory,
            mirror_listen,
            health,
            shard_id,
            collective,
            log_format: self.log_format,
            exit_with_parent: flags.exit_with_parent,
            #[cfg(any(debug_assertions, feature = "failpoints"))]
            failpoints: flags.failpoint.clone(),
        })
    }
}

fn listen(text: Option<&str>, advertise: Option<&Advertised>) -> Result<SocketAddr, ConfigError> {
    if let Some(text) = text {
        return socket("listen", text);
    }
    Ok(match advertise {
        // The address may be another's that leads here, so all own ones listen.
        Some(advertise) => {
            let port = advertise.port.unwrap_or(0);
            match IpAddr::from_str(&advertise.host) {
                Ok(ip) if ip.is_loopback() => (ip, port).into(),
                Ok(IpAddr::V6(_)) => (Ipv6Addr::UNSPECIFIED, port).into(),
                _ => (Ipv4Addr::UNSPECIFIED, port).into(),
            }
        }
        None => (Ipv4Addr::LOCALHOST, 0).into(),
    })
}

fn socket(option: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    SocketAddr::from_str(text).map_err(|_| value(option, text, "want ADDRESS:PORT, such as 10.0.0.5:7000"))
}

fn health(port: Option<u16>, host: Option<&str>) -> Result<Option<SocketAddr>, ConfigError> {
    let ip = match host {
        Some("localhost") | None => IpAddr::from(Ipv4Addr::LOCALHOST),
        Some(text) => IpAddr::from_str(text)
            .map_err(|_| value("health-host", text, "want an IP address such as 127.0.0.1, 0.0.0.0 or ::"))?,
    };
    match (port, host) {
        (Some(port), _) => Ok(Some(SocketAddr::new(ip, port))),
        (None, Some(host)) => Err(value("health-host", host, "needs --health-port too")),
        (None, None) => Ok(None),
    }
}

fn mirror_memory(size: MirrorMemory) -> Result<u64, ConfigError> {
    match size {
        MirrorMemory::Bytes(bytes) => Ok(bytes),
        MirrorMemory::Text(text) if text.trim() == "0" => Ok(0),
        MirrorMemory::Text(text) => match ByteSize::from_str(&text) {
            Ok(ByteSize(bytes)) => Ok(bytes),
            Err(reason) => Err(value("mirror-memory", text, reason)),
        },
    }
}

fn advertised(text: &str) -> Result<Advertised, ConfigError> {
    let wrong = || value("advertise", text, "want HOST or HOST:PORT, such as 10.0.0.5, gpu1:7000 or [fd00::5]:7000");
    let (host, port) = if let Ok(ip) = IpAddr::from_str(text.trim_matches(['[', ']'])) {
        (ip.to_string(), None)
    } else {
        match text.rsplit_once(':') {
            Some((host, port)) => {
                (host.trim_matches(['[', ']']).to_owned(), Some(port.parse::<u16>().map_err(|_| wrong())?))
            }
            None => (text.to_owned(), None),
        }
    };
    let is_address = IpAddr::from_str(&host).is_ok_and(|ip| !ip.is_unspecified());
    let is_name = !host.is_empty()
        && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        && IpAddr::from_str(&host).is_err();
    if !(is_address || is_name) || port == Some(0) {
        return Err(wrong());
    }
    Ok(Advertised { host, port })
}

fn join_token(token: Option<String>, file: Option<PathBuf>) -> Result<String, ConfigError> {
    match (token, file) {
        (Some(_), Some(file)) => {
            Err(value("join-token-file", file.display().to_string(), "give it or --join-token, not both"))
        }
        (Some(token), None) => Ok(token),
        (None, Some(file)) => match std::fs::read_to_string(&file) {
            Ok(text) if text.trim().is_empty() => {
                Err(value("join-token-file", file.display().to_string(), "the file is empty"))
            }
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) => Err(value("join-token-file", file.display().to_string(), error.to_string())),
        },
        (None, None) => Ok(String::new()),
    }
}

fn coordinator(text: &str, scheme: &str) -> Result<Uri, ConfigError> {
    let wrong = |reason: String| value("coordinator", text.to_owned(), reason);
    let uri = Uri::from_str(text).map_err(|error| wrong(format!("{error}: want {scheme}://HOST:PORT")))?;
    match (uri.scheme_str(), uri.port_u16()) {
        (Some(given), Some(_)) if given == scheme => Ok(uri),
        (Some("https"), Some(_)) => {
            Err(wrong("needs --cluster-ca, --cluster-cert and --cluster-key; without them want http://".to_owned()))
        }
        (Some("http"), Some(_)) => Err(wrong("want https://HOST:PORT, because --cluster-ca is given".to_owned())),
        _ => Err(wrong(format!("want {scheme}://HOST:PORT"))),
    }
}

fn value(option: &'static str, value: impl Into<String>, reason: impl Into<String>) -> ConfigError {
    ConfigError::Value { option, value: value.into(), reason: reason.into() }
}

impl ConfigError {
    /// Prints the error, or the help that was asked for. Returns whether it was help.
    pub fn print(&self) -> bool {
        match self {
            Self::CommandLine(error) => {
                // Nothing can be done where the terminal is gone.
                let _gone = error.print();
                matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion)
            }
            error => {
                eprintln!("shard: {error}");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;
