//! What a server or the assistant keeps of a model between runs, encrypted at rest.
//!
//! A folder a model, named after its fingerprint: `model.json` (public), and sealed files. Each sealed file is a sequence of
//! pieces encrypted with AES-256-GCM (NIST SP 800-38D) under a key of its own, derived from the store's key and the file's
//! random number; a piece's nonce is its number, and what it belongs to, its number and whether it is the last are
//! authenticated with it. So no piece can be read, changed, moved or left out unnoticed by who has the disk but not the key.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use veiltune_hub::{Tokenizer, files, tokenizer::Special};
use veiltune_nn::language::LanguageConfig;
use zeroize::Zeroizing;

use super::talk;
use crate::{Error, Result};

/// Plain bytes of a piece.
const PIECE: usize = 1 << 20;
const TAG: usize = 16;
/// The public part of a model.
const PUBLIC: &str = "model.json";
const MAGIC: &[u8; 16] = b"veiltune-sealed\n";

/// What everybody may know of a shared model.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct PublicModel {
    /// Its name, as its owner calls it.
    pub name: String,
    /// A random number, in hexadecimal: which sharing of it this is.
    pub fingerprint: String,
    /// Architecture and calibration.
    pub config: LanguageConfig,
    /// Standard deviation of what enters the first layer, which prompts are spread as.
    pub deviation: f64,
    /// The tokenizer, `tokenizer.json`.
    pub tokenizer: serde_json::Value,
    /// Its special words.
    pub special: Special,
}

/// A shared model as lists have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// As [`PublicModel::name`].
    pub name: String,
    /// As [`PublicModel::fingerprint`].
    pub fingerprint: String,
}

/// Refuses names that are not fit for a terminal.
pub fn check_name(name: &str) -> Result<()> {
    match name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
        true => Err(Error::Refused(
            "a model's name has 1 to 200 bytes and no control characters".into(),
        )),
        false => Ok(()),
    }
}

/// Most parameters of a model, its word table included.
const MOST: u128 = 1 << 34;

impl PublicModel {
    /// Refuses what no model has, and what would only exhaust memory.
    pub fn check(&self) -> Result<()> {
        check_name(&self.name)?;
        let c = &self.config;
        c.check()?;
        let [d, heads, groups, width, mlp, layers] = [
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.intermediate_size,
            c.num_hidden_layers,
        ]
        .map(|n| n as u128);
        let layer = 2 * d * width * (heads + groups) + 3 * d * mlp;
        let words = 2 * c.vocab_size as u128 * c.embedding_size as u128;
        let positions = c.max_positions as u128 * c.embedding_size as u128;
        match layers * layer + words + positions + d * d <= MOST {
            true => Ok(()),
            false => Err(Error::Refused(format!("a model of more than {MOST} parameters"))),
        }
    }

    /// The tokenizer.
    pub fn words(&self) -> Result<Tokenizer> {
        let json = serde_json::to_vec(&self.tokenizer).unwrap_or_default();
        let words = Tokenizer::from_json("the model's tokenizer", &json)
            .map_err(|e| Error::Refused(e.to_string()))?;
        Ok(words.with_special(self.special))
    }
}

/// A folder of models, and the key that opens them.
pub struct Store {
    dir: PathBuf,
    key: Zeroizing<[u8; 32]>,
}

/// The sealed parts of a model.
#[derive(Clone, Copy)]
pub enum Part {
    /// Shares of the parameters, or the seed that they are expanded from.
    Weights,
    /// The masked word table.
    Table,
    /// Seeds of the table's masks.
    Masks,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Weights => "weights",
            Part::Table => "table",
            Part::Masks => "masks",
        }
    }
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |e| Error::Io {
        what: path.display().to_string(),
        source: e,
    }
}

