//! Correlated randomness on its way from the dealer to a party: a byte stream in program order.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, mpsc};

use crc32fast::Hasher;
use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Ring, pack};
use veiltune_wire::Link;

use crate::opening::GateId;
use crate::{Error, Party, Result};

/// Largest piece of the stream, in bytes.
const CHUNK: usize = 1 << 18;

/// Where the dealer puts a party's material.
pub trait Sink: Send {
    /// Appends bytes.
    fn put(&mut self, bytes: &[u8]) -> Result<()>;
    /// Everything was put.
    fn finish(&mut self) -> Result<()>;

    /// Which pass of a paced program the party wants next, None: no more. A party on a link says so before each; elsewhere they
    /// come in order.
    fn wanted(&mut self, done: usize) -> Result<Option<u8>> {
        Ok(u8::try_from(done).ok())
    }
}

/// Where a party takes its material from.
pub trait Source: Send {
    /// The next bytes; an error if there are fewer.
    fn take(&mut self, buf: &mut [u8]) -> Result<()>;

    /// Which deal it is of, where that is not plain from where it comes: the parties compare.
    fn deal(&self) -> DealId {
        DealId::default()
    }

    /// Tells a dealer on a link which pass of a paced program is next.
    fn want(&mut self, _pass: Option<u8>) -> Result<()> {
        Ok(())
    }
}

/// Names one deal: the material of both parties carries it, and no other material does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DealId(pub(crate) [u8; 16]);

impl DealId {
    /// A fresh name.
    pub fn random() -> Result<DealId> {
        Ok(DealId(*Seed::random()?.expose()))
    }
}

/// Bytes that a dealer queues for a party before it waits until they have gone: its memory stays bounded however
/// slowly the party takes them.
pub(crate) const QUEUED: usize = 64 << 20;

/// Streams to a party over its link.
pub struct LinkSink {
    link: Arc<dyn Link>,
    queued: usize,
}

impl LinkSink {
    /// Over this link.
    pub fn new(link: Arc<dyn Link>) -> LinkSink {
        LinkSink { link, queued: 0 }
    }
}

impl Sink for LinkSink {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(CHUNK) {
            self.link.send(piece.to_vec())?;
            self.queued += piece.len();
            if self.queued >= QUEUED {
                self.link.flush()?;
                self.queued = 0;
            }
        }
        Ok(())
    }

    fn wanted(&mut self, _: usize) -> Result<Option<u8>> {
        let mut next = [0; 2];
        self.link.recv(&mut next)?;
        Ok((next[0] != 0).then_some(next[1]))
    }

    fn finish(&mut self) -> Result<()> {
        match self.link.flush() {
            // A party that has taken all it needs may be done, and gone, before the dealer is. If it went too early,
            // it says so itself, and so does its peer.
            Err(e) if e.is_orderly_end() => Ok(()),
            other => Ok(other?),
        }
    }
}

/// Streams from the dealer.
pub struct LinkSource(pub Arc<dyn Link>);

impl Source for LinkSource {
    fn take(&mut self, buf: &mut [u8]) -> Result<()> {
        for piece in buf.chunks_mut(CHUNK) {
            self.0.recv(piece)?;
        }
        Ok(())
    }

    fn want(&mut self, pass: Option<u8>) -> Result<()> {
        Ok(self.0.send(vec![u8::from(pass.is_some()), pass.unwrap_or(0)])?)
    }
}

// A material file: the header with its checksum; the body; a checksum (CRC-32) of each block of the body; the body's length, and a
// checksum of this table and the length. Checksums find what a disk or a copy did to the file. They are no defence against
// somebody who may write it: it is secret, and whoever can reach it has the material.

const MAGIC: &[u8; 16] = b"veiltune-mat-v4\n";
const HEADER: usize = 16 + 1 + 32 + 16 + 16;
const CHECKSUM: usize = 4;
/// Bytes of the body that share a checksum: read, checked and handed out while they are in the processor's cache.
const BLOCK: usize = 1 << 16;
const TRAILER: usize = 8 + CHECKSUM;

/// What a material file is for.
#[derive(Clone, PartialEq, Eq)]
pub struct Label {
    /// The party that may consume it.
    pub party: Party,
    /// Hash of the program whose material it holds.
    pub program: [u8; 32],
}

