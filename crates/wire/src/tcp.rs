//! Links over TCP with mutual TLS 1.3.
//!
//! Each side checks that the other's certificate comes from the run's authority and names the party that is
//! expected there. This file is about how a connection comes to be; what happens on it afterwards is the
//! [`TcpLink`]'s affair.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use rustls::{Connection, ServerConfig};

pub use crate::duplex::TcpLink;
use crate::{
    Error, Identity, Options, Result,
    error::sanitise,
    frame::{GREETING, HEADER, Kind, header, parse_header},
    link::later,
    pki::Credentials,
    tls,
};

/// Pause between attempts to reach a peer that does not listen yet.
const RETRY: Duration = Duration::from_millis(50);
/// Longest time to tell a caller or listener why there will be no link.
const FAREWELL: Duration = Duration::from_millis(500);
/// Most callers that shake hands at the same time; further ones wait in the system's queue.
const STRANGERS: usize = 64;

/// Waits for calls at one address.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    options: Options,
    /// Callers that have shaken hands, or failed to. Each does so on a thread of its own, lest one who takes its time, before
    /// anybody knows who it is, keeps the others waiting.
    met: (Sender<Result<Setup>>, Mutex<Met>),
}

struct Met {
    callers: Receiver<Result<Setup>>,
    /// How many have yet to say who they are.
    strangers: usize,
}

impl Listener {
    /// Listens at `address` (`HOST:PORT`; port 0 lets the system choose one, see
    /// [`address`](Listener::address)).
    ///
    /// # Errors
    /// [`Error::Io`] if the address is taken or not of this host, [`Error::Certificate`] if the credentials are unusable.
    pub fn bind(address: &str, credentials: &Credentials, options: &Options) -> Result<Listener> {
        let failed = || Error::io(format!("listening at {address}"));
        let listener = TcpListener::bind(address).map_err(failed())?;
        // Non-blocking, because the standard library knows no time limit for accepting.
        listener.set_nonblocking(true).map_err(failed())?;
        let address = listener.local_addr().map_err(failed())?;
        Ok(Listener {
            listener,
            address,
            config: tls::server_config(credentials)?,
            options: options.clone(),
            met: {
                let (met, callers) = channel();
                (
                    met,
                    Mutex::new(Met {
                        callers,
                        strangers: 0,
                    }),
                )
            },
        })
    }

    /// Where callers reach this listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for one of `expected` to call, and sets up a link to it; [`Link::peer`] tells which one it is.
    ///
    /// # Errors
    /// [`Error::NobodyCame`]; [`Error::NotTls`], [`Error::Untrusted`], [`Error::WrongIdentity`], [`Error::Rejected`] and the like
    /// for a caller that is not one of them. The listener stays usable after such a call.
    pub fn accept(&self, expected: &[Identity]) -> Result<TcpLink> {
        let start = Instant::now();
        let mut caller = loop {
            if let Some(caller) = self.meet()? {
                break caller?;
            }
            if start.elapsed() >= self.options.connect {
                return Err(Error::NobodyCame {
                    expected: tls::any_of(expected),
                    address: self.address,
                    waited: start.elapsed(),
                });
            }
            thread::sleep(Duration::from_millis(2));
        };
        // It may have waited for somebody to have time for it.
        caller.start = Instant::now();
        caller.finish(|setup| {
            setup.peer = match tls::identify(&setup.connection, expected) {
                Ok(peer) => peer,
                Err(error) => {
                    let _ = setup.say(Kind::Abort, sanitise(error.to_string().as_bytes()).as_bytes());
                    return Err(error);
                }
            };
            setup.say(Kind::Hello, GREETING)?;
            setup.expect_greeting()
        })
    }

    /// Begins to shake hands with all who have called, and returns one with whom that is over, if there is one.
    fn meet(&self) -> Result<Option<Result<Setup>>> {
        let mut met = self.met.1.lock().unwrap_or_else(PoisonError::into_inner);
        while met.strangers < STRANGERS {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(Error::io(format!("accepting a call at {}", self.address))(error)),
            };
            let connection = tls::server(&self.config)?;
            let (options, limit) = (self.options.clone(), self.options.handshake);
            let setup = Setup::new(socket, connection, Identity::unknown(), options, limit)?;
            let tell = self.met.0.clone();
            thread::Builder::new()
                .spawn(move || {
                    // Nobody hears it any more if the listener is gone.
                    let _ = tell.send(setup.shake_hands());
                })
                .map_err(Error::io("shaking hands with a caller"))?;
            met.strangers += 1;
        }
        let caller = met.callers.try_recv().ok();
        met.strangers -= usize::from(caller.is_some());
        Ok(caller)
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener {{ address: {} }}", self.address)
    }
}

/// Calls `peer` at `address` (`HOST:PORT`), again and again until it answers or the time for connecting is
/// over.
///
/// # Errors
/// [`Error::Unreachable`]; [`Error::NotTls`], [`Error::Untrusted`], [`Error::WrongIdentity`] if somebody else answers;
/// [`Error::Rejected`] or [`Error::PeerAborted`] if the peer does not accept this side.
pub fn connect(
    address: &str,
    credentials: &Credentials,
    peer: &Identity,
    options: &Options,
) -> Result<TcpLink> {
    let connection = tls::client(credentials, peer)?;
    let socket = reach(address, peer, options)?;
    // The system completes calls to a listener that does not accept yet; that one may take its time.
    let limit = options.handshake.max(options.connect);
    let setup = Setup::new(socket, connection, peer.clone(), options.clone(), limit)?;
    setup.shake_hands()?.finish(|setup| {
        // The listening side speaks first, because only it knows whether it accepts this side's certificate.
        setup.expect_greeting()?;
        setup.say(Kind::Hello, GREETING)
    })
}

