//! The fixed-point interpreter: the protocols' arithmetic on plain ring elements, on one machine.
//!
//! It is the oracle. Given the seeds of a session it draws the same masks as the parties do, so that even the
//! rounding bit of a one-round truncation agrees: its results equal the parties' bit for bit. It is also where the
//! bounds that the protocols rest on are asserted: no product leaves the signed range, no truncated value reaches
//! 2^62, no compared value exceeds its declared bits.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use veiltune_ring::prg::{Prg, Seed};
use veiltune_ring::{Ring, codec};

use crate::gates::{self, Gates, Local, Meta, Product, SCALE};
use crate::material::Dealt;
use crate::offline::low_bits;
use crate::opening::{BOTH, Carry, GateId, Learners, Opening, PARAMETER_GATES, holds};
use crate::protocols::{
    self,
    carried::{self, Traced},
    coarse_max::{self, CoarseMax},
    compare::Want,
    lines::{self, Lines},
    trigonometric::{self, Form},
    truncate::Mode,
};
use crate::series::Series;
use crate::{Error, Owner, Party, Result, Revealed};

/// See the module.
pub struct Fixed {
    seeds: [Seed; 2],
    next_gate: Cell<GateId>,
    next_parameter: Cell<GateId>,
    /// Where the program is, for errors.
    layer: RefCell<String>,
}

/// A fixed-point tensor in the clear. Several interpreters, each on a thread of its own, may use the same.
#[derive(Clone)]
pub struct FixedTensor(Arc<Inner>);

struct Inner {
    meta: Meta,
    value: Ring,
    opening: Mutex<Opening>,
    /// Its mask once something asked for it: most products need none here.
    mask: OnceLock<Ring>,
    /// Of what is opened as a view of another tensor: which, and what was done to it.
    view: Option<(FixedTensor, Local)>,
    /// Of a value that is known up to dealt values; see [`carried`].
    carried: Option<Arc<Traced>>,
    /// Of a truncated value that was not opened: what was dealt, and the rest of its mask.
    cut: Option<(Ring, Carry)>,
}

impl Inner {
    fn opening(&self) -> MutexGuard<'_, Opening> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fixed {
    /// With fresh seeds: the rounding of one-round truncations is drawn anew.
    pub fn new() -> Result<Fixed> {
        Ok(Fixed::with_seeds([Seed::random()?, Seed::random()?]))
    }

    /// With the seeds of a session: bit for bit the session's results.
    pub fn with_seeds(seeds: [Seed; 2]) -> Fixed {
        Fixed {
            seeds,
            next_gate: Cell::new(0),
            next_parameter: Cell::new(PARAMETER_GATES),
            layer: RefCell::default(),
        }
    }

