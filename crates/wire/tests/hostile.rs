//! Peers that misbehave: each misdeed has its own clear error, promptly, and the side that sees it tells the
//! other.

mod common;

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use common::*;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use veiltune_wire::{
    Error, Link, MAX_MESSAGE, Options, Result,
    pki::{Authority, Credentials},
    tcp::{self, Listener, TcpLink},
};

const PROMPT: Duration = Duration::from_secs(6);

/// What the listener makes of a caller that does `misdeed` to it.
fn accept(misdeed: impl FnOnce(SocketAddr) + Send + 'static) -> Result<TcpLink> {
    let (dealer, address) = listen(&hasty());
    let caller = thread::spawn(move || misdeed(address));
    let result = within(PROMPT, || dealer.join().unwrap());
    caller.join().unwrap();
    result
}

/// What a caller makes of a server that does `misdeed` to it.
fn call(misdeed: impl FnOnce(TcpStream) + Send + 'static) -> Result<TcpLink> {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let server = thread::spawn(move || misdeed(server.accept().unwrap().0));
    let result = within(PROMPT, || {
        tcp::connect(&address, &credentials("client"), &id("dealer"), &hasty())
    });
    server.join().unwrap();
    result
}

/// Reads until the other side hangs up.
fn wait_for_end(socket: &mut impl Read) {
    let _ = io::copy(socket, &mut io::sink());
}

macro_rules! assert_error {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {{
        let error = $result.err().expect("must fail");
        assert!(matches!(&error, $pattern $(if $guard)?), "{error} {error:?}");
    }};
}

#[test]
fn plain_text_is_not_tls() {
    let http = b"GET / HTTP/1.1\r\nHost: dealer\r\n\r\n";
    let say = |mut socket: TcpStream| {
        socket.write_all(http).unwrap();
        wait_for_end(&mut socket);
    };
    assert_error!(
        accept(move |address| say(TcpStream::connect(address).unwrap())),
        Error::NotTls { .. }
    );
    assert_error!(call(say), Error::NotTls { peer, .. } if peer.as_str() == "dealer");
}

#[test]
fn silence_before_tls_ends_with_the_handshake_limit() {
    assert_error!(
        accept(|address| wait_for_end(&mut TcpStream::connect(address).unwrap())),
        Error::Silent { .. }
    );
    assert_error!(call(|mut socket| wait_for_end(&mut socket)), Error::Silent { .. });
}

#[test]
fn a_drip_of_bytes_does_not_extend_the_handshake_limit() {
    let drip = |mut socket: TcpStream| {
        // The header of a long handshake record, then its bytes one by one.
        let _ = socket.write_all(&[22, 3, 3, 0x40, 0]);
        while socket.write_all(&[1]).is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    };
    let result = accept(move |address| drip(TcpStream::connect(address).unwrap()));
    assert_error!(
        result,
        Error::Silent { .. } | Error::NotTls { .. } | Error::Tls { .. }
    );
}

#[test]
fn hanging_up_before_tls_is_seen() {
    assert_error!(
        accept(|address| drop(TcpStream::connect(address).unwrap())),
        Error::PeerGone { .. }
    );
    assert_error!(call(drop), Error::PeerGone { .. });
}

#[test]
fn nobody_there_ends_with_the_connection_limit() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let options = Options {
        connect: Duration::from_millis(300),
        ..hasty()
    };
    let start = Instant::now();
    let connect = |address: &str| tcp::connect(address, &credentials("client"), &id("dealer"), &options);
    assert_error!(within(PROMPT, || connect(&address)), Error::Unreachable { address: there, .. } if *there == address);
    assert!(start.elapsed() >= Duration::from_millis(200), "it must try again");
    assert_error!(connect("no port in this"), Error::Unreachable { .. });

    let listener = Listener::bind("127.0.0.1:0", &credentials("dealer"), &options).unwrap();
    let result = within(PROMPT, || listener.accept(&[id("client"), id("provider")]));
    assert_error!(result, Error::NobodyCame { expected, .. } if expected == "client or provider");
    let taken = Listener::bind(&listener.address().to_string(), &credentials("dealer"), &options);
    assert_error!(taken, Error::Io { .. });
}

