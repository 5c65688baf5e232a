//! Whole runs of the five roles, each on a thread with links over TLS, against the same program in the clear.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use veiltune_engine::{Comparison, Fixed, Plain};
use veiltune_nn::language::{Attention, LanguageCheckpoint};
use veiltune_tune::{Evaluate, Example, Prompt, Settings, Slot, Split, Task};
use veiltune_wire::Network;
use veiltune_wire::pki::Authority;

use super::commands::public;
use super::evaluate::texts;
use super::evaluate::{Clear, InTheClear, loaded};
use super::ground::{Ground, initial};
use super::model::{self, Calibration, Ready};
use super::owner::{self, Addresses, Encoded, Remote};
use super::program::{Texts, Tuning, table_rows};
use super::servers::{Role, Service, Station, serve, share};
use super::tune::new_run;

macro_rules! checkpoint {
    ($name:literal) => {
        LanguageCheckpoint::from_bytes(
            include_bytes!(concat!(
                "../../../nn/tests/vectors/language/",
                $name,
                "/config.json"
            )),
            include_bytes!(concat!(
                "../../../nn/tests/vectors/language/",
                $name,
                "/tokenizer.json"
            )),
            include_bytes!(concat!(
                "../../../nn/tests/vectors/language/",
                $name,
                "/model.safetensors"
            )),
        )
        .expect("a checkpoint")
    };
}

const WAIT: Duration = Duration::from_secs(20);

/// Ends the servers, also if a test fails.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new().unwrap();
        for role in Role::ALL {
            let keys = dir.path().join(role.name());
            std::fs::create_dir(&keys).unwrap();
            authority.issue(&role.identity()).unwrap().save(&keys).unwrap();
        }
        Place { dir }
    }

    fn station(&self, role: Role) -> Station {
        Station::new(
            role,
            &self.dir.path().join(role.name()),
            "none".parse::<Network>().unwrap(),
            WAIT,
        )
        .unwrap()
    }

    /// Runs both servers and the assistant while `work` goes on.
    fn with_servers<T>(&self, work: impl FnOnce(&Addresses) -> T) -> T {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Stop(stop.clone());
        std::thread::scope(|scope| {
            let start = |role: Role, assistant: Option<SocketAddr>, peer: Option<SocketAddr>| {
                let (tell, heard) = mpsc::channel();
                let station = self.station(role);
                let dir = self.dir.path().join(format!("{}-store", role.name()));
                let service = Service {
                    listen: "127.0.0.1:0".into(),
                    assistant: assistant.map(|a| a.to_string()),
                    peer: peer.map(|a| a.to_string()),
                    store: (dir.clone(), dir.with_extension("key")),
                    runs: None,
                    memory: 1 << 32,
                    stop: stop.clone(),
                };
                scope.spawn(move || {
                    serve(&station, &service, &|address| tell.send(address).unwrap()).unwrap()
                });
                heard.recv_timeout(WAIT).unwrap()
            };
            let assistant = start(Role::Assistant, None, None);
            let first = start(Role::Server0, Some(assistant), None);
            let second = start(Role::Server1, Some(assistant), Some(first));
            let _stopping = stopping;
            work(&Addresses {
                servers: [first.to_string(), second.to_string()],
                assistant: assistant.to_string(),
            })
        })
    }
}

fn ready(checkpoint: &LanguageCheckpoint, attention: Attention) -> Ready {
    let how = Calibration {
        texts: &[],
        tokens: 12,
        margin: 2.0,
    };
    model::ready(checkpoint, attention, &how).unwrap()
}

/// A word of the model's own that is one token.
fn words(checkpoint: &LanguageCheckpoint, count: usize) -> Vec<String> {
    (5..checkpoint.tokenizer.len() as u32)
        .filter_map(|id| checkpoint.tokenizer.word(id))
        .filter_map(|word| {
            let word = word.trim_start_matches(['Ġ', '▁']).to_owned();
            let plain = word.len() > 1 && word.chars().all(|c| c.is_ascii_lowercase());
            let one = checkpoint.tokenizer.encode(&format!(" {word}")).unwrap().len() == 1;
            (plain && one).then_some(word)
        })
        .take(count)
        .collect()
}

