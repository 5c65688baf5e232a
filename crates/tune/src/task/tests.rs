use std::path::PathBuf;

use super::*;

fn task(json: &str) -> Result<Task> {
    Task::parse("my.json", json.as_bytes())
}

fn reviews() -> Task {
    task(r#"{"name": "r", "causal": "{prompt} {text} is {mask}", "verbalizer": {"neg": "bad", "pos": "good"}}"#).unwrap()
}

/// Reads `content` as a data file of `task`.
fn read(task: &Task, content: impl AsRef<[u8]>) -> Result<Vec<Example>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.tsv");
    std::fs::write(&path, content).unwrap();
    task.examples(&path)
}

fn texts(examples: &[Example]) -> Vec<(&str, Option<&str>, usize)> {
    examples
        .iter()
        .map(|e| (e.text_a.as_str(), e.text_b.as_deref(), e.label))
        .collect()
}

#[test]
fn built_in_tasks_serve_both_families_and_survive_being_stored() {
    for name in Task::built_in_names() {
        let task = Task::built_in(name).unwrap();
        for family in [Family::Masked, Family::Causal] {
            assert_eq!(
                task.template(family).unwrap().pairs(),
                ["mrpc", "rte"].contains(&name)
            );
        }
        let stored = serde_json::to_vec(&task).unwrap();
        assert_eq!(Task::parse(name, &stored).unwrap(), task);
        assert_eq!(Task::named(name).unwrap(), task);
    }
    assert_eq!(Task::built_in("mrpc").unwrap().metric, Metric::F1 { positive: 1 });
    let rte = Task::built_in("rte").unwrap();
    assert_eq!(
        (rte.labels.join(" "), rte.words.join(" ")),
        ("entailment not_entailment".into(), "Yes No".into())
    );
    let unknown = Task::named("sst2").unwrap_err().to_string();
    assert!(
        unknown.contains("neither a file nor one of sst-2, yelp"),
        "{unknown}"
    );
}

#[test]
fn a_template_is_its_pieces() {
    let template = Template::parse("{prompt} . {text_a} ? {mask} , {text_b}", Family::Masked).unwrap();
    let words = |w: &str| Piece::Words(w.into());
    let want = [
        Piece::Prompt,
        words(" . "),
        Piece::TextA,
        words(" ? "),
        Piece::Mask,
        words(" , "),
        Piece::TextB,
    ];
    assert_eq!(template.pieces(), want);
}