impl Store {
    /// Opens or makes the folder `dir` and the key file `key`, which its owner alone may read.
    pub fn open(dir: &Path, key: &Path) -> Result<Store> {
        files::private_folder(dir)?;
        let mut bytes = Zeroizing::new([0; 32]);
        match fs::read(key) {
            Ok(found) if found.len() == 32 => bytes.copy_from_slice(&Zeroizing::new(found)),
            Ok(_) => {
                return Err(Error::Input(format!(
                    "{}: not a key of 32 bytes; give the file that an earlier run made",
                    key.display()
                )));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                getrandom::fill(bytes.as_mut())
                    .map_err(|e| Error::io("drawing a key")(std::io::Error::other(e)))?;
                files::write_private(key, bytes.as_ref())?;
            }
            Err(e) => return Err(failed(key)(e)),
        }
        let store = Store {
            dir: dir.into(),
            key: bytes,
        };
        // What a share left that broke off with its process.
        for name in store.names()? {
            if store.folder(&name).is_ok() && !store.has(&name) {
                store.forget(&name);
            }
        }
        Ok(store)
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.dir).map_err(failed(&self.dir))?;
        entries
            .map(|entry| {
                let name = entry.map_err(failed(&self.dir))?.file_name();
                Ok(name.to_string_lossy().into_owned())
            })
            .collect()
    }

    fn folder(&self, fingerprint: &str) -> Result<PathBuf> {
        match fingerprint.len() == 64 && fingerprint.bytes().all(|b| b.is_ascii_hexdigit()) {
            true => Ok(self.dir.join(fingerprint)),
            false => Err(Error::Refused("that is no model's fingerprint".into())),
        }
    }

    /// Whether all of a model is here.
    pub fn has(&self, fingerprint: &str) -> bool {
        self.folder(fingerprint)
            .is_ok_and(|dir| dir.join(PUBLIC).exists())
    }

    /// What is public of a model.
    pub fn public(&self, fingerprint: &str) -> Result<PublicModel> {
        let path = self.folder(fingerprint)?.join(PUBLIC);
        match path.exists() {
            true => read(&path),
            false => Err(Error::Refused(
                "that model is not here: have its owner share it again".into(),
            )),
        }
    }

    /// All models that are here.
    pub fn models(&self) -> Result<Vec<Listed>> {
        let mut models = Vec::new();
        for name in self.names()?.iter().filter(|name| self.has(name)) {
            // One that is damaged must not hide the others.
            match read::<Listed>(&self.folder(name)?.join(PUBLIC)) {
                Ok(model) => models.push(model),
                Err(e) => tracing::warn!("left out a model: {e}"),
            }
        }
        models.sort_by(|a, b| (&a.name, &a.fingerprint).cmp(&(&b.name, &b.fingerprint)));
        Ok(models)
    }

    /// A model that is coming in; nothing of it counts before [`Store::complete`].
    pub fn begin(&self, public: &PublicModel) -> Result<()> {
        Ok(files::private_folder(&self.folder(&public.fingerprint)?)?)
    }

    /// Nothing of the model stays.
    pub fn forget(&self, fingerprint: &str) {
        if let Ok(dir) = self.folder(fingerprint)
            && let Err(e) = fs::remove_dir_all(&dir)
        {
            tracing::warn!("{}: {e}; remove it by hand", dir.display());
        }
    }

    /// All of the model is in.
    pub fn complete(&self, public: &PublicModel) -> Result<()> {
        let path = self.folder(&public.fingerprint)?.join(PUBLIC);
        let bytes = serde_json::to_vec(public).map_err(|e| Error::Input(e.to_string()))?;
        Ok(files::write_private(&path, &bytes)?)
    }

    /// Writes a part.
    pub fn writer(&self, fingerprint: &str, part: Part) -> Result<Writer> {
        let path = self.folder(fingerprint)?.join(part.name());
        let partial = path.with_extension("partial");
        let mut number = [0; 16];
        getrandom::fill(&mut number).map_err(|e| Error::io("drawing a number")(std::io::Error::other(e)))?;
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut out = BufWriter::new(options.open(&partial).map_err(failed(&partial))?);
        out.write_all(MAGIC)
            .and_then(|()| out.write_all(&number))
            .map_err(failed(&partial))?;
        Ok(Writer {
            seal: self.seal(fingerprint, part, &number)?,
            out,
            path,
            partial,
            pending: Zeroizing::new(Vec::with_capacity(PIECE + TAG)),
            index: 0,
        })
    }

    /// Reads a part.
    pub fn reader(&self, fingerprint: &str, part: Part) -> Result<Reader> {
        let path = self.folder(fingerprint)?.join(part.name());
        let mut input = BufReader::new(File::open(&path).map_err(failed(&path))?);
        let mut header = [0; 32];
        input.read_exact(&mut header).map_err(failed(&path))?;
        let (magic, number) = header.split_at(16);
        if magic != MAGIC {
            return Err(damaged(&path));
        }
        let number: [u8; 16] = number.try_into().expect("sixteen bytes");
        Ok(Reader {
            seal: self.seal(fingerprint, part, &number)?,
            input,
            path,
            piece: Zeroizing::new(Vec::new()),
            at: 0,
            index: 0,
            ended: false,
        })
    }

    fn seal(&self, fingerprint: &str, part: Part, number: &[u8; 16]) -> Result<Seal> {
        let key = Zeroizing::new(<[u8; 32]>::from(
            Sha256::new()
                .chain_update(b"veiltune store v1\0")
                .chain_update(self.key.as_ref())
                .chain_update(number)
                .finalize(),
        ));
        let key = UnboundKey::new(&AES_256_GCM, key.as_ref())
            .map_err(|_| Error::Input("the cipher refuses its key".into()))?;
        Ok(Seal {
            key: LessSafeKey::new(key),
            belongs: format!("{fingerprint}/{}", part.name()),
        })
    }
}

