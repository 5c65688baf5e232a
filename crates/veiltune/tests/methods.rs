//! Every method goes through the same commands: planned, dealt, served, and equal to plain float.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use common::artefact;
use common::{assets, pictures, run, veiltune};
use serde_json::{Value, json};
use veiltune_hub::{Array, Precision, Tensors, safetensors};
use veiltune_nn::Method;
use veiltune_nn::load::Backbone;

const PICTURES: [&str; 2] = ["04_trouser.png", "17_bag.png"];

fn write(name: &str, dir: &Path) -> Method {
    artefact::write(
        name,
        &Backbone::open(&assets()).unwrap(),
        &pictures(&PICTURES),
        dir,
    )
}

#[test]
fn every_method_is_served_and_agrees_with_plain_float_at_the_planned_cost() {
    for name in ["head", "lora", "adaptformer", "last-layers", "mpcvit"] {
        let dir = tempfile::tempdir().unwrap();
        write(name, dir.path());
        let files = pictures(&PICTURES);
        let report = run(veiltune()
            .args(["demo", "--json", "--backbone"])
            .arg(assets())
            .arg("--adapter")
            .arg(dir.path())
            .arg("--images")
            .args(&files))
        .json();
        assert_eq!(report["agree"], 2, "{name}: {report}");
        assert!(
            report["max_logit_error"].as_f64().unwrap() < 0.1,
            "{name}: {report}"
        );
        // From the public configuration alone.
        let plan = run(veiltune()
            .args(["plan", "--json", "--images", "2", "--adapter-config"])
            .arg(dir.path().join("adapter_config.json")))
        .json();
        for count in [
            "comparison",
            "rounds",
            "online_bytes",
            "setup_bytes",
            "dealer_bytes",
        ] {
            assert_eq!(plan[count], report[count], "{name}: {count}");
        }
    }
}

#[test]
fn an_adapter_for_another_backbone_is_refused_and_the_right_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["head", "lora"] {
        write(name, dir.path());
        let path = dir.path().join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let right = config["base_model_sha256"].as_str().unwrap()[..16].to_owned();
        config["base_model_sha256"] = "00".repeat(32).into();
        fs::write(&path, config.to_string()).unwrap();
        run(veiltune()
            .args(["demo", "--json", "--adapter"])
            .arg(dir.path())
            .arg("--images")
            .args(pictures(&PICTURES)))
        .explains(
            2,
            &[
                "another backbone",
                "trained on a test",
                "0000000000000000",
                &right,
                "--backbone",
            ],
        );
    }
}

/// Needs `VEILTUNE_ASSETS`, a folder with a `vit-s14`; a minute and a few GiB.
#[test]
fn a_whole_encoder_of_true_size_is_served() {
    let Some(folder) = std::env::var_os("VEILTUNE_ASSETS") else {
        return;
    };
    let backbone = Path::new(&folder).join("vit-s14");
    let temporary = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("VEILTUNE_KEEP").map(PathBuf::from);
    let dir = kept.as_deref().unwrap_or(temporary.path());
    artefact::write(
        "lora-scaled",
        &Backbone::open(&backbone).unwrap(),
        &pictures(&PICTURES),
        dir,
    );
    let report = run(veiltune()
        .args(["demo", "--json", "--batch", "1", "--backbone"])
        .arg(&backbone)
        .arg("--adapter")
        .arg(dir)
        .arg("--images")
        .args(pictures(&PICTURES)))
    .json();
    assert_eq!(report["agree"], 2, "{report}");
    assert_eq!(report["overlapped"], true, "{report}");
    println!("{report}");
}

/// A LoRA as the PEFT library writes it, of the small ViT of the backbones' test vectors.
fn foreign_lora(dir: &Path) {
    let tensors = (0..2).flat_map(|layer| {
        ["query", "value"].into_iter().flat_map(move |module| {
            let at = format!("base_model.model.vit.encoder.layer.{layer}.attention.attention.{module}");
            [("A", vec![2, 12]), ("B", vec![12, 2])]
                .map(|(part, dims)| (format!("{at}.lora_{part}.weight"), dims))
        })
    });
    let head = [("weight", vec![3, 12]), ("bias", vec![3])];
    let head = head.map(|(part, dims)| (format!("base_model.model.classifier.{part}"), dims));
    let array = |dims: Vec<usize>| Array {
        values: (0..dims.iter().product())
            .map(|i: usize| (i as f32 * 1.7).sin())
            .collect(),
        dims,
    };
    let tensors: Tensors = tensors
        .chain(head)
        .map(|(name, dims)| (name, array(dims)))
        .collect();
    let config = json!({
        "base_model_name_or_path": "somebody/vit", "bias": "none", "lora_alpha": 2, "modules_to_save": ["classifier"],
        "peft_type": "LORA", "r": 2, "target_modules": ["query", "value"], "task_type": null
    });
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    safetensors::write(&dir.join("adapter_model.safetensors"), &tensors, Precision::F32).unwrap();
}

