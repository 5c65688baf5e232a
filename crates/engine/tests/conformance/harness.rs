//! Runs one operation on every interpreter and compares them.

use std::collections::VecDeque;

use proptest::prelude::*;
use veiltune_engine::session::{self, Program};
use veiltune_engine::{
    Activation, Backend, Comparison, Error, Fixed, NormSpec, Owner, Party, Plain, Range, Result, Revealed,
    SoftmaxSpec,
};
use veiltune_ring::prg::{Prg, Seed};

/// Who knows an operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Who {
    Public,
    P0,
    P1,
    Shared,
}

#[derive(Clone, Copy, Debug)]
pub enum Op {
    MatMul,
    Linear,
    Mul,
    Add,
    Sub,
    /// Of three operands, of which two may give the sum its owner.
    SumTimes,
    ReluOfSum,
    Square,
    Cube,
    Scale(f64),
    MulTwice,
    Relu,
    ReluOfProduct,
    /// Of 49 fractional bits: truncated on the same opening.
    ReluOfFineProduct,
    /// Of 49 fractional bits, whose parts are then multiplied.
    Trim,
    /// A row of 48 fractional bits, truncated, times a matrix.
    FineRow,
    /// As `FineRow`, times a weight.
    FineRowLinear,
    Argmax,
    Activation(Activation, Range),
    ActivationOfProduct(Activation, Range),
    /// Of 49 fractional bits: the gate's result is truncated, not its input.
    ActivationOfFineProduct(Activation, Range),
    /// GELU of a linear layer of a normalised product, and another linear layer: what zeros do on their way.
    Mlp(NormSpec, Range),
    Turns,
    TurnsOfProduct,
    Softmax(SoftmaxSpec),
    Attend(SoftmaxSpec),
    /// The values are of 49 fractional bits.
    AttendToFineProduct(SoftmaxSpec),
    /// Of the square, so that x is positive.
    ReciprocalOfSquare((f64, f64)),
    Reciprocal((f64, f64)),
    Normalize(NormSpec),
    NormalizeOfProduct(NormSpec),
    NormalizeOfFineProduct(NormSpec),
    Views,
}

impl Op {
    /// The ways to compare that it is run with.
    fn comparisons(self) -> &'static [Comparison] {
        match self {
            Op::Relu
            | Op::ReluOfSum
            | Op::ReluOfProduct
            | Op::ReluOfFineProduct
            | Op::Argmax
            | Op::Activation(_, Range::Guarded(_)) => &[Comparison::Fss, Comparison::MaskedBits],
            _ => &[Comparison::Fss],
        }
    }
}

#[derive(Clone, Debug)]
pub struct Case {
    pub who: Who,
    dims: Vec<usize>,
    values: Vec<f32>,
    weight: bool,
}

/// `n` values in -size ..= size, whatever `n` the case needs.
pub fn uniform(seed: u64, size: f64) -> Vec<f32> {
    let mut prg = Prg::new(&Seed::from_bytes([7; 16]), seed, 0);
    prg.vec(4096)
        .into_iter()
        .map(|v| (v as i64 as f64 / 2f64.powi(63) * size) as f32)
        .collect()
}

impl Case {
    pub fn input(who: Who, dims: &[usize], mut values: Vec<f32>) -> Case {
        values.truncate(dims.iter().product());
        Case {
            who,
            dims: dims.to_vec(),
            values,
            weight: false,
        }
    }

    pub fn weight(who: Who, dims: &[usize], values: Vec<f32>) -> Case {
        Case {
            weight: true,
            ..Case::input(who, dims, values)
        }
    }

    fn enter<B: Backend>(&self, b: &B, me: Option<Party>) -> Result<B::Tensor> {
        let part = |owner: Owner, values: &[f32]| {
            let mine = match (owner, me) {
                (Owner::Party(p), Some(me)) => p == me,
                _ => true,
            };
            b.input(owner, &self.dims, mine.then_some(values))
        };
        match self.who {
            Who::Public => part(Owner::Public, &self.values),
            Who::P0 => part(Owner::Party(Party::P0), &self.values),
            Who::P1 => part(Owner::Party(Party::P1), &self.values),
            Who::Shared => b.input(Owner::Shared, &self.dims, me.is_none().then_some(&self.values)),
        }
    }

    fn load<B: Backend>(&self, b: &B, me: Option<Party>) -> Result<B::Weight> {
        let owner = match self.who {
            Who::Public => Owner::Public,
            Who::P0 => Owner::Party(Party::P0),
            Who::P1 => Owner::Party(Party::P1),
            Who::Shared => Owner::Shared,
        };
        let mine = match (owner, me) {
            (Owner::Party(p), Some(me)) => p == me,
            (Owner::Shared, me) => me.is_none(),
            _ => true,
        };
        b.weight(owner, &self.dims, mine.then_some(&self.values))
    }
}