fn run(checkpoint: &LanguageCheckpoint, attention: Attention) {
    let ready = ready(checkpoint, attention);
    let words = words(checkpoint, 4);
    let [a, b, c, d] = &words[..] else {
        panic!("the tokenizer has {words:?}");
    };
    let file = format!(
        r#"{{"name": "t", "masked": "{{prompt}} {{text}} {{mask}} {d}", "causal": "{{prompt}} {{text}} {d} {{mask}}",
            "verbalizer": {{"0": "{a}", "1": "{b}"}}}}"#
    );
    let task = Task::parse("t", file.as_bytes()).unwrap();
    let example = |text: String, label| Example {
        text_a: text,
        text_b: None,
        label,
    };
    let examples = [
        example(format!("{c} {d}"), 0),
        example(c.clone(), 1),
        example(format!("{d} {c} {a}"), 1),
    ];
    let examples: Vec<&Example> = examples.iter().collect();
    // Either way of joining a prompt, each in some of the families.
    let slot = match ready.config.family.causal() {
        true => Slot::Concatenate(2),
        false => Slot::Add(initial(&checkpoint.tokenizer, &task, Some(c), 2).unwrap()),
    };
    let ground = Ground {
        config: &ready.config,
        words: &checkpoint.tokenizer,
        task: &task,
        slot,
        tokens: 12,
        bucket: 4,
    };
    let rows = ground.rows(&examples).unwrap();
    let shape = ground.shape(&rows, 2, 2, 2);
    let labels = ground.labels().unwrap();
    let size = 2 * ready.config.hidden_size;
    let prompts: Vec<Prompt> = (0..2)
        .map(|k| {
            Prompt(
                (0..size)
                    .map(|i| ((i * 7 + k * 5) % 11) as f32 / 20.0 - 0.25)
                    .collect(),
            )
        })
        .collect();

    let texts = texts(&ready, &rows, &labels).unwrap();
    let program = ready.program(&shape);
    let expected = in_the_clear::<Plain>(program, &ready, &texts, &prompts);
    let close = |got: &[Vec<f32>; 2]| {
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got.len(), expected.len());
            for (a, b) in got.iter().zip(expected) {
                assert!((a - b).abs() < 0.02, "{a} for {b} of {expected:?}");
            }
        }
    };
    close(&in_the_clear::<Fixed>(program, &ready, &texts, &prompts));

    let place = Place::new();
    let public = public("tiny".into(), &ready, &checkpoint.tokenizer).unwrap();
    place.with_servers(|_| ());
    let got = place.with_servers(|addresses| {
        let all = [
            (Role::Server0, addresses.servers[0].clone()),
            (Role::Server1, addresses.servers[1].clone()),
            (Role::Assistant, addresses.assistant.clone()),
        ];
        let owner = place.station(Role::ModelOwner);
        share(&owner, &public, &ready.weights, &ready.table, &all, &mut |_| ()).unwrap();
        let station = place.station(Role::DataOwner);
        let models = owner::models(&station, addresses).unwrap();
        assert_eq!(models.len(), 1);
        let model = owner::model(&station, addresses, &models[0].fingerprint).unwrap();
        assert!(model == public);
        go(
            &station, addresses, &public, &shape, &rows.keep, &rows.ids, &labels, &prompts,
        )
    });
    // After a restart the shares are still there.
    let again = place.with_servers(|addresses| {
        let station = place.station(Role::DataOwner);
        go(
            &station, addresses, &public, &shape, &rows.keep, &rows.ids, &labels, &prompts,
        )
    });
    close(&got);
    close(&again);
    assert!(!leaks(place.dir.path(), &ready));
}

