//! Links for tests.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    net::SocketAddr,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use veiltune_wire::{
    Identity, Link, Options, Result,
    memory::{self, MemoryLink},
    pki::{Authority, Credentials},
    tcp::{self, Listener, TcpLink},
};

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| Authority::new().unwrap());

pub fn id(name: &str) -> Identity {
    Identity::new(name).unwrap()
}

/// Credentials from the authority of these tests.
pub fn credentials(name: &str) -> Credentials {
    AUTHORITY.issue(&id(name)).unwrap()
}

/// Limits short enough for tests of what happens at their end.
pub fn hasty() -> Options {
    Options {
        idle: Duration::from_millis(600),
        patience: Duration::from_secs(5),
        connect: Duration::from_secs(2),
        handshake: Duration::from_millis(1200),
        ..Options::default()
    }
}

/// The listening side, called `dealer`, in a thread of its own; and its address.
pub fn listen(options: &Options) -> (thread::JoinHandle<Result<TcpLink>>, SocketAddr) {
    let listener = Listener::bind("127.0.0.1:0", &credentials("dealer"), options).unwrap();
    let address = listener.address();
    (thread::spawn(move || listener.accept(&[id("client")])), address)
}

/// A link over TLS from `client` to `dealer`: the client's end first.
pub fn tcp_pair(options: &Options) -> (TcpLink, TcpLink) {
    let (dealer, address) = listen(options);
    let client = tcp::connect(
        &address.to_string(),
        &credentials("client"),
        &id("dealer"),
        options,
    )
    .unwrap();
    (client, dealer.join().unwrap().unwrap())
}

/// The same in memory.
pub fn memory_pair(options: &Options) -> (MemoryLink, MemoryLink) {
    memory::pair_with(&id("client"), &id("dealer"), options)
}

/// Both kinds of links, to run one test on each.
pub fn both(options: &Options) -> [(Box<dyn Link>, Box<dyn Link>); 2] {
    let (a, b) = memory_pair(options);
    let (c, d) = tcp_pair(options);
    [(Box::new(a), Box::new(b)), (Box::new(c), Box::new(d))]
}

/// Runs `work`, which must be over within `limit`.
pub fn within<T>(limit: Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    let took = start.elapsed();
    assert!(took < limit, "took {took:?}, allowed are {limit:?}");
    result
}
