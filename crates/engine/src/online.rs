//! The online walk of one compute party.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, mpsc};

use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Ring, pack};
use veiltune_wire::Link;

use crate::gates::{self, Gates, Local, Meta, Product, SCALE};
use crate::material::{Material, ParameterStore};
use crate::offline::low_bits;
use crate::opening::{BOTH, Carry, GateId, Learners, Opening, PARAMETER_GATES, holds};
use crate::outside::Outside;
use crate::protocols::{
    self,
    carried::{self, Carried},
    coarse_max::{self, CoarseMax},
    compare::{Comparison, Want},
    lines::{self, Lines},
    trigonometric::{self, Form},
    truncate::Mode,
};
use crate::series::Series;
use crate::{Error, Owner, Party, Result, Revealed};

/// Ring elements a message: sending, receiving and computing overlap at this grain.
const CHUNK: usize = 1 << 16;

/// See the module.
pub struct Online {
    party: Party,
    comparison: Comparison,
    seed: Seed,
    link: Arc<dyn Link>,
    material: mpsc::Receiver<Material>,
    parameters: Arc<ParameterStore>,
    next_gate: Cell<GateId>,
    next_parameter: Cell<GateId>,
    outside: RefCell<Box<dyn Outside>>,
}

/// A party's part of a tensor. Its `Debug` shows the shape alone.
#[derive(Clone)]
pub struct Share(Rc<Inner>);

struct Inner {
    meta: Meta,
    /// This party's additive share; None is zero. For a public tensor, the value itself, at both parties. Not of a shared
    /// parameter, which is kept as its masked value alone; [`Online::own`] gives it in either case.
    share: Option<Ring>,
    cell: RefCell<OpenCell>,
}

struct OpenCell {
    opening: Opening,
    /// This party's mask; None is zero.
    mask: Option<Ring>,
    /// Of a parameter: its mask is expanded anew wherever it is wanted, because models are large.
    redrawn: bool,
    /// The peer's piece, once received; None is zero once `opening.sent` says it was sent.
    peer: Option<Ring>,
    masked: OnceCell<Ring>,
    is_parameter: bool,
    /// Of a truncated value, or a sum of such.
    carried: Option<Rc<Carried>>,
    /// Of a truncated value: what its opening need not say again.
    cut: Option<Rc<Cut>>,
}

/// Of a [truncated](crate::protocols::truncate) value: what is public of it, and this party's share of the carry.
pub(crate) struct Cut {
    pub public: Ring,
    pub carry: Ring,
    pub left: Carry,
}

impl Cut {
    fn after(&self, map: &Local) -> Result<Option<Rc<Cut>>> {
        let Some(left) = self.left.after(map) else {
            return Ok(None);
        };
        let carry = match map {
            // Modulo fewer bits, but the same number.
            Local::Refine(_) => self.carry.clone(),
            _ => map.apply(&self.carry)?,
        };
        let public = map.apply(&self.public)?;
        Ok(Some(Rc::new(Cut { public, carry, left })))
    }
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Share({:?}, scale {}, ..)",
            self.0.meta.dims, self.0.meta.scale
        )
    }
}

impl Online {
    pub(crate) fn new(
        comparison: Comparison,
        party: Party,
        seed: Seed,
        link: Arc<dyn Link>,
        material: mpsc::Receiver<Material>,
        parameters: Arc<ParameterStore>,
        outside: Box<dyn Outside>,
    ) -> Online {
        Online {
            party,
            comparison,
            seed,
            link,
            material,
            parameters,
            next_gate: Cell::new(0),
            next_parameter: Cell::new(PARAMETER_GATES),
            outside: RefCell::new(outside),
        }
    }

    // ---- for the protocols ----

    /// Which party this is.
    pub(crate) fn party(&self) -> Party {
        self.party
    }

    /// How this program compares.
    pub(crate) fn comparison(&self) -> Comparison {
        self.comparison
    }

    /// Whether this is the first party, which adds public constants.
    pub(crate) fn is_first(&self) -> bool {
        self.party == Party::P0
    }

    /// Starts a gate and takes its material.
    pub(crate) fn gate(&self) -> Result<(GateId, Material)> {
        let id = self.fresh();
        let material = self
            .material
            .recv()
            .map_err(|_| Error::Stopped("the offline phase"))?;
        if material.gate != id {
            return Err(Error::program(
                "gate",
                format!("material of gate {} at gate {id}", material.gate),
            ));
        }
        Ok((id, material))
    }