    /// The ring elements of a tensor.
    pub fn ring<'a>(&self, x: &'a FixedTensor) -> &'a Ring {
        &x.0.value
    }

    /// The decoded values of a tensor.
    pub fn values(&self, x: &FixedTensor) -> Vec<f64> {
        codec::decode(x.0.value.as_slice(), x.0.meta.scale)
    }

    // ---- for the protocols ----

    pub(crate) fn tensor(&self, meta: Meta, value: Ring) -> FixedTensor {
        self.carrying(meta, value, None)
    }

    /// A new tensor that is known up to dealt values, if `carried`.
    pub(crate) fn carrying(&self, meta: Meta, value: Ring, carried: Option<Traced>) -> FixedTensor {
        self.make(meta, value, carried.map(Arc::new), None, None)
    }

    /// A new tensor that is public but for a carry and `dealt`; see [`truncate`](crate::protocols::truncate).
    pub(crate) fn truncated(&self, meta: Meta, value: Ring, dealt: Ring, left: Carry) -> FixedTensor {
        self.make(meta, value, None, Some((dealt, left)), None)
    }

    fn make(
        &self,
        meta: Meta,
        value: Ring,
        carried: Option<Arc<Traced>>,
        cut: Option<(Ring, Carry)>,
        view: Option<(FixedTensor, Local)>,
    ) -> FixedTensor {
        debug_assert!(gates::are_multiples(&value, meta.zeros));
        let opening = match &view {
            Some((of, _)) => of.0.opening().clone(),
            None => Opening::new(meta.owner),
        };
        FixedTensor(Arc::new(Inner {
            meta,
            value,
            opening: Mutex::new(opening),
            mask: OnceLock::new(),
            view,
            carried,
            cut,
        }))
    }

    /// How `x` is known up to dealt values, if it was truncated to be.
    pub(crate) fn carried(&self, x: &FixedTensor) -> Option<Arc<Traced>> {
        x.0.carried.clone()
    }

    /// The first party's shares of `n` values of `bits` bits that a gate deals.
    pub(crate) fn first_of_dealt(&self, stream: (GateId, u16), n: usize, bits: u32) -> Vec<u64> {
        Prg::new(&self.seeds[0], stream.0, stream.1).bits(n, bits)
    }

    /// The same, to be read piece by piece.
    pub(crate) fn first_dealt(&self, stream: (GateId, u16), bits: u32) -> Dealt {
        Dealt::Stream(Box::new(Prg::new(&self.seeds[0], stream.0, stream.1)), bits)
    }

    pub(crate) fn gate(&self) -> GateId {
        let id = self.next_gate.get();
        self.next_gate.set(id + 1);
        id
    }

    pub(crate) fn is_open(&self, x: &FixedTensor) -> bool {
        x.0.opening().is_full()
    }

    /// The whole mask of an opened tensor.
    pub(crate) fn mask(&self, x: &FixedTensor) -> Result<Ring> {
        let (x, dims) = (&x.0, &x.0.meta.dims);
        let Some(id) = x.opening().id else {
            return Ok(Ring::zeros(dims.clone()));
        };
        if let Some(mask) = x.mask.get() {
            return Ok(mask.clone());
        }
        let mut mask;
        if let Some((of, map)) = &x.view {
            mask = map.apply(&self.mask(of)?)?;
        } else if let Some((dealt, left)) = &x.cut {
            mask = dealt.clone();
            let fresh = self.small_mask(id, 0, dealt.len(), left.bits);
            for (m, s) in mask.make_mut().iter_mut().zip(fresh) {
                *m = m.wrapping_add(s << left.zeros());
            }
        } else {
            mask = Ring::zeros(dims.clone());
            for i in 0..2 {
                if holds(x.meta.owner, i) {
                    let part = Prg::new(&self.seeds[i], id, 0).ring(dims.clone());
                    mask.add_assign(&gates::floor_to(part, x.meta.zeros))?;
                }
            }
        }
        Ok(x.mask.get_or_init(|| mask).clone())
    }

    pub(crate) fn open_for(&self, requests: &[(&FixedTensor, Learners)]) {
        for (x, learners) in requests {
            x.0.opening().request(*learners, || self.gate());
        }
    }

    /// The small mask of a gate: the sum of both parties' parts.
    pub(crate) fn small_mask(&self, gate: GateId, slot: u16, n: usize, bits: u32) -> Vec<u64> {
        let mut a = Prg::new(&self.seeds[0], gate, slot).bits(n, bits);
        let b = Prg::new(&self.seeds[1], gate, slot).bits(n, bits);
        a.iter_mut()
            .zip(b)
            .for_each(|(a, b)| *a = a.wrapping_add(b) & low_bits(bits));
        a
    }

    /// Asserts |x| < 2^bits in the ring.
    pub(crate) fn assert_below(&self, op: &'static str, x: &Ring, bits: u32) -> Result<()> {
        let limit = 1u64 << bits;
        if x.as_slice().iter().all(|v| v.wrapping_add(limit) < 2 * limit) {
            return Ok(());
        }
        let dims = x.dims();
        Err(self.out_of_range(
            op,
            format!(
                "a value reaches 2^{bits} in the ring (shape {dims:?}): scale the weights or inputs down, or calibrate a \
                 wider range"
            ),
        ))
    }

    /// The error of a bound that does not hold, with where the program is.
    pub(crate) fn out_of_range(&self, op: &'static str, mut detail: String) -> Error {
        let layer = self.layer.borrow();
        if !layer.is_empty() {
            detail = format!("in {layer}, {detail}");
        }
        Error::Range { op, detail }
    }
}

impl Gates for Fixed {
    type T = FixedTensor;

    fn enter_layer(&self, name: &str) {
        name.clone_into(&mut self.layer.borrow_mut());
    }