fn reach(address: &str, peer: &Identity, options: &Options) -> Result<TcpStream> {
    let start = Instant::now();
    let attempt = || -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in address.to_socket_addrs()? {
            let limit = options.connect.saturating_sub(start.elapsed()).max(RETRY);
            match TcpStream::connect_timeout(&address, limit) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    loop {
        match attempt() {
            Ok(socket) => return Ok(socket),
            Err(source) if start.elapsed() + RETRY >= options.connect => {
                let (peer, source) = (peer.clone(), Arc::new(source));
                return Err(Error::Unreachable {
                    peer,
                    address: address.into(),
                    waited: start.elapsed(),
                    source,
                });
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}

/// A connection before it is a link: one thread, and a time limit for everything.
struct Setup {
    socket: TcpStream,
    connection: Connection,
    peer: Identity,
    options: Options,
    start: Instant,
    limit: Duration,
}

impl Setup {
    fn new(
        socket: TcpStream,
        mut connection: Connection,
        peer: Identity,
        options: Options,
        limit: Duration,
    ) -> Result<Setup> {
        let failed = || Error::io("setting up a connection");
        socket.set_nonblocking(false).map_err(failed())?;
        socket.set_nodelay(true).map_err(failed())?;
        // No limit to what may wait for encryption: the writer hands over one piece at a time.
        connection.set_buffer_limit(None);
        Ok(Setup {
            socket,
            connection,
            peer,
            options,
            start: Instant::now(),
            limit,
        })
    }

    /// The TLS handshake.
    fn shake_hands(mut self) -> Result<Setup> {
        let mut io = Limited::new(&self.socket, later(self.start, self.limit));
        while self.connection.is_handshaking() {
            if let Err(error) = self.connection.complete_io(&mut io) {
                let error = tls::explain(&self.peer, error, true, self.start);
                self.hang_up();
                return Err(error);
            }
        }
        Ok(self)
    }

    /// Greetings after it, then the link.
    fn finish(mut self, greet: impl FnOnce(&mut Self) -> Result<()>) -> Result<TcpLink> {
        match greet(&mut self) {
            Ok(()) => self.into_link(),
            Err(error) => {
                self.hang_up();
                Err(error)
            }
        }
    }

    fn say(&mut self, kind: Kind, body: &[u8]) -> Result<()> {
        let mut io = Limited::new(&self.socket, later(self.start, self.limit));
        let bytes = [&header(kind, body.len()), body].concat();
        let mut write = || {
            self.connection.writer().write_all(&bytes)?;
            while self.connection.wants_write() {
                self.connection.write_tls(&mut io)?;
            }
            Ok(())
        };
        write().map_err(|error| self.explain(error))
    }

    fn hear(&mut self, buf: &mut [u8]) -> Result<()> {
        let mut io = Limited::new(&self.socket, later(self.start, self.limit));
        let mut filled = 0;
        while filled < buf.len() {
            let result = match self.connection.reader().read(&mut buf[filled..]) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    filled += n;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.connection.read_tls(&mut io),
                Err(error) => Err(error),
            };
            result.map_err(|error| self.explain(error))?;
            self.connection
                .process_new_packets()
                .map_err(|error| tls::explain_tls(self.peer.clone(), &error, true))?;
        }
        Ok(())
    }

    fn explain(&self, error: io::Error) -> Error {
        tls::explain(&self.peer, error, true, self.start)
    }

    fn expect_greeting(&mut self) -> Result<()> {
        let mut head = [0; HEADER];
        self.hear(&mut head)?;
        let (kind, len) = parse_header(head, &self.peer)?;
        if !matches!(kind, Kind::Hello | Kind::Abort) {
            return Err(Error::BadFrame {
                peer: self.peer.clone(),
                kind: kind as u8,
            });
        }
        let mut body = vec![0; len];
        self.hear(&mut body)?;
        match kind {
            Kind::Abort => Err(Error::PeerAborted {
                peer: self.peer.clone(),
                reason: sanitise(&body),
            }),
            _ if body == GREETING => Ok(()),
            _ => Err(Error::BadGreeting {
                peer: self.peer.clone(),
            }),
        }
    }

    /// Lets the peer read the last words: a socket that is closed with unread data takes them back.
    fn hang_up(&mut self) {
        self.connection.send_close_notify();
        let mut io = Limited::new(&self.socket, Instant::now() + FAREWELL);
        while self.connection.wants_write() && self.connection.write_tls(&mut io).is_ok() {}
        let _ = self.socket.shutdown(Shutdown::Write);
        while io.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
    }

    fn into_link(self) -> Result<TcpLink> {
        let failed = || Error::io("setting up a connection");
        self.socket.set_read_timeout(None).map_err(failed())?;
        self.socket.set_write_timeout(None).map_err(failed())?;
        TcpLink::start(self.socket, self.connection, self.peer, self.options).map_err(failed())
    }
}

/// A socket with a deadline for all reads and writes together.
struct Limited<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl<'a> Limited<'a> {
    fn new(socket: &'a TcpStream, deadline: Instant) -> Limited<'a> {
        Limited { socket, deadline }
    }

    /// Time left, as a time-out for the next call.
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.checked_duration_since(Instant::now()) {
            None | Some(Duration::ZERO) => Err(io::ErrorKind::TimedOut.into()),
            some => Ok(some),
        }
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buf)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
