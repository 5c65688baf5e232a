//! The offline walk of a program: masks and shapes only, no data.
//!
//! One interpreter serves four roles. The **dealer** knows both masks and emits corrections; a **party** expands
//! its own masks and takes corrections from its material; the **cost** model counts what the others do. A gate
//! states its correlated randomness once ([`Offline::correlate`], [`Offline::keys`]), so they cannot disagree.

use std::cell::{Cell, Ref, RefCell};
#[cfg(debug_assertions)]
use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Ring, pack};

use crate::cost::{GATES, Memory, Operation, Tally};
use crate::gates::{self, Gates, Local, Meta, Product, SCALE};
use crate::material::{Dealt, Material, ParameterStore, Queue, Sink, Source};
use crate::opening::{BOTH, Carry, GateId, Learners, Opening, PARAMETER_GATES, holds};
use crate::protocols::{
    self,
    carried::{self, OffCarried},
    coarse_max::{self, CoarseMax},
    compare::{Comparison, Want},
    lines::{self, Lines},
    trigonometric::{self, Form},
    truncate::Mode,
};
use crate::series::Series;
use crate::{Error, Owner, Party, Result, Revealed};

/// See the module.
pub struct Offline {
    role: Role,
    comparison: Comparison,
    next_gate: Cell<GateId>,
    next_parameter: Cell<GateId>,
    tally: RefCell<Tally>,
    program: RefCell<Sha256>,
    material: RefCell<Material>,
    live: Rc<Live>,
    /// Bytes of the current gate's material, as a party holds it.
    gate_bytes: Cell<u64>,
    #[cfg(debug_assertions)]
    drawn: RefCell<HashSet<(GateId, u16)>>,
}

/// Keys that are generated and sent at a time: they stay in the cache. A multiple of 64, so that packed bits align.
const KEY_BATCH: usize = 4096;

/// Values that are dealt at a time: they stay in the cache. A multiple of 64.
const DEAL_BATCH: usize = 1 << 14;

enum Role {
    Count,
    Dealer {
        seeds: [Seed; 2],
        sinks: RefCell<[Box<dyn Sink>; 2]>,
    },
    Party {
        party: Party,
        seed: Seed,
        source: RefCell<Box<dyn Source>>,
        queue: Queue,
        parameters: Arc<ParameterStore>,
    },
}

/// A tensor of the offline walk: shape, and masks once it is opened.
#[derive(Clone)]
pub struct OffTensor(Rc<Inner>);

struct Inner {
    meta: Meta,
    cell: RefCell<MaskCell>,
    /// Where this tensor is counted as alive, and the bytes that it holds: at each party, and of each party's masks.
    live: Rc<Live>,
    held: Cell<[[u64; 2]; 2]>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let (now, held) = (self.live.now.get(), self.held.get());
        self.live
            .now
            .set([0, 1].map(|kind| [0, 1].map(|i| now[kind][i] - held[kind][i])));
    }
}

/// Bytes of the tensors that are alive, as the parties and the dealer hold them; see [`Memory`].
#[derive(Default)]
struct Live {
    now: Cell<[[u64; 2]; 2]>,
    memory: Cell<Memory>,
    /// Material of the last gates, the latest first.
    gates: Cell<[u64; GATES]>,
}

impl Live {
    /// `x` holds more: shares and openings at each party, masks of each party.
    fn hold(&self, x: &Inner, more: [[u64; 2]; 2]) {
        let sum = |a: [[u64; 2]; 2]| [0, 1].map(|kind| [0, 1].map(|i| a[kind][i] + more[kind][i]));
        x.held.set(sum(x.held.get()));
        let now = sum(self.now.get());
        self.now.set(now);
        let mut memory = self.memory.get();
        let [tensors, masks] = now;
        memory.tensors = [0, 1].map(|i| memory.tensors[i].max(tensors[i]));
        memory.masks = [0, 1].map(|i| memory.masks[i].max(masks[i]));
        memory.largest_tensor = memory.largest_tensor.max(8 * x.meta.len() as u64);
        self.memory.set(memory);
    }

    /// Values are dealt.
    fn deal(&self, bytes: u64) {
        let mut memory = self.memory.get();
        memory.largest_deal = memory.largest_deal.max(bytes);
        self.memory.set(memory);
    }

    /// A gate's material is complete.
    fn material(&self, bytes: u64) {
        let mut memory = self.memory.get();
        memory.material += bytes;
        let mut gates = self.gates.get();
        gates.rotate_right(1);
        gates[0] = bytes;
        self.gates.set(gates);
        let mut sum = 0;
        for (most, bytes) in memory.gates.iter_mut().zip(gates) {
            sum += bytes;
            *most = sum.max(*most);
        }
        self.memory.set(memory);
    }
}