    /// A new tensor with this share.
    pub(crate) fn tensor(&self, meta: Meta, share: Option<Ring>) -> Share {
        debug_assert!(share.as_ref().is_none_or(|s| gates::are_multiples(s, meta.zeros)));
        let cell = OpenCell {
            opening: Opening::new(meta.owner),
            mask: None,
            redrawn: false,
            peer: None,
            masked: OnceCell::new(),
            is_parameter: false,
            carried: None,
            cut: None,
        };
        Share(Rc::new(Inner {
            meta,
            share,
            cell: RefCell::new(cell),
        }))
    }

    /// How `x` is known up to dealt values, if it was truncated to be.
    pub(crate) fn carried(&self, x: &Share) -> Option<Rc<Carried>> {
        x.0.cell.borrow().carried.clone()
    }

    /// A new tensor that is known up to dealt values.
    pub(crate) fn carrying(&self, meta: Meta, share: Ring, carried: Carried) -> Share {
        let x = self.tensor(meta, Some(share));
        x.0.cell.borrow_mut().carried = Some(Rc::new(carried));
        x
    }

    /// A new tensor that is public but for a carry and what was dealt.
    pub(crate) fn truncated(&self, meta: Meta, share: Ring, cut: Cut) -> Share {
        let x = self.tensor(meta, Some(share));
        x.0.cell.borrow_mut().cut = Some(Rc::new(cut));
        x
    }

    /// This party's additive share (a public value belongs to the first party's).
    pub(crate) fn share(&self, x: &Share) -> Option<Ring> {
        if x.0.meta.owner == Owner::Public && !self.is_first() {
            None
        } else {
            self.own(x)
        }
    }

    /// What this party holds of `x`: its share or, of a public tensor, the value.
    fn own(&self, x: &Share) -> Option<Ring> {
        if x.0.meta.owner != Owner::Shared || !x.0.cell.borrow().redrawn {
            return x.0.share.clone();
        }
        let mask = self.mask(x)?;
        let cell = x.0.cell.borrow();
        match (self.is_first(), cell.masked.get()) {
            (true, Some(masked)) => masked.sub(&mask).ok(),
            _ => Some(mask.neg()),
        }
    }

    /// The share, zeros if it is trivial.
    pub(crate) fn share_or_zeros(&self, x: &Share) -> Ring {
        self.share(x)
            .unwrap_or_else(|| Ring::zeros(x.0.meta.dims.clone()))
    }

    /// The value itself, where it is known in the clear: public, or this party's own.
    pub(crate) fn known(&self, x: &Share) -> Option<Ring> {
        match x.0.meta.owner {
            Owner::Public => x.0.share.clone(),
            Owner::Party(p) if p == self.party => x.0.share.clone(),
            _ => None,
        }
    }

    /// This party's mask of `x`; None is zero.
    pub(crate) fn mask(&self, x: &Share) -> Option<Ring> {
        let cell = x.0.cell.borrow();
        match cell.opening.id {
            Some(id) if cell.redrawn => {
                holds(x.0.meta.owner, self.party.index()).then(|| self.draw(id, &x.0.meta))
            }
            _ => cell.mask.clone(),
        }
    }

    fn draw(&self, id: GateId, meta: &Meta) -> Ring {
        gates::floor_to(Prg::new(&self.seed, id, 0).ring(meta.dims.clone()), meta.zeros)
    }

    /// The peer's piece x_j + r_j, where it was received.
    pub(crate) fn peer_piece(&self, x: &Share) -> Option<Ring> {
        let cell = x.0.cell.borrow();
        if !cell.redrawn {
            return cell.peer.clone();
        }
        match x.0.meta.owner {
            Owner::Party(p) if p == self.party => None,
            // The masked value of a parameter counts as the first party's piece.
            Owner::Shared if self.is_first() => Some(Ring::zeros(x.0.meta.dims.clone())),
            _ => cell.masked.get().cloned(),
        }
    }