#[test]
fn a_lora_of_the_peft_library_is_imported_and_served() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nn/tests/vectors");
    let (backbone, picture) = (vectors.join("vit"), vectors.join("picture.png"));
    let dir = tempfile::tempdir().unwrap();
    let [foreign, ours, labels] = ["foreign", "ours", "labels.txt"].map(|name| dir.path().join(name));
    fs::create_dir(&foreign).unwrap();
    foreign_lora(&foreign);
    fs::write(&labels, "cat\ndog\nbird\n").unwrap();
    let demo = |adapter: &Path| {
        run(veiltune()
            .args(["demo", "--json", "--backbone"])
            .arg(&backbone)
            .arg("--adapter")
            .arg(adapter)
            .arg("--images")
            .arg(&picture))
    };
    demo(&foreign).explains(2, &["veiltune import"]);
    let import = |backbone: &Path| {
        run(veiltune()
            .args(["import", "--backbone"])
            .arg(backbone)
            .arg("--peft")
            .arg(&foreign)
            .arg("--labels")
            .arg(&labels)
            .arg("--images")
            .arg(&picture)
            .arg("--out")
            .arg(&ours))
    };
    import(&assets()).explains(2, &["ViT and DeiT", "--peft"]);
    let imported = import(&backbone);
    assert!(imported.status.success(), "{}", imported.stderr);
    assert!(imported.stdout.contains("3 classes"), "{}", imported.stdout);
    let report = demo(&ours).json();
    assert_eq!(report["agree"], 1, "{report}");
    let label = report["results"][0]["label"].as_str().unwrap();
    assert!(["cat", "dog", "bird"].contains(&label), "{report}");
}

/// A model hub on the loopback with the model `owner/tiny`, the small ViT of the backbones' test vectors; its address.
fn hub(folder: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = move |stream: TcpStream| -> std::io::Result<()> {
        let mut lines = BufReader::new(&stream).lines();
        let request = lines.next().unwrap_or(Ok(String::new()))?;
        for line in lines {
            if line?.is_empty() {
                break;
            }
        }
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let file = path.rsplit('/').next().unwrap_or("");
        let content = fs::read(folder.join(file)).ok();
        let status = if content.is_some() {
            "200 OK"
        } else {
            "404 Not Found\r\nX-Error-Code: EntryNotFound"
        };
        let content = content.unwrap_or_default();
        let (length, id) = (content.len(), "0123456789abcdef0123456789abcdef01234567");
        let head = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nX-Repo-Commit: {id}\r\nETag: \"{length:040x}\"\r\nContent-Length: {length}\r\n\r\n"
        );
        (&stream).write_all(head.as_bytes())?;
        if method == "GET" {
            (&stream).write_all(&content)
        } else {
            Ok(())
        }
    };
    // Ends with the process; a client that hangs up is no reason to stop.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.and_then(&answer);
        }
    });
    address
}

#[test]
fn a_backbone_is_downloaded_once_and_the_user_is_told() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nn/tests/vectors");
    let (dir, address) = (tempfile::tempdir().unwrap(), hub(vectors.join("vit")));
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    foreign_lora(&foreign);
    for first in [true, false] {
        let imported = run(veiltune()
            .env("HF_ENDPOINT", &address)
            .env("HF_HUB_CACHE", dir.path().join("cache"))
            .env("NO_PROXY", "127.0.0.1")
            .args(["import", "--backbone", "owner/tiny", "--peft"])
            .arg(&foreign)
            .arg("--images")
            .arg(vectors.join("picture.png"))
            .arg("--out")
            .arg(dir.path().join("ours")));
        assert!(imported.status.success(), "{}", imported.stderr);
        assert_eq!(
            imported.stderr.contains("downloading owner/tiny"),
            first,
            "{}",
            imported.stderr
        );
    }
}