/// What is public of a model, all of it or a part: as large as a message may be that it came in.
fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = files::read(path, talk::MOST as u64)?;
    serde_json::from_slice(&bytes).map_err(|_| damaged(path))
}

fn damaged(path: &Path) -> Error {
    Error::Input(format!(
        "{}: damaged, incomplete, or sealed with another key; give the key that it was made with, or have the model's owner \
         share it again",
        path.display()
    ))
}

struct Seal {
    key: LessSafeKey,
    belongs: String,
}

impl Seal {
    fn nonce(index: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&index.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    fn aad(&self, index: u64, last: bool) -> Aad<Vec<u8>> {
        Aad::from(format!("{}/{index}/{last}", self.belongs).into_bytes())
    }
}

/// A part being written. It appears under its name only once it is complete.
pub struct Writer {
    seal: Seal,
    out: BufWriter<File>,
    path: PathBuf,
    partial: PathBuf,
    pending: Zeroizing<Vec<u8>>,
    index: u64,
}

impl Writer {
    /// Appends bytes.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.pending.len() == PIECE {
                self.flush(false)?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Appends ring elements.
    pub fn put_words(&mut self, words: &[u64]) -> Result<()> {
        words.chunks(1 << 13).try_for_each(|piece| {
            let bytes: Vec<u8> = piece.iter().flat_map(|w| w.to_le_bytes()).collect();
            self.put(&Zeroizing::new(bytes))
        })
    }

    fn flush(&mut self, last: bool) -> Result<()> {
        let (nonce, aad) = (Seal::nonce(self.index), self.seal.aad(self.index, last));
        let piece: &mut Vec<u8> = &mut self.pending;
        self.seal
            .key
            .seal_in_place_append_tag(nonce, aad, piece)
            .map_err(|_| Error::Input("sealing failed".into()))?;
        let written = self
            .out
            .write_all(&(piece.len() as u32).to_le_bytes())
            .and_then(|()| self.out.write_all(piece));
        piece.clear();
        self.index += 1;
        written.map_err(failed(&self.partial))
    }

