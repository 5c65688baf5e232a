//! Training, measuring and searching adapters: what comes out can be used, what is interrupted goes on to the same result, and
//! what cannot be used is explained.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Output, assets, run, veiltune};
use serde_json::{Value, json};
use veiltune_hub::image::grey_png;

const SIDE: usize = 28;
const CLASSES: [&str; 4] = ["across", "checks", "down", "slanted"];

/// Picture `i` of a class: bright stripes or checks, of various widths and offsets.
fn picture(class: usize, i: usize) -> Vec<u8> {
    let (width, offset) = (3 + i % 4, i / 4);
    let bright = move |p: usize| {
        let (x, y) = (p % SIDE + offset, p / SIDE + offset);
        let along = [y, x / width % 2 * width + y, x, x + y][class];
        along / width % 2 == 0
    };
    (0..SIDE * SIDE)
        .map(|p| if bright(p) { 220 } else { 10 })
        .collect()
}

/// Writes so many pictures of each class, the first with number `first`.
fn write(dir: &Path, classes: [&str; 4], first: usize, each: usize) {
    for (class, name) in classes.iter().enumerate() {
        fs::create_dir_all(dir.join(name)).unwrap();
        for i in first..first + each {
            let png = grey_png(&picture(class, i), SIDE as u32).unwrap();
            fs::write(dir.join(name).join(format!("{i:03}.png")), png).unwrap();
        }
    }
}