#[test]
fn tasks_that_make_no_sense_are_refused_with_advice() {
    let with = |template: &str, words: &str, more: &str| {
        let json = format!(r#"{{"name": "t", {template}, "verbalizer": {words}{more}}}"#);
        task(&json).unwrap_err().to_string()
    };
    let (good, words) = (r#""masked": "{prompt} {text} {mask}""#, r#"{"a": "x", "b": "y"}"#);
    let cases = [
        (
            with(r#""masked": "{prompt} {text}""#, words, ""),
            "no {mask}: add it once",
        ),
        (with(r#""masked": "{mask} {text}""#, words, ""), "no {prompt}"),
        (with(r#""masked": "{prompt} {mask}""#, words, ""), "no {text}"),
        (
            with(r#""masked": "{prompt} {text} {mask} {mask}""#, words, ""),
            "{mask} more than once",
        ),
        (
            with(r#""masked": "{prompt} {txt} {mask}""#, words, ""),
            "{txt} is none of",
        ),
        (
            with(r#""masked": "{prompt} {text {mask}""#, words, ""),
            "is none of",
        ),
        (
            with(r#""masked": "{prompt} {text} {mask} {""#, words, ""),
            "not closed",
        ),
        (
            with(r#""masked": "{prompt} {text} {mask} }""#, words, ""),
            "not opened",
        ),
        (
            with(r#""causal": "{prompt} {mask} {text}""#, words, ""),
            "must stand last",
        ),
        (with(r#""masked": null"#, words, ""), "no template"),
        (with(good, r#"{"a": "x"}"#, ""), "1 labels"),
        (
            with(good, r#"{"a": "x", "b": " y"}"#, ""),
            "\"b\" is empty, or has space",
        ),
        (
            with(good, words, r#", "metric": {"f1": "c"}"#),
            "F1 of label \"c\"",
        ),
        (with(good, words, r#", "colums": 1"#), "unknown field `colums`"),
        (
            with(
                good,
                words,
                r#", "columns": {"text_a": "s", "text_b": "t", "label": "l"}"#,
            ),
            "do not name the texts",
        ),
        (
            with(
                r#""masked": "{prompt} {text} {mask}", "causal": "{prompt} {text_a} {text_b} {mask}""#,
                words,
                "",
            ),
            "two texts",
        ),
    ];
    for (error, part) in cases {
        assert!(
            error.starts_with("task my.json: ") && error.contains(part),
            "{error}: {part}"
        );
    }
    let missing = reviews().template(Family::Masked).unwrap_err().to_string();
    assert!(missing.contains("no template for masked models"), "{missing}");
}

#[test]
fn plain_files_are_read_with_and_without_a_header() {
    let want = [("so \"dull\"", None, 0), ("fine", None, 1)];
    for content in [
        "so \"dull\"\tneg\nfine\tpos\n",
        "text\tlabel\r\nso \"dull\" \tneg\r\n\r\nfine\tpos\r\n",
        "\u{feff}so \"dull\"\tneg\nfine\tpos",
    ] {
        assert_eq!(texts(&read(&reviews(), content).unwrap()), want);
    }
}

#[test]
fn glue_files_are_read_by_their_columns() {
    let mrpc = "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t17\t18\tHe said \" no .\tNo .\n0\t1\t2\ta\tb\n";
    let found = read(&Task::built_in("mrpc").unwrap(), mrpc).unwrap();
    assert_eq!(
        texts(&found),
        [("He said \" no .", Some("No ."), 1), ("a", Some("b"), 0)]
    );
    let rte = "index\tsentence1\tsentence2\tlabel\n0\tp\th\tnot_entailment\n";
    assert_eq!(
        texts(&read(&Task::built_in("rte").unwrap(), rte).unwrap()),
        [("p", Some("h"), 1)]
    );
    let sst = "sentence\tlabel\nhide new secretions \t0\n";
    assert_eq!(
        texts(&read(&Task::built_in("sst-2").unwrap(), sst).unwrap()),
        [("hide new secretions", None, 0)]
    );
    let nsmc = "id\tdocument\tlabel\n9\t굳ㅋ\t1\n";
    assert_eq!(
        texts(&read(&Task::built_in("nsmc").unwrap(), nsmc).unwrap()),
        [("굳ㅋ", None, 1)]
    );
    let plain = "p\th\tentailment\n";
    assert_eq!(
        texts(&read(&Task::built_in("rte").unwrap(), plain).unwrap()),
        [("p", Some("h"), 0)]
    );
}

#[test]
fn a_file_says_its_labels_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let task = |content: &str| {
        let path = dir.path().join("data.tsv");
        std::fs::write(&path, content).unwrap();
        Task::of_data(&path)
    };
    let single = task("text\tlabel\nso so\tmiddling\ngood\tabove \nbad\tbelow\ngood\tabove\n").unwrap();
    assert_eq!(
        (single.labels.as_slice(), single.pairs),
        (&["above", "below", "middling"].map(String::from)[..], false)
    );
    assert_eq!(
        texts(&read(&single, "fine\tmiddling\n").unwrap()),
        [("fine", None, 2)]
    );
    assert!(single.template(Family::Masked).is_err());
    assert!(task("a\tb\tyes\nc\td\tno\n").unwrap().pairs);
    for (content, part) in [
        ("secret\tpos\nsecret\tpos\n", "1 labels; 2 to 1024"),
        (
            "a\tb\tc\td\n",
            "the number of columns is 4: give lines of text and label",
        ),
        ("secret\tpos\nsecret\n", "line 2: 1 instead of 2 columns"),
        ("", "0 labels"),
    ] {
        let error = task(content).unwrap_err().to_string();
        assert!(error.contains("data.tsv") && error.contains(part), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn bad_lines_are_named_and_their_texts_are_not() {
    let cases: [(&[u8], &str); 5] = [
        (
            b"secret\tpos\nsecret\tbad\n",
            "line 2: label \"bad\" is none of the task, which knows neg, pos",
        ),
        (b"secret\tpos\nsecret pos\n", "line 2: 1 instead of 2 columns"),
        (b"secret\tpos\n\nsecret\t\xff\n", "line 3: not UTF-8"),
        (b" \tpos\n", "line 1: an empty text"),
        (b"text\tlabel\n", "has no example"),
    ];
    for (content, part) in cases {
        let error = read(&reviews(), content).unwrap_err().to_string();
        assert!(error.contains("data.tsv") && error.contains(part), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    let example = &read(&reviews(), "secret\tpos\n").unwrap()[0];
    assert_eq!(format!("{example:?}"), "Example(..)");
}

/// On the real files, where `VEILTUNE_ASSETS` says they are.
#[test]
fn real_files_are_read_whole() {
    let Some(assets) = std::env::var_os("VEILTUNE_ASSETS").map(PathBuf::from) else {
        return;
    };
    let files = [
        ("sst-2", "SST-2/train.tsv", 67_349),
        ("sst-2", "SST-2/dev.tsv", 872),
        ("yelp", "Yelp-polarity/test.tsv", 4000),
        ("ag-news", "AG-News/test.tsv", 7600),
        ("mrpc", "MRPC/train.tsv", 3667),
        ("mrpc", "MRPC/test.tsv", 1725),
        ("rte", "RTE/dev.tsv", 277),
        ("nsmc", "NSMC/train.tsv", 20_000),
    ];
    for (name, file, count) in files {
        let task = Task::built_in(name).unwrap();
        let path = assets.join("text").join(file);
        if path.exists() {
            let examples = task.examples(&path).unwrap();
            assert_eq!(examples.len(), count, "{file}");
            assert!(
                (0..task.labels.len()).all(|l| examples.iter().any(|e| e.label == l)),
                "{file}"
            );
        }
    }
}