struct MaskCell {
    opening: Opening,
    /// Mask of party i where this role knows it and it is not trivial.
    mask: [Option<Ring>; 2],
    /// Of a parameter: its masks are expanded anew wherever they are wanted, because models are large.
    redrawn: bool,
    /// At a party, for a session-long parameter: the masked value.
    masked: Option<Ring>,
    is_parameter: bool,
    /// Of a truncated value, or a sum of such.
    carried: Option<Rc<OffCarried>>,
    /// Of a truncated value.
    cut: Option<OffCut>,
}

/// How a [truncated](crate::protocols::truncate) value is masked when it is opened.
#[derive(Clone)]
pub(crate) struct OffCut {
    pub left: Carry,
    /// By how much the value was multiplied since, as a shift.
    pub shift: u32,
    /// What was dealt, and the first party's share of it: under which stream, of how many bits and with how many zeros.
    pub stream: (GateId, u16),
    pub bits: u32,
    /// What was dealt at the dealer, a party's share of it there.
    pub dealt: Option<Ring>,
}

impl OffCut {
    fn after(&self, map: &Local) -> Result<Option<OffCut>> {
        let Some(left) = self.left.after(map) else {
            return Ok(None);
        };
        let mut out = self.clone();
        out.left = left;
        match map {
            Local::Refine(more) => out.shift += more,
            _ => out.dealt = out.dealt.map(|d| map.apply(&d)).transpose()?,
        }
        Ok(Some(out))
    }
}

impl Offline {
    /// Counts cost and hashes the program.
    pub(crate) fn count(comparison: Comparison) -> Offline {
        Offline::new(Role::Count, comparison)
    }

    /// The dealer's walk.
    pub(crate) fn dealer(comparison: Comparison, seeds: [Seed; 2], sinks: [Box<dyn Sink>; 2]) -> Offline {
        Offline::new(
            Role::Dealer {
                seeds,
                sinks: RefCell::new(sinks),
            },
            comparison,
        )
    }

    /// A party's preparing walk.
    pub(crate) fn party(
        comparison: Comparison,
        party: Party,
        seed: Seed,
        source: Box<dyn Source>,
        queue: Queue,
        parameters: Arc<ParameterStore>,
    ) -> Offline {
        Offline::new(
            Role::Party {
                party,
                seed,
                source: RefCell::new(source),
                queue,
                parameters,
            },
            comparison,
        )
    }

    fn new(role: Role, comparison: Comparison) -> Offline {
        Offline {
            role,
            comparison,
            next_gate: Cell::new(0),
            next_parameter: Cell::new(PARAMETER_GATES),
            tally: RefCell::default(),
            program: RefCell::new(Sha256::new()),
            material: RefCell::default(),
            live: Rc::default(),
            gate_bytes: Cell::new(0),
            #[cfg(debug_assertions)]
            drawn: RefCell::default(),
        }
    }

