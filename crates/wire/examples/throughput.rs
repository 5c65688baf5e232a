//! Measures a link over TLS on loopback (bytes a second, one way and both ways), and the time of a round there
//! and in memory.
//!
//!     cargo run --release -p veiltune-wire --example throughput

use std::{thread, time::Instant};

use veiltune_wire::{
    Identity, Link, MAX_MESSAGE, Options, Result, memory,
    pki::Authority,
    tcp::{self, Listener},
};

const MESSAGES: usize = 4096;
const ROUNDS: usize = 5000;

fn main() -> Result<()> {
    let (client, dealer) = (Identity::new("client")?, Identity::new("dealer")?);
    let (authority, options) = (Authority::new()?, Options::default());
    let listener = Listener::bind("127.0.0.1:0", &authority.issue(&dealer)?, &options)?;
    let address = listener.address().to_string();
    let accepting = thread::spawn(move || listener.accept(&[client]));
    let left = tcp::connect(
        &address,
        &authority.issue(&Identity::new("client")?)?,
        &dealer,
        &options,
    )?;
    let right = accepting.join().expect("no panic")?;
    bulk(&left, &right)?;
    round("tcp", &left, &right)?;
    let (left, right) = memory::pair();
    round("memory", &left, &right)
}

fn bulk(left: &impl Link, right: &impl Link) -> Result<()> {
    let gigabytes = (MESSAGES * MAX_MESSAGE) as f64 / 1e9;
    let start = Instant::now();
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(left));
        receive(right)?;
        sending.join().expect("no panic")
    })?;
    println!(
        "tcp: one way {:.2} GB/s",
        gigabytes / start.elapsed().as_secs_f64()
    );

    let start = Instant::now();
    thread::scope(|scope| {
        let threads = [
            scope.spawn(|| send(left)),
            scope.spawn(|| send(right)),
            scope.spawn(|| receive(left)),
        ];
        receive(right)?;
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    println!(
        "tcp: both ways {:.2} GB/s each",
        gigabytes / start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn round(name: &str, left: &impl Link, right: &impl Link) -> Result<()> {
    for size in [8, 64 << 10] {
        let start = Instant::now();
        thread::scope(|scope| {
            let other = scope.spawn(|| rounds(right, size));
            rounds(left, size)?;
            other.join().expect("no panic")
        })?;
        println!(
            "{name}: round of {size} bytes each way {:.1} us",
            start.elapsed().as_secs_f64() * 1e6 / ROUNDS as f64
        );
    }
    Ok(())
}

fn send(link: &impl Link) -> Result<()> {
    (0..MESSAGES).try_for_each(|i| {
        // Memory for what waits is the caller's: a real one has only as much as its tensors.
        if i % 32 == 0 {
            link.flush()?;
        }
        link.send(vec![i as u8; MAX_MESSAGE])
    })
}

fn receive(link: &impl Link) -> Result<()> {
    let mut buf = vec![0; MAX_MESSAGE];
    (0..MESSAGES).try_for_each(|_| link.recv(&mut buf))
}

fn rounds(link: &impl Link, size: usize) -> Result<()> {
    let mut buf = vec![0; size];
    (0..ROUNDS).try_for_each(|_| {
        link.send(vec![0; size])?;
        link.recv(&mut buf)
    })
}