/// A material file being written by the dealer. It appears under its name only once it is complete.
pub struct FileSink {
    path: PathBuf,
    partial: PathBuf,
    out: BufWriter<File>,
    body: u64,
    /// Of the block that is being written.
    block: Hasher,
    checksums: Vec<u8>,
}

impl FileSink {
    /// Creates the file (readable by its owner alone) with the party's seed.
    pub fn create(path: &Path, label: &Label, deal: DealId, seed: &Seed) -> Result<FileSink> {
        let partial = path.with_extension("partial");
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&partial).map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => Error::File(format!(
                "{} exists: another dealer is writing it, or one was killed and left it behind; then remove it",
                partial.display()
            )),
            _ => file_error(&partial, &e),
        })?;
        let mut sink = FileSink {
            path: path.into(),
            partial,
            out: BufWriter::with_capacity(CHUNK, file),
            body: 0,
            block: Hasher::new(),
            checksums: Vec::new(),
        };
        // Another dealer that was about to be done is done now, or would still hold the name that was just taken.
        if path.exists() {
            return Err(Error::File(format!(
                "{} exists; material is never overwritten",
                path.display()
            )));
        }
        let mut header = Vec::with_capacity(HEADER + CHECKSUM);
        header.extend_from_slice(MAGIC);
        header.push(label.party.index() as u8);
        header.extend_from_slice(&label.program);
        header.extend_from_slice(&deal.0);
        header.extend_from_slice(seed.expose());
        header.extend_from_slice(&checksum(&header));
        sink.write(&header)?;
        Ok(sink)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .map_err(|e| file_error(&self.partial, &e))
    }

    fn end_block(&mut self) {
        let block = std::mem::take(&mut self.block);
        self.checksums.extend_from_slice(&block.finalize().to_le_bytes());
    }
}

