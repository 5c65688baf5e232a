//! The commands for three machines, on one: they agree with plain float, keep to the plan, and explain what differs.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::time::Duration;

use common::{LIMIT, Output, assets, pictures, run, veiltune, wait_for};
use serde_json::Value;
use veiltune_nn::load::Classifier;

/// More than any failure may take.
const PROMPTLY: Duration = Duration::from_secs(30);

const PICTURES: [&str; 3] = ["04_trouser.png", "08_dress.png", "17_bag.png"];

/// A directory with keys for all three.
fn keys() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let made = run(veiltune().args(["keys", "--out"]).arg(dir.path()));
    assert!(made.status.success(), "{}", made.stderr);
    for (role, command) in [
        ("client", "classify"),
        ("provider", "serve"),
        ("dealer", "dealer"),
    ] {
        let line = made
            .stdout
            .lines()
            .find(|l| l.contains(&format!("{role}:")))
            .unwrap();
        assert!(line.contains(&format!("`veiltune {command}`")), "{line}");
        #[cfg(unix)]
        for (name, mode) in [("", 0o700), (&*format!("{role}.key"), 0o600)] {
            let found = fs::metadata(dir.path().join(role).join(name))
                .unwrap()
                .permissions();
            assert_eq!(
                std::os::unix::fs::PermissionsExt::mode(&found) & 0o777,
                mode,
                "{role} {name}"
            );
        }
    }
    dir
}

/// `dealer` or `serve`, from when it listens.
struct Server {
    child: Child,
    stdout: BufReader<ChildStdout>,
    address: String,
}

impl Server {
    fn start(command: &str, keys: &Path, role: &str, args: &[&str]) -> Server {
        let mut child = veiltune()
            .args([command, "--listen", "127.0.0.1:0", "--keys"])
            .arg(keys.join(role))
            .args(args)
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let Some(address) = line.trim_end().strip_prefix("listening at ") else {
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            panic!("{line}{stderr}");
        };
        Server {
            address: address.into(),
            child,
            stdout,
        }
    }

    fn ended(&mut self) -> ExitStatus {
        wait_for("end of a server", PROMPTLY, || self.child.try_wait().unwrap())
    }