    /// The opened masked value x + r.
    pub(crate) fn masked(&self, x: &Share) -> Result<Ring> {
        let cell = x.0.cell.borrow();
        if let Some(m) = cell.masked.get() {
            return Ok(m.clone());
        }
        if let (Owner::Public, Some(value)) = (x.0.meta.owner, &x.0.share) {
            return Ok(value.clone());
        }
        let mut parts = [self.share(x), cell.mask.clone(), cell.peer.clone()]
            .into_iter()
            .flatten();
        let sum = match (parts.next(), parts.next()) {
            (None, _) => Ring::zeros(x.0.meta.dims.clone()),
            (Some(only), None) => only,
            (Some(a), Some(b)) => {
                // A new tensor at once: adding in place would copy the share first.
                let mut sum = a.add(&b)?;
                if let Some(c) = parts.next() {
                    sum.add_assign(&c)?;
                }
                sum
            }
        };
        Ok(cell.masked.get_or_init(|| sum).clone())
    }

    /// Whether both parties know the masked value.
    pub(crate) fn is_open(&self, x: &Share) -> bool {
        x.0.cell.borrow().opening.is_full()
    }

    /// Whether `x` is a session parameter that was opened at set-up.
    pub(crate) fn is_parameter(&self, x: &Share) -> bool {
        x.0.cell.borrow().is_parameter
    }

    /// Opens masked values for the given learners, all in one round.
    pub(crate) fn open_for(&self, requests: &[(&Share, Learners)]) -> Result<()> {
        let mut incoming: Vec<&Share> = Vec::new();
        let (me, mut any) = (self.party.index(), false);
        for (x, learners) in requests {
            let sends = self.request(x, *learners, || self.fresh());
            any |= (sends[0] || sends[1]) && !x.0.meta.is_empty();
            if sends[me] {
                self.send_piece(x)?;
            }
            if sends[1 - me] {
                incoming.push(x);
            }
        }
        for x in incoming {
            self.receive_piece(x)?;
        }
        if any {
            self.link.round();
        }
        Ok(())
    }

    fn request(&self, x: &Share, learners: Learners, fresh: impl FnOnce() -> GateId) -> [bool; 2] {
        let mut cell = x.0.cell.borrow_mut();
        let (sends, first) = cell.opening.request(learners, fresh);
        if first && holds(x.0.meta.owner, self.party.index()) {
            let id = cell.opening.id.expect("set by request");
            cell.mask = Some(match &cell.cut {
                Some(cut) => self.draw_for_carry(id, cut, x.0.share.as_ref()),
                None => self.draw(id, &x.0.meta),
            });
        }
        sends
    }

    /// Of a truncated value, the share of what was dealt, and in front of it a fresh mask of the carry. The share of the value says
    /// what was dealt: see [`truncate`](crate::protocols::truncate).
    fn draw_for_carry(&self, id: GateId, cut: &Cut, share: Option<&Ring>) -> Ring {
        let fresh = Prg::new(&self.seed, id, 0).bits(cut.carry.len(), cut.left.bits);
        let mut mask = cut.carry.clone();
        for (m, s) in mask.make_mut().iter_mut().zip(fresh) {
            *m = m.wrapping_add(s) << cut.left.zeros();
        }
        if let Some(share) = share {
            mask.sub_assign(share)
                .expect("a share has the shape of its carries");
        }
        if self.is_first() {
            mask.add_assign(&cut.public).expect("and of what is public");
        }
        mask
    }

    /// How an opening of `x` travels: bits below which its pieces say nothing, and what they are above.
    fn travels(&self, x: &Share) -> (u32, Option<Ring>) {
        match &x.0.cell.borrow().cut {
            Some(cut) => (cut.left.zeros(), Some(cut.public.clone())),
            None => (x.0.meta.zeros, None),
        }
    }

    /// Sends this party's share plus mask.
    fn send_piece(&self, x: &Share) -> Result<()> {
        let (zeros, public) = self.travels(x);
        let less = public.filter(|_| self.is_first());
        let (mask, share, meta) = (self.mask(x), self.share(x), &x.0.meta);
        self.send_words(64 - zeros, meta.len(), |start, out| {
            let [share, mask, less] =
                [&share, &mask, &less].map(|r| r.as_ref().map(|r| &r.as_slice()[start..]));
            let all = out.iter_mut();
            match (share, mask, less) {
                (Some(x), Some(r), Some(a)) => all
                    .zip(x.iter().zip(r).zip(a))
                    .for_each(|(o, ((x, r), a))| *o = x.wrapping_add(*r).wrapping_sub(*a) >> zeros),
                (Some(x), Some(r), None) => all
                    .zip(x.iter().zip(r))
                    .for_each(|(o, (x, r))| *o = x.wrapping_add(*r) >> zeros),
                (Some(x), None, _) | (None, Some(x), _) => all.zip(x).for_each(|(o, x)| *o = x >> zeros),
                (None, None, _) => out.fill(0),
            }
        })
    }

