//! Every dependency that is built on this machine comes from the registry, under a licence that `deny.toml` allows.
//!
//! The light twin of `cargo deny check licenses sources`: it needs no tool beside cargo, and no network once the dependencies
//! are there.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The licences that `deny.toml` allows.
fn allowed() -> Vec<String> {
    let rules = fs::read_to_string(root().join("deny.toml")).unwrap();
    let (_, section) = rules.split_once("[licenses]").unwrap();
    let (_, list) = section.split_once("allow = [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    list.split('"').skip(1).step_by(2).map(String::from).collect()
}

/// What cargo says of this workspace's packages and of all that they need on this kind of machine.
fn packages() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        "host-tuple",
    ]);
    let out = command.current_dir(root()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    serde_json::from_value(metadata["packages"].take()).unwrap()
}

/// Whether an SPDX expression can be met with `allowed` licences alone.
fn is_met(expression: &str, allowed: &[&str]) -> bool {
    // Before SPDX, "/" stood for OR.
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let met = any(&mut words, allowed);
    met && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words, allowed: &[&str]) -> bool {
    let mut met = all(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        met |= all(words, allowed);
    }
    met
}

fn all(words: &mut Words, allowed: &[&str]) -> bool {
    let mut met = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words, allowed);
    }
    met
}

fn one(words: &mut Words, allowed: &[&str]) -> bool {
    match words.next() {
        Some("(") => {
            let met = any(words, allowed);
            met & (words.next() == Some(")"))
        }
        Some(licence) => match words.next_if_eq(&"WITH") {
            Some(_) => allowed.contains(&&*format!("{licence} WITH {}", words.next().unwrap_or_default())),
            None => allowed.contains(&licence),
        },
        None => false,
    }
}

#[test]
fn licences_are_allowed_and_sources_known() {
    let allowed = allowed();
    let allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
    let packages = packages();
    assert!(
        allowed.contains(&"MIT") && packages.len() > 100,
        "{allowed:?}, {} packages",
        packages.len()
    );
    for package in packages {
        let name = format!("{} {}", package["name"], package["version"]);
        let licence = package["license"].as_str().unwrap_or_default();
        assert!(
            is_met(licence, &allowed),
            "{name}: {licence:?} is not met by the licences that deny.toml allows"
        );
        // Packages of this workspace have no source.
        let source = package["source"].as_str().unwrap_or("registry+");
        assert!(source.starts_with("registry+"), "{name} comes from {source}");
    }
}

#[test]
fn expressions_are_read_as_spdx_says() {
    let met = |expression| is_met(expression, &["MIT", "ISC", "Apache-2.0"]);
    for expression in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT/Unlicense",
        "Apache-2.0 AND ISC",
        "(MIT OR GPL-3.0) AND ISC",
        "Zlib OR MIT AND ISC",
    ] {
        assert!(met(expression), "{expression}");
    }
    for expression in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "MIT WITH Odd-exception",
        "(MIT OR ISC) AND Zlib",
        "(MIT",
        "MIT)",
    ] {
        assert!(!met(expression), "{expression}");
    }
}