struct OpProgram<'a> {
    op: Op,
    cases: &'a [Case],
    me: Option<Party>,
    comparison: Comparison,
}

impl OpProgram<'_> {
    /// The operation, its result scaled by a power of two so that a reveal shows every bit of it.
    fn run<B: Backend>(&self, b: &B, weights: &[B::Weight]) -> Result<(B::Tensor, u32)> {
        let xs = self
            .cases
            .iter()
            .filter(|c| !c.weight)
            .map(|c| c.enter(b, self.me))
            .collect::<Result<Vec<_>>>()?;
        let y = match self.op {
            Op::MatMul => b.matmul(&xs[0], &xs[1])?,
            Op::Linear => b.linear(&xs[0], &weights[0], Some(&weights[1]))?,
            Op::Mul => b.mul(&xs[0], &xs[1])?,
            Op::Add => b.add(&xs[0], &xs[1])?,
            Op::Sub => b.sub(&xs[0], &xs[1])?,
            Op::SumTimes => b.mul(&b.add(&xs[0], &xs[1])?, &b.sub(&xs[2], &xs[1])?)?,
            Op::ReluOfSum => b.relu(&b.add(&xs[0], &xs[1])?)?,
            Op::Square => b.mul(&xs[0], &xs[0])?,
            Op::Cube => b.mul(&b.mul(&xs[0], &xs[0])?, &xs[0])?,
            Op::Scale(c) => b.scale(&xs[0], c)?,
            Op::MulTwice => {
                let p = b.mul(&xs[0], &xs[1])?;
                let q = b.mul(&xs[1], &xs[1])?;
                b.mul(&p, &q)?
            }
            Op::Relu => b.relu(&xs[0])?,
            Op::ReluOfProduct => b.relu(&b.mul(&xs[0], &xs[1])?)?,
            Op::ReluOfFineProduct => b.relu(&b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?)?,
            Op::Trim => {
                let x = b.trim(&b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?)?;
                b.prepare(&[&x])?;
                b.matmul(&b.narrow(&x, 1, 0, 1)?, &b.transpose(&x, 1, 2)?)?
            }
            Op::FineRow => b.matmul(&b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?, &xs[2])?,
            Op::FineRowLinear => {
                let x = b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?;
                b.linear(&x, &weights[0], None)?
            }
            Op::Argmax => b.argmax(&xs[0])?,
            Op::Activation(f, range) => b.activation(&xs[0], f, range)?,
            Op::TurnsOfProduct => {
                let square = b.mul(&xs[0], &xs[1])?;
                // 58 fractional bits, more than a double holds of an angle.
                let fine = b.scale(&square, 2f64.powi(-26))?;
                b.cat(&b.turns(&fine)?.each_ref(), 0)?
            }
            Op::Turns => {
                let [sin, cos] = b.turns(&xs[0])?;
                b.cat(&[&sin, &cos], 0)?
            }
            Op::ActivationOfProduct(f, range) => {
                let p = b.mul(&xs[0], &b.scale(&xs[1], 0.125)?)?;
                b.activation(&p, f, range)?
            }
            Op::ActivationOfFineProduct(f, range) => {
                b.activation(&b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?, f, range)?
            }
            Op::Mlp(spec, range) => {
                let x = b.normalize(&b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?, &spec)?;
                let y = b.activation(&b.linear(&x, &weights[0], None)?, Activation::Gelu, range)?;
                b.linear(&y, &weights[0], None)?
            }
            Op::Softmax(spec) => b.softmax(&xs[0], &spec)?,
            Op::Attend(spec) => b.attend(&xs[0], &xs[1], &spec)?,
            Op::AttendToFineProduct(spec) => {
                b.attend(&xs[0], &b.mul(&b.scale(&xs[1], 0.3)?, &xs[2])?, &spec)?
            }
            Op::Reciprocal(range) => b.reciprocal(&xs[0], range)?,
            Op::ReciprocalOfSquare(range) => b.reciprocal(&b.mul(&xs[0], &xs[0])?, range)?,
            Op::Normalize(spec) => b.normalize(&xs[0], &spec)?,
            Op::NormalizeOfFineProduct(spec) => {
                b.normalize(&b.mul(&b.scale(&xs[0], 0.3)?, &xs[1])?, &spec)?
            }
            Op::NormalizeOfProduct(spec) => b.normalize(&b.mul(&xs[0], &xs[1])?, &spec)?,
            Op::Views => {
                let (x, y) = (&xs[0], &xs[1]);
                b.prepare(&[x])?;
                let t = b.transpose(x, 1, 2)?; // opened
                let s = b.matmul(&b.narrow(y, 1, 1, 2)?, &t)?; // [2, 2, 3]
                let flat = b.reshape(&b.cat(&[&s, &s], 1)?, &[2, 12])?;
                let total = b.sum(&b.mul(&flat, &flat)?, 1)?;
                b.add(&b.scale(&total, 1.0 / 128.0)?, &b.narrow(&flat, 1, 3, 1)?)?
            }
        };
        let extra = b.fractional_bits(&y).saturating_sub(16);
        Ok((b.scale(&y, 2f64.powi(extra as i32))?, extra))
    }
}

