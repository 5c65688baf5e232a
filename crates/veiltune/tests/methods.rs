//! Every method goes through the same commands: planned, dealt, served, and equal to plain float.

mod common;

use std::fs;
use std::path::Path;

use common::artefact;
use common::{assets, pictures, run, veiltune};
use serde_json::Value;
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
    let kept = std::env::var_os("VEILTUNE_KEEP").map(std::path::PathBuf::from);
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
