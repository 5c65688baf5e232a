//! What every link does, over memory and over TLS.

mod common;

use std::{
    thread,
    time::{Duration, Instant},
};

use common::*;
use veiltune_wire::{
    Error, Identity, Link, MAX_MESSAGE, Meter, Network, Options, Result,
    fault::{Fault, Faulty},
    handshake::{HELLO_LEN, Hello, handshake},
    tcp::{self, Listener},
};

fn receive(link: &impl Link, len: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0; len];
    link.recv(&mut buf).map(|()| buf)
}

#[test]
fn messages_arrive_in_order_and_are_metered() {
    for (a, b) in both(&Options::default()) {
        let start = a.meter();
        assert_eq!(start, Meter::default());
        let sizes = [0, 1, 5, 16_384, 65_536, 65_537, 300_000, MAX_MESSAGE];
        for (i, &size) in sizes.iter().enumerate() {
            a.send(vec![i as u8; size]).unwrap();
        }
        a.flush().unwrap();
        for (i, &size) in sizes.iter().enumerate() {
            assert_eq!(receive(&b, size).unwrap(), vec![i as u8; size]);
        }
        b.send(vec![1, 2, 3]).unwrap();
        assert_eq!(receive(&a, 3).unwrap(), [1, 2, 3]);
        a.round();

        let total = sizes.iter().sum::<usize>() as u64;
        let count = sizes.len() as u64;
        let expected = Meter {
            sent: total,
            received: 3,
            messages_sent: count,
            messages_received: 1,
            rounds: 1,
        };
        assert_eq!(a.meter() - start, expected);
        let expected = Meter {
            sent: 3,
            received: total,
            messages_sent: 1,
            messages_received: count,
            rounds: 0,
        };
        assert_eq!(b.meter(), expected);
        assert_eq!((a.peer().as_str(), b.peer().as_str()), ("dealer", "client"));
    }
}

#[test]
fn too_long_a_message_is_refused_before_it_is_sent() {
    for (a, b) in both(&Options::default()) {
        let error = a.send(vec![0; MAX_MESSAGE + 1]).unwrap_err();
        assert!(matches!(
            error,
            Error::TooLong {
                got: 1_048_577,
                max: MAX_MESSAGE
            }
        ));
        a.send(vec![7]).unwrap();
        assert_eq!(receive(&b, 1).unwrap(), [7]);
    }
}

#[test]
fn both_sides_may_send_everything_before_they_receive_anything() {
    const MESSAGES: usize = 64;
    for (a, b) in both(&Options::default()) {
        let run = |link: Box<dyn Link>, mine: u8, theirs: u8| {
            for i in 0..MESSAGES {
                link.send(vec![mine ^ i as u8; MAX_MESSAGE]).unwrap();
            }
            for i in 0..MESSAGES {
                assert!(
                    receive(&link, MAX_MESSAGE)
                        .unwrap()
                        .iter()
                        .all(|&byte| byte == theirs ^ i as u8)
                );
            }
            link.close().unwrap();
        };
        let other = thread::spawn(move || run(b, 0x80, 0));
        run(a, 0, 0x80);
        other.join().unwrap();
    }
}

#[test]
fn several_threads_may_use_a_link() {
    for (a, b) in both(&Options::default()) {
        thread::scope(|scope| {
            scope.spawn(|| (0..1000u32).for_each(|i| a.send(i.to_le_bytes().into()).unwrap()));
            scope.spawn(|| (0..1000u32).for_each(|i| assert_eq!(receive(&a, 4).unwrap(), i.to_le_bytes())));
            for i in 0..1000u32 {
                assert_eq!(receive(&b, 4).unwrap(), i.to_le_bytes());
                b.send(i.to_le_bytes().into()).unwrap();
            }
        });
    }
}

#[test]
fn a_slow_receiver_holds_the_sender_back_but_loses_nothing() {
    let options = Options {
        incoming: 1 << 20,
        ..Options::default()
    };
    let (a, b) = tcp_pair(&options);
    for i in 0..48 {
        a.send(vec![i; MAX_MESSAGE]).unwrap();
    }
    thread::sleep(Duration::from_millis(300));
    for i in 0..48 {
        assert_eq!(receive(&b, MAX_MESSAGE).unwrap(), vec![i; MAX_MESSAGE]);
    }
}