    fn receive_piece(&self, x: &Share) -> Result<()> {
        let (zeros, public) = self.travels(x);
        let meta = &x.0.meta;
        let mut words = self.receive_words(64 - zeros, meta.len())?;
        if zeros > 0 {
            words.iter_mut().for_each(|w| *w <<= zeros);
        }
        let mut piece = Ring::new(meta.dims.clone(), words)?;
        if let Some(public) = public.filter(|_| !self.is_first()) {
            piece.add_assign(&public)?;
        }
        x.0.cell.borrow_mut().peer = Some(piece);
        Ok(())
    }

    /// One round: both parties send `mine` modulo 2^bits and get the sum of both.
    pub(crate) fn open_words(&self, mine: Vec<u64>, bits: u32) -> Result<Vec<u64>> {
        self.send_words(bits, mine.len(), |start, out| {
            out.copy_from_slice(&mine[start..start + out.len()])
        })?;
        let mut sum = self.receive_words(bits, mine.len())?;
        for (s, m) in sum.iter_mut().zip(&mine) {
            *s = s.wrapping_add(*m) & low_bits(bits);
        }
        if !mine.is_empty() {
            self.link.round();
        }
        Ok(sum)
    }

    /// One round: both parties send `mine` and get the xor of both.
    pub(crate) fn open_bits(&self, mine: &[u64]) -> Result<Vec<u64>> {
        self.send_words(64, mine.len(), |start, out| {
            out.copy_from_slice(&mine[start..start + out.len()])
        })?;
        let mut sum = self.receive_words(64, mine.len())?;
        sum.iter_mut().zip(mine).for_each(|(s, m)| *s ^= m);
        if !mine.is_empty() {
            self.link.round();
        }
        Ok(sum)
    }

    /// One round in which only `from` sends.
    pub(crate) fn send_one_way(
        &self,
        from: Party,
        words: Option<&Ring>,
        len: usize,
    ) -> Result<Option<Vec<u64>>> {
        let out = if from == self.party {
            self.send_words(64, len, |start, out| match words {
                Some(w) => out.copy_from_slice(&w.as_slice()[start..start + out.len()]),
                None => out.fill(0),
            })?;
            None
        } else {
            Some(self.receive_words(64, len)?)
        };
        if len > 0 {
            self.link.round();
        }
        Ok(out)
    }

    /// This party's share of a delivered output goes out.
    pub(crate) fn hand_out(&self, share: Ring) -> Result<()> {
        self.outside.borrow_mut().output(share)
    }

    /// Which pass the outside owner wants next.
    pub(crate) fn next(&self, done: usize) -> Result<Option<u8>> {
        self.outside.borrow_mut().next(done)
    }

    /// This party's part of a small mask; see [`Offline::small_mask`](crate::offline::Offline::small_mask).
    pub(crate) fn small_mask(&self, gate: GateId, slot: u16, n: usize, bits: u32) -> Vec<u64> {
        Prg::new(&self.seed, gate, slot).bits(n, bits)
    }

    /// This party's part of a mask of bits; see [`Offline::bit_mask`](crate::offline::Offline::bit_mask).
    pub(crate) fn bit_mask(&self, gate: GateId, slot: u16, words: usize) -> Vec<u64> {
        Prg::new(&self.seed, gate, slot).vec(words)
    }

    /// A parameter that was opened at set-up, without what can be had again.
    fn opened_parameter(&self, x: &Share, masked: Ring) -> Share {
        let share = match x.0.meta.owner {
            Owner::Shared => None,
            _ => x.0.share.clone(),
        };
        let out = self.tensor(x.0.meta.clone(), share);
        {
            let mut cell = out.0.cell.borrow_mut();
            cell.opening = x.0.cell.borrow().opening.clone();
            (cell.redrawn, cell.is_parameter) = (true, true);
            cell.masked = OnceCell::from(masked);
        }
        out
    }

    fn fresh(&self) -> GateId {
        let id = self.next_gate.get();
        self.next_gate.set(id + 1);
        id
    }