/// Pictures, and room for caches and results.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// With so many pictures of each class to train on.
    fn new(each: usize) -> World {
        let dir = tempfile::tempdir().unwrap();
        let world = World { dir };
        write(&world.data().join("train"), CLASSES, 0, each);
        write(&world.data().join("test"), CLASSES, each, 6);
        world
    }

    fn data(&self) -> PathBuf {
        self.at("data")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command on the pictures, with the embedded backbone.
    fn command(&self, name: &str, args: &[&str]) -> Command {
        self.caching(name, "cache", args)
    }

    /// The same with a cache of its own.
    fn caching(&self, name: &str, cache: &str, args: &[&str]) -> Command {
        let mut command = veiltune();
        command.args([name, "--json", "--threads", "2", "--data"]);
        command.arg(self.data()).arg("--cache").arg(self.at(cache));
        command.args(args);
        command
    }

    /// Trains an adapter into `out`.
    fn train(&self, out: &str, args: &[&str]) -> Command {
        let mut command = self.command("train", &["--batch", "8", "--rate", "0.05", "--heads", "2"]);
        command
            .args(["--rank", "8", "--out"])
            .arg(self.at(out))
            .args(args);
        command
    }

    /// Whether `out` has an adapter.
    fn has_adapter(&self, out: &str) -> bool {
        self.at(out).join("adapter_config.json").exists()
    }

    fn weights(&self, out: &str) -> Vec<u8> {
        fs::read(self.at(out).join("adapter_model.safetensors")).unwrap()
    }
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

/// `plan` of an adapter, which has to load for that.
fn plan(adapter: &Path) -> Value {
    run(veiltune().args(["plan", "--json", "--adapter"]).arg(adapter)).json()
}

#[test]
fn what_is_trained_is_measured_in_every_arithmetic_and_planned() {
    let world = World::new(24);
    let data = world.data();
    let train = |out: &str, args: &[&str]| {
        let mut command = world.train(out, args);
        run(command.arg("--test").arg(&data)).json()
    };
    let trained = train("owc", &["--epochs", "6"]);
    assert_eq!((&trained["classes"], &trained["skipped"]), (&json!(4), &json!(0)));
    // Of each class two pictures are kept to validate on.
    assert_eq!(trained["pictures"], 88);
    assert_eq!(trained["curve"].as_array().unwrap().len(), 6);
    // What is kept is the best of the start and of the curve.
    let kept = match trained["epoch"].as_u64().unwrap() {
        0 => &trained["start"],
        epoch => &trained["curve"][epoch as usize - 1],
    };
    assert_eq!(kept["validation_accuracy"], trained["validation_accuracy"]);
    let epochs = trained["curve"].as_array().unwrap();
    let accuracy = |e: &Value| number(&e["validation_accuracy"]);
    assert!(epochs.iter().all(|e| accuracy(e) <= accuracy(kept)), "{trained}");
    assert_eq!(trained["test"]["pictures"], 24);
    assert!(number(&trained["test"]["accuracy"]) > 0.5, "{trained}");
    let curve = fs::read_to_string(trained["learning_curve"].as_str().unwrap()).unwrap();
    assert!(curve.contains("<svg"));

    // The start alone.
    let start = train("start", &["--epochs", "0"]);
    assert_eq!(
        (&start["epoch"], &start["curve"], &start["learning_curve"]),
        (&json!(0), &json!([]), &Value::Null)
    );
    assert_eq!(start["start"], trained["start"]);
    assert_eq!(
        start["validation_accuracy"],
        start["start"]["validation_accuracy"]
    );
    assert!(number(&start["test"]["accuracy"]) > 0.5, "{start}");
    assert!(world.has_adapter("start"));

    let report: Value =
        serde_json::from_slice(&fs::read(world.at("owc").join("report.json")).unwrap()).unwrap();
    assert_eq!(
        (&report["curve"], &report["test"]),
        (&trained["curve"], &trained["test"])
    );

    let measure = |arithmetic: &str| {
        let mut command = world.command("evaluate", &["--arithmetic", arithmetic, "--adapter"]);
        run(command.arg(world.at("owc"))).json()
    };
    let float = measure("float");
    assert_eq!(float["accuracy"], trained["test"]["accuracy"]);
    for arithmetic in ["served", "fixed"] {
        let other = measure(arithmetic);
        assert_eq!(
            (&other["pictures"], &other["beyond_range"]),
            (&json!(24), &json!(0))
        );
        let apart = number(&other["accuracy"]) - number(&float["accuracy"]);
        assert!(apart.abs() < 1.5 / 24.0, "{arithmetic}: {other} {float}");
        assert!((number(&other["loss"]) - number(&float["loss"])).abs() < 0.1);
    }
    let planned = plan(&world.at("owc"));
    assert_eq!(planned["rounds"], trained["rounds"]);
    assert_eq!(planned["online_bytes"], trained["online_bytes"]);

    // The method's own defaults hold where nothing is given.
    let mut head = world.command("train", &["--method", "head", "--out"]);
    let head = run(head.arg(world.at("head"))).json();
    assert_eq!(
        (&head["settings"]["epochs"], &head["settings"]["batch"]),
        (&json!(60), &json!(256))
    );
    assert!((number(&head["settings"]["rate"]) - 5e-3).abs() < 1e-6);
    assert_eq!(head["test"], Value::Null);
    plan(&world.at("head"));
    for (method, rank) in [("lora", "2"), ("last-layer", "1"), ("mpcvit", "1")] {
        let mut other = world.command("train", &["--method", method, "--epochs", "1", "--out"]);
        run(other.arg(world.at(method)).args(["--rank", rank])).json();
        plan(&world.at(method));
    }
}

#[test]
fn a_finished_run_is_repeated_to_the_same_bits_and_another_one_does_not_take_its_place() {
    let world = World::new(8);
    let first = run(&mut world.train("out", &["--epochs", "1"])).json();
    let weights = world.weights("out");
    let again = run(&mut world.train("out", &["--epochs", "1"])).json();
    assert_eq!(
        (&again["curve"], &again["rounds"]),
        (&first["curve"], &first["rounds"])
    );
    run(&mut world.train("out", &["--epochs", "1", "--seed", "2"])).explains(
        2,
        &[
            "training.json",
            "another method or other pictures",
            "give another folder",
        ],
    );
    assert!(weights == world.weights("out") && world.has_adapter("out"));
    plan(&world.at("out"));

    // Somebody else's adapter.
    let foreign = world.at("foreign");
    fs::create_dir(&foreign).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(assets().join("adapter").join(name), foreign.join(name)).unwrap();
    }
    run(&mut world.train("foreign", &[]))
        .explains(2, &["foreign", "overwritten", "--out", "remove that one"]);
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 2);
}

