//! Whole files: bounded reading, atomic writing.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result};

/// Largest JSON document read, bytes.
const MAX_JSON: u64 = 1 << 22;

/// Reads a regular file of at most `limit` bytes.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let meta = file.metadata().map_err(Error::io(path))?;
    if !meta.is_file() {
        return Err(Error::corrupt(path.to_string_lossy(), "not a regular file"));
    }
    let too_large = || Error::corrupt(path.to_string_lossy(), format!("larger than {limit} bytes"));
    if meta.len() > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    // The file may grow while it is read; the limit holds all the same.
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path))?;
    if bytes.len() as u64 > limit {
        Err(too_large())
    } else {
        Ok(bytes)
    }
}

/// Who may read what is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Readers {
    Everybody,
    OwnUser,
}

/// Writes a file that everybody may read, so that at any moment either the old or the complete new content is there, whatever
/// fails: a full disk, or a process that is killed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, Readers::Everybody, |out| out.write_all(bytes))
}

/// As [`write_atomic`], a file that only its user may read, as that user's folders are that have to be made for it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, Readers::OwnUser, |out| out.write_all(bytes))
}

/// Makes a folder that only its user may enter, with those around it; what is there stays as it is.
pub fn private_folder(path: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(Error::io(path))
}

/// Content that `fill` writes piece by piece. If that fails, nothing stays behind.
fn replace(path: &Path, readers: Readers, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let dir = parent.unwrap_or(Path::new("."));
    match readers {
        Readers::Everybody => fs::create_dir_all(dir).map_err(Error::io(dir))?,
        Readers::OwnUser => private_folder(dir)?,
    }
    // Temporary files are their user's alone.
    let mut file = tempfile::Builder::new()
        .prefix(".partial-")
        .tempfile_in(dir)
        .map_err(Error::io(dir))?;
    fill(&mut file)
        .and_then(|()| file.as_file().sync_all())
        .map_err(Error::io(path))?;
    #[cfg(unix)]
    if readers == Readers::Everybody {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(mode).map_err(Error::io(path))?;
    }
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    Ok(())
}

/// Reads a JSON document.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse_json(&path.to_string_lossy(), &read(path, MAX_JSON)?)
}

/// Parses a JSON document; `file` is for the error.
pub fn parse_json<T: DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Error::corrupt(file, e))
}

/// Writes a JSON document atomically, indented.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::corrupt(path.to_string_lossy(), e))?;
    text.push(b'\n');
    write_atomic(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_was_written_and_keeps_the_old_on_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/file.json");
        write_json(&path, &[1, 2, 3]).unwrap();
        write_json(&path, &[4]).unwrap();
        assert_eq!(read_json::<Vec<u8>>(&path).unwrap(), [4]);
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no temporary file stays"
        );
    }

    #[test]
    fn a_full_disk_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        // A disk that has room for 1000 bytes.
        let fill = |out: &mut dyn Write| {
            out.write_all(&[7; 1000])?;
            Err(io::ErrorKind::StorageFull.into())
        };
        let names = || -> Vec<_> {
            let entries = fs::read_dir(dir.path()).unwrap();
            entries.map(|e| e.unwrap().file_name()).collect()
        };
        let text = replace(&path, Readers::Everybody, fill).unwrap_err().to_string();
        assert!(text.contains("weights"), "{text}");
        assert!(names().is_empty());
        write_atomic(&path, b"old").unwrap();
        assert!(replace(&path, Readers::OwnUser, fill).is_err());
        assert_eq!(names(), ["weights"]);
        assert_eq!(read(&path, 10).unwrap(), b"old");
    }

    #[test]
    #[cfg(unix)]
    fn what_is_private_is_its_users_alone() {
        use std::os::unix::fs::PermissionsExt;
        let others = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/weights");
        write_private(&path, b"old").unwrap();
        write_private(&path, b"new").unwrap();
        assert_eq!(read(&path, 3).unwrap(), b"new");
        assert_eq!(others(&path), 0);
        assert_eq!(others(path.parent().unwrap()), 0);
        // Beside it, what everybody may read; and what was open becomes private.
        let open = dir.path().join("open");
        write_atomic(&open, b"").unwrap();
        assert_ne!(others(&open), 0);
        write_private(&open, b"").unwrap();
        assert_eq!(others(&open), 0);
        let error = write_private(dir.path(), b"x").unwrap_err().to_string();
        assert!(error.contains(&*dir.path().to_string_lossy()), "{error}");
    }

    #[test]
    fn refuses_what_is_too_large_or_not_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_atomic(&path, &[0; 10]).unwrap();
        assert_eq!(read(&path, 10).unwrap().len(), 10);
        assert!(
            read(&path, 9)
                .unwrap_err()
                .to_string()
                .contains("larger than 9 bytes")
        );
        assert!(read(dir.path(), 9).is_err());
        assert!(
            read(&dir.path().join("absent"), 9)
                .unwrap_err()
                .to_string()
                .contains("absent")
        );
    }
}
