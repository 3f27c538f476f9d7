//! Certificates of the cluster: what coordinators and shards show each other, and the authority that both trust.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use crate::watched::{Count, Watched};

/// The files, and what they hold. Its `Debug` does not show the key.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterTls {
    /// Where the authority's certificate is from.
    pub ca_file: PathBuf,
    /// Where the own certificate is from.
    pub certificate_file: PathBuf,
    /// Where its key is from.
    pub key_file: PathBuf,
    /// PEM: the authority that certificates of the cluster must come from.
    pub ca: Vec<u8>,
    /// PEM: the own certificate.
    pub certificate: Vec<u8>,
    /// PEM: its key.
    pub key: Vec<u8>,
}

impl fmt::Debug for ClusterTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files = [&self.ca_file, &self.certificate_file, &self.key_file];
        f.debug_struct("ClusterTls").field("files", &files).finish_non_exhaustive()
    }
}

/// An option of the three that can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{option} {value}: {reason}")]
pub struct ClusterTlsError {
    /// Name of the flag.
    pub option: &'static str,
    /// As given.
    pub value: String,
    /// What is wrong, and what would do.
    pub reason: String,
}

/// What the files are called in logs and metrics.
pub const CLUSTER_CERTIFICATES: &str = "cluster certificate";

const CA: &str = "cluster-ca";
const CERTIFICATE: &str = "cluster-cert";
const KEY: &str = "cluster-key";

impl ClusterTls {
    /// Of the flags `--cluster-ca`, `--cluster-cert` and `--cluster-key`; none without them: plain text.
    ///
    /// # Errors
    /// If one of them is missing, or a file can't be read or holds something else.
    pub fn read(
        ca: Option<PathBuf>,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
    ) -> Result<Option<Self>, ClusterTlsError> {
        let (ca_file, certificate_file, key_file) = match (ca, certificate, key) {
            (None, None, None) => return Ok(None),
            (Some(ca), Some(certificate), Some(key)) => (ca, certificate, key),
            (ca, certificate, key) => {
                let given = [(CA, ca), (CERTIFICATE, certificate), (KEY, key)];
                let missing: Vec<_> =
                    given.iter().filter(|(_, f)| f.is_none()).map(|(n, _)| format!("--{n}")).collect();
                let (option, file) =
                    given.into_iter().find_map(|(option, file)| Some((option, file?))).unwrap_or_default();
                let reason = format!("needs {} too: all three or none", missing.join(" and "));
                return Err(ClusterTlsError { option, value: file.display().to_string(), reason });
            }
        };
        let certificate = read(CERTIFICATE, &certificate_file, "CERTIFICATE")?;
        let ca = read(CA, &ca_file, "CERTIFICATE")?;
        let key = read(KEY, &key_file, "PRIVATE KEY")?;
        Ok(Some(Self { ca_file, certificate_file, key_file, ca, certificate, key }))
    }

    /// The files: authority, certificate, key.
    pub fn files(&self) -> [&Path; 3] {
        [&self.ca_file, &self.certificate_file, &self.key_file]
    }

    /// The same files with what is in them now, in the order of [`Self::files`].
    ///
    /// # Errors
    /// If one of them holds something else.
    pub fn renewed(&self, contents: &[Vec<u8>]) -> Result<Self, ClusterTlsError> {
        let [ca, certificate, key] = contents else {
            return Err(self.unusable(format!("want three files, got {}", contents.len())));
        };
        let certificate = checked(CERTIFICATE, &self.certificate_file, "CERTIFICATE", certificate.clone())?;
        let ca = checked(CA, &self.ca_file, "CERTIFICATE", ca.clone())?;
        let key = checked(KEY, &self.key_file, "PRIVATE KEY", key.clone())?;
        Ok(Self { ca, certificate, key, ..self.clone() })
    }