#[cfg(unix)]
mod interrupted {
    use super::*;
    use common::{LIMIT, start, wait_for};

    /// Starts it, interrupts it as Ctrl-C does once `begun`, and waits for its end.
    fn interrupt(command: &mut Command, what: &str, begun: impl Fn() -> bool) {
        let mut running = start(command);
        wait_for(what, LIMIT, || {
            let ended = running.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended before {what}");
            begun().then_some(())
        });
        let pid = running.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-INT", &pid])
                .status()
                .unwrap()
                .success()
        );
        let output = running.end(LIMIT);
        output.explains(130, &["interrupted", "the same command goes on"]);
    }

    #[test]
    fn training_goes_on_to_the_same_bits_from_wherever_it_was_interrupted() {
        let world = World::new(60);
        let train = |out: &str, cache: &str| {
            let mut command = world.caching("train", cache, &["--epochs", "16", "--views", "4"]);
            command.args(["--batch", "8", "--heads", "2", "--rank", "8", "--out"]);
            command.arg(world.at(out));
            command
        };
        let states = |name: &str| {
            let caches = fs::read_dir(world.at(name)).into_iter().flatten().flatten();
            let files = caches.flat_map(|c| fs::read_dir(c.path()).into_iter().flatten().flatten());
            files
                .filter(|f| f.file_name().to_string_lossy().ends_with(".f16"))
                .map(|f| f.metadata().unwrap().len())
                .sum::<u64>()
        };
        interrupt(&mut train("out", "cut"), "hidden states", || states("cut") > 0);
        assert!(!world.has_adapter("out") && states("cut") > 0);
        interrupt(&mut train("out", "cut"), "an epoch", || {
            world.at("out").join("training.json").exists()
        });
        assert!(!world.has_adapter("out"));
        let resumed = run(&mut train("out", "cut")).json();
        let whole = run(&mut train("whole", "uncut")).json();
        assert!(world.weights("out") == world.weights("whole"));
        assert_eq!(
            (
                &resumed["validation_accuracy"],
                resumed["curve"].as_array().unwrap().len()
            ),
            (&whole["validation_accuracy"], 16)
        );
        assert_eq!(states("cut"), states("uncut"));
    }

    #[test]
    fn a_search_goes_on_from_its_journal_and_never_reads_the_test_pictures() {
        let world = World::new(24);
        // Whoever reads them fails.
        for name in ["across/024.png", "slanted/025.png"] {
            fs::write(world.data().join("test").join(name), "not a picture").unwrap();
        }
        fs::create_dir(world.data().join("test/another")).unwrap();
        fs::set_permissions(
            world.data().join("test/down/024.png"),
            std::os::unix::fs::PermissionsExt::from_mode(0o000),
        )
        .unwrap();
        run(&mut world.train("none", &["--test", world.data().to_str().unwrap()])).explains(2, &["another"]);

        let search = |out: &str, by: &str, args: &[&str]| {
            let mut command = world.command("search", &["--epochs", "8", "--batch", "8", "--rate", "0.05"]);
            command.args(["--heads", "1,2", "--ranks", "8,16", "--scopes", "1,2", "--by", by]);
            command
                .args(["--validation", "0.25", "--out"])
                .arg(world.at(out))
                .args(args);
            command
        };
        let goal = ["--seconds", "1"];
        let whole = run(&mut search("both", "both", &goal)).json();
        let found = whole["found"].as_array().unwrap();
        assert_eq!(
            (&found[0]["by"], &found[1]["by"]),
            (&json!("halving"), &json!("reinforce"))
        );
        assert!(number(&whole["comparison"]["accuracy"]) > 0.25, "{whole}");
        for (found, by) in found.iter().zip(["halving", "reinforce"]) {
            assert_eq!(found["reached"], true);
            let out = world.at("both").join(by);
            let lines = |name: &str| fs::read_to_string(out.join(name)).unwrap().lines().count();
            let front = found["front"].as_array().unwrap().len();
            assert!(front > 0);
            assert_eq!((lines("front.md"), lines("front.csv")), (2 + front, 1 + front));
            assert!(
                fs::read_to_string(out.join("front.svg"))
                    .unwrap()
                    .contains("<svg")
            );
            // The adapter is the one that was found, trained in full.
            let config = fs::read(out.join("adapter/adapter_config.json")).unwrap();
            let config: Value = serde_json::from_slice(&config).unwrap();
            assert_eq!(config["labels"], json!(CLASSES));
            assert_eq!(config["rank"], found["best"]["rank"]);
            plan(&out.join("adapter"));
        }

        // Without epochs starts are compared.
        let mut command = world.command(
            "search",
            &[
                "--heads", "1", "--ranks", "8,16", "--scopes", "1", "--budget", "2",
            ],
        );
        command
            .args(["--validation", "0.25", "--seconds", "1", "--out"])
            .arg(world.at("starts"));
        let starts = run(&mut command).json();
        let trials = starts["found"][0]["trials"].as_array().unwrap();
        assert_eq!(trials.len(), 2, "{starts}");
        assert!(
            trials
                .iter()
                .all(|t| t["epochs"] == 0 && number(&t["accuracy"]) > 0.25),
            "{starts}"
        );
        plan(&world.at("starts/adapter"));

        // Latency, epochs and accuracy of each trial, and what was tried, but not how long it took.
        let course = |found: &Value| -> Vec<[Value; 4]> {
            let trials = found["trials"].as_array().unwrap();
            let of = |t: &Value| ["candidate", "epochs", "accuracy", "latency"].map(|k| t[k].clone());
            trials.iter().map(of).collect()
        };
        let journal = world.at("one/journal.jsonl");
        let trials = || fs::read_to_string(&journal).map_or(0, |text| text.lines().count().saturating_sub(1));
        interrupt(&mut search("one", "halving", &goal), "a trial", || trials() > 0);
        assert!(!world.has_adapter("one/adapter"));
        let kept = trials();
        let resumed = run(&mut search("one", "halving", &goal));
        let again = resumed.stderr.matches("from the journal").count();
        assert_eq!(again, kept, "{}", resumed.stderr);
        assert_eq!(course(&resumed.json()["found"][0]), course(&found[0]));
        assert!(world.has_adapter("one/adapter"));

        let other = run(&mut search("one", "halving", &["--accuracy", "0.9"]));
        other.explains(2, &["journal.jsonl", "goal"]);
        assert!(world.has_adapter("one/adapter"));
    }
}

