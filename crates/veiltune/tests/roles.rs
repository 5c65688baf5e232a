//! Single roles against peers that are strangers, silent, wrong, or for another run.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{LIMIT, assets, pictures, veiltune, wait_for};
use serde_json::{Value, json};
use veiltune_hub::AdapterConfig;
use veiltune_nn::{Method, load::Classifier};
use veiltune_wire::pki::{Authority, Credentials};
use veiltune_wire::tcp::{self, TcpLink};
use veiltune_wire::{Identity, Link, Options};

/// The set-up of a run, of which each test starts the roles it needs.
struct World {
    dir: tempfile::TempDir,
    adapter: AdapterConfig<Method>,
}

impl World {
    fn new() -> World {
        let world = World {
            dir: tempfile::tempdir().unwrap(),
            adapter: Classifier::open(&assets().join("adapter")).unwrap().config,
        };
        world.certify(&["client", "provider", "dealer"]);
        world
    }

    /// Certificates of a new authority.
    fn certify(&self, roles: &[&str]) {
        let authority = Authority::new().unwrap();
        for role in roles {
            authority
                .issue(&Identity::new(role).unwrap())
                .unwrap()
                .save(self.dir.path().join(role))
                .unwrap();
        }
    }

    fn config(&self, role: &str, own: Value) -> Value {
        json!({
            "credentials": self.dir.path().join(role),
            "network": "none",
            "wait": 60.0,
            "adapter": self.adapter,
            "own": own,
        })
    }

    fn dealer(&self) -> Player {
        self.play("dealer", self.dealer_config())
    }

    fn dealer_config(&self) -> Value {
        self.config("dealer", json!({"listen": "127.0.0.1:0", "limits": limits()}))
    }

    fn provider_config(&self, dealer: &str) -> Value {
        let own = json!({
            "listen": "127.0.0.1:0",
            "weights": null,
            "backbone": null,
            "material": {"dealer": dealer},
            "limits": limits(),
            "budget": null,
        });
        self.config("provider", own)
    }

    fn client_config(&self, provider: &str, dealer: &str) -> Value {
        let own = json!({
            "pictures": pictures(&["04_trouser.png"]),
            "batch": 1,
            "comparison": "fss",
            "backbone": null,
            "provider": provider,
            "material": {"dealer": dealer},
        });
        self.config("client", own)
    }

    /// A link to a role that is at work.
    fn call_as(&self, role: &str, peer: &str, address: &str) -> TcpLink {
        let [role, peer] = [role, peer].map(|name| Identity::new(name).unwrap());
        let credentials = Credentials::load(self.dir.path().join(role.as_str()), &role).unwrap();
        tcp::connect(address, &credentials, &peer, &Options::default()).unwrap()
    }

    fn play(&self, role: &str, config: Value) -> Player {
        let path: PathBuf = self.dir.path().join(format!("{role}.json"));
        std::fs::write(&path, config.to_string()).unwrap();
        let mut child = veiltune()
            .args(["role", role, "--config"])
            .arg(path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, events) = mpsc::channel();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let _ = tell.send(serde_json::from_str(&line.unwrap()).unwrap());
            }
        });
        let log = Arc::new(Mutex::new(String::new()));
        let heard = log.clone();
        let listening = thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                *heard.lock().unwrap() += &(line.unwrap() + "\n");
            }
        });
        Player {
            child,
            events,
            log,
            listening,
        }
    }
}

/// One session.
fn limits() -> Value {
    json!({"sessions": 1, "parallel": 1, "images": 1000, "batch": 8})
}

/// A client with so much to do that there is time to disturb it.
fn long(mut client: Value) -> Value {
    client["own"]["pictures"] = json!(pictures(&["04_trouser.png"; 600]));
    client
}

struct Player {
    child: Child,
    events: Receiver<Value>,
    log: Arc<Mutex<String>>,
    listening: JoinHandle<()>,
}