/// Credentials of `name` from another authority, but trusting the one of these tests.
fn forged(name: &str) -> Credentials {
    let directory = tempfile::tempdir().unwrap();
    credentials(name).save(directory.path()).unwrap();
    let ours = fs::read(directory.path().join("authority.pem")).unwrap();
    Authority::new()
        .unwrap()
        .issue(&id(name))
        .unwrap()
        .save(directory.path())
        .unwrap();
    fs::write(directory.path().join("authority.pem"), ours).unwrap();
    Credentials::load(directory.path(), &id(name)).unwrap()
}

/// Listener as `theirs`, waiting for `client`; caller with `mine`, looking for `wanted`. What each makes of
/// it.
fn meet(theirs: Credentials, mine: Credentials, wanted: &str) -> (Result<TcpLink>, Result<TcpLink>) {
    let listener = Listener::bind("127.0.0.1:0", &theirs, &hasty()).unwrap();
    let address = listener.address().to_string();
    let accepting = thread::spawn(move || listener.accept(&[id("client"), id("provider")]));
    let called = within(PROMPT, || tcp::connect(&address, &mine, &id(wanted), &hasty()));
    (within(PROMPT, || accepting.join().unwrap()), called)
}

#[test]
fn certificates_of_another_authority_are_not_trusted() {
    let (accepted, called) = meet(credentials("dealer"), forged("client"), "dealer");
    assert_error!(accepted, Error::Untrusted { .. });
    assert_error!(called, Error::Rejected { peer, .. } if peer.as_str() == "dealer");

    let (accepted, called) = meet(forged("dealer"), credentials("client"), "dealer");
    assert_error!(accepted, Error::Rejected { .. });
    assert_error!(called, Error::Untrusted { peer, .. } if peer.as_str() == "dealer");
}

#[test]
fn a_good_certificate_of_somebody_else_is_not_enough() {
    let (accepted, called) = meet(credentials("dealer"), credentials("client"), "provider");
    assert_error!(called, Error::WrongIdentity { expected, presented } if expected == "provider" && presented == "dealer");
    assert_error!(accepted, Error::Rejected { .. });

    let (accepted, called) = meet(credentials("dealer"), credentials("mallory"), "dealer");
    assert_error!(
        accepted,
        Error::WrongIdentity { expected, presented } if expected == "client or provider" && presented == "mallory"
    );
    assert_error!(called, Error::PeerAborted { reason, .. } if reason.contains("mallory"));
}

#[test]
fn a_listener_survives_a_stranger() {
    let listener = Listener::bind("127.0.0.1:0", &credentials("dealer"), &hasty()).unwrap();
    let address = listener.address().to_string();
    drop(TcpStream::connect(&address).unwrap());
    assert_error!(listener.accept(&[id("client")]), Error::PeerGone { .. });
    let caller = thread::spawn(move || {
        tcp::connect(&address, &credentials("client"), &id("dealer"), &hasty()).unwrap()
    });
    assert_eq!(
        listener.accept(&[id("client")]).unwrap().peer().as_str(),
        "client"
    );
    caller.join().unwrap();
}

#[test]
fn strangers_that_say_nothing_keep_nobody_waiting() {
    let listener = Listener::bind("127.0.0.1:0", &credentials("dealer"), &hasty()).unwrap();
    let address = listener.address().to_string();
    let silent = [(); 20].map(|()| TcpStream::connect(&address).unwrap());
    let caller = thread::spawn(move || {
        tcp::connect(&address, &credentials("client"), &id("dealer"), &hasty()).unwrap()
    });
    // The one that came last, before any of them has run out of time.
    let link = listener.accept(&[id("client")]).unwrap();
    assert_eq!(link.peer().as_str(), "client");
    for _ in &silent {
        assert_error!(listener.accept(&[id("client")]), Error::Silent { .. });
    }
    assert_error!(listener.accept(&[id("client")]), Error::NobodyCame { .. });
    caller.join().unwrap();
}

type RawTls = StreamOwned<ClientConnection, TcpStream>;