fn in_the_clear<B: InTheClear>(
    program: Tuning,
    ready: &Ready,
    texts: &Texts,
    prompts: &[Prompt],
) -> [Vec<f32>; 2] {
    let mut clear = Clear::new(program, &loaded::<B>(ready).unwrap(), texts).unwrap();
    [Split::Train, Split::Validation].map(|split| clear.logits(split, prompts).unwrap())
}

#[test]
fn the_initial_text_is_the_users_or_the_tasks_or_names_the_words() {
    let checkpoint = checkpoint!("bert");
    let (words, known) = (&checkpoint.tokenizer, words(&checkpoint, 3));
    let task = |more: &str| {
        let file = format!(
            r#"{{"name": "t", "masked": "{{prompt}} {{text}} {{mask}}", "verbalizer": {{"0": "{}", "1": "{}"}}{more}}}"#,
            known[0], known[1]
        );
        Task::parse("t", file.as_bytes()).unwrap()
    };
    let (usual, own) = (task(""), task(&format!(r#", "initial": "{}""#, known[2])));
    let first = |task: &Task, text: Option<&str>| initial(words, task, text, 3).unwrap();
    let of = |word: &str| vec![words.encode(word).unwrap()[0]; 3];
    assert_eq!(first(&own, None), of(&known[2]));
    assert_eq!(first(&own, Some(&known[1])), of(&known[1]));
    assert_ne!(first(&usual, None), of(&known[2]));
}

/// What fixed point has no room for is the worst prompt, and the one beside it is what it would be alone.
#[test]
fn a_prompt_out_of_range_counts_as_the_worst() {
    let checkpoint = checkpoint!("bert");
    let ready = ready(&checkpoint, Attention::Softmax);
    let words = words(&checkpoint, 2);
    let file = format!(
        r#"{{"name": "t", "masked": "{{prompt}} {{text}} {{mask}}", "causal": "{{prompt}} {{text}} {{mask}}",
            "verbalizer": {{"0": "{}", "1": "{}"}}}}"#,
        words[0], words[1]
    );
    let task = Task::parse("t", file.as_bytes()).unwrap();
    let ground = Ground {
        config: &ready.config,
        words: &checkpoint.tokenizer,
        task: &task,
        slot: Slot::Concatenate(1),
        tokens: 12,
        bucket: 4,
    };
    let example = Example {
        text_a: words[1].clone(),
        text_b: None,
        label: 0,
    };
    let rows = ground.rows(&[&example]).unwrap();
    let shape = ground.shape(&rows, 1, 2, 2);
    let texts = texts(&ready, &rows, &ground.labels().unwrap()).unwrap();
    let program = ready.program(&shape);
    let mut clear = Clear::new(program, &loaded::<Fixed>(&ready).unwrap(), &texts).unwrap();
    let prompt = |value: f32| Prompt(vec![value; ready.config.hidden_size]);
    let mut logits = |prompts: &[Prompt]| clear.logits(Split::Train, prompts).unwrap();
    let alone = logits(&[prompt(0.25)]);
    let both = logits(&[prompt(1e6), prompt(0.25)]);
    assert!(both[..2].iter().all(|l| l.is_nan()), "{both:?}");
    for (a, b) in alone.iter().zip(&both[2..]) {
        assert!((a - b).abs() < 1e-3, "{a} alone, {b} beside");
    }
}

#[allow(clippy::too_many_arguments)]
fn go(
    station: &Station,
    addresses: &Addresses,
    public: &super::store::PublicModel,
    shape: &super::program::Shape,
    keep: &[f32],
    ids: &[u32],
    labels: &[u32],
    prompts: &[Prompt],
) -> [Vec<f32>; 2] {
    let run = new_run(public, shape.clone(), Comparison::Fss).unwrap();
    let texts = Encoded {
        ids: ids.iter().chain(labels).copied().collect(),
        keep: keep.to_vec(),
    };
    let mut remote = Remote::begin(station, addresses, &run, table_rows(&public.config), &texts).unwrap();
    let got = [Split::Train, Split::Validation].map(|split| remote.logits_of(split, prompts));
    remote.end().unwrap();
    got
}

impl Remote {
    fn logits_of(&mut self, split: Split, prompts: &[Prompt]) -> Vec<f32> {
        Evaluate::logits(self, split, prompts).unwrap()
    }
}

/// Whether a parameter lies about in what the servers keep.
fn leaks(dir: &Path, ready: &Ready) -> bool {
    let array = ready.weights.values().find(|a| a.values.len() > 64).unwrap();
    let words = veiltune_ring::codec::encode(array.values[..8].iter().map(|v| f64::from(*v)), 16).unwrap();
    let plain: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if std::fs::read(&path)
                .unwrap()
                .windows(plain.len())
                .any(|w| w == plain)
            {
                return true;
            }
        }
    }
    false
}