struct Ending {
    status: ExitStatus,
    events: Vec<Value>,
    log: String,
}

impl Player {
    fn address(&self) -> String {
        let event = self.events.recv_timeout(LIMIT).unwrap();
        assert_eq!(event["event"], "listening");
        event["address"].as_str().unwrap().to_owned()
    }

    /// Waits until the role has said this on standard error.
    fn says(&self, what: &str) {
        wait_for(what, LIMIT, || {
            self.log.lock().unwrap().contains(what).then_some(())
        });
    }

    fn end(mut self, limit: Duration) -> Ending {
        let status = wait_for("end of a role", limit, || self.child.try_wait().unwrap());
        Ending {
            status,
            events: self.events.iter().collect(),
            log: {
                self.listening.join().unwrap();
                std::mem::take(&mut self.log.lock().unwrap())
            },
        }
    }
}

impl Ending {
    /// The role failed, and its message holds each of `parts`.
    fn explains(&self, parts: &[&str]) {
        let failed = self.events.last().filter(|e| e["event"] == "failed");
        let message = failed.unwrap_or_else(|| panic!("{:?} {}", self.events, self.log))["message"]
            .as_str()
            .unwrap();
        assert!(self.status.code().is_some_and(|code| code > 0), "{}", self.status);
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
}

/// More than any of these failures may take.
const PROMPTLY: Duration = Duration::from_secs(30);

#[test]
fn strangers_are_sent_away_and_the_run_goes_on() {
    let world = World::new();
    let dealer = world.dealer();
    let dealer_at = dealer.address();
    let provider = world.play("provider", world.provider_config(&dealer_at));
    let provider_at = provider.address();

    // One that says nothing, one that talks something else, one that hangs up; at both listeners.
    let silent = [&dealer_at, &provider_at].map(|address| TcpStream::connect(address).unwrap());
    for address in [&dealer_at, &provider_at] {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        TcpStream::connect(address).unwrap();
    }
    for player in [&dealer, &provider] {
        player.says("does not speak TLS");
    }
    let client = world.play("client", world.client_config(&provider_at, &dealer_at));
    for player in [client, provider, dealer] {
        let end = player.end(LIMIT);
        assert!(end.status.success(), "{:?} {}", end.events, end.log);
    }
    drop(silent);
}

#[test]
fn a_certificate_of_another_authority_is_not_trusted() {
    let world = World::new();
    let dealer = world.dealer();
    let address = dealer.address();
    // The files of the dealer are read by now; the others' are replaced.
    world.certify(&["client"]);
    world
        .play("client", world.client_config("127.0.0.1:9", &address))
        .end(PROMPTLY)
        .explains(&["certificate", "one authority"]);
    dealer.says("sent a caller away");
    end_with_input(dealer);
}

#[test]
fn a_trusted_certificate_of_another_role_is_refused() {
    let world = World::new();
    let dealer = world.dealer();
    let address = dealer.address();
    // The client is told that the provider is where the dealer is.
    world
        .play("client", world.client_config(&address, &address))
        .end(PROMPTLY)
        .explains(&["expected provider", "dealer"]);
    end_with_input(dealer);
}

/// What a test does to a role's configuration.
type Change = fn(&mut Value);

#[test]
fn roles_of_different_runs_tell_what_differs() {
    let changes: [(Change, &str); 4] = [
        (|c| c["network"] = "lan".into(), "configured"),
        (
            |c| c["adapter"]["final_norm"]["sigma"][1] = 99.0.into(),
            "program",
        ),
        (|c| c["adapter"]["labels"][0] = "another".into(), "configured"),
        (
            |c| c["adapter"]["base_model_name_or_path"] = "another".into(),
            "configured",
        ),
    ];
    for (change, complaint) in changes {
        let world = World::new();
        let dealer = world.dealer();
        let mut config = world.client_config("127.0.0.1:9", &dealer.address());
        change(&mut config);
        let client = world.play("client", config);
        client.end(PROMPTLY).explains(&["dealer", complaint]);
        dealer.end(PROMPTLY).explains(&["client", complaint]);
    }
}

#[test]
fn more_than_is_served_is_refused() {
    for (change, complaint) in [
        (("images", 2), "at most 2 images a session"),
        (("batch", 2), "at most 2 images a pass"),
    ] {
        let world = World::new();
        let mut config = world.dealer_config();
        config["own"]["limits"][change.0] = change.1.into();
        let dealer = world.play("dealer", config);
        let mut config = world.client_config("127.0.0.1:9", &dealer.address());
        config["own"]["pictures"] = json!(pictures(&["04_trouser.png"; 3]));
        config["own"]["batch"] = 3.into();
        let client = world.play("client", config);
        client.end(PROMPTLY).explains(&["dealer", complaint]);
        dealer.end(PROMPTLY).explains(&[complaint]);
    }
}

/// The time that the backbone takes tells of the lengths of texts: nobody is called before it has run.
#[test]
fn a_client_that_has_nothing_prepared_calls_nobody() {
    let world = World::new();
    let bystander = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = bystander.local_addr().unwrap().to_string();
    let damaged = world.dir.path().join("damaged.png");
    std::fs::write(&damaged, "no picture").unwrap();
    let mut config = world.client_config(&address, &address);
    config["own"]["pictures"] = json!([damaged]);
    world
        .play("client", config)
        .end(PROMPTLY)
        .explains(&["damaged.png"]);
    bystander.set_nonblocking(true).unwrap();
    let called = bystander.accept();
    assert!(
        called.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock),
        "somebody was called"
    );
}

