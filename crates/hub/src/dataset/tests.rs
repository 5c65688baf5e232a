use std::fs;
use std::io::Write;

use super::*;
use crate::files::write_atomic;
use crate::image::rgb_png;

const PIXELS: usize = 3 * 32 * 32;

fn png(value: u8) -> Vec<u8> {
    rgb_png(&[value; 3 * 4], 2, 2).unwrap()
}

fn write(root: &Path, name: &str, bytes: &[u8]) {
    write_atomic(&root.join(name), bytes).unwrap();
}

/// A folder of two classes with three and two pictures, with clutter.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (i, name) in ["cat/b.PNG", "cat/a.png", "cat/c.jpeg", "dog/1.png", "dog/2.jpg"]
        .into_iter()
        .enumerate()
    {
        // The content counts, not the ending.
        write(dir.path(), name, &png(i as u8));
    }
    for name in [
        "README.md",
        "notes.bin",
        "cat/.DS_Store",
        "dog/Thumbs.db",
        ".git/config",
    ] {
        write(dir.path(), name, b"x");
    }
    dir
}

/// Records with a header each and the pixels 0, 1, 2 and so on, modulo 251.
fn cifar(headers: &[&[u8]]) -> Vec<u8> {
    let pixels: Vec<u8> = (0..PIXELS).map(|i| (i % 251) as u8).collect();
    headers.iter().flat_map(|h| [h, &pixels[..]].concat()).collect()
}

fn error(path: &Path, split: Split) -> String {
    Dataset::open(path, split).unwrap_err().to_string()
}

#[test]
fn folders_name_the_classes() {
    let dir = folder();
    let data = Dataset::open(dir.path(), Split::Train).unwrap();
    assert_eq!(data.classes(), ["cat", "dog"]);
    let names: Vec<String> = (0..data.len()).map(|i| data.name(i)).collect();
    assert_eq!(
        names,
        ["cat/a.png", "cat/b.PNG", "cat/c.jpeg", "dog/1.png", "dog/2.jpg"]
    );
    let labels: Vec<usize> = (0..data.len()).map(|i| data.label(i)).collect();
    assert_eq!(labels, [0, 0, 0, 1, 1]);
    assert_eq!(data.picture(0).unwrap().into_raw(), [1; 12]);
    assert_eq!(data.picture(4).unwrap().dimensions(), (2, 2));
}

#[test]
fn splits_are_folders_that_hold_folders() {
    let dir = tempfile::tempdir().unwrap();
    let open = |split| Dataset::open(dir.path(), split);
    write(dir.path(), "train/cat/1.png", &png(1));
    assert_eq!(open(Split::Train).unwrap().classes(), ["cat"]);
    assert!(error(dir.path(), Split::Test).contains("no test/ or val/"));
    for (folder, class) in [("val", "dog"), ("test", "eel")] {
        write(dir.path(), &format!("{folder}/{class}/1.png"), &png(1));
        assert_eq!(
            open(Split::Test).unwrap().classes(),
            [class],
            "test/ comes before val/"
        );
    }
    fs::remove_dir_all(dir.path().join("train")).unwrap();
    assert!(error(dir.path(), Split::Train).contains("no train/"));

    // A class of trains is no split, and without splits either one is the whole.
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "bus/1.png", &png(1));
    write(dir.path(), "train/1.png", &png(1));
    for split in [Split::Train, Split::Test] {
        assert_eq!(
            Dataset::open(dir.path(), split).unwrap().classes(),
            ["bus", "train"]
        );
    }
}

#[test]
fn folders_that_are_none_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    assert!(error(dir.path(), Split::Train).contains("no class folder"));
    assert!(error(&dir.path().join("absent"), Split::Train).contains("absent"));
    write(dir.path(), "cat/1.png", &png(1));
    fs::create_dir(dir.path().join("dog")).unwrap();
    let empty = error(dir.path(), Split::Train);
    assert!(empty.contains("dog") && empty.contains("without"), "{empty}");
    write(dir.path(), "dog/notes.txt", b"x");
    assert_eq!(error(dir.path(), Split::Train), empty, "a text is no picture");
    write(dir.path(), "dog/deep/1.png", &png(1));
    assert!(error(dir.path(), Split::Train).contains("deep"));
}