#[test]
fn bad_pictures_are_named() {
    let world = World::new(6);
    let refused = |out: &str, command: &mut Command, parts: &[&str]| {
        run(command).explains(2, parts);
        assert!(!world.has_adapter(out));
    };
    // Other classes in the test part.
    let other = world.at("other");
    write(&other, ["across", "dots", "down", "slanted"], 0, 2);
    let other = other.to_str().unwrap();
    refused(
        "out",
        &mut world.train("out", &["--test", other]),
        &["checks", "dots", "--test"],
    );
    let same = world.data().join("train");
    let same = same.to_str().unwrap();
    refused(
        "out",
        &mut world.train("out", &["--test", same]),
        &["very pictures", "--test"],
    );

    // A picture that is none.
    fs::write(world.data().join("train/down/bad.png"), "not a picture").unwrap();
    refused(
        "out",
        &mut world.train("out", &[]),
        &["down/bad.png", "--skip-unreadable"],
    );
    let skipping: Output = run(&mut world.train("out", &["--skip-unreadable", "--epochs", "1"]));
    assert!(
        skipping.stderr.contains("down/bad.png")
            && skipping
                .stderr
                .contains("1 of 25 pictures cannot be read and are left out")
    );
    let skipping = skipping.json();
    assert_eq!(
        (&skipping["skipped"], &skipping["classes"]),
        (&json!(1), &json!(4))
    );

    // A class of which nothing is left.
    for i in 0..6 {
        fs::write(world.data().join(format!("train/checks/{i:03}.png")), "").unwrap();
    }
    refused(
        "other",
        &mut world.train("other", &["--skip-unreadable"]),
        &["none of the pictures of class checks", "remove the class"],
    );

    // No pictures at all, and files that are no data set.
    let cifar = |dir: &str, name: &str, bytes: &[u8], names: usize| {
        let dir = world.at(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
        let names: Vec<String> = (0..names).map(|i| format!("class {i}")).collect();
        fs::write(dir.join("fine_label_names.txt"), names.join("\n")).unwrap();
        dir
    };
    fs::create_dir(world.at("empty")).unwrap();
    let [table, text] = ["table.csv", "text.txt"].map(|name| world.at(name));
    for path in [&table, &text] {
        fs::write(path, "label,pixels").unwrap();
    }
    let too_high = [vec![12], vec![0; 3072]].concat();
    for (data, parts) in [
        (world.at("empty"), ["empty", "no class folder"]),
        (world.at("absent"), ["absent", "No such file"]),
        (table, ["table.csv", "no CIFAR file"]),
        (text, ["text.txt", "text and label"]),
        (
            cifar("names", "train.bin", &[0; 3074], 99),
            ["fine_label_names.txt", "99 names"],
        ),
        (
            cifar("label", "data_batch_1.bin", &too_high, 0),
            ["data_batch_1.bin", "label 12"],
        ),
        (
            cifar("short", "train.bin", &[0; 3000], 100),
            ["train.bin", "cut off"],
        ),
    ] {
        let data = data.to_str().unwrap();
        let mut command = veiltune();
        command.args(["train", "--json", "--data", data, "--out"]);
        command
            .arg(world.at("none"))
            .arg("--cache")
            .arg(world.at("cache"));
        refused("none", &mut command, &[&parts[..], &["--data"]].concat());
    }
}

#[test]
fn an_adapter_or_a_backbone_that_does_not_fit_is_named() {
    let world = World::new(4);
    run(&mut world.train("out", &["--epochs", "1"])).json();
    let evaluate = |adapter: &Path, args: &[&str]| {
        let mut command = world.command("evaluate", args);
        run(command.arg("--adapter").arg(adapter))
    };
    // The embedded one is for clothes.
    evaluate(&assets().join("adapter"), &[]).explains(2, &["10 classes", "have 4", "across", "--data"]);

    let config = world.at("out/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["base_model_name_or_path"], "veiltune/demo");
    value["base_model_sha256"] = "00".repeat(32).into();
    fs::write(&config, value.to_string()).unwrap();
    evaluate(&world.at("out"), &[]).explains(2, &["another backbone", "veiltune/demo", "--backbone"]);
    fs::write(&config, text).unwrap();

    // A checkpoint with a value that is none.
    let broken = world.at("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(assets().join("config.json"), broken.join("config.json")).unwrap();
    let mut bytes = fs::read(assets().join("backbone.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f]);
    fs::write(broken.join("backbone.safetensors"), bytes).unwrap();
    let broken = broken.to_str().unwrap();
    run(&mut world.train("none", &["--backbone", broken]))
        .explains(2, &["broken", "not finite", "--backbone"]);
    assert!(!world.has_adapter("none"));
    evaluate(&world.at("out"), &["--backbone", broken]).explains(2, &["broken", "not finite", "--backbone"]);
    let absent = world.at("absent");
    let absent = absent.to_str().unwrap();
    run(&mut world.train("none", &["--backbone", absent])).explains(2, &["absent", "--backbone"]);
    evaluate(Path::new(absent), &[]).explains(2, &["absent", "--adapter"]);
}

#[test]
fn classes_without_pictures_are_said_and_a_search_without_an_adapter_fails() {
    // Of one picture of a class none is left to validate on.
    let world = World::new(1);
    let trained = run(&mut world.train("few", &["--epochs", "0", "--validation", "0.1"]));
    assert!(
        trained.status.success() && trained.stderr.contains("left to validate on"),
        "{}",
        trained.stderr
    );
    let world = World::new(2);
    let mut command = world.command("search", &["--seconds", "1e-12", "--ranks", "8", "--scopes", "1"]);
    command
        .args(["--validation", "0.5", "--out"])
        .arg(world.at("search"));
    let found = run(&mut command);
    assert_eq!(found.status.code(), Some(1), "{}", found.stderr);
    let last = found.stderr.lines().last().unwrap();
    assert!(
        last.contains("no adapter") && last.contains("--seconds"),
        "{last}"
    );
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_done() {
    let world = World::new(2);
    fs::write(world.at("file"), "").unwrap();
    for (out, args, parts) in [
        ("file", &["--epochs", "1"][..], &["file is a file", "--out"][..]),
        ("file/below", &[], &["below", "--out"]),
        ("none", &["--validation", "1"], &["--validation", "below 1"]),
        ("none", &["--validation", "NaN"], &["--validation"]),
        (
            "none",
            &["--method", "mpcvit", "--epochs", "0"],
            &["--epochs 0", "at least 1"],
        ),
        ("none", &["--views", "0"], &["--views"]),
        ("none", &["--views", "100000000"], &["--views", "at most 1000"]),
        ("none", &["--pictures", "0"], &["--pictures", "at least 1"]),
        (
            "none",
            &["--method", "lora", "--rank", "97"],
            &["--rank 97", "width 96"],
        ),
        ("none", &["--patience", "0"], &["--patience"]),
        ("none", &["--crop-scale", "0"], &["--crop-scale", "at most 1"]),
        ("none", &["--decay", "NaN"], &["--decay"]),
        ("none", &["--dropout", "1"], &["--dropout", "below 1"]),
        ("none", &["--scope", "5"], &["scope", "--scope"]),
        ("none", &["--rank", "7"], &["rank", "--rank"]),
        (
            "none",
            &["--method", "last-layer", "--scope", "9"],
            &["--scope 9", "4 layers"],
        ),
    ] {
        let mut command = world.command("train", &["--heads", "2", "--out"]);
        run(command.arg(world.at(out)).args(args)).explains(2, parts);
        assert!(!world.at("cache").exists(), "{args:?}");
    }
    // A report of something else.
    fs::create_dir(world.at("other")).unwrap();
    fs::write(world.at("other/report.json"), "mine").unwrap();
    run(&mut world.train("other", &["--epochs", "0"])).explains(2, &["report.json", "--out"]);
    assert_eq!(fs::read(world.at("other/report.json")).unwrap(), b"mine");
    // One class alone.
    fs::create_dir(world.at("one")).unwrap();
    let across = world.data().join("train").join(CLASSES[0]);
    fs::rename(across, world.at("one").join(CLASSES[0])).unwrap();
    let mut one = veiltune();
    one.args(["train", "--data"]).arg(world.at("one"));
    run(one.arg("--out").arg(world.at("none"))).explains(2, &["one class", CLASSES[0], "at least two"]);

    for (args, parts) in [
        (&["--accuracy", "1.5"][..], &["--accuracy", "at most 1"][..]),
        (&["--seconds", "0"], &["--seconds", "positive"]),
        (
            &["--seconds", "1", "--validation", "0"],
            &["--validation", "above 0"],
        ),
        (
            &["--seconds", "1", "--ranks", "7", "--heads", "2"],
            &["search space", "--heads"],
        ),
        (
            &["--seconds", "1", "--ranks", "500"],
            &["search space", "96", "--ranks"],
        ),
        (&["--seconds", "1", "--gmacs", "0"], &["--gmacs"]),
    ] {
        let mut command = world.command("search", args);
        run(command.arg("--out").arg(world.at("none"))).explains(2, parts);
        assert!(
            !world.at("cache").exists() && !world.at("none").exists(),
            "{args:?}"
        );
    }
}