    /// What was counted so far.
    pub fn tally(&self) -> Ref<'_, Tally> {
        self.tally.borrow()
    }

    /// What the session holds at once, as far as the walk has come.
    pub fn memory(&self) -> Memory {
        self.live.memory.get()
    }

    /// Hash of every gate, shape and public constant so far.
    pub fn program_hash(&self) -> [u8; 32] {
        self.program.borrow().clone().finalize().into()
    }

    /// Everything was dealt.
    pub(crate) fn finish(&self) -> Result<()> {
        if let Role::Dealer { sinks, .. } = &self.role {
            for sink in sinks.borrow_mut().iter_mut() {
                sink.finish()?;
            }
        }
        Ok(())
    }

    // ---- for the protocols ----

    /// How this program compares.
    pub(crate) fn comparison(&self) -> Comparison {
        self.comparison
    }

    /// Notes that a stream of randomness is drawn from, in every role's walk; debug builds refuse a second time.
    pub(crate) fn claim(&self, stream: (GateId, u16)) {
        #[cfg(debug_assertions)]
        assert!(
            self.drawn.borrow_mut().insert(stream),
            "the randomness of gate and slot {stream:?} would serve twice"
        );
        #[cfg(not(debug_assertions))]
        let _ = stream;
    }

    /// Starts a gate: its number, under which its randomness is expanded.
    pub(crate) fn gate(&self, name: &'static str, detail: &[u8]) -> GateId {
        let id = self.next_gate.get();
        self.next_gate.set(id + 1);
        self.material.borrow_mut().gate = id;
        self.record(name, detail);
        id
    }

    /// Ends a gate: its material goes to the online walk.
    pub(crate) fn end_gate(&self) -> Result<()> {
        let material = self.material.take();
        self.live.material(self.gate_bytes.take());
        match &self.role {
            Role::Party { queue, .. } => queue.push(material),
            _ => Ok(()),
        }
    }

    /// Fresh tensor.
    pub(crate) fn tensor(&self, meta: Meta) -> OffTensor {
        let cell = MaskCell {
            opening: Opening::new(meta.owner),
            mask: [None, None],
            redrawn: false,
            masked: None,
            is_parameter: false,
            carried: None,
            cut: None,
        };
        let x = OffTensor(Rc::new(Inner {
            meta,
            cell: RefCell::new(cell),
            live: self.live.clone(),
            held: Cell::default(),
        }));
        let (meta, size) = (&x.0.meta, 8 * x.0.meta.len() as u64);
        let has = |i| meta.owner == Owner::Public || holds(meta.owner, i);
        self.live
            .hold(&x.0, [[0, 1].map(|i| if has(i) { size } else { 0 }), [0; 2]]);
        x
    }

    /// `x` is opened, as far as `sends` says: who receives keeps the piece and the sum, who holds a share its mask.
    fn hold_opening(&self, x: &OffTensor, sends: [bool; 2], first: bool) {
        let size = 8 * x.0.meta.len() as u64;
        let mask = [0, 1].map(|i| {
            if first && holds(x.0.meta.owner, i) {
                size
            } else {
                0
            }
        });
        let pieces = [0, 1].map(|i| mask[i] + if sends[1 - i] { 2 * size } else { 0 });
        self.live.hold(&x.0, [pieces, mask]);
    }

    /// Whether this role is the dealer: only then is it worth computing with masks.
    pub(crate) fn is_dealer(&self) -> bool {
        matches!(self.role, Role::Dealer { .. })
    }

    /// The party whose walk this is.
    pub(crate) fn party_role(&self) -> Option<Party> {
        match &self.role {
            Role::Party { party, .. } => Some(*party),
            _ => None,
        }
    }

    /// Mask of `x` held by party `i`, at a role that knows it (None also if the party holds nothing).
    pub(crate) fn mask_of(&self, x: &OffTensor, i: usize) -> Option<Ring> {
        let cell = x.0.cell.borrow();
        match cell.opening.id {
            Some(id) if cell.redrawn => self.draw(id, &x.0.meta, i),
            _ => cell.mask[i].clone(),
        }
    }

    /// The dealer's view of the whole mask r0 + r1.
    pub(crate) fn mask(&self, x: &OffTensor) -> Result<Ring> {
        Ok(match [0, 1].map(|i| self.mask_of(x, i)) {
            [Some(mut a), Some(b)] => {
                a.add_assign(&b)?;
                a
            }
            [Some(a), None] | [None, Some(a)] => a,
            [None, None] => Ring::zeros(x.0.meta.dims.clone()),
        })
    }

    /// The mask of party `i` under `id`, where it holds one and this role knows it.
    fn draw(&self, id: GateId, meta: &Meta, i: usize) -> Option<Ring> {
        let seed = holds(meta.owner, i).then(|| self.seed_of(i)).flatten()?;
        Some(gates::floor_to(
            Prg::new(seed, id, 0).ring(meta.dims.clone()),
            meta.zeros,
        ))
    }

    /// The masked value of a session-long parameter, at a party that knows it.
    pub(crate) fn masked_parameter(&self, x: &OffTensor) -> Option<Ring> {
        x.0.cell.borrow().masked.clone()
    }

    /// Whether `x` is a parameter that was opened at set-up, so that products with its masked value can be prepared.
    pub(crate) fn is_parameter(&self, x: &OffTensor) -> bool {
        x.0.cell.borrow().is_parameter
    }

    /// Whether both parties know the masked value of `x` (or will, by what was requested so far).
    pub(crate) fn is_open(&self, x: &OffTensor) -> bool {
        x.0.cell.borrow().opening.is_full()
    }

    /// How `x` is known up to dealt values, if it was truncated to be.
    pub(crate) fn carried(&self, x: &OffTensor) -> Option<Rc<OffCarried>> {
        x.0.cell.borrow().carried.clone()
    }

    /// A new tensor that is known up to dealt values.
    pub(crate) fn carrying(&self, meta: Meta, carried: OffCarried) -> OffTensor {
        let x = self.tensor(meta);
        let (public, dealt) = carried.bytes(x.0.meta.len());
        self.live.hold(&x.0, [[public; 2], [dealt, 0]]);
        x.0.cell.borrow_mut().carried = Some(Rc::new(carried));
        x
    }

    /// A new tensor that is public but for a carry and what was dealt.
    pub(crate) fn truncated(&self, meta: Meta, cut: OffCut) -> OffTensor {
        let x = self.tensor(meta);
        self.hold_cut(&x);
        x.0.cell.borrow_mut().cut = Some(cut);
        x
    }

    /// `x` is known but for a carry: each party keeps what is public and its share of the carry, and before that what was dealt.
    fn hold_cut(&self, x: &OffTensor) {
        let size = 8 * x.0.meta.len() as u64;
        self.live.hold(&x.0, [[2 * size; 2], [size; 2]]);
    }

    /// Requests openings, all in one round.
    pub(crate) fn open_for(&self, requests: &[(&OffTensor, Learners)]) {
        let mut bytes = [0; 2];
        for (x, learners) in requests {
            let sends = self.request(x, *learners, || {
                let id = self.next_gate.get();
                self.next_gate.set(id + 1);
                id
            });
            let bits = x.0.cell.borrow().cut.as_ref().map(|cut| cut.left.bits);
            let size = pack::packed_len(x.0.meta.len(), bits.unwrap_or(x.0.meta.bits())) as u64;
            for i in 0..2 {
                bytes[i] += if sends[i] { size } else { 0 };
            }
        }
        self.exchanged("open", bytes);
    }

    fn request(&self, x: &OffTensor, learners: Learners, fresh: impl FnOnce() -> GateId) -> [bool; 2] {
        let mut cell = x.0.cell.borrow_mut();
        let (sends, first) = cell.opening.request(learners, fresh);
        self.hold_opening(x, sends, first);
        if first {
            let id = cell.opening.id.expect("set by request");
            self.claim((id, 0));
            cell.mask = match &cell.cut {
                Some(cut) => self.draw_for_carry(id, cut),
                None => [0, 1].map(|i| self.draw(id, &x.0.meta, i)),
            };
        }
        sends
    }

    /// Masks of a truncated value, where this role knows them: what was dealt, and in front of it a fresh mask of the carry.
    fn draw_for_carry(&self, id: GateId, cut: &OffCut) -> [Option<Ring>; 2] {
        let Some(dealt) = &cut.dealt else {
            return [None, None];
        };
        // The first party's share of what was dealt, and the second's at the dealer, who knows both.
        let mut parts = [0, 1].map(|i| self.seed_of(i).map(|_| dealt.clone()));
        if let [Some(first), Some(second)] = &mut parts {
            let (gate, slot) = cut.stream;
            let seed = self.seed_of(0).expect("the dealer has both");
            let zeros = u64::BITS - cut.bits;
            let mut stream = Prg::new(seed, gate, slot).bits(dealt.len(), cut.bits);
            stream.iter_mut().for_each(|v| *v <<= zeros);
            for ((a, b), s) in first.make_mut().iter_mut().zip(second.make_mut()).zip(stream) {
                *a = s;
                *b = b.wrapping_sub(s);
            }
        }
        let [first, second] = parts;
        let mask = |i: usize, part: Option<Ring>| {
            let (mut mask, seed) = (part?, self.seed_of(i)?);
            let fresh = Prg::new(seed, id, 0).bits(mask.len(), cut.left.bits);
            for (m, s) in mask.make_mut().iter_mut().zip(fresh) {
                *m = (*m << cut.shift).wrapping_add(s << cut.left.zeros());
            }
            Some(mask)
        };
        [mask(0, first), mask(1, second)]
    }

    fn seed_of(&self, i: usize) -> Option<&Seed> {
        match &self.role {
            Role::Count => None,
            Role::Dealer { seeds, .. } => Some(&seeds[i]),
            Role::Party { party, seed, .. } => (party.index() == i).then_some(seed),
        }
    }

    /// One round in which party i sends `bytes[i]`; none if nothing is sent.
    pub(crate) fn exchanged(&self, operation: Operation, bytes: [u64; 2]) {
        self.tally.borrow_mut().exchanged(operation, bytes);
    }

    /// Bytes that each party hands to the outside owner.
    pub(crate) fn delivered(&self, bytes: u64) {
        self.tally.borrow_mut().outside.outputs += bytes;
    }

    /// Before each pass of a paced program, at the dealer: which one the parties want.
    pub(crate) fn wanted(&self, done: usize) -> Result<Option<u8>> {
        let Role::Dealer { sinks, .. } = &self.role else {
            return Ok(u8::try_from(done).ok());
        };
        let mut sinks = sinks.borrow_mut();
        match [sinks[0].wanted(done)?, sinks[1].wanted(done)?] {
            [a, b] if a == b => Ok(a),
            _ => Err(Error::program("pass", "the parties want different passes")),
        }
    }

    /// Before each pass of a paced program, at a party: tells the dealer which one is wanted.
    pub(crate) fn want(&self, pass: Option<u8>) -> Result<()> {
        match &self.role {
            Role::Party { source, .. } => source.borrow_mut().want(pass),
            _ => Ok(()),
        }
    }

    /// Online multiply-adds of each party.
    pub(crate) fn computed(&self, operation: Operation, macs: [u64; 2]) {
        self.tally.borrow_mut().computed(operation, macs);
    }

    /// Uniform values below 2^bits that both parties hold shares of (modulo 2^bits): party i's own part, expanded
    /// from its seed. At the dealer, the sum of both parts.
    pub(crate) fn small_mask(&self, gate: GateId, slot: u16, n: usize, bits: u32) -> Option<Vec<u64>> {
        self.claim((gate, slot));
        match &self.role {
            Role::Count => None,
            Role::Dealer { seeds, .. } => {
                let mut a = Prg::new(&seeds[0], gate, slot).bits(n, bits);
                let b = Prg::new(&seeds[1], gate, slot).bits(n, bits);
                a.iter_mut()
                    .zip(b)
                    .for_each(|(a, b)| *a = a.wrapping_add(b) & low_bits(bits));
                Some(a)
            }
            Role::Party { seed, .. } => Some(Prg::new(seed, gate, slot).bits(n, bits)),
        }
    }

    /// As [`Offline::small_mask`], `words` words of bits that the parties hold shares of by xor.
    pub(crate) fn bit_mask(&self, gate: GateId, slot: u16, words: usize) -> Option<Vec<u64>> {
        self.claim((gate, slot));
        match &self.role {
            Role::Count => None,
            Role::Dealer { seeds, .. } => {
                let mut a = Prg::new(&seeds[0], gate, slot).vec(words);
                let b = Prg::new(&seeds[1], gate, slot).vec(words);
                a.iter_mut().zip(b).for_each(|(a, b)| *a ^= b);
                Some(a)
            }
            Role::Party { seed, .. } => Some(Prg::new(seed, gate, slot).vec(words)),
        }
    }

    /// Deals shares, modulo 2^bits, of `n` values that the dealer computes: the first party expands its shares from
    /// its seed, the second receives corrections of `bits` bits each.
    pub(crate) fn correlate(
        &self,
        operation: Operation,
        stream: (GateId, u16),
        n: usize,
        bits: u32,
        values: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<Option<Vec<u64>>> {
        self.correct(operation, stream, n, bits, values, u64::wrapping_sub)
    }

    /// As [`Offline::correlate`], of values of `meta`, whose zeros do not travel.
    pub(crate) fn correlate_as(
        &self,
        operation: Operation,
        stream: (GateId, u16),
        meta: &Meta,
        values: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<Option<Vec<u64>>> {
        let dealt = self.correlate(operation, stream, meta.len(), meta.bits(), || {
            let mut values = values()?;
            values.iter_mut().for_each(|v| *v >>= meta.zeros);
            Ok(values)
        })?;
        Ok(dealt.map(|mut words| {
            words.iter_mut().for_each(|w| *w <<= meta.zeros);
            words
        }))
    }

    /// Deals shares by xor of `words` words of bits, straight into the gate's material.
    pub(crate) fn deal_bits(
        &self,
        operation: Operation,
        stream: (GateId, u16),
        words: usize,
        values: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<()> {
        if let Some(words) = self.correct(operation, stream, words, 64, values, |v, a| v ^ a)? {
            self.put(words);
        }
        Ok(())
    }

    /// Deals `n` words of `bits` bits; the correction is `less` of the value and the first party's share.
    fn correct(
        &self,
        operation: Operation,
        (gate, slot): (GateId, u16),
        n: usize,
        bits: u32,
        values: impl FnOnce() -> Result<Vec<u64>>,
        less: impl Fn(u64, u64) -> u64,
    ) -> Result<Option<Vec<u64>>> {
        self.claim((gate, slot));
        let bytes = pack::packed_len(n, bits);
        self.gate_bytes.set(self.gate_bytes.get() + 8 * n as u64);
        self.live.deal(8 * n as u64);
        self.tally.borrow_mut().dealt(operation, [0, bytes as u64]);
        match &self.role {
            Role::Count => Ok(None),
            Role::Dealer { seeds, sinks } => {
                let mut values = values()?;
                debug_assert_eq!(values.len(), n);
                let (mut prg, mut first) = (Prg::new(&seeds[0], gate, slot), vec![0; n.min(DEAL_BATCH)]);
                for values in values.chunks_mut(DEAL_BATCH) {
                    let first = &mut first[..values.len()];
                    prg.fill_bits(first, bits);
                    for (v, a) in values.iter_mut().zip(first) {
                        *v = less(*v, *a) & low_bits(bits);
                    }
                    sinks.borrow_mut()[1].put(&pack::pack(values, bits))?;
                }
                Ok(None)
            }
            Role::Party {
                party: Party::P0,
                seed,
                ..
            } => Ok(Some(Prg::new(seed, gate, slot).bits(n, bits))),
            Role::Party {
                party: Party::P1,
                source,
                ..
            } => {
                let mut packed = vec![0; pack::packed_len(n.min(DEAL_BATCH), bits)];
                let mut words = vec![0; n];
                for words in words.chunks_mut(DEAL_BATCH) {
                    let packed = &mut packed[..pack::packed_len(words.len(), bits)];
                    source.borrow_mut().take(packed)?;
                    pack::unpack(packed, bits, words);
                }
                Ok(Some(words))
            }
        }
    }

    /// As [`Offline::correlate`], straight into the gate's material.
    pub(crate) fn deal(
        &self,
        operation: Operation,
        stream: (GateId, u16),
        n: usize,
        bits: u32,
        values: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<()> {
        if let Some(words) = self.correlate(operation, stream, n, bits, values)? {
            self.put(words);
        }
        Ok(())
    }

    /// As [`Offline::deal`], of `each` values for each of `n` masks: made a `batch` of masks at a time, and expanded where they are
    /// used. `each * batch` is a multiple of 16.
    pub(crate) fn deal_many(
        &self,
        operation: Operation,
        (gate, slot): (GateId, u16),
        (n, each, batch): (usize, usize, usize),
        bits: u32,
        values: impl Fn(Range<usize>) -> Vec<u64>,
    ) -> Result<()> {
        self.claim((gate, slot));
        let bytes = pack::packed_len(n * each, bits);
        self.gate_bytes.set(self.gate_bytes.get() + bytes as u64);
        self.live.deal(8 * (each * batch.min(n)) as u64);
        self.tally.borrow_mut().dealt(operation, [0, bytes as u64]);
        match &self.role {
            Role::Count => {}
            Role::Dealer { seeds, sinks } => {
                let (mut prg, mut first) = (Prg::new(&seeds[0], gate, slot), vec![0; each * batch.min(n)]);
                for start in (0..n).step_by(batch.max(1)) {
                    let mut values = values(start..n.min(start + batch));
                    let first = &mut first[..values.len()];
                    prg.fill_bits(first, bits);
                    for (v, a) in values.iter_mut().zip(first) {
                        *v = v.wrapping_sub(*a);
                    }
                    sinks.borrow_mut()[1].put(&pack::pack(&values, bits))?;
                }
            }
            Role::Party {
                party, seed, source, ..
            } => {
                let dealt = match party {
                    Party::P0 => Dealt::Stream(Box::new(Prg::new(seed, gate, slot)), bits),
                    Party::P1 => {
                        let mut packed = vec![0; bytes];
                        // In the pieces in which it is put.
                        let piece = pack::packed_len(each * batch, bits);
                        for piece in packed.chunks_mut(piece.max(1)) {
                            source.borrow_mut().take(piece)?;
                        }
                        Dealt::Packed(packed, bits)
                    }
                };
                self.material.borrow_mut().dealt.push_back(dealt);
            }
        }
        Ok(())
    }

    /// Adds words to the gate's material.
    pub(crate) fn put(&self, words: Vec<u64>) {
        self.material.borrow_mut().words.push_back(words);
    }

    /// Deals `n` function-secret-sharing keys of `key_bytes` each to both parties; `generate` writes those of a range
    /// of the elements.
    pub(crate) fn keys(
        &self,
        operation: Operation,
        (gate, slot): (GateId, u16),
        n: usize,
        key_bytes: usize,
        generate: impl Fn(Range<usize>, [&[u128]; 2], &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.claim((gate, slot));
        let bytes = n * key_bytes;
        self.gate_bytes
            .set(self.gate_bytes.get() + (bytes + 16 * n) as u64);
        self.tally.borrow_mut().dealt(operation, [bytes as u64; 2]);
        match &self.role {
            Role::Count => {}
            Role::Dealer { seeds, sinks } => {
                let mut streams = [0, 1].map(|i| Prg::new(&seeds[i], gate, slot));
                let mut keys = vec![0; KEY_BATCH.min(n) * key_bytes];
                for start in (0..n).step_by(KEY_BATCH) {
                    let range = start..n.min(start + KEY_BATCH);
                    let roots = streams.each_mut().map(|s| s.blocks(range.len()));
                    let keys = &mut keys[..range.len() * key_bytes];
                    generate(range, [&roots[0], &roots[1]], keys)?;
                    for sink in sinks.borrow_mut().iter_mut() {
                        sink.put(keys)?;
                    }
                }
            }
            Role::Party { seed, source, .. } => {
                let mut keys = vec![0; bytes];
                for batch in keys.chunks_mut(KEY_BATCH * key_bytes) {
                    source.borrow_mut().take(batch)?;
                }
                let roots = Prg::new(seed, gate, slot).blocks(n);
                self.material.borrow_mut().keys.push_back((roots, keys));
            }
        }
        Ok(())
    }

    fn record(&self, name: &str, detail: &[u8]) {
        let mut hash = self.program.borrow_mut();
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((detail.len() as u64).to_le_bytes());
        hash.update(detail);
    }

    fn record_meta(&self, name: &str, meta: &Meta) {
        self.record(name, format!("{meta:?}").as_bytes());
    }
}

/// 2^bits - 1.
pub(crate) fn low_bits(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

impl Gates for Offline {
    type T = OffTensor;

    fn meta<'a>(&self, x: &'a OffTensor) -> &'a Meta {
        &x.0.meta
    }

    fn enter_layer(&self, name: &str) {
        self.tally.borrow_mut().enter(name);
    }

    fn enter(&self, owner: Owner, dims: &[usize], _values: Option<&[f32]>) -> Result<OffTensor> {
        let meta = Meta {
            dims: dims.to_vec(),
            scale: SCALE,
            owner,
            zeros: 0,
        };
        self.record_meta("input", &meta);
        if owner == Owner::Shared {
            self.tally.borrow_mut().outside.inputs += 8 * meta.len() as u64;
        }
        Ok(self.tensor(meta))
    }

    fn parameter(&self, owner: Owner, dims: &[usize], _values: Option<&[f32]>) -> Result<OffTensor> {
        let meta = Meta {
            dims: dims.to_vec(),
            scale: SCALE,
            owner,
            zeros: 0,
        };
        self.record_meta("parameter", &meta);
        if owner == Owner::Shared {
            self.tally.borrow_mut().outside.parameters += 8 * meta.len() as u64;
        }
        let x = self.tensor(meta);
        let id = self.next_parameter.get();
        self.next_parameter.set(id + 1);
        if gates::opens_at_setup(owner, dims) {
            let mut cell = x.0.cell.borrow_mut();
            let (sends, _) = cell.opening.request(BOTH, || id);
            self.claim((id, 0));
            let size = 8 * x.0.meta.len() as u64;
            self.tally
                .borrow_mut()
                .setup(sends.map(|s| if s { size } else { 0 }));
            // The masked value: in place of a share, beside the values of an owner.
            self.live.hold(
                &x.0,
                [if owner == Owner::Shared { [0; 2] } else { [size; 2] }, [0; 2]],
            );
            (cell.redrawn, cell.is_parameter) = (true, true);
            if let Role::Party { parameters, .. } = &self.role {
                cell.masked = parameters.wait((id - PARAMETER_GATES) as usize)?;
            }
        } else if let Role::Party { parameters, .. } = &self.role {
            parameters.wait((id - PARAMETER_GATES) as usize)?;
        }
        Ok(x)
    }

    fn local(&self, x: &OffTensor, map: &Local) -> Result<OffTensor> {
        self.record("local", format!("{map:?}").as_bytes());
        let out = self.tensor(map.meta(&x.0.meta)?);
        let from = x.0.cell.borrow();
        if let Local::Relabel(_) = map {
            // The same ring elements are known in the same way.
            out.0.cell.borrow_mut().carried = from.carried.clone();
        }
        if let (Some(cut), None) = (&from.cut, from.opening.id) {
            let cut = cut.after(map)?;
            if cut.is_some() {
                self.hold_cut(&out);
            }
            out.0.cell.borrow_mut().cut = cut;
        }
        if from.opening.id.is_some() {
            let mut cell = out.0.cell.borrow_mut();
            cell.opening = from.opening.clone();
            cell.is_parameter = from.is_parameter;
            for i in 0..2 {
                cell.mask[i] = self.mask_of(x, i).map(|m| map.apply(&m)).transpose()?;
            }
            cell.masked = from.masked.as_ref().map(|m| map.apply(m)).transpose()?;
            let received = [0, 1].map(|i| from.opening.sent[i] && holds(x.0.meta.owner, i));
            self.hold_opening(&out, received, true);
        }
        drop(from);
        Ok(out)
    }

    fn concat(&self, xs: &[&OffTensor], dim: usize) -> Result<OffTensor> {
        let metas: Vec<&Meta> = xs.iter().map(|x| &x.0.meta).collect();
        self.record("concat", &[dim as u8]);
        Ok(self.tensor(gates::concat_meta(&metas, dim)?))
    }

    fn sum_of(&self, a: &OffTensor, b: &OffTensor, subtract: bool) -> Result<OffTensor> {
        self.record("sum_of", &[u8::from(subtract)]);
        let meta = gates::sum_meta(&a.0.meta, &b.0.meta)?;
        carried::offline_sum(self, a, b, subtract, meta)
    }

    fn add_constant(&self, x: &OffTensor, c: u64) -> Result<OffTensor> {
        self.record("add_constant", &c.to_le_bytes());
        // The mask stays, the masked value moves by the constant.
        let out = self.tensor(gates::shifted_meta(&x.0.meta, c));
        let from = x.0.cell.borrow();
        if from.opening.is_full() {
            let mut cell = out.0.cell.borrow_mut();
            cell.opening = from.opening.clone();
            cell.mask = [0, 1].map(|i| self.mask_of(x, i));
        }
        drop(from);
        Ok(out)
    }

    fn open(&self, xs: &[&OffTensor]) -> Result<()> {
        let requests: Vec<_> = xs.iter().map(|x| (*x, BOTH)).collect();
        self.record("open", &[]);
        self.open_for(&requests);
        Ok(())
    }

    fn product(&self, kind: Product, a: &OffTensor, b: &OffTensor) -> Result<OffTensor> {
        protocols::product::offline(self, kind, a, b)
    }

    fn truncate(&self, xs: &[(&OffTensor, u32)], faithful: bool) -> Result<Vec<OffTensor>> {
        protocols::truncate::offline(self, xs, Mode::of(faithful))
    }

    fn truncate_carried(&self, xs: &[(&OffTensor, u32)]) -> Result<Vec<OffTensor>> {
        protocols::truncate::offline(self, xs, Mode::Carried)
    }

    fn is_carried(&self, x: &OffTensor) -> bool {
        self.carried(x).is_some()
    }

    fn square_sum(&self, x: &OffTensor) -> Result<OffTensor> {
        carried::offline_square_sum(self, x)
    }

    fn series_of(&self, x: &OffTensor, all: &[Arc<Series>], form: Form) -> Result<Vec<OffTensor>> {
        trigonometric::offline(self, x, all, form)
    }

    fn positive_part(&self, x: &OffTensor, cut: u32) -> Result<OffTensor> {
        protocols::compare::offline(self, x, Want::Positive(cut))
    }

    fn non_negative(&self, x: &OffTensor) -> Result<OffTensor> {
        protocols::compare::offline(self, x, Want::Bit)
    }

    fn lines(&self, x: &OffTensor, spec: &Arc<Lines>) -> Result<OffTensor> {
        lines::offline(self, x, spec)
    }

    fn coarse_max(&self, x: &OffTensor, spec: &CoarseMax) -> Result<OffTensor> {
        coarse_max::offline(self, x, spec)
    }

    fn lookup(
        &self,
        x: &OffTensor,
        bits: u32,
        tables: &[Arc<Vec<u64>>],
        scale: u32,
    ) -> Result<Vec<OffTensor>> {
        protocols::lookup::offline(self, x, bits, tables, scale)
    }

    fn reveal_to(&self, x: &OffTensor, to: Party) -> Result<Option<Revealed>> {
        protocols::reveal::offline(self, x, to)
    }

    fn hand_over(&self, x: &OffTensor) -> Result<Option<Revealed>> {
        protocols::deliver::offline(self, x)?;
        Ok(None)
    }
}