#[test]
fn wrong_length_is_an_error_of_the_peer() {
    for (a, b) in both(&Options::default()) {
        a.send(vec![0; 4]).unwrap();
        let error = receive(&b, 8).unwrap_err();
        assert!(
            matches!(&error, Error::WrongLength { expected: 8, got: 4, peer } if peer.as_str() == "client")
        );
    }
}

#[test]
fn an_orderly_end_comes_after_the_last_message() {
    for (a, b) in both(&Options::default()) {
        a.send(vec![1]).unwrap();
        a.close().unwrap();
        a.close().unwrap();
        assert!(matches!(a.send(vec![2]), Err(Error::Closed { .. })));
        assert!(matches!(receive(&a, 1), Err(Error::Closed { .. })));
        assert_eq!(receive(&b, 1).unwrap(), [1]);
        for _ in 0..2 {
            let error = receive(&b, 1).unwrap_err();
            assert!(error.is_orderly_end(), "{error}");
        }
        assert!(matches!(b.send(vec![3]), Err(Error::PeerGone { .. })));
        b.close().unwrap();
    }
}

#[test]
fn a_dropped_link_delivers_what_was_sent() {
    for (a, b) in both(&Options::default()) {
        let sender = thread::spawn(move || {
            for i in 0..20 {
                a.send(vec![i; MAX_MESSAGE]).unwrap();
            }
        });
        for i in 0..20 {
            assert_eq!(receive(&b, MAX_MESSAGE).unwrap(), vec![i; MAX_MESSAGE]);
        }
        assert!(matches!(receive(&b, 1), Err(Error::PeerGone { .. })));
        sender.join().unwrap();
    }
}

#[test]
fn an_abort_overtakes_everything_and_is_explained() {
    for (a, b) in both(&Options::default()) {
        thread::scope(|scope| {
            let waiting = scope.spawn(|| within(Duration::from_secs(4), || receive(&b, 1)));
            thread::sleep(Duration::from_millis(100));
            a.abort("material ran out\u{7}\n");
            let error = waiting.join().unwrap().unwrap_err();
            assert!(
                matches!(&error, Error::PeerAborted { reason, .. } if reason == "material ran out??"),
                "{error}"
            );
        });
        assert!(
            matches!(receive(&b, 1), Err(Error::PeerAborted { .. })),
            "it stays that way"
        );
        assert!(matches!(b.send(vec![]), Err(Error::PeerAborted { .. })));
        assert!(matches!(b.close(), Err(Error::PeerAborted { .. })));
        assert!(matches!(receive(&a, 1), Err(Error::Aborted { .. })));
        assert!(matches!(a.send(vec![]), Err(Error::Aborted { .. })));
    }
}

#[test]
fn an_abort_reaches_a_peer_that_has_not_read_yet() {
    let options = Options {
        incoming: 1 << 20,
        ..Options::default()
    };
    let (a, b) = tcp_pair(&options);
    for _ in 0..32 {
        a.send(vec![0; MAX_MESSAGE]).unwrap();
    }
    thread::sleep(Duration::from_millis(200));
    thread::scope(|scope| {
        scope.spawn(|| within(Duration::from_secs(8), || a.abort(&"x".repeat(1000))));
        let error = loop {
            match receive(&b, MAX_MESSAGE) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            matches!(&error, Error::PeerAborted { reason, .. } if reason.len() == 256),
            "{error}"
        );
    });
}

