//! A link over an established TLS connection, with both directions flowing at once.
//!
//! Behind a link work two threads: one encrypts and writes what is queued, one reads, decrypts and queues
//! what arrives. They share the TLS state, but wait for the network without holding it, so that neither
//! direction blocks the other and neither end can block its peer.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, BufRead, IoSlice, Read, Write},
    net::{Shutdown, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustls::Connection;

use crate::{
    Error, Identity, Link, Meter, Options, Result,
    emulate::{DelayLine, Passage, SPIN, spin_until},
    error::{CLOSED, sanitise},
    frame::{Assembler, Kind, header},
    inbox::Inbox,
    link::{Counters, check_message, deliver, later},
    tls,
};

/// Longest time to tell a peer why this side gives up.
const FAREWELL: Duration = Duration::from_secs(2);
/// Longest time that dropping a link waits for the peer to take what was sent.
const LINGER: Duration = Duration::from_secs(10);
/// Signs of life that a side sends within the idle time.
const HEARTBEATS: u32 = 6;
/// Shortest time between two of them.
const BREATH: Duration = Duration::from_millis(10);
/// Bytes that are encrypted at a time: few enough to stay in the cache until the socket takes them.
const PIECE: usize = 64 << 10;
/// Bytes read from the socket at a time.
const READ: usize = 256 << 10;

/// A link over TCP with mutual TLS.
pub struct TcpLink {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl TcpLink {
    /// A link over a connection that is set up, and behind which nothing but frames will come.
    pub(crate) fn start(
        socket: TcpStream,
        connection: Connection,
        peer: Identity,
        options: Options,
    ) -> io::Result<TcpLink> {
        let shared = Arc::new(Shared {
            inbox: Inbox::new(peer.clone()),
            peer,
            outbox: Mutex::new(Outbox::new(&options)),
            options,
            work: Condvar::new(),
            progress: Condvar::new(),
            connection: Mutex::new(connection),
            socket,
            counters: Counters::default(),
        });
        let spawn = |name: &str, run: fn(&Shared)| {
            let name = format!("{name} {}", shared.peer);
            let shared = shared.clone();
            thread::Builder::new().name(name).spawn(move || run(&shared))
        };
        let writer = spawn("to", Shared::write)?;
        let reader = spawn("from", Shared::read).inspect_err(|_| shared.hang_up())?;
        Ok(TcpLink {
            shared,
            threads: vec![writer, reader],
        })
    }
}

impl fmt::Debug for TcpLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpLink {{ peer: {} }}", self.shared.peer)
    }
}

impl Link for TcpLink {
    fn send(&self, bytes: Vec<u8>) -> Result<()> {
        self.shared.send(bytes)
    }

    fn recv(&self, buf: &mut [u8]) -> Result<()> {
        let Shared {
            inbox,
            options,
            peer,
            counters,
            ..
        } = &*self.shared;
        deliver(inbox.pop(options, true)?, buf, peer, counters)
    }

    fn flush(&self) -> Result<()> {
        self.shared.flush()
    }

    fn abort(&self, reason: &str) {
        self.shared.abort(reason);
    }

    fn close(&self) -> Result<()> {
        self.shared.close(self.shared.options.patience)
    }

    fn check(&self) -> Result<()> {
        self.shared.inbox.ended().map_or(Ok(()), Err)
    }

    fn meter(&self) -> Meter {
        self.shared.counters.meter()
    }

    fn round(&self) {
        self.shared.counters.count_round();
    }

    fn peer(&self) -> &Identity {
        &self.shared.peer
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.abort("it panicked");
        } else {
            let _ = self.shared.close(LINGER);
        }
        self.shared.hang_up();
        for thread in self.threads.drain(..) {
            // A thread of ours that panicked has nothing left to tell here.
            let _ = thread.join();
        }
    }
}

/// What the link and its two threads share. Whoever needs several locks takes the outbox before the inbox;
/// the TLS state is locked alone.
struct Shared {
    peer: Identity,
    options: Options,
    inbox: Inbox,
    outbox: Mutex<Outbox>,
    /// There is something to do for the writer.
    work: Condvar,
    /// Something was written, acknowledged, or ended.
    progress: Condvar,
    connection: Mutex<Connection>,
    socket: TcpStream,
    counters: Counters,
}

/// What is to be written, and how far that has come.
struct Outbox {
    queue: VecDeque<Outgoing>,
    line: DelayLine,
    /// The writer holds messages that it has taken from the queue.
    writing: bool,
    /// Why this side gives up.
    abort: Option<String>,
    /// This side has nothing more to send, and whether it has told so.
    closing: bool,
    close_sent: bool,
    /// The peer has taken everything that this side sent before closing.
    delivered: bool,
    /// The peer has closed, and waits for the acknowledgement.
    acknowledge: bool,
    /// The writer must end.
    stop: bool,
    writer_done: bool,
    reader_done: bool,
}