#[test]
fn what_cannot_be_read_fails_or_is_skipped_as_the_user_asks() {
    let dir = folder();
    let whole = Dataset::open(dir.path(), Split::Train).unwrap();
    let mut seen = Vec::new();
    let (all, skipped) = whole.verify(OnBad::Fail, &mut |done| seen.push(done)).unwrap();
    assert_eq!((all.fingerprint(), skipped), (whole.fingerprint(), vec![]));
    assert_eq!(seen, [1, 2, 3, 4, 5]);

    write(dir.path(), "cat/b.PNG", &png(1)[..40]);
    let data = Dataset::open(dir.path(), Split::Train).unwrap();
    let failed = data.verify(OnBad::Fail, &mut |_| {}).unwrap_err().to_string();
    assert!(
        failed.contains("b.PNG") && failed.contains("not a usable"),
        "{failed}"
    );
    assert_eq!(data.picture(1).unwrap_err().to_string(), failed);
    write(dir.path(), "dog/list.csv", b"1.png,dog");
    let data = Dataset::open(dir.path(), Split::Train).unwrap();
    let failed = data.verify(OnBad::Fail, &mut |_| {}).unwrap_err().to_string();
    for part in [
        "2 pictures cannot be read: cat/b.PNG, dog/list.csv",
        "not a usable",
    ] {
        assert!(failed.contains(part), "{failed}");
    }
    let (good, skipped) = data.verify(OnBad::Skip, &mut |_| {}).unwrap();
    let names: Vec<&str> = skipped.iter().map(|s| &*s.name).collect();
    assert_eq!((names, good.len()), (vec!["cat/b.PNG", "dog/list.csv"], 4));
    assert!(failed.contains(&skipped[0].reason), "{failed}");
    assert!((0..good.len()).all(|i| good.picture(i).is_ok()));

    for file in ["dog/1.png", "dog/2.jpg"] {
        write(dir.path(), file, b"gone");
    }
    let empty = data.verify(OnBad::Skip, &mut |_| {}).unwrap_err().to_string();
    assert!(empty.contains("class dog"), "{empty}");
}

#[test]
fn both_kinds_of_cifar_are_told_apart_by_their_records() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(root, "data_batch_1.bin", &cifar(&[&[0], &[9]]));
    write(root, "data_batch_2.bin", &cifar(&[&[3]]));
    write(root, "test_batch.bin", &cifar(&[&[5]]));
    let ten = Dataset::open(root, Split::Train).unwrap();
    assert_eq!(
        (ten.classes()[0].as_str(), ten.classes()[9].as_str()),
        ("airplane", "truck")
    );
    assert_eq!(
        (0..ten.len()).map(|i| ten.label(i)).collect::<Vec<_>>(),
        [0, 9, 3]
    );
    assert_eq!(
        (ten.name(1), ten.name(2)),
        (
            "data_batch_1.bin record 1".into(),
            "data_batch_2.bin record 0".into()
        )
    );
    // Planes of 1024: red 0, 1, ..; green from 1024 = 4 * 251 + 20; blue from 2048 = 8 * 251 + 40.
    let picture = ten.picture(1).unwrap();
    assert_eq!(
        (picture.dimensions(), picture.get_pixel(1, 0).0),
        ((32, 32), [1, 21, 41])
    );
    assert_eq!(picture.get_pixel(0, 1).0, [32, 52, 72]);
    assert_eq!(Dataset::open(root, Split::Test).unwrap().label(0), 5);
    let one = Dataset::open(&root.join("test_batch.bin"), Split::Train).unwrap();
    assert_eq!(one.len(), 1, "a file is itself, whatever the split");

    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train.bin", &cifar(&[&[255, 99], &[7, 0]]));
    let hundred = Dataset::open(dir.path(), Split::Train).unwrap();
    assert_eq!((hundred.classes().len(), hundred.label(0)), (100, 99));
    assert_eq!(
        (hundred.classes()[0].as_str(), hundred.classes()[99].as_str()),
        ("apple", "worm")
    );
    assert!(hundred.classes().is_sorted() && ten.classes().is_sorted());
    assert!(error(dir.path(), Split::Test).contains("*test*.bin"));
    assert!(ten.verify(OnBad::Fail, &mut |_| {}).is_ok());
}