    /// Follows the files: whenever they change, `take` gets what they hold now. What can't be used changes nothing.
    ///
    /// # Errors
    /// If one can't be read any more, or there is no thread.
    pub fn watch(
        &self,
        count: Count,
        mut take: impl FnMut(&Self) -> Result<(), String> + Send + 'static,
    ) -> io::Result<()> {
        let files = self.files().map(Path::to_path_buf).to_vec();
        let watched = Watched::open(CLUSTER_CERTIFICATES, files)?.counted(count);
        let before = self.clone();
        let mut take = move |contents: &[Vec<u8>]| take(&before.renewed(contents).map_err(|e| e.to_string())?);
        // They may have changed since they were read.
        if watched.contents() != [self.ca.clone(), self.certificate.clone(), self.key.clone()] {
            take(watched.contents()).map_err(io::Error::other)?;
        }
        watched.watch(take)
    }

    /// What is wrong with the contents, as whoever tried to use them says.
    pub fn unusable(&self, reason: impl fmt::Display) -> ClusterTlsError {
        let value = self.certificate_file.display().to_string();
        let reason = format!("it, its --cluster-key or --cluster-ca can't be used: {reason}");
        ClusterTlsError { option: CERTIFICATE, value, reason }
    }
}

fn read(option: &'static str, file: &Path, label: &str) -> Result<Vec<u8>, ClusterTlsError> {
    let wrong = |reason: String| ClusterTlsError { option, value: file.display().to_string(), reason };
    let pem = fs::read(file).map_err(|e| wrong(e.to_string()))?;
    checked(option, file, label, pem)
}

fn checked(option: &'static str, file: &Path, label: &str, pem: Vec<u8>) -> Result<Vec<u8>, ClusterTlsError> {
    let wrong = |reason: String| ClusterTlsError { option, value: file.display().to_string(), reason };
    // Keys have several kinds: `PRIVATE KEY`, `EC PRIVATE KEY`, `RSA PRIVATE KEY`.
    let has = String::from_utf8_lossy(&pem).lines().any(|l| l.starts_with("-----BEGIN ") && l.contains(label));
    if has { Ok(pem) } else { Err(wrong(format!("has no PEM block {label}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_files_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, label: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("-----BEGIN {label}-----\nAA==\n-----END {label}-----\n")).unwrap();
            Some(path)
        };
        let (ca, cert) = (file("ca", "CERTIFICATE"), file("cert", "CERTIFICATE"));
        let key = file("key", "EC PRIVATE KEY");
        let read = |ca: &Option<PathBuf>, cert: &Option<PathBuf>, key: &Option<PathBuf>| {
            ClusterTls::read(ca.clone(), cert.clone(), key.clone())
        };
        assert_eq!(read(&None, &None, &None), Ok(None));
        let all = read(&ca, &cert, &key).unwrap().unwrap();
        assert!(!format!("{all:?}").contains("PRIVATE"));
        let pem = |label: &str| format!("-----BEGIN {label}-----\nAQ==\n-----END {label}-----\n").into_bytes();
        let renewed = all.renewed(&[pem("CERTIFICATE"), pem("CERTIFICATE"), pem("PRIVATE KEY")]).unwrap();
        assert!(renewed != all && renewed.files() == all.files());
        let swapped = all.renewed(&[pem("CERTIFICATE"), pem("PRIVATE KEY"), pem("CERTIFICATE")]).unwrap_err();
        assert!(swapped.to_string().starts_with("--cluster-cert "), "{swapped}");

        let refused = |ca, cert, key| read(ca, cert, key).unwrap_err().to_string();
        let alone = refused(&None, &cert, &None);
        assert!(
            alone.starts_with("--cluster-cert ") && alone.contains("--cluster-ca and --cluster-key too"),
            "{alone}"
        );
        let swapped = refused(&ca, &key, &cert);
        assert!(swapped.starts_with("--cluster-cert ") && swapped.contains("PEM block CERTIFICATE"), "{swapped}");
        let absent = refused(&Some("/does/not/exist".into()), &cert, &key);
        assert!(absent.starts_with("--cluster-ca /does/not/exist: "), "{absent}");
    }
}