/// A caller that speaks TLS with the client's certificate (or none), and nothing beyond.
fn raw_tls(address: SocketAddr, with_certificate: bool) -> RawTls {
    let directory = tempfile::tempdir().unwrap();
    credentials("client").save(directory.path()).unwrap();
    let certificate = |name: &str| CertificateDer::from_pem_file(directory.path().join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate("authority.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let config = if with_certificate {
        let key = PrivateKeyDer::from_pem_file(directory.path().join("client.key")).unwrap();
        builder
            .with_client_auth_cert(vec![certificate("client.pem")], key)
            .unwrap()
    } else {
        builder.with_no_client_auth()
    };
    let connection =
        ClientConnection::new(Arc::new(config), ServerName::try_from("dealer").unwrap()).unwrap();
    StreamOwned::new(connection, TcpStream::connect(address).unwrap())
}

/// As [`raw_tls`], and greets properly.
fn raw_peer(address: SocketAddr) -> RawTls {
    let mut tls = raw_tls(address, true);
    let mut greeting = [0; 13];
    tls.read_exact(&mut greeting).unwrap();
    tls.write_all(&greeting).unwrap();
    tls
}

/// A link, and the raw TLS at its other end.
fn link_to_raw(options: &Options) -> (TcpLink, RawTls) {
    let (dealer, address) = listen(options);
    let raw = raw_peer(address);
    (dealer.join().unwrap().unwrap(), raw)
}

fn receive(link: &TcpLink, len: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0; len];
    within(PROMPT, || link.recv(&mut buf)).map(|()| buf)
}

#[test]
fn a_caller_without_a_certificate_is_not_trusted() {
    let result = accept(|address| wait_for_end(&mut raw_tls(address, false)));
    assert_error!(result, Error::Untrusted { detail, .. } if detail.contains("none"));
}

#[test]
fn a_wrong_greeting_is_refused() {
    let greet = |bytes: &'static [u8]| {
        accept(move |address| {
            let mut tls = raw_tls(address, true);
            tls.write_all(bytes).unwrap();
            wait_for_end(&mut tls);
        })
    };
    assert_error!(greet(b"\x04\x08\0\0\0veiltube"), Error::BadGreeting { .. });
    assert_error!(greet(b"\x04\0\0\0\0"), Error::BadGreeting { .. });
    assert_error!(greet(b"\x01\x08\0\0\0veiltune"), Error::BadFrame { kind: 1, .. });
    assert_error!(
        greet(b"\x04\x09\0\0\0veiltunes"),
        Error::OverLong { got: 9, max: 8, .. }
    );
    assert_error!(greet(b"\x02\x03\0\0\0no\x1b"), Error::PeerAborted { reason, .. } if reason == "no?");
    assert_error!(greet(b"garbage garbage"), Error::BadFrame { kind: b'g', .. });
}

#[test]
fn garbage_frames_are_refused_and_the_sender_is_told() {
    type Expected = fn(&Error) -> bool;
    let misdeeds: [(&[u8], Expected); 4] = [
        (&[9, 1, 0, 0, 0, 1], |error| {
            matches!(error, Error::BadFrame { kind: 9, .. })
        }),
        (b"\x04\x08\0\0\0veiltune", |error| {
            matches!(error, Error::BadFrame { kind: 4, .. })
        }),
        (&[1, 0xff, 0xff, 0xff, 0xff], |error| {
            matches!(error, Error::OverLong { got: 0xffff_ffff, .. })
        }),
        (&[1, 1, 0, 16, 0], |error| {
            matches!(
                error,
                Error::OverLong {
                    got: 1_048_577,
                    max: MAX_MESSAGE,
                    ..
                }
            )
        }),
    ];
    for (bytes, expected) in misdeeds {
        let (link, mut raw) = link_to_raw(&hasty());
        raw.write_all(bytes).unwrap();
        let error = receive(&link, 1).unwrap_err();
        assert!(expected(&error), "{error}");
        assert!(link.send(vec![1]).is_err(), "the link is over");

        let mut answer = Vec::new();
        let _ = raw.read_to_end(&mut answer);
        assert_eq!(answer.first(), Some(&2), "an abort frame");
        assert!(String::from_utf8_lossy(&answer).contains("does not speak this protocol"));
    }
}

