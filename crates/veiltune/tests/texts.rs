//! Adapters for texts: trained, measured, planned and served as those for pictures are, and what does not fit is explained.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use common::{LIMIT, assets, pictures, run, veiltune, wait_for};
use serde_json::{Value, json};

/// A random encoder with a vocabulary of syllables, and at most twelve tokens.
fn checkpoint(name: &str) -> PathBuf {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nn/tests/vectors/language");
    vectors.join(name)
}

/// Texts of one to nine syllables, most of them of the class's own half of the vocabulary.
fn lines(from: usize, count: usize, pairs: bool) -> String {
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ (from as u64 + 1);
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    let mut text = String::new();
    for i in from..from + count {
        let class = i % 2;
        let mut some = |class: usize| {
            let mut syllables = Vec::new();
            for _ in 0..1 + next(9) {
                let half = if next(8) == 0 { 1 - class } else { class };
                let consonants = ["bdf", "lmn"][half].as_bytes();
                let syllable = [consonants[next(3)], b"aeiou"[next(5)]];
                syllables.push(String::from_utf8(syllable.to_vec()).unwrap());
            }
            syllables.join(" ")
        };
        let label = ["early", "late"][class];
        text += &match pairs {
            true => format!("{}\t{}\t{label}\n", some(0), some(class)),
            false => format!("{}\t{label}\n", some(class)),
        };
    }
    text
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(pairs: bool) -> World {
        let dir = tempfile::tempdir().unwrap();
        let template = match pairs {
            true => "{prompt} {text_a} {text_b} {mask}",
            false => "{prompt} {text} {mask}",
        };
        let task = json!({"name": "halves", "masked": template, "verbalizer": {"early": "ba", "late": "na"}});
        fs::write(dir.path().join("task.json"), task.to_string()).unwrap();
        fs::write(dir.path().join("train.tsv"), lines(0, 400, pairs)).unwrap();
        fs::write(dir.path().join("test.tsv"), lines(1000, 40, pairs)).unwrap();
        World { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command on `data`, with the encoder.
    fn command(&self, name: &str, data: &str, args: &[&str]) -> Command {
        let mut command = veiltune();
        command.args([name, "--json", "--threads", "2", "--data"]);
        command.arg(self.at(data)).arg("--cache").arg(self.at("cache"));
        command.arg("--task").arg(self.at("task.json"));
        command.arg("--backbone").arg(checkpoint("minilm")).args(args);
        command
    }

    /// Trains an adapter into `out`.
    fn train(&self, out: &str, args: &[&str]) -> Command {
        let mut command = self.command("train", "train.tsv", &["--batch", "8", "--rate", "0.05"]);
        command
            .args(["--heads", "2", "--rank", "8", "--tokens", "10", "--out"])
            .arg(self.at(out))
            .args(args);
        command
    }

    fn weights(&self, out: &str) -> Vec<u8> {
        fs::read(self.at(out).join("adapter_model.safetensors")).unwrap()
    }

    /// Texts without labels.
    fn texts(&self, columns: usize) -> PathBuf {
        let test = fs::read_to_string(self.at("test.tsv")).unwrap();
        let line = |l: &str| l.split('\t').take(columns).collect::<Vec<_>>().join("\t");
        let texts: Vec<String> = test.lines().take(7).map(line).collect();
        // Lines without text are passed over, but counted.
        let path = self.at("texts.txt");
        fs::write(&path, format!("\n{}\n \n", texts.join("\n"))).unwrap();
        path
    }
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is no number"))
}

/// `dealer` or `serve`, from when it listens.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(command: &mut Command) -> Server {
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let Some(address) = line.trim_end().strip_prefix("listening at ") else {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            panic!("{line}{stderr}");
        };
        Server {
            address: address.into(),
            child,
        }
    }

    fn end(mut self) {
        let status = wait_for("end of a server", LIMIT, || self.child.try_wait().unwrap());
        assert!(status.success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_adapter_for_texts_is_trained_measured_planned_and_served() {
    let world = World::new(false);
    let test = world.at("test.tsv");
    let mut command = world.train("out", &["--epochs", "8", "--scope", "2", "--test"]);
    let output = run(command.arg(&test));
    let cut = |l: &str| l.contains("texts in") && l.contains("more than 10 tokens and are cut");
    assert!(output.stderr.lines().any(cut), "{}", output.stderr);
    let trained = output.json();
    assert_eq!(
        (&trained["pictures"], &trained["views"]),
        (&json!(360), &json!(1))
    );
    assert!(number(&trained["test"]["accuracy"]) > 0.75, "{trained}");
    let config: Value =
        serde_json::from_slice(&fs::read(world.at("out/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        config["text"],
        json!({"tokens": 10, "pooling": "mean", "pairs": false})
    );
    assert_eq!(
        (&config["tokens"], &config["hidden_size"]),
        (&json!(11), &json!(32))
    );

    let measure = |arithmetic: &str| {
        let mut command = world.command("evaluate", "test.tsv", &["--arithmetic", arithmetic, "--adapter"]);
        run(command.arg(world.at("out"))).json()
    };
    let float = measure("float");
    assert_eq!(float["accuracy"], trained["test"]["accuracy"]);
    for arithmetic in ["served", "fixed"] {
        let other = measure(arithmetic);
        assert_eq!(other["beyond_range"], 0);
        let apart = number(&other["accuracy"]) - number(&float["accuracy"]);
        assert!(apart.abs() < 1.5 / 40.0, "{arithmetic}: {other} {float}");
    }
    // The labels of a file will do for its task, and where it has not all of them those of the adapter.
    let lines = fs::read_to_string(&test).unwrap();
    let late: Vec<&str> = lines.lines().filter(|l| l.ends_with("late")).collect();
    fs::write(world.at("late.tsv"), late.join("\n")).unwrap();
    let mut bare = veiltune();
    bare.args(["evaluate", "--json", "--adapter"])
        .arg(world.at("out"));
    bare.arg("--cache").arg(world.at("cache"));
    bare.arg("--backbone").arg(checkpoint("minilm")).arg("--data");
    let found = run(bare.arg(world.at("late.tsv"))).json();
    assert_eq!(found["pictures"], late.len());
    // F1 where the task reports it, of what was just found and what the accuracy says of the others.
    let template = "{prompt} {text} {mask}";
    let task = json!({"name": "halves", "masked": template, "verbalizer": {"early": "ba", "late": "na"}, "metric": {"f1": "late"}});
    fs::write(world.at("f1.json"), task.to_string()).unwrap();
    let mut command = veiltune();
    command
        .args(["evaluate", "--json", "--adapter"])
        .arg(world.at("out"));
    command
        .arg("--cache")
        .arg(world.at("cache"))
        .arg("--task")
        .arg(world.at("f1.json"));
    command
        .arg("--backbone")
        .arg(checkpoint("minilm"))
        .arg("--data")
        .arg(&test);
    let scored = run(&mut command).json();
    let (all, there) = (lines.lines().count() as f64, late.len() as f64);
    let hits = number(&found["accuracy"]) * there;
    let wrong = all - there - (number(&float["accuracy"]) * all - hits);
    let f1 = 2.0 * hits / (hits + wrong + there);
    assert!((number(&scored["f1"]) - f1).abs() < 1e-9, "{scored} {f1}");
    assert_eq!(
        (&scored["accuracy"], &float["f1"]),
        (&float["accuracy"], &Value::Null)
    );

    let planned = |images: &str| {
        let mut plan = veiltune();
        plan.args(["plan", "--json", "--images", images, "--adapter"]);
        run(plan.arg(world.at("out"))).json()
    };
    let one = planned("1");
    for count in ["rounds", "online_bytes", "dealer_bytes"] {
        assert_eq!(one[count], trained[count], "{count}");
    }

    // Beside plain float, text by text; what it costs does not depend on their lengths.
    let texts = world.texts(1);
    let mut demo = veiltune();
    demo.args(["demo", "--json", "--adapter"]).arg(world.at("out"));
    demo.arg("--backbone").arg(checkpoint("minilm"));
    let demo = run(demo.arg("--text").arg(&texts)).json();
    assert_eq!((&demo["images"], &demo["agree"]), (&json!(7), &json!(7)));
    assert!(number(&demo["max_logit_error"]) < 0.02, "{demo}");

    // Three machines.
    let keys = world.at("keys");
    assert!(
        run(veiltune().args(["keys", "--out"]).arg(&keys))
            .status
            .success()
    );
    let server = |name: &str, role: &str| {
        let mut command = veiltune();
        command.args([name, "--listen", "127.0.0.1:0", "--sessions", "1", "--keys"]);
        command.arg(keys.join(role));
        command
    };
    let dealer = Server::start(
        server("dealer", "dealer")
            .arg("--adapter-config")
            .arg(world.at("out")),
    );
    let mut serve = server("serve", "provider");
    serve.args(["--dealer", &dealer.address, "--adapter"]);
    let provider = Server::start(serve.arg(world.at("out")));
    let mut classify = veiltune();
    classify.args(["classify", "--json", "--provider", &provider.address]);
    classify.args(["--dealer", &dealer.address, "--keys"]);
    classify.arg(keys.join("client")).arg("--text").arg(&texts);
    classify.arg("--backbone").arg(checkpoint("minilm"));
    let answer = run(classify.arg("--adapter-config").arg(world.at("out"))).json();
    dealer.end();
    provider.end();
    let all = planned("7");
    for count in ["rounds", "online_bytes", "setup_bytes"] {
        assert_eq!(answer[count], all[count], "{count}");
    }
    let (got, plain) = (
        answer["results"].as_array().unwrap(),
        demo["results"].as_array().unwrap(),
    );
    assert_eq!((got.len(), &got[0]["image"]), (7, &json!("line 2")));
    for (got, plain) in got.iter().zip(plain) {
        assert_eq!(got["label"], plain["plain_label"]);
    }
    let long = |l: &&str| l.split(' ').count() > 8;
    let long = fs::read_to_string(&texts).unwrap().lines().filter(long).count();
    assert_eq!(answer["cut"], long);
}

#[test]
fn pairs_a_head_and_a_search_need_nothing_else() {
    let world = World::new(true);
    let mut head = world.train(
        "head",
        &["--method", "head", "--epochs", "20", "--pooling", "class"],
    );
    run(&mut head).json();
    let config: Value =
        serde_json::from_slice(&fs::read(world.at("head/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        config["text"],
        json!({"tokens": 10, "pooling": "class", "pairs": true})
    );
    let mut demo = veiltune();
    demo.args(["demo", "--json", "--adapter"]).arg(world.at("head"));
    demo.arg("--backbone").arg(checkpoint("minilm"));
    let demo = run(demo.arg("--text").arg(world.texts(2))).json();
    assert_eq!(demo["agree"], 7);
    let mut classify = world.command("evaluate", "test.tsv", &["--adapter"]);
    run(classify.arg(world.at("head"))).json();

    let mut search = world.command(
        "search",
        "train.tsv",
        &["--seconds", "1", "--tokens", "12", "--epochs", "2"],
    );
    search.args([
        "--heads", "1", "--ranks", "8", "--scopes", "1,2", "--norms", "batch",
    ]);
    let found = run(search.arg("--out").arg(world.at("search"))).json();
    assert_eq!(found["found"][0]["reached"], true);
    let mut evaluate = world.command("evaluate", "test.tsv", &["--arithmetic", "fixed", "--adapter"]);
    run(evaluate.arg(world.at("search/adapter"))).json();
}

#[cfg(unix)]
#[test]
fn training_goes_on_from_where_it_was_interrupted() {
    let world = World::new(false);
    let train = |out: &str| world.train(out, &["--epochs", "40", "--norm", "batch"]);
    let mut running = common::start(&mut train("out"));
    wait_for("an epoch", LIMIT, || {
        assert!(running.child.try_wait().unwrap().is_none(), "it ended");
        world.at("out/training.json").exists().then_some(())
    });
    let pid = running.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    running
        .end(LIMIT)
        .explains(130, &["interrupted", "the same command goes on"]);
    assert!(!world.at("out/adapter_config.json").exists());
    run(&mut train("out")).json();
    run(&mut train("whole")).json();
    assert!(world.weights("out") == world.weights("whole"));
}

#[test]
fn what_does_not_fit_is_explained() {
    let world = World::new(false);
    run(&mut world.train("out", &["--epochs", "1"])).json();
    let refused = |args: &[&str], parts: &[&str]| {
        run(&mut world.train("none", args)).explains(2, parts);
        assert!(!world.at("none/adapter_config.json").exists());
    };
    refused(&["--method", "lora"], &["adapter or head", "vision transformer"]);
    refused(&["--views", "2"], &["one view"]);
    let train = world.at("train.tsv");
    refused(&["--test", train.to_str().unwrap()], &["very texts of --data"]);

    // Labels, texts and tasks.
    let file = |name: &str, text: &str| {
        fs::write(world.at(name), text).unwrap();
        let mut command = world.command("train", name, &["--tokens", "10", "--out"]);
        command.arg(world.at("none"));
        command
    };
    run(&mut file("label.tsv", "ba be\tearly\nba\tnever\n"))
        .explains(2, &["label.tsv", "line 2", "never", "--data"]);
    run(&mut file("empty.tsv", "ba\tearly\n\tlate\n")).explains(2, &["empty.tsv", "line 2", "empty text"]);
    run(&mut file("pair.tsv", "ba\tbe\tearly\n")).explains(2, &["pair.tsv", "3 instead of 2 columns"]);
    let mut command = world.command("train", "train.tsv", &["--tokens", "13", "--out"]);
    run(command.arg(world.at("none"))).explains(2, &["minilm", "3 to 12", "--backbone"]);

    // Pictures where texts belong, and the reverse.
    let with = |backbone: &Path| {
        let mut command = veiltune();
        command.args(["train", "--data"]).arg(&train).arg("--task");
        command.arg(world.at("task.json")).arg("--backbone").arg(backbone);
        command.args(["--cache", "none", "--out"]).arg(world.at("none"));
        command
    };
    let vision = world.at("vit");
    fs::create_dir(&vision).unwrap();
    fs::write(vision.join("config.json"), r#"{"model_type": "vit"}"#).unwrap();
    run(&mut with(&vision)).explains(2, &["vit", "reads no texts", "--backbone"]);
    run(&mut with(&checkpoint("llama"))).explains(2, &["causal", "--backbone"]);
    let mut command = veiltune();
    command.args(["train", "--data"]).arg(&train).arg("--backbone");
    command
        .arg(checkpoint("minilm"))
        .args(["--cache", "none", "--out"]);
    run(command.arg(world.at("none"))).explains(2, &["minilm", "3 to 12", "--backbone"]);
    for (name, adapter, parts) in [
        ("train", ["--out", "none"], ["language model", "texts to --data"]),
        (
            "evaluate",
            ["--adapter", "out"],
            ["the adapter is for texts", "--task"],
        ),
    ] {
        let mut command = veiltune();
        command.args([name, adapter[0]]).arg(world.at(adapter[1]));
        command.arg("--data").arg(&vision).arg("--backbone");
        run(command.arg(checkpoint("minilm"))).explains(2, &parts);
    }
    refused(&["--skip-unreadable"], &["--skip-unreadable is for pictures"]);
    let mut command = veiltune();
    command
        .args(["train", "--tokens", "10", "--data"])
        .arg(&vision)
        .arg("--out");
    run(command.arg(world.at("none"))).explains(2, &["--tokens and --pooling are for texts"]);
    let mut command = world.command("evaluate", "test.tsv", &["--adapter"]);
    command.arg(assets().join("adapter"));
    run(&mut command).explains(2, &["language model", "--backbone"]);

    let classify = |adapter: &Path, args: &[&str]| {
        let mut command = veiltune();
        command.args([
            "classify",
            "--provider",
            "none:1",
            "--dealer",
            "none:2",
            "--keys",
            "none",
        ]);
        command.arg("--adapter-config").arg(adapter).args(args);
        command
    };
    let minilm = checkpoint("minilm");
    let minilm = ["--backbone", minilm.to_str().unwrap()];
    let mut command = classify(&world.at("out"), &minilm);
    run(command.args(pictures(&["04_trouser.png"]))).explains(2, &["for texts", "--text"]);
    let texts = world.texts(1);
    let texts = ["--text", texts.to_str().unwrap()];
    run(&mut classify(&world.at("out"), &texts)).explains(2, &["text encoder", "--backbone"]);
    run(&mut classify(&assets().join("adapter"), &texts)).explains(2, &["for pictures", "PNG"]);
    // Another encoder of the same shape, and another form.
    let other = world.at("other");
    fs::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(checkpoint("minilm").join(name), other.join(name)).unwrap();
    }
    let tokenizer = fs::read_to_string(other.join("tokenizer.json")).unwrap();
    fs::write(
        other.join("tokenizer.json"),
        tokenizer.replace("\"nu\"", "\"xu\""),
    )
    .unwrap();
    let mut command = veiltune();
    command.args(["evaluate", "--cache", "none", "--task"]);
    command.arg(world.at("task.json")).arg("--data").arg(&train);
    command
        .arg("--adapter")
        .arg(world.at("out"))
        .arg("--backbone")
        .arg(&other);
    run(&mut command).explains(2, &["another backbone", "minilm", "--backbone"]);
    let config = world.at("out/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"pooling\": \"mean\""), "{text}");
    fs::write(
        &config,
        text.replace("\"pooling\": \"mean\"", "\"pooling\": \"class\""),
    )
    .unwrap();
    let mut command = world.command("evaluate", "test.tsv", &["--adapter"]);
    run(command.arg(world.at("out"))).explains(2, &["11 tokens", "10 tokens", "--backbone"]);
}
