//! The crate gives the known answers of `vectors/fss.txt`, which an independent implementation made
//! (`vectors/make.py`): every line is made again from its inputs and compared whole.

use std::fmt::Write;
use veiltune_fss::{Block, cmp, dcf, dpf, table};

#[test]
fn known_answers() {
    let lines = include_str!("vectors/fss.txt")
        .lines()
        .filter(|line| !line.starts_with('#'));
    let mut count = 0;
    for line in lines {
        assert_eq!(remake(line), line);
        count += 1;
    }
    assert_eq!(count, 170);
}

/// The line that has the gate, inputs and roots of `line`, with the key and the shares that the crate computes.
fn remake(line: &str) -> String {
    let fields: Vec<&str> = line.split(' ').collect();
    let [gate, bits, alpha, beta, r0, r1, x, ..] = fields[..] else {
        panic!("a short line: {line}")
    };
    let number = |s: &str| u64::from_str_radix(s, 16).expect("a number");
    let [r0, r1] = [r0, r1].map(|s| [Block::from_str_radix(s, 16).expect("a root")]);
    let bits: u32 = bits.parse().expect("a width");
    let (alpha, beta, x) = ([number(alpha)], [number(beta)], [number(x)]);
    let roots = [&r0[..], &r1[..]];
    let entries: Vec<u64> = (1..=1 << bits.min(12))
        .map(|j: u64| j.wrapping_mul(0xd1342543de82ef95))
        .collect();

    let key = match gate {
        "cmp" => cmp::generate(bits, &alpha, roots),
        "dpf" => dpf::generate(bits, &alpha, roots),
        "dcf" => dcf::generate(bits, &alpha, &beta, roots),
        _ => table::generate(bits, &alpha, roots),
    }
    .expect("valid inputs");
    let shares = [0, 1].map(|party| {
        let roots = roots[party];
        match gate {
            "cmp" => cmp::evaluate(party, bits, roots, &key, &x).map(|y| y[0]),
            "dpf" => dpf::evaluate(party, bits, roots, &key, &x).map(|y| y[0]),
            "dcf" => dcf::evaluate(party, bits, roots, &key, 1, &x).map(|y| y[0]),
            _ => table::lookup(party, bits, roots, &key, &x, &[&entries]).map(|y| y[0][0]),
        }
        .expect("valid inputs")
    });

    let mut out = fields[..7].join(" ") + " ";
    for byte in key {
        write!(out, "{byte:02x}").expect("writing to a string");
    }
    write!(out, " {:x} {:x}", shares[0], shares[1]).expect("writing to a string");
    out
}