struct Outgoing {
    message: Vec<u8>,
    passage: Option<Passage>,
}

impl Outbox {
    fn new(options: &Options) -> Outbox {
        Outbox {
            queue: VecDeque::new(),
            line: DelayLine::new(options.network),
            writing: false,
            abort: None,
            closing: false,
            close_sent: false,
            delivered: false,
            acknowledge: false,
            stop: false,
            writer_done: false,
            reader_done: false,
        }
    }

    fn written(&self) -> bool {
        self.queue.is_empty() && !self.writing
    }

    /// One message, or several small ones that together make a piece.
    fn take_batch(&mut self) -> Vec<Outgoing> {
        let mut bytes = 0;
        let fits = |outgoing: &&Outgoing| {
            bytes += outgoing.message.len();
            bytes <= PIECE
        };
        let count = self.queue.iter().take_while(fits).count().max(1);
        self.queue.drain(..count).collect()
    }
}

/// The caller's side.
impl Shared {
    fn send(&self, message: Vec<u8>) -> Result<()> {
        let bytes = check_message(&message)?;
        let mut outbox = self.lock();
        if let Some(error) = self.inbox.ended() {
            return Err(error);
        }
        if outbox.closing {
            return Err(Error::Closed {
                peer: self.peer.clone(),
            });
        }
        let passage = outbox.line.enter(bytes);
        outbox.queue.push_back(Outgoing { message, passage });
        self.counters.count_sent(bytes);
        self.work.notify_one();
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let start = Instant::now();
        let mut outbox = self.lock();
        while !outbox.written() {
            if let Some(error) = self.inbox.ended() {
                return Err(error);
            }
            self.inbox.check_alive(start, &self.options)?;
            outbox = self.wait(outbox);
        }
        Ok(())
    }

    fn close(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        let mut outbox = self.lock();
        let result = loop {
            if outbox.delivered {
                break Ok(());
            }
            match self.inbox.ended() {
                Some(Error::Closed { .. }) => return Ok(()),
                None => {}
                // The peer wants nothing more, which is all right if there is nothing more.
                Some(error) if error.is_orderly_end() && outbox.written() => break Ok(()),
                Some(error) if error.is_orderly_end() && !outbox.reader_done => {}
                Some(error) => return Err(error),
            }
            if !outbox.closing {
                outbox.closing = true;
                self.inbox.discard();
                self.work.notify_one();
            }
            let options = Options {
                patience: limit,
                ..self.options.clone()
            };
            if let Err(error) = self.inbox.check_alive(start, &options) {
                break Err(error);
            }
            outbox = self.wait(outbox);
        };
        outbox.closing = true;
        self.inbox.end(
            Error::Closed {
                peer: self.peer.clone(),
            },
            true,
        );
        result
    }

    fn abort(&self, reason: &str) {
        let reason = sanitise(reason.as_bytes());
        let mut outbox = self.lock();
        if outbox.abort.is_some()
            || matches!(
                self.inbox.ended(),
                Some(Error::Closed { .. } | Error::PeerAborted { .. })
            )
        {
            return;
        }
        outbox.queue.clear();
        outbox.abort = Some(reason.clone());
        self.inbox.end(Error::Aborted { reason }, true);
        self.work.notify_one();
        drop(outbox);
        self.hang_up();
    }

