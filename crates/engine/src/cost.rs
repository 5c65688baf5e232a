//! Exact cost of a program: rounds, bytes each way, dealer bytes, split by operation, and an estimate of seconds.

use std::collections::BTreeMap;

use serde::Serialize;
use veiltune_wire::Network;

/// Name of an operation in the tables.
pub type Operation = &'static str;

/// Cost of one operation, or of a whole program. Bytes are payload; framing and TLS are not counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Sequential exchanges between the parties.
    pub rounds: u64,
    /// Bytes sent by the first and by the second party.
    pub online_bytes: [u64; 2],
    /// Bytes that the dealer sends to the first and to the second party.
    pub dealer_bytes: [u64; 2],
    /// Multiply-adds of each party's online phase.
    pub macs: [u64; 2],
}

impl Cost {
    fn add(&mut self, other: &Cost) {
        self.rounds += other.rounds;
        for i in 0..2 {
            self.online_bytes[i] += other.online_bytes[i];
            self.dealer_bytes[i] += other.dealer_bytes[i];
            self.macs[i] += other.macs[i];
        }
    }

    /// Seconds of the online phase on the wire: a latency a round, plus the busier direction's bytes at the
    /// network's rate. Computation is not included.
    pub fn network_seconds(&self, network: &Network) -> f64 {
        let busier = self.online_bytes[0].max(self.online_bytes[1]);
        self.rounds as f64 * network.one_way_delay.as_secs_f64()
            + network
                .transmission(usize::try_from(busier).unwrap_or(usize::MAX))
                .as_secs_f64()
    }
}

/// A running count.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// Parameter bytes sent by each party when the session was set up.
    pub setup_bytes: [u64; 2],
    operations: BTreeMap<Operation, Cost>,
}

impl Tally {
    /// Everything but the set-up.
    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        self.operations.values().for_each(|c| total.add(c));
        total
    }

    /// By operation.
    pub fn operations(&self) -> impl Iterator<Item = (Operation, &Cost)> {
        self.operations.iter().map(|(k, v)| (*k, v))
    }

    pub(crate) fn setup(&mut self, bytes: [u64; 2]) {
        self.setup_bytes
            .iter_mut()
            .zip(bytes)
            .for_each(|(sum, b)| *sum += b);
    }

    pub(crate) fn exchanged(&mut self, operation: Operation, online_bytes: [u64; 2]) {
        if online_bytes != [0, 0] {
            self.entry(operation).add(&Cost {
                rounds: 1,
                online_bytes,
                ..Cost::default()
            });
        }
    }

    pub(crate) fn dealt(&mut self, operation: Operation, dealer_bytes: [u64; 2]) {
        self.entry(operation).add(&Cost {
            dealer_bytes,
            ..Cost::default()
        });
    }

    pub(crate) fn computed(&mut self, operation: Operation, macs: [u64; 2]) {
        self.entry(operation).add(&Cost {
            macs,
            ..Cost::default()
        });
    }

    fn entry(&mut self, operation: Operation) -> &mut Cost {
        self.operations.entry(operation).or_default()
    }
}
