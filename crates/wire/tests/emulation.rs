//! Emulated networks are at least as slow as they say, and not much slower.

mod common;

use std::{
    thread,
    time::{Duration, Instant},
};

use common::*;
use veiltune_wire::{Link, MAX_MESSAGE, Network, Options};

/// Slower than promised by this much is the busy test machine's fault.
const SLACK: u32 = 4;

/// Time of `rounds` in which both sides send `size` bytes and receive.
fn rounds(a: &dyn Link, b: &dyn Link, rounds: usize, size: usize) -> Duration {
    let run = |link: &dyn Link| {
        let mut buf = vec![0; size];
        for _ in 0..rounds {
            link.send(vec![0; size]).unwrap();
            link.recv(&mut buf).unwrap();
        }
    };
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| run(b));
        run(a);
    });
    start.elapsed()
}

#[test]
fn rounds_take_one_delay() {
    let network = Network {
        bits_per_second: 1_000_000_000,
        one_way_delay: Duration::from_millis(3),
    };
    for (a, b) in both(&Options::over(network)) {
        let took = rounds(&*a, &*b, 20, 8);
        let promised = 20 * network.one_way_delay;
        assert!(
            took >= promised && took < SLACK * promised,
            "{took:?} instead of {promised:?}"
        );
    }
}

#[test]
fn bulk_takes_its_bytes() {
    let network = Network {
        bits_per_second: 400_000_000,
        one_way_delay: Duration::from_millis(5),
    };
    for (a, b) in both(&Options::over(network)) {
        let start = Instant::now();
        for _ in 0..4 {
            a.send(vec![0; MAX_MESSAGE]).unwrap();
        }
        let sent = start.elapsed();
        for _ in 0..4 {
            b.recv(&mut vec![0; MAX_MESSAGE]).unwrap();
        }
        let took = start.elapsed();
        assert!(sent < took / 2, "sending must not wait for the network");
        let promised = Duration::from_secs_f64(4.0 * (MAX_MESSAGE * 8) as f64 / 4e8) + network.one_way_delay;
        assert!(
            took >= promised && took < SLACK * promised,
            "{took:?} instead of {promised:?}"
        );
    }
}

#[test]
fn the_first_message_arrives_while_later_ones_travel() {
    let network = Network {
        bits_per_second: 400_000_000,
        one_way_delay: Duration::from_millis(5),
    };
    for (a, b) in both(&Options::over(network)) {
        let start = Instant::now();
        for _ in 0..16 {
            a.send(vec![0; MAX_MESSAGE]).unwrap();
        }
        b.recv(&mut vec![0; MAX_MESSAGE]).unwrap();
        let first = start.elapsed();
        for _ in 0..15 {
            b.recv(&mut vec![0; MAX_MESSAGE]).unwrap();
        }
        assert!(first < start.elapsed() / 2, "{first:?} of {:?}", start.elapsed());
    }
}

#[test]
fn an_abort_does_not_wait_for_the_network() {
    let network = Network {
        bits_per_second: 1_000_000,
        one_way_delay: Duration::from_secs(2),
    };
    for (a, b) in both(&Options::over(network)) {
        for _ in 0..8 {
            a.send(vec![0; MAX_MESSAGE]).unwrap();
        }
        within(Duration::from_secs(3), || a.abort("enough"));
        assert!(
            within(Duration::from_secs(1), || b.recv(&mut [0]))
                .unwrap_err()
                .to_string()
                .contains("enough")
        );
    }
}

#[test]
fn wire_bytes_count_framing_tls_and_packets() {
    assert_eq!(Network::wire_bytes(0), 5 + 22 + 52);
    assert_eq!(Network::wire_bytes(100), 100 + 5 + 22 + 52);
    let long = MAX_MESSAGE as f64;
    let overhead = Network::wire_bytes(MAX_MESSAGE) as f64 / long - 1.0;
    assert!((0.001..0.004).contains(&overhead), "{overhead}");
    assert_eq!(Network::NONE.transmission(MAX_MESSAGE), Duration::ZERO);
    assert_eq!(Network::LAN.transmission(921), Duration::from_micros(8));
}
