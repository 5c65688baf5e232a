use proptest::prelude::*;

use super::*;

/// Words and single marks are tokens, other ones after a space: each letter in a number of base 32.
struct Toy {
    specials: Specials,
}

const SPECIALS: Specials = Specials {
    cls: Some(1),
    sep: Some(2),
    mask: Some(3),
    bos: Some(4),
    pad: Some(5),
    unknown: Some(6),
};

fn token(word: &str, spaced: bool) -> u32 {
    let letters = word
        .bytes()
        .fold(1u32, |n, b| n.wrapping_mul(32) + u32::from(b % 32));
    100 + 2 * (letters % 1_000_000) + u32::from(spaced)
}

impl Tokenize for Toy {
    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, Cause> {
        if text.contains('\u{0}') {
            return Err("a null".into());
        }
        let spaced = text.starts_with(' ');
        let words = text.split_whitespace().enumerate();
        let known = |(i, w): (usize, &str)| match w {
            "漢" => 6,
            w => token(w, spaced || i > 0),
        };
        Ok(words.map(known).collect())
    }

    fn specials(&self) -> Specials {
        self.specials
    }
}

const TOY: Toy = Toy { specials: SPECIALS };

fn task(masked: &str, causal: &str) -> Task {
    let json = serde_json::json!({
        "name": "t", "masked": masked, "causal": causal, "verbalizer": {"n": "bad", "y": "great"},
    });
    Task::parse("t", json.to_string().as_bytes()).unwrap()
}

fn single() -> Task {
    task(
        "{prompt} . {text} . It was {mask} .",
        "{prompt} . {text} . It was {mask}",
    )
}

fn pair() -> Task {
    task(
        "{prompt}{text_a} ? {mask} , {text_b}",
        "{prompt}{text_a} ? {text_b} {mask}",
    )
}

fn example(a: &str, b: Option<&str>) -> Example {
    Example {
        text_a: a.into(),
        text_b: b.map(String::from),
        label: 1,
    }
}

fn s(word: &str) -> u32 {
    token(word, true)
}

#[test]
fn a_masked_model_gets_the_template_between_its_ends() {
    let task = single();
    let encoder = Encoder::new(&TOY, &task, Family::Masked, Slot::Add(vec![7, 8]), 64).unwrap();
    let row = encoder.sequence(&example("nice film", None)).unwrap();
    let want = [
        1,
        7,
        8,
        s("."),
        s("nice"),
        s("film"),
        s("."),
        s("It"),
        s("was"),
        3,
        s("."),
        2,
    ];
    assert_eq!(row.tokens, want);
    assert_eq!((row.prompt, row.answer, row.cut), (1..3, 9, 0));
    assert_eq!(encoder.words().unwrap(), [s("bad"), s("great")]);
}

#[test]
fn a_causal_model_answers_at_its_last_token() {
    let task = single();
    let encoder = Encoder::new(&TOY, &task, Family::Causal, Slot::Concatenate(3), 64).unwrap();
    let row = encoder.sequence(&example("nice film", None)).unwrap();
    let want = [
        4,
        5,
        5,
        5,
        s("."),
        s("nice"),
        s("film"),
        s("."),
        s("It"),
        s("was"),
    ];
    assert_eq!(row.tokens, want);
    assert_eq!((row.prompt, row.answer), (1..4, 9));
    let plain = Toy {
        specials: Specials::default(),
    };
    let encoder = Encoder::new(&plain, &task, Family::Causal, Slot::Concatenate(1), 64).unwrap();
    assert_eq!(
        encoder.sequence(&example("x", None)).unwrap().tokens[..2],
        [0, s(".")]
    );
}

#[test]
fn texts_are_cut_at_their_end_and_the_template_never() {
    let task = single();
    // 10 tokens stand without a text.
    let encoder = Encoder::new(&TOY, &task, Family::Masked, Slot::Add(vec![7; 2]), 12).unwrap();
    let row = encoder.sequence(&example("a b c d", None)).unwrap();
    assert_eq!(
        (row.tokens.len(), row.cut, row.tokens[4], row.tokens[8]),
        (10 + 2, 2, s("a"), s("was"))
    );
    let task = pair();
    let encoder = Encoder::new(&TOY, &task, Family::Masked, Slot::Add(vec![7; 2]), 13).unwrap();
    let row = encoder.sequence(&example("a b c d e", Some("f g h"))).unwrap();
    let want = [
        1,
        7,
        7,
        token("a", false),
        s("b"),
        s("c"),
        s("?"),
        3,
        s(","),
        s("f"),
        s("g"),
        s("h"),
        2,
    ];
    assert_eq!((&row.tokens[..], row.answer, row.cut), (&want[..], 7, 2));
}