impl Program for OpProgram<'_> {
    type Model<B: Backend> = Vec<B::Weight>;

    fn comparison(&self) -> Comparison {
        self.comparison
    }

    fn load<B: Backend>(&self, b: &B) -> Result<Vec<B::Weight>> {
        self.cases
            .iter()
            .filter(|c| c.weight)
            .map(|c| c.load(b, self.me))
            .collect()
    }

    fn forward<B: Backend>(&self, b: &B, weights: &Vec<B::Weight>, _: usize) -> Result<Option<Revealed>> {
        b.reveal(&self.run(b, weights)?.0, Party::P0)
    }
}

fn seeds() -> [Seed; 2] {
    [Seed::from_bytes([1; 16]), Seed::from_bytes([2; 16])]
}

fn in_the_clear<B: Backend>(b: &B, op: Op, cases: &[Case]) -> Result<(Revealed, u32)> {
    let program = OpProgram {
        op,
        cases,
        me: None,
        comparison: Comparison::Fss,
    };
    let weights = program.load(b)?;
    let (y, extra) = program.run(b, &weights)?;
    let revealed = b
        .reveal(&y, Party::P0)?
        .ok_or_else(|| Error::program("test", "nothing revealed"))?;
    Ok((revealed, extra))
}

pub fn fixed(op: Op, cases: &[Case]) -> Result<Revealed> {
    Ok(in_the_clear(&Fixed::with_seeds(seeds()), op, cases)?.0)
}

/// Compares the interpreters; `bound` is the largest difference of Plain and Fixed.
pub fn check(op: Op, cases: &[Case], bound: f64) -> std::result::Result<(), TestCaseError> {
    let fail = |e: Error| TestCaseError::fail(format!("{op:?}: {e}"));
    // Plain sees the values as the encoding rounds them.
    let rounded: Vec<Case> = cases
        .iter()
        .map(|c| Case {
            values: c.values.iter().map(|v| (v * 65536.0).round() / 65536.0).collect(),
            ..c.clone()
        })
        .collect();
    let (plain, _) = in_the_clear(&Plain::new(), op, &rounded).map_err(fail)?;
    let (fixed, extra) = in_the_clear(&Fixed::with_seeds(seeds()), op, &rounded).map_err(fail)?;
    let unit = 2f64.powi(extra as i32);
    prop_assert_eq!(&plain.dims, &fixed.dims);
    for (i, (p, f)) in plain.values.iter().zip(&fixed.values).enumerate() {
        prop_assert!(
            (p - f / unit).abs() <= bound,
            "{:?} at {}: plain {} fixed {}",
            op,
            i,
            p,
            f / unit
        );
    }

    for &comparison in op.comparisons() {
        let programs = [Party::P0, Party::P1].map(|me| OpProgram {
            op,
            cases: &rounded,
            me: Some(me),
            comparison,
        });
        let mut shares = [VecDeque::new(), VecDeque::new()];
        // Parameters enter first.
        for weight in [true, false] {
            for case in rounded
                .iter()
                .filter(|c| c.weight == weight && c.who == Who::Shared)
            {
                for (list, part) in shares
                    .iter_mut()
                    .zip(session::share(&case.dims, &case.values).map_err(fail)?)
                {
                    list.push_back(part);
                }
            }
        }
        let local = session::run_local([&programs[0], &programs[1]], 1, seeds(), shares).map_err(fail)?;
        let revealed = local.outputs[0][0]
            .as_ref()
            .ok_or_else(|| TestCaseError::fail("the first party learns the result"))?;
        prop_assert!(local.outputs[1][0].is_none() || cases.iter().all(|c| c.who == Who::Public));
        prop_assert_eq!(
            revealed,
            &fixed,
            "the parties and the fixed-point interpreter differ: {:?}",
            op
        );

        let total = local.plan.tally.total();
        for (i, report) in local.reports.iter().enumerate() {
            prop_assert_eq!(report.online_meter.rounds, total.rounds, "rounds, {:?}", op);
            prop_assert_eq!(report.online_meter.sent, total.online_bytes[i], "bytes, {:?}", op);
            prop_assert_eq!(
                report.dealer_bytes,
                total.dealer_bytes[i],
                "dealer bytes, {:?}",
                op
            );
            prop_assert_eq!(
                report.setup_meter.sent,
                local.plan.tally.setup_bytes[i],
                "set-up bytes, {:?}",
                op
            );
        }
    }
    Ok(())
}
