//! TLS 1.3 with a certificate on each side, and what its failures mean.

use std::{io, sync::Arc, time::Instant};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, RootCertStore,
    ServerConfig, ServerConnection,
    client::{Resumption, verify_server_name},
    crypto::{CryptoProvider, ring},
    pki_types::ServerName,
    server::{ParsedCertificate, WebPkiClientVerifier},
    version::TLS13,
};

use crate::{Error, Identity, Result, error::sanitise, pki::Credentials};

/// The calling side of a connection to `peer`.
pub(crate) fn client(credentials: &Credentials, peer: &Identity) -> Result<Connection> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots(credentials)?)
        .with_client_auth_cert(vec![credentials.certificate()?], credentials.key()?)
        .map_err(unusable)?;
    config.resumption = Resumption::disabled();
    ClientConnection::new(Arc::new(config), server_name(peer)?)
        .map(Connection::from)
        .map_err(unusable)
}

/// What the listening side needs to answer.
pub(crate) fn server_config(credentials: &Credentials) -> Result<Arc<ServerConfig>> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(credentials)?, provider())
        .build()
        .map_err(|error| Error::Certificate(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![credentials.certificate()?], credentials.key()?)
        .map_err(unusable)?;
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The listening side of a connection.
pub(crate) fn server(config: &Arc<ServerConfig>) -> Result<Connection> {
    ServerConnection::new(config.clone())
        .map(Connection::from)
        .map_err(unusable)
}

/// Which of `expected` the caller's certificate, whose chain TLS has verified, belongs to.
pub(crate) fn identify(connection: &Connection, expected: &[Identity]) -> Result<Identity> {
    let untrusted = |detail: &str| Error::Untrusted {
        peer: Identity::unknown(),
        detail: detail.into(),
    };
    let certificate = connection
        .peer_certificates()
        .and_then(<[_]>::first)
        .ok_or_else(|| untrusted("it showed none"))?;
    let certificate = ParsedCertificate::try_from(certificate).map_err(|_| untrusted("it cannot be read"))?;
    let mut presented = String::from("nobody known");
    for identity in expected {
        match verify_server_name(&certificate, &server_name(identity)?) {
            Ok(()) => return Ok(identity.clone()),
            Err(rustls::Error::InvalidCertificate(error)) => presented = names(&error).unwrap_or(presented),
            Err(_) => {}
        }
    }
    Err(Error::WrongIdentity {
        expected: any_of(expected),
        presented,
    })
}

/// Names for an error message.
pub(crate) fn any_of(identities: &[Identity]) -> String {
    identities
        .iter()
        .map(Identity::as_str)
        .collect::<Vec<_>>()
        .join(" or ")
}

/// What a failed read, write or handshake means.
pub(crate) fn explain(peer: &Identity, error: io::Error, handshaking: bool, since: Instant) -> Error {
    let peer = peer.clone();
    let gone = |how: &str| Error::PeerGone {
        peer: peer.clone(),
        how: how.into(),
    };
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(error) => explain_tls(peer, error, handshaking),
        None => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Silent {
                peer,
                waited: since.elapsed(),
            },
            io::ErrorKind::UnexpectedEof if handshaking => {
                gone("it hung up while the connection was being set up")
            }
            _ => gone(&error.to_string()),
        },
    }
}

/// What a failure inside TLS means.
pub(crate) fn explain_tls(peer: Identity, error: &rustls::Error, handshaking: bool) -> Error {
    let detail = sanitise(error.to_string().as_bytes());
    match error {
        rustls::Error::InvalidMessage(_) if handshaking => Error::NotTls { peer, detail },
        rustls::Error::NoCertificatesPresented => Error::Untrusted {
            peer,
            detail: "it showed none".into(),
        },
        rustls::Error::InvalidCertificate(error) => match names(error) {
            Some(presented) => Error::WrongIdentity {
                expected: peer.to_string(),
                presented,
            },
            None => Error::Untrusted { peer, detail },
        },
        rustls::Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError,
        ) => Error::Rejected { peer, detail },
        _ => Error::Tls { peer, detail },
    }
}

/// The names in a certificate that was refused for not having the right one.
fn names(error: &CertificateError) -> Option<String> {
    match error {
        CertificateError::NotValidForName => Some("somebody else".into()),
        CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            Some("nobody".into())
        }
        CertificateError::NotValidForNameContext { presented, .. } => {
            let bare = |name: &String| {
                let name = name
                    .strip_prefix("DnsName(\"")
                    .and_then(|name| name.strip_suffix("\")"))
                    .unwrap_or(name);
                sanitise(name.as_bytes())
            };
            Some(sanitise(
                presented
                    .iter()
                    .map(bare)
                    .collect::<Vec<_>>()
                    .join(", ")
                    .as_bytes(),
            ))
        }
        _ => None,
    }
}

fn server_name(identity: &Identity) -> Result<ServerName<'static>> {
    ServerName::try_from(identity.to_string()).map_err(|_| Error::BadName(identity.to_string()))
}

fn roots(credentials: &Credentials) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(credentials.authority()?).map_err(unusable)?;
    Ok(Arc::new(roots))
}

/// The usual algorithms, AES-128 first: as good as AES-256 for keys that live for one run, and faster.
fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let cipher_suites = vec![
        TLS13_AES_128_GCM_SHA256,
        TLS13_AES_256_GCM_SHA384,
        TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider {
        cipher_suites,
        ..ring::default_provider()
    })
}

fn unusable(error: rustls::Error) -> Error {
    Error::Certificate(format!("these credentials cannot be used: {error}"))
}