#[test]
fn a_length_that_suits_both_kinds_is_told_by_its_labels() {
    let dir = tempfile::tempdir().unwrap();
    for (header, count, classes) in [(&[9][..], 3074, 10), (&[4, 99], 3073, 100)] {
        write(dir.path(), "any.bin", &cifar(&vec![header; count]));
        let data = Dataset::open(&dir.path().join("any.bin"), Split::Test).unwrap();
        assert_eq!((data.len(), data.classes().len()), (count, classes));
    }
}

#[test]
fn damaged_cifar_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let good = cifar(&[&[1], &[2]]);
    for (bytes, words) in [
        (&good[..good.len() - 1], ["6145 bytes", "cut off"]),
        (&[], ["0 bytes", "cut off"]),
        (&cifar(&[&[1], &[10]]), ["record 1 has label 10", "10 classes"]),
        (&cifar(&[&[0, 100]]), ["record 0 has label 100", "100 classes"]),
    ] {
        write(root, "train.bin", bytes);
        let text = error(root, Split::Train);
        assert!(
            words.iter().chain(&["train.bin"]).all(|w| text.contains(w)),
            "{text}"
        );
    }
    write(root, "train.bin", &good);
    write(root, "train2.bin", &cifar(&[&[0, 1]]));
    assert!(error(root, Split::Train).contains("CIFAR-100 records beside CIFAR-10"));
    fs::remove_file(root.join("train2.bin")).unwrap();

    let list = |names: &[&str]| write(root, "batches.meta.txt", names.join("\n").as_bytes());
    list(&["a", "b"]);
    let text = error(root, Split::Train);
    assert!(
        text.contains("batches.meta.txt") && text.contains("2 names"),
        "{text}"
    );
    list(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "a"]);
    assert!(error(root, Split::Train).contains("same name"));
    list(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", ""]);
    assert_eq!(Dataset::open(root, Split::Train).unwrap().classes()[9], "j");
}

fn idx(dims: &[u32], values: &[u8]) -> Vec<u8> {
    let sizes = dims.iter().flat_map(|d| d.to_be_bytes());
    [0, 0, 8, dims.len() as u8]
        .into_iter()
        .chain(sizes)
        .chain(values.iter().copied())
        .collect()
}

#[test]
fn idx_files_are_grey_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped
        .write_all(&idx(&[2, 2, 3], &[1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16]))
        .unwrap();
    write(root, "train-images-idx3-ubyte.gz", &zipped.finish().unwrap());
    write(root, "train-labels-idx1-ubyte", &idx(&[2], &[2, 0]));
    let data = Dataset::open(root, Split::Train).unwrap();
    assert_eq!(data.classes(), ["0", "1", "2"]);
    assert_eq!((data.label(0), data.label(1)), (2, 0));
    let picture = data.picture(1).unwrap();
    assert_eq!(
        (picture.dimensions(), picture.get_pixel(2, 1).0),
        ((3, 2), [16; 3])
    );
    assert_eq!(data.name(1), "train-images-idx3-ubyte.gz record 1");
    assert!(error(root, Split::Test).contains("t10k"));

    write(root, "train-labels-idx1-ubyte", &idx(&[3], &[2, 0, 1]));
    assert!(error(root, Split::Train).contains("2 pictures, but [3] labels"));
    write(root, "t10k-labels-idx1-ubyte", &idx(&[0], &[]));
    for dims in [[0, 2, 3], [0, 0, 3]] {
        write(root, "t10k-images-idx3-ubyte", &idx(&dims, &[]));
        assert!(error(root, Split::Test).contains("no picture"));
    }
}

/// Twenty pictures of one class, five of another, one of a third.
fn uneven() -> (tempfile::TempDir, Dataset) {
    let dir = tempfile::tempdir().unwrap();
    let labels = [[0; 20].to_vec(), [4; 5].to_vec(), vec![7]].concat();
    let headers: Vec<&[u8]> = labels.chunks(1).collect();
    write(dir.path(), "train.bin", &cifar(&headers));
    let data = Dataset::open(dir.path(), Split::Train).unwrap();
    (dir, data)
}