impl Sink for FileSink {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = BLOCK - (self.body % BLOCK as u64) as usize;
            let (piece, later) = rest.split_at(rest.len().min(room));
            self.block.update(piece);
            self.body += piece.len() as u64;
            if piece.len() == room {
                self.end_block();
            }
            rest = later;
        }
        self.write(bytes)
    }

    fn finish(&mut self) -> Result<()> {
        if !self.body.is_multiple_of(BLOCK as u64) {
            self.end_block();
        }
        let mut table = std::mem::take(&mut self.checksums);
        table.extend_from_slice(&self.body.to_le_bytes());
        table.extend_from_slice(&checksum(&table));
        self.write(&table)?;
        self.out.flush().map_err(|e| file_error(&self.partial, &e))?;
        self.out
            .get_ref()
            .sync_all()
            .map_err(|e| file_error(&self.partial, &e))?;
        std::fs::rename(&self.partial, &self.path).map_err(|e| file_error(&self.path, &e))
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        // After `finish` there is nothing under this name any more.
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// A material file being consumed. Opening it removes it: whatever happens to the run, it cannot be used twice.
pub struct FileSource {
    file: File,
    /// Of the body that was not read yet.
    unread: u64,
    /// Of the blocks that were not read yet.
    checksums: std::vec::IntoIter<[u8; CHECKSUM]>,
    /// A block that was read in part: the rest of it from `next` on is still to be handed out.
    block: Vec<u8>,
    next: usize,
    deal: DealId,
    path: PathBuf,
}

impl FileSource {
    /// Claims the file, checks that it is all there, and returns the party's seed. A file that is refused stays where it is. Its
    /// body is checked block by block as it is taken.
    pub fn open(path: &Path, label: &Label) -> Result<(FileSource, Seed)> {
        // The rename claims the file atomically against another process that wants it too.
        let mut claimed = path.as_os_str().to_owned();
        claimed.push(".consumed");
        match std::fs::rename(path, &claimed) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::File(format!(
                    "{}: no such material; if it was there, a run has consumed it (material serves exactly once): \
                     have the dealer make another",
                    path.display()
                )));
            }
            other => other.map_err(|e| file_error(path, &e))?,
        }
        let opened = File::open(&claimed)
            .map_err(|e| file_error(path, &e))
            .and_then(|f| FileSource::check(f, path, label));
        match opened {
            Ok(opened) => {
                std::fs::remove_file(&claimed).map_err(|e| file_error(path, &e))?;
                Ok(opened)
            }
            Err(refused) => {
                // Nobody has seen its seed. If it cannot go back, it is lost: that errs on the safe side.
                let _ = std::fs::rename(&claimed, path);
                Err(refused)
            }
        }
    }

    fn check(mut file: File, path: &Path, label: &Label) -> Result<(FileSource, Seed)> {
        let io = |e: std::io::Error| file_error(path, &e);
        let damaged = || {
            Error::File(format!(
                "{}: not a complete material file; have the dealer make another",
                path.display()
            ))
        };
        let length = file.metadata().map_err(io)?.len();
        let mut header = [0; HEADER + CHECKSUM];
        let mut trailer = [0; TRAILER];
        let around = (header.len() + TRAILER) as u64;
        if length < around {
            return Err(damaged());
        }
        file.read_exact(&mut header).map_err(io)?;
        let (header, sum) = header.split_at(HEADER);
        if sum != checksum(header) || header[..16] != *MAGIC {
            return Err(damaged());
        }
        file.seek(SeekFrom::End(-(TRAILER as i64))).map_err(io)?;
        file.read_exact(&mut trailer).map_err(io)?;
        let mut body = [0; 8];
        body.copy_from_slice(&trailer[..8]);
        let body = u64::from_le_bytes(body);
        let table = body.div_ceil(BLOCK as u64).saturating_mul(CHECKSUM as u64);
        if around.saturating_add(body).saturating_add(table) != length {
            return Err(damaged());
        }
        file.seek(SeekFrom::End(-(TRAILER as i64) - table as i64))
            .map_err(io)?;
        let mut table = vec![0; table as usize];
        file.read_exact(&mut table).map_err(io)?;
        let mut sum = Hasher::new();
        sum.update(&table);
        sum.update(&trailer[..8]);
        if trailer[8..] != sum.finalize().to_le_bytes() {
            return Err(damaged());
        }
        file.seek(SeekFrom::Start((HEADER + CHECKSUM) as u64))
            .map_err(io)?;
        if usize::from(header[16]) != label.party.index() || header[17..49] != label.program {
            return Err(Error::File(format!(
                "{}: made for another party or another program (model, shapes, calibration or version differ)",
                path.display()
            )));
        }
        let (mut deal, mut seed) = ([0; 16], [0; 16]);
        deal.copy_from_slice(&header[49..65]);
        seed.copy_from_slice(&header[65..]);
        Ok((
            FileSource {
                file,
                unread: body,
                checksums: table.as_chunks().0.to_vec().into_iter(),
                block: Vec::new(),
                next: 0,
                deal: DealId(deal),
                path: path.into(),
            },
            Seed::from_bytes(seed),
        ))
    }

    /// Reads the next block into `out`, which is as long as it.
    fn read_block(file: &mut File, sum: Option<[u8; CHECKSUM]>, path: &Path, out: &mut [u8]) -> Result<()> {
        file.read_exact(out).map_err(|e| file_error(path, &e))?;
        match sum == Some(checksum(out)) {
            true => Ok(()),
            false => Err(Error::File(format!(
                "{}: damaged since it was made (a checksum differs); this run cannot go on: have the dealer make another, and look \
                 after the disk",
                path.display()
            ))),
        }
    }
}

impl Source for FileSource {
    fn take(&mut self, buf: &mut [u8]) -> Result<()> {
        let left = self.unread + (self.block.len() - self.next) as u64;
        if left < buf.len() as u64 {
            return Err(Error::File(format!(
                "{}: the material is used up; it was made for fewer inputs",
                self.path.display()
            )));
        }
        let mut rest = buf;
        while !rest.is_empty() {
            if self.next == self.block.len() {
                let size = self.unread.min(BLOCK as u64) as usize;
                self.unread -= size as u64;
                let sum = self.checksums.next();
                if rest.len() >= size {
                    // A whole block goes straight to where it is wanted.
                    let (out, later) = rest.split_at_mut(size);
                    FileSource::read_block(&mut self.file, sum, &self.path, out)?;
                    rest = later;
                    continue;
                }
                // Out of reach until it is known to be good.
                let mut block = std::mem::take(&mut self.block);
                self.next = 0;
                block.resize(size, 0);
                FileSource::read_block(&mut self.file, sum, &self.path, &mut block)?;
                self.block = block;
            }
            let n = rest.len().min(self.block.len() - self.next);
            let (out, later) = rest.split_at_mut(n);
            out.copy_from_slice(&self.block[self.next..self.next + n]);
            self.next += n;
            rest = later;
        }
        Ok(())
    }