    /// Ends both threads: the writer once it has written its last words; the reader, if these are that this
    /// side gives up, once the peer has hung up too, because a socket that is closed with unread data takes
    /// the last words back.
    fn hang_up(&self) {
        let start = Instant::now();
        let mut outbox = self.lock();
        outbox.stop = true;
        self.work.notify_one();
        let done = |outbox: &Outbox| outbox.writer_done && (outbox.reader_done || outbox.abort.is_none());
        while !done(&outbox) && start.elapsed() < FAREWELL {
            outbox = self.wait(outbox);
        }
        drop(outbox);
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Waits for progress; not for long, so that time limits are seen.
    fn wait<'a>(&self, outbox: MutexGuard<'a, Outbox>) -> MutexGuard<'a, Outbox> {
        self.progress
            .wait_timeout(outbox, Duration::from_millis(50))
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn lock(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the writer does next.
enum Step {
    /// Writes messages at once.
    Messages(Vec<Outgoing>),
    /// Writes this message as an emulated network would deliver it.
    Paced(Vec<u8>, Passage),
    Frame(Kind),
    Abort(String),
    Stop,
}

/// The writer thread.
impl Shared {
    fn write(&self) {
        let result = self.write_steps();
        let _ = self.socket.shutdown(Shutdown::Write);
        if let Err(error) = result {
            // The reader may be about to read why; only if it does not is this the reason.
            self.inbox.wait_for_end(FAREWELL / 4);
            self.inbox
                .end(tls::explain(&self.peer, error, false, Instant::now()), false);
        }
        self.lock().writer_done = true;
        self.progress.notify_all();
    }

    fn write_steps(&self) -> io::Result<()> {
        let mut wire = Vec::new();
        loop {
            match self.next_step() {
                Step::Messages(messages) => {
                    for Outgoing { message, .. } in messages {
                        self.write_message(&message, None, &mut wire)?;
                    }
                }
                Step::Paced(message, passage) => self.write_message(&message, Some(passage), &mut wire)?,
                Step::Frame(kind) => self.encrypt(&header(kind, 0), &[], &mut wire)?,
                Step::Abort(reason) => {
                    self.encrypt(&header(Kind::Abort, reason.len()), reason.as_bytes(), &mut wire)?;
                    self.say_goodbye(&mut wire);
                    return self.transmit(&mut wire);
                }
                Step::Stop => {
                    self.say_goodbye(&mut wire);
                    return self.transmit(&mut wire);
                }
            }
            self.transmit(&mut wire)?;
        }
    }

    fn next_step(&self) -> Step {
        let mut outbox = self.lock();
        outbox.writing = false;
        self.progress.notify_all();
        let heartbeat = later(Instant::now(), (self.options.idle / HEARTBEATS).max(BREATH));
        loop {
            if let Some(reason) = &outbox.abort {
                return Step::Abort(reason.clone());
            }
            if outbox.acknowledge {
                outbox.acknowledge = false;
                return Step::Frame(Kind::Closed);
            }
            if outbox.stop {
                return Step::Stop;
            }
            let now = Instant::now();
            let wake = match outbox.queue.front() {
                Some(Outgoing {
                    passage: Some(passage),
                    ..
                }) if passage.first > now + SPIN => passage.first - SPIN,
                Some(Outgoing {
                    passage: Some(passage),
                    ..
                }) => {
                    let passage = *passage;
                    outbox.writing = true;
                    let message = outbox
                        .queue
                        .pop_front()
                        .map(|outgoing| outgoing.message)
                        .unwrap_or_default();
                    return Step::Paced(message, passage);
                }
                Some(Outgoing { passage: None, .. }) => {
                    outbox.writing = true;
                    return Step::Messages(outbox.take_batch());
                }
                None if outbox.closing && !outbox.close_sent => {
                    outbox.close_sent = true;
                    return Step::Frame(Kind::Close);
                }
                None => heartbeat,
            };
            if now >= heartbeat {
                return Step::Frame(Kind::Alive);
            }
            let limit = wake.min(heartbeat) - now;
            outbox = self
                .work
                .wait_timeout(outbox, limit)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Encrypts a message into `wire`, and writes all but its last piece to the socket.
    fn write_message(&self, message: &[u8], passage: Option<Passage>, wire: &mut Vec<u8>) -> io::Result<()> {
        let mut head = &header(Kind::Data, message.len())[..];
        let mut done = 0;
        loop {
            let piece = &message[done..(done + PIECE).min(message.len())];
            done += piece.len();
            if let Some(passage) = passage {
                self.wait_for(passage.after(done, message.len()), done == message.len());
            }
            self.encrypt(head, piece, wire)?;
            head = &[];
            if done == message.len() {
                return Ok(());
            }
            self.transmit(wire)?;
        }
    }

    /// Waits until `moment`, `precisely` or as well as the scheduler does; but not if this side gives up.
    fn wait_for(&self, moment: Instant, precisely: bool) {
        let mut outbox = self.lock();
        while outbox.abort.is_none() && !outbox.stop {
            let now = Instant::now();
            if now + SPIN >= moment {
                drop(outbox);
                return if precisely {
                    spin_until(moment)
                };
            }
            let limit = moment - now - SPIN;
            outbox = self
                .work
                .wait_timeout(outbox, limit)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Appends the records of `head` and `body` to `wire`.
    fn encrypt(&self, head: &[u8], body: &[u8], wire: &mut Vec<u8>) -> io::Result<()> {
        let mut connection = self.connection();
        let taken = match head {
            [] => connection.writer().write(body)?,
            _ => connection
                .writer()
                .write_vectored(&[IoSlice::new(head), IoSlice::new(body)])?,
        };
        if taken != head.len() + body.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        drain(&mut connection, wire)
    }

    /// Appends the end of TLS in this direction to `wire`, behind an alert if TLS has failed.
    fn say_goodbye(&self, wire: &mut Vec<u8>) {
        let mut connection = self.connection();
        connection.send_close_notify();
        let _ = drain(&mut connection, wire);
    }

    fn transmit(&self, wire: &mut Vec<u8>) -> io::Result<()> {
        (&self.socket).write_all(wire)?;
        wire.clear();
        Ok(())
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Moves the records that wait in the connection to `wire`, so that nobody holds the connection while the
/// network is slow.
fn drain(connection: &mut Connection, wire: &mut Vec<u8>) -> io::Result<()> {
    while connection.wants_write() {
        connection.write_tls(wire)?;
    }
    Ok(())
}

/// The reader thread.
impl Shared {
    fn read(&self) {
        let (error, now) = self.read_frames();
        let by_peer = matches!(
            error,
            Error::PeerAborted { .. } | Error::PeerGone { .. } | Error::Truncated { .. }
        );
        let reason = sanitise(error.to_string().as_bytes());
        self.inbox.end(error, now);
        let mut outbox = self.lock();
        if !by_peer {
            outbox.abort.get_or_insert(reason);
        }
        outbox.stop = true;
        outbox.reader_done = true;
        self.work.notify_one();
        self.progress.notify_all();
    }

    /// Reads until the stream ends; returns how, and whether that overtakes the messages before it.
    fn read_frames(&self) -> (Error, bool) {
        let mut assembler = Assembler::new(self.peer.clone());
        let mut frames = Vec::new();
        let mut buf = vec![0; READ];
        // Some may have come together with the greeting.
        let mut result = self.decrypt(&[], &mut assembler, &mut frames);
        loop {
            for (kind, body) in frames.drain(..) {
                match kind {
                    Kind::Data => {
                        self.inbox.wait_for_room(self.options.incoming);
                        self.inbox.push(body, None);
                    }
                    Kind::Alive => {}
                    Kind::Abort => {
                        return (
                            Error::PeerAborted {
                                peer: self.peer.clone(),
                                reason: sanitise(&body),
                            },
                            true,
                        );
                    }
                    Kind::Close => {
                        // In this order: once a caller sees the end it may hang up, but not before this is
                        // answered.
                        self.lock().acknowledge = true;
                        self.inbox.end(
                            Error::PeerGone {
                                peer: self.peer.clone(),
                                how: CLOSED.into(),
                            },
                            false,
                        );
                        self.work.notify_one();
                    }
                    Kind::Closed => {
                        self.lock().delivered = true;
                        self.progress.notify_all();
                    }
                    Kind::Hello => {
                        return (
                            Error::BadFrame {
                                peer: self.peer.clone(),
                                kind: kind as u8,
                            },
                            true,
                        );
                    }
                }
            }
            match result {
                Ok(Ended::No) => {}
                Ok(ended) => return (self.end_of_stream(ended, &assembler), false),
                Err(error) => return (error, true),
            }
            result = match (&self.socket).read(&mut buf) {
                Ok(0) => Ok(Ended::Abruptly),
                Ok(n) => {
                    self.inbox.hear();
                    self.decrypt(&buf[..n], &mut assembler, &mut frames)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return (tls::explain(&self.peer, error, false, Instant::now()), false),
            };
        }
    }

    /// Decrypts what came from the socket and puts frames together.
    fn decrypt(
        &self,
        mut bytes: &[u8],
        assembler: &mut Assembler,
        frames: &mut Vec<(Kind, Vec<u8>)>,
    ) -> Result<Ended> {
        let mut connection = self.connection();
        loop {
            loop {
                let mut plaintext = connection.reader();
                let n = match plaintext.fill_buf() {
                    Ok([]) => return Ok(Ended::Politely),
                    Ok(bytes) => {
                        assembler.feed(bytes, frames)?;
                        bytes.len()
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(tls::explain(&self.peer, error, false, Instant::now())),
                };
                plaintext.consume(n);
            }
            if bytes.is_empty() {
                return Ok(Ended::No);
            }
            connection
                .read_tls(&mut bytes)
                .map_err(|error| tls::explain(&self.peer, error, false, Instant::now()))?;
            connection
                .process_new_packets()
                .map_err(|error| tls::explain_tls(self.peer.clone(), &error, false))?;
        }
    }

    fn end_of_stream(&self, ended: Ended, assembler: &Assembler) -> Error {
        let peer = self.peer.clone();
        match (assembler.inside(), ended) {
            (Some(at), _) => Error::Truncated { peer, at },
            (None, Ended::Politely) => Error::PeerGone {
                peer,
                how: "it ended TLS without closing the link".into(),
            },
            (None, _) => Error::PeerGone {
                peer,
                how: "its connection ended without a goodbye; it crashed, or the network did".into(),
            },
        }
    }
}

/// Whether the stream has ended, and whether with the end that TLS prescribes.
enum Ended {
    No,
    Politely,
    Abruptly,
}