    /// Everything was put.
    pub fn finish(mut self) -> Result<()> {
        self.flush(true)?;
        let synced = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        synced.map_err(failed(&self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(failed(&self.path))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After `finish` there is nothing under this name any more.
        let _ = fs::remove_file(&self.partial);
    }
}

/// A part being read.
pub struct Reader {
    seal: Seal,
    input: BufReader<File>,
    path: PathBuf,
    piece: Zeroizing<Vec<u8>>,
    at: usize,
    index: u64,
    ended: bool,
}

impl Reader {
    /// The next bytes.
    pub fn take(&mut self, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            if self.at == self.piece.len() {
                self.next()?;
            }
            let n = buf.len().min(self.piece.len() - self.at);
            let (now, later) = buf.split_at_mut(n);
            now.copy_from_slice(&self.piece[self.at..self.at + n]);
            self.at += n;
            buf = later;
        }
        Ok(())
    }

    /// The next ring elements.
    pub fn take_words(&mut self, len: usize) -> Result<Vec<u64>> {
        let mut words = Vec::with_capacity(len);
        let mut bytes = Zeroizing::new(vec![0; PIECE.min(8 * len)]);
        while words.len() < len {
            let piece = &mut bytes[..PIECE.min(8 * (len - words.len()))];
            self.take(piece)?;
            let own = piece.chunks_exact(8);
            words.extend(own.map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))));
        }
        Ok(words)
    }

    fn next(&mut self) -> Result<()> {
        if self.ended {
            return Err(damaged(&self.path));
        }
        let mut length = [0; 4];
        self.input
            .read_exact(&mut length)
            .map_err(|_| damaged(&self.path))?;
        let length = u32::from_le_bytes(length) as usize;
        if !(TAG..=PIECE + TAG).contains(&length) {
            return Err(damaged(&self.path));
        }
        self.piece.resize(length, 0);
        self.input
            .read_exact(&mut self.piece)
            .map_err(|_| damaged(&self.path))?;
        self.ended = self.input.buffer().is_empty()
            && std::io::BufRead::fill_buf(&mut self.input)
                .map_err(failed(&self.path))?
                .is_empty();
        let (nonce, aad) = (Seal::nonce(self.index), self.seal.aad(self.index, self.ended));
        let open = self.seal.key.open_in_place(nonce, aad, &mut self.piece);
        let plain = open.map_err(|_| damaged(&self.path))?.len();
        self.piece.truncate(plain);
        (self.index, self.at) = (self.index + 1, 0);
        if plain == 0 {
            return Err(damaged(&self.path));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn write(store: &Store, words: &[u64]) {
        let dir = store.folder(MODEL).unwrap();
        files::write_private(&dir.join(PUBLIC), b"{}").unwrap();
        let mut writer = store.writer(MODEL, Part::Weights).unwrap();
        writer.put_words(words).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn what_is_sealed_is_read_again_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), &dir.path().join("key")).unwrap();
        let words: Vec<u64> = (0..300_000)
            .map(|i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        write(&store, &words);
        // Read after a restart, in pieces of any size.
        let store = Store::open(&dir.path().join("store"), &dir.path().join("key")).unwrap();
        let mut reader = store.reader(MODEL, Part::Weights).unwrap();
        let mut read = Vec::new();
        for n in [1, 131_072, 7, 168_920] {
            read.extend(reader.take_words(n).unwrap());
        }
        assert_eq!(read, words);
        assert!(reader.take_words(1).is_err());

        let path = dir.path().join("store").join(MODEL).join("weights");
        let sealed = fs::read(&path).unwrap();
        let plain: Vec<u8> = words[..64].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert!(!sealed.windows(plain.len()).any(|w| w == plain));
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            store
                .reader(MODEL, Part::Weights)
                .and_then(|mut r| r.take_words(words.len()))
        };
        assert_eq!(read(&sealed).unwrap(), words);
        // A changed bit, pieces in another order or left out, and a file that is cut off are noticed.
        for at in [20, 40, 70_000, sealed.len() - 1] {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(read(&bad).is_err(), "a change at {at}");
        }
        let piece = 4 + PIECE + TAG;
        let (head, rest) = sealed.split_at(32);
        let swapped = [head, &rest[piece..2 * piece], &rest[..piece], &rest[2 * piece..]].concat();
        assert!(read(&swapped).is_err());
        assert!(read(&[head, &rest[piece..]].concat()).is_err());
        assert!(read(&sealed[..32 + 2 * piece]).is_err());
        // Another key opens nothing.
        fs::write(&path, &sealed).unwrap();
        let other = Store::open(&dir.path().join("store"), &dir.path().join("other")).unwrap();
        assert!(other.reader(MODEL, Part::Weights).unwrap().take_words(1).is_err());
        // Neither does the same key as another part.
        fs::rename(&path, path.with_file_name("table")).unwrap();
        assert!(store.reader(MODEL, Part::Table).unwrap().take_words(1).is_err());
    }

    #[test]
    fn a_damaged_model_hides_no_other_and_what_broke_off_goes() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::open(&dir.path().join("store"), &dir.path().join("key")).unwrap();
        let store = open();
        // As large as tokenizers come.
        let large = "x".repeat(20 << 20);
        let listed = Listed {
            name: "large".into(),
            fingerprint: MODEL.into(),
        };
        let text = serde_json::json!({"name": listed.name, "fingerprint": MODEL, "tokenizer": large});
        let put = |fingerprint: &str, name: &str, text: &str| {
            let path = store.folder(fingerprint).unwrap().join(name);
            files::write_private(&path, text.as_bytes()).unwrap();
        };
        put(MODEL, PUBLIC, &text.to_string());
        let (damaged, broken) = ("1".repeat(64), "2".repeat(64));
        put(&damaged, PUBLIC, "{\"name\": 1");
        assert_eq!(store.models().unwrap(), std::slice::from_ref(&listed));
        assert!(
            store
                .public(&damaged)
                .err()
                .unwrap()
                .to_string()
                .contains("damaged")
        );
        // A share that broke off with its process is removed when the next one starts, one that failed at once.
        put(&broken, "table", "half");
        assert!(store.folder(&broken).unwrap().exists());
        let store = open();
        assert!(!store.folder(&broken).unwrap().exists());
        assert_eq!(store.models().unwrap(), [listed]);
        store.forget(&damaged);
        assert!(!store.folder(&damaged).unwrap().exists());
    }

    #[test]
    fn a_fingerprint_is_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &dir.path().join("key")).unwrap();
        for name in ["..", "../../etc/passwd", "", &"x".repeat(64)] {
            assert!(!store.has(name));
            assert!(store.public(name).is_err());
        }
    }
}