#[test]
fn a_panic_aborts() {
    for (a, b) in both(&Options::default()) {
        let panicking = thread::spawn(move || {
            let _link = a;
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        let error = within(Duration::from_secs(5), || receive(&b, 1)).unwrap_err();
        assert!(matches!(&error, Error::PeerAborted { .. }), "{error}");
        assert!(panicking.join().is_err());
    }
}

#[test]
fn a_peer_that_says_nothing_is_silent() {
    let options = Options {
        patience: Duration::from_millis(200),
        ..Options::default()
    };
    for (a, _b) in both(&options) {
        let start = Instant::now();
        let error = within(Duration::from_secs(5), || receive(&a, 1)).unwrap_err();
        assert!(start.elapsed() >= options.patience);
        assert!(matches!(error, Error::Silent { waited, .. } if waited >= options.patience));
    }
}

#[test]
fn a_peer_that_computes_is_not_silent() {
    let options = Options {
        idle: Duration::from_secs(1),
        ..hasty()
    };
    let (a, b) = tcp_pair(&options);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(options.idle * 2);
            b.send(vec![1]).unwrap();
        });
        assert_eq!(receive(&a, 1).unwrap(), [1]);
    });
}

#[test]
fn several_parties_call_one_listener_early_or_late() {
    let options = hasty();
    // Reserves a port, so that one caller can start before the listener.
    let address = Listener::bind("127.0.0.1:0", &credentials("dealer"), &options)
        .unwrap()
        .address()
        .to_string();
    thread::scope(|scope| {
        let call = |name: &'static str, delay: u64| {
            let (address, options) = (address.clone(), options.clone());
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(delay));
                let link = tcp::connect(&address, &credentials(name), &id("dealer"), &options).unwrap();
                link.send(name.into()).unwrap();
                link.close().unwrap();
            });
        };
        call("provider", 0);
        call("client", 600);
        thread::sleep(Duration::from_millis(200));
        let listener = Listener::bind(&address, &credentials("dealer"), &options).unwrap();
        for name in ["provider", "client"] {
            let link = listener.accept(&[id("client"), id("provider")]).unwrap();
            assert_eq!(link.peer().as_str(), name);
            assert_eq!(receive(&link, name.len()).unwrap(), name.as_bytes());
        }
    });
}

#[test]
fn faults_are_injected_where_asked() {
    let run = |fault: Fault| {
        let (a, b) = memory_pair(&Options {
            patience: Duration::from_millis(50),
            ..Options::default()
        });
        let a = Faulty::new(a, fault, 1);
        for i in 0..3u8 {
            let _ = a.send(vec![i; 3]);
        }
        let received: Vec<_> = (0..4).map(|_| receive(&b, 3)).collect();
        drop(a);
        received
    };
    let bytes = |results: &[Result<Vec<u8>>]| -> Vec<Option<[u8; 3]>> {
        results
            .iter()
            .map(|result| result.as_ref().ok().map(|bytes| bytes[..].try_into().unwrap()))
            .collect()
    };
    let [zero, one, two] = [0, 1, 2].map(|i| Some([i; 3]));
    assert_eq!(bytes(&run(Fault::Corrupt)), [zero, Some([1, 0, 1]), two, None]);
    assert_eq!(bytes(&run(Fault::Drop)), [zero, two, None, None]);
    assert_eq!(bytes(&run(Fault::Duplicate)), [zero, one, one, two]);
    assert!(matches!(
        run(Fault::Truncate)[1],
        Err(Error::WrongLength { got: 2, .. })
    ));
    assert!(matches!(
        run(Fault::Extend)[1],
        Err(Error::WrongLength { got: 4, .. })
    ));
    assert!(matches!(run(Fault::Close)[1], Err(Error::PeerGone { .. })));
    assert!(matches!(run(Fault::Abort)[0], Err(Error::PeerAborted { .. })));
}

fn hello(role: &str) -> Hello {
    Hello::new([7; 16], id(role), [9; 32], "network=lan")
}

/// Runs the handshake with the client's greeting changed by `change`; what both sides make of it.
fn greet(change: impl Fn(&mut Hello)) -> Vec<[Result<()>; 2]> {
    let pairs = both(&Options::default());
    pairs
        .into_iter()
        .map(|(client, dealer)| {
            let mut mine = hello("client");
            change(&mut mine);
            thread::scope(|scope| {
                // A caller who gives up loudly must not hide the reason from the other side.
                let other = scope.spawn(move || {
                    let result = handshake(&dealer, &hello("dealer"), &id("client"));
                    result.inspect_err(|error| dealer.abort(&error.to_string()))
                });
                let result = within(Duration::from_secs(5), || {
                    handshake(&client, &mine, &id("dealer"))
                });
                [result, other.join().unwrap()]
            })
        })
        .collect()
}

