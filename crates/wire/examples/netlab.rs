//! Times rounds and bulk transfers between two processes, to compare an emulated network with a real one.
//!
//!     netlab keys DIR
//!     netlab listen DIR ADDRESS NETWORK
//!     netlab call DIR ADDRESS NETWORK
//!
//! Run `listen` and `call` with the same NETWORK: over loopback with `lan`, say, and over a real network of
//! the same rate and delay with `none`. The caller prints one line a measurement: its name, and milliseconds
//! (the mean, because two sides that send and receive in turns may be out of step, so that single rounds
//! differ).

use std::{env, process::ExitCode, time::Instant};

use veiltune_wire::{
    Identity, Link, MAX_MESSAGE, Options, Result,
    pki::{Authority, Credentials},
    tcp::{self, Listener},
};

/// A measurement: its name, how many messages the caller and the listener send each time, of how many bytes,
/// how many times.
struct Measurement(&'static str, Order, usize, usize, usize, usize);

#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// Both sides send, then receive: a round of a protocol.
    Together,
    /// The listener sends once it has received.
    InTurn,
}

const MEASUREMENTS: [Measurement; 10] = [
    Measurement("ping 8 B", Order::InTurn, 1, 1, 8, 100),
    Measurement("ping 64 KiB", Order::InTurn, 1, 1, 64 << 10, 50),
    Measurement("ping 1 MiB", Order::InTurn, 1, 1, MAX_MESSAGE, 10),
    Measurement("round 8 B", Order::Together, 1, 1, 8, 100),
    Measurement("round 64 KiB", Order::Together, 1, 1, 64 << 10, 50),
    Measurement("round 1 MiB", Order::Together, 1, 1, MAX_MESSAGE, 10),
    Measurement("round 1 MiB in 64 KiB", Order::Together, 16, 16, 64 << 10, 10),
    Measurement("bulk 32 MiB there", Order::InTurn, 32, 1, MAX_MESSAGE, 3),
    Measurement("bulk 32 MiB back", Order::InTurn, 1, 32, MAX_MESSAGE, 3),
    Measurement("bulk 32 MiB both ways", Order::Together, 32, 32, MAX_MESSAGE, 3),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netlab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    let [caller, listener] = [Identity::new("caller")?, Identity::new("listener")?];
    match *arguments {
        ["keys", directory] => {
            let authority = Authority::new()?;
            [caller, listener]
                .iter()
                .try_for_each(|who| authority.issue(who)?.save(directory))
        }
        ["listen", directory, address, network] => {
            let options = Options::over(network.parse()?);
            let credentials = Credentials::load(directory, &listener)?;
            let link = Listener::bind(address, &credentials, &options)?.accept(&[caller])?;
            for Measurement(_, order, theirs, mine, size, times) in MEASUREMENTS {
                for _ in 0..times {
                    if order == Order::Together {
                        send(&link, mine, size)?;
                    }
                    receive(&link, theirs, size)?;
                    if order == Order::InTurn {
                        send(&link, mine, size)?;
                    }
                }
            }
            link.close()
        }
        ["call", directory, address, network] => {
            let options = Options::over(network.parse()?);
            let credentials = Credentials::load(directory, &caller)?;
            let link = tcp::connect(address, &credentials, &listener, &options)?;
            for Measurement(name, _, mine, theirs, size, times) in MEASUREMENTS {
                let start = Instant::now();
                for _ in 0..times {
                    send(&link, mine, size)?;
                    receive(&link, theirs, size)?;
                }
                println!(
                    "{name:24} {:9.3}",
                    start.elapsed().as_secs_f64() * 1e3 / times as f64
                );
            }
            link.close()
        }
        _ => {
            eprintln!("usage: netlab keys DIR | netlab listen|call DIR ADDRESS NETWORK");
            Ok(())
        }
    }
}

fn send(link: &impl Link, messages: usize, size: usize) -> Result<()> {
    (0..messages).try_for_each(|_| link.send(vec![0; size]))
}

fn receive(link: &impl Link, messages: usize, size: usize) -> Result<()> {
    let mut buf = vec![0; size];
    (0..messages).try_for_each(|_| link.recv(&mut buf))
}