    fn end(mut self) -> Output {
        let status = self.ended();
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).unwrap();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        Output {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn adapter_config() -> PathBuf {
    assets().join("adapter/adapter_config.json")
}

/// Dealer and provider; `options` go to both.
fn servers(keys: &Path, options: &[&str]) -> [Server; 2] {
    servers_of(keys, &assets().join("adapter"), options, &[])
}

fn servers_of(keys: &Path, adapter: &Path, options: &[&str], provider: &[&str]) -> [Server; 2] {
    let adapter = adapter.to_str().unwrap();
    let dealer = Server::start(
        "dealer",
        keys,
        "dealer",
        &[options, &["--adapter-config", adapter]].concat(),
    );
    let own = ["--adapter", adapter, "--dealer", &*dealer.address];
    let provider = Server::start("serve", keys, "provider", &[options, provider, &own].concat());
    [dealer, provider]
}

fn classification_with(
    config: &Path,
    keys: &Path,
    [dealer, provider]: &[Server; 2],
    names: &[&str],
    options: &[&str],
) -> Command {
    let mut command = veiltune();
    command
        .args(["classify", "--json", "--provider", &*provider.address])
        .args(["--dealer", &*dealer.address, "--keys"])
        .arg(keys.join("client"))
        .arg("--adapter-config")
        .arg(config)
        .args(options)
        .args(pictures(names));
    command
}

fn classification(keys: &Path, servers: &[Server; 2], names: &[&str], options: &[&str]) -> Command {
    classification_with(&adapter_config(), keys, servers, names, options)
}

fn classify(keys: &Path, servers: &[Server; 2], names: &[&str], options: &[&str]) -> Output {
    run(&mut classification(keys, servers, names, options))
}

#[test]
fn three_commands_give_the_labels_of_plain_float_at_the_planned_cost() {
    let keys = keys();
    let demo = run(veiltune()
        .args(["demo", "--json", "--images"])
        .args(pictures(&PICTURES)))
    .json();
    // Two passes, of two images and of one; over the slower network the other comparison.
    for (network, options) in [
        ("none", &["--comparison", "fss", "--batch", "2"][..]),
        ("lan", &["--comparison", "masked-bits"]),
    ] {
        let everywhere = ["--network", network];
        let servers = servers(keys.path(), &[&["--sessions", "1"][..], &everywhere].concat());
        let options = &[options, &everywhere].concat();
        let answer = classify(keys.path(), &servers, &PICTURES, options).json();
        for server in servers {
            let end = server.end();
            assert!(end.status.success(), "{}", end.stderr);
            assert!(
                end.stdout.contains("for 3 images") || end.stdout.contains("served 3 images"),
                "{}",
                end.stdout
            );
        }
        assert_eq!(answer["comparison"], options[1]);
        let plan = run(veiltune()
            .args(["plan", "--json", "--images", "3", "--adapter-config"])
            .arg(adapter_config())
            .args(options))
        .json();
        for count in ["rounds", "online_bytes", "setup_bytes"] {
            assert_eq!(answer[count], plan[count], "{count}");
        }
        assert_eq!(answer["dealer_bytes"], plan["dealer_bytes"][0]);
        let (got, plain) = (
            answer["results"].as_array().unwrap(),
            demo["results"].as_array().unwrap(),
        );
        assert_eq!(got.len(), PICTURES.len());
        for (got, plain) in got.iter().zip(plain) {
            assert_eq!(got["image"], plain["image"]);
            assert_eq!(got["label"], plain["plain_label"]);
            let difference = got["confidence"].as_f64().unwrap() - plain["confidence"].as_f64().unwrap();
            assert!(difference.abs() < 0.02, "{got} {plain}");
        }
    }
}

/// A client that has so much to do that there is time to disturb it, once it has met the provider.
fn busy_client(keys: &Path, servers: &[Server; 2]) -> Child {
    let pictures = ["08_dress.png"; 600];
    let mut command = classification(keys, servers, &pictures, &["--batch", "1"]);
    let mut child = command.env("RUST_LOG", "info").spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("agreed with Provider") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it met nobody");
    }
    child.stderr = Some(stderr.into_inner());
    child
}

#[cfg(unix)]
fn kill(signal: &str, child: &Child) {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
}

#[test]
#[cfg(unix)]
fn a_service_outlives_its_clients_and_ends_when_it_is_interrupted() {
    let keys = keys();
    let spent = keys.path().join("spent.json");
    let servers = servers_of(
        keys.path(),
        &assets().join("adapter"),
        &["--max-images", "600", "--parallel", "1"],
        &["--budget", "610", "--budget-file", spent.to_str().unwrap()],
    );
    let labels = |answer: Value| -> Vec<Value> {
        answer["results"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r["label"].clone())
            .collect()
    };
    let first = labels(classify(keys.path(), &servers, &PICTURES, &[]).json());

    // One that vanishes; while it is there, another is told to wait.
    let mut client = busy_client(keys.path(), &servers);
    let refused = classify(keys.path(), &servers, &PICTURES, &[]);
    refused.explains(1, &["busy", "try again later"]);
    client.kill().unwrap();
    client.wait().unwrap();
    // One that has another adapter in mind, and one that wants too much.
    let other = keys.path().join("adapter_config.json");
    let text = fs::read_to_string(adapter_config()).unwrap();
    fs::write(&other, text.replace("28.009011268615723", "29.0")).unwrap();
    let mismatch = wait_until_free(|| {
        run(&mut classification_with(
            &other,
            keys.path(),
            &servers,
            &PICTURES,
            &[],
        ))
    });
    mismatch.explains(2, &["same", "adapter_config.json"]);
    let many = classify(keys.path(), &servers, &["17_bag.png"; 601], &[]);
    many.explains(1, &["at most 600 images a session"]);

    let bad = keys.path().join("text.png");
    fs::write(&bad, "no image").unwrap();
    let again = wait_until_free(|| {
        let mut command = classification(keys.path(), &servers, &PICTURES, &["--skip-unreadable"]);
        run(command.arg(&bad))
    });
    assert!(again.stderr.contains("text.png"), "{}", again.stderr);
    let again = again.json();
    assert_eq!((&again["images"], &again["skipped"]), (&3.into(), &1.into()));
    assert_eq!(labels(again), first);
    // 3 + 600 + 3 of 610 are spent.
    let poor = wait_until_free(|| classify(keys.path(), &servers, &["17_bag.png"; 5], &[]));
    poor.explains(1, &["4 more images"]);

    let [mut dealer, mut provider] = servers;
    kill("-INT", &provider.child);
    assert_eq!(provider.ended().code(), Some(130));
    let spent: Value = serde_json::from_slice(&fs::read(&spent).unwrap()).unwrap();
    assert_eq!(spent["images"], 606);
    kill("-TERM", &dealer.child);
    assert_eq!(dealer.ended().code(), Some(130));
    let [dealer, provider] = [dealer, provider].map(Server::end);
    assert!(
        provider.stdout.matches("served 3 images").count() == 2,
        "{}",
        provider.stdout
    );
    // The client, or the dealer that missed it sooner.
    for complaint in ["is gone", "4 more images"] {
        assert!(provider.stderr.contains(complaint), "{}", provider.stderr);
    }
    for complaint in ["program", "at most 600"] {
        assert!(dealer.stderr.contains(complaint), "{}", dealer.stderr);
    }
}

/// Once nobody else is being served.
fn wait_until_free(attempt: impl Fn() -> Output) -> Output {
    wait_for("free service", LIMIT, || {
        let output = attempt();
        (!output.stderr.contains("busy")).then_some(output)
    })
}

#[test]
#[cfg(unix)]
fn an_interrupted_provider_tells_its_client() {
    let keys = keys();
    let mut servers = servers(keys.path(), &[]);
    let client = busy_client(keys.path(), &servers);
    kill("-INT", &servers[1].child);
    assert_eq!(servers[1].ended().code(), Some(130));
    let end = client.wait_with_output().unwrap();
    let stderr = String::from_utf8(end.stderr).unwrap();
    assert_eq!(end.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("provider aborted the run: it was interrupted"),
        "{stderr}"
    );
}

#[test]
fn material_from_files_serves_one_session_without_a_dealer() {
    let keys = keys();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("material");
    let dealt = run(veiltune().args(["deal", "--images", "2", "--out"]).arg(&out));
    assert!(dealt.status.success(), "{}", dealt.stderr);
    let material = ["--material", out.to_str().unwrap()];
    let provider = Server::start("serve", keys.path(), "provider", &material);
    let classify = |names: &[&str]| {
        run(veiltune()
            .args(["classify", "--json", "--provider", &*provider.address, "--keys"])
            .arg(keys.path().join("client"))
            .args(material)
            .args(pictures(names)))
    };
    classify(&PICTURES).explains(2, &["for 2 images, not 3"]);
    let answer = classify(&PICTURES[..2]).json();
    assert_eq!(answer["results"][0]["label"], "trouser");
    let end = provider.end();
    assert!(
        end.status.success() && end.stdout.contains("served 2 images"),
        "{}",
        end.stderr
    );
    run(veiltune()
        .args(["classify", "--provider", "127.0.0.1:9", "--keys"])
        .arg(keys.path().join("client"))
        .args(material)
        .args(pictures(&PICTURES[..2])))
    .explains(2, &["exactly once"]);
}

#[test]
fn parties_with_material_from_different_sources_are_told_and_consume_none() {
    let keys = keys();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("material");
    let dealt = run(veiltune().args(["deal", "--images", "1", "--out"]).arg(&out));
    assert!(dealt.status.success(), "{}", dealt.stderr);
    let files = || {
        let mut names: Vec<_> = fs::read_dir(&out)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let (before, file) = (files(), ["--material", out.to_str().unwrap()]);
    let dealer = Server::start("dealer", keys.path(), "dealer", &[]);
    let streamed = ["--dealer", &*dealer.address];
    for (serve, classify) in [(file, streamed), (streamed, file)] {
        let provider = Server::start(
            "serve",
            keys.path(),
            "provider",
            &[&serve[..], &["--sessions", "1"]].concat(),
        );
        run(veiltune()
            .args(["classify", "--json", "--provider", &*provider.address, "--keys"])
            .arg(keys.path().join("client"))
            .args(classify)
            .args(pictures(&PICTURES[..1])))
        .explains(
            2,
            &["from a dealer", "from files", "both --dealer or both --material"],
        );
        let end = provider.end();
        assert_eq!(end.status.code(), Some(2), "{}", end.stderr);
        assert!(end.stderr.contains("both --material"), "{}", end.stderr);
        assert_eq!(files(), before);
    }
}

#[test]
fn what_is_wrong_is_named_before_anybody_is_called() {
    let keys = keys();
    run(veiltune().args(["keys", "--out"]).arg(keys.path()))
        .explains(2, &["client exists", "never overwritten"]);
    let classify = |keys: &Path, config: &Path, image: &Path| {
        run(veiltune()
            .args([
                "classify",
                "--provider",
                "127.0.0.1:9",
                "--dealer",
                "127.0.0.1:9",
                "--keys",
            ])
            .arg(keys)
            .arg("--adapter-config")
            .arg(config)
            .arg(image))
    };
    let (client, config, image) = (
        keys.path().join("client"),
        adapter_config(),
        &pictures(&["17_bag.png"])[0],
    );
    classify(&keys.path().join("dealer"), &config, image).explains(2, &["client.pem", "client folder"]);
    classify(&client, &client.join("client.pem"), image).explains(2, &["client.pem", "--adapter-config"]);
    classify(&client, &config, &client.join("client.pem")).explains(2, &["client.pem", "PNG or JPEG"]);
    for address in ["127.0.0.1", "127.0.0.1:70000", ":7001", "::1:7001"] {
        let output = run(veiltune()
            .args(["classify", "--provider", address, "--keys"])
            .arg(&client)
            .arg(image));
        assert_eq!(output.status.code(), Some(2), "{address}");
        for part in ["--provider", "HOST:PORT"] {
            assert!(output.stderr.contains(part), "{address}: {}", output.stderr);
        }
    }
}

#[test]
fn weights_that_fixed_point_cannot_hold_are_not_served() {
    let keys = keys();
    let dir = tempfile::tempdir().unwrap();
    let mut classifier = Classifier::open(&assets().join("adapter")).unwrap();
    classifier.weights.get_mut("head.weight").unwrap().values[10] = 1e30;
    classifier.write(dir.path()).unwrap();
    let mut serve = veiltune();
    serve.args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--dealer",
        "127.0.0.1:9",
        "--keys",
    ]);
    serve
        .arg(keys.path().join("provider"))
        .arg("--adapter")
        .arg(dir.path());
    run(&mut serve).explains(2, &["head.weight", "entry 10", "--adapter"]);
}

