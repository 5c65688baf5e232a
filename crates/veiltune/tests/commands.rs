//! The commands for three machines, on one: they agree with plain float, keep to the plan, and explain what differs.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::time::Duration;

use common::{LIMIT, Output, assets, pictures, run, start, veiltune, wait_for};
use serde_json::Value;

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

/// Dealer and provider for the pictures.
fn servers(keys: &Path, options: &[&str]) -> [Server; 2] {
    let config = adapter_config();
    let images = PICTURES.len().to_string();
    let common = [&["--images", &*images], options].concat();
    let dealer = [&common[..], &["--adapter-config", config.to_str().unwrap()]].concat();
    let dealer = Server::start("dealer", keys, "dealer", &dealer);
    let adapter = assets().join("adapter");
    let provider = [
        "--adapter",
        adapter.to_str().unwrap(),
        "--dealer",
        &*dealer.address,
    ];
    let provider = Server::start("serve", keys, "provider", &[&common[..], &provider].concat());
    [dealer, provider]
}

fn classification(keys: &Path, servers: [&Server; 2], names: &[&str], options: &[&str]) -> Command {
    let [dealer, provider] = servers.map(|s| &*s.address);
    let mut command = veiltune();
    command
        .args([
            "classify",
            "--json",
            "--provider",
            provider,
            "--dealer",
            dealer,
            "--keys",
        ])
        .arg(keys.join("client"))
        .arg("--adapter-config")
        .arg(adapter_config())
        .args(options)
        .args(pictures(names));
    command
}

fn classify(keys: &Path, [dealer, provider]: &[Server; 2], names: &[&str], options: &[&str]) -> Output {
    run(&mut classification(keys, [dealer, provider], names, options))
}

#[test]
fn three_commands_give_the_labels_of_plain_float_at_the_planned_cost() {
    let keys = keys();
    let demo = run(veiltune()
        .args(["demo", "--json", "--images"])
        .args(pictures(&PICTURES)))
    .json();
    // Two passes, of two images and of one; over the slower network the other comparison.
    for options in [
        &["--batch", "2", "--comparison", "fss"][..],
        &["--network", "lan", "--comparison", "masked-bits"],
    ] {
        let servers = servers(keys.path(), options);
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
        assert_eq!(answer["comparison"], options[3]);
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

#[test]
fn a_job_that_the_others_do_not_have_is_explained_everywhere() {
    let keys = keys();
    for (names, options, parts) in [
        (
            &PICTURES[..2],
            &["--comparison", "fss"][..],
            ["same number of images", "--batch"],
        ),
        (
            &PICTURES,
            &["--comparison", "masked-bits"],
            ["same number of images", "--comparison"],
        ),
        (
            &PICTURES,
            &["--comparison", "fss", "--network", "1000:1"],
            ["configured", "network none"],
        ),
    ] {
        let servers = servers(keys.path(), &["--comparison", "fss"]);
        let refused = classify(keys.path(), &servers, names, options);
        assert_ne!(refused.status.code(), Some(0));
        for part in parts {
            assert!(
                refused.stderr.contains(part),
                "{part:?} is not in {}",
                refused.stderr
            );
        }
        let [dealer, _provider] = servers;
        assert!(!dealer.end().status.success());
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
}

#[test]
#[cfg(unix)]
fn an_interrupted_command_ends_and_its_peer_hears_of_it() {
    let keys = keys();
    for signal in ["-INT", "-TERM"] {
        // A second each way: a minute.
        let options = ["--network", "100:1000000"];
        let [dealer, mut provider] = servers(keys.path(), &options);
        let client = start(&mut classification(
            keys.path(),
            [&dealer, &provider],
            &PICTURES,
            &options,
        ));
        std::thread::sleep(Duration::from_secs(3));
        let status = Command::new("kill")
            .args([signal, &provider.child.id().to_string()])
            .status();
        assert!(status.unwrap().success());
        assert_eq!(provider.ended().code(), Some(130));
        client.end(LIMIT).explains(1, &["provider is gone"]);
    }
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