#[test]
fn a_sequence_does_not_print_its_text_and_takes_what_all_have_room_for() {
    let task = pair();
    // 7 tokens stand without texts.
    let encoder = Encoder::new(&TOY, &task, Family::Masked, Slot::Add(vec![7; 2]), 13).unwrap();
    let rows = [("a b c d e", "f"), ("a", "f g h i j")];
    let rows = rows.map(|(a, b)| example(a, Some(b)));
    let free = rows.each_ref().map(|r| encoder.sequence(r).unwrap());
    assert_eq!(
        free.each_ref().map(|r| (r.texts, r.cut)),
        [([5, 1], 0), ([1, 5], 0)]
    );
    assert_eq!(format!("{:?}", free[0]), "Sequence(..)");
    let most = encoder.common([5, 5]).unwrap();
    assert_eq!(most, [3, 3]);
    let bound = rows.each_ref().map(|r| encoder.sequence_within(r, most).unwrap());
    assert_eq!(
        bound.each_ref().map(|r| (r.texts, r.cut)),
        [([3, 1], 2), ([1, 3], 2)]
    );
    assert_eq!(bound[1].tokens.last(), Some(&2));
}

#[test]
fn what_cannot_work_is_refused() {
    let task = single();
    let new = |toy: &Toy, slot, limit| match Encoder::new(toy, &task, Family::Masked, slot, limit) {
        Ok(_) => panic!("taken"),
        Err(e) => e.to_string(),
    };
    let no_mask = Toy {
        specials: Specials::default(),
    };
    assert!(new(&no_mask, Slot::Concatenate(1), 64).contains("no mask token"));
    assert!(new(&TOY, Slot::Add(vec![]), 64).contains("no tokens"));
    let error = new(&TOY, Slot::Concatenate(50), 58);
    assert!(
        error.contains("template takes 58 tokens") && error.contains("at most 58"),
        "{error}"
    );
    assert!(new(&TOY, Slot::Concatenate(usize::MAX), 58).contains("at most 58"));

    let encoder = Encoder::new(&TOY, &task, Family::Masked, Slot::Concatenate(1), 64).unwrap();
    let error = encoder
        .sequence(&example("a\u{0}", None))
        .unwrap_err()
        .to_string();
    assert!(error.contains("tokenizer refused"), "{error}");
    assert!(encoder.sequence(&example("a", Some("b"))).is_err());
}

#[test]
fn a_word_of_several_tokens_or_of_another_label_is_named() {
    let words = |verbalizer: serde_json::Value| {
        let json =
            serde_json::json!({"name": "t", "causal": "{prompt} {text} {mask}", "verbalizer": verbalizer});
        let task = Task::parse("t", json.to_string().as_bytes()).unwrap();
        let encoder = Encoder::new(&TOY, &task, Family::Causal, Slot::Concatenate(1), 64).unwrap();
        encoder.words().unwrap_err().to_string()
    };
    let error = words(serde_json::json!({"n": "bad", "y": "very good"}));
    let tokens = format!("[{}, {}]", s("very"), s("good"));
    assert!(
        error.contains("\"very good\" of label \"y\"") && error.contains(&tokens),
        "{error}"
    );
    let error = words(serde_json::json!({"n": "bad", "y": "bad"}));
    assert!(error.contains("\"n\" and \"y\" are the same token"), "{error}");
    let error = words(serde_json::json!({"n": "bad", "y": "漢"}));
    assert!(
        error.contains("\"漢\" of label \"y\" is not in this model's vocabulary"),
        "{error}"
    );
}

proptest! {
    #[test]
    fn shortening_takes_from_the_longer(a in 0usize..30, b in 0usize..30, room in 0usize..40) {
        let (mut want_a, mut want_b) = (a, b);
        while want_a + want_b > room {
            if want_a > want_b { want_a -= 1 } else { want_b -= 1 }
        }
        prop_assert_eq!(shortened([a, b], room), [want_a, want_b]);
    }
}