#[test]
fn the_plan_is_what_a_run_counts_and_says_which_comparison_is_sooner() {
    let config = adapter_config();
    let plan = |args: &[&str]| {
        run(veiltune()
            .args(["plan", "--json", "--images", "2", "--adapter-config"])
            .arg(&config)
            .args(args))
        .json()
    };
    let auto = plan(&["--network", "wan"]);
    let estimates = auto["estimates"].as_array().unwrap();
    let on =
        |network: &str| -> Vec<&Value> { estimates.iter().filter(|e| e["network"] == network).collect() };
    for network in ["none", "lan", "wan"] {
        let both = on(network);
        assert_eq!(both.len(), 2);
        assert_eq!(both.iter().filter(|e| e["cheapest"] == true).count(), 1);
        let sum = |e: &Value| {
            ["wire_seconds", "dealer_seconds"]
                .map(|s| e[s].as_f64().unwrap())
                .iter()
                .sum::<f64>()
        };
        let sooner = both.iter().min_by(|a, b| sum(a).total_cmp(&sum(b))).unwrap();
        assert!(network == "none" || sooner["cheapest"] == true, "{both:?}");
    }
    let cheapest = on("wan").into_iter().find(|e| e["cheapest"] == true).unwrap();
    assert_eq!(auto["comparison"], cheapest["comparison"]);

    let demo = run(veiltune()
        .args(["demo", "--json", "--network", "wan", "--images"])
        .args(pictures(&PICTURES[..2])))
    .json();
    for count in [
        "comparison",
        "rounds",
        "online_bytes",
        "setup_bytes",
        "dealer_bytes",
    ] {
        assert_eq!(auto[count], demo[count], "{count}");
    }
    let operations = auto["operations"].as_object().unwrap();
    let rounds: u64 = operations.values().map(|o| o["rounds"].as_u64().unwrap()).sum();
    assert_eq!(auto["rounds"], rounds);

    let layers = auto["layers"].as_array().unwrap();
    assert!(layers.len() > 1);
    let sum = |count: &str| -> u64 { layers.iter().map(|l| l[count][1].as_u64().unwrap()).sum() };
    for count in ["online_bytes", "dealer_bytes", "macs"] {
        assert_eq!(auto[count][1], sum(count), "{count}");
    }
    for bytes in auto["memory_bytes"].as_array().unwrap() {
        assert!(bytes.as_u64().unwrap() > 1 << 16, "{bytes}");
    }

    // With masked bits the dealer sends less, and the parties talk more often.
    let [fss, bits] = ["fss", "masked-bits"].map(|c| plan(&["--comparison", c]));
    assert!(bits["rounds"].as_u64() > fss["rounds"].as_u64());
    assert!(bits["dealer_bytes"][0].as_u64() < fss["dealer_bytes"][0].as_u64());

    let table = run(veiltune().args(["plan", "--network", "100:2000"]));
    assert!(table.status.success(), "{}", table.stderr);
    for part in ["client to provider", "masked-bits", "100:2000"] {
        assert!(table.stdout.contains(part), "{}", table.stdout);
    }
    run(veiltune().args(["plan", "--gmacs", "0"])).explains(2, &["--gmacs"]);
}
