//! `coordinator certs init`: an authority for one cluster, and what its coordinators and shards show each other.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{CommandFactory, Parser, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

/// How long the authority lasts: ten years.
const AUTHORITY_LIFE: Duration = Duration::from_secs(3652 * DAY_S);
/// How long certificates last: five years.
const CERTIFICATE_LIFE: Duration = Duration::from_secs(1826 * DAY_S);
/// Clocks of other machines may be behind by so much.
const CLOCK_LIMIT: Duration = Duration::from_secs(DAY_S);
const DAY_S: u64 = 86_400;
/// Names that every coordinator has.
const OWN_NAMES: &[&str] = &["localhost", "127.0.0.1", "::1"];

#[derive(Debug, Parser)]
#[command(name = "coordinator certs", version, about = "Makes certificates for the cluster's own connections.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes an authority and certificates for coordinators and for shards, all new. Keys can be read by their owner only.
    Init {
        /// Folder to put them in. Nothing that is there is overwritten.
        #[arg(long, value_name = "FOLDER")]
        dir: PathBuf,

        /// Host names and addresses under which coordinators are dialled, beside localhost, 127.0.0.1 and ::1; separated by
        /// commas or repeated.
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        host: Vec<String>,
    },
}

/// Why there are no certificates.
#[derive(Debug, thiserror::Error)]
enum CertsError {
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{} is there already: nothing was changed; give another --dir, or move it away", .0.display())]
    Exists(PathBuf),
    #[error("--host {name:?}: {error}")]
    Name { name: String, error: rcgen::Error },
    #[error("no certificate can be made: {0}")]
    Making(#[from] rcgen::Error),
}

/// The command line.
pub fn spec() -> clap::Command {
    Cli::command()
}

/// Runs the command; `args` begins with the program's name.
///
/// Exit codes: 0 if it worked, 2 for wrong options, 1 for everything else.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Command::Init { dir, host } = match Cli::try_parse_from(args) {
        Ok(cli) => cli.command,
        Err(error) => {
            // Nothing can be done where the terminal is gone.
            let _gone = error.print();
            return ExitCode::from(u8::from(error.use_stderr()) * 2);
        }
    };
    match init(&dir, &host) {
        Ok(made) => {
            print!("{}", made.advice());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("coordinator certs: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The files that were made.
struct Made {
    authority: PathBuf,
    authority_key: PathBuf,
    coordinator: (PathBuf, PathBuf),
    shard: (PathBuf, PathBuf),
}

impl Made {
    fn in_folder(dir: &Path) -> Self {
        let pair = |name: &str| (dir.join(format!("{name}.pem")), dir.join(format!("{name}-key.pem")));
        let (authority, authority_key) = pair("ca");
        Self { authority, authority_key, coordinator: pair("coordinator"), shard: pair("shard") }
    }

    fn advice(&self) -> String {
        let options = |(certificate, key): &(PathBuf, PathBuf)| {
            let (ca, certificate, key) = (self.authority.display(), certificate.display(), key.display());
            format!("--cluster-ca {ca} --cluster-cert {certificate} --cluster-key {key}")
        };
        format!(
            "coordinators: {}\nshards:       {}\nKeep {} where no cluster process runs: who has it can join.\n",
            options(&self.coordinator),
            options(&self.shard),
            self.authority_key.display()
        )
    }
}

fn init(dir: &Path, hosts: &[String]) -> Result<Made, CertsError> {
    let made = Made::in_folder(dir);
    let files =
        [&made.authority, &made.authority_key, &made.coordinator.0, &made.coordinator.1, &made.shard.0, &made.shard.1];
    if let Some(there) = files.into_iter().find(|f| f.symlink_metadata().is_ok()) {
        return Err(CertsError::Exists(there.clone()));
    }
    let authority_key = KeyPair::generate()?;
    let mut authority = params(&[], "Phalanx cluster authority", AUTHORITY_LIFE)?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key_pem = authority_key.serialize_pem();
    let authority = CertifiedIssuer::self_signed(authority, authority_key)?;

    let mut names: Vec<String> = OWN_NAMES.iter().map(|n| (*n).to_owned()).collect();
    names.extend(hosts.iter().filter(|h| !OWN_NAMES.contains(&h.as_str())).cloned());
    // Coordinators dial each other.
    let both = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let signed = |names: &[String], title: &str, usages: Vec<ExtendedKeyUsagePurpose>| {
        let key = KeyPair::generate()?;
        let mut certificate = params(names, title, CERTIFICATE_LIFE)?;
        certificate.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        certificate.extended_key_usages = usages;
        Ok::<_, CertsError>((certificate.signed_by(&key, &authority)?.pem(), key.serialize_pem()))
    };
    let coordinator = signed(&names, "Phalanx coordinator", both)?;
    // Nobody dials a shard over gRPC: its certificate names no host and is good on any.
    let shard = signed(&[], "Phalanx shard", vec![ExtendedKeyUsagePurpose::ClientAuth])?;

    fs::create_dir_all(dir).map_err(|error| CertsError::File { path: dir.to_owned(), error })?;
    write(&made.authority, &authority.pem(), false)?;
    write(&made.authority_key, &authority_key_pem, true)?;
    for ((certificate_file, key_file), (certificate, key)) in [(&made.coordinator, coordinator), (&made.shard, shard)] {
        write(certificate_file, &certificate, false)?;
        write(key_file, &key, true)?;
    }
    Ok(made)
}

fn params(names: &[String], title: &str, life: Duration) -> Result<CertificateParams, CertsError> {
    for name in names {
        CertificateParams::new(vec![name.clone()]).map_err(|error| CertsError::Name { name: name.clone(), error })?;
    }
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, title);
    // A clock before 1970 is off by more than can be mended here.
    let now = date_time_ymd(1970, 1, 1) + SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (params.not_before, params.not_after) = (now - CLOCK_LIMIT, now + life);
    Ok(params)
}

fn write(path: &Path, text: &str, is_secret: bool) -> Result<(), CertsError> {
    let mode = if is_secret { 0o600 } else { 0o644 };
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => CertsError::Exists(path.to_owned()),
        _ => CertsError::File { path: path.to_owned(), error },
    };
    let mut file = File::options().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use phalanx_cluster::tls::ClusterTls;
    use phalanx_proto::dial::Dialer;

    use super::*;

    #[test]
    fn what_is_made_can_be_used_and_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        let made = init(&dir, &["gpu-1.lan".to_owned(), "10.0.0.5".to_owned(), "localhost".to_owned()]).unwrap();
        for (certificate, key) in [&made.coordinator, &made.shard] {
            let (ca, certificate, key) = (made.authority.clone(), certificate.clone(), key.clone());
            let tls = ClusterTls::read(Some(ca), Some(certificate), Some(key)).unwrap().unwrap();
            Dialer::with_certificates(&tls.ca, &tls.certificate, &tls.key).unwrap();
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for key in [&made.authority_key, &made.coordinator.1, &made.shard.1] {
            assert_eq!(mode(key), 0o600, "{}", key.display());
        }
        assert!(made.advice().contains("--cluster-key"));

        let before = fs::read(&made.shard.1).unwrap();
        fs::remove_file(&made.authority).unwrap();
        let refused = init(&dir, &[]).err().unwrap().to_string();
        assert!(refused.contains("ca-key.pem is there already"), "{refused}");
        assert_eq!(fs::read(&made.shard.1).unwrap(), before);
        assert!(!made.authority.exists());
    }

    #[test]
    fn a_key_and_another_certificate_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let made = init(dir.path(), &[]).unwrap();
        let read = |path: &Path| fs::read(path).unwrap();
        let (ca, certificate, key) = (read(&made.authority), read(&made.coordinator.0), read(&made.shard.1));
        assert!(Dialer::with_certificates(&ca, &certificate, &key).is_err());
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = init(dir.path(), &["größe".to_owned()]).err().unwrap().to_string();
        assert!(refused.contains("--host \"größe\""), "{refused}");
    }
}
