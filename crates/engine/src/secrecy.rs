//! Tests of what keeps secrets in: nothing printable shows a value, and no randomness serves twice.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};

use veiltune_ring::Ring;
use veiltune_ring::prg::{Prg, Seed};

use crate::gates::Gates;
use crate::material::ParameterStore;
use crate::online::Online;
use crate::protocols::compare::Comparison;
use crate::{Owner, Party};

/// No run of three digits: no value, and no word, seed or share of one.
fn hides_values(text: &str) -> bool {
    !text
        .as_bytes()
        .windows(3)
        .any(|w| w.iter().all(u8::is_ascii_hexdigit) && w.iter().any(u8::is_ascii_digit))
}

#[test]
fn debug_shows_no_values() {
    let seed = Seed::from_bytes([0xa7; 16]);
    let (link, _peer) = veiltune_wire::memory::pair();
    let (_queue, material) = mpsc::channel();
    let shares = VecDeque::from([Ring::full([2, 3], 777_777)]);
    let online = Online::new(
        Comparison::Fss,
        Party::P0,
        seed.clone(),
        Arc::new(link),
        material,
        Arc::new(ParameterStore::default()),
        Box::new(shares),
    );
    let own = online
        .enter(Owner::Party(Party::P0), &[2, 3], Some(&[777.5; 6]))
        .expect("an input");
    let shared = online.enter(Owner::Shared, &[2, 3], None).expect("a share");
    for text in [
        format!("{own:?} {own:#?}"),
        format!("{shared:?} {shared:#?}"),
        format!("{seed:?} {seed:#?}"),
        format!("{:?}", Ring::full([2, 3], 777_777)),
        format!("{:?}", Prg::new(&seed, 5, 6)),
    ] {
        assert!(hides_values(&text), "{text}");
    }
    assert!(!hides_values("Share([2, 3], 777777)") && !hides_values("Seed(a7a7)"));
}

/// Debug builds check every walk of every test.
#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "would serve twice")]
fn drawing_twice_is_found() {
    let walk = crate::offline::Offline::count(Comparison::Fss);
    walk.claim((5, 0));
    walk.claim((5, 1));
    walk.claim((6, 0));
    walk.claim((5, 0));
}