#[test]
fn bert_on_servers_is_bert_in_the_clear() {
    run(&checkpoint!("bert"), Attention::Softmax);
}

#[test]
fn albert_with_random_features() {
    let rfa = Attention::Rfa {
        features: 32,
        seed: 1,
    };
    run(&checkpoint!("albert"), rfa);
}

#[test]
fn llama_without_a_head_of_its_own() {
    run(&checkpoint!("llama"), Attention::Softmax);
}

#[test]
fn llama_with_a_table_of_its_own_for_logits() {
    run(&checkpoint!("llama-untied"), Attention::Softmax);
}

/// A data owner that vanishes, or asks for what cannot be, ends its own run only.
#[test]
fn servers_outlive_a_data_owner_that_vanishes() {
    let checkpoint = checkpoint!("bert");
    let ready = ready(&checkpoint, Attention::Softmax);
    let place = Place::new();
    let public = public("tiny".into(), &ready, &checkpoint.tokenizer).unwrap();
    let shape = super::program::Shape {
        tokens: 8,
        answer: 6,
        start: 1,
        prompt: 2,
        mode: super::program::Mode::Concatenate,
        texts: 1,
        validation: 0,
        labels: 2,
        candidates: 1,
        together: 1,
    };
    let texts = Encoded {
        ids: vec![7; shape.rows()],
        keep: vec![1.0; 8],
    };
    place.with_servers(|addresses| {
        let all = [
            (Role::Server0, addresses.servers[0].clone()),
            (Role::Server1, addresses.servers[1].clone()),
            (Role::Assistant, addresses.assistant.clone()),
        ];
        let owner = place.station(Role::ModelOwner);
        share(&owner, &public, &ready.weights, &ready.table, &all, &mut |_| ()).unwrap();
        let again = |public: &super::store::PublicModel| {
            share(&owner, public, &ready.weights, &ready.table, &all, &mut |_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(again(&public).contains("here already"));
        let mut named = public.clone();
        named.name = "\u{1b}[2J".into();
        assert!(again(&named).contains("control characters") && named.check().is_err());
        // Sizes that would only exhaust memory are refused before anything is made of them.
        let mut endless = public.clone();
        endless.config.intermediate_size = 1 << 20;
        endless.config.num_hidden_layers = 1 << 10;
        endless.config.layers = vec![public.config.layers[0].clone(); 1 << 10];
        assert!(endless.check().unwrap_err().to_string().contains("parameters"));
        let station = place.station(Role::DataOwner);
        let rows = table_rows(&public.config);
        let begin_at = |addresses: &Addresses, shape: &super::program::Shape| {
            let run = new_run(&public, shape.clone(), Comparison::MaskedBits).unwrap();
            Remote::begin(&station, addresses, &run, rows, &texts)
        };
        let begin = |shape: &super::program::Shape| begin_at(addresses, shape);
        // A prompt beyond the end of a text is refused, and said to be.
        let impossible = super::program::Shape {
            prompt: 8,
            ..shape.clone()
        };
        let refused = begin(&impossible).err().unwrap().to_string();
        assert!(
            refused.contains("prompt") || refused.contains("texts of 8 tokens"),
            "{refused}"
        );
        // One that the assistant has consented to, but finds no server: the assistant does not go on waiting for them.
        let mut swapped = addresses.clone();
        swapped.servers.reverse();
        let start = std::time::Instant::now();
        assert!(begin_at(&swapped, &shape).is_err());
        drop(begin(&shape).unwrap());
        assert!(start.elapsed() < WAIT, "{:?}", start.elapsed());
        // Until they have noticed, they are busy, and it waits.
        let mut remote = begin(&shape).unwrap();
        // As does another data owner, until the run has ended.
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                let models = owner::models(&place.station(Role::DataOwner), addresses).unwrap();
                assert!(ended.load(Relaxed), "answered during a run");
                models
            });
            let prompt = vec![0.1; 2 * ready.config.hidden_size];
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(300));
                let logits = remote.logits(super::program::Pass::Generation, &prompt).unwrap();
                assert_eq!(logits.len(), 2);
            }
            ended.store(true, Relaxed);
            remote.end().unwrap();
            assert_eq!(second.join().unwrap()[0].name, "tiny");
        });
    });
}