    fn deal(&self) -> DealId {
        self.deal
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    crc32fast::hash(bytes).to_le_bytes()
}

fn file_error(path: &Path, e: &std::io::Error) -> Error {
    Error::File(format!("{}: {e}", path.display()))
}

/// What one gate consumes at one party: taken before use, never put back.
#[derive(Default)]
pub(crate) struct Material {
    /// The gate that it was made for.
    pub gate: GateId,
    /// Shares of correlated values, in the order in which the gate asked for them.
    pub words: VecDeque<Vec<u64>>,
    /// As `words`, of values so many that they are expanded only where they are used.
    pub dealt: VecDeque<Dealt>,
    /// Function-secret-sharing keys: this party's roots, and the correction words.
    pub keys: VecDeque<(Vec<u128>, Vec<u8>)>,
}

/// A party's shares of many dealt values of so many bits, as short as they come.
pub(crate) enum Dealt {
    /// The first party's.
    Stream(Box<Prg>, u32),
    /// The second party's.
    Packed(Vec<u8>, u32),
}

impl Dealt {
    /// Those from `first`, a multiple of 16, on.
    pub fn read(&self, first: usize, out: &mut [u64]) {
        match self {
            Dealt::Stream(prg, bits) => {
                let mut prg = Prg::clone(prg);
                prg.skip_bits(first as u64, *bits);
                prg.fill_bits(out, *bits);
            }
            Dealt::Packed(bytes, bits) => {
                let bytes = &bytes[pack::packed_len(first, *bits)..][..pack::packed_len(out.len(), *bits)];
                pack::unpack(bytes, *bits, out);
            }
        }
    }
}

/// The party's preparing walk hands material to its online walk through this queue.
pub(crate) struct Queue {
    send: Box<dyn Fn(Material) -> bool + Send>,
}

impl Queue {
    /// `ahead`: how many gates the preparation may run ahead (bounding memory), or None: everything.
    pub fn new(ahead: Option<usize>) -> (Queue, mpsc::Receiver<Material>) {
        match ahead {
            Some(n) => {
                let (tx, rx) = mpsc::sync_channel(n);
                (
                    Queue {
                        send: Box::new(move |m| tx.send(m).is_ok()),
                    },
                    rx,
                )
            }
            None => {
                let (tx, rx) = mpsc::channel();
                (
                    Queue {
                        send: Box::new(move |m| tx.send(m).is_ok()),
                    },
                    rx,
                )
            }
        }
    }

    pub fn push(&self, m: Material) -> Result<()> {
        if (self.send)(m) {
            Ok(())
        } else {
            Err(Error::Stopped("the online phase"))
        }
    }
}

/// Masked parameters of the session, filled by the online walk as they are opened, read by the preparing walk.
#[derive(Default)]
pub(crate) struct ParameterStore {
    opened: Mutex<(Vec<Option<Ring>>, bool)>,
    changed: Condvar,
}

impl ParameterStore {
    /// The next parameter's masked value, as far as this party knows one.
    pub fn push(&self, masked: Option<Ring>) {
        self.lock().0.push(masked);
        self.changed.notify_all();
    }

    /// The online walk ended, well or not: nobody waits for more.
    pub fn close(&self) {
        self.lock().1 = true;
        self.changed.notify_all();
    }

    /// The masked value of parameter `index`, once it is opened.
    pub fn wait(&self, index: usize) -> Result<Option<Ring>> {
        let guard = self
            .changed
            .wait_while(self.lock(), |(opened, closed)| opened.len() <= index && !*closed)
            .unwrap_or_else(|e| e.into_inner());
        guard
            .0
            .get(index)
            .cloned()
            .ok_or(Error::Stopped("the online phase"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Vec<Option<Ring>>, bool)> {
        self.opened.lock().unwrap_or_else(|e| e.into_inner())
    }
}