#[test]
fn a_caller_that_only_looks_uses_up_no_session() {
    let world = World::new();
    let dealer = world.dealer();
    let dealer_at = dealer.address();
    let provider = world.play("provider", world.provider_config(&dealer_at));
    let provider_at = provider.address();
    for (role, address) in [("dealer", &dealer_at), ("provider", &provider_at)] {
        let link = world.call_as("client", role, address);
        link.close().unwrap();
    }
    let client = world.play("client", world.client_config(&provider_at, &dealer_at));
    for player in [client, provider, dealer] {
        let end = player.end(LIMIT);
        assert!(end.status.success(), "{:?} {}", end.events, end.log);
    }
}

#[test]
fn parties_of_different_dealers_never_begin() {
    let world = World::new();
    let dealers = [(); 2].map(|()| world.dealer());
    let [one, other] = [0, 1].map(|i: usize| dealers[i].address());
    let provider = world.play("provider", world.provider_config(&one));
    let client = world.play("client", world.client_config(&provider.address(), &other));
    let complaint = "no client waits";
    client.end(PROMPTLY).explains(&["provider", complaint]);
    provider.end(PROMPTLY).explains(&["dealer", complaint]);
    let [one, other] = dealers;
    // One has sent the provider away, the other's client has gone.
    one.says(complaint);
    end_with_input(one);
    other.end(PROMPTLY).explains(&["client"]);
}

/// Of a failure the others learn who has to act; the path is for this side alone.
#[test]
fn no_role_is_told_of_files_at_another() {
    let world = World::new();
    let dealer = world.dealer();
    let dealer_at = dealer.address();
    let file = world.dir.path().join("provider.material");
    std::fs::write(&file, "damaged").unwrap();
    let mut config = world.provider_config(&dealer_at);
    config["own"]["material"] = json!({"file": file});
    let provider = world.play("provider", config);
    let other = world.dir.path().join("client.material");
    std::fs::write(&other, "damaged").unwrap();
    let mut config = world.client_config(&provider.address(), &dealer_at);
    config["own"]["material"] = json!({"file": other});
    let ends = [world.play("client", config), provider].map(|player| player.end(PROMPTLY));
    let message = |end: &Ending| {
        let failed = end.events.last().unwrap();
        assert_eq!(failed["event"], "failed");
        failed["message"].as_str().unwrap().to_owned()
    };
    // Whoever was first to look tells the other, each names its own file at most.
    let [client, provider] = [message(&ends[0]), message(&ends[1])];
    assert!(!client.contains("provider.material") && !provider.contains("client.material"));
    assert!(client.contains("client.material") || provider.contains("provider.material"));
    for told in [client, provider] {
        assert!(
            told.contains(".material") || told.contains("a file of its own cannot be used"),
            "{told}"
        );
    }
    end_with_input(dealer);
}

