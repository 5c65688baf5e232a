//! The demo as a user runs it: it works, it agrees with plain float, it explains what is wrong with its input.

mod common;

use std::fs;
use std::path::Path;

use common::{assets, pictures, run, veiltune};
use serde_json::Value;

#[test]
fn private_labels_are_those_of_plain_float_and_the_cost_is_the_predicted_one() {
    let files = pictures(&["03_trouser.png", "19_ankle-boot.png"]);
    let report = run(veiltune()
        .args(["demo", "--json", "--network", "lan", "--images"])
        .args(&files))
    .json();
    assert_eq!(report["images"], 2);
    assert_eq!(report["agree"], 2);
    assert!(report["max_logit_error"].as_f64().unwrap() < 0.05, "{report}");
    for count in ["rounds", "online_bytes", "dealer_bytes", "setup_bytes"] {
        assert_eq!(report[count], report["predicted"][count], "{count}");
    }
    assert!(report["rounds"].as_u64().unwrap() > 0);
    for pair in ["online_bytes", "dealer_bytes"] {
        assert_eq!(report[pair].as_array().unwrap().len(), 2);
    }
    for phase in ["backbone", "offline", "online"] {
        assert!(report["seconds"][phase].as_f64().unwrap() > 0.0, "{phase}");
    }
    // Rounds cost delays of the emulated network, save for what both sides send at once.
    let least = report["rounds"].as_f64().unwrap() * 0.5e-3 / 2.0;
    assert!(report["seconds"]["online"].as_f64().unwrap() > least, "{report}");
    let rows = report["results"].as_array().unwrap();
    assert_eq!(rows[0]["image"], "03_trouser.png");
    assert_eq!(
        (&rows[0]["true_label"], &rows[1]["true_label"]),
        (&"trouser".into(), &"ankle boot".into())
    );
    for row in rows {
        assert_eq!(row["label"], row["plain_label"]);
        assert!((0.0..=1.0).contains(&row["confidence"].as_f64().unwrap()));
    }
}

#[test]
fn the_table_shows_each_embedded_image_and_the_cost() {
    let out = run(veiltune().arg("demo"));
    assert!(out.status.success(), "{}", out.stderr);
    for name in [
        "01_t-shirt-top.png",
        "20_ankle-boot.png",
        "private label",
        "rounds",
        "dealer bytes, to provider",
        "seconds: ",
    ] {
        assert!(out.stdout.contains(name), "{name}: {}", out.stdout);
    }
    for stage in ["backbone", "offline", "online", "plain float"] {
        assert!(
            out.stderr.lines().any(|line| line.starts_with(stage)),
            "{stage}: {}",
            out.stderr
        );
    }
}

#[test]
fn bad_images_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let picture = fs::read(&pictures(&["17_bag.png"])[0]).unwrap();
    fs::write(at("cut.png"), &picture[..picture.len() / 2]).unwrap();
    fs::write(at("text.png"), "no image").unwrap();
    fs::write(at("empty.jpg"), "").unwrap();
    fs::create_dir(at("nothing")).unwrap();
    let demo = |name: &str| run(veiltune().args(["demo", "--json", "--images"]).arg(at(name)));
    for name in ["cut.png", "text.png", "empty.jpg", "absent.png"] {
        demo(name).explains(2, &[name, "PNG or JPEG"]);
    }
    demo("nothing").explains(2, &["nothing", "no PNG or JPEG file"]);
    // One bad picture among good ones is found before anything runs.
    let mixed = run(veiltune()
        .args(["demo", "--images"])
        .args(pictures(&["17_bag.png"]))
        .arg(at("text.png")));
    mixed.explains(2, &["text.png"]);
    fs::write(at("labels.json"), "{").unwrap();
    demo("cut.png").explains(2, &["labels.json"]);
}