#[test]
fn fingerprints_tell_apart_what_differs() {
    let (dir, data) = uneven();
    let again = Dataset::open(dir.path(), Split::Train).unwrap();
    assert_eq!(data.fingerprint(), again.fingerprint());
    let all: Vec<usize> = (0..data.len()).collect();
    assert_eq!(data.fingerprint(), data.subset(&all).fingerprint());
    assert_ne!(data.fingerprint(), data.subset(&all[1..]).fingerprint());

    let mut prints = BTreeSet::from([data.fingerprint()]);
    let bytes = fs::read(dir.path().join("train.bin")).unwrap();
    for (at, value) in [(0, 1), (3072, 3)] {
        let mut changed = bytes.clone();
        changed[at] = value;
        write(dir.path(), "train.bin", &changed);
        assert!(prints.insert(Dataset::open(dir.path(), Split::Train).unwrap().fingerprint()));
    }

    let dir = folder();
    let print = || Dataset::open(dir.path(), Split::Train).unwrap().fingerprint();
    assert!(prints.insert(print()));
    write(dir.path(), "cat/a.png", &png(9)[..30]);
    assert!(prints.insert(print()), "a size");
    fs::rename(dir.path().join("cat"), dir.path().join("cow")).unwrap();
    assert!(prints.insert(print()), "a class");
    fs::rename(dir.path().join("dog/1.png"), dir.path().join("dog/3.png")).unwrap();
    assert!(prints.insert(print()), "a name");
}

#[test]
fn classes_that_differ_are_named() {
    let (a, b) = (folder(), folder());
    let open = |dir: &tempfile::TempDir| Dataset::open(dir.path(), Split::Train).unwrap();
    open(&a).check_same_classes(&open(&b)).unwrap();
    write(b.path(), "emu/1.png", &png(1));
    fs::rename(b.path().join("cat"), b.path().join("yak")).unwrap();
    let text = open(&a).check_same_classes(&open(&b)).unwrap_err().to_string();
    let place = |dir: &tempfile::TempDir| dir.path().to_string_lossy().into_owned();
    assert!(text.contains(&format!("only {} has cat", place(&a))), "{text}");
    assert!(
        text.contains(&format!("only {} has emu, yak", place(&b))),
        "{text}"
    );
}

/// The files themselves, where `VEILTUNE_ASSETS` names the folder that has them.
#[test]
fn real_files_are_read() {
    let Some(assets) = std::env::var_os("VEILTUNE_ASSETS").map(PathBuf::from) else {
        eprintln!("VEILTUNE_ASSETS names no folder with cifar10/ and cifar100/: nothing checked");
        return;
    };
    for (folder, classes, counts) in [
        ("cifar10", 10, [10_000, 5_000]),
        ("cifar100", 100, [12_000, 8_000]),
    ] {
        for (split, count) in [Split::Train, Split::Test].into_iter().zip(counts) {
            let data = Dataset::open(&assets.join(folder), split).unwrap();
            assert_eq!((data.classes().len(), data.len()), (classes, count));
            assert_eq!(data.verify(OnBad::Fail, &mut |_| {}).unwrap().0.len(), count);
            assert!(data.per_class().iter().all(|c| !c.is_empty()));
        }
    }
}

#[test]
#[cfg(unix)]
fn a_link_to_nowhere_is_a_picture_that_cannot_be_read() {
    let dir = folder();
    std::os::unix::fs::symlink("nowhere.png", dir.path().join("cat/z.png")).unwrap();
    let data = Dataset::open(dir.path(), Split::Train).unwrap();
    let failed = data.verify(OnBad::Fail, &mut |_| {}).unwrap_err().to_string();
    assert!(failed.contains("z.png"), "{failed}");
    let (good, skipped) = data.verify(OnBad::Skip, &mut |_| {}).unwrap();
    assert_eq!((good.len(), skipped.len()), (5, 1));
    assert_eq!(skipped[0].name, "cat/z.png");
}