    fn meta<'a>(&self, x: &'a FixedTensor) -> &'a Meta {
        &x.0.meta
    }

    fn enter(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<FixedTensor> {
        let meta = Meta {
            dims: dims.to_vec(),
            scale: SCALE,
            owner,
            zeros: 0,
        };
        let values = values.ok_or_else(|| gates::missing("input", owner))?;
        Ok(self.tensor(meta, gates::encode("input", dims, values)?))
    }

    fn parameter(&self, owner: Owner, dims: &[usize], values: Option<&[f32]>) -> Result<FixedTensor> {
        let x = self.enter(owner, dims, values)?;
        let id = self.next_parameter.get();
        self.next_parameter.set(id + 1);
        if gates::opens_at_setup(owner, dims) {
            x.0.opening().request(BOTH, || id);
        }
        Ok(x)
    }

    fn local(&self, x: &FixedTensor, map: &Local) -> Result<FixedTensor> {
        // The same ring elements are known in the same way.
        let carried = x.0.carried.clone().filter(|_| matches!(map, Local::Relabel(_)));
        let opened = x.0.opening().id.is_some();
        let cut = match &x.0.cut {
            Some((dealt, left)) if !opened => match left.after(map) {
                Some(left) => Some((map.apply(dealt)?, left)),
                None => None,
            },
            _ => None,
        };
        let view = opened.then(|| (x.clone(), map.clone()));
        Ok(self.make(map.meta(&x.0.meta)?, map.apply(&x.0.value)?, carried, cut, view))
    }

    fn concat(&self, xs: &[&FixedTensor], dim: usize) -> Result<FixedTensor> {
        let metas: Vec<&Meta> = xs.iter().map(|x| &x.0.meta).collect();
        let values: Vec<&Ring> = xs.iter().map(|x| &x.0.value).collect();
        Ok(self.tensor(gates::concat_meta(&metas, dim)?, Ring::cat(&values, dim)?))
    }

    fn sum_of(&self, a: &FixedTensor, b: &FixedTensor, subtract: bool) -> Result<FixedTensor> {
        let meta = gates::sum_meta(&a.0.meta, &b.0.meta)?;
        let (x, y) = (&a.0.value, &b.0.value);
        let carried = carried::fixed_sum(self, a, b, subtract)?;
        Ok(self.carrying(meta, if subtract { x.sub(y)? } else { x.add(y)? }, carried))
    }

    fn add_constant(&self, x: &FixedTensor, c: u64) -> Result<FixedTensor> {
        // The mask is that of x.
        let view = self
            .is_open(x)
            .then(|| (x.clone(), Local::Relabel(x.0.meta.scale)));
        let meta = gates::shifted_meta(&x.0.meta, c);
        Ok(self.make(meta, x.0.value.add_scalar(c), None, None, view))
    }

    fn open(&self, xs: &[&FixedTensor]) -> Result<()> {
        let requests: Vec<_> = xs.iter().map(|x| (*x, BOTH)).collect();
        self.open_for(&requests);
        Ok(())
    }

    fn product(&self, kind: Product, a: &FixedTensor, b: &FixedTensor) -> Result<FixedTensor> {
        protocols::product::fixed(self, kind, a, b)
    }

    fn truncate(&self, xs: &[(&FixedTensor, u32)], faithful: bool) -> Result<Vec<FixedTensor>> {
        protocols::truncate::fixed(self, xs, Mode::of(faithful))
    }

    fn truncate_carried(&self, xs: &[(&FixedTensor, u32)]) -> Result<Vec<FixedTensor>> {
        protocols::truncate::fixed(self, xs, Mode::Carried)
    }

    fn is_carried(&self, x: &FixedTensor) -> bool {
        self.carried(x).is_some()
    }

    fn square_sum(&self, x: &FixedTensor) -> Result<FixedTensor> {
        carried::fixed_square_sum(self, x)
    }

    fn series_of(&self, x: &FixedTensor, all: &[Arc<Series>], form: Form) -> Result<Vec<FixedTensor>> {
        trigonometric::fixed(self, x, all, form)
    }

    fn positive_part(&self, x: &FixedTensor, cut: u32) -> Result<FixedTensor> {
        protocols::compare::fixed(self, x, Want::Positive(cut))
    }

    fn non_negative(&self, x: &FixedTensor) -> Result<FixedTensor> {
        protocols::compare::fixed(self, x, Want::Bit)
    }

    fn lines(&self, x: &FixedTensor, spec: &Arc<Lines>) -> Result<FixedTensor> {
        lines::fixed(self, x, spec)
    }

    fn coarse_max(&self, x: &FixedTensor, spec: &CoarseMax) -> Result<FixedTensor> {
        coarse_max::fixed(self, x, spec)
    }

    fn lookup(
        &self,
        x: &FixedTensor,
        bits: u32,
        tables: &[Arc<Vec<u64>>],
        scale: u32,
    ) -> Result<Vec<FixedTensor>> {
        protocols::lookup::fixed(self, x, bits, tables, scale)
    }

    fn reveal_to(&self, x: &FixedTensor, to: Party) -> Result<Option<Revealed>> {
        protocols::reveal::fixed(self, x, to)
    }

    fn hand_over(&self, x: &FixedTensor) -> Result<Option<Revealed>> {
        self.gate();
        Ok(Some(Revealed {
            dims: self.meta(x).dims.clone(),
            values: self.values(x),
        }))
    }
}
