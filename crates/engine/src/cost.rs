//! Exact cost of a program: rounds, bytes each way, dealer bytes, split by operation and by layer, and estimates of seconds
//! and of memory.

use std::collections::BTreeMap;

use serde::Serialize;
use veiltune_wire::Network;

use crate::Party;
use crate::material::QUEUED;

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

/// Gates after each other whose material [`Memory`] knows the sums of: more than a preparation runs ahead.
pub const GATES: usize = 16;

/// Bytes of a session's tensors and material, counted by the walk: what is alive at once, from where a program makes a tensor
/// to where it drops it. An upper estimate, because tensors that share their elements (a tensor and its reshaped view)
/// count each, and because a gate's temporaries are taken as twice the largest tensor. The parties' link buffers and the
/// program's own values (weights as floats) are not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Shares, masks and openings at each party, of parameters and activations, at the peak.
    pub tensors: [u64; 2],
    /// Masks of each party while material is made, at the peak: at that party, and at the dealer, who makes both and keeps
    /// some more, counted with the first.
    pub masks: [u64; 2],
    /// Material of all passes, at either party.
    pub material: u64,
    /// Material of so many gates after each other as the index says, and one more, where they need most.
    pub gates: [u64; GATES],
    /// Values dealt at once, at most. The dealer makes keys in small batches.
    pub largest_deal: u64,
    /// The largest tensor.
    pub largest_tensor: u64,
}

impl Memory {
    /// Peak at a party whose preparation runs `ahead` gates ahead (None: all of them).
    pub fn party(&self, party: Party, ahead: Option<usize>) -> u64 {
        let i = party.index();
        // Beside those that wait, one gate is being prepared and one is in use.
        let material = ahead
            .and_then(|n| self.gates.get(n + 1))
            .unwrap_or(&self.material);
        self.tensors[i] + self.masks[i] + material + 2 * self.largest_tensor
    }

    /// Peak at the dealer, who keeps masks, and streams what it makes of them to either party.
    pub fn dealer(&self) -> u64 {
        let queued = self.material.min(QUEUED as u64);
        self.masks[0] + self.masks[1] + 2 * (self.largest_deal + self.largest_tensor + queued)
    }
}

/// Bytes between each party and the outside owners; one of a pair of shares may be expanded from a seed instead of sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OutsideBytes {
    /// Shares of parameters, once a session.
    pub parameters: u64,
    /// Shares of inputs.
    pub inputs: u64,
    /// Shares of outputs.
    pub outputs: u64,
}

/// A running count.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// Parameter bytes sent by each party when the session was set up.
    pub setup_bytes: [u64; 2],
    /// What the session holds at once.
    pub memory: Memory,
    /// Between each party and the outside owners.
    pub outside: OutsideBytes,
    operations: BTreeMap<Operation, Cost>,
    layers: Vec<(String, Cost)>,
    /// The layer that is being counted; None before the first.
    #[serde(skip)]
    layer: Option<usize>,
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

    /// By layer, in the order in which they were first met; what came before the first is in a layer without a name. Their
    /// sum is the total.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &Cost)> {
        self.layers.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// What follows belongs to the layer `name`.
    pub(crate) fn enter(&mut self, name: &str) {
        let at = self.layers.iter().position(|(known, _)| known == name);
        self.layer = Some(at.unwrap_or_else(|| {
            self.layers.push((name.to_owned(), Cost::default()));
            self.layers.len() - 1
        }));
    }

    pub(crate) fn setup(&mut self, bytes: [u64; 2]) {
        self.setup_bytes
            .iter_mut()
            .zip(bytes)
            .for_each(|(sum, b)| *sum += b);
    }

    pub(crate) fn exchanged(&mut self, operation: Operation, online_bytes: [u64; 2]) {
        if online_bytes != [0, 0] {
            self.count(
                operation,
                &Cost {
                    rounds: 1,
                    online_bytes,
                    ..Cost::default()
                },
            );
        }
    }

    pub(crate) fn dealt(&mut self, operation: Operation, dealer_bytes: [u64; 2]) {
        self.count(
            operation,
            &Cost {
                dealer_bytes,
                ..Cost::default()
            },
        );
    }

    pub(crate) fn computed(&mut self, operation: Operation, macs: [u64; 2]) {
        self.count(
            operation,
            &Cost {
                macs,
                ..Cost::default()
            },
        );
    }

    fn count(&mut self, operation: Operation, cost: &Cost) {
        self.operations.entry(operation).or_default().add(cost);
        if self.layer.is_none() {
            self.enter("");
        }
        if let Some(layer) = self.layer {
            self.layers[layer].1.add(cost);
        }
    }
}