#[test]
fn an_encoder_without_words_to_answer_with_is_refused() {
    let mut checkpoint = checkpoint!("bert");
    checkpoint.config.has_head = false;
    let how = Calibration {
        texts: &[],
        tokens: 12,
        margin: 2.0,
    };
    let refused = model::ready(&checkpoint, Attention::Softmax, &how).err().unwrap();
    assert!(refused.to_string().contains("no masked-LM head"), "{refused}");
}

#[test]
fn a_plan_is_what_the_passes_cost() {
    let checkpoint = checkpoint!("bert");
    let ready = ready(&checkpoint, Attention::Softmax);
    let shape = super::program::Shape {
        tokens: 8,
        answer: 6,
        start: 1,
        prompt: 2,
        mode: super::program::Mode::Add,
        texts: 3,
        validation: 2,
        labels: 2,
        candidates: 4,
        together: 4,
    };
    let plan = |shape: &super::program::Shape, budget| {
        let settings = Settings {
            population: shape.candidates.max(2),
            budget,
            validate_every: 8,
            ..Settings::default()
        };
        super::plan::cost(&ready.config, shape, Comparison::Fss, &settings, &Network::NONE).unwrap()
    };
    let whole = plan(&shape, 16);
    assert_eq!(whole.passes, [4, 5]);
    let all = [
        (1, &whole.texts),
        (4, &whole.generation),
        (5, whole.validation.as_ref().unwrap()),
    ];
    let bytes: u64 = all
        .iter()
        .map(|(n, p)| n * (p.online_bytes[0] + p.online_bytes[1]))
        .sum();
    assert_eq!(bytes, whole.online_bytes);
    // Rounds are paid once for the candidates that share a pass; bytes for each of them.
    let single = super::program::Shape {
        candidates: 1,
        together: 1,
        ..shape.clone()
    };
    let single = plan(&single, 4);
    assert_eq!(single.generation.rounds, whole.generation.rounds);
    let apart = super::program::Shape { together: 1, ..shape };
    assert_eq!(
        plan(&apart, 16).generation.rounds,
        4 * (whole.generation.rounds - 1) + 1
    );
    assert!(whole.generation.online_bytes[0] > 3 * single.generation.online_bytes[0]);
    // Prompts go out, logits come back, to and from both.
    assert_eq!(whole.generation.owner_sends, 8 * 4 * 2 * 32);
    assert_eq!(whole.generation.owner_receives, 2 * 8 * 4 * 3 * 2);
}
