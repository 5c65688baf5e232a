//! Prompt tuning as a user runs it.

use std::process::{Command, Output, Stdio};

fn veiltune(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_veiltune"))
        .args(args)
        .output()
        .expect("the program runs")
}

fn assets(name: &str) -> String {
    format!("{}/../../assets/demo-text/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_demonstration_tunes_on_five_processes() {
    let output = veiltune(&["demo", "tune", "--budget", "20", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["evaluations"], 20);
    // A logit is off by a few thousandths; an answer may turn where two labels are that close.
    let agree = report["agree"].as_u64().expect("a number");
    assert!(
        agree + 3 >= report["agree_of"].as_u64().expect("a number"),
        "{report}"
    );
    for accuracy in ["accuracy_before", "accuracy_after"] {
        assert!(report[accuracy].as_f64().expect("a number") > 0.25, "{report}");
    }
}

#[test]
fn tuning_in_the_clear_in_both_arithmetics_and_going_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let (model, task, data) = (assets(""), assets("task.json"), assets("shots.tsv"));
    let start = |arithmetic: &str, budget: &str, out: &str, more: &[&str]| {
        let out = dir.path().join(out);
        let mut args = vec![
            "tune",
            "--model",
            &model,
            "--task",
            &task,
            "--data",
            &data,
            "--interpreter",
            arithmetic,
            "--output",
            out.to_str().expect("a name"),
            "--tokens",
            "24",
            "--prompt-tokens",
            "4",
            "--dimension",
            "20",
            "--shots",
            "4",
            "--population",
            "6",
            "--validate-every",
            "6",
            "--budget",
            budget,
            "--json",
        ];
        args.extend(more);
        veiltune(&args)
    };
    let run = |arithmetic: &str, budget: &str, out: &str, more: &[&str]| {
        let output = start(arithmetic, budget, out, more);
        let out = dir.path().join(out);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let curve = std::fs::read_to_string(out.join("curve.svg")).expect("a curve");
        assert!(curve.contains("<svg") && out.join("adapter_config.json").exists());
        report
    };
    let float = run("float", "18", "float", &[]);
    let fixed = run("fixed", "18", "fixed", &[]);
    assert_eq!(float["evaluations"], 18);
    // The same trajectory, but for the rounding of fixed point.
    let validation = |r: &serde_json::Value| r["best_validation"].as_f64().expect("a number");
    assert!(
        (validation(&float) - validation(&fixed)).abs() < 0.26,
        "{float} {fixed}"
    );
    // In two steps as in one.
    run("float", "6", "steps", &[]);
    let steps = run("float", "18", "steps", &[]);
    assert_eq!(validation(&steps), validation(&float));
    let prompt = |name: &str| {
        std::fs::read(dir.path().join(name).join("adapter_model.safetensors")).expect("a prompt")
    };
    assert_eq!(prompt("steps"), prompt("float"));
    // But not with other texts, or from another prompt.
    for more in [["--validation-shots", "3"], ["--initial-text", "other words"]] {
        let output = start("float", "24", "steps", &more);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && error.contains("another folder"),
            "{error}"
        );
    }
    assert_eq!(prompt("steps"), prompt("float"));

    // A prompt that stands for itself; and what a linear classifier makes of the same texts.
    let test = assets("test.tsv");
    let more = ["--mode", "concatenate", "--test", &test, "--test-limit", "40"];
    let report = run("float", "6", "concatenated", &more);
    for member in ["initial_test", "tuned_test", "linear_test"] {
        let accuracy = report[member].as_f64().expect("a number");
        assert!((0.0..=1.0).contains(&accuracy), "{member}: {report}");
    }
    // Three topics.
    assert!(
        report["linear_test"].as_f64().expect("a number") > 0.4,
        "{report}"
    );
    let config = std::fs::read_to_string(dir.path().join("concatenated/adapter_config.json"));
    assert!(config.expect("a configuration").contains("\"concatenate\""));
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("out");
    let out = out.to_str().expect("a name");
    let refused = |args: &[&str], words: &[&str]| {
        let output = veiltune(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?}");
        assert!(!error.contains("panicked"), "{error}");
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error}");
        }
    };
    let (task, shots, model) = (assets("task.json"), assets("shots.tsv"), assets(""));
    let tune = ["tune", "--output", out, "--data", &shots];
    let with = |more: &[&str]| -> Vec<String> { tune.iter().chain(more).map(|s| (*s).to_owned()).collect() };
    let check = |more: &[&str], words: &[&str]| {
        let args = with(more);
        refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
    };
    check(&["--task", "nothing"], &["nothing", "sst-2"]);
    check(&["--task", &task], &["--servers", "--model"]);
    check(&["--task", &task, "--model", &model, "--shots", "60"], &["60"]);
    check(
        &[
            "--task",
            &task,
            "--model",
            &model,
            "--tokens",
            "6",
            "--prompt-tokens",
            "5",
        ],
        &["6"],
    );
    check(
        &[
            "--task",
            &task,
            "--servers",
            "127.0.0.1:1",
            "--assistant",
            "127.0.0.1:2",
        ],
        &["--servers", "two"],
    );
    let pairs = dir.path().join("bad.json");
    std::fs::write(
        &pairs,
        r#"{"name": "x", "masked": "{prompt} {text}", "verbalizer": {"a": "food"}}"#,
    )
    .expect("a file");
    check(
        &["--task", pairs.to_str().expect("a name"), "--model", &model],
        &["bad.json"],
    );
    // A word that the model does not know, in a plan too.
    let unknown = dir.path().join("unknown.json");
    let text = std::fs::read_to_string(&task).expect("a task");
    let mut text: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let words = text["verbalizer"].as_object_mut().expect("words");
    *words.values_mut().next().expect("a word") = "漢".into();
    std::fs::write(&unknown, text.to_string()).expect("a file");
    let unknown = unknown.to_str().expect("a name");
    let short = ["--prompt-tokens", "4", "--shots", "4"];
    let unknown = [&["--task", unknown][..], &short].concat();
    check(
        &[&unknown[..], &["--model", &model]].concat(),
        &["漢", "vocabulary"],
    );
    let planned = ["plan", "tune", "--data", &shots, "--model", &model];
    refused(&[&planned[..], &unknown].concat(), &["漢", "vocabulary"]);
    let few = ["--task", &task, "--population", "1"];
    refused(&[&planned[..], &few, &short].concat(), &["two prompts"]);
    // Texts to measure on are read first, and nobody's artefact is overwritten.
    let one = ["--task", &task, "--model", &model, "--budget", "20"];
    let one = [&one[..], &short].concat();
    check(&[&one[..], &["--test", "nothing.tsv"]].concat(), &["nothing.tsv"]);
    check(&[&one[..], &["--margin", "nan"]].concat(), &["--margin"]);
    std::fs::create_dir_all(out).expect("a folder");
    let foreign = std::path::Path::new(out).join("adapter_config.json");
    std::fs::write(&foreign, "{}").expect("a file");
    check(&one, &["adapter_config.json", "overwritten"]);
    std::fs::remove_file(&foreign).expect("there");
    let lock = std::fs::File::create(std::path::Path::new(out).join("lock")).expect("a file");
    lock.lock().expect("nobody else has it");
    check(&one, &["another `veiltune tune`"]);
    drop(lock);
    refused(&["classify", "--keys", out, "--text", &shots], &["--prompt"]);
    refused(
        &["classify", "--keys", out, "--provider", "127.0.0.1:1", &shots],
        &["--dealer"],
    );
}

#[test]
fn tuning_goes_on_when_nobody_reads_what_it_says() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = dir.path().join("prompt");
    let mut child = Command::new(env!("CARGO_BIN_EXE_veiltune"))
        .args(["tune", "--model", &assets(""), "--task", &assets("task.json")])
        .args([
            "--data",
            &assets("shots.tsv"),
            "--tokens",
            "24",
            "--prompt-tokens",
            "4",
        ])
        .args([
            "--dimension",
            "10",
            "--shots",
            "1",
            "--population",
            "4",
            "--budget",
            "8",
        ])
        .arg("--output")
        .arg(&out)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait().expect("it ends").success());
    assert!(out.join("adapter_model.safetensors").exists());
}