    /// `fill` writes all of a piece, from the given word on.
    fn send_words(&self, bits: u32, len: usize, fill: impl Fn(usize, &mut [u64])) -> Result<()> {
        let mut words = vec![0; len.min(CHUNK)];
        for start in (0..len).step_by(CHUNK) {
            let piece = &mut words[..CHUNK.min(len - start)];
            fill(start, piece);
            self.link.send(pack::pack(piece, bits))?;
        }
        Ok(())
    }

    fn receive_words(&self, bits: u32, len: usize) -> Result<Vec<u64>> {
        let mut words = vec![0; len];
        let mut packed = vec![0; pack::packed_len(len.min(CHUNK), bits)];
        for piece in words.chunks_mut(CHUNK) {
            let packed = &mut packed[..pack::packed_len(piece.len(), bits)];
            self.link.recv(packed)?;
            pack::unpack(packed, bits, piece);
        }
        Ok(words)
    }
}

impl Gates for Online {
    type T = Share;

    fn meta<'a>(&self, x: &'a Share) -> &'a Meta {
        &x.0.meta
    }

    fn enter(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Share> {
        let meta = Meta {
            dims: dims.to_vec(),
            scale: SCALE,
            owner,
            zeros: 0,
        };
        let mine = match owner {
            Owner::Public => true,
            Owner::Party(p) => p == self.party,
            Owner::Shared => {
                let share = self.outside.borrow_mut().input(dims)?;
                return Ok(self.tensor(meta, Some(share)));
            }
        };
        let share = match (mine, values) {
            (true, Some(v)) => Some(gates::encode("input", dims, v)?),
            (true, None) => return Err(gates::missing("input", owner)),
            (false, _) => None,
        };
        Ok(self.tensor(meta, share))
    }

    fn parameter(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<Share> {
        let x = match owner {
            Owner::Shared => {
                let share = self.outside.borrow_mut().parameter(dims)?;
                let meta = Meta {
                    dims: dims.to_vec(),
                    scale: SCALE,
                    owner,
                    zeros: 0,
                };
                self.tensor(meta, Some(share))
            }
            _ => self.enter(owner, dims, values)?,
        };
        let id = self.next_parameter.get();
        self.next_parameter.set(id + 1);
        if gates::opens_at_setup(owner, dims) {
            let sends = self.request(&x, BOTH, || id);
            let me = self.party.index();
            if sends[me] {
                self.send_piece(&x)?;
            }
            if sends[1 - me] {
                self.receive_piece(&x)?;
            }
            let masked = self.masked(&x)?;
            self.parameters.push(Some(masked.clone()));
            Ok(self.opened_parameter(&x, masked))
        } else {
            self.parameters.push(None);
            Ok(x)
        }
    }

    fn local(&self, x: &Share, map: &Local) -> Result<Share> {
        let apply = |r: &Option<Ring>| r.as_ref().map(|r| map.apply(r)).transpose();
        let out = self.tensor(map.meta(&x.0.meta)?, apply(&self.own(x))?);
        let from = x.0.cell.borrow();
        if let Local::Relabel(_) = map {
            // The same ring elements are known in the same way.
            out.0.cell.borrow_mut().carried = from.carried.clone();
        }
        if let (Some(cut), None) = (&from.cut, from.opening.id) {
            out.0.cell.borrow_mut().cut = cut.after(map)?;
        }
        if from.opening.id.is_some() {
            let mut cell = out.0.cell.borrow_mut();
            cell.opening = from.opening.clone();
            cell.is_parameter = from.is_parameter;
            cell.mask = apply(&self.mask(x))?;
            cell.peer = apply(&from.peer)?;
            if let Some(m) = from.masked.get() {
                cell.masked = OnceCell::from(map.apply(m)?);
            }
        }
        drop(from);
        Ok(out)
    }

    fn concat(&self, xs: &[&Share], dim: usize) -> Result<Share> {
        let metas: Vec<&Meta> = xs.iter().map(|x| &x.0.meta).collect();
        let meta = gates::concat_meta(&metas, dim)?;
        let parts: Vec<Ring> = xs
            .iter()
            .map(|x| match meta.owner {
                Owner::Public => {
                    x.0.share
                        .clone()
                        .unwrap_or_else(|| Ring::zeros(x.0.meta.dims.clone()))
                }
                _ => self.share_or_zeros(x),
            })
            .collect();
        let cat = Ring::cat(&parts.iter().collect::<Vec<_>>(), dim)?;
        Ok(self.tensor(meta, Some(cat)))
    }

    fn sum_of(&self, a: &Share, b: &Share, subtract: bool) -> Result<Share> {
        let meta = gates::sum_meta(&a.0.meta, &b.0.meta)?;
        let part = |x: &Share| match (meta.owner, x.0.meta.owner) {
            (Owner::Public, _) => x.0.share.clone(),
            // What is public belongs to whoever has the rest.
            (Owner::Party(p), Owner::Public) if p == self.party => x.0.share.clone(),
            (Owner::Party(_), Owner::Public) => None,
            _ => self.share(x),
        };
        let (x, y) = (part(a), part(b));
        let sum = match (x, y) {
            (None, None) => None,
            (x, y) => {
                let x = x.unwrap_or_else(|| Ring::zeros(a.0.meta.dims.clone()));
                let y = y.unwrap_or_else(|| Ring::zeros(b.0.meta.dims.clone()));
                Some(if subtract { x.sub(&y)? } else { x.add(&y)? })
            }
        };
        carried::online_sum(self, a, b, subtract, meta, sum)
    }

    fn add_constant(&self, x: &Share, c: u64) -> Result<Share> {
        let adds = match x.0.meta.owner {
            Owner::Public => true,
            Owner::Party(p) => p == self.party,
            Owner::Shared => self.is_first(),
        };
        let share = if adds {
            Some(
                self.own(x)
                    .unwrap_or_else(|| Ring::zeros(x.0.meta.dims.clone()))
                    .add_scalar(c),
            )
        } else {
            self.own(x)
        };
        let out = self.tensor(gates::shifted_meta(&x.0.meta, c), share);
        let from = x.0.cell.borrow();
        if from.opening.is_full() {
            let masked = self.masked(x)?.add_scalar(c);
            let mut cell = out.0.cell.borrow_mut();
            cell.opening = from.opening.clone();
            cell.mask = self.mask(x);
            cell.masked = OnceCell::from(masked);
            // The peer's piece moved only if the peer is the one that adds; products across owners need it.
            cell.peer = match (&from.peer, adds) {
                (Some(p), false) => Some(p.add_scalar(c)),
                (p, _) => p.clone(),
            };
        }
        drop(from);
        Ok(out)
    }

    fn open(&self, xs: &[&Share]) -> Result<()> {
        let requests: Vec<_> = xs.iter().map(|x| (*x, BOTH)).collect();
        self.open_for(&requests)
    }

    fn product(&self, kind: Product, a: &Share, b: &Share) -> Result<Share> {
        protocols::product::online(self, kind, a, b)
    }

    fn truncate(&self, xs: &[(&Share, u32)], faithful: bool) -> Result<Vec<Share>> {
        protocols::truncate::online(self, xs, Mode::of(faithful))
    }

    fn truncate_carried(&self, xs: &[(&Share, u32)]) -> Result<Vec<Share>> {
        protocols::truncate::online(self, xs, Mode::Carried)
    }

    fn is_carried(&self, x: &Share) -> bool {
        self.carried(x).is_some()
    }

    fn square_sum(&self, x: &Share) -> Result<Share> {
        carried::online_square_sum(self, x)
    }

    fn series_of(&self, x: &Share, all: &[Arc<Series>], form: Form) -> Result<Vec<Share>> {
        trigonometric::online(self, x, all, form)
    }

    fn positive_part(&self, x: &Share, cut: u32) -> Result<Share> {
        protocols::compare::online(self, x, Want::Positive(cut))
    }

    fn non_negative(&self, x: &Share) -> Result<Share> {
        protocols::compare::online(self, x, Want::Bit)
    }

    fn lines(&self, x: &Share, spec: &Arc<Lines>) -> Result<Share> {
        lines::online(self, x, spec)
    }

    fn coarse_max(&self, x: &Share, spec: &CoarseMax) -> Result<Share> {
        coarse_max::online(self, x, spec)
    }

    fn lookup(&self, x: &Share, bits: u32, tables: &[Arc<Vec<u64>>], scale: u32) -> Result<Vec<Share>> {
        protocols::lookup::online(self, x, bits, tables, scale)
    }

    fn reveal_to(&self, x: &Share, to: Party) -> Result<Option<Revealed>> {
        protocols::reveal::online(self, x, to)
    }

    fn hand_over(&self, x: &Share) -> Result<Option<Revealed>> {
        protocols::deliver::online(self, x)?;
        Ok(None)
    }
}
