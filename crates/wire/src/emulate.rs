//! Emulated networks: a delay line at the sender, which therefore works in one process and across several.
//!
//! The first byte of a message leaves once the line has finished what was sent before; its last byte leaves
//! `size / rate` later; each byte arrives one delay after it left. The size is what real TCP with TLS would
//! put on the wire for the message, see [`Network::wire_bytes`]. A message also takes [`HOST`] to get out of
//! one host and into the other, which loopback does not; what loopback does take is not subtracted. In the
//! same way, encryption and the threads of a link take their real time.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A network between two hosts: rate of each direction and delay one way. Zero rate is unlimited.
///
/// Parses from and prints as `none`, `lan`, `wan`, `secp-lan`, `secp-wan-a`, `secp-wan-b`, or
/// `RATE_MBIT:DELAY_US`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    /// Bits a second in each direction, 0 for unlimited.
    pub bits_per_second: u64,
    /// Time from leaving one host to reaching the other.
    pub one_way_delay: Duration,
}

/// What the way through two real network stacks takes beyond the way through loopback: 20 to 65 us as measured
/// against real TCP between network namespaces that a relay joins (`examples/netlab.rs`). Added to the delay of
/// every emulated network.
pub const HOST: Duration = Duration::from_micros(45);

/// Longest delay: beyond any network, and far below what clocks can hold.
const LONGEST: Duration = Duration::from_secs(3600);

const fn network(mbit: u64, delay_us: u64) -> Network {
    Network {
        bits_per_second: mbit * 1_000_000,
        one_way_delay: Duration::from_micros(delay_us),
    }
}

impl Network {
    /// The network as it is.
    pub const NONE: Network = network(0, 0);
    /// 1 Gbit/s, 0.5 ms each way (the LAN of CryptPEFT).
    pub const LAN: Network = network(1000, 500);
    /// 400 Mbit/s, 4 ms each way (the WAN of CryptPEFT).
    pub const WAN: Network = network(400, 4000);
    /// 3 Gbit/s, 0.4 ms each way (the LAN of SecP-Tuning).
    pub const SECP_LAN: Network = network(3000, 400);
    /// 100 Mbit/s, 40 ms each way (the slower WAN of SecP-Tuning).
    pub const SECP_WAN_A: Network = network(100, 40_000);
    /// 200 Mbit/s, 20 ms each way (the faster WAN of SecP-Tuning).
    pub const SECP_WAN_B: Network = network(200, 20_000);

    const PRESETS: [(&str, Network); 6] = [
        ("none", Network::NONE),
        ("lan", Network::LAN),
        ("wan", Network::WAN),
        ("secp-lan", Network::SECP_LAN),
        ("secp-wan-a", Network::SECP_WAN_A),
        ("secp-wan-b", Network::SECP_WAN_B),
    ];

    /// Whether there is anything to emulate.
    pub fn is_none(&self) -> bool {
        *self == Network::NONE
    }

    /// Bytes on the wire for a message of `payload` bytes: framing (5 a message), TLS 1.3 (22 a record of 16
    /// KiB), TCP and IP with timestamps (52 a packet; packets of 64 KiB, as on loopback and large-segment
    /// hardware; at the 1500 bytes of plain Ethernet it would be 4 % more).
    pub fn wire_bytes(payload: usize) -> usize {
        let framed = payload + 5;
        let encrypted = framed + 22 * framed.div_ceil(16 << 10);
        encrypted + 52 * encrypted.div_ceil(65_483)
    }

    /// Time that a message of `payload` bytes occupies the line.
    pub fn transmission(&self, payload: usize) -> Duration {
        match self.bits_per_second {
            0 => Duration::ZERO,
            rate => {
                let ns = Network::wire_bytes(payload) as u128 * 8_000_000_000 / u128::from(rate);
                Duration::from_nanos(ns as u64)
            }
        }
    }
}

impl FromStr for Network {
    type Err = Error;

    fn from_str(text: &str) -> Result<Network> {
        if let Some((_, preset)) = Network::PRESETS.iter().find(|(name, _)| *name == text) {
            return Ok(*preset);
        }
        let parse = || {
            let (mbit, delay_us) = text.split_once(':')?;
            let mbit = mbit
                .parse::<f64>()
                .ok()
                .filter(|mbit| (0.0..1e9).contains(mbit))?;
            let one_way_delay = Duration::from_micros(delay_us.parse().ok()?);
            let network = Network {
                bits_per_second: (mbit * 1e6).round() as u64,
                one_way_delay,
            };
            (one_way_delay <= LONGEST).then_some(network)
        };
        parse().ok_or_else(|| Error::BadNetwork(crate::error::sanitise(text.as_bytes())))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Network::PRESETS.iter().find(|(_, preset)| preset == self) {
            Some((name, _)) => f.write_str(name),
            None => write!(
                f,
                "{}:{}",
                self.bits_per_second as f64 / 1e6,
                self.one_way_delay.as_micros()
            ),
        }
    }
}

impl TryFrom<String> for Network {
    type Error = Error;

    fn try_from(text: String) -> Result<Network> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> String {
        network.to_string()
    }
}

/// When the bytes of one message arrive.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passage {
    /// When its first byte arrives.
    pub(crate) first: Instant,
    /// When its last byte arrives.
    pub(crate) last: Instant,
}

impl Passage {
    /// When the first `done` of `all` bytes have arrived.
    pub(crate) fn after(&self, done: usize, all: usize) -> Instant {
        if done >= all {
            return self.last;
        }
        self.first + (self.last - self.first).mul_f64(done as f64 / all as f64)
    }
}

/// One direction of an emulated network: remembers until when the line is busy.
#[derive(Debug)]
pub(crate) struct DelayLine {
    network: Network,
    free: Instant,
}

impl DelayLine {
    pub(crate) fn new(network: Network) -> DelayLine {
        DelayLine {
            network,
            free: Instant::now(),
        }
    }

    /// Puts a message on the line now. `None` if there is nothing to emulate.
    pub(crate) fn enter(&mut self, payload: usize) -> Option<Passage> {
        if self.network.is_none() {
            return None;
        }
        let start = self.free.max(Instant::now());
        self.free = start + self.network.transmission(payload);
        let delay = self.network.one_way_delay.min(LONGEST) + HOST;
        Some(Passage {
            first: start + delay,
            last: self.free + delay,
        })
    }
}

/// The last stretch before a moment is spent spinning, because the scheduler wakes threads late by about this
/// much.
pub(crate) const SPIN: Duration = Duration::from_micros(80);

/// Waits for the last stretch before `moment`.
pub(crate) fn spin_until(moment: Instant) {
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
}