#[test]
fn equal_greetings_agree() {
    for results in greet(|_| {}) {
        assert!(matches!(results, [Ok(()), Ok(())]));
    }
}

/// Both sides must fail with the variant, and name both values.
macro_rules! assert_mismatch {
    ($change:expr, $variant:ident, $ours:literal, $theirs:literal) => {
        for results in greet($change) {
            for result in results {
                let error = result.unwrap_err();
                assert!(matches!(error, Error::$variant { .. }), "{error}");
                let text = error.to_string();
                assert!(text.contains($ours) && text.contains($theirs), "{text}");
            }
        }
    };
}

#[test]
fn each_mismatch_has_its_own_error_on_both_sides() {
    assert_mismatch!(|hello| hello.version = 99, VersionMismatch, "3", "99");
    assert_mismatch!(
        |hello| hello.session[15] = 8,
        SessionMismatch,
        "0707070707070707",
        "070708"
    );
    assert_mismatch!(|hello| hello.program[0] = 0, ProgramMismatch, "0909", "0009");
    assert_mismatch!(
        |hello| hello.configuration = "network=wan".into(),
        ConfigurationMismatch,
        "network=lan",
        "wan"
    );
    assert_mismatch!(
        |hello| hello.configuration.clear(),
        ConfigurationMismatch,
        "network=lan",
        "''"
    );
}

#[test]
fn a_wrong_role_is_seen_by_the_side_that_needs_another() {
    for [client, dealer] in greet(|hello| hello.role = id("provider")) {
        assert!(client.is_ok(), "the dealer does play the dealer");
        let error = dealer.unwrap_err();
        assert!(
            matches!(&error, Error::RoleMismatch { expected, theirs, .. } if expected == "client" && theirs == "provider")
        );
    }
}

#[test]
fn a_greeting_that_is_none_is_refused() {
    for (a, b) in both(&Options::default()) {
        a.send(vec![0xff; HELLO_LEN]).unwrap();
        assert!(matches!(
            handshake(&b, &hello("dealer"), &id("client")),
            Err(Error::BadGreeting { .. })
        ));
    }
    for (a, b) in both(&Options::default()) {
        a.send(vec![0; 10]).unwrap();
        assert!(matches!(
            handshake(&b, &hello("dealer"), &id("client")),
            Err(Error::WrongLength { .. })
        ));
    }
    let (a, _b) = memory_pair(&Options::default());
    let long = Hello::new([0; 16], id("client"), [0; 32], "x".repeat(257));
    assert!(matches!(
        handshake(&a, &long, &id("dealer")),
        Err(Error::BadHello { got: 257, .. })
    ));
}

#[test]
fn names_and_networks_are_checked() {
    for good in ["a", "client", "party-0", &"x".repeat(63)] {
        assert_eq!(Identity::new(good).unwrap().as_str(), good);
    }
    for bad in ["", "-a", "a-", "A", "a.b", "a_b", "é", &"x".repeat(64)] {
        assert!(matches!(Identity::new(bad), Err(Error::BadName(_))), "{bad}");
    }
    for name in [
        "none",
        "lan",
        "wan",
        "secp-lan",
        "secp-wan-a",
        "secp-wan-b",
        "250:1500",
        "0.5:10",
    ] {
        let network: Network = name.parse().unwrap();
        assert_eq!(network.to_string(), name);
        let json = serde_json::to_string(&network).unwrap();
        assert_eq!(json, format!("{name:?}"));
        assert_eq!(serde_json::from_str::<Network>(&json).unwrap(), network);
    }
    assert_eq!("1000:500".parse::<Network>().unwrap(), Network::LAN);
    for bad in [
        "",
        "LAN",
        "1000",
        "1000:",
        ":5",
        "-1:5",
        "1:2:3",
        "99999999999999999999:1",
        "1:3600000001",
        "NaN:1",
        "inf:1",
    ] {
        assert!(
            matches!(bad.parse::<Network>(), Err(Error::BadNetwork(_))),
            "{bad}"
        );
    }
}
