//! Certificates: one authority for a run, which signs one certificate for each party's name.
//!
//! The authority's key never leaves the [`Authority`]; once every party has its [`Credentials`] it can be
//! dropped, and nobody can join the run any more. Parties trust this one authority and no other.

use std::{
    fmt, fs,
    io::{self, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use zeroize::Zeroizing;

use crate::{Error, Identity, Result};

/// How long certificates are valid, from a day before they are issued (clocks differ).
pub const VALIDITY: Duration = Duration::from_secs(90 * 24 * 3600);

/// Signs the certificates of one run.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What one party needs to prove who it is and to check the others: its key, its certificate, and the
/// authority's.
pub struct Credentials {
    identity: Identity,
    /// PEM, as the files hold it; the other two likewise.
    authority: String,
    certificate: String,
    key: Zeroizing<String>,
}

impl Authority {
    /// A new authority with a fresh key (ECDSA P-256).
    ///
    /// # Errors
    /// [`Error::Certificate`] if the system has no randomness.
    pub fn new() -> Result<Authority> {
        let mut params = params(Vec::new(), "veiltune run")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().map_err(failed)?;
        Ok(Authority {
            issuer: CertifiedIssuer::self_signed(params, key).map_err(failed)?,
        })
    }

    /// Credentials for the party called `identity`, with a fresh key.
    ///
    /// # Errors
    /// [`Error::Certificate`] if the system has no randomness.
    pub fn issue(&self, identity: &Identity) -> Result<Credentials> {
        let mut params = params(vec![identity.to_string()], identity.as_str())?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Credentials {
            identity: identity.clone(),
            authority: self.issuer.pem(),
            certificate: certificate.pem(),
            key: Zeroizing::new(key.serialize_pem()),
        })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority { .. }")
    }
}

fn params(names: Vec<String>, common_name: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(names).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    let day = Duration::from_secs(24 * 3600);
    let since_1970 = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_1970.saturating_sub(day);
    params.not_after = params.not_before + VALIDITY + day;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn failed(error: rcgen::Error) -> Error {
    Error::Certificate(error.to_string())
}

impl Credentials {
    /// Whose they are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Writes `authority.pem`, `NAME.pem` and `NAME.key` (readable by the owner only) into `directory`, which
    /// is made if there is none. Files of these names are replaced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, directory: impl AsRef<Path>) -> Result<()> {
        let directory = directory.as_ref();
        fs::create_dir_all(directory).map_err(Error::io(format!("making {}", directory.display())))?;
        let write = |name: String, text: &str, secret: bool| {
            let path = directory.join(name);
            write_file(&path, text.as_bytes(), secret)
                .map_err(Error::io(format!("writing {}", path.display())))
        };
        write("authority.pem".into(), &self.authority, false)?;
        write(format!("{}.pem", self.identity), &self.certificate, false)?;
        write(format!("{}.key", self.identity), &self.key, true)
    }

    /// Reads what [`save`](Credentials::save) wrote for `identity`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::BadFile`] if a file holds no certificate or key. That the three fit together is checked when a
    /// connection is made.
    pub fn load(directory: impl AsRef<Path>, identity: &Identity) -> Result<Credentials> {
        let directory = directory.as_ref();
        let certificate = |name: &str| read::<CertificateDer>(&directory.join(name));
        Ok(Credentials {
            identity: identity.clone(),
            authority: certificate("authority.pem")?,
            certificate: certificate(&format!("{identity}.pem"))?,
            key: Zeroizing::new(read::<PrivateKeyDer>(&directory.join(format!("{identity}.key")))?),
        })
    }

    pub(crate) fn authority(&self) -> Result<CertificateDer<'static>> {
        parse(&self.authority)
    }

    pub(crate) fn certificate(&self) -> Result<CertificateDer<'static>> {
        parse(&self.certificate)
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>> {
        parse(&self.key)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials {{ identity: {:?}, .. }}", self.identity)
    }
}

fn write_file(path: &Path, contents: &[u8], secret: bool) -> io::Result<()> {
    // A new file, because an old one would keep its permissions.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, if secret { 0o600 } else { 0o644 });
    #[cfg(not(unix))]
    let _ = secret;
    options.open(path)?.write_all(contents)
}

/// The text of a file that holds a `T` in PEM.
fn read<T: PemObject>(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("reading {}", path.display())))?;
    match parse::<T>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Error::BadFile {
            path: path.display().to_string(),
            detail: error.to_string(),
        }),
    }
}

fn parse<T: PemObject>(text: &str) -> Result<T> {
    T::from_pem_slice(text.as_bytes()).map_err(|error| Error::Certificate(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_credentials_come_back_and_the_key_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let identity = Identity::new("dealer").unwrap();
        let issued = Authority::new().unwrap().issue(&identity).unwrap();
        for _ in 0..2 {
            issued.save(directory.path()).unwrap();
        }
        let loaded = Credentials::load(directory.path(), &identity).unwrap();
        assert_eq!(loaded.authority, issued.authority);
        assert_eq!(loaded.certificate, issued.certificate);
        assert_eq!(loaded.key, issued.key);
        assert_eq!(format!("{loaded:?}"), r#"Credentials { identity: "dealer", .. }"#);

        #[cfg(unix)]
        {
            let key = fs::metadata(directory.path().join("dealer.key")).unwrap();
            assert_eq!(
                std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777,
                0o600
            );
        }
    }

    #[test]
    fn bad_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let identity = Identity::new("dealer").unwrap();
        let load = || Credentials::load(directory.path(), &identity).unwrap_err();
        assert!(load().to_string().contains("authority.pem"), "{}", load());

        Authority::new()
            .unwrap()
            .issue(&identity)
            .unwrap()
            .save(directory.path())
            .unwrap();
        fs::write(directory.path().join("dealer.key"), "no key").unwrap();
        assert!(matches!(load(), Error::BadFile { path, .. } if path.ends_with("dealer.key")));
    }
}