#[test]
fn tampering_with_tls_is_seen() {
    let (link, mut raw) = link_to_raw(&hasty());
    raw.sock
        .write_all(b"\x17\x03\x03\x00\x20this is no record of this stream")
        .unwrap();
    assert_error!(receive(&link, 1), Error::Tls { .. });
}

#[test]
fn an_end_inside_a_message_is_a_cut() {
    let half_a_message = |raw: &mut RawTls| {
        raw.write_all(&[&[1, 100, 0, 0, 0][..], &[0; 60]].concat())
            .unwrap();
    };
    let (link, mut raw) = link_to_raw(&hasty());
    half_a_message(&mut raw);
    raw.conn.send_close_notify();
    raw.flush().unwrap();
    assert_error!(receive(&link, 100), Error::Truncated { at, .. } if at == "60 bytes into a message of 100");

    let (link, mut raw) = link_to_raw(&hasty());
    half_a_message(&mut raw);
    raw.sock.shutdown(Shutdown::Both).unwrap();
    assert_error!(receive(&link, 100), Error::Truncated { .. });

    let (link, mut raw) = link_to_raw(&hasty());
    raw.write_all(&[1, 100]).unwrap();
    raw.sock.shutdown(Shutdown::Both).unwrap();
    assert_error!(receive(&link, 100), Error::Truncated { at, .. } if at.contains("header"));
}

#[test]
fn a_peer_that_vanishes_is_gone_after_its_last_message() {
    let (link, mut raw) = link_to_raw(&hasty());
    raw.write_all(&[1, 1, 0, 0, 0, 42]).unwrap();
    raw.sock.shutdown(Shutdown::Both).unwrap();
    assert_eq!(receive(&link, 1).unwrap(), [42]);
    assert_error!(receive(&link, 1), Error::PeerGone { how, .. } if how.contains("without a goodbye"));
    assert_error!(link.send(vec![1]), Error::PeerGone { .. });
    assert_error!(link.close(), Error::PeerGone { .. });

    let (link, mut raw) = link_to_raw(&hasty());
    raw.conn.send_close_notify();
    raw.flush().unwrap();
    assert_error!(receive(&link, 1), Error::PeerGone { how, .. } if how.contains("ended TLS"));
}

#[test]
fn a_frozen_peer_is_silent() {
    let (link, _raw) = link_to_raw(&hasty());
    let start = Instant::now();
    assert_error!(receive(&link, 1), Error::Silent { .. });
    assert!(start.elapsed() >= hasty().idle);

    // Nor does it take what is sent.
    for _ in 0..64 {
        link.send(vec![0; MAX_MESSAGE]).unwrap();
    }
    assert_error!(within(PROMPT, || link.flush()), Error::Silent { .. });
    assert_error!(within(PROMPT, || link.close()), Error::Silent { .. });
}

#[test]
fn signs_of_life_alone_do_not_hold_a_receiver_forever() {
    let options = Options {
        patience: Duration::from_millis(1200),
        ..hasty()
    };
    let (link, mut raw) = link_to_raw(&options);
    let dripping = thread::spawn(move || {
        while raw.write_all(&[6, 0, 0, 0, 0]).and_then(|()| raw.flush()).is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    let start = Instant::now();
    assert_error!(receive(&link, 1), Error::Silent { .. });
    assert!(
        start.elapsed() >= options.patience,
        "alive for {:?}",
        start.elapsed()
    );
    link.abort("enough");
    dripping.join().unwrap();
}

#[test]
fn a_flood_is_held_back() {
    for body in [65536u32, 0] {
        let options = Options {
            incoming: 1 << 20,
            ..hasty()
        };
        let (link, mut raw) = link_to_raw(&options);
        raw.sock
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        // Many messages a write, so that empty ones are not held back by the slowness of this test.
        let message = [&[1], &body.to_le_bytes()[..], &vec![0; body as usize]].concat();
        let flood = message.repeat(65541 / message.len());
        let most = (128 << 20) / flood.len();
        let taken = (0..most).take_while(|_| raw.write_all(&flood).is_ok()).count();
        assert!(
            taken < most / 2,
            "{taken} times {} bytes were taken although nobody receives",
            flood.len()
        );
        link.abort("enough");
    }
}