#[test]
fn bad_options_are_usage_errors() {
    for wrong in [
        &["demo", "--network", "modem"][..],
        &["demo", "--images"],
        &["deal", "--images", "0", "--out", "x"],
        &["demo", "--batch", "0"],
        &["none"],
    ] {
        let out = run(veiltune().args(wrong));
        assert_eq!((out.status.code(), &*out.stdout), (Some(2), ""), "{wrong:?}");
        assert!(out.stderr.contains("--help"), "{}", out.stderr);
    }
    let version = run(veiltune().arg("--version"));
    assert_eq!(
        version.stdout,
        format!("veiltune {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = run(veiltune().args(["demo", "--help"])).stdout;
    for option in ["--images", "--network", "--json", "--material"] {
        assert!(help.contains(option), "{option}");
    }
}

#[test]
fn damaged_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let demo = |option: &str| run(veiltune().args(["demo", "--json", option]).arg(dir.path()));
    let name = dir.path().to_str().unwrap();
    demo("--backbone").explains(2, &[name, "config.json", "--backbone"]);
    demo("--adapter").explains(2, &[name, "adapter_config.json", "--adapter"]);

    copy(&assets().join("config.json"), dir.path());
    copy(&assets().join("adapter/adapter_config.json"), dir.path());
    for (from, option) in [
        ("backbone.safetensors", "--backbone"),
        ("adapter/adapter_model.safetensors", "--adapter"),
    ] {
        let copied = copy(&assets().join(from), dir.path());
        let whole = fs::read(&copied).unwrap();
        for damaged in [
            &whole[..whole.len() - 1],
            &whole[1..],
            b"",
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            fs::write(&copied, damaged).unwrap();
            demo(option).explains(2, &[name, ".safetensors", option]);
        }
        fs::write(&copied, whole).unwrap();
    }

    // A value that is none: of four, two or one byte a value.
    for (file, option) in [("backbone", "--backbone"), ("adapter_model", "--adapter")] {
        let path = dir.path().join(format!("{file}.safetensors"));
        let whole = fs::read(&path).unwrap();
        let mut spoilt = whole.clone();
        let end = spoilt.len();
        spoilt[end - 4..].fill(0xff);
        fs::write(&path, spoilt).unwrap();
        demo(option).explains(2, &[name, "not finite", option]);
        fs::write(path, whole).unwrap();
    }

    // An adapter for another backbone.
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["image_size"] = 56.into();
    config["preprocess"]["size"] = 56.into();
    fs::write(&path, config.to_string()).unwrap();
    demo("--backbone").explains(2, &["trained together", "tokens"]);
}

#[test]
fn material_from_files_serves_exactly_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("material");
    let files = pictures(&["01_t-shirt-top.png", "18_bag.png"]);
    let demo = || {
        let mut command = veiltune();
        command
            .args(["demo", "--json", "--material"])
            .arg(&out)
            .arg("--images");
        command
    };
    run(demo().args(&files)).explains(2, &["material.json", "veiltune deal"]);

    let dealt = run(veiltune()
        .args(["deal", "--images", "2", "--comparison", "fss", "--out"])
        .arg(&out));
    assert!(dealt.status.success(), "{}", dealt.stderr);
    assert_eq!(dealt.stdout.lines().count(), 2);
    for line in dealt.stdout.lines() {
        assert!(line.ends_with(".material") && Path::new(line).exists(), "{line}");
        #[cfg(unix)]
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(line).unwrap().permissions()) & 0o777,
            0o600
        );
    }
    // Material is never overwritten, and another number of images consumes nothing.
    run(veiltune().args(["deal", "--images", "2", "--out"]).arg(&out))
        .explains(2, &["client.material", "never overwritten"]);
    run(demo().args(&files[..1])).explains(2, &["for 2 images, not 1"]);
    let other = dir.path().join("adapter");
    fs::create_dir(&other).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        copy(&assets().join("adapter").join(file), &other);
    }
    let path = other.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let bound = &mut config["final_norm"]["sigma"][1];
    *bound = (bound.as_f64().unwrap() * 1.25).into();
    fs::write(&path, config.to_string()).unwrap();
    let another = run(demo().args(&files).arg("--adapter").arg(&other));
    another.explains(2, &["another adapter", "veiltune deal"]);

    let report = run(demo().args(&files)).json();
    assert_eq!(report["agree"], 2);
    assert_eq!(report["dealer_bytes"], report["predicted"]["dealer_bytes"]);
    // The material says how the parties compare, whatever is sooner.
    assert_eq!(report["comparison"], "fss");
    run(demo().args(&files)).explains(2, &[".material", "exactly once"]);
}

fn copy(file: &Path, to: &Path) -> std::path::PathBuf {
    let to = to.join(file.file_name().unwrap());
    fs::copy(file, &to).unwrap();
    to
}