/// Callers who say nothing are not without end.
#[test]
fn callers_that_ask_for_nothing_are_counted() {
    let world = World::new();
    let dealer = world.dealer();
    let address = dealer.address();
    let call = || world.call_as("provider", "dealer", &address);
    let silent = [(); 64].map(|()| call());
    let another = call();
    let e = another.recv(&mut [0; 16]).unwrap_err().to_string();
    assert!(e.contains("busy") && e.contains("try again later"), "{e}");
    drop(silent);
    dealer.says("sent provider away: busy");
    end_with_input(dealer);
}

#[test]
fn another_adapter_than_the_configured_one_is_refused_by_the_provider() {
    let mut world = World::new();
    let Method::Owc(method) = &mut world.adapter.method else {
        panic!("the embedded adapter is one")
    };
    method.final_norm.sigma.1 *= 2.0;
    let provider = world.play("provider", world.provider_config("127.0.0.1:9"));
    provider
        .end(PROMPTLY)
        .explains(&["adapter", "public configuration"]);
}

#[test]
fn a_configuration_that_cannot_be_used_is_named() {
    let world = World::new();
    for config in [json!(null), json!({}), json!({"session": [1]})] {
        world
            .play("dealer", config)
            .end(PROMPTLY)
            .explains(&["dealer.json"]);
    }
    let mut config = world.client_config("127.0.0.1:9", "127.0.0.1:9");
    config["own"]["pictures"] = json!([]);
    world
        .play("client", config)
        .end(PROMPTLY)
        .explains(&["no images"]);
    let mut config = world.dealer_config();
    config["credentials"] = json!(world.dir.path().join("nobody"));
    world.play("dealer", config).end(PROMPTLY).explains(&["nobody"]);
}

#[test]
fn a_party_that_vanishes_is_missed() {
    let world = World::new();
    let dealer = world.dealer();
    let dealer_at = dealer.address();
    let provider = world.play("provider", world.provider_config(&dealer_at));
    let mut client = world.play(
        "client",
        long(world.client_config(&provider.address(), &dealer_at)),
    );
    while client.events.recv_timeout(LIMIT).unwrap()["event"] != "classified" {}
    client.child.kill().unwrap();
    client.child.wait().unwrap();
    provider.end(PROMPTLY).explains(&["client is gone"]);
    // The dealer had done its work.
    assert!(dealer.end(PROMPTLY).status.success());
}

#[test]
fn a_dealer_that_vanishes_is_missed_by_both_parties() {
    let world = World::new();
    let mut dealer = world.dealer();
    let dealer_at = dealer.address();
    let provider = world.play("provider", world.provider_config(&dealer_at));
    let client = world.play(
        "client",
        long(world.client_config(&provider.address(), &dealer_at)),
    );
    let event = dealer.events.recv_timeout(LIMIT).unwrap();
    assert_eq!((&event["event"], &event["done"]), (&"progress".into(), &1.into()));
    dealer.child.kill().unwrap();
    dealer.child.wait().unwrap();
    for party in [client, provider] {
        party.end(PROMPTLY).explains(&["dealer"]);
    }
}

/// A role ends when its standard input does.
fn end_with_input(mut player: Player) -> Ending {
    drop(player.child.stdin.take());
    let end = player.end(PROMPTLY);
    assert_eq!(end.status.code(), Some(1));
    end
}
